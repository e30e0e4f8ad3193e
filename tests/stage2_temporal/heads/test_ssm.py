"""The state-space head against its equations written out, frame after frame in float64, and at extreme decays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from configs.head_settings import SsmHead as Settings
from configs.schema import OptimConfig
from engine.optim import build_optimizer
from stage2_temporal.heads.base import Head, build_head
from stage2_temporal.heads.ssm import SsmHead, scan

D, C = 5, 4
TINY: dict[str, Any] = {"name": "ssm", "width": 6, "layers": 2, "head_width": 4, "state": 3, "dropout": 0.0}


def head_of(**changes: Any) -> Head:
    torch.manual_seed(0)
    return build_head(Settings(**TINY | changes), D, C).eval()


def recurrence(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """What `scan` computes, frame after frame."""
    outputs = []
    for t in range(x.shape[1]):
        memory = torch.exp(decay[:, t, :, None, None]) * memory + x[:, t, :, :, None] * b[:, t, None, None, :]
        outputs.append((memory * c[:, t, None, None, :]).sum(-1))  # (B, H, P)
    return torch.stack(outputs, 1), memory


def scan_inputs(frames: int, rate: float, seed: int = 0, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, b, c = normal(batch, frames, 2, 2), normal(batch, frames, 3), normal(batch, frames, 3)
    return x, -rate * normal(batch, frames, 2).abs(), b, c, normal(batch, 2, 2, 3)


@given(frames=st.sampled_from([1, 2, 63, 64, 65, 130]), rate=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]))
@settings(max_examples=8, deadline=None)
def test_the_scan_is_the_recurrence(frames: int, rate: float) -> None:
    given_ = scan_inputs(frames, rate, batch=1)
    for found, expected in zip(scan(*given_), recurrence(*given_), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    for found, expected in zip(scan(*(one.float() for one in given_)), recurrence(*given_), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


def test_a_frame_that_forgets_everything_costs_no_precision() -> None:
    """A sum of decays near -1e6 within a block, where a difference of two such sums would be wrong by percents."""
    x, decay, b, c, memory = scan_inputs(20, 0.01)
    decay[:, 4] = -1e6
    expected, _ = scan(x, decay, b, c, memory)
    found, _ = scan(*(one.float() for one in (x, decay, b, c, memory)))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_the_scan() -> None:
    given_ = tuple(one.requires_grad_() for one in scan_inputs(5, 0.5, batch=1))
    assert torch.autograd.gradcheck(scan, given_)


def test_gradients_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage2_temporal.heads.ssm.BLOCK_FRAMES", 3)
    given_ = tuple(one.requires_grad_() for one in scan_inputs(8, 0.5, batch=1))
    assert torch.autograd.gradcheck(scan, given_)
    for found, expected in zip(scan(*given_), recurrence(*(one.detach() for one in given_)), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_of_the_head() -> None:
    head = head_of().double()
    x = torch.randn(1, 5, D, dtype=torch.float64, requires_grad=True)
    weights = [parameter for parameter in head.parameters() if parameter.numel() < 6]
    assert torch.autograd.gradcheck(lambda x, *_: head(x).logits, (x, *weights))


def test_the_head_is_the_published_block_written_out() -> None:
    """Every line of docs/heads.md, frame after frame, in float64."""
    head = head_of().double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    weights = {name: value.detach() for name, value in head.named_parameters()}
    x = torch.randn(1, 9, D, dtype=torch.float64)

    def norm(y: Tensor, kind: str, of: dict[str, Tensor]) -> Tensor:
        y = y - y.mean(-1, keepdim=True)
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * of[f"{kind}.weight"] + of[f"{kind}.bias"]

    y = x[0] @ weights["enter.weight"].T + weights["enter.bias"]  # (T, 6)
    for layer in range(2):
        own = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"blocks.{layer}.")}
        entered = norm(y, "norm", own) @ own["enter.weight"].T
        gate, mixed, step = entered[:, :12], entered[:, 12:30], entered[:, 30:]
        kernel = own["conv.weight"][:, 0]  # (18, 4)
        past = [sum(kernel[:, k] * mixed[t - 3 + k] for k in range(4) if t - 3 + k >= 0) for t in range(9)]
        mixed = F.silu(torch.stack(past) + own["conv.bias"])
        step = torch.log1p(torch.exp(step + own["step_bias"]))  # (T, 3)
        values, b, c = mixed[:, :12].view(9, 3, 4), mixed[:, 12:15], mixed[:, 15:]
        decay = -step * torch.exp(own["log_rate"])
        zero = torch.zeros(1, 3, 4, 3, dtype=torch.float64)
        out, _ = recurrence((step[..., None] * values)[None], decay[None], b[None], c[None], zero)
        out = (out[0] + own["skip"][:, None] * values).reshape(9, 12)
        y = y + norm(out * F.silu(gate), "out_norm", own) @ own["leave.weight"].T
    expected = norm(y, "norm", weights) @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(head(x).logits[0], expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks_shorter_than_the_convolution(size: int) -> None:
    head, x = head_of(), torch.randn(2, 13, D)
    with torch.no_grad():
        whole, parts, state = head(x), [], None
        for chunk in x.split(size, dim=1):
            output = head(chunk, state)
            parts.append(output.logits)
            state = output.state
    assert state is not None
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, atol=1e-6, rtol=0)
    assert [tuple(part.shape) for part in state] == [(2, 3, 18), (2, 3, 4, 3)] * 2
    for one, other in zip(state, whole.state, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_twenty_thousand_frames_at_once_and_in_chunks() -> None:
    head, x = head_of(step_min=1e-4), torch.randn(1, 20_000, D)
    with torch.no_grad():
        whole, parts, state = head(x), [], None
        for chunk in x.split([1, 2, 61, 1_000, 7_003, 11_933], dim=1):
            output = head(chunk, state)
            parts.append(output.logits)
            state = output.state
    assert state is not None
    difference = (torch.cat(parts, 1) - whole.logits).abs().max()
    assert float(difference) <= 1e-5 * float(whole.logits.abs().max())
    for one, other in zip(state, whole.state, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("rate", [-20.0, 0.0, 8.0, 30.0])
@pytest.mark.parametrize("bias", [-30.0, 0.0, 60.0])
def test_extreme_decays_give_finite_gradients(rate: float, bias: float) -> None:
    """From a memory that never forgets to one that forgets at once, with padding of large values in the batch."""
    head = head_of()
    assert isinstance(head, SsmHead)
    with torch.no_grad():
        for block in head.blocks:
            block.log_rate.fill_(rate)  # type: ignore[operator, union-attr]
            block.step_bias.fill_(bias)  # type: ignore[operator, union-attr]
    x = torch.randn(2, 70, D)
    x[1, 30:] = 1e3
    logits = head(x, None, torch.tensor([70, 30])).logits
    assert bool(logits.isfinite().all())
    (logits[0].sum() + logits[1, :30].sum()).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in head.parameters() if parameter.grad is not None)


def test_it_learns_to_remember_the_last_cue() -> None:
    """Noise with a cue of three kinds now and then; the class is the kind of the last cue. New data in each step."""
    head = head_of(width=16, layers=1, step_max=1.0).train()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(100):
        x, kinds = 0.3 * torch.randn(8, 30, D), torch.randint(3, (8, 30))
        cue = torch.rand(8, 30) < 0.1
        cue[:, 0] = True
        x += 4 * F.one_hot(kinds, D) * cue[..., None]
        last = torch.where(cue, torch.arange(30), 0).cummax(1).values
        target = kinds.gather(1, last)
        logits = head(x).logits
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
    assert float((logits.argmax(-1) == target).float().mean()) > 0.8  # a frame alone: about 0.4


def test_every_parameter_gets_a_gradient() -> None:
    head = head_of()
    head(torch.randn(2, 70, D)).logits.pow(2).sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in head.parameters())  # type: ignore[union-attr]


def test_the_recurrence_is_fp32_under_autocast() -> None:
    head, x = head_of().train(), torch.randn(1, 70, D)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(x)
        output.logits.float().sum().backward()
    assert output.state[1].dtype == torch.float32
    torch.testing.assert_close(output.logits.float(), head(x).logits, atol=0.1, rtol=0.1)


def test_time_constants_at_the_start_of_a_training() -> None:
    """Steps between `step_min` and `step_max`, and decay rates between 1 and 16."""
    head = head_of(width=256, head_width=2, step_min=0.002, step_max=0.05)
    assert isinstance(head, SsmHead)
    for block in head.blocks:
        assert isinstance(block.step_bias, nn.Parameter)
        assert isinstance(block.log_rate, nn.Parameter)
        step, rate = F.softplus(block.step_bias.detach()), block.log_rate.detach().exp()
        assert 0.0019 < float(step.min()) < 0.003
        assert 0.04 < float(step.max()) < 0.051
        assert 1.0 <= float(rate.min()) < 2.0
        assert 15.0 < float(rate.max()) <= 16.0


def test_weight_decay_spares_decay_rates_steps_and_skips() -> None:
    head = head_of()
    optimizer = build_optimizer(
        [{"params": head.parameters(), "name": "head"}], OptimConfig(name="adamw", lr=0.1, weight_decay=0.5)
    )
    for parameter in head.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    optimizer.step()
    spared = {name for name, parameter in head.named_parameters() if torch.equal(parameter, before[name])}
    kinds = ("log_rate", "step_bias", "skip")
    assert spared == {f"blocks.{layer}.{kind}" for layer in range(2) for kind in kinds}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"head_width": 5}, "must be a multiple of head_width=5"), ({"step_min": 0.5}, "must not exceed step_max")],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings(**TINY | changes)
