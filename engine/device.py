"""Device, precision and seeds, chosen once for every training loop and for extraction."""

from __future__ import annotations

import functools
import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from configs.errors import UserError
from engine.memory import keep_freed_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache
def onednn_has(*operations: str) -> bool:
    """Whether this torch has oneDNN and these private operations of it, which another release may call otherwise."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operations)


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises UserError for a device that is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if name not in available:
        raise UserError(f"device={name}: choose auto, cpu, cuda or mps")
    if not available[name]:
        present = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device={name}: this machine (or this torch build) has none; present: {present}")
    return torch.device(name)


def choose_precision(name: str, device: torch.device, training: bool) -> str:
    """`auto`: bf16 on GPUs that compute it, and for inference on CPUs that do so natively; otherwise fp32.

    `native`: bf16 wherever the hardware computes it, in training on a CPU too, otherwise fp32. fp16 needs CUDA. Raises
    UserError for a combination that does not work.
    """
    if name == "native":
        fits = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and cpu_has_bf16()
        return "bf16" if fits else "fp32"
    if name == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        return "bf16" if device.type == "cpu" and not training and cpu_has_bf16() else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"precision=fp16 works on CUDA devices only, not on {device.type}; use bf16 or fp32")
    return name


def lower_precision(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast to `precision` (fp32, bf16 or fp16) for inference on `device`; nothing for fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX512-BF16 or AMX); emulated, it is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, and ask torch for deterministic kernels where it has them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def make_accelerator(device: str, precision: str, unused_parameters: bool = False) -> tuple[Accelerator, str]:
    """The one object that knows processes, device and autocast; also returns the precision that `auto` came to.

    `unused_parameters`: some get no gradient in a step, which several processes must expect.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    keep_freed_memory()  # what trains makes the same large tensors step after step
    chosen = choose_device(device)
    resolved = choose_precision(precision, chosen, training=True)
    mixed = {"fp32": "no"}.get(resolved, resolved)
    _forget_other_settings(mixed, chosen)
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if unused_parameters else None
    return Accelerator(cpu=chosen.type == "cpu", mixed_precision=mixed, kwargs_handlers=handlers), resolved


def _forget_other_settings(mixed: str, device: torch.device) -> None:
    """Accelerate keeps its first settings for the whole process; a `run` trains twice, perhaps differently."""
    from accelerate.state import AcceleratorState, PartialState

    state = AcceleratorState._shared_state
    if state and (state.get("_mixed_precision") != mixed or PartialState().device.type != device.type):
        AcceleratorState._reset_state(reset_partial_state=PartialState().device.type != device.type)
