"""The project's LSTM equals `nn.LSTM`: outputs, last state, every gradient, for all lengths, layers and states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from configs import head_settings
from engine.onednn import multiplies
from stage2_temporal.heads.base import Head, build_head
from stage2_temporal.heads.lstm_cpu import run_lstm
from stage2_temporal.heads.recurrent import LstmHead, run_packed
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.model import PhaseModel
from tests.onednn import broken_operations, other_operations, public_operations

D, H = 5, 6
State = tuple[Tensor, Tensor]


def network(layers: int = 1, bias: bool = True, seed: int = 0) -> nn.LSTM:
    torch.manual_seed(seed)
    return nn.LSTM(D, H, layers, batch_first=True, bias=bias).double()


def inputs(lengths: list[int], layers: int = 1) -> tuple[Tensor, State]:
    x = torch.randn(len(lengths), max(lengths) + 1, D).double().requires_grad_()
    h, c = (torch.randn(layers, len(lengths), H).double().requires_grad_() for _ in range(2))
    return x, (h, c)


def library(rnn: nn.LSTM, x: Tensor, state: State | None, lengths: list[int]) -> tuple[Tensor, State]:
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    out, last = rnn(packed, state)
    return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0], last


def everything(out: Tensor, last: State, wanted: list[Tensor]) -> list[Tensor]:
    """Outputs, last state and the gradients of something that depends unevenly on all of them."""
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * weight).sum() + (last[0] ** 2).sum() + (last[1] ** 3).sum()
    return [out, *last, *torch.autograd.grad(loss, wanted)]


@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    carried=st.booleans(),
    block=st.sampled_from([1, 7, 1024]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_library(lengths: list[int], layers: int, bias: bool, carried: bool, block: int) -> None:
    rnn = network(layers, bias)
    x, state = inputs(lengths, layers)
    wanted = [x, *rnn.parameters(), *(state if carried else ())]
    given_state = state if carried else None
    found = everything(*run_lstm(rnn, x, given_state, lengths, block_rows=block), wanted)
    for one, other in zip(found, everything(*library(rnn, x, given_state, lengths), wanted), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("width", [H, 64])
@pytest.mark.parametrize("lengths", [[1], [5, 2, 9], [30] * 40])
def test_equals_the_library_in_fp32(lengths: list[int], width: int) -> None:
    """As used in training, with weights in oneDNN's layout for the products of a step."""
    torch.manual_seed(0)
    rnn = nn.LSTM(D, width, 2, batch_first=True)
    x, _ = inputs(lengths, 2)
    x = x.detach().float().requires_grad_()
    wanted = [x, *rnn.parameters()]
    found = everything(*run_lstm(rnn, x, None, lengths), wanted)
    for one, other in zip(found, everything(*library(rnn, x, None, lengths), wanted), strict=True):
        assert float((one - other).detach().norm()) <= 1e-5 * float(other.detach().norm())


@pytest.mark.parametrize("operations", [*broken_operations().values(), public_operations()])
def test_a_torch_with_other_private_products_computes_the_same(operations: dict[str, Any]) -> None:
    torch.manual_seed(0)
    rnn, lengths = nn.LSTM(D, 64, 2, batch_first=True), [5, 2, 9]
    x = inputs(lengths, 2)[0].detach().float().requires_grad_()
    wanted = [x, *rnn.parameters()]
    expected = everything(*run_lstm(rnn, x, None, lengths), wanted)
    with other_operations(**operations):
        found = everything(*run_lstm(rnn, x, None, lengths), wanted)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).detach().norm()) <= 1e-5 * float(other.detach().norm())


@pytest.mark.parametrize("lengths", [[1], [4], [3, 1, 3]])
def test_gradients_are_the_derivatives(lengths: list[int]) -> None:
    rnn = network(2)
    x, (h, c) = inputs(lengths, 2)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, last = run_lstm(rnn, tensors[0], (tensors[1], tensors[2]), lengths)
        return out, *last

    assert torch.autograd.gradcheck(run, (x, h, c, *rnn.parameters()))


def test_without_gradients_the_same_bits() -> None:
    rnn = network(2)
    x, state = inputs([9, 4], 2)
    with torch.no_grad():
        found, _ = run_lstm(rnn, x, state, [9, 4])
    assert torch.equal(found, run_lstm(rnn, x, state, [9, 4])[0])


def test_padding_gets_no_gradient_and_gives_none() -> None:
    rnn = network()
    x, _ = inputs([3, 5])
    poisoned = torch.where(torch.arange(6)[None, :, None] < torch.tensor([3, 5])[:, None, None], x, float("nan"))
    out, _ = run_lstm(rnn, poisoned, None, [3, 5])
    assert not out[0, 3:].any()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert bool(gradient.isfinite().all())
    assert not gradient[0, 3:].any()
    assert gradient[0, :3].any()


def test_stored_features_are_standardised_as_before() -> None:
    """Widened and scaled inside the recurrence: the same as beforehand, gradients of the weights too."""
    torch.manual_seed(0)
    model = PhaseModel(
        Standardise(torch.rand(D) * 3, torch.rand(D) + 0.5), build_head(head_settings.LstmHead(hidden=H), D, 4)
    )
    x = (torch.randn(3, 20, D) * 2 + 1).half()
    lengths = torch.tensor([20, 7, 12])
    real = torch.arange(20) < lengths[:, None]
    gradients = []
    for logits in (model(x, None, lengths).logits, model.with_hidden(x, None, lengths).logits):
        loss = (logits[real] ** 2).sum()
        gradients.append([logits[real], *torch.autograd.grad(loss, list(model.head.parameters()))])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "operations", [{}, public_operations(), {"_linear_pointwise": None}], ids=["its own", "in any type", "none"]
)
def test_bf16_projects_nearly_the_same_and_only_in_training(operations: dict[str, Any]) -> None:
    with other_operations(**operations):
        projects_nearly_the_same()


def projects_nearly_the_same() -> None:
    torch.manual_seed(0)
    head = build_head(head_settings.LstmHead(hidden=32), 64, 4)
    assert isinstance(head, LstmHead)
    x = torch.randn(2, 40, 64)
    exact = head(x).logits
    head.bf16_projection = True
    lower = head(x).logits
    assert not torch.equal(lower, exact)
    torch.testing.assert_close(lower, exact, atol=0.05, rtol=0)
    weights = list(head.rnn.parameters())
    found = torch.autograd.grad((lower**2).sum(), weights)
    for one, other in zip(found, torch.autograd.grad((exact**2).sum(), weights), strict=True):
        assert float((one - other).norm() / other.norm()) < 0.03
    assert torch.equal(head.eval()(x).logits, exact)


@pytest.mark.parametrize("given_state", [True, False])
def test_packed_runs_on_cuda_compute_the_same(given_state: bool) -> None:
    """The path that CUDA takes for unequal lengths, here on a CPU."""
    head = build_head(head_settings.LstmHead(hidden=H, layers=2), D, 4).eval()
    assert isinstance(head, LstmHead)
    x, lengths = torch.randn(3, 9, D), torch.tensor([4, 9, 6])
    state = (torch.randn(2, 3, H), torch.randn(2, 3, H)) if given_state else None
    out, last = run_packed(head.rnn, x, state, lengths)
    expected, expected_last = run_lstm(head.rnn, x, state, lengths.tolist())
    for one, other in zip((out, *last), (expected, *expected_last), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


STEPPING = head_settings.LstmHead(hidden=33, layers=2, relu=True, fc_hidden=9)


def two_ways(head: Head, rows: int, frames: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Logits and state of single frames: by the head's own step, and by its forward pass on one frame."""
    found, one, other = [], None, None
    with torch.no_grad():
        for x in torch.randn(frames, rows, 70, generator=torch.Generator().manual_seed(rows)):
            logits, one = head.step(x, one)
            expected, other = Head.step(head, x, other)
            found += [(logits, expected), *zip(one, other, strict=True)]
    return found


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_step_gives_the_bits_of_the_forward_pass(rows: int) -> None:
    torch.manual_seed(0)
    head = build_head(STEPPING, 70, 7).eval()
    if multiplies(torch.float32):
        assert all(torch.equal(one, other) for one, other in two_ways(head, rows))
    for operations in (public_operations(), {"_linear_pointwise": None}):
        with other_operations(**operations):
            for one, other in two_ways(
                copy.deepcopy(head), rows
            ):  # MKL's bits depend on the place of a table in memory
                torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def _step_of_sgd(head: Head) -> None:
    head(torch.ones(1, 3, 70)).logits.sum().backward()
    torch.optim.SGD(head.parameters(), lr=0.1).step()


def _loaded(head: Head) -> None:
    torch.manual_seed(9)
    head.load_state_dict(build_head(STEPPING, 70, 7).state_dict())


def _replaced(head: Head) -> None:
    rnn = head.get_submodule("rnn")
    for name, weight in list(rnn.named_parameters()):
        setattr(rnn, name, nn.Parameter(weight.detach() * 2))


def _moved(head: Head) -> None:
    head.double().float().get_parameter("rnn.weight_ih_l1").data = torch.ones(132, 33)


@pytest.mark.parametrize("change", [_step_of_sgd, _loaded, _replaced, _moved])
def test_a_step_follows_a_change_of_the_weights(change: Callable[[Head], None]) -> None:
    """Those in oneDNN's layout are kept from step to step."""
    torch.manual_seed(0)
    head = build_head(STEPPING, 70, 7).eval()
    before = two_ways(head, 1)[0][0]
    change(head)
    after = two_ways(head, 1)
    for one, other in after:
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert not torch.equal(after[0][0], before)
    twin = copy.deepcopy(head)  # with kept weights, which no copy and no state dict has
    assert twin.state_dict().keys() == head.state_dict().keys()
    assert torch.equal(two_ways(twin, 1)[0][0], after[0][0])


def test_a_step_with_gradients_or_dropout_is_the_forward_pass() -> None:
    head = build_head(head_settings.LstmHead(hidden=8, layers=2, dropout=0.5), 70, 7)
    x = torch.randn(3, 70)
    torch.manual_seed(4)
    logits, _ = head.step(x, None)
    logits.sum().backward()
    assert all(weight.grad is not None for weight in head.parameters())
    torch.manual_seed(4)
    with torch.no_grad():
        assert torch.equal(head.step(x, None)[0], logits)
