"""MS-TCN++ against its equations written out, a frame and a tap of each kernel at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs.head_settings import MstcnPlusPlusHead as Settings
from stage2_temporal.heads.base import Head, build_head

SETTINGS = Settings(name="mstcn++", layers=3, refinements=2, refinement_layers=2, maps=3, dropout=0.0)


def head_of(*classes: int) -> Head:
    torch.manual_seed(0)
    return build_head(SETTINGS, 5, *classes).double()


def convolved(y: Tensor, weights: dict[str, Tensor], name: str, dilation: int) -> Tensor:
    """y (T, I) -> (T, O) with frames beyond both ends as zero."""
    kernel, out = weights[f"{name}.weight"], []
    for t in range(len(y)):
        total = weights[f"{name}.bias"].clone()
        for tap, at in enumerate((t - dilation, t, t + dilation)):
            if 0 <= at < len(y):
                total += kernel[:, :, tap] @ y[at]
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("classes", [(4,), (2, 3)])
def test_it_is_the_published_one_written_out(classes: tuple[int, ...]) -> None:
    head = head_of(*classes)
    x = torch.randn(1, 9, 5, dtype=torch.float64)
    weights = {name: value.detach() for name, value in head.named_parameters()}

    def dense(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"][:, :, 0].T + weights[f"{name}.bias"]

    y, expected = dense("enter.0", x[0]), []
    for level, (falling, rising) in enumerate(((4, 1), (2, 2), (1, 4))):
        both = [convolved(y, weights, f"layers.0.{level}.dilated.{i}", d) for i, d in enumerate((falling, rising))]
        y = y + dense(f"layers.0.{level}.mix", torch.cat(both, dim=1)).clamp(min=0)
    expected.append(dense("leave.0", y))
    for stage in (1, 2):
        tracks = [part.exp() / part.exp().sum(1, keepdim=True) for part in expected[-1].split(classes, dim=1)]
        y = dense(f"enter.{stage}", torch.cat(tracks, dim=1))
        for level, dilation in enumerate((1, 2)):
            kind = f"layers.{stage}.{level}"
            y = y + dense(f"{kind}.mix", convolved(y, weights, f"{kind}.dilated.0", dilation).clamp(min=0))
        expected.append(dense(f"leave.{stage}", y))
    output = head(x)
    assert len(output.logits_per_stage) == 3
    for found, wanted in zip(output.logits_per_stage, expected, strict=True):
        torch.testing.assert_close(found[0], wanted)
    torch.testing.assert_close(output.hidden[0], y)
    assert output.state == ()


def test_gradients_are_those_of_finite_differences() -> None:
    head = head_of(2)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 2])
    real = torch.arange(4) < lengths[:, None]
    assert torch.autograd.gradcheck(lambda x: head(x, None, lengths).logits[real], (x,))


def test_padding_may_hold_anything() -> None:
    """Stages of a padded batch are those of each video alone, and no gradient is NaN, even if padding is."""
    head, lengths = head_of(4), torch.tensor([12, 5, 1])
    x = torch.randn(3, 12, 5, dtype=torch.float64)
    real = torch.arange(12) < lengths[:, None]
    stages = head(x.masked_fill(~real[..., None], float("nan")), None, lengths).logits_per_stage
    for row, length in enumerate(lengths.tolist()):
        alone = head(x[row : row + 1, :length]).logits_per_stage
        for found, wanted in zip(stages, alone, strict=True):
            torch.testing.assert_close(found[row, :length], wanted[0])
    gradients = torch.autograd.grad(stages[-1][real].pow(2).sum(), list(head.parameters()))
    assert all(bool(torch.isfinite(one).all()) for one in gradients)


def test_the_receptive_field_is_that_of_the_documentation() -> None:
    """docs/heads.md: each dual dilated layer reaches as far as the larger of its dilations, on both sides."""
    torch.manual_seed(0)
    head = build_head(SETTINGS.model_copy(update={"maps": 16}), 5, 4).double()
    reach = (4 + 2 + 4) + 2 * (1 + 2)
    x = torch.randn(1, 2 * reach + 3, 5, dtype=torch.float64)
    for offset, changes in ((reach, True), (reach + 1, False)):
        for at in (reach + 1 - offset, reach + 1 + offset):
            changed = x.clone()
            changed[:, at] += 10
            assert torch.equal(head(x).logits[:, reach + 1], head(changed).logits[:, reach + 1]) != changes
