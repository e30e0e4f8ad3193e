"""Freed memory: the C library keeps it for the next batch, or returns it to the kernel."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

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


def _glibc(name: str) -> Callable[..., Any] | None:
    """A function of the C library, or None if it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
