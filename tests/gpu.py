"""A simulated GPU: torch's answers about it. Nothing can be computed on it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch


class Gpu:
    """A GPU of this compute capability, as torch answers for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str = "a GPU") -> None:
        major, minor = capability
        answers = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: name,
            "device": lambda device: nullcontext(),
            "get_device_capability": lambda device=None: capability,
            "get_device_properties": lambda device=None: SimpleNamespace(major=major, minor=minor, name=name),
            "mem_get_info": lambda device=None: (15 << 30, 16 << 30),
            # torch asks a GPU before Ampere whether it can hold a bf16 tensor; all can
            "_check_bf16_tensor_supported": lambda device: True,
        }
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, answer)
