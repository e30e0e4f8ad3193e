"""Sealed HDF5 files, which are checked before the HDF5 library opens them, and writing to disks that fill up.

A flipped bit in HDF5's own structures can send the library into an endless loop, so its checksums come too late. A
sealed file has a user block (512 bytes before the HDF5 content, which every HDF5 program skips) with the size and CRC32
of the rest.
"""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal

import h5py

USER_BLOCK_BYTES = 512
_MAGIC = b"surgstage sealed HDF5"
_BLOCK_BYTES = 1 << 20


def seal(path: Path) -> None:
    """Write the size and CRC32 of a closed file's content into its user block."""
    with path.open("r+b") as stream:
        stream.write(_seal_of(stream).ljust(USER_BLOCK_BYTES, b"\0"))


def broken_seal(path: Path) -> str | None:
    """What is wrong with a file's seal, or None. Reads the whole file, in constant memory."""
    with path.open("rb") as stream:
        found = stream.read(USER_BLOCK_BYTES)
        if not found.startswith(_MAGIC):
            return "not a file of this project, or damaged"
        return None if found == _seal_of(stream).ljust(USER_BLOCK_BYTES, b"\0") else "damaged or cut short"


def _seal_of(stream: BinaryIO) -> bytes:
    """The seal of an open file's content; leaves the position at the start."""
    stream.seek(USER_BLOCK_BYTES)
    checksum = size = 0
    while block := stream.read(_BLOCK_BYTES):
        checksum, size = zlib.crc32(block, checksum), size + len(block)
    stream.seek(0)
    return b"%s\nbytes %d\ncrc32 %08x\n" % (_MAGIC, size, checksum)


def is_self_contained(file: h5py.File, name: str) -> bool:
    """Whether a data set is stored in this file and uncompressed: no link to or storage in other files, and no filter
    but the checksum, so that reading it takes no more memory than the file has bytes."""
    creation = file[name].id.get_create_plist()
    filters = [creation.get_filter(number)[0] for number in range(creation.get_nfilters())]
    linked = not isinstance(file.get(name, getlink=True), h5py.HardLink)
    elsewhere = linked or creation.get_external_count() > 0 or file[name].is_virtual
    return not elsewhere and set(filters) <= {h5py.h5z.FILTER_FLETCHER32}


class Hdf5Sink(io.RawIOBase):
    """A file object for HDF5 whose writes never fail: HDF5 sometimes crashes the process when a disk fills up.

    The first error is kept and later writes are dropped; `check` (or leaving the block) raises it.
    """

    def __init__(self, path: Path, mode: Literal["w+b", "r+b"] = "w+b") -> None:
        self._file = path.open(mode, buffering=0)
        self.error: OSError | None = None

    def check(self) -> None:
        """Raise the first error of a write, if there was one."""
        if self.error is not None:
            raise self.error

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self.error is None:  # a nearly full disk takes a part, then nothing
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
        if error is None or isinstance(error, Exception):  # whatever HDF5 raised after it, this is the cause
            self.check()
