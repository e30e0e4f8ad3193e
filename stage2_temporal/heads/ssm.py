"""Causal selective state-space head: blocks of the kind of Mamba-2 (Dao and Gu, ICML 2024), in plain torch.

docs/heads.md has the equations, and where they differ from the published block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import head_settings
from engine.optim import Undecayed
from stage2_temporal.heads.base import Head, HeadOutput, State, register_head

KERNEL = 4  # frames that the convolution of a block sees
BLOCK_FRAMES = 64  # frames that `scan` computes by matrix products at a time
DECAY_RATES = (1.0, 16.0)  # of the heads of a block, at the start of a training


@register_head("ssm", head_settings.SsmHead)
class SsmHead(Head):
    """A linear layer to `width`, `layers` residual blocks with normalised inputs, a norm, and a linear layer.

    The state has two tensors per block, see `SsmBlock`. It is zero at the start of a video.
    """

    def __init__(self, config: head_settings.SsmHead, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases)
        self.hidden_dim = config.width
        self.enter = nn.Linear(embedding_dim, config.width)
        self.blocks = nn.ModuleList(SsmBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.fc = nn.Linear(config.width, phases)

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """See `Head`. `lengths` is not needed: padding is at the end, and a block sees only the past."""
        y, after = self.enter(x), []  # (B, T, W)
        for index, block in enumerate(self.blocks):
            y, *kept = block(y, *(state[2 * index : 2 * index + 2] if state else block.zero_state(y)))  # type: ignore[operator]
            after += kept
        hidden = self.norm(y)
        return HeadOutput([self.fc(hidden)], hidden, tuple(after))


class SsmBlock(nn.Module):
    """x + block(norm(x)): projection, convolution over the last four frames, selective scan, gate, projection.

    E = `expand` x width channels are divided into H heads of P channels, and each head has a memory of P x N values,
    N = `config.state`. From one call to the next it keeps the last inputs of the convolution (B, 3, E + 2 N) and the
    memories (B, H, P, N). Decay rates, step sizes and the scan are fp32 under autocast too.
    """

    def __init__(self, config: head_settings.SsmHead) -> None:
        super().__init__()
        inner = config.expand * config.width  # E
        self.heads, self.head_width, self.memory = inner // config.head_width, config.head_width, config.state
        self.parts = [inner, inner + 2 * config.state, self.heads]  # gate; x, b and c; step size
        self.norm = nn.LayerNorm(config.width)
        self.enter = nn.Linear(config.width, sum(self.parts), bias=False)
        self.conv = nn.Conv1d(self.parts[1], self.parts[1], KERNEL, groups=self.parts[1])
        self.log_rate = Undecayed(torch.empty(self.heads).uniform_(*DECAY_RATES).log_())
        self.step_bias = Undecayed(_step_bias(self.heads, config.step_min, config.step_max))
        self.skip = Undecayed(torch.ones(self.heads))
        self.out_norm = nn.LayerNorm(inner)
        self.leave = nn.Linear(inner, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, recent: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, W) and the state -> output (B, T, W) and the new state."""
        gate, mixed, step = self.enter(self.norm(x)).split(self.parts, dim=-1)
        seen = torch.cat([recent.to(mixed.dtype), mixed], dim=1)  # (B, 3 + T, E + 2 N)
        mixed = F.silu(self.conv(seen.transpose(1, 2)).transpose(1, 2))
        with torch.autocast(x.device.type, enabled=False):
            y, memory = self._scan(mixed, step, memory)
        y = self.out_norm(y * F.silu(gate))
        return x + self.dropout(self.leave(y)), seen[:, seen.shape[1] - (KERNEL - 1) :], memory

    def _scan(self, mixed: Tensor, step: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The output (B, T, E) and the new memory, for the convolution's output and step sizes before softplus."""
        precise = torch.promote_types(mixed.dtype, torch.float32)
        values, b, c = mixed.to(precise).split([self.parts[0], self.memory, self.memory], dim=-1)
        values = values.unflatten(-1, (self.heads, self.head_width))  # (B, T, H, P)
        step = F.softplus(step.to(precise) + self.step_bias)  # (B, T, H)
        decay = -step * self.log_rate.exp()
        y, memory = scan(values * step.unsqueeze(-1), decay, b, c, memory.to(precise))
        return (y + self.skip[:, None] * values).flatten(2), memory

    def zero_state(self, x: Tensor) -> State:
        """The state before the first frame."""
        return (
            x.new_zeros(len(x), KERNEL - 1, self.parts[1]),
            x.new_zeros(len(x), self.heads, self.head_width, self.memory),
        )


def _step_bias(heads: int, least: float, most: float) -> Tensor:
    """Values (H,) whose softplus is log-uniform between `least` and `most`."""
    step = torch.empty(heads).uniform_(math.log(least), math.log(most)).exp_()
    return step + torch.log(-torch.expm1(-step))


def scan(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(decay_t) h_(t-1) + x_t b_t^T and y_t = h_t c_t, for every head, in blocks of frames.

    x (B, T, H, P), decay (B, T, H) <= 0, b and c (B, T, N), memory (B, H, P, N) is h before the first frame. Returns
    y (B, T, H, P) and h after the last frame. This is the SSD algorithm of Dao and Gu: products of matrices within a
    block of frames, and a loop over blocks. The last block is filled up with frames that have no input and do
    not decay, which leave h as it is. All exponents are sums of values <= 0, without differences of sums.
    """
    frames, size = x.shape[1], min(x.shape[1], BLOCK_FRAMES)
    x, decay, b, c = (_in_blocks(one, size) for one in (x, decay, b, c))
    x, decay = x.transpose(2, 3), decay.transpose(2, 3)  # (B, K, H, Q, P), (B, K, H, Q)
    b, c = b.unsqueeze(2), c.unsqueeze(2)  # (B, K, 1, Q, N)
    between = _sums_between(decay).exp()  # (B, K, H, Q, Q)
    since_start = decay.cumsum(-1).exp().unsqueeze(-1)  # (B, K, H, Q, 1)
    within = (c @ b.transpose(-1, -2) * between) @ x  # (B, K, H, Q, P)
    added = (x * between[..., -1, :, None]).transpose(-1, -2) @ b  # (B, K, H, P, N)
    before = []  # h before each block
    for kept, new in zip(since_start[..., -1:, :].unbind(1), added.unbind(1), strict=True):
        before.append(memory)
        memory = kept * memory + new
    y = within + since_start * (c @ torch.stack(before, 1).transpose(-1, -2))
    return y.transpose(2, 3).flatten(1, 2)[:, :frames], memory


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """x (B, T, ...), filled up with zeros to a multiple of `size` frames -> (B, K, size, ...)."""
    filled = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % size))
    return filled.unflatten(1, (-1, size))


def _sums_between(decay: Tensor) -> Tensor:
    """The sum of decay (..., Q) over frames j + 1 to i at [..., i, j]; 0 at i = j, and -inf for i < j."""
    size = decay.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril()
    terms = decay.unsqueeze(-1).expand(*decay.shape, size).masked_fill(~lower.tril(-1), 0.0)
    return terms.cumsum(-2).masked_fill(~lower, -math.inf)
