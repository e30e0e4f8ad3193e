"""Estimate the memory that training the joint net takes on a GPU, by counting on the CPU what a forward pass saves.

Two short clips are computed in bf16; the bytes of the tensors that autograd saves grow linearly with the frames, so the
difference gives the bytes per frame. Weights, gradients, optimiser state and input are added. What is not counted: the
temporary tensors of forward and backward pass, the workspace of cuDNN, fragmentation and the CUDA context. So this is
an estimate from below, not a measurement.

    python benchmarks/clip_memory.py [--config cholec80_best] [--set KEY=VALUE] [--json FILE]
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from command import options, say
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from configs.load import load_config, load_dataset
from configs.schema import Config, height_width
from stage1_cnn.encoders.backbone import build_backbone, freeze_until
from stage2_temporal.joint.net import JointNet, build_joint

FEW, MORE = 2, 4  # frames
GB = 1e9


def main() -> None:
    parser = options(__doc__, repeat=None)
    parser.add_argument("--config", default="cholec80_best")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    chosen = parser.parse_args()
    say(estimate(load_config(chosen.config, chosen.sets)), chosen.json)


def estimate(config: Config) -> dict[str, Any]:
    """Millions of parameters, bytes per frame, and GB for a step of `joint.sequence`."""
    net = _net(config)
    per_frame = (_saved_bytes(net, config, MORE) - _saved_bytes(net, config, FEW)) / (MORE - FEW)
    sequence, size = config.joint.sequence, height_width(config.preprocess.crop_px)
    frames = sequence.frames * sequence.batch
    parameters = sum(one.numel() for one in net.parameters())
    trained = sum(one.numel() for one in net.parameters() if one.requires_grad)
    parts = {
        "weights, fp32": 4 * parameters,
        "gradients and AdamW, fp32": 12 * trained,
        "frames, fp32": 4 * 3 * size[0] * size[1] * frames,
        "saved activations": per_frame * frames,
    }
    return {
        "backbone": config.cnn.backbone,
        "frozen_until": config.cnn.freeze_until,
        "gradient_checkpointing": config.joint.gradient_checkpointing,
        "frames_per_step": frames,
        "millions_of_parameters": round(parameters / 1e6, 2),
        "millions_trained": round(trained / 1e6, 2),
        "saved_mb_per_frame": round(per_frame / 1e6, 1),
        "gb": {name: round(value / GB, 2) for name, value in parts.items()},
        "gb_together": round(sum(parts.values()) / GB, 1),
    }


def _net(config: Config) -> JointNet:
    spec = load_dataset(config.data.dataset)
    backbone = build_backbone(config.cnn.backbone, "random", config.seed)
    net = build_joint(backbone, config.joint.net, config.temporal.head, len(spec.tools), len(spec.phases))
    if config.cnn.freeze_until:
        freeze_until(net.backbone, config.cnn.freeze_until)
    net.gradient_checkpointing = config.joint.gradient_checkpointing
    net.train_only("all")
    net.train()
    return net


class _Saved:
    """A tensor that autograd has saved; it lives as long as the graph refers to it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _saved_bytes(net: JointNet, config: Config, frames: int) -> int:
    """Bytes of the different storages that autograd keeps after the forward pass of one clip, without the weights."""
    weights = {one.untyped_storage().data_ptr() for one in net.parameters()}
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def keep(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    clip = torch.zeros(1, frames, 3, *height_width(config.preprocess.crop_px))
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda saved: saved.tensor):
        output = net(clip, None, torch.tensor([frames]))
    storages = [saved.tensor.untyped_storage() for saved in alive]
    assert output.tool_logits is not None or output.phase_stages is not None  # the graph is alive until here
    return sum({one.data_ptr(): one.nbytes() for one in storages if one.data_ptr() not in weights}.values())


if __name__ == "__main__":
    main()
