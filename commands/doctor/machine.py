"""What `doctor` finds out about a machine: one finding a line, whatever is broken; nothing here may raise.

A check is a function that returns findings. `examined` runs it and makes a finding of whatever it raises, so that a
broken installation is a line and not a traceback. Checks import what they look at when they run.
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from configs.errors import printable
from engine.processes import permitted_cores

Level = Literal["ok", "warn", "FAIL"]
# Packages by the name they are imported under, where it is not the distribution's.
_MODULES = {
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "protobuf": "google.protobuf",
    "google-crc32c": "google_crc32c",
    "jinja2": "jinja2",
}
_FALLBACKS = {"decord": "PyAV reads everything it would; reinstall with `pip install decord`"}
MIN_SHARED_MEMORY_BYTES = 1 << 30
MIN_PYTHON = (3, 10)
MIN_OPEN_FILES = 1024
MIN_FREE_BYTES = 5 << 30


@dataclass(frozen=True)
class Finding:
    """One line: how bad, what was looked at, what was found, what to do (nothing where all is well)."""

    level: Level
    what: str
    found: str
    to_do: str = ""

    def line(self) -> str:
        return printable(f"{self.level:4}  {self.what}: {self.found}{f'; {self.to_do}' if self.to_do else ''}")


Check = Callable[[], Iterable[Finding]]


def examined(what: str, check: Check) -> Iterator[Finding]:
    """The findings of a check, as it finds them; one that breaks is a finding itself."""
    try:
        yield from check()
    except Exception as error:  # a doctor that dies of the patient's illness helps nobody
        yield Finding("FAIL", what, kind_and_text(error), "reinstall with `pip install -e .`, or report this line")


def kind_and_text(error: BaseException) -> str:
    """Kind and text of an exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


# ---------------------------------------------------------------------------------------------- installation


def check_python() -> Iterable[Finding]:
    """The interpreter, and the machine it runs on."""
    version = platform.python_version()
    where = f"{version} on {platform.system()} {platform.machine()} ({sys.executable})"
    if tuple(sys.version_info[:2]) < MIN_PYTHON:
        yield Finding("FAIL", "Python", where, f"Python {'.'.join(map(str, MIN_PYTHON))} or newer is needed")
    else:
        yield Finding("ok", "Python", where)


def check_packages() -> Iterable[Finding]:
    """Every package that setup.cfg asks for: there, new enough, and importable."""
    try:
        wanted = metadata.requires("surgstage") or []
    except metadata.PackageNotFoundError:
        yield Finding("FAIL", "surgstage", "not installed", "run `pip install -e .` in the project's folder")
        return
    sound = []
    collects = gc.isenabled()
    gc.disable()  # imports make many objects and hardly any garbage, which would be looked for again and again
    try:
        for line in wanted:
            requirement, _, marker = line.partition(";")
            if "extra ==" in marker or not _applies(marker):
                continue
            name, bound = _parts(requirement)
            finding = _package(name, bound)
            if finding.level == "ok":
                sound.append(finding.found)
            else:
                yield finding
    finally:
        if collects:
            gc.enable()
    if sound:
        yield Finding("ok", "packages", ", ".join(sorted(sound, key=str.casefold)))


def _package(name: str, bound: str | None) -> Finding:
    optional = _FALLBACKS.get(name)
    level: Level = "warn" if optional else "FAIL"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(level, name, "not installed", optional or f"run `pip install '{name}>={bound}'`")
    if bound and _release(version) < _release(bound):
        return Finding("FAIL", name, f"{version}, older than {bound}", f"run `pip install -U '{name}>={bound}'`")
    try:
        importlib.import_module(_MODULES.get(name.casefold(), name.replace("-", "_")))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problem = f"{version} is installed and cannot be imported ({kind_and_text(error)})"
        return Finding(level, name, problem, optional or f"run `pip install --force-reinstall '{name}'`")
    return Finding("ok", name, f"{name} {version}")


def _applies(marker: str) -> bool:
    """Whether an environment marker of ours (equalities joined by `and`) holds here."""
    values = {"platform_machine": platform.machine(), "sys_platform": sys.platform}
    found = re.findall(r"(\w+)\s*==\s*[\"']([^\"']*)[\"']", marker)
    return all(values.get(name, value) == value for name, value in found)


def _parts(requirement: str) -> tuple[str, str | None]:
    name = re.split(r"[<>=!~ \[(]", requirement.strip(), maxsplit=1)[0]
    bound = re.search(r">=\s*([0-9.]+)", requirement)
    return name, bound.group(1) if bound else None


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, enough to hold it against a lower bound."""
    numbers = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]
    return (*numbers, *(0,) * (3 - len(numbers)))


def check_torch_pair() -> Iterable[Finding]:
    """torch and torchvision are built for each other: 2.6 with 0.21, 2.7 with 0.22, and so on."""
    torch, vision = metadata.version("torch"), metadata.version("torchvision")
    due = (0, _release(torch)[1] + 15)
    if _release(torch)[0] == 2 and _release(vision)[:2] != due:
        to_do = f"run `pip install torchvision=={due[0]}.{due[1]}.*`"
        yield Finding("FAIL", "torch and torchvision", f"{torch} and {vision} do not belong together", to_do)
    else:
        yield Finding("ok", "torch and torchvision", f"{torch} and {vision} belong together")


# ---------------------------------------------------------------------------------------------- devices


def check_devices() -> Iterable[Finding]:
    """Processor, and the GPUs that torch can use; a driver that torch cannot talk to is named."""
    import torch

    from engine.device import cpu_has_bf16

    bf16 = "computes bf16" if cpu_has_bf16() else "no native bf16, so extraction runs in fp32"
    yield Finding("ok", "CPU", f"{permitted_cores()} core(s), {bf16}")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield from examined(f"GPU {number}", lambda number=number: _gpu(number))  # type: ignore[misc]
    elif torch.backends.mps.is_available():
        yield Finding("ok", "GPU", "Apple MPS")
    else:
        yield _no_gpu(torch.version.cuda)


def _gpu(number: int) -> Iterable[Finding]:
    """Name and memory of one GPU, and whether it computes."""
    import torch

    free, total = torch.cuda.mem_get_info(number)
    name = torch.cuda.get_device_name(number)
    answer = float(torch.ones(8, device=f"cuda:{number}").sum())
    held = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if answer != 8.0:
        yield Finding("FAIL", f"GPU {number}", f"{held}, computes wrongly", "leave it out with CUDA_VISIBLE_DEVICES")
    elif free < total / 2:
        yield Finding("warn", f"GPU {number}", held, "somebody else uses it; choose another or smaller batches")
    else:
        yield Finding("ok", f"GPU {number}", held)


def _no_gpu(built_for: str | None) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    card = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if card and hidden is not None and hidden.strip() in ("", "-1"):
        return Finding("warn", "GPU", "hidden by CUDA_VISIBLE_DEVICES", "unset it to use the card")
    if card and built_for is None:
        return Finding(
            "warn", "GPU", "a card is here, but this torch is built for CPUs", "install a CUDA build of torch"
        )
    if card:
        problem = f"a card is here, but torch (built for CUDA {built_for}) cannot use it"
        return Finding("warn", "GPU", problem, "update the driver, or install a torch built for the driver's CUDA")
    return Finding("ok", "GPU", "none; everything runs on the CPU")


# ---------------------------------------------------------------------------------------------- limits


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterable[Finding]:
    """Loader processes hand batches over through it; containers often have 64 MB."""
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
    """How many files a process may have open."""
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
    """Whether this is a cluster's machine, and a job of it."""
    if job := os.environ.get("SLURM_JOB_ID"):
        yield Finding("ok", "Slurm", f"in job {job} on {os.environ.get('SLURM_JOB_PARTITION', 'a partition')}")
    elif shutil.which("sbatch"):
        yield Finding("ok", "Slurm", "sbatch is here")
    else:
        yield Finding("ok", "Slurm", "none here")


# ---------------------------------------------------------------------------------------------- folders


def check_folder(what: str, folder: Path, needed_bytes: int = 0, certain: bool = True) -> Iterable[Finding]:
    """Whether a folder (or the first one above it that exists) can be written, and has room.

    Not `certain`: some of what is needed may be there already.
    """
    try:
        place = folder.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            yield Finding("FAIL", what, f"{folder} cannot be made: {place} is a file", "choose another folder")
            return
        if problem := _write_problem(place):
            yield Finding("FAIL", what, f"{folder} cannot be written ({problem})", "choose another folder")
            return
        free = shutil.disk_usage(place).free
    except OSError as error:  # above it one that may not be entered, or a server that is gone
        yield Finding("FAIL", what, f"{folder} cannot be looked at ({_reason(error)})", "choose another folder")
        return
    room = f"{folder}, {free / 1e9:,.1f} GB free"
    needed = f", about {needed_bytes / 1e9:,.1f} GB needed" if needed_bytes else ""
    if needed_bytes > free and certain:
        yield Finding("FAIL", what, room + needed, "free some or choose another folder")
    elif needed_bytes > free:
        to_do = "some are there already; where that is not enough, free some or choose another folder"
        yield Finding("warn", what, f"{room}{needed} in all", to_do)
    elif free < MIN_FREE_BYTES:
        yield Finding("warn", what, room, "checkpoints and features take some GB; free some or choose another folder")
    else:
        yield Finding("ok", what, room + needed)


def _write_problem(folder: Path) -> str | None:
    """Why nothing can be written in a folder, or None: tried out, since permissions alone do not tell."""
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
    """The checks that need no settings, in the order in which they are shown."""
    return (
        ("Python", check_python),
        ("packages", check_packages),
        ("torch and torchvision", check_torch_pair),
        ("devices", check_devices),
        ("shared memory", check_shared_memory),
        ("open files", check_open_files),
        ("Slurm", check_slurm),
    )
