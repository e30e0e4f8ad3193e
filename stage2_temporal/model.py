"""The model of stage two, as it is stored in checkpoints: standardisation followed by a head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.head_settings import HeadSettings
from configs.load import differences
from engine.runs import require_same_classes
from stage2_temporal.heads.base import Head, HeadOutput, State
from stage2_temporal.heads.standardise import Standardise


class PhaseModel(nn.Module):
    """A net from embeddings, in the float type in which they are stored, to phase logits.

    `carried` is the state after the last chunk of truncated back-propagation. It is saved with the weights, so that a
    training that was stopped between two chunks of a video resumes with the same state.
    """

    def __init__(self, standardise: Standardise, head: Head) -> None:
        super().__init__()
        self.standardise, self.head = standardise, head
        self.carried: State = ()

    @property
    def causal(self) -> bool:
        """Whether the output for a frame depends on this frame and the past alone."""
        return self.head.causal

    @property
    def stateless(self) -> bool:
        """Whether each frame is recognised by itself, so that its output depends on no other frame."""
        with torch.no_grad():
            return self.causal and not self.head.step(torch.zeros_like(self.standardise.mean)[None], None)[1]

    @property
    def classes(self) -> int:
        """Number C of the classes of all label tracks together, which is the width of the logits."""
        return self.head.phases

    def by_track(self, values: Tensor) -> tuple[Tensor, ...]:
        """Logits or probabilities (..., C), divided into those of each label track, phases first."""
        return values.split(self.head.widths, dim=-1)

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """The output of the head for x (B, T, D), in the stored type; see `Head.forward_stored`."""
        return self.head.forward_stored(x, self.standardise, state, lengths)

    def with_hidden(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """The same as `forward`, but every head returns `hidden`, and the standardised input is kept as a whole."""
        return self.head(self.standardise(x), state, lengths)  # type: ignore[no-any-return]

    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One frame: x (B, D) -> logits (B, C) and the new state; see `Head.step`."""
        return self.head.step(self.standardise(x), state)

    def get_extra_state(self) -> dict[str, Any]:
        """The carried state, which `state_dict` contains in addition to parameters and buffers."""
        return {"carried": self.carried}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the carried state; called by `load_state_dict`."""
        device = self.standardise.mean.device
        self.carried = tuple(tensor.to(device) for tensor in state["carried"])


class Describes(Protocol):
    """What the description of a checkpoint with a phase branch must have: `TemporalAbout` or `JointAbout`."""

    @property
    def phases(self) -> tuple[str, ...]: ...

    @property
    def head(self) -> HeadSettings | None: ...


def require_same_model(
    path: Path,
    model: PhaseModel,
    about: Describes,
    phases: Sequence[str],
    head: HeadSettings,
    width: int,
    other: str = "the index",
) -> None:
    """Raise UserError unless a checkpoint's `model` has these phases, this head and inputs of this width."""
    require_same_classes(path, "phases", about.phases, phases, other)
    require_same_head(path, about.head, head)
    if len(model.standardise.mean) != width:
        raise UserError(f"{path}: takes embeddings of width {len(model.standardise.mean)}, not {width}")


def require_same_head(path: Path, found: HeadSettings | None, head: HeadSettings) -> None:
    """Raise UserError if a checkpoint's head has other settings than `head`.

    Comparing the tensors' shapes would not be enough: heads with different settings may have the same shapes.
    """
    if changed := differences(found.model_dump() if found is not None else {}, head.model_dump()):
        raise UserError(f"{path}: its head differs from temporal.head ({'; '.join(changed)}); set temporal.head to it")
