"""Causal multi-stage temporal convolution (TeCNO, Czempiel et al., MICCAI 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import schema
from stage2_temporal.heads.base import Head, HeadOutput, State, register_head


class CausalLayer(nn.Module):
    """Dilated residual layer, kernel 3, that sees the past only. Past inputs come in and go out as (B, M, 2 d)."""

    def __init__(self, maps: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.reach = 2 * dilation
        self.dilated = nn.Conv1d(maps, maps, 3, dilation=dilation)
        self.mix = nn.Conv1d(maps, maps, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, M, T), past (B, M, 2 d) -> the same shapes."""
        seen = torch.cat([past, x], dim=2)  # (B, M, 2 d + T)
        y = x + self.dropout(self.mix(F.relu(self.dilated(seen))))
        return y, seen[:, :, seen.shape[2] - self.reach :]


@register_head("tcn", schema.TcnHead)
class TcnHead(Head):
    """The first stage maps D to M maps and stacks layers of dilation 1, 2, 4, ...; every further stage refines the
    softmax of the one before.

    The loss is the sum over stages. State: each layer's past inputs, zero at the start of a video (the zero padding of
    the whole-video form).
    """

    def __init__(self, config: schema.TcnHead, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases)
        widths = [embedding_dim] + [phases] * (config.stages - 1)
        self.enter = nn.ModuleList(nn.Conv1d(width, config.maps, 1) for width in widths)
        self.layers = nn.ModuleList(
            nn.ModuleList(CausalLayer(config.maps, 2**level, config.dropout) for level in range(config.layers))
            for _ in widths
        )
        self.leave = nn.ModuleList(nn.Conv1d(config.maps, phases, 1) for _ in widths)
        self.maps = self.hidden_dim = config.maps

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """See `Head`. `lengths` is not needed: padding is at the end, and a causal convolution reads backwards only."""
        y = x.transpose(1, 2)  # (B, D, T)
        past = iter(state or self._zero_state(x))
        after: list[Tensor] = []
        stages: list[Tensor] = []
        for enter, layers, leave in zip(self.enter, self.layers, self.leave, strict=True):
            y = enter(F.softmax(y, dim=1) if stages else y)  # (B, M, T)
            for layer in layers:  # type: ignore[attr-defined]
                y, kept = layer(y, next(past).to(y.dtype))
                after.append(kept)
            hidden = y  # (B, M, T)
            y = leave(y)  # (B, C, T)
            stages.append(y.transpose(1, 2))
        return HeadOutput(stages, hidden.transpose(1, 2), tuple(after))

    def _zero_state(self, x: Tensor) -> State:
        flat = [layer for layers in self.layers for layer in layers]  # type: ignore[attr-defined]
        return tuple(x.new_zeros(len(x), self.maps, layer.reach) for layer in flat)
