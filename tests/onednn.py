"""A torch whose oneDNN has other private operations than this one's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from engine.device import onednn_has

OPERATIONS = (
    "_reorder_linear_weight",
    "_linear_pointwise",
    "_reorder_convolution_weight",
    "_convolution_pointwise",
)


@contextmanager
def without_operation(name: str) -> Iterator[None]:
    """As if `torch.ops.mkldnn` had no operation of this name."""
    there = {other: getattr(torch.ops.mkldnn, other) for other in OPERATIONS if other != name}
    onednn_has.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops, "mkldnn", SimpleNamespace(**there))
            yield
    finally:
        onednn_has.cache_clear()
