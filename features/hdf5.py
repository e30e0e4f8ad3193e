"""HDF5 files on disks that fill up."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Literal


class Hdf5Sink(io.RawIOBase):
    """A file that HDF5 writes to and never sees fail: HDF5 crashes the process now and then when a disk fills up.

    The first error is kept, what comes after it is dropped, and `check` (or leaving the block) raises it.
    """

    def __init__(self, path: Path, mode: Literal["w+b", "r+b"] = "w+b") -> None:
        self._file = path.open(mode, buffering=0)
        self.error: OSError | None = None

    def check(self) -> None:
        """Raise the error that a write met, if one did."""
        if self.error is not None:
            raise self.error

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self.error is None:  # a disk that is nearly full takes a part, then nothing
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            if self.error is None:
                self._file.truncate(size)
        except OSError as error:
            self.error = error
        return size or 0

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer) or 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._file.close()
        if error is None or isinstance(error, Exception):  # whatever HDF5 made of it, this is the cause
            self.check()
