"""What the C library does with memory that was freed: keep it for the next batch, or give it back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

# Of glibc's mallopt(3): how much at the heap's end is kept, and from which size on a block is mapped and unmapped by
# itself. For the latter glibc before 2.33 takes 32 MiB at most; it then goes on as it does by default.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory in this process; whether it will (glibc alone).

    Every batch needs large tensors of much the same sizes anew. By default glibc returns them to the kernel after each,
    which must then clear and map every page again. Where sizes change, gaps stay between what is in use, and more is
    kept than ever was in use at once: `give_back_freed_memory` ends that, once in a while.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(mallopt(name, _KEPT_BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def give_back_freed_memory() -> None:
    """Once in a while, or between two kinds of work: gaps between what is in use go back to the kernel too."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _glibc(name: str) -> Callable[..., Any] | None:
    """A function of the C library, None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
