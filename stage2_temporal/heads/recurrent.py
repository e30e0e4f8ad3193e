"""LSTM and GRU heads. An LSTM on a CPU is computed by `heads.lstm_cpu`, everything else by torch's own networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from configs import head_settings, schema
from engine.device import sent_to
from stage2_temporal.heads.base import Head, HeadOutput, State, register_head, require_causal
from stage2_temporal.heads.lstm_cpu import run_lstm, step_lstm
from stage2_temporal.heads.standardise import Standardise


class RecurrentHead(Head):
    """An LSTM or GRU followed by dropout and a linear layer. Each tensor of its state is (B, layers, H).

    Weights are initialised as in Jin et al. (Medical Image Analysis 2020): Xavier normal in the recurrent network,
    Xavier uniform in the linear layers. Dropout acts between layers and before the last linear layer. With `relu`, a
    ReLU follows the recurrent network (MTRCNet-CL). With `fc_hidden`, another linear layer and a ReLU come before the
    last layer (as in the pytorch1.2.0 release of MTRCNet).
    """

    rnn: nn.LSTM | nn.GRU
    relu = False
    bf16_projection = False  # whether an LSTM that trains on a CPU projects inputs in bf16; evaluation is always fp32

    def __init__(
        self,
        config: head_settings.LstmHead | head_settings.GruHead,
        embedding_dim: int,
        phases: int,
        bidirectional: bool = False,
        fc_hidden: int | None = None,
    ) -> None:
        super().__init__(config, embedding_dim, phases)
        self.hidden_dim = config.hidden * (1 + bidirectional)
        self.fc_hidden = nn.Linear(self.hidden_dim, fc_hidden) if fc_hidden else None
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(fc_hidden or self.hidden_dim, phases)
        for layer in (self.fc, self.fc_hidden):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
        self.rnn = (nn.LSTM if config.name == "lstm" else nn.GRU)(
            embedding_dim,
            config.hidden,
            config.layers,
            batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
            bidirectional=bidirectional,
        )
        for name, parameter in self.rnn.named_parameters():
            if name.startswith("weight"):
                nn.init.xavier_normal_(parameter)

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """See `Head`. With `lengths`, padding is not computed, so neither outputs nor state depend on it."""
        return self._compute(x, None, state, lengths)

    def forward_stored(
        self, x: Tensor, standardise: Standardise, state: State | None = None, lengths: Tensor | None = None
    ) -> HeadOutput:
        """See `Head`. If `heads.lstm_cpu` computes the recurrence, x is standardised block by block."""
        return self._compute(x, standardise, state, lengths)

    def _compute(
        self, x: Tensor, standardise: Standardise | None, state: State | None, lengths: Tensor | None
    ) -> HeadOutput:
        """Compute `forward_stored` or, if `standardise` is None, `forward`."""
        if state is not None:
            require_causal(self)
        hidden = None if state is None else tuple(part.transpose(0, 1) for part in state)  # (layers, B, H) each
        last: State
        if isinstance(self.rnn, nn.LSTM) and self._runs_on_cpu_kernel(x):
            constants = None if standardise is None else (standardise.mean, standardise.scale)
            counts = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
            pair = None if hidden is None else (hidden[0], hidden[1])
            out, last = run_lstm(self.rnn, x, pair, counts, constants, self.bf16_projection and self.training)
        else:
            out, last = run_torch(self.rnn, x if standardise is None else standardise(x), hidden, lengths)
        out = F.relu(out) if self.relu else out  # (B, T, H)
        return HeadOutput([self._logits(out)], out, tuple(part.transpose(0, 1) for part in last))

    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """See `Head`. An LSTM in evaluation on a CPU keeps its weights prepared from step to step."""
        quick = not (self.training or torch.is_grad_enabled()) and self._runs_on_cpu_kernel(x)
        if not (quick and isinstance(self.rnn, nn.LSTM)):
            return super().step(x, state)
        pair = None if state is None else (state[0].transpose(0, 1), state[1].transpose(0, 1))
        out, last = step_lstm(self.rnn, x, pair)
        return self._logits(F.relu(out) if self.relu else out), tuple(part.transpose(0, 1) for part in last)

    def _logits(self, out: Tensor) -> Tensor:
        """The outputs (..., H) of the recurrent network, after ReLU if there is one -> logits (..., C)."""
        before_last = out if self.fc_hidden is None else F.relu(self.fc_hidden(out))
        return self.fc(self.dropout(before_last))  # type: ignore[no-any-return]

    def _runs_on_cpu_kernel(self, x: Tensor) -> bool:
        """Whether `heads.lstm_cpu` can compute an LSTM: it must be unidirectional, on a CPU, and without autocast."""
        return self.causal and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


@register_head("lstm", head_settings.LstmHead)
class LstmHead(RecurrentHead):
    """The LSTM head (Jin et al., Medical Image Analysis 2020). A bidirectional one needs whole videos or clips."""

    def __init__(self, config: head_settings.LstmHead, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases, config.bidirectional, config.fc_hidden)
        self.relu = config.relu

    def configure_training(self, settings: schema.TemporalConfig) -> None:
        """See `Head`."""
        self.bf16_projection = settings.projection == "bf16"


@register_head("gru", head_settings.GruHead)
class GruHead(RecurrentHead):
    """A head like `LstmHead` with a GRU in place of the LSTM."""


def run_torch(rnn: nn.LSTM | nn.GRU, x: Tensor, hidden: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
    """Run torch's own network: x (B, T, D), hidden (layers, B, H) each -> outputs (B, T, H) and the new hidden.

    `lengths` is that of `Head.forward`; outputs for padding are 0. Under bf16 autocast on CUDA the network runs in
    fp32: torch's autocast would pass fp16 to cuDNN even for bf16, and gradients are scaled for fp16 only if
    `precision=fp16`.
    """
    if x.device.type == "cuda" and _autocast_without_scaler():
        with torch.autocast("cuda", enabled=False):
            given = None if hidden is None else tuple(part.float() for part in hidden)
            return run_torch(rnn, x.float(), given, lengths)
    if lengths is None or int(lengths.min()) == x.shape[1]:
        return _run(rnn, x, hidden)
    if x.device.type == "cuda":
        return run_packed(rnn, x, hidden, lengths)
    return (_run_each_alone if rnn.bidirectional else _run_until_each_ends)(rnn, x, hidden, lengths.tolist())


def _autocast_without_scaler() -> bool:
    return torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != torch.float16


def run_packed(rnn: nn.LSTM | nn.GRU, x: Tensor, hidden: State | None, lengths: Tensor) -> tuple[Tensor, State]:
    """The same as `run_torch`, in a single call of cuDNN, which skips the padding."""
    # DistributedDataParallel moves every tensor to the GPU, but `lengths` must be on the CPU
    lengths = lengths.cpu()
    order = torch.argsort(lengths, descending=True, stable=True)
    if not torch.equal(order, torch.arange(len(order))):  # sorted here, since `enforce_sorted=False` waits for the GPU
        there, back = sent_to(x.device, order), sent_to(x.device, torch.argsort(order))
        given = None if hidden is None else tuple(part.index_select(1, there) for part in hidden)
        out, last = run_packed(rnn, x.index_select(0, there), given, lengths[order])
        return out.index_select(0, back), tuple(part.index_select(1, back) for part in last)
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    packed_out, last = rnn(packed, _as_given(hidden))
    padded, _ = pad_packed_sequence(packed_out, batch_first=True, total_length=x.shape[1])
    return padded, last if isinstance(last, tuple) else (last,)


def _run(rnn: nn.LSTM | nn.GRU, x: Tensor, hidden: State | None) -> tuple[Tensor, State]:
    """The same as `run_torch`, for sequences of equal lengths."""
    out, last = rnn(x, _as_given(hidden))
    return out, last if isinstance(last, tuple) else (last,)


def _as_given(hidden: State | None) -> State | Tensor | None:
    """The state in the form that torch's networks take: a pair for an LSTM, one tensor for a GRU."""
    given = None if hidden is None else tuple(part.contiguous() for part in hidden)
    return given[0] if given and len(given) == 1 else given


def _run_until_each_ends(
    rnn: nn.LSTM | nn.GRU, x: Tensor, hidden: State | None, lengths: list[int]
) -> tuple[Tensor, State]:
    """The same as `run_torch`, in sections: all sequences up to the end of the shortest, the rest up to the next end.

    `PackedSequence` would give the same result. But on a CPU its backward pass fills a gradient as large as the whole
    input for every single frame: for two videos of 2,000 and 3,600 frames it took 97 s, and this function takes 1.5 s.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if order != list(range(len(lengths))):
        back = sorted(order, key=order.__getitem__)
        given = None if hidden is None else tuple(part[:, order] for part in hidden)
        out, last = _run_until_each_ends(rnn, x[order], given, [lengths[i] for i in order])
        return out[back], tuple(part[:, back] for part in last)
    pieces, ended, start = [], [], 0
    for active in range(len(lengths), 0, -1):  # number of sequences still running, of which the last is the shortest
        stop = lengths[active - 1]
        if stop > start:
            out, hidden = _run(rnn, x[:active, start:stop], hidden)
            pieces.append(F.pad(out, (0, 0, 0, 0, 0, len(lengths) - active)))  # (B, stop - start, H)
            start = stop
        assert hidden is not None
        ended.append(tuple(part[:, active - 1 :] for part in hidden))
        hidden = tuple(part[:, : active - 1] for part in hidden)
    pieces.append(pieces[0].new_zeros(len(lengths), x.shape[1] - start, pieces[0].shape[2]))
    return torch.cat(pieces, dim=1), tuple(torch.cat(parts, dim=1) for parts in zip(*ended[::-1], strict=True))


def _run_each_alone(rnn: nn.LSTM | nn.GRU, x: Tensor, hidden: State | None, lengths: list[int]) -> tuple[Tensor, State]:
    """The same as `run_torch`, one sequence after the other.

    This is for bidirectional networks, whose backward direction must start at the end of each sequence.
    """
    runs = [_run(rnn, x[row : row + 1, :length], hidden) for row, length in enumerate(lengths)]
    out = torch.cat([F.pad(out, (0, 0, 0, x.shape[1] - out.shape[1])) for out, _ in runs])
    return out, tuple(torch.cat(parts, dim=1) for parts in zip(*(last for _, last in runs), strict=True))
