"""Hostile input is read in a child whose time, memory and actions are monitored, as C code cannot be interrupted.

One child reads many inputs. The parent gives each 10 s of processor time, or a minute of waiting, and ends a child that
has not answered by then (with wall-clock time, other work on the machine would make inputs fail); the child's memory
is compared before and after (`MEMORY_BOUND_BYTES`), and an audit hook notes programs started, sockets opened and files
written outside its own folder. A parser keeps its promise if it returns, or raises UserError with a message of one
printable line.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from configs.errors import UserError
from tests.fuzz.parsers import PARSERS

TIME_LIMIT_S = 10.0
WAITING_LIMIT_S = 60.0
START_LIMIT_S = 120.0
# The memory that one input may add to a process that has read valid ones; inputs have at most a few hundred kB.
MEMORY_BOUND_BYTES = 512 << 20
# Above this limit an allocation fails in the child instead of exhausting the machine.
ADDRESS_SPACE_BYTES = 4 << 30


@dataclass(frozen=True)
class Finding:
    """A broken promise: which input broke it, and how."""

    parser: str
    content: bytes
    what: str


class Child:
    """A process that reads inputs of one kind; started again after it had to be ended."""

    def __init__(self, parser: str) -> None:
        self.parser = parser
        self._process: Any = None
        self._pipe: Any = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None  # this process removes it: the other is killed
        self.refused = 0

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def read(self, content: bytes) -> str | None:
        """What went wrong in reading `content`, or None."""
        if self._process is None:
            self._start()
        self._pipe.send_bytes(content)
        if not self._answers():
            self._end()
            return f"no answer within {TIME_LIMIT_S:g} s"
        try:
            answer = self._pipe.recv_bytes().decode("utf-8", "replace")
        except EOFError:
            code = self._process.exitcode if self._process.join(5) is None else None
            self._end()
            return f"the process died (exit code {code})"
        self.refused += answer == "refused"
        if answer in ("read", "refused"):
            return None
        self._end()  # its effects on the process must not be attributed to the next input
        return answer

    def _answers(self) -> bool:
        """Wait for an answer as long as an input may take."""
        used_s, started = _processor_s(self._process.pid), time.monotonic()
        while not self._pipe.poll(0.25 * TIME_LIMIT_S):
            late = time.monotonic() - started > WAITING_LIMIT_S
            if late or _processor_s(self._process.pid) - used_s > TIME_LIMIT_S:
                return False
        return True

    def _start(self) -> None:
        context = get_context("forkserver")  # forks of a process that has done the slow imports
        context.set_forkserver_preload(["torch", "h5py", "av", "PIL.Image", "tests.fuzz.harness"])
        self._pipe, theirs = context.Pipe()
        self.folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        self._process = context.Process(target=_serve, args=(self.parser, theirs, self.folder.name), daemon=True)
        self._process.start()
        theirs.close()
        answer = self._pipe.recv_bytes() if self._pipe.poll(START_LIMIT_S) else b"not started"
        if answer != b"ready":
            self._end()
            raise RuntimeError(f"the process that reads {self.parser}: {answer.decode()}")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self.folder.cleanup()
        self._process = self._pipe = self.folder = None


# ---------------------------------------------------------------------------------------------- in the child


class _Watch:
    """Notes what reading a file must never do."""

    STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")

    def __init__(self, folder: str) -> None:
        self.folder, self.seen, self.armed = folder, "", False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in self.STARTS:
            self.seen = self.seen or event
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
            if path and not path.startswith((self.folder, "/dev/null")):
                self.seen = self.seen or f"wrote to {path!r}"


def _serve(name: str, pipe: Any, folder: str) -> None:
    parser = PARSERS[name]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # messages of libraries
    watch = _Watch(folder)
    path = Path(folder) / parser.file_name
    read = parser.prepare(Path(folder))
    for content in parser.seeds():
        if (answer := _attempt(read, path, content)) != "read":
            pipe.send_bytes(f"a valid file: {answer}".encode())
            return
    limit = _address_space_bytes() + ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send_bytes(b"ready")
    while True:
        content = pipe.recv_bytes()
        _forget_peak()
        before = _peak_bytes()
        watch.armed = True
        answer = _attempt(read, path, content)
        watch.armed = False
        if watch.seen:
            answer = f"not only read: {watch.seen}"
        grown = _peak_bytes() - before
        if grown > MEMORY_BOUND_BYTES:
            answer = f"took {grown >> 20} MiB of memory"
        pipe.send_bytes(answer.encode("utf-8", "backslashreplace"))


def _attempt(read: Any, path: Path, content: bytes) -> str:
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        text = str(error)
        return "refused" if text and text.isprintable() else f"a message of more than a printable line: {text!r}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    return "read"


def _processor_s(pid: int) -> float:
    """The processor time of a process in seconds; infinite if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _forget_peak() -> None:
    """Reset the peak memory, so that one input's does not hide the next one's; possible on Linux only."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
