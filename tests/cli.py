"""Commands in their own processes, run to the end or stopped at any moment; forked, or in a fresh interpreter."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
LIMIT_S = 280


def environment() -> dict[str, str]:
    """One thread, 80 columns, no default data root."""
    inherited = {name: value for name, value in os.environ.items() if name != "SURGSTAGE_DATA"}
    return {**inherited, **ONE_THREAD, "COLUMNS": "80"}


def run(arguments: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """`python pipeline.py ...` in `folder` to its end, in a fork of a process that has imported everything."""
    return shared_forks().complete(arguments, folder)


def run_fresh(arguments: Sequence[str | Path], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The same as a user starts it, under more variables: where what is imported, and when, is the point."""
    return subprocess.run(
        [sys.executable, str(PROJECT / "pipeline.py"), *map(str, arguments)],
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def succeed(arguments: Sequence[str | Path], folder: Path) -> str:
    """The same for a command that must succeed; all its output."""
    done = run(arguments, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@dataclass
class Command:
    """A running command in a process group of its own."""

    pid: int
    log: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code (negative: the signal that ended it), or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, timeout_s: float) -> int | None:
        """As `poll`, after at most so many seconds."""
        limit = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        return self.code

    def send(self, number: int, group: bool) -> None:
        """Send a signal to the process, or to its whole group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def end(self) -> None:
        """Kill every process of its group."""
        for process in group_members(self.pid):
            os.kill(process, signal.SIGKILL)
        self.wait(10)


def group_members(group: int) -> list[int]:
    """Running processes of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(folder.name))
    return found


def start_fresh(arguments: Sequence[str], folder: Path, log: Path) -> Command:
    """`python pipeline.py ...` as a user starts it."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, str(PROJECT / "pipeline.py"), *arguments],
            cwd=folder,
            env={**os.environ, **ONE_THREAD},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    process.returncode = 0  # `Command.poll` reaps it
    return Command(process.pid, log)


def start_forked(
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    prepare: Callable[[], None] = lambda: None,
    errors: Path | None = None,
) -> Command:
    """Run the same command line in a fork of this process, which has imported everything: saves three seconds per
    start.

    `prepare` runs first in the new process. Standard error goes to `log` too, or to `errors`. This process must not
    have started threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Command(pid, log)
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        _redirect(log, errors or log)
        prepare()
        code = _run(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # as an interpreter does at its end; releases semaphores
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(log: Path, errors: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for path, target in ((log, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), target)


def _run(arguments: Sequence[str]) -> int:
    import pipeline

    sys.argv = [str(PROJECT / "pipeline.py"), *arguments]  # commands with several devices start themselves again
    try:
        pipeline.main(arguments, "pipeline.py")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


class Forks:
    """A process that forks commands, for tests whose own process has started threads."""

    def __init__(self, **variables: str) -> None:
        self._variables = variables
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.cli"],
            cwd=PROJECT,
            env={**environment(), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: Sequence[str], folder: Path, **faults: Any) -> Ended:
        """Run a command line in `folder` to its end, under `faults` (names and values of `tests.faults.FAULTS`)."""
        log = folder.with_suffix(".log")
        log.unlink(missing_ok=True)
        code = self._code_of(arguments, folder, log, log, faults)
        return Ended(code, log.read_text(errors="replace"))

    def complete(self, arguments: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
        """The same without faults, and with the two outputs apart."""
        with tempfile.TemporaryDirectory(prefix="command-") as place:
            out, err = Path(place, "out"), Path(place, "err")
            code = self._code_of(arguments, folder, out, err, {})
            return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())

    def _code_of(
        self, arguments: Sequence[str | Path], folder: Path, out: Path, err: Path, faults: dict[str, Any]
    ) -> int:
        request = {
            "arguments": [str(argument) for argument in arguments],
            "folder": folder,
            "files": (out, err),
            "environment": {**environment(), **self._variables},
            "faults": faults,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request, default=str) + "\n")
        self._server.stdin.flush()
        code = json.loads(self._server.stdout.readline())
        assert code is not None, f"{arguments}: still running after {LIMIT_S} s"
        return int(code)

    def close(self) -> None:
        """End the process."""
        self._server.communicate()


@functools.cache
def shared_forks() -> Forks:
    """One process for all tests of this one; it ends when this one does."""
    forks = Forks()
    atexit.register(forks.close)
    return forks


@dataclass(frozen=True)
class Ended:
    """Exit code of a command and everything that it printed."""

    code: int
    output: str

    @property
    def last_line(self) -> str:
        return (self.output.strip().splitlines() or [""])[-1]


def _serve() -> None:
    import_everything()
    from tests.faults import FAULTS

    for line in sys.stdin:
        request = json.loads(line)

        def prepare(variables: dict[str, str] = request["environment"], faults: Any = request["faults"]) -> None:
            os.environ.clear()
            os.environ.update(variables)
            for name, value in faults.items():
                FAULTS[name](value)

        out, err = map(Path, request["files"])
        command = start_forked(request["arguments"], Path(request["folder"]), out, prepare, err)
        code = command.wait(LIMIT_S)
        command.end()
        print(json.dumps(code), flush=True)


def import_everything() -> None:
    """Import what the commands import when they run, so that forks have it."""
    os.environ.update(ONE_THREAD)
    import accelerate  # noqa: F401
    import av  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import matplotlib.patches  # noqa: F401
    import PIL.Image
    import plotly.graph_objects
    import plotly.offline  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import tensorboard.summary.writer.record_writer  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import features.dataset.catalogue
    import features.simulation  # noqa: F401
    import pipeline  # noqa: F401
    import stage1_cnn.extract
    import stage1_cnn.train  # noqa: F401
    import stage2_temporal.evaluate
    import stage2_temporal.joint.train
    import stage2_temporal.train  # noqa: F401

    PIL.Image.init()
    torch.set_num_threads(1)


if __name__ == "__main__":
    _serve()
