"""One linear layer per frame: the baseline without temporal context."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs import schema
from stage2_temporal.heads.base import Head, HeadOutput, State, register_head
from stage2_temporal.heads.standardise import Standardise


@register_head("linear", schema.LinearHead)
class LinearHead(Head):
    """Logits from a frame's embedding alone. No state."""

    transforms_input = True
    block_frames = 2048

    def __init__(self, config: schema.LinearHead, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases)
        self.hidden_dim = embedding_dim
        self.fc = nn.Linear(embedding_dim, phases)
        nn.init.xavier_uniform_(self.fc.weight)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        input_transform: Standardise | None = None,
    ) -> HeadOutput:
        """See `Head`. With `lengths` and `input_transform`, logits on padding are 0 and `hidden` is None.

        The transformed features would be the largest table of a whole training. So padding is left out, and blocks
        of frames are transformed one at a time, once more for the backward pass.
        """
        if input_transform is None:
            return HeadOutput([self.fc(x)], x, ())
        if lengths is None:
            return self(input_transform(x))  # type: ignore[no-any-return]
        real = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]  # (B, T)

        def block_logits(block: Tensor) -> Tensor:
            logits: Tensor = self.fc(input_transform(block))
            return logits

        blocks = x[real].split(self.block_frames)  # (N, D) each
        logits = torch.cat([checkpoint(block_logits, block, use_reentrant=False) for block in blocks])  # (N, C)
        return HeadOutput(
            [logits.new_zeros(*real.shape, self.phases).masked_scatter(real.unsqueeze(-1), logits)], None, ()
        )
