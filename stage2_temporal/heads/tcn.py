"""Causal multi-stage temporal convolution (TeCNO, Czempiel et al., MICCAI 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import head_settings
from stage2_temporal.heads.base import Head, HeadOutput, State, register_head, softmax_by_track


class CausalLayer(nn.Module):
    """A dilated residual layer with kernel size 3 that sees the past only.

    Its state, the last inputs (B, M, 2 d) for dilation d, is passed in and returned.
    """

    def __init__(self, maps: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.reach = 2 * dilation
        self.dilated = nn.Conv1d(maps, maps, 3, dilation=dilation)
        self.mix = nn.Conv1d(maps, maps, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, M, T) and the past inputs (B, M, 2 d) -> output and new past inputs, of the same shapes."""
        seen = torch.cat([past, x], dim=2)  # (B, M, 2 d + T)
        y = x + self.dropout(self.mix(F.relu(self.dilated(seen))))
        return y, seen[:, :, seen.shape[2] - self.reach :]


@register_head("tcn", head_settings.TcnHead)
class TcnHead(Head):
    """A multi-stage TCN: each stage has M feature maps and layers with dilations 1, 2, 4, ...

    The first stage gets the embeddings, and every further stage refines the softmax of the one before, of each label
    track by itself. The loss is summed over stages. The state holds the past inputs of each layer. They are zero at the
    start of a video, which is the same as zero padding.
    """

    def __init__(
        self, config: head_settings.TcnHead | head_settings.TransSvnetHead, embedding_dim: int, phases: int
    ) -> None:
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
        """See `Head`. `lengths` is not needed: padding is at the end, and a causal convolution sees only the past."""
        y = x.transpose(1, 2)  # (B, D, T)
        past = iter(state or self._zero_state(x))
        after: list[Tensor] = []
        stages: list[Tensor] = []
        for enter, layers, leave in zip(self.enter, self.layers, self.leave, strict=True):
            y = enter(softmax_by_track(y, self.widths, 1) if stages else y)  # (B, M, T)
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
