"""Find out how much memory is available, control how the C library frees it, and report a GPU with too little."""

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

# Parameters of glibc's mallopt(3). M_TRIM_THRESHOLD: how many unused bytes stay at the end of the heap.
# M_MMAP_THRESHOLD: blocks larger than this are mapped separately; glibc before 2.33 ignores values above 32 MiB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory in this process; returns whether that worked (it does with glibc only).

    Every batch allocates large tensors of similar sizes. By default glibc returns their memory to the kernel after each
    batch, and the kernel must clear and map every page again for the next one. If the sizes vary, the heap fragments
    and becomes larger than the memory in use: then call `give_back_freed_memory` from time to time.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(mallopt(name, _KEPT_BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def give_back_freed_memory() -> None:
    """Return all unused pages of the heap to the kernel, also those between blocks in use (glibc only)."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def free_shared_memory() -> int | None:
    """Return the free bytes of /dev/shm, through which processes send tensors, or None on systems without it."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def _glibc(name: str) -> Callable[..., Any] | None:
    """A function of the C library, or None if it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


@contextmanager
def needs_gpu_memory(lower: str) -> Iterator[None]:
    """Turn torch's out-of-memory error on a GPU into a UserError that tells the user which settings to `lower`.

    It can be used as a context manager, or as a decorator of a function.
    """
    try:
        yield
    except RuntimeError as error:
        if "OutOfMemoryError" not in _types(error) and "out of memory" not in str(error):
            raise
        raise UserError(f"the GPU has too little memory: lower {lower} ({one_line(error, most=100)})") from error


def is_gpu_error(error: BaseException) -> bool:
    """Whether the error comes from a GPU (out of memory included); most later calls on that GPU will fail too.

    Most of these errors are recognised by their text, since torch before 2.8 has no type for them.
    """
    if _types(error) & {"AcceleratorError", "OutOfMemoryError"}:
        return True
    named = ("CUDA error", "cuDNN error", "CUDNN_STATUS", "CUBLAS_STATUS", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(name in str(error) for name in named)


def _types(error: BaseException) -> set[str]:
    """Return the names of an exception's classes; comparing names avoids importing torch for its classes."""
    return {kind.__name__ for kind in type(error).__mro__}


# ---------------------------------------------------------------------------------------------- what is available

# By folder below the mount point, for control groups of version 2 and of version 1: the file with the limit, the file
# with the bytes in use, and the fields of memory.stat that count cached file pages, which the kernel frees when needed.
_GROUP_FILES = {
    "": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def available_bytes(root: Path = Path("/")) -> int:
    """Return how many bytes of memory this process can still use.

    On Linux this is the least of what the machine and the limits of control groups (Slurm, containers) leave; on other
    systems it is the machine's whole memory. `root` is the folder that contains `proc` and `sys`.
    """
    with suppress(OSError, ValueError, KeyError):
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        return min(int(fields["MemAvailable"].split()[0]) * 1024, *_left_in_groups(root), sys.maxsize)
    names = getattr(os, "sysconf_names", {})
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else sys.maxsize
    return pages if pages > 0 else sys.maxsize


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield, for each control group of this process that has a memory limit, the bytes that are left below it."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        mount = "memory" if "memory" in controllers.split(",") else controllers
        if mount not in _GROUP_FILES:
            continue
        limit, used, of_files = _GROUP_FILES[mount]
        folder = root / "sys/fs/cgroup" / mount
        for group in (folder / place.lstrip("/"), *(folder / place.lstrip("/")).parents):
            with suppress(OSError, ValueError, KeyError):  # this group has no limit ("max"), or hides it from inside
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                freed = sum(int(stat[name]) for name in of_files)
                yield int((group / limit).read_text()) - int((group / used).read_text()) + freed
            if group == folder:
                break
