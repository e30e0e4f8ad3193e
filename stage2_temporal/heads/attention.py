"""Causal self-attention within a window."""

from __future__ import annotations

from torch import Tensor, nn

from configs import head_settings
from stage2_temporal.heads.base import Head, HeadOutput, State, register_head
from stage2_temporal.heads.causal_attention import CausalTransformer


@register_head("attention", head_settings.AttentionHead)
class AttentionHead(Head):
    """A pre-norm transformer with causal windowed attention, then one linear layer. State: see `CausalTransformer`."""

    def __init__(self, config: head_settings.AttentionHead, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases)
        self.transformer = CausalTransformer(config, embedding_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(config.width, phases)
        self.hidden_dim = config.width

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """See `Head`. `lengths` is not needed: padding is at the end, and a frame attends to the past only."""
        hidden, state = self.transformer(x, state)  # (B, T, M)
        return HeadOutput([self.fc(self.dropout(hidden))], hidden, state)
