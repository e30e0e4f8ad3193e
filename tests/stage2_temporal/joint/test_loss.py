"""The multi-task loss and the correlation loss: terms, what counts, direction and detaching of the divergence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.schema import JointLossConfig
from stage1_cnn.loss import phase_loss, tool_loss
from stage2_temporal.joint.loss import JointLoss, bernoulli_kl
from stage2_temporal.joint.net import JointOutput

TOOLS, PHASES = 3, 4


def test_divergence_is_the_textbooks_and_stays_finite() -> None:
    a, b = torch.tensor([0.3, -2.0, 5.0, 0.0]), torch.tensor([1.0, -2.0, -3.0, 80.0])
    p, q = a.double().sigmoid(), b.double().sigmoid()
    book = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(bernoulli_kl(a, b)[:3].double(), book[:3], rtol=1e-4, atol=1e-6)
    assert float(bernoulli_kl(a, b)[1]) == 0
    assert bernoulli_kl(torch.tensor(200.0), torch.tensor(-200.0)) == pytest.approx(200)
    assert bernoulli_kl(a, b)[3] == pytest.approx(40 - math.log(2), rel=1e-4)


@given(a=st.floats(-60, 60), b=st.floats(-60, 60))
@settings(deadline=None)
def test_divergence_is_never_negative_and_its_gradient_pulls_together(a: float, b: float) -> None:
    q = torch.tensor(b, requires_grad=True)
    value = bernoulli_kl(torch.tensor(a), q)
    assert float(value.detach()) >= 0
    assert math.isfinite(float(value.detach()))
    value.backward()
    expected = torch.sigmoid(torch.tensor(b)) - torch.sigmoid(torch.tensor(a))
    assert q.grad is not None
    assert float(q.grad) == pytest.approx(float(expected), abs=1e-4) or float(value.detach()) == 0


def output_of(seed: int = 0) -> tuple[JointOutput, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tools, mapped = (torch.randn(2, 3, TOOLS, generator=generator).requires_grad_() for _ in range(2))
    phases = torch.randn(2, 3, PHASES, generator=generator).requires_grad_()
    phase = torch.tensor([[0, 1, -1], [2, 3, -1]])
    labels = torch.tensor([[[1, 0, 1], [-1, -1, -1], [0, 0, 0]], [[1, 1, 1], [0, 0, 1], [-1, -1, -1]]]).float()
    return JointOutput(tools, [phases], mapped, ()), phase, labels, torch.tensor([3, 2])


def test_loss_is_the_sum_of_its_terms_over_labelled_entries() -> None:
    output, phase, tools, lengths = output_of()
    config = JointLossConfig(tool_weight=0.5, alpha=2.0, detach="none")
    assert output.phase_stages is not None
    ce = F.cross_entropy(output.phase_stages[0][phase >= 0], phase[phase >= 0])
    bce = F.binary_cross_entropy_with_logits(output.tool_logits[tools >= 0], tools[tools >= 0])  # type: ignore[index]
    inside = torch.tensor([[True, True, True], [True, True, False]])
    kl = bernoulli_kl(output.mapped_logits, output.tool_logits)[inside].mean()  # type: ignore[arg-type]
    found = {step: JointLoss(config, step)(output, phase, tools, lengths) for step in ("multitask", "correlation")}
    torch.testing.assert_close(found["multitask"], ce + 0.5 * bce)
    torch.testing.assert_close(found["correlation"], ce + 0.5 * bce + 2 * kl)
    mapping = JointLoss(config, "mapping")(output, phase, tools, lengths)
    torch.testing.assert_close(
        mapping,
        F.binary_cross_entropy_with_logits(output.mapped_logits[tools >= 0], tools[tools >= 0]),  # type: ignore[index]
    )


def test_loss_on_the_last_frame_of_each_clip() -> None:
    output, phase, tools, lengths = output_of()
    phase = torch.tensor([[0, 1, 2], [2, 3, -1]])
    found = JointLoss(JointLossConfig(phase_frames="last", tool_weight=0), "multitask")(output, phase, tools, lengths)
    assert output.phase_stages is not None
    last = torch.stack([output.phase_stages[0][0, 2], output.phase_stages[0][1, 1]])
    torch.testing.assert_close(found, F.cross_entropy(last, torch.tensor([2, 3])))


@pytest.mark.parametrize(
    ("detach", "gets"), [("none", (True, True)), ("mapped", (True, False)), ("branch", (False, True))]
)
@pytest.mark.parametrize("direction", ["mapped_branch", "branch_mapped"])
def test_correlation_direction_and_detaching(detach: Any, gets: tuple[bool, bool], direction: Any) -> None:
    output, *_ = output_of()
    assert output.tool_logits is not None
    assert output.mapped_logits is not None
    loss = JointLoss(JointLossConfig(detach=detach, direction=direction), "correlation")
    value = loss.correlation(output.tool_logits, output.mapped_logits)
    value.sum().backward()
    assert (output.tool_logits.grad is not None, output.mapped_logits.grad is not None) == gets
    pair = (output.mapped_logits, output.tool_logits)
    expected = bernoulli_kl(*(pair if direction == "mapped_branch" else pair[::-1])).mean(dim=-1)
    torch.testing.assert_close(value, expected)


def test_no_labels_give_a_loss_of_zero() -> None:
    nothing = torch.full((1, 2), -1)
    assert float(phase_loss(torch.randn(1, 2, PHASES), nothing)) == 0
    assert float(tool_loss(torch.randn(1, 2, TOOLS), torch.full((1, 2, TOOLS), -1.0))) == 0
