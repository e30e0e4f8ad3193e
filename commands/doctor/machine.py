"""The checks of `doctor` that concern the machine.

A check is a function that returns findings, and `doctor` prints one line for each. `examined` runs a check and turns an
exception into a finding, so that a broken installation gives a line and not a traceback. For the same reason, a check
imports what it examines only when it runs.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.errors import printable, type_and_line
from engine.launch import permitted_cores

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Level = Literal["ok", "warn", "FAIL"]
# The module of each distribution whose module has another name.
_MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml", "pillow": "PIL", "protobuf": "google.protobuf"}
_FALLBACKS = {"decord": "PyAV reads all videos instead; reinstall with `pip install decord`"}
MIN_SHARED_MEMORY_BYTES = 1 << 30
MIN_PYTHON = (3, 10)
MIN_OPEN_FILES = 1024
MIN_FREE_BYTES = 5 << 30


@dataclass(frozen=True)
class Finding:
    """One line of output: the level, what was checked, what was found, and what to do (empty if nothing)."""

    level: Level
    what: str
    found: str
    to_do: str = ""

    def line(self) -> str:
        return printable(f"{self.level:4}  {self.what}: {self.found}{f'; {self.to_do}' if self.to_do else ''}")


Check = Callable[[], Iterable[Finding]]


def examined(what: str, check: Check) -> Iterator[Finding]:
    """Run a check and yield its findings; if the check raises an exception, yield a finding about that."""
    try:
        yield from check()
    except Exception as error:
        yield Finding("FAIL", what, type_and_line(error), "reinstall with `pip install -e .`, or report this line")


# ---------------------------------------------------------------------------------------------- installation


def check_python() -> Iterable[Finding]:
    """Check the version of Python, and report the machine."""
    version = platform.python_version()
    where = f"{version} on {platform.system()} {platform.machine()} ({sys.executable})"
    if tuple(sys.version_info[:2]) < MIN_PYTHON:
        yield Finding("FAIL", "Python", where, f"Python {'.'.join(map(str, MIN_PYTHON))} or newer is needed")
    else:
        yield Finding("ok", "Python", where)


def check_packages() -> Iterable[Finding]:
    """Check that all packages required in setup.cfg are installed in an allowed version and can be imported."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("surgstage") or []
    except metadata.PackageNotFoundError:
        yield Finding("FAIL", "surgstage", "not installed", "run `pip install -e .` in the project's folder")
        return
    wanted = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = [_package(one) for one in wanted]
    yield from (finding for finding in found if finding.level != "ok")
    if sound := sorted((finding.found for finding in found if finding.level == "ok"), key=str.casefold):
        yield Finding("ok", "packages", ", ".join(sound))


def _package(wanted: Requirement) -> Finding:
    from packaging.version import Version

    name, optional = wanted.name, _FALLBACKS.get(wanted.name)
    level: Level = "warn" if optional else "FAIL"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(level, name, "not installed", optional or f"run `pip install '{name}{wanted.specifier}'`")
    if not wanted.specifier.contains(Version(version).base_version):  # base_version, since vendors ship pre-releases
        to_do = f"run `pip install -U '{name}{wanted.specifier}'`"
        return Finding("FAIL", name, f"{version}, but {wanted.specifier} is required", to_do)
    try:
        importlib.import_module(_MODULES.get(name.casefold(), name.replace("-", "_").casefold()))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an extension module may raise anything, SystemExit included
        problem = f"{version} is installed but cannot be imported ({type_and_line(error)})"
        return Finding(level, name, problem, optional or f"run `pip install --force-reinstall '{name}'`")
    return Finding("ok", name, f"{name} {version}")


def check_torch_pair() -> Iterable[Finding]:
    """Check that torch and torchvision are built for each other: 2.6 with 0.21, 2.7 with 0.22, and so on."""
    from packaging.version import Version

    torch, vision = Version(metadata.version("torch")), Version(metadata.version("torchvision"))
    due = (0, torch.minor + 15)
    if torch.major == 2 and vision.release[:2] != due:
        to_do = f"run `pip install torchvision=={due[0]}.{due[1]}.*`"
        yield Finding("FAIL", "torch and torchvision", f"{torch} and {vision} do not match", to_do)
    else:
        yield Finding("ok", "torch and torchvision", f"{torch} and {vision} match")


# ---------------------------------------------------------------------------------------------- devices


def check_devices() -> Iterable[Finding]:
    """Report the processor and the GPUs; a GPU that torch cannot use is a warning."""
    import torch

    from engine.device import cpu_has_bf16

    bf16 = "computes bf16" if cpu_has_bf16() else "no native bf16, so extraction runs in fp32 where precision is auto"
    yield Finding("ok", "CPU", f"{permitted_cores()} core(s), {bf16}")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield from examined(f"GPU {number}", lambda number=number: _gpu(number))  # type: ignore[misc]
    elif torch.backends.mps.is_available():
        yield Finding("ok", "GPU", "Apple MPS")
    else:
        yield _no_gpu()
        yield _openvino()


def _openvino() -> Finding:
    """Report whether OpenVINO, which extracts faster on a CPU, is installed, and how to use it."""
    faster = "extract.engine=openvino extract.precision=int8 extracts faster on this CPU"
    if find_spec("openvino") is None or find_spec("nncf") is None:
        return Finding("ok", "OpenVINO", f"not installed; with `pip install -e '.[openvino]'`, {faster}")
    return Finding("ok", "OpenVINO", f"{metadata.version('openvino')}: {faster}")


def _gpu(number: int) -> Iterable[Finding]:
    """Check that a GPU computes correctly, and report its name, compute capability, precision and memory."""
    import torch

    from engine.device import choose_precision, missing_kernels

    free, total = torch.cuda.mem_get_info(number)
    try:
        answer = float(torch.ones(8, device=f"cuda:{number}").sum())
    except RuntimeError as error:
        if problem := missing_kernels(error, number):
            yield Finding("FAIL", f"GPU {number}", problem, "or set device=cpu")
            return
        raise
    major, minor = torch.cuda.get_device_capability(number)
    with torch.cuda.device(number):
        computes = choose_precision("precision", "auto", torch.device("cuda"), training=True)
    held = f"{torch.cuda.get_device_name(number)}, sm_{major}{minor}, computes {computes} where precision is auto, "
    held += f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if answer != 8.0:
        yield Finding("FAIL", f"GPU {number}", f"{held}, adds wrongly", "exclude it with CUDA_VISIBLE_DEVICES")
    elif free < total / 2:
        yield Finding("warn", f"GPU {number}", held, "other programs use it; choose another GPU or smaller batches")
    else:
        yield Finding("ok", f"GPU {number}", held)


def _no_gpu() -> Finding:
    from engine.device import driver_lists_gpu, gpus_are_hidden, unusable_gpu

    if problem := unusable_gpu():
        return Finding("warn", "GPU", problem)
    if gpus_are_hidden() and driver_lists_gpu():
        return Finding("warn", "GPU", "hidden by CUDA_VISIBLE_DEVICES", "unset it to use the GPU")
    return Finding("ok", "GPU", "none; everything runs on the CPU")


# ---------------------------------------------------------------------------------------------- limits


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterable[Finding]:
    """Check the size of the shared memory through which loader processes pass batches (in containers often 64 MB)."""
    if not folder.is_dir():
        return
    total = shutil.disk_usage(folder).total
    size = f"{total / 2**20:,.0f} MiB"
    if total < MIN_SHARED_MEMORY_BYTES:
        to_do = "start the container with --shm-size=8g, or set cnn.workers=0 and joint.workers=0"
        yield Finding("warn", "shared memory", size, to_do)
    else:
        yield Finding("ok", "shared memory", size)


def check_open_files() -> Iterable[Finding]:
    """Check how many files a process may open at once."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        yield Finding("warn", "open files", f"{soft} at most (hard limit {hard})", f"run `ulimit -n {MIN_OPEN_FILES}`")
    else:
        yield Finding("ok", "open files", f"{soft} at most")


def check_slurm() -> Iterable[Finding]:
    """Report whether this machine belongs to a Slurm cluster, and whether this process runs in a job."""
    if job := os.environ.get("SLURM_JOB_ID"):
        yield Finding("ok", "Slurm", f"job {job} on {os.environ.get('SLURM_JOB_PARTITION', 'a partition')}")
    elif shutil.which("sbatch"):
        yield Finding("ok", "Slurm", "sbatch is available")
    else:
        yield Finding("ok", "Slurm", "none")


# ---------------------------------------------------------------------------------------------- folders


def check_folder(what: str, folder: Path, needed_bytes: int = 0, certain: bool = True) -> Iterable[Finding]:
    """Check that a folder (or its nearest existing parent) is writable and has `needed_bytes` free.

    Pass `certain=False` if some of the needed files may exist already: too little space is then only a warning.
    """
    try:
        place = folder.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            yield Finding("FAIL", what, f"{folder} cannot be created: {place} is a file", "choose another folder")
            return
        if problem := _write_problem(place):
            yield Finding("FAIL", what, f"{folder} cannot be written ({problem})", "choose another folder")
            return
        free = shutil.disk_usage(place).free
    except OSError as error:  # a parent without permission, or a file server that does not answer
        yield Finding("FAIL", what, f"{folder} cannot be accessed ({_reason(error)})", "choose another folder")
        return
    room = f"{folder}, {free / 1e9:,.1f} GB free"
    needed = f", about {needed_bytes / 1e9:,.1f} GB needed" if needed_bytes else ""
    if needed_bytes > free and certain:
        yield Finding("FAIL", what, room + needed, "free some space or choose another folder")
    elif needed_bytes > free:
        to_do = "some of the files exist already; if space is still short, free some or choose another folder"
        yield Finding("warn", what, f"{room}{needed} in total", to_do)
    elif free < MIN_FREE_BYTES:
        yield Finding("warn", what, room, "checkpoints and features take some GB; free some space or choose another")
    else:
        yield Finding("ok", what, room + needed)


def _write_problem(folder: Path) -> str | None:
    """Return why nothing can be written into a folder, or None.

    This writes a file, since permissions alone do not show whether writing works.
    """
    path = folder / f".doctor-{uuid.uuid4().hex[:8]}.tmp"
    try:
        with path.open("xb") as stream:
            stream.write(b"x" * 4096)
            os.fsync(stream.fileno())
    except OSError as error:
        return _reason(error)
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return None


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def machine_checks() -> Sequence[tuple[str, Check]]:
    """Return the names and functions of the checks that need no settings, in the order of their output."""
    return (
        ("Python", check_python),
        ("packages", check_packages),
        ("torch and torchvision", check_torch_pair),
        ("devices", check_devices),
        ("shared memory", check_shared_memory),
        ("open files", check_open_files),
        ("Slurm", check_slurm),
    )
