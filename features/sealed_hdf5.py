"""Read and write sealed HDF5 files, which are checked before the HDF5 library opens them.

A flipped bit in HDF5's own structures can send the library into an endless loop, before it verifies any of its own
checksums. A sealed file therefore begins with the size and CRC32 of its content. They are in the file's user block, 512
bytes before the HDF5 content that every HDF5 program skips.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import h5py

from configs.errors import UserError, one_line
from engine.files import atomic_path

USER_BLOCK_BYTES = 512
_MAGIC = b"surgstage sealed HDF5"
_BLOCK_BYTES = 1 << 20
# Exceptions that h5py raises when it reads a damaged file.
_HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError)


class DamagedFile(Exception):
    """A sealed file is damaged. The message says how, without the file's name."""


@contextmanager
def open_sealed(path: Path, check_seal: bool = True) -> Iterator[h5py.File]:
    """Open a sealed file for reading, after checking its seal (unless `check_seal` is false).

    Raises DamagedFile if the file is missing or damaged or lacks the attribute `complete`. Errors that HDF5 raises in
    the body become DamagedFile too.
    """
    try:
        if not path.is_file():
            raise DamagedFile("no such file")
        if check_seal and (problem := broken_seal(path)):
            raise DamagedFile(problem)
        with h5py.File(path, "r", locking=False) as file:
            if not file.attrs.get("complete"):
                raise DamagedFile("not complete")
            yield file
    except _HDF5_ERRORS as error:
        raise DamagedFile(f"damaged or cut short ({one_line(error)})") from error


@contextmanager
def sealed_path(path: Path, problem_of: Callable[[Path], str | None]) -> Iterator[Path]:
    """Yield a temporary path for an HDF5 file, as `atomic_path` does; afterwards the file is sealed and checked.

    It replaces `path` only if `problem_of`, the check, returns None. Raises UserError if the check finds a problem, and
    as `atomic_path` does.
    """
    with atomic_path(path) as temporary:
        yield temporary
        seal(temporary)
        if problem := problem_of(temporary):
            raise UserError(f"{path}: the file that was just written cannot be read back ({problem}); check the disk")


def seal(path: Path) -> None:
    """Write the size and CRC32 of a closed file's content into its user block."""
    with path.open("r+b") as stream:
        stream.write(_seal_of(stream).ljust(USER_BLOCK_BYTES, b"\0"))


def broken_seal(path: Path) -> str | None:
    """Return what is wrong with a file's seal, or None. Reads the whole file, in constant memory."""
    with path.open("rb") as stream:
        found = stream.read(USER_BLOCK_BYTES)
        if not found.startswith(_MAGIC):
            return "not a file of this project, or damaged"
        return None if found == _seal_of(stream).ljust(USER_BLOCK_BYTES, b"\0") else "damaged or cut short"


def _seal_of(stream: BinaryIO) -> bytes:
    """Return the seal for an open file's content; afterwards the file's position is at the start."""
    stream.seek(USER_BLOCK_BYTES)
    checksum = size = 0
    while block := stream.read(_BLOCK_BYTES):
        checksum, size = zlib.crc32(block, checksum), size + len(block)
    stream.seek(0)
    return b"%s\nbytes %d\ncrc32 %08x\n" % (_MAGIC, size, checksum)


def is_self_contained(file: h5py.File, name: str) -> bool:
    """Whether a data set is stored uncompressed in this very file, so that reading it takes no more memory than that.

    It must not be a link or be stored in another file, and must have no filter except the checksum.
    """
    found = file[name]
    creation = found.id.get_create_plist()
    filters = [creation.get_filter(number)[0] for number in range(creation.get_nfilters())]
    linked = not isinstance(file.get(name, getlink=True), h5py.HardLink)
    elsewhere = linked or creation.get_external_count() > 0 or found.is_virtual
    return not elsewhere and set(filters) <= {h5py.h5z.FILTER_FLETCHER32}


class Hdf5Sink(io.FileIO):
    """A file object that hides write errors from HDF5, which sometimes crashes the process when a disk is full.

    After the first error, nothing more is written. `check`, or leaving the `with` block, raises that error.
    """

    error: OSError | None = None

    def __init__(self, path: Path, mode: Literal["w+b", "r+b"] = "w+b") -> None:
        super().__init__(path, mode)

    def check(self) -> None:
        """Raise the first write error, if there was one."""
        if self.error is not None:
            raise self.error

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self.error is None:  # a nearly full disk accepts only a part, and then raises an error
                rest = rest[super().write(rest) or 0 :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            if self.error is None:
                super().truncate(size)
        except OSError as error:
            self.error = error
        return size or 0

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if error is None or isinstance(error, Exception):  # the write error is the cause of what HDF5 raised later
            self.check()
