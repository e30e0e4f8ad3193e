"""Arrays in nested containers as tensors and back, for files that `engine.checkpoints` writes and reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_plain(value: Any) -> Any:
    """The same containers with tensors in place of arrays; NumPy's scalars become plain numbers."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value).copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: to_plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(one) for one in value]
    return value


def from_plain(value: Any) -> Any:
    """The same containers with arrays in place of tensors."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: from_plain(one) for key, one in value.items()}
    return [from_plain(one) for one in value] if isinstance(value, list) else value
