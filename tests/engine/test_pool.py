"""Processing many videos: failures, processes that die, and stopping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import UserError
from engine.launch import available_cores
from engine.pool import WORTH_A_PROCESS_FRAMES, Advance, choose_processes, work_through
from engine.stopping import Stopped, StopRequest
from tests.cli import PROJECT, group_members


@dataclass(frozen=True)
class Step:
    """A job whose name determines its behaviour."""

    name: str
    frames: int = 3


@dataclass
class Task:
    """Counts frames in a file; may fail, or kill its process."""

    folder: Path

    def __call__(self, job: Step, advance: Advance) -> None:
        for _ in range(job.frames):
            if job.name == "bad":
                raise UserError("bad.mp4: cannot be read")
            if job.name == "broken":
                raise RuntimeError("first line\nsecond line")
            if job.name == "deadly":
                os.kill(os.getpid(), signal.SIGKILL)
            if job.name == "slow":
                time.sleep(0.05)
            advance(1)
        (self.folder / job.name).write_text(str(os.getpid()))


@dataclass
class Importing(Task):
    """Takes forever to be unpickled in another process, like a task that imports torch on a busy machine."""

    def __setstate__(self, state: dict[str, Path]) -> None:
        (state["folder"] / "importing").touch()
        time.sleep(600)


@dataclass
class Marking:
    """Marks each job in one of two tensors."""

    views: tuple[Any, Any]

    def __call__(self, job: Step, advance: Advance) -> None:
        self.views[job.frames > 3].add_(1)
        advance(job.frames)


def outcomes(task: Any, jobs: list[Step], processes: int, stop: StopRequest | None = None) -> dict[str, str | None]:
    stop = StopRequest() if stop is None else stop
    return {job.name: reason for job, reason in work_through(task, jobs, processes, "test", stop)}


@pytest.mark.parametrize("processes", [1, 2])
def test_failures_are_reported_and_the_other_jobs_continue(tmp_path: Path, processes: int) -> None:
    jobs = [Step("a"), Step("bad"), Step("broken"), Step("b")]
    assert outcomes(Task(tmp_path), jobs, processes) == {
        "a": None,
        "bad": "bad.mp4: cannot be read",
        "broken": "RuntimeError: first line second line",
        "b": None,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert ({path.read_text() for path in tmp_path.iterdir()} == {str(os.getpid())}) == (processes == 1)


@pytest.mark.slow
def test_tensors_in_shared_memory_are_not_copied_into_each_process() -> None:
    import torch

    shared = torch.zeros(2).share_memory_()
    views = (shared[:1], shared[1:])  # as two tables may have labels in common
    assert outcomes(Marking(views), [Step("a", 3), Step("b", 4)], 2) == {"a": None, "b": None}
    assert shared.tolist() == [1, 1]


def test_a_python_without_a_pickler_for_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are copied then."""
    monkeypatch.setattr("engine.pool.reduction", SimpleNamespace())
    assert outcomes(Task(tmp_path), [Step("a"), Step("b")], 2) == {"a": None, "b": None}


def test_a_bug_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        outcomes(Task(tmp_path), [None], 1)  # type: ignore[list-item]


def test_a_process_that_dies_affects_only_its_own_video(tmp_path: Path) -> None:
    jobs = [Step("a"), Step("deadly"), Step("slow", 20), Step("b"), Step("c")]
    found = outcomes(Task(tmp_path), jobs, 2)
    assert found.pop("deadly") == "the process that worked on it died (out of memory, or killed)"
    assert found == {"a": None, "slow": None, "b": None, "c": None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "slow"]


@pytest.mark.parametrize("processes", [1, 2])
def test_stopping(tmp_path: Path, processes: int) -> None:
    class Soon(StopRequest):
        def raise_if_set(self) -> None:
            if list(tmp_path.iterdir()):
                self.number = signal.SIGTERM
            super().raise_if_set()

    with pytest.raises(Stopped):
        outcomes(Task(tmp_path), [Step("a"), *(Step("slow", 1000) for _ in range(3))], processes, Soon())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # and no slow job was waited for


# A command whose processes are busy for longer than any test: with imports, with a video, or with a batch.
BUSY = """
import os, sys, time
from pathlib import Path

import torch

from engine.stopping import StopRequest
from stage1_cnn.data import FrameLoader
from engine.pool import work_through
from tests.engine.test_pool import Step


def be_busy():
    Path(sys.argv[2]).write_text(f"{os.getpid()} ")
    time.sleep(600)


class Importing:
    def __setstate__(self, state):
        be_busy()

    def __getstate__(self):
        return {"nothing": 0}


class Working:
    def __call__(self, job, advance):
        be_busy()


class Loading(torch.utils.data.Dataset):
    def __getitem__(self, request):
        be_busy()


if __name__ == "__main__":
    if sys.argv[1] == "Loading":
        with FrameLoader(Loading(), 1, torch.device("cpu"), StopRequest()) as loader:
            list(loader.batches([0]))
    else:
        list(work_through(globals()[sys.argv[1]](), [Step("a"), Step("b")], 2, "test", StopRequest()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Importing", "Working", "Loading"])
def test_processes_end_when_the_one_they_work_for_was_killed(tmp_path: Path, kind: str) -> None:
    program, mark = tmp_path / "busy.py", tmp_path / "mark"
    program.write_text(BUSY)
    command = subprocess.Popen(
        [sys.executable, str(program), kind, str(mark)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        start_new_session=True,
    )
    try:
        wait_until(lambda: mark.exists() and mark.read_text().endswith(" "))
        command.kill()
        command.wait()
        wait_until(lambda: group_members(command.pid) == [])
    finally:
        for pid in group_members(command.pid):
            os.kill(pid, signal.SIGKILL)


def wait_until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 280
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_stopping_while_processes_import(tmp_path: Path) -> None:
    class Then(StopRequest):
        def raise_if_set(self) -> None:
            if (tmp_path / "importing").exists():
                self.number = signal.SIGTERM
            super().raise_if_set()

    with pytest.raises(Stopped):
        outcomes(Importing(tmp_path), [Step("a"), Step("b")], 2, Then())


def test_number_of_processes() -> None:
    many = [Step("a", WORTH_A_PROCESS_FRAMES)] * 100
    assert choose_processes(-1, many) == available_cores()
    assert choose_processes(-1, [Step("a", 10)] * 5) == 1
    assert choose_processes(4, [Step("a", 10)] * 3) == 3
    assert choose_processes(0, many) == 1
    assert choose_processes(-1, []) == 1
