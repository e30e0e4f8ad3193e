"""One linear layer per frame: the baseline without temporal context."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs import head_settings
from stage2_temporal.heads.base import Head, HeadOutput, State, real_frames, register_head
from stage2_temporal.heads.standardise import Standardise


@register_head("linear", head_settings.LinearHead)
class LinearHead(Head):
    """A head without state: the logits of a frame depend on its embedding alone."""

    block_frames = 2048

    def __init__(self, config: head_settings.LinearHead, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases)
        self.hidden_dim = embedding_dim
        self.fc = nn.Linear(embedding_dim, phases)
        nn.init.xavier_uniform_(self.fc.weight)

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """See `Head`."""
        return HeadOutput([self.fc(x)], x, ())

    def forward_stored(
        self, x: Tensor, standardise: Standardise, state: State | None = None, lengths: Tensor | None = None
    ) -> HeadOutput:
        """See `Head`. With `lengths`, padding is not computed and its logits are 0; `hidden` is None.

        Frames are standardised in blocks, one at a time, and again in the backward pass.
        """
        if lengths is None:
            return self(standardise(x))  # type: ignore[no-any-return]
        real = real_frames(lengths, x.shape[1], x.device)  # (N,)

        def block_logits(block: Tensor) -> Tensor:
            logits: Tensor = self.fc(standardise(block))
            return logits

        blocks = x.flatten(0, 1).index_select(0, real).split(self.block_frames)  # (N, D) in all
        logits = torch.cat([checkpoint(block_logits, block, use_reentrant=False) for block in blocks])  # (N, C)
        padded = logits.new_zeros(len(x) * x.shape[1], self.phases).index_copy(0, real, logits)
        return HeadOutput([padded.unflatten(0, x.shape[:2])], None, ())
