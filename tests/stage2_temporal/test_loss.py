"""The loss of stage two against formulas written out, with masks, several processes and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from configs.schema import TemporalConfig
from stage2_temporal.data import FeatureBank, Span
from stage2_temporal.loss import PhaseLoss
from stage2_temporal.train import count_labels


def test_loss_is_the_mean_over_labelled_frames() -> None:
    loss = PhaseLoss(TemporalConfig(), torch.tensor([3, 1, 0]))
    logits, phase = torch.randn(2, 4, 3), torch.tensor([[0, 1, -1, -1], [2, -1, 1, 0]])
    chosen = [F.cross_entropy(logits[i, t], phase[i, t]) for i in range(2) for t in range(4) if phase[i, t] >= 0]
    torch.testing.assert_close(loss([logits], phase), torch.stack(chosen).mean())
    other = torch.randn(2, 4, 3)
    torch.testing.assert_close(loss([logits, other], phase), loss([logits], phase) + loss([other], phase))


def test_no_label_no_loss_and_no_nan() -> None:
    logits = torch.randn(1, 2, 3, requires_grad=True)
    value = PhaseLoss(TemporalConfig(), torch.ones(3))([logits], torch.full((1, 2), -1))
    value.backward()
    assert float(value.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_inverse_frequency(smoothing: float) -> None:
    phases = torch.tensor([0, 0, 0, 2, -1, 0])
    bank = FeatureBank(torch.zeros(6, 2), phases[None], (Span(0, 6),), ("v",))
    counts = count_labels(bank, bank.spans, 0, 4)
    assert counts.tolist() == [4, 0, 1, 0]
    settings = TemporalConfig(class_weighting="inverse_frequency", label_smoothing=smoothing)
    loss = PhaseLoss(settings, counts)
    assert loss.weight.tolist() == pytest.approx([5 / (2 * 4), 0, 5 / (2 * 1), 0])
    logits, phase = torch.randn(1, 3, 4), torch.tensor([[0, 2, -1]])
    reference = torch.nn.CrossEntropyLoss(weight=loss.weight, ignore_index=-1, label_smoothing=smoothing)
    torch.testing.assert_close(loss([logits], phase), reference(logits[0], phase[0]))


LABELS = torch.tensor([[0, 1, 1, -1, 2, 2], [2, 0, 0, -1, -1, -1]])  # a gap in the first, padding in the second
PAIRS = [(0, 1), (0, 2), (0, 5), (1, 1), (1, 2)]  # sequence and later frame of each labelled pair


def stages_of(seed: int = 0) -> list[torch.Tensor]:
    """Logits of two stages, some of which jump by more than tau."""
    generator = torch.Generator().manual_seed(seed)
    return [(5 * torch.randn(2, 6, 3, generator=generator)).requires_grad_() for _ in range(2)]


def smoothing_of(logits: torch.Tensor) -> float:
    """T-MSE as in the paper, entry by entry."""
    log_p = [[[float(v) for v in frame.log_softmax(0)] for frame in one] for one in logits.detach().double()]
    steps = [abs(log_p[b][t][c] - log_p[b][t - 1][c]) for b, t in PAIRS for c in range(3)]
    assert min(steps) < 4 < max(steps)
    return sum(min(4.0, step) ** 2 for step in steps) / len(steps)


def test_smoothing_is_the_truncated_mean_squared_step_of_labelled_pairs() -> None:
    stages, counts = stages_of(), torch.ones(3)
    plain = PhaseLoss(TemporalConfig(), counts)(stages, LABELS)
    smooth = PhaseLoss(TemporalConfig(smoothing_weight=0.15), counts)(stages, LABELS)
    expected = 0.15 * sum(smoothing_of(logits) for logits in stages)
    assert float((smooth - plain).detach()) == pytest.approx(expected, rel=1e-5)


def test_smoothing_pulls_the_later_frame_only_and_leaves_large_jumps_alone() -> None:
    logits = torch.zeros(1, 5, 2)
    logits[0, 1, 0], logits[0, 2, 0], logits[0, 3, 0] = 1.0, 1.5, 30.0  # padding last
    logits.requires_grad_()
    labels = torch.tensor([[0, 0, 0, 1, -1]])
    smooth, plain = (
        PhaseLoss(TemporalConfig(smoothing_weight=weight), torch.ones(2))([logits], labels) for weight in (1.0, 0.0)
    )
    (gradient,) = torch.autograd.grad(smooth - plain, logits)
    assert not gradient[0, 0].any()
    assert gradient[0, 1].all()
    assert gradient[0, 2].all()
    assert not gradient[0, 3:].any()


def test_processes_add_up_to_one_loss_and_one_without_pairs_adds_nothing() -> None:
    """Also a process whose sequence does not count, and a batch of single frames."""
    (logits, _), counts, settings = stages_of(), torch.ones(3), TemporalConfig(smoothing_weight=0.5)
    whole = PhaseLoss(settings, counts)([logits], LABELS)
    parts = [(logits[:1], LABELS[:1]), (logits[1:], LABELS[1:]), (logits[:1], torch.full((1, 6), -1))]
    seen: list[list[torch.Tensor]] = []
    for x, labels in parts:
        seen.append([])
        PhaseLoss(settings, counts, lambda value: seen[-1].append(value) or value)([x], labels)  # type: ignore[func-returns-value]
    totals = [sum(values) for values in zip(*seen, strict=True)]
    shares = []
    for x, labels in parts:
        left = iter(totals)
        shares.append(PhaseLoss(settings, counts, lambda _, left=left: next(left))([x], labels))  # type: ignore[misc]
    torch.testing.assert_close(sum(shares), whole)
    assert float(shares[2].detach()) == 0.0
    single = PhaseLoss(settings, counts)([logits[:, :1]], LABELS[:, :1])
    assert math.isfinite(float(single.detach()))
