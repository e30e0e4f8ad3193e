"""The interface of a head, and the registry through which settings name one.

A head maps embeddings (B, T, D) to phase logits (B, T, C). A causal head computes the same logits, apart from rounding,
for a whole video at once, for chunks of any length with the state carried from one to the next, and frame by frame with
`step`. A head from outside is one file that defines its settings and its class, and decorates the class with
`register_head` (docs/extending.md). Those of built-in heads are in `configs.schema`, which does not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from configs.errors import UserError
from configs.head_settings import HEAD_SETTINGS, HeadSettings
from configs.registry import Registry
from configs.schema import TemporalConfig
from engine.device import sent_to
from engine.memory import available_bytes
from stage2_temporal.heads.standardise import Standardise

# What a head remembers from one call to the next: tensors whose first dimension is the batch, so that videos that have
# ended can be removed.
State = tuple[Tensor, ...]
HeadClass = TypeVar("HeadClass", bound="type[Head]")


class HeadOutput(NamedTuple):
    """The outputs of a head for B sequences of T frames."""

    logits_per_stage: list[Tensor]  # [(B, T, C), ...]; the loss is summed over stages, the last one is the prediction
    hidden: Tensor | None  # (B, T, hidden_dim), input of the last layer; None if it was computed in blocks only
    state: State  # the state after the last frame

    @property
    def logits(self) -> Tensor:
        """The logits (B, T, C) of the prediction: those of the last stage."""
        return self.logits_per_stage[-1]


class Head(nn.Module, ABC):
    """The interface of all heads. A subclass must set `hidden_dim`, the width of `HeadOutput.hidden`.

    If several label tracks are learned, C is the number of classes of all tracks together: the logits of the tracks
    are side by side, and `widths` holds the number of classes of each (phases first).
    """

    hidden_dim: int

    def __init__(self, config: HeadSettings, embedding_dim: int, phases: int) -> None:
        super().__init__()
        self.name, self.causal, self.phases = config.name, config.causal, phases
        self.widths: tuple[int, ...] = (phases,)

    def configure_training(self, settings: TemporalConfig) -> None:
        """Apply training settings outside `head` that concern this head; by default there are none."""

    @abstractmethod
    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """Logits, hidden features and the new state for standardised x (B, T, D); `state` None means zero.

        `lengths` (B,), on the CPU, holds the number of frames of each sequence without the padding at its end. Outputs
        for padding are undefined, and so is the state of a padded sequence, except in recurrent heads.
        """

    def forward_stored(
        self, x: Tensor, standardise: Standardise, state: State | None = None, lengths: Tensor | None = None
    ) -> HeadOutput:
        """The same as `forward`, for x (B, T, D) in the stored float type and not yet standardised.

        A head may override this to standardise one block of frames after the other, so that the fp32 copy of x, which
        would be the largest tensor of a training, is never allocated as a whole. `hidden` may then be None.
        """
        return self(standardise(x), state, lengths)  # type: ignore[no-any-return]

    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One frame: x (B, D) -> logits (B, C) and the new state. Raises UserError if the head is not causal."""
        require_causal(self)
        output: HeadOutput = self(x.unsqueeze(1), state)
        return output.logits.squeeze(1), output.state


HEADS: Registry[Callable[[HeadSettings, int, int], Head]] = Registry(HEAD_SETTINGS.kind, HEAD_SETTINGS.group)


def register_head(name: str, settings: type[HeadSettings]) -> Callable[[HeadClass], HeadClass]:
    """A class decorator that registers a head: `temporal.head.name=NAME` then selects the decorated class.

    `settings` is the type of its settings. The class is called as `cls(settings, embedding_dim, phases)`. Raises
    UserError if the name is already registered.
    """

    def register(head: HeadClass) -> HeadClass:
        HEAD_SETTINGS.register(name, settings)
        HEADS.register(name, head)
        return head

    return register


def build_head(config: HeadSettings, embedding_dim: int, *classes: int) -> Head:
    """The head that `config` names, with new random weights, for embeddings of width `embedding_dim`.

    `classes` holds the number of classes of each label track, phases first. Raises UserError if the weights exceed a
    quarter of the free memory, for a training also holds their gradients and two moments.
    """
    left = most = available_bytes() // 4

    def count(module: nn.Module, name: str, weights: nn.Parameter | None) -> None:
        """Called when weights are allocated, before they are filled and so take up memory."""
        nonlocal left
        left -= weights.nbytes if weights is not None else 0
        if left < 0:
            raise UserError(
                f"temporal.head: the weights of {config.name} exceed a quarter of the free memory, "
                f"{most / 1e9:.3g} GB; choose smaller sizes"
            )

    with register_module_parameter_registration_hook(count):
        head = HEADS.find(config.name)(config, embedding_dim, sum(classes))
    head.widths = classes
    return head


def softmax_by_track(logits: Tensor, widths: Sequence[int], dim: int) -> Tensor:
    """The probabilities of logits whose dimension `dim` has the classes of all tracks, `widths` of each."""
    if len(widths) == 1:
        return logits.softmax(dim)
    return torch.cat([part.softmax(dim) for part in logits.split(list(widths), dim)], dim)


def real_frames(lengths: Tensor, frames: int, device: torch.device) -> Tensor:
    """The positions (N,) in a flattened (B x T) batch of the frames that are not padding, on `device`.

    `lengths` (B,) must be on the CPU. The CPU then never waits for the GPU, as it would for an index by a mask.
    """
    inside = torch.arange(frames) < lengths.cpu()[:, None]  # (B, T)
    return sent_to(device, inside.flatten().nonzero().squeeze(1))


def first_rows(state: State, count: int) -> State:
    """The part of a state that belongs to the first `count` sequences."""
    return tuple(tensor[:count] for tensor in state)


def detach_state(state: State) -> State:
    """The state detached from the graph, for truncated back-propagation through time."""
    return tuple(tensor.detach().clone() for tensor in state)


def require_causal(head: Head) -> None:
    """Raise UserError for a head that looks into the future, which cannot carry a state or process single frames."""
    if not head.causal:
        raise UserError(
            f"temporal.head: {head.name} looks into the future and is offline only: it needs whole videos or clips, as "
            "evaluate has, and takes neither chunks with carried state nor single frames; choose a causal head (an "
            "LSTM is one, unless bidirectional)"
        )
