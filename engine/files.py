"""Writing files so that a name without `.tmp` is always whole, and knowing files by their content.

Every file the project writes goes through `atomic_path`: temporary file in the same folder (unique per process, so two
writers of one file are harmless and no lock is needed), close, fsync, `os.replace`, fsync of the folder.
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
# Far above any index, label or result; the memory that a JSON file takes is a small multiple of its size.
MAX_JSON_BYTES = 64 << 20
_READ_BYTES = 1 << 20
# What a system answers when there is no room: a full disk, a quota, a file-size limit.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a file system without locks answers (Lustre mounted without `flock`, NFS without a lock service).
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Systems that cannot open a folder are left alone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse fsync on folders; the rename itself stays atomic
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Force the content of a closed file to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents. Raises UserError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot create this folder ({error.strerror}); choose another one") from error
    return folder


class NoRoomError(UserError):
    """The disk is full: whatever else is waiting to be written would meet the same."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it becomes `path`, otherwise it is removed.

    The body writes and closes the file (and may reopen it to check it). Any exception, Ctrl-C included, leaves `path`
    as it was. What dead writers left of the same file goes when it is whole. Raises UserError when the disk is full or
    the folder cannot be written.
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
        raise as_user_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """A name beside `path` that nobody else has, and that says which process it belongs to.

    Whoever makes the file removes it; `remove_stale_temporaries` does when that process is dead.
    """
    return path.with_name(f".{_stem(path)}.{process_mark()}-{uuid.uuid4().hex[:8]}.tmp")


def _stem(path: Path) -> str:
    return path.name.encode()[:120].decode(errors="ignore")  # names have 255 bytes at most


def as_user_error(error: OSError, path: Path) -> Exception:
    """What a failed write means to the user; errors that are not the user's to mend come back unchanged."""
    if is_no_room(error):
        return NoRoomError(f"{path}: no room left on the disk; free some or choose another folder")
    if isinstance(error, IsADirectoryError) or error.errno == errno.ENAMETOOLONG:
        what = "is a folder" if isinstance(error, IsADirectoryError) else "its name is too long"
        return UserError(f"{path}: cannot be written: {what}; choose another place or name")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return UserError(f"{path}: not allowed to write here; choose another folder")
    return error


def is_no_room(error: BaseException) -> bool:
    """Whether an OSError (h5py's included, which only carry the number in their text) says the disk is full."""
    if not isinstance(error, OSError):
        return False
    if error.errno in _NO_ROOM:
        return True
    return error.errno is None and any(f"errno = {number}," in str(error) for number in _NO_ROOM)


def remove_stale_temporaries(folder: Path, older_than_s: float = 3600.0, of: str = "") -> int:
    """Delete the temporary files that killed writers left in `folder`, of all files or of one; returns how many.

    A file goes at once when its writer ran here (same boot, same process namespace) and is dead, and otherwise when
    nobody has touched it for `older_than_s`: on a shared file system a process number of another machine says nothing,
    but a writer that still runs writes all the time.
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
    """Short name of what process numbers here belong to: machine, boot and process namespace."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    except OSError:
        parts.append(uuid.uuid4().hex)  # not known here: never take another process for one of ours
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:8]


def process_mark() -> str:
    """What to leave on something this process has in work, for `process_is_dead` to ask about later."""
    return f"{_place()}-{os.getpid()}"


def process_is_dead(mark: str) -> bool:
    """Whether the process that left `mark` ran here (same boot, same process namespace) and runs no more."""
    place, _, rest = mark.partition("-")
    number = rest.partition("-")[0]
    if place != _place() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
        # one that nobody has waited for answers signals, and in a container without an init process it does so for good
        return Path(f"/proc/{number}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, ValueError):
        return False


@contextmanager
def sole_worker(folder: Path, what: str) -> Iterator[None]:
    """Let one process at a time work in `folder`; raises UserError naming `what` and the process where another does.

    The lock is the kernel's on the file `.lock`, which stays: a process that is killed loses it at that moment, and no
    process ever judges from a file whether another lives. Where the file system has no locks, a warning says so.
    """
    lock, note = FileLock(make_folder(folder) / ".lock", timeout=0), folder / "in-work"
    try:
        lock.acquire()
    except Timeout:
        holder = "just started"
        with suppress(OSError):
            holder = note.read_text(errors="replace")[:200]
        raise UserError(
            f"{folder}: another process works on this {what} ({holder}); wait for it, or give --name for another"
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter is how filelock before 3.29 says ENOSYS
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            known = as_user_error(error, folder / ".lock")
            if not isinstance(known, UserError):
                hint = "delete it, or give --name for another"
                known = UserError(f"{folder / '.lock'}: cannot be locked ({error.strerror}); {hint}")
            raise known from error
        warnings.warn(f"{folder}: no locks on this file system; start no second process on this {what}", stacklevel=3)
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
    """Write JSON atomically: sorted nowhere (order is meaning), indented, NaN refused (JSON has none)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # NumPy and torch scalars
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def require_replaceable_json(path: Path) -> None:
    """Raise UserError where `path`, given for results, holds something else than results written before."""
    if path.exists() and (path.is_dir() or not path.read_bytes()[:1].startswith(b"{")):
        raise UserError(f"{path}: exists and holds no results; give another file")


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """A file's bytes. Raises UserError when it is missing, unreadable, or larger than any such file is."""
    try:
        with path.open("rb") as stream:
            content = stream.read(most_bytes + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(content) > most_bytes:
        raise UserError(f"{path}: larger than {most_bytes:,} bytes, which no such file is; name another")
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises UserError for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged: holds no JSON object; delete it or restore it")
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError when it is missing, unreadable, too large or not JSON."""
    content = read_bounded(path, MAX_JSON_BYTES)
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError too
        raise UserError(f"{path}: not a JSON file ({error})") from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a whole file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_ends(path: Path) -> str:
    """SHA-256 over size, first and last MiB of a file: cheap on a 2 GB video, and enough to notice a replacement."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(HASH_SPAN_BYTES))
        if size > HASH_SPAN_BYTES:
            stream.seek(max(HASH_SPAN_BYTES, size - HASH_SPAN_BYTES))
            digest.update(stream.read(HASH_SPAN_BYTES))
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON-able value in one canonical spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def require_free_bytes(folder: Path, needed: int, purpose: str) -> None:
    """Raise UserError before the work starts when `folder` has not `needed` bytes free."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed:
        raise NoRoomError(
            f"{folder}: {purpose} needs about {needed / 1e6:,.0f} MB and only {free / 1e6:,.0f} MB are free; "
            "free some or choose another folder"
        )


def below_root(message: str, root: Path) -> str:
    """A message whose paths begin at the data root: a file that keeps it can move with the data."""
    return message.replace(f"{root}{os.sep}", "")


class LinkedRoot(type(Path())):  # type: ignore[misc]
    """A data root whose links may lead out of it, as the user's settings allow (`data.follow_links`).

    The permission is the root's own: no path that a file names can carry it, and a copy as a plain `Path` loses it.
    """


def inside(root: Path, relative: str) -> Path:
    """The path `relative` below `root`; UserError when it is absolute, climbs out or is a link that leads out.

    Below a `LinkedRoot` a link may lead out; what is absolute or climbs may not.
    """
    if Path(relative).is_absolute() or "\x00" in relative:
        raise UserError(f"{relative!r}: paths in an index are relative to the data root")
    if isinstance(root, LinkedRoot) and ".." in Path(relative).parts:
        raise UserError(f"{relative!r}: leads out of the data root {root}")
    path = root / relative
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a link that points to itself
        raise UserError(f"{relative!r}: cannot be followed below {root} ({error})") from error
    if not (isinstance(root, LinkedRoot) or target.is_relative_to(root.resolve())):
        raise UserError(f"{relative!r}: leads out of the data root {root} (links may with data.follow_links=true)")
    return path
