"""A private operation is used only if it gives the same as the public one, in this torch and on this CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.onednn import convolves, multiplies
from tests.onednn import broken_operations, other_operations, public_operations

BROKEN = broken_operations()
TYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_does_the_same_is_used(dtype: torch.dtype) -> None:
    with other_operations(**public_operations()):
        assert multiplies(dtype)
        assert convolves(dtype)


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("dtype", TYPES)
def test_changed_private_operations_are_not_used(case: str, dtype: torch.dtype) -> None:
    with other_operations(**BROKEN[case]):
        assert multiplies(dtype) == ("linear" not in case)
        assert convolves(dtype) == ("convolution" not in case)


def test_rounding_is_no_difference_and_other_rounding_is() -> None:
    def less(x: Tensor, weights: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        return torch.nn.functional.linear(x.bfloat16(), weights.bfloat16(), bias if bias is None else bias.bfloat16())

    with other_operations(
        **public_operations() | {"_linear_pointwise": lambda *given: less(*given).to(given[0].dtype)}
    ):
        assert multiplies(torch.bfloat16)
        assert not multiplies(torch.float32)


def test_other_types_are_left_to_the_public_operations() -> None:
    for dtype in (torch.float64, torch.float16, torch.int32):
        assert not multiplies(dtype)
        assert not convolves(dtype)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_this_torch_has_them_in_fp32() -> None:
    assert multiplies(torch.float32)
    assert convolves(torch.float32)


def test_looking_draws_no_random_numbers_and_works_under_autocast() -> None:
    before = torch.get_rng_state()
    with other_operations(**public_operations()), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert multiplies(torch.float32)
        assert convolves(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
