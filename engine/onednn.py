"""Wrap private oneDNN operations of torch, which are faster than the public ones. Only this file calls them.

A torch release may change them without notice, and not every CPU supports them in bf16. `multiplies` and `convolves`
therefore test, once per process and data type, whether a tiny computation gives the same result as with the public
operations. If not, callers use the public operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# padding, stride, dilation, groups of a convolution
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def pack_linear(weights: Tensor, rows: int) -> Tensor:
    """Convert weights (O, I) to oneDNN's own memory layout, for products with matrices of about `rows` rows."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weights, rows)
    return found


def linear(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear with packed or plain weights."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weights, bias, "none", [], "")
    return found


def pack_convolution(weights: Tensor, geometry: Geometry, shape: list[int]) -> Tensor:
    """Convert weights (O, C, kh, kw) to oneDNN's own memory layout, for `convolution_relu`.

    `shape` (N, C, H, W) is the approximate shape of the batches.
    """
    found: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weights, *geometry, shape)
    return found


def convolution_relu(
    x: Tensor, other: Tensor | None, packed: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Compute ReLU(convolution of x (N, C, H, W) + `other`) in one operation; without the addition if it is None."""
    operation: Any = torch.ops.mkldnn._convolution_pointwise
    if other is None:
        found: Tensor = operation(x, packed, bias, *geometry, "relu", [], "")
    else:
        found = operation.binary(x, other, packed, bias, *geometry, "add", 1.0, "relu", [], "")
    return found


def multiplies(dtype: torch.dtype) -> bool:
    """Whether `pack_linear` and `linear` work with this torch, CPU and data type.

    They never do while torch records a net for export, since no other program has them.
    """
    if torch.compiler.is_compiling():
        return False
    return dtype in _TOLERANCE and _multiply(dtype, *_operations("_reorder_linear_weight", "_linear_pointwise"))


def convolves(dtype: torch.dtype) -> bool:
    """Whether `pack_convolution` and `convolution_relu` work with this torch, CPU and data type."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    return dtype in _TOLERANCE and _convolve(dtype, *_operations(*names))


def _operations(*names: str) -> list[Any]:
    """Return torch's oneDNN operations of these names, or None for a name that this torch does not have.

    They are arguments of the cached tests below, so that a test is repeated if an operation changes.
    """
    return [getattr(torch.ops.mkldnn, name, None) for name in names]


@functools.cache
def _multiply(dtype: torch.dtype, *operations: Any) -> bool:
    x, weights, bias = _table(dtype, 4, 8), _table(dtype, 6, 8), _table(dtype, 6)
    return (
        _equal_to_rounding(lambda: linear(x, pack_linear(weights, len(x)), bias), lambda: F.linear(x, weights, bias))
        and _equal_to_rounding(lambda: linear(x, weights), lambda: F.linear(x, weights))
        and _equal_to_rounding(lambda: linear(x.t(), _table(dtype, 4, 6).t()), lambda: x.t() @ _table(dtype, 4, 6))
    )


@functools.cache
def _convolve(dtype: torch.dtype, *operations: Any) -> bool:
    x, weights, bias, other = (_table(dtype, *shape) for shape in ((2, 3, 5, 5), (4, 3, 3, 3), (4,), (2, 4, 5, 5)))
    geometry: Geometry = ((1, 1), (1, 1), (1, 1), 1)

    def fused(added: Tensor | None) -> Tensor:
        return convolution_relu(x, added, pack_convolution(weights, geometry, list(x.shape)), bias, geometry)

    plain = functools.partial(F.conv2d, x, weights, bias, padding=1)
    return _equal_to_rounding(lambda: fused(None), lambda: F.relu(plain())) and _equal_to_rounding(
        lambda: fused(other), lambda: F.relu(plain() + other)
    )


def _table(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a tensor with numbers of both signs in which no two rows or columns are equal."""
    count = torch.Size(shape).numel()
    return torch.arange(count).mul(0.7).sin().view(shape).to(dtype)


def _equal_to_rounding(private: Callable[[], Tensor], public: Callable[[], Tensor]) -> bool:
    """Whether both functions return the same tensor up to rounding; False if the private one fails."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found, expected = private(), public()
            close = torch.allclose(found, expected, rtol=0, atol=_TOLERANCE[expected.dtype])
        return found.dtype == expected.dtype and found.shape == expected.shape and close
    except Exception:  # the operation is missing, takes other arguments, or this CPU does not support the type
        return False
