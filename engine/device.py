"""Device, precision and seeds, chosen once for every training loop and for extraction."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from configs.errors import UserError
from engine.launch import available_cores
from engine.memory import keep_freed_memory
from engine.progress import say

if TYPE_CHECKING:
    from accelerate import Accelerator

# Cores per process on a GPU below which frames are known to come too slowly: one core decodes some 60 frames/s.
ENOUGH_CORES = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises UserError for a device that is not available.

    On CUDA, deterministic kernels are selected for the whole process, whichever command uses the device first.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if name not in available:
        raise UserError(f"device={name}: choose auto, cpu, cuda or mps")
    if not available[name]:
        present = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device={name}: this machine (or this torch build) has none; present: {present}")
    if name == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return torch.device(name)


def choose_precision(setting: str, name: str, device: torch.device, training: bool) -> str:
    """The arithmetic (fp32, bf16 or fp16) that `name`, the value of `setting`, resolves to on `device`.

    `auto`: bf16 on GPUs that support it (fp16 on others), and for inference on CPUs with native bf16; otherwise fp32.
    `native`: bf16 wherever the hardware supports it, also for training on a CPU; otherwise fp32. Raises UserError,
    naming `setting`, for a precision that this device does not support.
    """
    if name in ("native", "auto"):
        cpu, cuda = device.type == "cpu", device.type == "cuda"
        if cuda and torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        if cuda and name == "auto":
            return "fp16"
        return "bf16" if cpu and (name == "native" or not training) and cpu_has_bf16() else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"{setting}=fp16 works on CUDA devices only, not on {device.type}; set {setting}=auto or fp32")
    if name == "bf16":
        require_bf16(setting, device)
    return name


def require_bf16(setting: str, device: torch.device) -> None:
    """Raise UserError if `setting` asks for bf16 on a CPU without native bf16."""
    if device.type == "cpu" and not cpu_has_bf16():
        raise UserError(
            f"{setting}=bf16: this CPU does not multiply bf16 (no AVX512-BF16 or AMX); set {setting}=fp32 or auto"
        )


def say_few_cores(device: torch.device) -> None:
    """A line for the user if a GPU's process has too few cores to decode or load its frames in time."""
    cores = available_cores()
    if device.type == "cuda" and cores < ENOUGH_CORES:
        say(
            f"note: {cores} core{'s' if cores > 1 else ''} for this GPU's process, which will wait for frames: 8 or "
            "more are usual; in a Slurm job ask for them with --cpus-per-task 8"
        )


@contextmanager
def lower_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Inference in `precision` (fp32, bf16 or fp16) on `device`: autocast, or true fp32.

    On CUDA, cuDNN would otherwise use TF32, which keeps 10 of 23 bits. The switch is global and is restored afterwards.
    """
    if precision != "fp32":
        with torch.autocast(device.type, DTYPES[precision]):
            yield
    elif device.type == "cuda":
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before
    else:
        yield


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads on the CPU; the previous number is restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX512-BF16 or AMX; BF16 on ARM).

    Emulated bf16 is slower than fp32, and oneDNN has no LSTM for it. A CPU on which oneDNN is limited by
    `ONEDNN_MAX_CPU_ISA=AVX2` counts as one without.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    found = re.search(r"^(?:flags|Features)\s*:(.*)", text, re.MULTILINE)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(found[1].split() if found else ())) and _runs_lstm_in_bf16()


def _runs_lstm_in_bf16() -> bool:
    lstm = torch.nn.LSTM(1, 1, device="meta").to_empty(device="cpu")  # leaves the random generator as it is
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            lstm(torch.zeros(1, 1, 1))
    except RuntimeError:
        return False
    return True


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; every training starts with this."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_accelerator(
    device: str, precision: str, setting: str = "precision", unused_parameters: bool = False
) -> tuple[Accelerator, str]:
    """The object that knows ranks, device and autocast, and the precision that `auto` resolves to.

    `unused_parameters`: some parameters get no gradient in some steps, which DistributedDataParallel must know. Raises
    UserError, naming `setting`, for a precision that the device does not support.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    keep_freed_memory()  # training allocates the same large tensors at every step
    chosen = choose_device(device)
    resolved = choose_precision(setting, precision, chosen, training=True)
    mixed = {"fp32": "no"}.get(resolved, resolved)
    _forget_other_settings(mixed, chosen, setting)
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if unused_parameters else None
    return Accelerator(cpu=chosen.type == "cpu", mixed_precision=mixed, kwargs_handlers=handlers), resolved


def _forget_other_settings(mixed: str, device: torch.device, setting: str) -> None:
    """Reset Accelerate's global settings if they differ: one process may train twice, in different precisions.

    Accelerate has no public function for that. Raises UserError if this release has no private one either.
    """
    from accelerate.state import AcceleratorState, PartialState, is_initialized

    if not is_initialized():
        return
    other_device = PartialState().device.type != device.type
    if not other_device and AcceleratorState().mixed_precision == mixed:
        return
    reset = getattr(AcceleratorState, "_reset_state", None)
    if reset is None:
        raise UserError(
            f"{setting}: this release of accelerate keeps the precision and device of the first training in a process; "
            "start the trainings one by one"
        )
    reset(reset_partial_state=other_device)
