"""Memory: what is available, what is freed and kept by the C library, and a GPU with too little of it."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from configs.errors import UserError, one_line

# Parameters of glibc's mallopt(3): the bytes kept at the end of the heap, and the size above which a block has a
# mapping of its own. For the latter, glibc before 2.33 accepts 32 MiB at most and otherwise keeps its default.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory in this process; returns whether it does (glibc only).

    Every batch allocates large tensors of similar sizes. By default glibc returns them to the kernel after each batch,
    and the kernel must clear and map every page again. If sizes vary, the heap fragments and grows beyond what was ever
    in use at once; call `give_back_freed_memory` from time to time.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(mallopt(name, _KEPT_BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def give_back_freed_memory() -> None:
    """Return unused pages of the heap to the kernel, those between blocks in use included (glibc only)."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def free_shared_memory() -> int | None:
    """Free bytes of /dev/shm, through which processes send tensors; None on systems without it."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def _glibc(name: str) -> Callable[..., Any] | None:
    """A function of the C library, or None if it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


@contextmanager
def needs_gpu_memory(lower: str) -> Iterator[None]:
    """Raise UserError, which names the settings to `lower`, where torch finds too little memory on the GPU.

    As a decorator, it does so for a whole function.
    """
    try:
        yield
    except RuntimeError as error:
        if "OutOfMemoryError" not in _types(error) and "out of memory" not in str(error):
            raise
        raise UserError(f"the GPU has too little memory: lower {lower} ({one_line(error, most=100)})") from error


def is_gpu_error(error: BaseException) -> bool:
    """Whether a device reports an error, its full memory included, after which most later calls on it fail as well.

    torch before 2.8 has no type for most of these.
    """
    if _types(error) & {"AcceleratorError", "OutOfMemoryError"}:
        return True
    named = ("CUDA error", "cuDNN error", "CUDNN_STATUS", "CUBLAS_STATUS", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(name in str(error) for name in named)


def _types(error: BaseException) -> set[str]:
    """The names of an exception's classes: to ask for them by object would import torch."""
    return {kind.__name__ for kind in type(error).__mro__}


# ---------------------------------------------------------------------------------------------- what is available

# Files of a control group: the limit, the bytes in use, and the part of these that are pages of files, which are freed
# when needed; of version 2, then of version 1 (the folder below the mount point comes first).
_GROUP_FILES = {
    "": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can still take: of the machine and, on Linux, of its control groups (Slurm, containers).

    On other systems it is all memory of the machine. `root` is the folder that holds `proc` and `sys`.
    """
    with suppress(OSError, ValueError, KeyError):
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        return min(int(fields["MemAvailable"].split()[0]) * 1024, *_left_in_groups(root), sys.maxsize)
    names = getattr(os, "sysconf_names", {})
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else sys.maxsize
    return pages if pages > 0 else sys.maxsize


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each memory limit above this process leaves."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        mount = "memory" if "memory" in controllers.split(",") else controllers
        if mount not in _GROUP_FILES:
            continue
        limit, used, of_files = _GROUP_FILES[mount]
        folder = root / "sys/fs/cgroup" / mount
        for group in (folder / place.lstrip("/"), *(folder / place.lstrip("/")).parents):
            with suppress(OSError, ValueError, KeyError):  # no limit here ("max"), or none that can be seen from inside
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                freed = sum(int(stat[name]) for name in of_files)
                yield int((group / limit).read_text()) - int((group / used).read_text()) + freed
            if group == folder:
                break
