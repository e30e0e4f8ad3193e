"""The network of stage one: a backbone with heads that classify single frames, and its description in checkpoints.

In MTRCNet (Jin et al., Medical Image Analysis 2020) the backbone is ResNet50, and the tool branch is one linear layer
on the embedding; `ToolNet` has the same structure.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, one_line
from configs.schema import Config, JointNetConfig, PreprocessConfig
from engine.checkpoints import load_checkpoint
from engine.processes import Processes
from engine.records import Record
from stage1_cnn.encoders.backbone import Backbone, build_backbone, freeze_batch_norm, freeze_until, initial_backbone
from stage1_cnn.encoders.layers import learning_steps

KIND = "cnn"


class NetOutput(NamedTuple):
    """The outputs of `ToolNet` for N frames."""

    embedding: Tensor  # (N, D)
    tool_logits: Tensor  # (N, K)
    phase_logits: Tensor | None  # (N, C)


class ToolNet(nn.Module):
    """A backbone with a tool head and, if `phases` is given, a phase head, for single frames.

    `tools` may be 0 if there is a phase head. The heads' weights are Xavier uniform, drawn from torch's global
    generator, and their biases are 0.
    """

    def __init__(self, backbone: Backbone, tools: int, phases: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.tools, self.phases = tools, phases
        self.tool_head = tool_branch(backbone.embedding_dim, None, tools)
        self.phase_head = linear(backbone.embedding_dim, phases) if phases else None

    def forward(self, images: Tensor) -> NetOutput:
        """Normalised images (N, 3, S, S) -> embedding (N, D), tool logits (N, K), phase logits (N, C) or None."""
        embedding = self.backbone(images)  # (N, D)
        tool_logits = self.tool_head(embedding) if self.tool_head is not None else embedding.new_zeros(len(images), 0)
        phase_logits = self.phase_head(embedding) if self.phase_head is not None else None
        return NetOutput(embedding, tool_logits, phase_logits)

    def heads(self) -> Iterator[nn.Module]:
        """The heads that exist."""
        yield from (head for head in (self.tool_head, self.phase_head) if head is not None)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer initialised as in the reference implementation of MTRCNet: Xavier uniform, zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def tool_branch(embedding_dim: int, hidden: int | None, tools: int) -> nn.Module | None:
    """The tool head: one linear layer or, with `hidden` (MTRCNet-CL), two with a ReLU between them.

    None if there are no tools.
    """
    if not tools:
        return None
    if hidden is None:
        return linear(embedding_dim, tools)
    return nn.Sequential(linear(embedding_dim, hidden), nn.ReLU(), linear(hidden, tools))


# ---------------------------------------------------------------------------------------------- training


def parameter_groups(
    net: nn.Module, backbone_lr_factor: float, others: str = "head", layer_lr_decay: float = 1.0
) -> list[dict[str, Any]]:
    """The groups of parameters for the optimiser: the net's `backbone`, and all others under the name `others`.

    With a `layer_lr_decay` below 1, each block of the backbone is a group, whose learning rate is that of the block
    after it times `layer_lr_decay` (Clark et al., ICLR 2020, for transformers; Bao et al., ICLR 2022, for images); the
    last block has the backbone's. A `backbone_lr_factor` of 0 also switches off the backbone's gradients.
    """
    backbone = net.get_submodule("backbone")
    if backbone_lr_factor == 0:
        backbone.requires_grad_(False)
    inside = {id(parameter) for parameter in backbone.parameters()}
    rest = {"name": others, "params": [one for one in net.parameters() if id(one) not in inside]}
    if layer_lr_decay == 1:
        return [{"name": "backbone", "params": list(backbone.parameters()), "lr_factor": backbone_lr_factor}, rest]
    steps = learning_steps(backbone.get_submodule("net"))
    factors = [backbone_lr_factor * layer_lr_decay**later for later in reversed(range(len(steps)))]
    blocks = [
        {"name": f"backbone.{path}".rstrip("."), "params": parameters, "lr_factor": factor}
        for (path, parameters), factor in zip(steps, factors, strict=True)
    ]
    return [*blocks, rest]


def synchronise_batch_norm(net: nn.Module, processes: Processes, device: torch.device) -> None:
    """Replace batch norm layers in place by ones that compute mean and variance over all processes.

    The names of their tensors stay the same. Raises UserError on CPUs, for which torch has no such layers.
    """
    if processes.count == 1:
        return
    if device.type != "cuda":
        raise UserError(f"sync_batch_norm=true: torch synchronises batch norm on CUDA only, not on {device.type}")
    if "timm" in sys.modules:
        from timm.layers import convert_sync_batchnorm  # torch's would drop the activations in timm's batch norm

        convert_sync_batchnorm(net)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(net)


# ---------------------------------------------------------------------------------------------- checkpoints


def build_net(config: Config, spec: DataSetSpec, *, trusted: bool = False) -> ToolNet:
    """The net that `config.cnn` describes, for the classes of a data set: with initial weights, in training mode."""
    cnn = config.cnn
    backbone = initial_backbone(config, trusted=trusted)
    if cnn.freeze_batch_norm:
        freeze_batch_norm(backbone)
    if cnn.freeze_until is not None:
        freeze_until(backbone, cnn.freeze_until)
    return ToolNet(backbone, len(spec.tools), len(spec.phases) if cnn.phase_head else None)


@dataclass(frozen=True, kw_only=True)
class CnnAbout(Record):
    """The description in a checkpoint of stage one: its fields are the checkpoint's keys, in this order."""

    stage: str = KIND
    backbone: str
    embedding_dim: int
    dataset: str
    tools: tuple[str, ...]
    phases: tuple[str, ...] | None  # None without a phase head
    scores: dict[str, Any] | None = None  # validation scores of the epoch; None before the first epoch has ended

    @classmethod
    def of(cls, net: ToolNet, spec: DataSetSpec) -> CnnAbout:
        """The description of `net`, trained for the classes of `spec`."""
        return cls(
            backbone=net.backbone.name,
            embedding_dim=net.backbone.embedding_dim,
            dataset=spec.name,
            tools=spec.tools,
            phases=spec.phases if net.phases else None,
        )


@dataclass(frozen=True, kw_only=True)
class EncoderAbout(Record):
    """The part of the description in a joint net's checkpoint that `extract` needs."""

    backbone: str
    tools: tuple[str, ...]
    preprocess: PreprocessConfig
    net: JointNetConfig


def rebuild_from_checkpoint(path: Path) -> tuple[ToolNet, CnnAbout]:
    """The net in a `best.pt` or `last.pt` of stage one, on the CPU in evaluation mode, and its description.

    Raises UserError if the file is missing, damaged, or of another stage.
    """
    content = load_checkpoint(path)
    if content.get("stage") != KIND:
        raise UserError(f"{path}: not a checkpoint of train-cnn")
    try:
        about = CnnAbout.from_json(content)
        backbone = build_backbone(about.backbone, "random", 0)
        net = ToolNet(backbone, len(about.tools), len(about.phases) if about.phases else None)
        net.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: its tensors do not match its description ({one_line(error)})") from error
    return net.eval(), about


def rebuild_encoder(path: Path) -> tuple[Backbone, nn.Module | None, EncoderAbout]:
    """Backbone and tool branch of the joint net in a checkpoint, and the part of its description about them.

    Both are on the CPU in evaluation mode. The tool branch is None if the net has none. Raises UserError if the file
    is missing, damaged, or has no backbone.
    """
    content = load_checkpoint(path)
    try:
        about, tensors = EncoderAbout.from_json(content), content["model"]
        backbone = build_backbone(about.backbone, "random", 0)
        head = tool_branch(backbone.embedding_dim, about.net.tool_hidden, len(about.tools))
        backbone.load_state_dict(_below("backbone.", tensors))
        weights = _below("tool_head.", tensors)
        if head is None or not weights:
            return backbone.eval(), None, about
        head.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: does not hold a backbone and its tools ({one_line(error)})") from error
    return backbone.eval(), head.eval(), about


def require_same_backbone(path: Path, found: str, expected: str) -> None:
    """Raise UserError unless `found`, the backbone in checkpoint `path`, is `expected`, the value of `cnn.backbone`."""
    if found != expected:
        raise UserError(f"{path}: holds {found}, but cnn.backbone={expected}; add --set cnn.backbone={found}")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over the name, type, shape and bytes of every parameter and buffer, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module (`get_extra_state`), which is no tensor
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}\n".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
