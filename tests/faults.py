"""Faults of disks and systems, injected into a process that then runs a command (see `tests.cli.Forks`)."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.cli import group_members


def full_at(target: str) -> None:
    """The disk is full for the file whose path ends in `target`, when it is flushed to the disk."""
    written = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode) and final_name(handle).endswith(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        written(handle)

    os.fsync = fsync  # type: ignore[assignment]


def note_writes(log: str) -> None:
    """Write the final path of every file that is flushed to the disk to `log`, one per line, in order."""
    written = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            with open(log, "a", encoding="utf-8") as stream:
                stream.write(final_name(handle) + "\n")
        written(handle)

    os.fsync = fsync  # type: ignore[assignment]


def final_name(handle: int) -> str:
    """The path that an open file has, or will have once its temporary name is gone."""
    path = Path(os.readlink(f"/proc/self/fd/{handle}"))
    if path.name.startswith("events.out.tfevents."):
        return str(path.with_name("events"))
    return str(path.with_name(path.name[1:].rsplit(".", 2)[0])) if path.suffix == ".tmp" else str(path)


def largest_file(size: int) -> None:
    """No file may grow beyond this many bytes: writing fails with EFBIG, as it does with EDQUOT at a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def blind(yes: bool) -> None:
    """Hide that the disk has too little space, so that it fills up in the middle of the work."""
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50)  # type: ignore[attr-defined]


def kill_a_worker(pattern: str) -> None:
    """Send SIGKILL to a worker of this process, as when memory runs out, once a file matches `pattern`."""

    def kill_one() -> None:
        while not any(Path().glob(pattern)):
            time.sleep(0.005)
        workers = [pid for pid in group_members(os.getpid()) if "spawn_main" in command_line(pid)]
        print("killed a worker", flush=True)
        os.kill(workers[0], signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()


def command_line(pid: int) -> str:
    """How a process was started."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def no_privileges(yes: bool) -> None:
    """File modes apply to root too, since every capability is dropped."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    if libc.capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def no_locks(yes: bool) -> None:
    """A file system on which locking is an error, and so is opening an HDF5 file with locks."""
    import fcntl

    import h5py

    def refused(*arguments: Any) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = fcntl.lockf = refused

    opened = h5py.File.__init__

    def init(self: Any, name: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(name, str | os.PathLike) and options.get("locking") is not False:
            raise OSError(errno.ENOLCK, "No locks available")
        opened(self, name, *arguments, **options)

    h5py.File.__init__ = init


def renames_within_folders(yes: bool) -> None:
    """Renaming a file into another folder is an error, as between file systems."""

    def watched(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def rename(source: Any, target: Any, **options: Any) -> None:
            if Path(source).resolve().parent != Path(target).resolve().parent:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            real(source, target, **options)

        return rename

    for name in ("replace", "rename", "link"):
        setattr(os, name, watched(name))


def stop_at(target_and_number: tuple[str, int]) -> None:
    """Send a signal when the file whose path ends in the target is flushed to the disk, before it gets its name."""
    target, number = target_and_number
    written = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode) and final_name(handle).endswith(target):
            os.kill(os.getpid(), number)
        written(handle)

    os.fsync = fsync  # type: ignore[assignment]


def stop_when_done(number: int) -> None:
    """Send a signal at the first line on standard output, which is a command's result."""
    import click

    say = click.echo

    def echo(message: Any = None, *more: Any, **options: Any) -> None:
        if not options.get("err"):
            os.kill(os.getpid(), number)
        say(message, *more, **options)

    click.echo = echo  # type: ignore[assignment]


def signal_at_line(line_and_number: tuple[int, int]) -> None:
    """Send a signal when `stream` has written this many lines to its files."""
    from live.outputs import LineFile

    line, number = line_and_number
    write, left = LineFile.write, [line]

    def counted(self: LineFile, frame: int, text: str) -> None:
        write(self, frame, text)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    LineFile.write = counted  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[Any], None]] = {
    fault.__name__: fault
    for fault in (
        full_at,
        note_writes,
        largest_file,
        blind,
        kill_a_worker,
        no_privileges,
        no_locks,
        renames_within_folders,
        stop_at,
        stop_when_done,
        signal_at_line,
    )
}


def is_alive(pid: int) -> bool:
    """Whether a process runs (Linux); one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
