"""The heads of stage two, all behind one interface, and the model that a checkpoint holds: standardisation + head.

A head turns embeddings (B, T, D) into phase logits (B, T, C). Causal heads give the same numbers, to rounding, over a
whole video, over chunks of any lengths with the state carried from one to the next, and frame by frame with `step`.
A new head is one class here, one block in `configs.schema` and one line in `HEADS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from configs import schema
from configs.errors import UserError
from stage2_temporal.heads.lstm_cpu import run_lstm

# What a head remembers between two calls: tensors with the batch first, so that finished videos can be dropped.
State = tuple[Tensor, ...]

# A deviation below this share of the median one is taken for this: a channel that hardly moved on the training videos
# must not turn into thousands of deviations on another one.
LEAST_DEVIATION = 0.01
LINEAR_BLOCK_FRAMES = 2048


def first_rows(state: State, count: int) -> State:
    """The state of the first `count` sequences."""
    return tuple(tensor[:count] for tensor in state)


def detach_state(state: State) -> State:
    """A copy of the state, cut off from the graph that made it (truncated back-propagation through time)."""
    return tuple(tensor.detach().clone() for tensor in state)


class Head(nn.Module, ABC):
    """The interface. `causal` says whether outputs depend on the past alone, so that state can be carried."""

    causal = True
    hidden_dim: int

    def __init__(self, phases: int) -> None:
        super().__init__()
        self.phases = phases

    @abstractmethod
    def outputs(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, State]:
        """Logits of every stage, what the last layer reads of the past, and the state.

        x (B, T, D) -> [(B, T, C), ...], (B, T, `hidden_dim`), state. `state` None starts from zero. `lengths` (B,) on
        the CPU counts the frames of each sequence that are not padding; outputs on padding mean nothing, and neither
        does the state after it in causal heads other than the recurrent ones.
        """

    def training_logits(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], State]:
        """Logits [(B, T, C), ...] of every stage that the loss is summed over, the last the prediction; the state."""
        return self.training_logits_of_stored(x, None, state, lengths)

    def outputs_of_stored(
        self, x: Tensor, standardise: Standardise | None, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, State]:
        """As `outputs`, for x in any float type that is yet to be standardised; None where it is."""
        return self.outputs(x if standardise is None else standardise(x), state, lengths)

    def training_logits_of_stored(
        self, x: Tensor, standardise: Standardise | None, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], State]:
        """As `training_logits`, for x in any float type that is yet to be standardised; None where it is."""
        stages, _, state = self.outputs_of_stored(x, standardise, state, lengths)
        return stages, state

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """x (B, T, D) -> logits (B, T, C) and the state after the last frame."""
        stages, state = self.training_logits(x, state, lengths)
        return stages[-1], state

    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One frame: x (B, D) -> logits (B, C) and the state after it. Raises UserError when not causal."""
        require_causal(self)
        logits, state = self(x.unsqueeze(1), state)
        return logits.squeeze(1), state


def require_causal(head: Head) -> None:
    """Raise UserError for a head that looks into the future, where frames come one after the other."""
    if not head.causal:
        raise UserError(
            "temporal.head.bidirectional=true is offline only: it needs whole videos or clips, and takes neither "
            "chunks with carried state nor single frames"
        )


class RecurrentHead(Head):
    """LSTM or GRU, dropout, one linear layer. State: (B, layers, H) for each of the network's state tensors.

    With `relu`, `hidden` is rectified (MTRCNet-CL); with `fc_hidden`, another linear layer and ReLU stand before the
    last one (the net of the reference's pytorch1.2.0 release).
    """

    rnn: nn.LSTM | nn.GRU
    bf16_projection = False  # of the LSTM while it trains on a CPU; evaluation is always in fp32

    def __init__(
        self, width: int, phases: int, dropout: float, relu: bool = False, fc_hidden: int | None = None
    ) -> None:
        super().__init__(phases)
        self.hidden_dim, self.relu = width, relu
        self.fc_hidden = nn.Linear(width, fc_hidden) if fc_hidden else None
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(fc_hidden or width, phases)
        for layer in (self.fc, self.fc_hidden):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)

    def outputs(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, State]:
        """See `Head`. With `lengths`, padding is never computed: neither result nor state depends on it."""
        return self.outputs_of_stored(x, None, state, lengths)

    def outputs_of_stored(
        self,
        x: Tensor,
        standardise: Standardise | None,
        state: State | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor, State]:
        """See `Head`; a block at a time where the recurrence is ours."""
        if state is not None:
            require_causal(self)
        hidden = None if state is None else tuple(part.transpose(0, 1) for part in state)
        last: State
        if isinstance(self.rnn, nn.LSTM) and self._is_ours(x):
            constants = None if standardise is None else (standardise.mean, standardise.scale)
            counts = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
            pair = None if hidden is None else (hidden[0], hidden[1])
            out, last = run_lstm(self.rnn, x, pair, counts, constants, self.bf16_projection and self.training)
        else:
            out, last = self._run_library(x if standardise is None else standardise(x), hidden, lengths)
        out = F.relu(out) if self.relu else out  # (B, T, H)
        before_last = out if self.fc_hidden is None else F.relu(self.fc_hidden(out))
        return [self.fc(self.dropout(before_last))], out, tuple(part.transpose(0, 1) for part in last)

    def _is_ours(self, x: Tensor) -> bool:
        """Whether `stage2_temporal.heads.lstm_cpu` computes it: an LSTM that reads forwards, on a CPU, in fp32."""
        return self.causal and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")

    def _run_library(self, x: Tensor, hidden: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        """x (B, T, D), hidden (layers, B, H) each -> (B, T, H), hidden, by torch's own networks."""
        if lengths is None or int(lengths.min()) == x.shape[1]:
            return self._run(x, hidden)
        if x.device.type == "cuda":
            return self._run_packed(x, hidden, lengths)
        return (self._run_until_each_ends if self.causal else self._run_each_alone)(x, hidden, lengths.tolist())

    def _run(self, x: Tensor, hidden: State | None) -> tuple[Tensor, State]:
        """x (B, T, D), hidden (layers, B, H) each -> (B, T, H), hidden."""
        given = None if hidden is None else tuple(part.contiguous() for part in hidden)
        out, last = self.rnn(x, given[0] if given and len(given) == 1 else given)  # an LSTM takes a pair, a GRU one
        return out, last if isinstance(last, tuple) else (last,)

    def _run_packed(self, x: Tensor, hidden: State | None, lengths: Tensor) -> tuple[Tensor, State]:
        """As `_run`, for sequences of unequal lengths: one call, which cuDNN computes without padding."""
        given = None if hidden is None else tuple(part.contiguous() for part in hidden)
        # DistributedDataParallel takes every tensor to the GPU, where `lengths` may not be
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, last = self.rnn(packed, given[0] if given and len(given) == 1 else given)
        padded, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        return padded, last if isinstance(last, tuple) else (last,)

    def _run_until_each_ends(self, x: Tensor, hidden: State | None, lengths: list[int]) -> tuple[Tensor, State]:
        """As `_run`, for sequences of unequal lengths: all together up to the end of the shortest, and so on.

        `PackedSequence` would do the same, but its backward pass on a CPU fills a gradient as large as the whole input
        for every single frame: two videos of 2,000 and 3,600 frames took 97 s where this takes 1.5 s.
        """
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        if order != list(range(len(lengths))):
            back = sorted(order, key=order.__getitem__)
            mine = None if hidden is None else tuple(part[:, order] for part in hidden)
            out, last = self._run_until_each_ends(x[order], mine, [lengths[i] for i in order])
            return out[back], tuple(part[:, back] for part in last)
        pieces, ended, start = [], [], 0
        for active in range(len(lengths), 0, -1):  # sequences still running; the last of them is the shortest
            stop = lengths[active - 1]
            if stop > start:
                out, hidden = self._run(x[:active, start:stop], hidden)
                pieces.append(F.pad(out, (0, 0, 0, 0, 0, len(lengths) - active)))  # (B, stop - start, H)
                start = stop
            assert hidden is not None
            ended.append(tuple(part[:, active - 1 :] for part in hidden))
            hidden = tuple(part[:, : active - 1] for part in hidden)
        pieces.append(pieces[0].new_zeros(len(lengths), x.shape[1] - start, pieces[0].shape[2]))
        return torch.cat(pieces, dim=1), tuple(torch.cat(parts, dim=1) for parts in zip(*ended[::-1], strict=True))

    def _run_each_alone(self, x: Tensor, hidden: State | None, lengths: list[int]) -> tuple[Tensor, State]:
        """As `_run`, one sequence after the other: one that is also read backwards must start at its own end."""
        runs = [self._run(x[row : row + 1, :length], hidden) for row, length in enumerate(lengths)]
        out = torch.cat([F.pad(out, (0, 0, 0, x.shape[1] - out.shape[1])) for out, _ in runs])
        return out, tuple(torch.cat(parts, dim=1) for parts in zip(*(last for _, last in runs), strict=True))


class LstmHead(RecurrentHead):
    """LSTM over embeddings, state zero at the start (Jin et al., Medical Image Analysis 2020).

    Weights start as in the reference: Xavier normal in the LSTM, Xavier uniform in the linear layer. Dropout acts
    between layers and before the linear layer. Bidirectional: offline only.
    """

    def __init__(self, config: schema.LstmHead, embedding_dim: int, phases: int) -> None:
        width = config.hidden * (1 + config.bidirectional)
        super().__init__(width, phases, config.dropout, config.relu, config.fc_hidden)
        self.causal = not config.bidirectional
        self.rnn = nn.LSTM(
            embedding_dim,
            config.hidden,
            config.layers,
            batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
            bidirectional=config.bidirectional,
        )
        _xavier_normal(self.rnn)


class GruHead(RecurrentHead):
    """As `LstmHead`, with a GRU."""

    def __init__(self, config: schema.GruHead, embedding_dim: int, phases: int) -> None:
        super().__init__(config.hidden, phases, config.dropout)
        self.rnn = nn.GRU(
            embedding_dim,
            config.hidden,
            config.layers,
            batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        _xavier_normal(self.rnn)


def _xavier_normal(rnn: nn.RNNBase) -> None:
    for name, parameter in rnn.named_parameters():
        if name.startswith("weight"):
            nn.init.xavier_normal_(parameter)


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


class TcnHead(Head):
    """Causal multi-stage temporal convolution (TeCNO, Czempiel et al., MICCAI 2020).

    Stage one maps D to M maps and stacks layers of dilation 1, 2, 4, ...; every further stage refines the softmax of
    the one before. The loss is the sum over stages. State: each layer's past inputs, zero at the start of a video
    (which is the zero padding of the whole-video form).
    """

    def __init__(self, config: schema.TcnHead, embedding_dim: int, phases: int) -> None:
        super().__init__(phases)
        widths = [embedding_dim] + [phases] * (config.stages - 1)
        self.enter = nn.ModuleList(nn.Conv1d(width, config.maps, 1) for width in widths)
        self.layers = nn.ModuleList(
            nn.ModuleList(CausalLayer(config.maps, 2**level, config.dropout) for level in range(config.layers))
            for _ in widths
        )
        self.leave = nn.ModuleList(nn.Conv1d(config.maps, phases, 1) for _ in widths)
        self.maps = self.hidden_dim = config.maps

    def outputs(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, State]:
        """See `Head`. Padding stands at the end, where a causal convolution cannot carry it back."""
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
        return stages, hidden.transpose(1, 2), tuple(after)

    def _zero_state(self, x: Tensor) -> State:
        flat = [layer for layers in self.layers for layer in layers]  # type: ignore[attr-defined]
        return tuple(x.new_zeros(len(x), self.maps, layer.reach) for layer in flat)


class LinearHead(Head):
    """One linear layer a frame: what a frame says without its past. No state."""

    def __init__(self, config: schema.LinearHead, embedding_dim: int, phases: int) -> None:
        super().__init__(phases)
        self.hidden_dim = embedding_dim
        self.fc = nn.Linear(embedding_dim, phases)
        nn.init.xavier_uniform_(self.fc.weight)

    def outputs(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, State]:
        """See `Head`."""
        return [self.fc(x)], x, ()

    def training_logits_of_stored(
        self, x: Tensor, standardise: Standardise | None, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], State]:
        """See `Head`. Logits of padding are 0 where there are `lengths`.

        Widened features would be the largest table of a whole training. So padding is left out, and blocks of frames
        are widened one at a time, for the backward pass once more.
        """
        if standardise is None or lengths is None:
            return super().training_logits_of_stored(x, standardise, state, lengths)
        real = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]  # (B, T)

        def block_logits(block: Tensor) -> Tensor:
            logits: Tensor = self.fc(standardise(block))
            return logits

        blocks = x[real].split(LINEAR_BLOCK_FRAMES)  # (N, D) each
        logits = torch.cat([checkpoint(block_logits, block, use_reentrant=False) for block in blocks])  # (N, C)
        return [logits.new_zeros(*real.shape, self.phases).masked_scatter(real.unsqueeze(-1), logits)], ()


HEADS: dict[str, Callable[..., Head]] = {"lstm": LstmHead, "gru": GruHead, "tcn": TcnHead, "linear": LinearHead}


def build_head(config: schema.HeadConfig, embedding_dim: int, phases: int) -> Head:
    """The head that `config` names, for embeddings of width D, with fresh weights."""
    return HEADS[config.name](config, embedding_dim, phases)


class Standardise(nn.Module):
    """(x - mean) / deviation with constants (D,) that travel in the checkpoint; whatever goes in, fp32 comes out."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        deviation = deviation.double()
        least = LEAST_DEVIATION * float(deviation.median())
        deviation = torch.where(deviation > least, deviation, torch.full_like(deviation, least or 1.0))
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", deviation.reciprocal().float())

    @classmethod
    def identity(cls, embedding_dim: int) -> Standardise:
        """Changes nothing (or takes the constants of a state dict loaded later)."""
        return cls(torch.zeros(embedding_dim), torch.ones(embedding_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) in any float type -> (..., D) fp32."""
        return torch.sub(x, self.mean).mul_(self.scale)


class PhaseModel(nn.Module):
    """What a checkpoint of stage two holds: embeddings as stored in, phase logits out.

    `carried` is the state after the last chunk of truncated back-propagation. It is saved with the weights, so that
    training stopped between two chunks of a video goes on with the very same state.
    """

    def __init__(self, standardise: Standardise, head: Head) -> None:
        super().__init__()
        self.standardise, self.head = standardise, head
        self.carried: State = ()

    @property
    def causal(self) -> bool:
        """Whether outputs depend on the past alone."""
        return self.head.causal

    @property
    def phases(self) -> int:
        """C."""
        return self.head.phases

    def forward(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], State]:
        """x (B, T, D) -> logits of every stage [(B, T, C), ...] and the state, as `Head.training_logits`."""
        return self.head.training_logits_of_stored(x, self.standardise, state, lengths)

    def outputs(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, State]:
        """x (B, T, D) -> logits of every stage, what the last layer reads (B, T, H), and the state."""
        return self.head.outputs_of_stored(x, self.standardise, state, lengths)

    def logits(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """x (B, T, D) -> the last stage's logits (B, T, C) and the state, as `Head.forward`."""
        stages, state = self(x, state, lengths)
        return stages[-1], state

    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One frame: x (B, D) -> logits (B, C) and the state, as `Head.step`."""
        return self.head.step(self.standardise(x), state)

    def get_extra_state(self) -> dict[str, Any]:
        """Part of `state_dict`."""
        return {"carried": self.carried}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Part of `load_state_dict`."""
        device = self.standardise.mean.device
        self.carried = tuple(tensor.to(device) for tensor in state["carried"])
