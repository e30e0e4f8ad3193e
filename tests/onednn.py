"""Simulated machines: a CPU with or without bf16, a torch whose oneDNN has other private operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import device

OPERATIONS = (
    "_reorder_linear_weight",
    "_linear_pointwise",
    "_reorder_convolution_weight",
    "_convolution_pointwise",
)


@contextmanager
def other_operations(**changed: Any) -> Iterator[None]:
    """Replace operations of `torch.ops.mkldnn`; None: no operation of this name."""
    there = {name: changed.get(name, getattr(torch.ops.mkldnn, name, None)) for name in OPERATIONS} | changed
    with pytest.MonkeyPatch.context() as patch:
        ops = SimpleNamespace(**{name: found for name, found in there.items() if found is not None})
        patch.setattr(torch.ops, "mkldnn", ops)
        yield


def public_operations() -> dict[str, Any]:
    """The private operations computed by public ones, which work on any CPU in every type."""

    def convolution(x: Tensor, weights: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        padding, stride, dilation, groups = rest[:4]
        assert rest[4:] == ("relu", [], "")
        return F.relu(F.conv2d(x, weights, bias, stride, padding, dilation, groups))

    def binary(x: Tensor, other: Tensor, weights: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        padding, stride, dilation, groups = rest[:4]
        assert rest[4:] == ("add", 1.0, "relu", [], "")
        return F.relu(F.conv2d(x, weights, bias, stride, padding, dilation, groups) + other)

    convolution.binary = binary  # type: ignore[attr-defined]
    return {
        "_reorder_linear_weight": lambda weights, rows: weights,
        "_linear_pointwise": lambda x, weights, bias, *rest: F.linear(x, weights, bias),
        "_reorder_convolution_weight": lambda weights, *rest: weights,
        "_convolution_pointwise": convolution,
    }


def broken_operations() -> dict[str, dict[str, Any]]:
    """By name, possible changes of them in another torch."""

    def raises(*rest: Any) -> Tensor:
        raise RuntimeError("unknown function")

    def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        mine = public_operations()
        before = mine[name]

        def other(*arguments: Any) -> Tensor:
            return change(before(*arguments))

        other.binary = lambda *arguments: change(before.binary(*arguments))  # type: ignore[attr-defined]
        return mine | {name: other}

    found: dict[str, dict[str, Any]] = {}
    for name in OPERATIONS:
        found |= {
            f"no {name}": public_operations() | {name: None},
            f"{name} takes other arguments": public_operations() | {name: lambda: None},
            f"{name} raises": public_operations() | {name: raises},
            f"{name} gives something else": changed(name, lambda table: table + 1),
            f"{name} gives nothing": changed(name, lambda table: torch.full_like(table, torch.nan)),
        }
    return found


@contextmanager
def cpu_with_bf16(there: bool) -> Iterator[None]:
    """Simulate a CPU that multiplies bf16, or one that does not, on any CPU."""
    able = device.cpu_has_bf16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "cpu_has_bf16", lambda: there)
        if there and not able:  # torch's own kernels compute bf16 everywhere, oneDNN's LSTM does not
            patch.setattr(torch.backends.mkldnn, "enabled", False)
        yield
