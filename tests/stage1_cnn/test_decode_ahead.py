"""One process computes, others decode: when one of them dies, when a video fails, and when the disk is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.schema import Config
from engine.files import NoRoomError
from engine.stopping import StopRequest
from features.dataset.index import Index
from stage1_cnn.decode_ahead import work_ahead
from stage1_cnn.segments import VideoJob

FRAMES = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)


class Task:
    """Raises a given error at a given step; notes the steps."""

    config, index, root = Config(), Index.model_construct(videos=()), Path()

    def __init__(self, where: str = "", error: Exception | None = None) -> None:
        self._where, self._error, self.noted = where, error, list[str]()

    def _step(self, name: str) -> None:
        self.noted.append(name)
        if name == self._where and self._error is not None:
            raise self._error

    def __call__(self, job: VideoJob, advance: Any) -> None:
        self._step(job.video_id)

    def labels_and_room(self, job: VideoJob) -> None:
        self._step("required")

    @contextmanager
    def sink(self, job: VideoJob, labels: None, provenance: Any) -> Iterator[Any]:
        self._step("opened")
        try:
            yield self
            self._step("finished")
        except Exception:
            self.noted.append("removed")
            raise

    def encode(self, frames: torch.Tensor, rows: Any) -> None:
        self._step("appended")


def outcomes(task: Task, messages: Any) -> list[tuple[str, str | None]]:
    """The outcome of two videos when decoding processes send these messages."""
    jobs = [VideoJob("video01", 1), VideoJob("video02", 1)]
    work = work_ahead(task, jobs, 1, "test", StopRequest(), pinned=False, decode=lambda *_: messages)
    return [(job.video_id, reason) for job, reason in work]


def whole() -> Iterator[tuple[int, Any]]:
    for number in (0, 1):
        for message in ({"reader": "x"}, FRAMES, None):
            yield number, message


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError("reset"), RuntimeError("DataLoader worker (pid 7) exited")]
)
def test_the_work_continues_without_a_decoding_process_that_died(error: Exception) -> None:
    def messages() -> Iterator[tuple[int, Any]]:
        for number, message in whole():
            if number == 1:
                raise error
            yield number, message

    task = Task()
    assert outcomes(task, messages()) == [("video01", None), ("video02", None)]
    assert task.noted == ["required", "opened", "appended", "finished", "video02"]


def test_no_unfinished_file_is_left() -> None:
    def messages() -> Iterator[tuple[int, Any]]:
        yield from [(0, {"reader": "x"}), (1, {"reader": "x"}), (1, FRAMES), (0, "video01.mp4: damaged"), (0, None)]

    task = Task()
    assert outcomes(task, messages()) == [("video01", "video01.mp4: damaged"), ("video02", None)]
    assert task.noted == ["required", "opened", "required", "opened", "appended", "removed", "removed", "video02"]


@pytest.mark.parametrize("where", ["required", "opened", "appended", "finished"])
def test_a_full_disk_ends_the_work_and_other_errors_their_video(where: str) -> None:
    with pytest.raises(NoRoomError):
        outcomes(Task(where, NoRoomError("store: no room left")), whole())
    found = outcomes(Task(where, UserError("labels.txt: cannot be read")), whole())
    assert found == [("video01", "labels.txt: cannot be read"), ("video02", "labels.txt: cannot be read")]


def test_labels_and_room_are_checked_before_a_file_is_opened() -> None:
    task = Task("required", UserError("labels.txt: cannot be read"))
    outcomes(task, whole())
    assert task.noted == ["required", "required"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: illegal")])
def test_an_error_of_the_gpu_ends_the_work(error: Exception) -> None:
    """The next video would fail as this one did."""
    task = Task("appended", error)
    with pytest.raises(type(error), match="CUDA"):
        outcomes(task, iter([(0, {}), (0, FRAMES), (1, {}), (1, FRAMES)]))
    assert task.noted.count("opened") == 1
    assert "removed" in task.noted
