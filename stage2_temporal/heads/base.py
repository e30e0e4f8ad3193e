"""The interface of a head, and the registry through which settings name one.

A head turns embeddings (B, T, D) into phase logits (B, T, C). Causal heads give the same numbers, to rounding, over a
whole video, over chunks of any length with the state carried from one to the next, and frame by frame with `step`.
A new head is one file that defines its settings and its class and decorates the class with `register_head`
(docs/extending.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.registry import Registry
from configs.schema import HEAD_SETTINGS, HeadSettings, TemporalConfig
from engine.device import sent_to
from stage2_temporal.heads.standardise import Standardise

# A head's memory between two calls: tensors with the batch dimension first, so that finished videos can be dropped.
State = tuple[Tensor, ...]
HeadClass = TypeVar("HeadClass", bound="type[Head]")


class HeadOutput(NamedTuple):
    """What a head computes from B sequences of T frames."""

    logits_per_stage: list[Tensor]  # [(B, T, C), ...]; the loss sums over them, the last is the prediction
    hidden: Tensor | None  # (B, T, hidden_dim), input of the last layer; None if it never existed as a whole
    state: State  # after the last frame

    @property
    def logits(self) -> Tensor:
        """Logits (B, T, C) of the prediction."""
        return self.logits_per_stage[-1]


class Head(nn.Module, ABC):
    """Interface of all heads. Subclasses set `hidden_dim`, the width of `HeadOutput.hidden`."""

    hidden_dim: int

    def __init__(self, config: HeadSettings, embedding_dim: int, phases: int) -> None:
        super().__init__()
        self.causal, self.phases = config.causal, phases

    def configure_training(self, settings: TemporalConfig) -> None:
        """Apply what training settings besides `head` mean for this head; by default nothing."""

    @abstractmethod
    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """Logits, hidden features and state for x (B, T, D); `state` None starts from zero.

        `lengths` (B,), on the CPU, counts the frames of each sequence that are not padding (which is at the end).
        Outputs on padding are undefined, and so is the state after it, except in recurrent heads.
        """

    def forward_stored(
        self, x: Tensor, standardise: Standardise, state: State | None = None, lengths: Tensor | None = None
    ) -> HeadOutput:
        """As `forward`, for x (B, T, D) as it is stored, in any float type and not yet standardised.

        A head that overrides this standardises one block of frames after the other, so that the full fp32 copy, the
        largest tensor of a training, is never allocated. `hidden` may then be None.
        """
        return self(standardise(x), state, lengths)  # type: ignore[no-any-return]

    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One frame: x (B, D) -> logits (B, C) and the state after it. Raises UserError if the head is not causal."""
        require_causal(self)
        output: HeadOutput = self(x.unsqueeze(1), state)
        return output.logits.squeeze(1), output.state


HEADS: Registry[Callable[[HeadSettings, int, int], Head]] = Registry(HEAD_SETTINGS.kind, HEAD_SETTINGS.group)


def register_head(name: str, settings: type[HeadSettings]) -> Callable[[HeadClass], HeadClass]:
    """Class decorator: `temporal.head.name=NAME` now means this class, with settings of the type `settings`.

    The class is called as `cls(settings, embedding_dim, phases)`. Raises UserError if the name is taken.
    """

    def register(head: HeadClass) -> HeadClass:
        HEAD_SETTINGS.register(name, settings)
        HEADS.register(name, head)
        return head

    return register


def build_head(config: HeadSettings, embedding_dim: int, phases: int) -> Head:
    """The head that `config` names, for embeddings of width D, with fresh weights."""
    return HEADS.find(config.name)(config, embedding_dim, phases)


def real_frames(lengths: Tensor, frames: int, device: torch.device) -> Tensor:
    """The places (N,) in (B x T) of the frames that are not padding, on `device`.

    `lengths` (B,) are on the CPU, so that nothing waits for a GPU, as an index by a mask would.
    """
    inside = torch.arange(frames) < lengths.cpu()[:, None]  # (B, T)
    return sent_to(device, inside.flatten().nonzero().squeeze(1))


def first_rows(state: State, count: int) -> State:
    """The state of the first `count` sequences."""
    return tuple(tensor[:count] for tensor in state)


def detach_state(state: State) -> State:
    """A copy of the state without its graph (truncated back-propagation through time)."""
    return tuple(tensor.detach().clone() for tensor in state)


def require_causal(head: Head) -> None:
    """Raise UserError for a head that looks into the future; called if frames arrive one at a time."""
    if not head.causal:
        raise UserError(
            "temporal.head: a head that looks into the future (such as bidirectional=true) is offline only: it needs "
            "whole videos or clips, and takes neither chunks with carried state nor single frames"
        )
