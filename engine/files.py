"""Write files atomically, read them up to a size limit, lock folders, and hash contents.

Every file of the project is written through `atomic_path`: the content goes to a temporary file in the same folder,
which is closed, flushed to the disk (fsync) and renamed with `os.replace`; then the folder is flushed too. A file whose
name does not end in `.tmp` is therefore always complete. Temporary names are unique, so two processes can write the
same file without a lock.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from configs.errors import UserError

HASH_SPAN_BYTES = 1 << 20
# Far larger than any index, label or result file. A parsed JSON file takes a small multiple of its size in memory.
MAX_JSON_BYTES = 64 << 20
_READ_BYTES = 1 << 20
# Error numbers of a full disk, an exhausted quota and a file-size limit.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Error numbers of file systems without locks (Lustre mounted without `flock`, NFS without a lock service).
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


def fsync_folder(folder: Path) -> None:
    """Flush `folder` to the disk, so that a rename in it survives a crash; does nothing where that is unsupported."""
    with suppress(OSError):  # some network file systems refuse fsync on folders; the rename is still atomic
        fsync_file(folder)


def fsync_file(path: Path) -> None:
    """Flush the content of a closed file to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents if necessary. Raises UserError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot create this folder ({error.strerror}); choose another one") from error
    return folder


class NoRoomError(UserError):
    """The disk is full, so that every further write would fail too."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the temporary file replaces `path` once the body has succeeded.

    The body writes and closes the temporary file, and may reopen it to verify it. After any exception, including
    KeyboardInterrupt, the temporary file is removed and `path` is unchanged. On success, temporary files left behind by
    killed writers of the same file are removed too. Raises UserError if the file cannot be written, for example
    because the disk is full.
    """
    make_folder(path.parent)
    temporary = temporary_path(path)
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
        remove_stale_temporaries(path.parent, of=_stem(path))
    except OSError as error:
        failure = as_user_error(error, path)
        if failure is error and str(error.filename) in (str(temporary), str(path)):  # such as a file in /proc
            failure = UserError(f"{path}: cannot be written: {error.strerror}; choose another place or name")
        raise failure from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return a unique path beside `path` whose name identifies this process.

    The caller must remove the file. If this process dies first, `remove_stale_temporaries` removes it later.
    """
    return path.with_name(f".{_stem(path)}.{process_mark()}-{uuid.uuid4().hex[:8]}.tmp")


def _stem(path: Path) -> str:
    return path.name.encode()[:120].decode(errors="ignore")  # file names are limited to 255 bytes


def as_user_error(error: OSError, path: Path) -> Exception:
    """Return a UserError for a failed write to `path`, or `error` itself if the user cannot fix it."""
    if _is_no_room(error):
        return NoRoomError(f"{path}: no room left on the disk; free some space or choose another folder")
    if isinstance(error, IsADirectoryError) or error.errno == errno.ENAMETOOLONG:
        what = "is a folder" if isinstance(error, IsADirectoryError) else "its name is too long"
        return UserError(f"{path}: cannot be written: {what}; choose another place or name")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return UserError(f"{path}: not allowed to write here; choose another folder")
    return error


def _is_no_room(error: OSError) -> bool:
    """Whether the error means that the disk is full. h5py gives the error number only in the error's text."""
    in_text = error.errno is None and any(f"errno = {number}," in str(error) for number in _NO_ROOM)
    return in_text or error.errno in _NO_ROOM


def remove_stale_temporaries(folder: Path, older_than_s: float = 3600.0, of: str = "") -> int:
    """Delete the temporary files that killed writers left in `folder`, and return how many were deleted.

    `of` limits this to the temporary files of the file with that name. If the writer ran on this machine (same boot,
    same PID namespace) and is dead, its file is deleted at once. Any other file is deleted after `older_than_s` seconds
    without a write: on a shared file system, process numbers of other machines mean nothing here, but a live writer
    writes continually.
    """
    removed = 0
    for path in folder.glob(".*.tmp"):
        if of and not path.name.startswith(f".{of}."):
            continue
        try:
            if process_is_dead(path.name.rsplit(".", 2)[-2]) or time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()
                removed += 1
        except OSError:
            continue
    return removed


@functools.cache
def _place() -> str:
    """Return a hash of host, boot and PID namespace: two PIDs are comparable only if this value is the same."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    except OSError:
        parts.append(uuid.uuid4().hex)  # not known here, so that no other process may match
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:8]


def process_mark() -> str:
    """Return an identifier of this process that `process_is_dead` accepts later."""
    return f"{_place()}-{os.getpid()}"


def process_is_dead(mark: str) -> bool:
    """Whether the process with this `process_mark` ran on this machine since its last boot and has ended."""
    place, _, rest = mark.partition("-")
    number = rest.partition("-")[0]
    if place != _place() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
        # A zombie still accepts signals, and in a container without an init process zombies are never reaped.
        return Path(f"/proc/{number}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, ValueError):
        return False


@contextmanager
def exclusive_lock(folder: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Lock `folder` for this process while the body runs.

    If another process holds the lock, raises UserError naming `what` and that process, or waits for it with `wait`. The
    lock is a kernel lock on the file `.lock`: the kernel releases it when its holder ends or is killed, so the file
    itself is never deleted. On a file system without locks, the body runs without one, after a warning.
    """
    lock, note = FileLock(make_folder(folder) / ".lock", timeout=-1 if wait else 0), folder / "in-work"
    try:
        lock.acquire()
    except Timeout:
        holder = "just started"
        with suppress(OSError):
            holder = note.read_text(errors="replace")[:200]
        raise UserError(
            f"{folder}: another process works on this {what} ({holder}); wait for it, or choose another --name"
        ) from None
    except (OSError, NotImplementedError) as error:  # filelock before 3.29 raises the latter for ENOSYS
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise UserError(
                f"{folder / '.lock'}: cannot be locked ({error.strerror}); delete it, or choose another --name"
            ) from error
        warnings.warn(
            f"{folder}: this file system has no locks; do not start a second process on this {what}", stacklevel=3
        )
    try:
        write_text(note, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            note.unlink()
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with keys in the given order; NumPy and torch values become plain numbers.

    Raises ValueError for NaN, which JSON lacks, and TypeError for values that JSON cannot represent.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy's and torch's arrays and scalars
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def require_replaceable_json(path: Path) -> None:
    """Raise UserError if `path` exists and is not a JSON file of earlier results, so that no other file is lost."""
    if path.exists() and (path.is_dir() or not path.read_bytes()[:1].startswith(b"{")):
        raise UserError(f"{path}: exists and does not contain results; choose another file")


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """The content of a file. Raises UserError if it is missing, unreadable or larger than `most_bytes`."""
    try:
        with path.open("rb") as stream:
            content = stream.read(most_bytes + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: the name contains a NUL character
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(content) > most_bytes:
        raise UserError(f"{path}: larger than {most_bytes:,} bytes, the limit for such files; choose another")
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises UserError where `read_json` does, and if the file contains another kind of JSON value.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged: contains no JSON object; delete it or restore it")
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError if it is missing, unreadable, larger than 64 MiB or not JSON."""
    content = read_bounded(path, MAX_JSON_BYTES)
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # integers of thousands of digits raise ValueError too
        raise UserError(f"{path}: not a JSON file ({error})") from error


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a whole file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_ends(path: Path) -> str:
    """Return the SHA-256 of a file's size, first MiB and last MiB.

    It is fast for large videos, and changes if a file is replaced by another.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(HASH_SPAN_BYTES))
        if size > HASH_SPAN_BYTES:
            stream.seek(max(HASH_SPAN_BYTES, size - HASH_SPAN_BYTES))
            digest.update(stream.read(HASH_SPAN_BYTES))
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value in canonical JSON (keys sorted, no blanks)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def require_free_bytes(folder: Path, needed: int, purpose: str) -> None:
    """Raise NoRoomError (a UserError) naming `purpose` if the disk of `folder` has fewer than `needed` bytes free."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed:
        raise NoRoomError(
            f"{folder}: {purpose} needs about {needed / 1e6:,.0f} MB and only {free / 1e6:,.0f} MB are free; "
            "free some space or choose another folder"
        )


def below_root(message: str, root: Path) -> str:
    """Return `message` with paths relative to the data root, so that a file containing it can move with the data."""
    return message.replace(f"{root}{os.sep}", "")


class LinkedRoot(type(Path())):  # type: ignore[misc]
    """A data root whose symbolic links may point outside it (`data.follow_links`).

    Only an object of this class grants the permission: a path read from a file cannot, and neither can a plain `Path`
    made from such an object.
    """


def inside(root: Path, relative: str) -> Path:
    """Return the path `relative` below `root`.

    Raises UserError if `relative` is absolute or leads out of the root by `..`. A symbolic link out of the root also
    raises UserError, unless `root` is a `LinkedRoot`.
    """
    if Path(relative).is_absolute() or "\x00" in relative:
        raise UserError(f"{relative!r}: paths in an index must be relative to the data root")
    if isinstance(root, LinkedRoot) and ".." in Path(relative).parts:
        raise UserError(f"{relative!r}: leads out of the data root {root}")
    path = root / relative
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a symbolic link that points to itself
        raise UserError(f"{relative!r}: cannot be resolved below {root} ({error})") from error
    if not (isinstance(root, LinkedRoot) or target.is_relative_to(root.resolve())):
        raise UserError(f"{relative!r}: leads out of the data root {root} (links may with data.follow_links=true)")
    return path
