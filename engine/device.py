"""Device, precision and seeds, chosen once for every training loop and for extraction."""

from __future__ import annotations

import functools
import os
import random
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from configs.errors import UserError, one_line
from engine.launch import available_cores
from engine.memory import keep_freed_memory
from engine.progress import bars_are_hidden, say

if TYPE_CHECKING:
    from accelerate import Accelerator

    from configs.schema import Config, CudaConfig

# Cores per process on a GPU below which frames are known to come too slowly: one core decodes some 60 frames/s.
ENOUGH_CORES = 4
INSTALLING = "install a torch for its CUDA (README, Start)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises UserError for a device that is not available, and for `auto` if there is an NVIDIA GPU that torch cannot use:
    the CPU would need days for what was to be hours.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in ("auto", *available):
        raise UserError(f"device={name}: choose auto, cpu, cuda or mps")
    chosen = next(kind for kind in ("cuda", "mps", "cpu") if available[kind]) if name == "auto" else name
    if name in ("auto", "cuda") and (problem := unusable_gpu()):
        raise UserError(f"device={name}: {problem}; or set device=cpu")
    if not available[chosen]:
        present = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device={name}: this machine (or this torch build) has none; present: {present}")
    return torch.device(chosen)


def unusable_gpu() -> str | None:
    """Why torch cannot use the NVIDIA GPU of this machine, and what to do; None if it has no GPU or hides it."""
    if torch.cuda.is_available() or gpus_are_hidden() or not driver_lists_gpu():
        return None
    if torch.version.cuda is None:
        return f"there is an NVIDIA GPU, but this torch is built for CPUs; {INSTALLING}"
    try:
        torch.cuda.init()
        reason = "no GPU in sight"
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error, most=160)
    built = f"torch {torch.__version__} (built for CUDA {torch.version.cuda})"
    return f"there is an NVIDIA GPU, but {built} cannot use it ({reason}); update the driver, or {INSTALLING}"


def gpus_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


@functools.cache
def driver_lists_gpu() -> bool:
    """Whether the NVIDIA driver has a GPU for this process; in a job without one it has none."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    # after an update without a restart, the driver does not answer the library
    return done.stdout.startswith("GPU ") or "version mismatch" in done.stdout + done.stderr


def start_stage(stage: str, config: Config, device: torch.device, precision: str, others: str = "") -> None:
    """What every stage begins with: the switches `cuda.*`, and one line on rank 0 about what it computes on.

    `others` describes the processes that load or decode. Raises UserError if torch has no code for the GPU.
    """
    name = str(device)
    require_kernels(device)
    if device.type == "cuda":
        apply_switches(config.cuda)
        name += f" ({torch.cuda.get_device_name(device)})"
    if not bars_are_hidden():
        say(f"{stage}: {name}, {precision}" + (f", {others}" if others else ""))


def apply_switches(cuda: CudaConfig) -> None:
    """Set torch's global switches for CUDA. By default torch convolves in TF32 and multiplies in fp32."""
    torch.backends.cudnn.deterministic = cuda.deterministic
    torch.backends.cudnn.benchmark = cuda.benchmark
    torch.backends.cudnn.allow_tf32 = cuda.tf32
    torch.backends.cuda.matmul.allow_tf32 = cuda.tf32


def require_kernels(device: torch.device) -> None:
    """Run a first kernel if the device is a CUDA GPU. Raises UserError if this torch was not built for it."""
    if device.type != "cuda":
        return
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError as error:
        if problem := missing_kernels(error, device):
            raise UserError(f"{device}: {problem}; or set device=cpu") from error
        raise


def missing_kernels(error: Exception, device: torch.device | int) -> str | None:
    """The message for an error that means that torch has no kernels for this GPU; None for any other error."""
    if "no kernel image" not in str(error):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"this torch ({torch.__version__}) has no code for sm_{major}{minor}, {torch.cuda.get_device_name(device)}; "
        f"{INSTALLING}"
    )


def choose_precision(setting: str, name: str, device: torch.device, training: bool) -> str:
    """The arithmetic (fp32, bf16 or fp16) that `name`, the value of `setting`, resolves to on `device`.

    `auto` and `native`: on GPUs bf16 where the card computes it, otherwise fp16 (with a scaler in training); on CPUs
    with native bf16 that, for `auto` in inference only; otherwise fp32. Raises UserError, naming `setting`, for a
    precision that this device does not support.
    """
    if name in ("native", "auto"):
        if device.type == "cuda":
            return "bf16" if _gpu_has_bf16() else "fp16"
        wanted = device.type == "cpu" and (name == "native" or not training)
        return "bf16" if wanted and cpu_has_bf16() else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"{setting}=fp16 works on CUDA devices only, not on {device.type}; set {setting}=auto or fp32")
    if name == "bf16":
        require_bf16(setting, device)
    return name


def require_bf16(setting: str, device: torch.device) -> None:
    """Raise UserError if `setting` asks for bf16 on a CPU or GPU that does not compute it natively."""
    if device.type == "cpu" and not cpu_has_bf16():
        raise UserError(
            f"{setting}=bf16: this CPU does not multiply bf16 (no AVX512-BF16 or AMX); set {setting}=fp32 or auto"
        )
    if device.type == "cuda" and not _gpu_has_bf16():
        raise UserError(f"{setting}=bf16: this GPU does not compute bf16, only sm_80 and newer do; set {setting}=auto")


def _gpu_has_bf16() -> bool:
    """Whether the card computes bf16; torch's default counts cards that only store it, many times slower than fp32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


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
    """Inference in `precision` (fp32, bf16 or fp16) on `device`: autocast, or nothing for fp32."""
    with torch.autocast(device.type, DTYPES[precision]) if precision != "fp32" else nullcontext():
        yield


def sent_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU on `device`. A plain copy to a GPU would wait for everything that the GPU still has to do."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
    with old_driver_of_rtx_40():
        return Accelerator(cpu=chosen.type == "cpu", mixed_precision=mixed, kwargs_handlers=handlers), resolved


@contextmanager
def old_driver_of_rtx_40() -> Iterator[None]:
    """Accelerate's refusal of several such GPUs, even if one process uses one of them, as a UserError."""
    try:
        yield
    except NotImplementedError as error:
        raise UserError(
            f"accelerate: {one_line(error, most=100)}; update the driver to 550.40 or newer, or "
            "`export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1`"
        ) from error


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
            "run each training as a command of its own"
        )
    reset(reset_partial_state=other_device)
