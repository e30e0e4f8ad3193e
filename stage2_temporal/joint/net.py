"""The joint net: both stages in one, end to end (MTRCNet and MTRCNet-CL, Jin et al., Medical Image Analysis 2020).

    images -> backbone -> embedding -+-> tool branch ------------------------> tools
                                     +-> standardise -> LSTM -+-> last layer -> phases
                                                              +-> mapping ---> tools, as the phase branch sees them

The backbone is that of stage one, and the phase branch is the whole model of stage two. Built from a checkpoint of each
stage, the net computes the same as the two stages one after the other.
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
from configs.head_settings import HeadConfig, HeadSettings
from configs.schema import JOINT_FOLDER, TEMPORAL_FOLDER, Config, Inference, JointNetConfig, PreprocessConfig
from engine.checkpoints import load_checkpoint
from engine.progress import say
from engine.records import Record
from engine.runs import BEST_FILE, require_same_classes
from stage1_cnn.encoders.backbone import Backbone, build_backbone
from stage1_cnn.encoders.pretrained import best_checkpoint
from stage1_cnn.model import linear, rebuild_from_checkpoint, require_same_backbone, tool_branch, weights_sha256
from stage2_temporal.heads.base import State, build_head, require_causal
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.joint.recompute import recomputed_blocks
from stage2_temporal.model import PhaseModel, require_same_head, require_same_model
from stage2_temporal.predict import load_temporal

KIND = "joint"
STEPS = ("multitask", "mapping", "correlation")
IMPORTED = "imported"


class JointOutput(NamedTuple):
    """The outputs of a joint net for B clips of T frames; None for a branch that the net does not have."""

    tool_logits: Tensor | None  # (B, T, K)
    phase_stages: list[Tensor] | None  # [(B, T, C), ...]
    mapped_logits: Tensor | None  # (B, T, K)
    state: State


class JointNet(nn.Module):
    """A shared backbone, a tool branch per frame, a phase branch over time, and a mapping from phases to tools.

    `tools` is 0 for a net without a tool branch, and `phase` is None for one without a phase branch (see
    `build_joint`). New layers are initialised as in MTRCNet: weights Xavier uniform, drawn from torch's global
    generator, and biases 0.
    """

    def __init__(self, backbone: Backbone, config: JointNetConfig, tools: int, phase: PhaseModel | None) -> None:
        super().__init__()
        self.backbone, self.net_config, self.tools = backbone, config, tools
        self.tool_head = tool_branch(backbone.embedding_dim, config.tool_hidden, tools)
        self.phase = phase
        self.mapping = linear(phase.head.hidden_dim, tools) if phase is not None and config.mapping else None
        self.gradient_checkpointing = False
        self.imported_from: str | None = None  # the file of MTRCNet's own programs that the weights come from
        self.unused: dict[str, Tensor] = {}  # layers of this file, by name, that the net does not have
        self._part = "all"

    def forward(self, images: Tensor, state: State | None = None, lengths: Tensor | None = None) -> JointOutput:
        """Normalised clips (B, T, 3, S, S) -> logits per frame; `Head.forward` explains `state` and `lengths`."""
        embedding = self.embed(images.flatten(0, 1))  # (B T, D)
        return self.branches(embedding.unflatten(0, images.shape[:2]), state, lengths)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised frames (N, 3, S, S) -> embeddings (N, D)."""
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        with recomputed_blocks(self.backbone) if again else nullcontext():
            return self.backbone(images)  # type: ignore[no-any-return]

    def branches(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> JointOutput:
        """The same as `forward`, for embeddings (B, T, D) instead of images."""
        tool_logits = self.tool_head(x) if self.tool_head is not None else None  # (B, T, K)
        if self.phase is None:
            return JointOutput(tool_logits, None, None, ())
        output = self.phase.with_hidden(x.float(), state, lengths)
        if self.mapping is not None and output.hidden is None:
            raise UserError("joint.net.mapping reads the head's hidden features, but this temporal.head returns none")
        mapped = self.mapping(output.hidden) if self.mapping is not None else None  # (B, T, K)
        return JointOutput(tool_logits, output.logits_per_stage, mapped, output.state)

    def train_only(self, part: Literal["all", "mapping"], freeze_mapping: bool = False) -> None:
        """Choose which part is trained. With `mapping`, everything else is frozen, including running statistics."""
        self._part = part
        for name, parameter in self.named_parameters():
            if name.startswith("mapping."):
                parameter.requires_grad_(not freeze_mapping)
            else:
                parameter.requires_grad_(part == "all")
        self.backbone.keep_frozen()
        self.train(self.training)

    def train(self, mode: bool = True) -> JointNet:
        """Switch to training or evaluation mode; parts that `train_only` has frozen stay in evaluation mode."""
        super().train(mode)
        if mode and self._part == "mapping":
            for name, module in self.named_children():
                module.train(name == "mapping")
        return self

    @property
    def phases(self) -> int:
        """The number of phases, C; 0 without a phase branch."""
        return self.phase.classes if self.phase is not None else 0


def build_joint(
    backbone: Backbone, config: JointNetConfig, head: HeadSettings | None, tools: int, phases: int
) -> JointNet:
    """A joint net with new branches on a backbone; its phase branch does not standardise embeddings."""
    phase = None
    if config.tasks != "tool":
        assert head is not None
        width = backbone.embedding_dim
        phase = PhaseModel(Standardise.identity(width), build_head(head, width, phases))
        require_causal(phase.head)
    return JointNet(backbone, config, tools if config.tasks != "phase" else 0, phase)


# ---------------------------------------------------------------------------------------------- from the two stages


def attach_cnn(net: JointNet, run: Path, tools: Sequence[str]) -> str:
    """Copy the backbone of stage one's best epoch into the net, and its tool head if the net's is one linear layer.

    Returns the hash of the weights by which features record their encoder (`EncoderSpec.weights_sha256`). Raises
    UserError if stage one has another backbone or other tools.
    """
    path = best_checkpoint(run)
    stage_one, about = rebuild_from_checkpoint(path)
    require_same_backbone(path, stage_one.backbone.name, net.backbone.name)
    if net.tool_head is not None:
        require_same_classes(path, "tools", about.tools, tools)
    net.backbone.load_state_dict(stage_one.backbone.state_dict())
    if isinstance(net.tool_head, nn.Linear) and stage_one.tool_head is not None:
        net.tool_head.load_state_dict(stage_one.tool_head.state_dict())
    return weights_sha256(stage_one)


def attach_temporal(net: JointNet, run: Path, phases: Sequence[str], head: HeadSettings, encoder_sha256: str) -> None:
    """Copy stage two's best epoch, including the constants of standardisation, into the net's phase branch.

    A note says if stage two was trained on the features of another encoder than the net's, whose weights have the hash
    `encoder_sha256`. Raises UserError if stage two has other phases, another width of embeddings, or a head other than
    `head`.
    """
    path = run / TEMPORAL_FOLDER / BEST_FILE
    model, about = load_temporal(path.parent)
    if net.phase is None:
        raise UserError("--from-temporal gives a phase branch, but joint.net.tasks=tool has none")
    if about.tool_inputs:
        raise UserError(
            f"{path}: reads tool logits in addition to embeddings, but the phase branch of a joint net does not; "
            "train stage two with temporal.tool_logits=false"
        )
    if about.tracks:
        raise UserError(
            f"{path}: recognises {', '.join(about.tracks)} besides the phases, which a joint net's phase branch does "
            "not; train stage two with data.tracks=[phases]"
        )
    require_same_model(path, model, about, phases, head, net.backbone.embedding_dim)
    net.phase.load_state_dict(model.state_dict())
    if about.encoder and about.encoder["weights_sha256"] != encoder_sha256:
        say(
            f"note: {path} was trained on features of another encoder ({about.backbone}-{about.encoder_digest[:12]}) "
            "than the net starts from, so its weights do not fit the net's features yet; to reattach two stages, name "
            "the run of stage one with --from-cnn"
        )


def attach_joint(
    net: JointNet, path: Path, tools: Sequence[str], phases: Sequence[str], head: HeadSettings
) -> JointAbout:
    """Copy those branches of another joint checkpoint (for example an imported one) that this net has as well.

    Returns the checkpoint's description. Raises UserError if classes, backbone, head or the shape of a branch differ.
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
    """The description in a checkpoint of the joint net: its fields are the checkpoint's keys, in this order."""

    kind: str = KIND
    step: str
    imported_from: str | None  # the file of MTRCNet's own programs that the weights come from
    unused: dict[str, Any] | None = None  # layers of this file (tensors, by name) that the net does not have
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
    scores: dict[str, Any] | None = None  # validation scores of the epoch; None before the first epoch has ended

    @classmethod
    def of(cls, net: JointNet, head: HeadSettings | None, config: Config, spec: DataSetSpec, step: str) -> JointAbout:
        """The description of `net`, which is trained, or imported, with these settings."""
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
        """The same as `original`, but empty, not None, for a net that was not imported."""
        return self.original or {}


def load_joint(path: Path) -> tuple[JointNet, JointAbout]:
    """The net in a joint checkpoint, on the CPU in evaluation mode, and its description.

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
        raise UserError(f"{path}: damaged, or written by another version ({one_line(error)})") from error
    net.unused = about.unused or {}
    net.imported_from = about.imported_from or about.provenance.get("file")
    return net.eval(), about


def joint_checkpoint(run: Path) -> Path:
    """The checkpoint of a run's joint net: the best epoch of its last training step, or the imported net.

    Raises UserError if the run has neither.
    """
    for step in (*reversed(STEPS), IMPORTED):
        path = run / JOINT_FOLDER / step / BEST_FILE
        if path.is_file():
            return path
    raise UserError(f"{run / JOINT_FOLDER}: no joint net; run train-joint under that name first")


def phase_weights(path: Path, phases: Sequence[str], head: HeadSettings, width: int) -> dict[str, Any]:
    """The state dict of the phase branch in a joint checkpoint, from which stage two starts.

    It includes the constants of standardisation. Raises UserError if the net has no phase branch, or if its phases,
    head or embedding width are not the given ones, which are those of the features and the settings.
    """
    net, about = load_joint(path)
    if net.phase is None:
        raise UserError(f"{path}: a net for tools only has no phase branch")
    require_same_model(path, net.phase, about, phases, head, width, "the features' index")
    return net.phase.state_dict()
