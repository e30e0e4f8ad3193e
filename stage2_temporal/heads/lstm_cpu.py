"""The recurrence of an LSTM on a CPU, for sequences of different lengths, without padding; `nn.LSTM` has the weights.

Training is 1.15 times as fast as with nn.LSTM on sequences without padding, 1.5 times with a bf16 input projection,
and takes half the memory (docs/performance.md). Matrix products are computed by oneDNN (`engine.onednn`), or by
`F.linear` where oneDNN's are missing or wrong. On other devices, under autocast, and for bidirectional networks,
`heads.recurrent` calls nn.LSTM instead.

The frames of a batch form one table of rows. Rows are sorted by time step, and within a step by the length of the
sequence, longest first (the order of `PackedSequence`), so that the sequences still running at a step are adjacent
rows. The input projection of many frames is one matrix product, and so is the gradient of each weight. Only the product
with the previous hidden state has to be computed step by step. Rows are processed in blocks of several steps: stored
features are converted and standardised one block at a time, so that only the gates need a table as long as the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine import onednn

# With about a thousand rows, the matrix products of a block run at full speed and its tables still fit into the caches.
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Block:
    """A block: consecutive steps whose rows are projected together."""

    steps: slice
    rows: slice


@dataclass(frozen=True)
class Layout:
    """The position of each frame of a batch in the table of rows."""

    order: Tensor  # (B,) numbers of the sequences, longest first
    sizes: list[int]  # (T,) number of sequences still running at each step
    frame_of_row: Tensor  # (N,) row -> frame of the padded (B * T) table
    row_before: Tensor  # (N,) row -> row of the same sequence one step earlier; negative at the first step
    last_row: Tensor  # (B,) sequence in sorted order -> row of its last frame
    blocks: list[Block]

    @classmethod
    def of(cls, lengths: Sequence[int], frames: int, block_rows: int) -> Layout:
        """The layout of sequences with these `lengths` (each at least 1), which are padded to `frames` frames."""
        length, order = torch.tensor(lengths).sort(descending=True, stable=True)
        running = torch.arange(int(length[0]))[:, None] < length  # (T, B)
        sizes = running.sum(dim=1)
        steps, column = running.nonzero(as_tuple=True)
        first = sizes.cumsum(0) - sizes
        return cls(
            order=order,
            sizes=sizes.tolist(),
            frame_of_row=order[column] * frames + steps,
            row_before=torch.arange(len(steps)) - sizes[(steps - 1).clamp(min=0)],
            last_row=first[length - 1] + torch.arange(len(order)),
            blocks=_blocks(sizes.tolist(), block_rows),
        )


def _blocks(sizes: list[int], block_rows: int) -> list[Block]:
    blocks, step, row, rows = [], 0, 0, 0
    for t, size in enumerate(sizes, start=1):
        rows += size
        if rows >= block_rows or t == len(sizes):
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
    block_rows: int = BLOCK_ROWS,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run the network `rnn`, which must be batch first and unidirectional, on x (B, T, D).

    Returns the outputs (B, T, H) and the last state. `state` is a pair of tensors (layers, B, H); None means zero.
    `lengths` (B) holds the number of frames of each sequence without padding; outputs for padding are 0. x may be fp16.
    It is converted to the type of the weights, and standardised with `constants` (mean, scale), (D,) each. `bf16`
    computes the input projection of the first layer, and the gradient of its weights, in bfloat16.
    """
    layout = Layout.of(lengths, x.shape[1], block_rows)
    if state is None:
        zero = rnn.all_weights[0][1].new_zeros(rnn.num_layers, len(x), rnn.hidden_size)
        state = (zero, zero)
    rows = x.flatten(0, 1)  # (B * T, D); after the first layer (N, H)
    last_states = []
    for layer in range(rnn.num_layers):
        if layer and rnn.dropout and rnn.training:
            rows = F.dropout(rows, rnn.dropout)
        weights = rnn.all_weights[layer] if rnn.bias else [*rnn.all_weights[layer], None, None]
        h, c = (part[layer].index_select(0, layout.order) for part in state)
        spec = LayerSpec(layout, torch.is_grad_enabled())
        if layer == 0:
            spec = LayerSpec(layout, torch.is_grad_enabled(), layout.frame_of_row, constants, bf16)
        rows, h, c = _Layer.apply(rows, *weights, h, c, spec)
        last_states.append((h, c))
    out = rows.new_zeros(len(x) * x.shape[1], rows.shape[1]).index_copy(0, layout.frame_of_row, rows)
    back = layout.order.argsort()
    last_h, last_c = (torch.stack(parts).index_select(1, back) for parts in zip(*last_states, strict=True))
    return out.view(len(x), x.shape[1], -1), (last_h, last_c)


@torch.no_grad()
def step_lstm(rnn: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run the network on one frame, x (B, D), without gradients and dropout.

    Returns the output (B, H) and the last state, a pair of tensors (layers, B, H) like `state`. With oneDNN, these are
    the numbers of `run_lstm`, bit for bit. That function converts the weights to oneDNN's layout in every call, which
    takes ten times as long as the products of a frame; here they are kept until a weight changes.
    """
    if state is None:
        zero = rnn.all_weights[0][1].new_zeros(rnn.num_layers, len(x), rnn.hidden_size)
        state = (zero, zero)
    last_states = []
    for (w_ih, w_hh, bias), h, c in zip(_weights_of_steps(rnn, len(x)), *state, strict=True):
        gates = _product(x, w_ih, bias) + _product(h, w_hh)  # (B, 4 H)
        i, f = gates[:, : 2 * rnn.hidden_size].sigmoid().chunk(2, dim=1)
        g, o = gates[:, 2 * rnn.hidden_size :].chunk(2, dim=1)
        c = (f * c).addcmul(i, g.tanh())
        x = c.tanh() * o.sigmoid()
        last_states.append((x, c))
    last_h, last_c = (torch.stack(parts) for parts in zip(*last_states, strict=True))
    return x, (last_h, last_c)


StepWeights = list[tuple[Tensor, Tensor, Tensor | None]]  # of each layer: w_ih, w_hh, the sum of both biases


class _Kept(NamedTuple):
    """The weights of a network in oneDNN's layout, and the ones that they were made from."""

    source: Sequence[Tensor]  # kept, so that no other tensor can have the same identity
    identity: list[Any]
    packed: StepWeights


# not attributes of the network, so that they are neither copied nor saved with it
_KEPT: WeakKeyDictionary[nn.LSTM, _Kept] = WeakKeyDictionary()


def _weights_of_steps(rnn: nn.LSTM, rows: int) -> StepWeights:
    """The weights of each layer for `step_lstm`, packed for `_product` as `run_lstm` packs them."""
    source = [weight for layer in rnn.all_weights for weight in layer]
    keep = onednn.multiplies(source[0].dtype) and not any(weight.is_inference() for weight in source)
    # a Parameter may get other values or other storage, or be replaced by another one
    identity: list[Any] = (
        [rows, *((id(weight), weight.data_ptr(), weight._version) for weight in source)] if keep else []
    )
    if keep and (kept := _KEPT.get(rnn)) is not None and kept.identity == identity:
        return kept.packed
    packed: StepWeights = []
    for w_ih, w_hh, *biases in rnn.all_weights:
        packed.append((_packed(w_ih, BLOCK_ROWS), _packed(w_hh, rows), biases[0] + biases[1] if biases else None))
    if keep:
        _KEPT[rnn] = _Kept(source, identity, packed)
    return packed


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is computed: its arguments, apart from the tensors that have gradients."""

    layout: Layout
    save_for_backward: bool
    input_row: Tensor | None = None  # (N,) row -> row of the input table; None: both tables have the same rows
    constants: tuple[Tensor, Tensor] | None = None  # mean and scale (D,)
    bf16: bool = False

    def block_inputs(self, x: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """The inputs (N, D) of a block, converted and standardised for its matrix products.

        `dtype` is the type of the weights.
        """
        block = x[rows] if self.input_row is None else x.index_select(0, self.input_row[rows])
        if self.constants is not None:
            block = torch.sub(block, self.constants[0]).mul_(self.constants[1])
        return block.to(torch.bfloat16 if self.bf16 else dtype)


class _Layer(torch.autograd.Function):
    """One layer, for all rows. The gates are in the order of nn.LSTM: i, f, g, o."""

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
        spec: LayerSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D), or (B * T, D) with `spec.input_row`; sorted h0, c0 (B, H) -> outputs (N, H), last h, c (B, H)."""
        layout, width = spec.layout, w_hh.shape[1]
        out, cells, tanh_cells = (w_hh.new_empty(len(layout.frame_of_row), width) for _ in range(3))
        packed_ih = _packed(w_ih.bfloat16() if spec.bf16 else w_ih, BLOCK_ROWS)
        packed_hh = _packed(w_hh, layout.sizes[0])
        bias = None if b_ih is None or b_hh is None else (b_ih + b_hh).to(packed_ih.dtype)
        h, c = h0, c0
        saved_gates, saved_inputs = [], []
        for block in layout.blocks:
            rows, sizes = block.rows, layout.sizes[block.steps]
            inputs = spec.block_inputs(x, rows, w_hh.dtype)
            gates = _product(inputs, packed_ih, bias).to(w_hh.dtype)  # (rows, 4 H)
            if spec.save_for_backward:
                saved_gates.append(gates)
                saved_inputs += [inputs] if spec.bf16 else []  # fp32 inputs, twice the size, are computed again instead
            tables = (gates, gates[:, : 2 * width], *gates.chunk(4, dim=1), cells[rows], tanh_cells[rows], out[rows])
            per_step = zip(sizes, *(table.split(sizes) for table in tables), strict=True)
            for size, all_gates, i_f, i, f, g, o, cell, tanh_c, hidden in per_step:
                if size < len(h):
                    h, c = h[:size], c[:size]
                all_gates.add_(_product(h, packed_hh))
                i_f.sigmoid_()
                g.tanh_()
                o.sigmoid_()
                torch.mul(f, c, out=cell).addcmul_(i, g)
                torch.mul(torch.tanh(cell, out=tanh_c), o, out=hidden)
                h, c = hidden, cell
        if spec.save_for_backward:
            ctx.save_for_backward(x, w_ih, w_hh, h0, c0, cells, tanh_cells, out, *saved_gates, *saved_inputs)
            ctx.spec = spec
        return out, out.index_select(0, layout.last_row), cells.index_select(0, layout.last_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Tensor | None, ...]:
        """Back-propagation through time, block by block; each block adds one product to the gradient of each weight."""
        x, w_ih, w_hh, h0, c0, cells, tanh_cells, out, *saved = ctx.saved_tensors
        spec, width = ctx.spec, w_hh.shape[1]
        packed_hh = _packed(w_hh.t().contiguous(), spec.layout.sizes[0])  # (H, 4 H)
        d_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        d_ih, d_hh, d_bias = torch.zeros_like(w_ih), torch.zeros_like(w_hh), w_hh.new_zeros(4 * width)
        # rows of sequences that have ended already hold the gradients of their last states
        d_h, d_c = d_h.clone(memory_format=torch.contiguous_format), d_c.clone(memory_format=torch.contiguous_format)
        dh, dc = d_h[:0], d_c[:0]
        count = len(spec.layout.blocks)
        parts = zip(spec.layout.blocks, saved[:count], saved[count:] or [None] * count, strict=True)
        for block, gates, inputs in reversed(list(parts)):
            rows, sizes = block.rows, spec.layout.sizes[block.steps]
            h_before, c_before = (_before(*pair, spec.layout, block) for pair in ((out, h0), (cells, c0)))
            gate_grad, cell_factor, f = _local_gradients(gates, tanh_cells[rows], c_before)
            i_f_g_grad, o_grad = gate_grad[:, : 3 * width].unflatten(1, (3, width)), gate_grad[:, 3 * width :]
            tables = (d_out[rows], gate_grad, i_f_g_grad, o_grad, cell_factor, f)
            per_step = zip(sizes[::-1], *(table.split(sizes)[::-1] for table in tables), strict=True)
            for size, d_hidden, all_grad, i_f_g, o, factor, forget in per_step:
                if size > len(dh):
                    dh, dc = d_h[:size], d_c[:size]
                dh.add_(d_hidden)
                dc.addcmul_(dh, factor)
                i_f_g.mul_(dc.unsqueeze(1))
                o.mul_(dh)
                dc.mul_(forget)
                dh.copy_(_product(all_grad, packed_hh))
            d_bias += gate_grad.sum(dim=0)
            d_hh += _product(gate_grad.t(), h_before.t())
            inputs = spec.block_inputs(x, rows, w_hh.dtype) if inputs is None else inputs
            d_ih += _product((gate_grad.bfloat16() if spec.bf16 else gate_grad).t(), inputs.t())
            if d_x is not None:
                d_block = _product(gate_grad, w_ih.t())
                d_block = d_block if spec.constants is None else d_block.mul_(spec.constants[1])
                d_x[rows if spec.input_row is None else spec.input_row[rows]] = d_block.to(d_x.dtype)
        biases = (d_bias if ctx.needs_input_grad[3] else None, d_bias.clone() if ctx.needs_input_grad[4] else None)
        return d_x, d_ih, d_hh, *biases, d_h, d_c, None


def _packed(weights: Tensor, rows: int) -> Tensor:
    """Weights (O, I) for `_product` in oneDNN's own layout, with which a step's product takes a third of the time."""
    return onednn.pack_linear(weights, rows) if onednn.multiplies(weights.dtype) else weights


def _product(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, I) times the transpose of weights (O, I), which may be packed, plus bias (O,).

    It is computed by oneDNN, as torch does in its own LSTM. For other fp32 products torch calls MKL, which is slower on
    AMD processors.
    """
    return onednn.linear(x, weights, bias) if onednn.multiplies(x.dtype) else F.linear(x, weights, bias)


def _before(table: Tensor, initial: Tensor, layout: Layout, block: Block) -> Tensor:
    """The rows of `table` (N, H) one step before each row of a block; before the first step, those of `initial`."""
    before = layout.row_before[block.rows]
    if block.steps.start:
        return table.index_select(0, before)
    return torch.cat([initial, table.index_select(0, before[len(initial) :])])


def _local_gradients(gates: Tensor, tanh_c: Tensor, c_before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of back-propagation, for all rows at once: `gate_grad` (N, 4 H), `cell_of_output` (N, H), `f` (N, H).

    `gate_grad`, multiplied by the gradient of the cell (gates i, f, g) or of the output (gate o), is the gradient
    before the activation functions. `cell_of_output`, multiplied by the gradient of the output, is the output's part of
    the cell's gradient. The forget gate `f`, multiplied by a cell's gradient, is the gradient of the cell one frame
    earlier.
    """
    i, f, g, o = gates.chunk(4, dim=1)
    gate_grad = torch.empty_like(gates)
    i_grad, f_grad, g_grad, o_grad = gate_grad.chunk(4, dim=1)
    one = gates.new_ones(1)
    for gate, factor, target in ((i, g, i_grad), (f, c_before, f_grad), (o, tanh_c, o_grad)):
        torch.sub(one, gate, out=target).mul_(gate).mul_(factor)  # derivative of the sigmoid: y (1 - y)
    torch.addcmul(one, g, g, value=-1, out=g_grad).mul_(i)  # derivative of the hyperbolic tangent: 1 - y^2
    return gate_grad, torch.addcmul(one, tanh_c, tanh_c, value=-1).mul_(o), f
