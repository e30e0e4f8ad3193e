"""Choose the device and the precision, and set the seeds, for every training loop and for extraction."""

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

# With fewer cores per GPU process than this, decoding is slower than the GPU: one core decodes about 60 frames/s.
ENOUGH_CORES = 4
INSTALLING = "install a torch for its CUDA (README, Start)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the torch device for the setting `device`; `auto` prefers CUDA, then Apple's MPS, then the CPU.

    Raises UserError if the device is not available. Also raises UserError for `auto` if the machine has an NVIDIA GPU
    that torch cannot use, because training on the CPU instead could take days rather than hours.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in ("auto", *available):
        raise UserError(f"device={name}: choose auto, cpu, cuda or mps")
    chosen = next(kind for kind in ("cuda", "mps", "cpu") if available[kind]) if name == "auto" else name
    if name in ("auto", "cuda") and (problem := unusable_gpu()):
        raise UserError(f"device={name}: {problem}; or set device=cpu")
    if not available[chosen]:
        present = ", ".join(kind for kind, there in available.items() if there)
        has_none = f"this machine (or this torch build) has none; present: {present}"
        raise UserError(f"device={name}: {has_none}; set device=cpu or device=auto")
    return torch.device(chosen)


def unusable_gpu() -> str | None:
    """Explain why torch cannot use this machine's NVIDIA GPU, and what to do about it.

    Returns None if torch can use a GPU, or if the machine has none, or if the environment hides all of them.
    """
    if torch.cuda.is_available() or gpus_are_hidden() or not driver_lists_gpu():
        return None
    if torch.version.cuda is None:
        return f"there is an NVIDIA GPU, but this torch is built for CPUs; {INSTALLING}"
    try:
        torch.cuda.init()
        reason = "it finds no GPU"
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error, most=160)
    built = f"torch {torch.__version__} (built for CUDA {torch.version.cuda})"
    return f"there is an NVIDIA GPU, but {built} cannot use it ({reason}); update the driver, or {INSTALLING}"


def gpus_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


@functools.cache
def driver_lists_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU for this process. It lists none in a cluster job that requested none."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    # After a driver update without a restart, nvidia-smi reports a version mismatch, but there is a GPU.
    return done.stdout.startswith("GPU ") or "version mismatch" in done.stdout + done.stderr


def start_stage(stage: str, config: Config, device: torch.device, precision: str, others: str = "") -> None:
    """Apply the settings `cuda.*` and print, on rank 0, which device and precision the stage uses.

    Every stage begins with this. `others` describes the processes that load or decode frames, if any. Raises UserError
    if torch was built without code for the GPU.
    """
    name = str(device)
    require_kernels(device)
    if device.type == "cuda":
        apply_switches(config.cuda)
        name += f" ({torch.cuda.get_device_name(device)})"
    if not bars_are_hidden():
        say(f"{stage}: {name}, {precision}" + (f", {others}" if others else ""))


def apply_switches(cuda: CudaConfig) -> None:
    """Set torch's global switches for CUDA.

    torch's own defaults differ: it uses TF32 in convolutions, but fp32 in matrix products.
    """
    torch.backends.cudnn.deterministic = cuda.deterministic
    torch.backends.cudnn.benchmark = cuda.benchmark
    torch.backends.cudnn.allow_tf32 = cuda.tf32
    torch.backends.cuda.matmul.allow_tf32 = cuda.tf32


def require_kernels(device: torch.device) -> None:
    """Test a CUDA device with a first small kernel. Raises UserError if this torch has no code for the GPU."""
    if device.type != "cuda":
        return
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError as error:
        if problem := missing_kernels(error, device):
            raise UserError(f"{device}: {problem}; or set device=cpu") from error
        raise


def missing_kernels(error: Exception, device: torch.device | int) -> str | None:
    """Return the message for the user if `error` says that torch has no kernels for this GPU, otherwise None."""
    if "no kernel image" not in str(error):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"this torch ({torch.__version__}) has no code for sm_{major}{minor}, {torch.cuda.get_device_name(device)}; "
        f"{INSTALLING}"
    )


def choose_precision(setting: str, name: str, device: torch.device, training: bool) -> str:
    """Return the precision (fp32, bf16 or fp16) that `name`, the value of `setting`, stands for on `device`.

    On a GPU, `auto` and `native` select bf16 if the GPU computes it, otherwise fp16 (with a gradient scaler in
    training). On a CPU that computes bf16 natively, `native` selects bf16 and `auto` does so in inference only. In all
    other cases both select fp32. Raises UserError naming `setting` if the device does not support the precision.
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
    """Whether the GPU computes bf16 in hardware.

    By default torch also says yes for GPUs that emulate bf16, which is many times slower than fp32.
    """
    return torch.cuda.is_bf16_supported(including_emulation=False)


def say_few_cores(device: torch.device) -> None:
    """Print a note if this process has too few cores to decode or load frames as fast as its GPU needs them."""
    cores = available_cores()
    if device.type == "cuda" and cores < ENOUGH_CORES:
        say(
            f"note: this GPU's process has only {cores} core{'s' if cores > 1 else ''}, so the GPU will wait for "
            "frames; 8 or more are usual (in a Slurm job: --cpus-per-task 8)"
        )


@contextmanager
def lower_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Run the body, an inference on `device`, in `precision`: under autocast for bf16 and fp16, unchanged for fp32."""
    with torch.autocast(device.type, DTYPES[precision]) if precision != "fp32" else nullcontext():
        yield


def sent_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a CPU tensor to `device` without waiting; a plain copy waits for all work queued on the GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads in the body, and restore the previous number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX512-BF16 or AMX; BF16 on ARM).

    Emulated bf16 is slower than fp32, and oneDNN has no LSTM for it. The answer is also no where the variable
    `ONEDNN_MAX_CPU_ISA=AVX2` keeps oneDNN from using native bf16.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    found = re.search(r"^(?:flags|Features)\s*:(.*)", text, re.MULTILINE)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(found[1].split() if found else ())) and _runs_lstm_in_bf16()


def _runs_lstm_in_bf16() -> bool:
    lstm = torch.nn.LSTM(1, 1, device="meta").to_empty(device="cpu")  # draws no random numbers
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            lstm(torch.zeros(1, 1, 1))
    except RuntimeError:
        return False
    return True


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch. Every training starts with this."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_accelerator(
    device: str, precision: str, setting: str = "precision", unused_parameters: bool = False
) -> tuple[Accelerator, str]:
    """Build the Accelerator, which handles ranks, device and autocast; also returns the precision it uses.

    The returned precision is never `auto`. Set `unused_parameters` if some parameters get no gradient in some steps:
    DistributedDataParallel must know that. Raises UserError naming `setting` if the device does not support the
    precision.
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
    """Turn an error of Accelerate about several RTX 40 GPUs with an old driver into a UserError.

    Accelerate raises it even if this process uses only one of the GPUs.
    """
    try:
        yield
    except NotImplementedError as error:
        raise UserError(
            f"accelerate: {one_line(error, most=100)}; update the driver to 550.40 or newer, or "
            "`export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1`"
        ) from error


def _forget_other_settings(mixed: str, device: torch.device, setting: str) -> None:
    """Reset Accelerate's global settings if they differ from this precision or device.

    This lets one process train twice in different precisions. Accelerate has no public function for the reset; raises
    UserError if the installed release does not have the private one either.
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
