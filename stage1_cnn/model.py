"""The network of stage one: a backbone and per-frame heads on its embeddings, and how checkpoints describe it.

The backbone of Jin et al. (MTRCNet, Medical Image Analysis 2020) is ResNet50; its tool branch is one linear layer on
the embedding, as in `ToolNet`.
"""

from __future__ import annotations

import hashlib
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
from stage1_cnn.encoders.backbone import Backbone, build_backbone, freeze_batch_norm, initial_backbone
from stage1_cnn.encoders.pretrained import CHECKPOINT_STAGE


class NetOutput(NamedTuple):
    """The outputs of `ToolNet` for N frames."""

    embedding: Tensor  # (N, D)
    tool_logits: Tensor  # (N, K)
    phase_logits: Tensor | None  # (N, C)


class ToolNet(nn.Module):
    """Backbone, tool head and, on request, a phase head, for single frames.

    `tools` may be 0 if a phase head is trained. Heads start as Xavier uniform with zero bias, drawn from torch's
    global generator.
    """

    def __init__(self, backbone: Backbone, tools: int, phases: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.tools, self.phases = tools, phases
        self.tool_head = tool_branch(backbone.embedding_dim, None, tools)
        self.phase_head = linear(backbone.embedding_dim, phases) if phases else None

    def forward(self, images: Tensor) -> NetOutput:
        """Images (N, 3, S, S), normalised, to embedding (N, D), tool logits (N, K), phase logits (N, C) or None."""
        embedding = self.backbone(images)  # (N, D)
        tool_logits = self.tool_head(embedding) if self.tool_head is not None else embedding.new_zeros(len(images), 0)
        phase_logits = self.phase_head(embedding) if self.phase_head is not None else None
        return NetOutput(embedding, tool_logits, phase_logits)

    def heads(self) -> Iterator[nn.Module]:
        """The heads that exist."""
        yield from (head for head in (self.tool_head, self.phase_head) if head is not None)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts as in the reference: Xavier uniform, zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def tool_branch(embedding_dim: int, hidden: int | None, tools: int) -> nn.Module | None:
    """One linear layer, or with `hidden` two and a ReLU between (MTRCNet-CL); None if there are no tools."""
    if not tools:
        return None
    if hidden is None:
        return linear(embedding_dim, tools)
    return nn.Sequential(linear(embedding_dim, hidden), nn.ReLU(), linear(hidden, tools))


# ---------------------------------------------------------------------------------------------- training


def parameter_groups(net: nn.Module, backbone_lr_factor: float, others: str = "head") -> list[dict[str, Any]]:
    """The net's `backbone`, with its learning-rate factor, and all `others`; a factor of 0 also needs no gradients."""
    backbone = net.get_submodule("backbone")
    if backbone_lr_factor == 0:
        backbone.requires_grad_(False)
    inside = {id(parameter) for parameter in backbone.parameters()}
    return [
        {"name": "backbone", "params": list(backbone.parameters()), "lr_factor": backbone_lr_factor},
        {"name": others, "params": [one for one in net.parameters() if id(one) not in inside]},
    ]


def synchronise_batch_norm(net: nn.Module, processes: Processes, device: torch.device) -> None:
    """Compute batch norm's mean and variance over all processes; in place, under the same names.

    Raises UserError on CPUs, for which torch has no synchronised batch norm.
    """
    if processes.count == 1:
        return
    if device.type != "cuda":
        raise UserError(f"sync_batch_norm=true: torch synchronises batch norm on CUDA only, not on {device.type}")
    nn.SyncBatchNorm.convert_sync_batchnorm(net)


# ---------------------------------------------------------------------------------------------- checkpoints


def build_net(config: Config, spec: DataSetSpec, *, trusted: bool = False) -> ToolNet:
    """The net that `config` names for a data set's classes, with its initial weights, in training mode."""
    cnn = config.cnn
    backbone = initial_backbone(config, trusted=trusted)
    if cnn.freeze_batch_norm:
        freeze_batch_norm(backbone)
    return ToolNet(backbone, len(spec.tools), len(spec.phases) if cnn.phase_head else None)


@dataclass(frozen=True, kw_only=True)
class CnnAbout(Record):
    """What a checkpoint of stage one holds besides weights: the fields are its keys, in their order."""

    stage: str = CHECKPOINT_STAGE
    backbone: str
    embedding_dim: int
    dataset: str
    tools: tuple[str, ...]
    phases: tuple[str, ...] | None  # None without a phase head
    scores: dict[str, Any] | None = None  # of the epoch, once there is one

    @classmethod
    def of(cls, net: ToolNet, spec: DataSetSpec) -> CnnAbout:
        """The description of a net for these classes."""
        return cls(
            backbone=net.backbone.name,
            embedding_dim=net.backbone.embedding_dim,
            dataset=spec.name,
            tools=spec.tools,
            phases=spec.phases if net.phases else None,
        )


@dataclass(frozen=True, kw_only=True)
class EncoderAbout(Record):
    """What `extract` needs of the description in a joint net's checkpoint."""

    backbone: str
    tools: tuple[str, ...]
    preprocess: PreprocessConfig
    net: JointNetConfig


def rebuild_from_checkpoint(path: Path) -> tuple[ToolNet, CnnAbout]:
    """The net of a `best.pt` or `last.pt` of stage one, on the CPU in evaluation mode, and its description.

    Raises UserError if the file is missing, damaged, or of another stage.
    """
    content = load_checkpoint(path)
    if content.get("stage") != CHECKPOINT_STAGE:
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
    """Backbone and tool branch of a joint net's checkpoint, and what belongs to them of its description.

    On the CPU in evaluation mode; the tool branch is None if the net has none. Raises UserError if the file is
    missing, damaged, or has no backbone.
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
    """Raise UserError unless a checkpoint's backbone is the one that `cnn.backbone` names."""
    if found != expected:
        raise UserError(f"{path}: holds {found}, but cnn.backbone={expected}; add --set cnn.backbone={found}")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of every parameter and buffer, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}\n".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
