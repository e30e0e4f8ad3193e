"""Nets of the original programs, made for the tests: state dicts with their keys, and their computations restated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

BACKBONE = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
# Layers besides share, as the original programs define them: name -> (inputs, outputs) of D, H, C, K.
LINEAR = {
    "tool": {"fc2": "DK"},
    "phase": {"fc": "HC"},
    "multitask": {"fc": "HC", "fc2": "DK"},
    "two-layer": {"fc": "HC", "fc2": "DH", "fc3": "HK"},
    "cl": {"fc": "HC", "fc2": "DH", "fc3": "HK", "fc_p2t": "HK"},
    "pytorch1.2.0": {"fc": "HC", "fc_h": "HH", "fc2": "DK"},
}


class Outputs(NamedTuple):
    """Logits of T frames; None if the net has no such branch."""

    tools: Tensor | None
    phases: Tensor | None
    mapped: Tensor | None


def share_of(backbone: str) -> nn.Sequential:
    net = torchvision.models.get_model(backbone, weights=None)
    share = nn.Sequential()
    for name in BACKBONE:
        share.add_module(name, getattr(net, name))
    return share


def original_state(
    variant: str,
    backbone: str = "resnet18",
    units: int = 16,
    phases: int = 7,
    tools: int = 7,
    prefix: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A state dict as an original program saves it, all numbers random, running statistics too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        share = share_of(backbone)
        for layer in share.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                layer.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
                layer.num_batches_tracked.fill_(37)  # type: ignore[union-attr]
        depth = share.layer4[-1]  # type: ignore[index]
        width = (depth.conv3 if hasattr(depth, "conv3") else depth.conv2).out_channels
        sizes = {"D": width, "H": units, "C": phases, "K": tools}
        net = nn.Module()
        net.share = share
        if variant != "tool":
            net.lstm = nn.LSTM(width, units, batch_first=True)
        for name, (inputs, outputs) in LINEAR[variant].items():
            setattr(net, name, nn.Linear(sizes[inputs], sizes[outputs]))
    start = "module." if prefix else ""
    return {f"{start}{name}": tensor.clone() for name, tensor in net.state_dict().items()}


@torch.no_grad()
def restated(variant: str, state: Mapping[str, Tensor], images: Tensor, backbone: str = "resnet18") -> Outputs:
    """What the original net computes on one clip (T, 3, S, S), from the formulas alone."""
    w = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    share = share_of(backbone)
    share.load_state_dict({name[6:]: tensor for name, tensor in w.items() if name.startswith("share.")}, strict=False)
    x = share.eval()(images).flatten(1)  # (T, D)

    def fc(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    tools = None
    if variant in ("tool", "multitask", "pytorch1.2.0"):
        tools = fc("fc2", x)
    elif variant in ("two-layer", "cl"):
        tools = fc("fc3", F.relu(fc("fc2", x)))
    if variant == "tool":
        return Outputs(tools, None, None)
    y = lstm(w, x)  # (T, H)
    if variant in ("phase", "multitask"):
        return Outputs(tools, fc("fc", y), None)
    if variant == "pytorch1.2.0":
        return Outputs(tools, fc("fc", F.relu(fc("fc_h", y))), None)
    return Outputs(tools, fc("fc", F.relu(y)), fc("fc_p2t", F.relu(y)) if variant == "cl" else None)


def lstm(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Hochreiter and Schmidhuber's cell, frame after frame, from a zero state."""
    h = c = torch.zeros(w["lstm.weight_hh_l0"].shape[1])
    out = []
    for frame in x:
        gates = (
            w["lstm.weight_ih_l0"] @ frame + w["lstm.bias_ih_l0"] + w["lstm.weight_hh_l0"] @ h + w["lstm.bias_hh_l0"]
        )
        i, f, g, o = gates.chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out)
