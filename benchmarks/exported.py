"""Time of a frame in an exported model (ONNX Runtime) beside torch, in one run.

    python benchmarks/exported.py --json FILE [--frames N] [--threads N] [--backbone NAME] [--heads NAMES] [--quick]

The nets have random weights; frames are random, and come one by one, with carried state. With one thread, times are
processor times, so that other programs disturb them little; with several, wall times. Medians in milliseconds, of
frames that alternate between the programs; the first three do not count.

- `whole`: from a resized frame to probabilities, with `--backbone` and the first of `--heads`: `torch` in fp32,
  `torch_auto` as `predict` computes without settings (bf16 where the CPU has it), and `onnx`. `ratio` is `torch` /
  `onnx`.
- `heads`: the same for every head, with tiny frames, and in place of the backbone a layer that costs nothing.
- `difference`: the largest difference of a probability between `torch` and `onnx` in these frames.
- `export_s` and `bytes`: the time of the conversion, and the size of the file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from command import CORES, PROJECT, options, say

sys.path.insert(0, str(PROJECT))
sys.path.remove(str(PROJECT / "benchmarks"))

import numpy as np
import torch
from torch import Tensor, nn

from configs.head_settings import read_head
from configs.load import load_config, load_dataset
from configs.schema import Config, height_width
from live.export.agreement import as_input, noise_frames
from live.export.description import describe
from live.export.frame_net import FrameNet
from live.export.onnx_model import OnnxSession, convert
from live.nets import EncoderParts, Nets
from stage1_cnn.encoders.backbone import Backbone, build_backbone
from stage1_cnn.encoders.encoder import Encoder
from stage2_temporal.heads.base import build_head
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.model import PhaseModel
from stage2_temporal.predict import OnlinePredictor

HEADS = "lstm,gru,tcn,ssm,trans_svnet,attention,key_pooling,linear"
WIDTH, SKIPPED = 2048, 3
SPEC = load_dataset("cholec80")


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    given = parser().parse_args()
    if given.quick:
        vars(given).update(frames=5, backbone="shufflenet_v2_x0_5", heads="linear")
    torch.set_num_threads(given.threads)
    config = load_config("cholec80", ["device=cpu", f"cnn.backbone={given.backbone}", "cnn.weights=random"], {})
    tiny = load_config("cholec80", ["device=cpu", "preprocess.resize_px=27", "preprocess.crop_px=27"], {})
    heads = given.heads.split(",")
    backbone = build_backbone(given.backbone, "random", 0).eval()
    figures: dict[str, Any] = {"whole": measured(nets_of(config, backbone, heads[0]), given), "heads": {}}
    small = Backbone("shufflenet_v2_x0_5", Spread(), WIDTH).eval()
    for name in heads:
        figures["heads"][name] = measured(nets_of(tiny, small, name), given)
    sizes = {"frames": given.frames, "threads": given.threads, "backbone": given.backbone, "cores": CORES}
    say({**figures, **sizes}, given.json)


def parser() -> argparse.ArgumentParser:
    """The options of this program."""
    one = options(__doc__, repeat=None)
    one.add_argument("--frames", type=int, default=60, metavar="N", help="(default: 60)")
    one.add_argument("--threads", type=int, default=1, metavar="N", help="(default: 1)")
    one.add_argument("--backbone", default="resnet50", metavar="NAME", help="(default: resnet50)")
    one.add_argument("--heads", default=HEADS, metavar="NAMES", help=f"comma-separated (default: {HEADS})")
    one.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    return one


class Spread(nn.Module):
    """An encoder that costs nothing: the first pixels of an image are its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) -> (N, WIDTH)."""
        return images.flatten(1)[:, :WIDTH] * self.scale


def nets_of(config: Config, backbone: Backbone, head: str) -> Nets:
    """Nets with this backbone, a tool head and this head at its default settings, in fp32, with random weights."""
    torch.manual_seed(0)
    dim, tool_head = backbone.embedding_dim, nn.Linear(backbone.embedding_dim, len(SPEC.tools))
    built = build_head(read_head({"name": head}), dim, len(SPEC.phases))
    nets = Nets(
        None,  # type: ignore[arg-type] # replaced below
        PhaseModel(Standardise.identity(dim), built).eval(),
        "carried",
        1,
        config,
        SPEC,
        {},
        parts=EncoderParts(backbone, tool_head, "float16"),
    )
    return in_precision(nets, "fp32")


def in_precision(nets: Nets, precision: str) -> Nets:
    """The same nets, whose encoder computes in this precision."""
    assert nets.parts is not None
    extract = nets.config.extract.model_copy(update={"precision": precision})
    config = nets.config.model_copy(update={"extract": extract})
    encoder = Encoder(config, nets.parts.backbone, nets.parts.tool_head, "0" * 64, len(SPEC.tools))  # type: ignore[arg-type]

    def encode(frames: Tensor) -> tuple[Tensor, Any]:
        embedding, logits = encoder(frames)
        return torch.from_numpy(embedding.astype(np.float16)).float(), logits

    return replace(nets, encode=encode)


def measured(nets: Nets, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of these nets."""
    started, net = time.perf_counter(), FrameNet(nets).eval()
    content = convert(net, describe(nets, net))
    export_s = time.perf_counter() - started
    session = OnnxSession(content, given.threads)
    ways: dict[str, Callable[[Any], Any]] = {
        "torch": by_torch(nets),
        "torch_auto": by_torch(in_precision(nets, "auto")),
    }
    ways["onnx"] = lambda frame: session.step(as_input(nets, frame))["phases"]
    clock = time.process_time if given.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    difference = 0.0
    for frame in noise_frames(height_width(nets.config.preprocess.resize_px), given.frames + SKIPPED):
        found = {}
        for name, way in ways.items():
            began = clock()
            found[name] = way(frame)
            seconds[name].append(clock() - began)
        difference = max(difference, float(np.abs(found["torch"] - found["onnx"]).max()))
    medians = {name: statistics.median(values[SKIPPED:]) * 1e3 for name, values in seconds.items()}
    ratio = medians["torch"] / medians["onnx"]
    times = {name: round(value, 3) for name, value in medians.items()}
    return {
        **times,
        "ratio": round(ratio, 2),
        "difference": difference,
        "export_s": round(export_s, 2),
        "bytes": len(content),
    }


def by_torch(nets: Nets) -> Callable[[Any], Any]:
    """A function that recognises the next frame in torch, as `predict` does."""
    online = OnlinePredictor(nets.phase, nets.inference, nets.clip_frames, "cpu")
    return lambda frame: online.step(nets.encode(torch.from_numpy(frame)[None])[0][0])


if __name__ == "__main__":
    main()
