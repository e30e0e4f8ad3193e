"""The LSTM's arithmetic on a CPU, for sequences of unequal lengths and without padding; `nn.LSTM` holds the weights.

The frames of a batch stand in one table of rows, time first, longest sequence first (the order of `PackedSequence`), so
that the sequences still running at a step are rows next to each other. The input projection of all frames is one matrix
product, and so is the gradient of each weight; per step only the product with the last hidden state is left. Rows go
through in blocks of steps, so that beside the gates no table as large as the input is ever made: stored features are
widened and standardised a block at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine import onednn

# A block's products run at full speed from about a thousand rows on, and its tables still fit the caches.
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Block:
    """Consecutive steps whose rows are projected together."""

    steps: slice
    rows: slice


@dataclass(frozen=True)
class Layout:
    """Where each frame of sequences of given lengths stands in the table of rows."""

    order: tuple[int, ...]  # sequences, longest first
    sizes: tuple[int, ...]  # sequences still running at each step
    place: Tensor  # (N,) row -> frame of the padded (B * T) table
    before: Tensor  # (N,) row -> row of the same sequence a step earlier; negative at the first step
    last: Tensor  # (B,) sequence in sorted order -> row of its last frame
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], frames: int) -> Layout:
        """For `lengths` (each at least 1) of sequences padded to `frames`."""
        length, order = torch.tensor(lengths).sort(descending=True, stable=True)
        running = torch.arange(int(length[0]))[:, None] < length  # (T, B)
        sizes = running.sum(dim=1)
        steps, column = running.nonzero(as_tuple=True)
        first = sizes.cumsum(0) - sizes
        return cls(
            order=tuple(order.tolist()),
            sizes=tuple(sizes.tolist()),
            place=order[column] * frames + steps,
            before=torch.arange(len(steps)) - sizes[(steps - 1).clamp(min=0)],
            last=first[length - 1] + torch.arange(len(order)),
            blocks=tuple(_blocks(sizes.tolist())),
        )


def _blocks(sizes: list[int]) -> list[Block]:
    blocks, step, row, rows = [], 0, 0, 0
    for t, size in enumerate(sizes, start=1):
        rows += size
        if rows >= BLOCK_ROWS or t == len(sizes):
            blocks.append(Block(slice(step, t), slice(row, row + rows)))
            step, row, rows = t, row + rows, 0
    return blocks


def run_lstm(
    rnn: nn.LSTM,
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    lengths: Sequence[int],
    constants: tuple[Tensor, Tensor] | None = None,
    bf16: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `rnn`, batch first and in one direction, makes of x (B, T, D): outputs (B, T, H) and the last state.

    `state` is a pair (layers, B, H), None zero; `lengths` (B) counts frames that are not padding, where outputs are 0.
    x may be fp16: it is widened to the weights' type, and standardised with `constants` (mean, scale), (D,) each.
    `bf16` computes the first layer's input projection and the gradient of its weights in bfloat16.
    """
    layout = Layout.of(lengths, x.shape[1])
    if state is None:
        zero = rnn.all_weights[0][1].new_zeros(rnn.num_layers, len(x), rnn.hidden_size)
        state = (zero, zero)
    order = list(layout.order)
    rows = x.flatten(0, 1)  # (B * T, D); after the first layer (N, H)
    ended = []
    for layer in range(rnn.num_layers):
        if layer and rnn.dropout and rnn.training:
            rows = F.dropout(rows, rnn.dropout)
        own = rnn.all_weights[layer] if rnn.bias else [*rnn.all_weights[layer], None, None]
        h, c = (part[layer].index_select(0, torch.tensor(order)) for part in state)
        way = _Way(layout, keep=torch.is_grad_enabled())
        if layer == 0:
            way = replace(way, place=layout.place, constants=constants, bf16=bf16)
        rows, h, c = _Layer.apply(rows, *own, h, c, way)
        ended.append((h, c))
    out = rows.new_zeros(len(x) * x.shape[1], rows.shape[1]).index_copy(0, layout.place, rows)
    back = torch.tensor(order).argsort()
    last_h, last_c = (torch.stack(parts).index_select(1, back) for parts in zip(*ended, strict=True))
    return out.view(len(x), x.shape[1], -1), (last_h, last_c)


@dataclass(frozen=True)
class _Way:
    """How one layer is computed: everything that is no tensor to differentiate."""

    layout: Layout
    keep: bool  # what the backward pass needs
    place: Tensor | None = None  # where the input of each row stands; None: in the same row
    constants: tuple[Tensor, Tensor] | None = None
    bf16: bool = False

    def inputs(self, x: Tensor, rows: slice, like: Tensor) -> Tensor:
        """A block's inputs as its matrix products take them."""
        block = x[rows] if self.place is None else x.index_select(0, self.place[rows])
        if self.constants is not None:
            block = torch.sub(block, self.constants[0]).mul_(self.constants[1])
        return block.to(torch.bfloat16 if self.bf16 else like.dtype)


class _Layer(torch.autograd.Function):
    """One layer over all rows. Gates stand in nn.LSTM's order, i, f, g, o."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        h0: Tensor,
        c0: Tensor,
        way: _Way,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D), or (B * T, D) with `way.place`; h0 and c0 (B, H) sorted -> outputs (N, H), last h and c (B, H)."""
        layout, width = way.layout, w_hh.shape[1]
        out, cells, curves = (w_hh.new_empty(len(layout.place), width) for _ in range(3))
        project = _packed(w_ih.bfloat16() if way.bf16 else w_ih, BLOCK_ROWS)
        recur = _packed(w_hh, layout.sizes[0])
        bias = None if b_ih is None or b_hh is None else (b_ih + b_hh).to(project.dtype)
        h, c = h0, c0
        gates, inputs = [], []
        for block in layout.blocks:
            rows, sizes = block.rows, layout.sizes[block.steps]
            block_x = way.inputs(x, rows, w_hh)
            g = _product(block_x, project, bias).to(w_hh.dtype)
            if way.keep:
                gates.append(g)
                inputs += [block_x] if way.bf16 else []  # half as large as in fp32, where they are made once more
            tables = (g, g[:, : 2 * width], *g.chunk(4, dim=1), cells[rows], curves[rows], out[rows])
            views = [table.split(sizes) for table in tables]
            for size, all_, i_f, i, f, new, o, cell, curve, hidden in zip(sizes, *views, strict=True):
                if size < len(h):
                    h, c = h[:size], c[:size]
                all_.add_(_product(h, recur))
                i_f.sigmoid_()
                new.tanh_()
                o.sigmoid_()
                torch.mul(f, c, out=cell).addcmul_(i, new)
                torch.mul(torch.tanh(cell, out=curve), o, out=hidden)
                h, c = hidden, cell
        if way.keep:
            ctx.save_for_backward(x, w_ih, w_hh, h0, c0, cells, curves, out, *gates, *inputs)
            ctx.way = way
        return out, out.index_select(0, layout.last), cells.index_select(0, layout.last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Tensor | None, ...]:
        """Back through time, block by block; a block's share of every weight's gradient is one product."""
        x, w_ih, w_hh, h0, c0, cells, curves, out, *kept = ctx.saved_tensors
        way, width = ctx.way, w_hh.shape[1]
        recur = _packed(w_hh.t().contiguous(), way.layout.sizes[0])  # (H, 4 H)
        d_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        d_ih, d_hh, d_bias = torch.zeros_like(w_ih), torch.zeros_like(w_hh), w_hh.new_zeros(4 * width)
        # of the sequences that have ended, the rows already hold the gradients of their last states
        d_h, d_c = d_h.clone(memory_format=torch.contiguous_format), d_c.clone(memory_format=torch.contiguous_format)
        dh, dc = d_h[:0], d_c[:0]
        count = len(way.layout.blocks)
        parts = zip(way.layout.blocks, kept[:count], kept[count:] or [None] * count, strict=True)
        for block, g, block_x in reversed(list(parts)):
            rows, sizes = block.rows, way.layout.sizes[block.steps]
            h_before, c_before = _before(out, h0, way.layout, block), _before(cells, c0, way.layout, block)
            slope, through, forget = _slopes(g, curves[rows], c_before)
            tables = (d_out[rows], slope, slope[:, : 3 * width].unflatten(1, (3, width)), slope[:, 3 * width :])
            views = [table.split(sizes) for table in (*tables, through, forget)]
            for size, d, all_, i_f_g, o, k, f in zip(sizes[::-1], *(view[::-1] for view in views), strict=True):
                if size > len(dh):
                    dh, dc = d_h[:size], d_c[:size]
                dh.add_(d)
                dc.addcmul_(dh, k)
                i_f_g.mul_(dc.unsqueeze(1))
                o.mul_(dh)
                dc.mul_(f)
                dh.copy_(_product(all_, recur))
            d_bias += slope.sum(dim=0)
            d_hh += _product(slope.t(), h_before.t())
            lower = slope.bfloat16() if way.bf16 else slope
            block_x = way.inputs(x, rows, w_hh) if block_x is None else block_x
            d_ih += _product(lower.t(), block_x.t())
            if d_x is not None:
                d_in = _product(slope, w_ih.t())
                d_in = d_in if way.constants is None else d_in.mul_(way.constants[1])
                d_x[rows if way.place is None else way.place[rows]] = d_in.to(d_x.dtype)
        biases = (d_bias if ctx.needs_input_grad[3] else None, d_bias.clone() if ctx.needs_input_grad[4] else None)
        return d_x, d_ih, d_hh, *biases, d_h, d_c, None


def _packed(weights: Tensor, rows: int) -> Tensor:
    """Weights (O, I) for `_product`, laid out as oneDNN reads them: a step's product takes a third of the time."""
    return onednn.pack_linear(weights, rows) if onednn.multiplies(weights.dtype) else weights


def _product(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, I) times weights (O, I), packed or not, transposed, plus bias (O,).

    By oneDNN, as the library's own LSTM does it: torch hands other fp32 products to MKL, which is slower on AMD
    processors.
    """
    return onednn.linear(x, weights, bias) if onednn.multiplies(x.dtype) else F.linear(x, weights, bias)


def _before(table: Tensor, first: Tensor, layout: Layout, block: Block) -> Tensor:
    """A block's rows of `table` (N, H) one step earlier; `first` (B, H) stands before the first step."""
    before = layout.before[block.rows]
    if block.steps.start:
        return table.index_select(0, before)
    return torch.cat([first, table.index_select(0, before[len(first) :])])


def _slopes(gates: Tensor, curve: Tensor, c_before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What back-propagation multiplies by, for all rows at once: (N, 4 H), (N, H), (N, H); `curve` is tanh of the cell.

    The first times the gradient of the cell (i, f, g) or of the output (o) is the gradient before the activations; the
    second leads from output to cell, the third from a cell to the one before.
    """
    i, f, g, o = gates.chunk(4, dim=1)
    slope = torch.empty_like(gates)
    at_i, at_f, at_g, at_o = slope.chunk(4, dim=1)
    one = gates.new_ones(1)
    for gate, factor, place in ((i, g, at_i), (f, c_before, at_f), (o, curve, at_o)):
        torch.sub(one, gate, out=place).mul_(gate).mul_(factor)  # of the sigmoid: y (1 - y)
    torch.addcmul(one, g, g, value=-1, out=at_g).mul_(i)  # of the hyperbolic tangent: 1 - y^2
    return slope, torch.addcmul(one, curve, curve, value=-1).mul_(o), f
