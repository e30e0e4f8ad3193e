"""Heads: the same numbers in three ways of running, no dependence on later frames, no effect of padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs import head_settings
from configs.errors import UserError
from stage2_temporal.heads.base import HEADS, Head, build_head
from stage2_temporal.heads.linear import LinearHead
from stage2_temporal.heads.recurrent import LstmHead
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.heads.tcn import TcnHead
from stage2_temporal.model import PhaseModel

D, C = 5, 4
CAUSAL: dict[str, Any] = {
    "lstm": head_settings.LstmHead(hidden=7),
    "lstm of two layers": head_settings.LstmHead(hidden=6, layers=2, dropout=0.5),
    "gru": head_settings.GruHead(name="gru", hidden=7, layers=2),
    "tcn": head_settings.TcnHead(name="tcn", stages=1, layers=3, maps=6),
    "tcn of three stages": head_settings.TcnHead(name="tcn", stages=3, layers=4, maps=5),
    "ssm": head_settings.SsmHead(name="ssm", width=6, layers=2, head_width=4, state=3, step_max=1.0),
    "trans_svnet": head_settings.TransSvnetHead(name="trans_svnet", layers=3, maps=5, window=7, width=8),
    "linear": head_settings.LinearHead(name="linear"),
    "attention": head_settings.AttentionHead(name="attention", width=8, heads=2, window=6),
    "key pooling": head_settings.KeyPoolingHead(name="key_pooling", width=8, heads=2, window=4, keys=3),
}
BIDIRECTIONAL = head_settings.LstmHead(hidden=7, layers=2, bidirectional=True)
MSTCN = head_settings.MstcnPlusPlusHead(name="mstcn++", layers=4, refinements=1, refinement_layers=3, maps=5)
OFFLINE: dict[str, Any] = {"bidirectional": BIDIRECTIONAL, "mstcn++": MSTCN}
EVERY = CAUSAL | OFFLINE

LONG = [name for name in CAUSAL if name not in ("lstm of two layers", "tcn of three stages")]
NAMES = {"lstm", "gru", "tcn", "ssm", "trans_svnet", "mstcn++", "linear", "attention", "key_pooling"}
RECURRENT = ("lstm", "lstm of two layers", "gru", "bidirectional")


def head_of(config: Any, seed: int = 0) -> Head:
    torch.manual_seed(seed)
    return build_head(config, D, C).eval()


def frames(batch: int, count: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, count, D, generator=torch.Generator().manual_seed(seed))


def test_every_head_of_the_schema_is_in_the_registry() -> None:
    assert set(head_settings.HEAD_SETTINGS.names()) == set(HEADS.names()) == NAMES


@pytest.mark.parametrize("name", CAUSAL)
@given(cuts=st.lists(st.integers(1, 49), unique=True, max_size=8), seed=st.integers(0, 3))
@settings(max_examples=6, deadline=None)
def test_whole_chunked_and_single_frames_agree(name: str, cuts: list[int], seed: int) -> None:
    head, x = head_of(CAUSAL[name], seed), frames(2, 50, seed)
    with torch.no_grad():
        whole = head(x)
        parts, state = [], None
        for chunk in torch.tensor_split(x, sorted(cuts), dim=1):
            output = head(chunk, state)
            state = output.state
            parts.append(output.logits)
        steps, step_state = [], None
        for t in range(50):
            logits, step_state = head.step(x[:, t], step_state)
            steps.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack(steps, dim=1), whole.logits, atol=1e-5, rtol=0)
    for left, right in ((state, whole.state), (step_state, whole.state)):
        assert left is not None
        for one, other in zip(left, right, strict=True):
            assert len(one) == 2  # batch first
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LONG)
def test_agreement_over_5000_frames(name: str) -> None:
    """Chunks of 1000 frames, and single frames from a state that is 4,900 frames old."""
    head, x = head_of(CAUSAL[name]), frames(1, 5000)
    with torch.no_grad():
        whole = head(x).logits
        parts, state = [], None
        for chunk in x[:, :4900].split(1000, dim=1):
            output = head(chunk, state)
            state = output.state
            parts.append(output.logits)
        for t in range(4900, 5000):
            logits, state = head.step(x[:, t], state)
            parts.append(logits[:, None])
    assert float((torch.cat(parts, dim=1) - whole).abs().max()) <= 1e-5


DEFAULTS: list[Any] = [
    head_settings.LstmHead(),
    head_settings.GruHead(name="gru"),
    head_settings.TcnHead(name="tcn"),
    head_settings.SsmHead(name="ssm"),
    head_settings.TransSvnetHead(name="trans_svnet"),
    head_settings.AttentionHead(name="attention"),
    head_settings.KeyPoolingHead(name="key_pooling"),
]


@pytest.mark.parametrize("config", DEFAULTS, ids=[config.name for config in DEFAULTS])
def test_agreement_at_the_default_sizes(config: Any) -> None:
    torch.manual_seed(0)
    model = PhaseModel(Standardise(torch.full((256,), 2.0), torch.full((256,), 3.0)), build_head(config, 256, 7)).eval()
    x = torch.randn(1, 300, 256) * 5
    with torch.no_grad():
        whole = model(x).logits
        parts, state = [], None
        for chunk in x.split([1, 100, 7, 150, 42], dim=1):
            output = model(chunk, state)
            state = output.state
            parts.append(output.logits)
        steps, state = [], None
        for t in range(300):
            logits, state = model.step(x[:, t], state)
            steps.append(logits)
    assert float((torch.cat(parts, 1) - whole).abs().max()) <= 1e-5
    assert float((torch.stack(steps, 1) - whole).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", CAUSAL)
def test_later_frames_change_nothing(name: str) -> None:
    head, x = head_of(CAUSAL[name]), frames(1, 40)
    changed = x.clone()
    changed[:, 25:] += 10
    with torch.no_grad():
        before, after = head(x).logits, head(changed).logits
    torch.testing.assert_close(before[:, :25], after[:, :25], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "linear"])
def test_the_past_does(name: str) -> None:
    head, x = head_of(CAUSAL[name]), frames(1, 12)
    changed = x.clone()
    changed[:, 5] += 10
    with torch.no_grad():
        assert not torch.allclose(head(x).logits[:, 8], head(changed).logits[:, 8])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("lengths", [[30, 21, 4], [4, 30, 21], [30, 30, 30]])
def test_padding_never_leaks(name: str, lengths: list[int]) -> None:
    head = head_of(EVERY[name])
    x = frames(3, 30)
    real = torch.arange(30)[None, :, None] < torch.tensor(lengths)[:, None, None]
    padded = torch.where(real, x, torch.full_like(x, 1e3))
    with torch.no_grad():
        together = head(padded, None, torch.tensor(lengths))
        for i, length in enumerate(lengths):
            alone = head(x[i : i + 1, :length])
            torch.testing.assert_close(together.logits[i, :length], alone.logits[0], atol=1e-5, rtol=0)
            if name in RECURRENT:  # their state is that after the last real frame
                for one, other in zip(together.state, alone.state, strict=True):
                    torch.testing.assert_close(one[i], other[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_gets_a_finite_gradient_that_padding_does_not_change(name: str) -> None:
    head, x, lengths = head_of(EVERY[name]), frames(3, 20), torch.tensor([20, 3, 11])
    real = torch.arange(20) < lengths[:, None]
    weights = list(head.parameters())

    def gradients(padded: Tensor) -> list[Tensor]:
        stages = head(padded, None, lengths).logits_per_stage
        loss = torch.stack([F.cross_entropy(one[real], torch.arange(int(real.sum())) % C) for one in stages]).sum()
        return list(torch.autograd.grad(loss, weights))

    found = gradients(x)
    assert all(bool(torch.isfinite(one).all()) and bool(one.any()) for one in found)
    for one, other in zip(found, gradients(x.masked_fill(~real[..., None], 50.0)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_bf16_autocast_stays_close(name: str) -> None:
    head, x, lengths = head_of(EVERY[name]), frames(2, 40), torch.tensor([40, 17])
    real = torch.arange(40) < lengths[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        output = head(x, None, lengths)
        if head.causal:
            assert head.step(x[:, 0], output.state)[0].isfinite().all()
    output.logits[real].float().logsumexp(1).mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in head.parameters())
    torch.testing.assert_close(output.logits[real].float(), head(x, None, lengths).logits[real], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_heads_see_the_future_and_refuse_to_do_without(name: str) -> None:
    head, x = head_of(OFFLINE[name]), frames(1, 10)
    assert not head.causal
    changed = x.clone()
    changed[:, 9] += 10
    with torch.no_grad():
        output = head(x)
        assert not torch.allclose(output.logits[:, 0], head(changed).logits[:, 0])
    with pytest.raises(UserError, match="offline only"):
        head.step(x[:, 0], None)
    with pytest.raises(UserError, match="offline only"):
        head(x, output.state)


@pytest.mark.parametrize("name", CAUSAL)
def test_heads_start_from_zero(name: str) -> None:
    """A state of zeros is that before the first frame, for programs that hold the state themselves."""
    head, x = head_of(CAUSAL[name]), frames(2, 6)
    zero = tuple(torch.zeros_like(part) for part in head(x).state)
    torch.testing.assert_close(head(x).logits, head(x, zero).logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(head.step(x[:, 0], zero)[0], head(x).logits[:, 0], atol=1e-6, rtol=0)


def test_key_pooling_with_a_window_of_one_frame_pools_over_all() -> None:
    config = head_settings.KeyPoolingHead(name="key_pooling", width=8, heads=2, window=1, keys=3)
    head, x = head_of(config), frames(2, 6)
    with torch.no_grad():
        whole = head(x)
        state, steps = tuple(torch.zeros_like(part) for part in whole.state), []
        for t in range(6):
            logits, state = head.step(x[:, t], state)
            steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), whole.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(head(x[:, 3:], head(x[:, :3]).state).logits, whole.logits[:, 3:], atol=1e-5, rtol=0)


def test_lstm_starts_as_the_reference() -> None:
    torch.manual_seed(0)
    head = LstmHead(head_settings.LstmHead(hidden=64), 512, 7)
    for weight in (head.rnn.weight_ih_l0, head.rnn.weight_hh_l0):
        assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.05)
        assert float(weight.detach().abs().max()) > 3 * float(weight.detach().std())  # normal, not uniform
    assert float(head.fc.weight.detach().abs().max()) <= math.sqrt(6 / (64 + 7))
    assert float(head.fc.weight.detach().abs().max()) > 0.9 * math.sqrt(6 / (64 + 7))


def test_tcn_is_the_published_one_written_out() -> None:
    """Zero-padded dilated convolutions, a sum at a time, as TeCNO's causal layers define them."""
    config = head_settings.TcnHead(name="tcn", stages=2, layers=3, maps=3)
    head, x = head_of(config), frames(1, 9)
    assert isinstance(head, TcnHead)
    weights = {name: value.detach() for name, value in head.named_parameters()}

    def dense(kind: str, value: Tensor) -> Tensor:  # (T, I) -> (T, O)
        return value @ weights[f"{kind}.weight"][:, :, 0].T + weights[f"{kind}.bias"]

    y, expected = x[0], []
    for stage in range(2):
        y = dense(f"enter.{stage}", y)
        for level in range(3):
            kind, dilation = f"layers.{stage}.{level}", 2**level
            kernel, bias = weights[f"{kind}.dilated.weight"], weights[f"{kind}.dilated.bias"]
            out = torch.stack(
                [
                    bias + sum(kernel[:, :, k] @ y[t - (2 - k) * dilation] for k in range(3) if t >= (2 - k) * dilation)
                    for t in range(9)
                ]
            )
            y = y + dense(f"{kind}.mix", F.relu(out))
        y = dense(f"leave.{stage}", y)
        expected.append(y)
        y = F.softmax(y, dim=1)
    stages = head(x).logits_per_stage
    assert len(stages) == 2
    for found, wanted in zip(stages, expected, strict=True):
        torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=0)
    assert torch.equal(head(x).logits, stages[-1])


def test_standardise_scales_and_does_not_explode() -> None:
    std = torch.tensor([2.0, 1.0, 0.0, 1e-9, 4.0])
    layer = Standardise(torch.tensor([1.0, 0.0, 3.0, 3.0, 0.0]), std)
    x = torch.tensor([[3.0, 2.0, 3.0, 4.0, 8.0]]).half()
    out = layer(x)
    assert out.dtype == torch.float32
    # constant channels get a hundredth of the median standard deviation (1.0)
    assert out.tolist() == [[1.0, 2.0, 0.0, pytest.approx(100.0), 2.0]]
    assert torch.equal(x, torch.tensor([[3.0, 2.0, 3.0, 4.0, 8.0]]).half())
    alone = torch.tensor([[3.0, 2.0, 3.0, 4.0, 8.0]])
    layer(alone)
    assert torch.equal(alone, x.float())  # the input stays as it was


def test_all_constant_features_pass_through() -> None:
    layer = Standardise(torch.tensor([5.0, 5.0]), torch.zeros(2))
    assert layer(torch.tensor([[5.0, 6.0]])).tolist() == [[0.0, 1.0]]


def test_a_checkpoint_holds_constants_and_carried_state() -> None:
    head = head_of(CAUSAL["lstm"])
    model = PhaseModel(Standardise(torch.arange(5.0), torch.ones(5) * 2), head)
    model.carried = model(frames(2, 6)).state
    other = PhaseModel(Standardise.identity(D), head_of(CAUSAL["lstm"], seed=9))
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(other.carried, model.carried, strict=True))
    x = frames(1, 8)
    assert torch.equal(other(x).logits, model(x).logits)


def test_the_linear_head_leaves_padding_out() -> None:
    """Blocks of real frames, standardised one at a time: the logits and gradients of the whole table."""
    head = head_of(CAUSAL["linear"])
    assert isinstance(head, LinearHead)
    head.block_frames = 7
    model = PhaseModel(Standardise(torch.rand(D), torch.rand(D) + 0.5), head)
    x, lengths = frames(3, 20).half(), torch.tensor([20, 3, 11])
    real = torch.arange(20) < lengths[:, None]
    poisoned = x.masked_fill(~real[..., None], math.nan)
    found, expected = model(poisoned, None, lengths).logits, model(x).logits
    assert not found[~real].any()
    torch.testing.assert_close(found[real], expected[real])
    weights = list(model.parameters())
    gradients = [torch.autograd.grad(logits[real].pow(2).sum(), weights) for logits in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_head_whose_weights_exceed_the_memory_is_refused_before_they_are_filled(monkeypatch):
    monkeypatch.setattr("stage2_temporal.heads.base.available_bytes", lambda: 40_000)
    head_of(CAUSAL["gru"])
    with pytest.raises(UserError, match=r"^temporal\.head: the weights of lstm exceed .*, 1e-05 GB"):
        head_of(head_settings.LstmHead(hidden=64))
    monkeypatch.undo()
    head_of(head_settings.LstmHead(hidden=64))
