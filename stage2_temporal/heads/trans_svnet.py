"""Trans-SVNet: the embedding of a frame attends to the last outputs of a causal TCN (Gao et al., MICCAI 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs import head_settings
from stage2_temporal.heads.base import HeadOutput, State, register_head
from stage2_temporal.heads.tcn import TcnHead


class AttentionLayer(nn.Module):
    """Multi-head attention of queries to a memory, then a feed-forward layer; each with a residual and a LayerNorm.

    Without positions: what matters in the memory is which frames are in it, not their order, as in the paper.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feedforward = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.attended, self.out = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """query (N, Q, M) and memory (N, W, M) -> (N, Q, M)."""
        x = self.attended(query + self.attention(query, memory, memory, need_weights=False)[0])
        return self.out(x + self.feedforward(x))  # type: ignore[no-any-return]


@register_head("trans_svnet", head_settings.TransSvnetHead)
class TransSvnetHead(TcnHead):
    """A causal TCN whose last `window` logits are encoded by self-attention, and read by the current embedding.

    The stages of the output are those of the TCN and the attention's; they are trained together. Attention inside a
    window is bidirectional, so each frame's window is encoded anew. The state is that of the TCN and the last
    `window` - 1 logits (B, window - 1, C), which are zero at the start of a video.
    """

    block_windows = 1024  # windows (N, W, M) in memory at a time, also in the backward pass, which computes them again

    def __init__(self, config: head_settings.TransSvnetHead, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases)
        self.window, self.hidden_dim = config.window, config.width
        self.temporal = nn.Linear(phases, config.width, bias=False)  # without bias, padding stays zero
        self.spatial = nn.Linear(embedding_dim, config.width, bias=False)
        self.encoder = AttentionLayer(config.width, config.heads)
        self.decoder = AttentionLayer(config.width, config.heads)
        self.fc = nn.Linear(config.width, phases)

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """See `Head`. `lengths` is not needed: padding is at the end, and windows contain only the past."""
        tcn = super().forward(x, state[:-1] if state else None)
        before = state[-1] if state else x.new_zeros(len(x), self.window - 1, self.phases)
        seen = torch.cat([before.to(tcn.logits.dtype), tcn.logits], dim=1)  # (B, window - 1 + T, C)
        hidden = self._attend(self.temporal(seen), torch.tanh(self.spatial(x)))  # (B, T, M)
        after = seen[:, seen.shape[1] - (self.window - 1) :]
        return HeadOutput([*tcn.logits_per_stage, self.fc(hidden)], hidden, (*tcn.state, after))

    def _attend(self, outputs: Tensor, queries: Tensor) -> Tensor:
        """The TCN's outputs (B, window - 1 + T, M) and the queries (B, T, M) -> hidden features (B, T, M)."""
        batch, frames, _ = queries.shape
        size, blocks = max(1, self.block_windows // batch), []
        for start in range(0, frames, size):
            part = outputs[:, start : start + size + self.window - 1], queries[:, start : start + size]
            if torch.is_grad_enabled():
                blocks.append(checkpoint(self._attend_block, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                blocks.append(self._attend_block(*part))
        return torch.cat(blocks, dim=1)

    def _attend_block(self, outputs: Tensor, queries: Tensor) -> Tensor:
        windows = outputs.unfold(1, self.window, 1).transpose(2, 3).flatten(0, 1)  # (B T, window, M)
        encoded = self.encoder(windows, windows)
        return self.decoder(queries.flatten(0, 1).unsqueeze(1), encoded).view_as(queries)  # type: ignore[no-any-return]
