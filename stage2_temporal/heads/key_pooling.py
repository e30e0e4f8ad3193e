"""Key pooling (SKiT, Liu et al., ICCV 2023): a recent window, and the maximum of keys over the whole past."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import head_settings
from stage2_temporal.heads.base import Head, HeadOutput, State, register_head
from stage2_temporal.heads.causal_attention import CausalTransformer


@register_head("key_pooling", head_settings.KeyPoolingHead)
class KeyPoolingHead(Head):
    """Features of a recent window, fused with the elementwise maximum of one key per frame since the first one.

    State: that of `CausalTransformer`, then the maximum (B, K). It differs from the paper, whose encoder and decoder
    are bidirectional within the window and so have to read the whole window again for every frame: here the window is
    causal in each layer, and its keys and values are kept. docs/heads.md has the equations.
    """

    def __init__(self, config: head_settings.KeyPoolingHead, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases)
        width = self.hidden_dim = config.width
        self.transformer = CausalTransformer(config, embedding_dim)
        self.key = nn.Linear(width, config.keys)
        self.expand, self.expanded_norm = nn.Linear(config.keys, width), nn.LayerNorm(width)
        self.mix, self.mixed_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.fused_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(width, phases)

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """See `Head`. `lengths` is not needed: padding is at the end, and a frame depends on the past only."""
        local, window = self.transformer(x, None if state is None else state[:-1])  # (B, T, M)
        largest = self.key(local)  # (B, T, K)
        if x.shape[1] > 1:
            largest = largest.cummax(dim=1).values
        if state is not None:
            before, started = state[-1].to(largest.dtype), state[-2][:, None] > 0
            # in a zero state there is no frame yet, and no key: it must not be 0, since keys may be negative
            largest = torch.maximum(largest, torch.where(started, before, -torch.inf)[:, None])
        y = self.fused_norm(local + self.expanded_norm(F.relu(self.expand(largest))))  # (B, T, M)
        y = self.norm(y + self.mixed_norm(F.relu(self.mix(y))))
        return HeadOutput([self.fc(self.dropout(y))], y, (*window, largest[:, -1]))
