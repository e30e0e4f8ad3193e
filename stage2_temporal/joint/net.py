"""The joint net: both stages in one, end to end (MTRCNet and MTRCNet-CL, Jin et al., Medical Image Analysis 2020).

    images -> backbone -> embedding -+-> tool branch ------------------------> tools
                                     +-> standardise -> LSTM -+-> last layer -> phases
                                                              +-> mapping ---> tools, as the phase branch sees them

The backbone is stage one's, the phase branch is stage two's whole model: built from a checkpoint of each, the net
computes what the two stages compute one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, one_line
from configs.schema import Config, HeadConfig, HeadSettings, JointNetConfig, PreprocessConfig
from engine.checkpoints import load_checkpoint
from engine.records import Record
from engine.runs import require_same_classes
from stage1_cnn.encoders.backbone import Backbone, build_backbone, freeze_batch_norm
from stage1_cnn.encoders.pretrained import best_checkpoint
from stage1_cnn.model import linear, rebuild_from_checkpoint, require_same_backbone, tool_branch
from stage2_temporal.heads.base import State, build_head, require_causal
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.joint.recompute import recomputed_blocks
from stage2_temporal.model import PhaseModel, require_same_head, require_same_model
from stage2_temporal.predict import Inference, load_temporal

KIND = "joint"
FOLDER = "joint"
STEPS = ("multitask", "mapping", "correlation")
IMPORTED = "imported"


class JointOutput(NamedTuple):
    """The outputs for B clips of T frames; None without the branch."""

    tool_logits: Tensor | None  # (B, T, K)
    phase_stages: list[Tensor] | None  # [(B, T, C), ...]
    mapped_logits: Tensor | None  # (B, T, K)
    state: State


class JointNet(nn.Module):
    """Shared backbone, a tool branch per frame, a phase branch over time, and the mapping from phases to tools.

    `tools` is 0 for a net without a tool branch, `phase` None for one without a phase branch (see `build_joint`).
    New layers start as in the reference: Xavier uniform with zero bias, drawn from torch's global generator.
    """

    def __init__(self, backbone: Backbone, config: JointNetConfig, tools: int, phase: PhaseModel | None) -> None:
        super().__init__()
        self.backbone, self.net_config, self.tools = backbone, config, tools
        self.tool_head = tool_branch(backbone.embedding_dim, config.tool_hidden, tools)
        self.phase = phase
        self.mapping = linear(phase.head.hidden_dim, tools) if phase is not None and config.mapping else None
        self.gradient_checkpointing = False
        self.imported_from: str | None = None  # the original programs' file that the weights come from
        self.unused: dict[str, Tensor] = {}  # that file's layers, by name, that the net does not have
        self._part = "all"

    def forward(self, images: Tensor, state: State | None = None, lengths: Tensor | None = None) -> JointOutput:
        """Normalised clips (B, T, 3, S, S) -> logits per frame; `state` and `lengths` as for the heads of stage two."""
        embedding = self.embed(images.flatten(0, 1))  # (B T, D)
        return self.branches(embedding.unflatten(0, images.shape[:2]), state, lengths)

    def embed(self, images: Tensor) -> Tensor:
        """Frames (N, 3, S, S) -> embeddings (N, D)."""
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        with recomputed_blocks(self.backbone) if again else nullcontext():
            return self.backbone(images)  # type: ignore[no-any-return]

    def branches(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> JointOutput:
        """As `forward`, from embeddings (B, T, D)."""
        tool_logits = self.tool_head(x) if self.tool_head is not None else None  # (B, T, K)
        if self.phase is None:
            return JointOutput(tool_logits, None, None, ())
        output = self.phase.with_hidden(x.float(), state, lengths)
        if self.mapping is not None and output.hidden is None:
            raise UserError("joint.net.mapping reads the head's hidden features, and this temporal.head gives none")
        mapped = self.mapping(output.hidden) if self.mapping is not None else None  # (B, T, K)
        return JointOutput(tool_logits, output.logits_per_stage, mapped, output.state)

    def train_only(self, part: Literal["all", "mapping"], freeze_mapping: bool = False) -> None:
        """Choose what is trained. With `mapping`, everything else is frozen, running statistics included."""
        self._part = part
        for name, parameter in self.named_parameters():
            if name.startswith("mapping."):
                parameter.requires_grad_(not freeze_mapping)
            else:
                parameter.requires_grad_(part == "all")
        if self.backbone.batch_norm_frozen:
            freeze_batch_norm(self.backbone)
        self.train(self.training)

    def train(self, mode: bool = True) -> JointNet:
        """Training or evaluation mode; what `train_only` has frozen stays in evaluation mode."""
        super().train(mode)
        if mode and self._part == "mapping":
            for name, module in self.named_children():
                module.train(name == "mapping")
        return self

    @property
    def phases(self) -> int:
        """C; 0 without a phase branch."""
        return self.phase.phases if self.phase is not None else 0


def build_joint(
    backbone: Backbone, config: JointNetConfig, head: HeadSettings | None, tools: int, phases: int
) -> JointNet:
    """A net with new branches on a backbone; embeddings enter the phase branch unstandardised."""
    phase = None
    if config.tasks != "tool":
        assert head is not None
        width = backbone.embedding_dim
        phase = PhaseModel(Standardise.identity(width), build_head(head, width, phases))
        require_causal(phase.head)
    return JointNet(backbone, config, tools if config.tasks != "phase" else 0, phase)


# ---------------------------------------------------------------------------------------------- from the two stages


def attach_cnn(net: JointNet, run: Path, tools: Sequence[str]) -> None:
    """Copy the backbone and, where it has the same shape, the tool head of stage one's best epoch.

    Raises UserError for another backbone or other tools.
    """
    path = best_checkpoint(run)
    stage_one, about = rebuild_from_checkpoint(path)
    require_same_backbone(path, stage_one.backbone.name, net.backbone.name)
    if net.tool_head is not None:
        require_same_classes(path, "tools", about.tools, tools)
    net.backbone.load_state_dict(stage_one.backbone.state_dict())
    if isinstance(net.tool_head, nn.Linear) and stage_one.tool_head is not None:
        net.tool_head.load_state_dict(stage_one.tool_head.state_dict())


def attach_temporal(net: JointNet, run: Path, phases: Sequence[str], head: HeadSettings) -> None:
    """Copy the whole phase branch, standardisation constants included, of stage two's best epoch.

    Raises UserError for other phases, another width of embeddings, or another head than the settings'.
    """
    path = run / "temporal" / "best.pt"
    model, about = load_temporal(path.parent)
    if net.phase is None:
        raise UserError("--from-temporal gives a phase branch, but joint.net.tasks=tool has none")
    if about.tool_inputs:
        raise UserError(
            f"{path}: reads stage one's tool logits beside the embedding, which the joint net's phase "
            "branch does not; train stage two with temporal.tool_logits=false"
        )
    require_same_model(path, model, about, phases, head, net.backbone.embedding_dim)
    net.phase.load_state_dict(model.state_dict())


def attach_joint(
    net: JointNet, path: Path, tools: Sequence[str], phases: Sequence[str], head: HeadSettings
) -> JointAbout:
    """Copy every branch of another joint checkpoint that this net has too (an imported one, for example).

    Returns the checkpoint's description. Raises UserError if classes, backbone, head or a branch's shape differ.
    """
    other, about = load_joint(path)
    require_same_classes(path, "phases", about.phases, phases if other.phase is not None else about.phases)
    require_same_classes(path, "tools", about.tools, tools if other.tool_head is not None else about.tools)
    require_same_backbone(path, about.backbone, net.backbone.name)
    if net.phase is not None and other.phase is not None:
        require_same_head(path, about.head, head)  # two heads of the same shapes may still compute different things
    net.backbone.load_state_dict(other.backbone.state_dict())
    net.imported_from, net.unused = other.imported_from, other.unused
    for name in ("tool_head", "phase", "mapping"):
        mine, theirs = getattr(net, name), getattr(other, name)
        if mine is None or theirs is None:
            continue
        try:
            mine.load_state_dict(theirs.state_dict())
        except RuntimeError as error:
            raise UserError(f"{path}: its {name} does not fit the settings ({one_line(error)})") from error
    return about


# ---------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True, kw_only=True)
class JointAbout(Record):
    """What a checkpoint of the joint net holds besides weights: the fields are its keys, in their order."""

    kind: str = KIND
    step: str
    imported_from: str | None  # the original programs' file that the weights come from
    unused: dict[str, Any] | None = None  # that file's layers (tensors) that the net does not have
    backbone: str
    embedding_dim: int
    net: JointNetConfig
    head: HeadConfig | None  # None without a phase branch
    tools: tuple[str, ...]
    phases: tuple[str, ...]
    dataset: str
    preprocess: PreprocessConfig
    fps: float
    inference: Inference
    frames: int
    seed: int
    original: dict[str, Any] | None = None  # of an imported net: file, hash, variant, order of phases, normalisation
    scores: dict[str, Any] | None = None  # of the epoch, once there is one

    @classmethod
    def of(cls, net: JointNet, head: HeadSettings | None, config: Config, spec: DataSetSpec, step: str) -> JointAbout:
        """The description of a net that is trained, or imported, with these settings."""
        return cls(
            step=step,
            imported_from=net.imported_from,
            unused=net.unused or None,
            backbone=net.backbone.name,
            embedding_dim=net.backbone.embedding_dim,
            net=net.net_config,
            head=head if net.phase is not None else None,
            tools=spec.tools,
            phases=spec.phases,
            dataset=spec.name,
            preprocess=config.preprocess,
            fps=config.data.fps,
            inference=config.joint.sequence.inference,
            frames=config.joint.sequence.frames,
            seed=config.seed,
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """`original`, empty for a net that was not imported."""
        return self.original or {}


def load_joint(path: Path) -> tuple[JointNet, JointAbout]:
    """The net of a joint checkpoint, on the CPU in evaluation mode, and its description.

    Raises UserError if the file is missing, damaged, or of another stage.
    """
    content = load_checkpoint(path)
    if content.get("kind") != KIND:
        raise UserError(f"{path}: not a checkpoint of train-joint")
    try:
        about = JointAbout.from_json(content)
        backbone = build_backbone(about.backbone, "random", 0)
        net = build_joint(backbone, about.net, about.head, len(about.tools), len(about.phases))
        net.load_state_dict(content["model"])
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of another version ({one_line(error)})") from error
    net.unused = about.unused or {}
    net.imported_from = about.imported_from or about.provenance.get("file")
    return net.eval(), about


def joint_checkpoint(run: Path) -> Path:
    """The best epoch of the last step that a run's joint net was trained in, or the imported net.

    Raises UserError if there is none.
    """
    for step in (*reversed(STEPS), IMPORTED):
        path = run / FOLDER / step / "best.pt"
        if path.is_file():
            return path
    raise UserError(f"{run / FOLDER}: no joint net; run train-joint under that name first")


def phase_weights(path: Path, phases: Sequence[str], head: HeadSettings, width: int) -> dict[str, Any]:
    """The state dict of a joint checkpoint's phase branch, constants of standardisation included, for stage two.

    Raises UserError if there is none, or if its head, phases or embedding width are not these, which are those of the
    settings and the features.
    """
    net, about = load_joint(path)
    if net.phase is None:
        raise UserError(f"{path}: a tool-only net has no phase branch")
    require_same_model(path, net.phase, about, phases, head, width, "the features' index")
    return net.phase.state_dict()
