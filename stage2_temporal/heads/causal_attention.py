"""Causal self-attention within a window, with rotary positions and a cache of keys and values.

Attention: Vaswani et al., NeurIPS 2017, in pre-norm blocks (Xiong et al., ICML 2020). Rotary positions: Su et al.,
RoFormer, Neurocomputing 2024. `heads.attention` and `heads.key_pooling` are the heads that consist of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.head_settings import CausalAttentionSettings
from stage2_temporal.heads.base import State

ROTARY_BASE = 10_000.0
EXPANSION = 4  # width of the hidden layer of a block's feed-forward part, in widths of its tokens


class CausalTransformer(nn.Module):
    """Embeddings (B, T, D) to features (B, T, M): a linear layer, blocks of causal self-attention, and a LayerNorm.

    In every block, each frame attends to itself and to the window - 1 frames before it. The state holds the keys and
    values (B, S, 2 M) of the last S frames for each block, S being at most window - 1, and then the number (B,) of them
    that are frames of the video (in a window of one frame: 1 after the first frame). The others, before its first
    frame, are zeros and masked.
    """

    def __init__(self, config: CausalAttentionSettings, embedding_dim: int) -> None:
        super().__init__()
        self.window = config.window
        self.enter = nn.Linear(embedding_dim, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The features, and the state after the last frame; `state` None means that x starts with a first frame."""
        frames, whole = x.shape[1], self.window - 1
        if state is None:
            empty = x.new_zeros(len(x), 0, 2 * self.enter.out_features)
            *caches, real = *[empty] * len(self.blocks), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        else:
            *caches, real = state
        # A frame that comes alone always attends to a whole window, so that the first ones take as long as all others
        if frames > self.window or (frames == 1 and state is not None):
            caches = [F.pad(cache, (0, 0, whole - cache.shape[1], 0)) for cache in caches]
        seen = window_mask(frames, caches[0].shape[1], real, self.window)
        y, after = self.dropout(self.enter(x)), []
        for block, cache in zip(self.blocks, caches, strict=True):
            y, kept = block(y, cache, seen)
            after.append(kept)
        return self.norm(y), (*after, (real + frames).clamp(max=max(whole, 1)))


class Block(nn.Module):
    """A pre-norm block: causal self-attention, then two linear layers with GELU."""

    def __init__(self, config: CausalAttentionSettings) -> None:
        super().__init__()
        width = config.width
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, config.heads, config.window)
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, EXPANSION * width), nn.GELU(), self.dropout, nn.Linear(EXPANSION * width, width)
        )

    def forward(self, x: Tensor, cache: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, M), the cache (B, S, 2 M) and a mask of `window_mask` -> the same shape as x, and the new cache."""
        attended, kept = self.attention(self.attention_norm(x), cache, seen)
        x = x + self.dropout(attended)
        return x + self.dropout(self.feed_forward(self.norm(x))), kept


class CausalAttention(nn.Module):
    """Multi-head attention of each frame to a window of frames that ends with it.

    A sequence that is longer than the window W is cut into blocks of W queries, each with the 2 W - 1 keys that at
    least one of them sees. This takes T * 2 W scores instead of T * T. Only the distance of two frames matters to
    rotary positions, so queries and keys are rotated by their position within the block. No angle then grows with the
    length of a video, and the cache holds keys that are not rotated yet.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, width)
        pairs = width // heads // 2  # E / 2
        speed = ROTARY_BASE ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = torch.arange(2 * window - 1, dtype=torch.float64)[:, None, None] * speed  # (2 W - 1, 1, E / 2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor, cache: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """See `Block.forward`."""
        frames, slots = x.shape[1], cache.shape[1]
        blocks, size = seen.shape[1], seen.shape[2]
        padding = (0, 0, 0, blocks * size - frames)
        key_value = self.key_value(x)
        key_value = torch.cat([cache.to(key_value.dtype), key_value], dim=1)  # (B, S + T, 2 M)
        kept = key_value[:, max(0, slots + frames - self.window + 1) :]
        query = F.pad(self.query(x), padding).view(len(x) * blocks, size, self.heads, -1)  # (N, size, heads, E)
        parts = F.pad(key_value, padding).unfold(1, slots + size, size).transpose(2, 3)  # (B, blocks, S + size, 2 M)
        key, value = parts.reshape(len(query), slots + size, 2, self.heads, -1).unbind(2)
        query, key = self._rotated(query, slots), self._rotated(key, 0)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), seen.flatten(0, 1)[:, None]
        )  # (N, heads, size, E)
        attended = attended.transpose(1, 2).reshape(len(x), blocks * size, -1)[:, :frames]
        return self.leave(attended), kept

    def _rotated(self, x: Tensor, first: int) -> Tensor:
        """x (N, size, heads, E) with its pairs of channels rotated; the first row is at position `first`."""
        cos, sin = (table[first : first + x.shape[1]] for table in (self.cos, self.sin))
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1).to(x.dtype)


def window_mask(frames: int, slots: int, real: Tensor, window: int) -> Tensor:
    """Which keys each query sees: (B, blocks, size, slots + size), True where it does.

    The sequence has `frames` queries, in blocks of `size`, and a cache of `slots` keys before them, of which the last
    `real` (B,) are frames. If there is more than one block, `slots` must be window - 1. Every query sees its own key,
    also one that pads the last block.
    """
    size = min(frames, window)
    key = torch.arange(slots + size, device=real.device)
    query = key[slots:, None]  # (size, 1)
    within = (key <= query) & (key > query - window)  # (size, slots + size)
    first = within & (
        key >= slots - real[:, None, None]
    )  # (B, size, slots + size); later blocks start behind the zeros
    later = within.expand(len(real), -(-frames // size) - 1, -1, -1)
    return torch.cat([first[:, None], later], dim=1)
