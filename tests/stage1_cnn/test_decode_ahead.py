"""One process computes, others decode: when one of them dies, when a video fails, and when the disk is full."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from configs.errors import UserError
from configs.schema import Config
from engine.files import NoRoomError
from engine.stopping import Stopped, StopRequest
from features.frames.source import SampledFrames
from stage1_cnn.decode_ahead import decoders_for, frames_of_videos, work_ahead
from stage1_cnn.decoding import decoding_processes
from stage1_cnn.segments import VideoJob
from stage1_cnn.shared_decode import Seconds, SharedJob
from tests.cli import PROJECT
from tests.stage1_cnn.test_data import Meeting

FRAMES = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)


class Task:
    """Raises a given error at a given step; notes the steps."""

    config = Config()

    def __init__(self, where: str = "", error: Exception | None = None) -> None:
        self._where, self._error, self.noted = where, error, list[str]()
        self.encoders, self.seconds = [self], Seconds(2, 1)

    def source(self, job: SharedJob) -> Any:
        return partial(numbered_frames, 0)

    def sizes(self, encoders: Any) -> Any:
        return [self.config.preprocess], [0]

    def labels(self, job: SharedJob) -> None:
        self._step("labels")

    def _step(self, name: str) -> None:
        self.noted.append(name)
        if name == self._where and self._error is not None:
            raise self._error

    def __call__(self, job: SharedJob, advance: Any) -> None:
        self._step(job.video.video_id)

    def write(self, job: VideoJob, labels: None, provenance: Any) -> Generator[None, Any, None]:
        self._step("opened")
        try:
            while (yield) is not None:
                self._step("appended")
            self._step("finished")
        except BaseException:  # as the sinks of files do
            self.noted.append("removed")
            raise
        yield


def shared(video_id: str, frames: int, labels_only: bool = False) -> SharedJob:
    return SharedJob(0, ((0, VideoJob(video_id, frames, labels_only)),))


def outcomes(task: Task, messages: Any) -> list[tuple[str, str | None]]:
    """The outcome of two videos when decoding processes send these messages."""
    jobs = [shared("video01", 1), shared("video02", 1)]
    work = work_ahead(task, jobs, 1, "test", StopRequest(), decode=lambda *_: messages)
    return [(job.video.video_id, reason) for job, reason in work]


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
    again = ["labels", "opened", "appended", "appended", "finished"]  # 8 and 4 frames, decoded by this process
    assert task.noted == ["labels", "opened", "appended", "finished", *again]


def test_waiting_for_frames_counts_but_not_the_start_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("stage1_cnn.decode_ahead.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def messages() -> Iterator[tuple[int, Any]]:
        clock[0] += 7
        for number, message in whole():
            yield number, message
            clock[0] += 1

    task = Task()
    outcomes(task, messages())
    assert task.seconds.of(0)[0] == 5  # of six messages


def test_no_unfinished_file_is_left() -> None:
    def messages() -> Iterator[tuple[int, Any]]:
        yield from [(0, {"reader": "x"}), (1, {"reader": "x"}), (1, FRAMES), (0, "video01.mp4: damaged")]

    task = Task()
    assert outcomes(task, messages()) == [("video01", "video01.mp4: damaged"), ("video02", None)]
    begun = ["labels", "opened", "labels", "opened", "appended"]
    again = ["labels", "opened", "appended", "appended", "finished"]
    assert task.noted == [*begun, "removed", "removed", *again]


def test_a_stop_leaves_no_unfinished_file() -> None:
    def messages() -> Iterator[tuple[int, Any]]:
        yield 0, {"reader": "x"}
        yield 0, FRAMES
        stop.number = signal.SIGTERM
        yield 0, FRAMES

    stop, task = StopRequest(), Task()
    with pytest.raises(Stopped):
        list(work_ahead(task, [shared("video01", 2)], 1, "test", stop, decode=lambda *_: messages()))
    assert task.noted == ["labels", "opened", "appended", "removed"]


def test_jobs_without_frames_need_no_decoding_process() -> None:
    task, job = Task(), shared("video01", 0, labels_only=True)
    work = work_ahead(task, [job], 1, "test", StopRequest(), decode=lambda *_: 1 / 0)
    assert [(job.video.video_id, reason) for job, reason in work] == [("video01", None)]
    assert task.noted == ["video01"]


@pytest.mark.parametrize("where", ["labels", "opened", "appended", "finished"])
def test_a_full_disk_ends_the_work_and_other_errors_their_video(where: str) -> None:
    with pytest.raises(NoRoomError):
        outcomes(Task(where, NoRoomError("store: no room left")), whole())
    found = outcomes(Task(where, UserError("labels.txt: cannot be read")), whole())
    assert found == [("video01", "labels.txt: cannot be read"), ("video02", "labels.txt: cannot be read")]


def test_labels_are_read_before_a_file_is_opened() -> None:
    task = Task("labels", UserError("labels.txt: cannot be read"))
    outcomes(task, whole())
    assert task.noted == ["labels", "labels"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: illegal")])
def test_an_error_of_the_gpu_ends_the_work(error: Exception) -> None:
    """The next video would fail as this one did."""
    task = Task("appended", error)
    with pytest.raises(type(error), match="CUDA"):
        outcomes(task, (message for message in [(0, {}), (0, FRAMES), (1, {}), (1, FRAMES)]))
    assert task.noted.count("opened") == 1
    assert "removed" in task.noted


def counts_of_processes(wanted: int, dying: int) -> list[int]:
    """With how many decoding processes the work is tried if one dies at the first `dying` tries."""
    tried: list[int] = []

    def decode(videos: Any, batch_frames: int, decoders: int, pinned: bool) -> Iterator[tuple[int, Any]]:
        tried.append(decoders)
        yield 0, {"reader": "x"}
        if len(tried) <= dying:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error")
        yield 0, FRAMES
        yield 0, None

    work = work_ahead(Task(), [shared("video01", 1)], wanted, "test", StopRequest(), decode=decode)
    assert [(job.video.video_id, reason) for job, reason in work] == [("video01", None)]
    return tried


def test_half_of_the_processes_continue_when_one_has_died(capsys: pytest.CaptureFixture[str]) -> None:
    assert counts_of_processes(8, dying=1) == [8, 4]
    assert "Bus error); continuing with 4 instead of 8 decoding processes" in capsys.readouterr().err
    assert counts_of_processes(2, dying=9) == [2, 1]
    assert "continuing without decoding processes" in capsys.readouterr().err


def test_no_more_processes_than_shared_memory_has_room_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = 8 * 250 * 250 * 3
    for free, ranks, count in ((10**12, 1, 16), (5 * 5 * batch, 1, 5), (5 * 5 * batch, 2, 2), (batch, 1, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert counts_of_processes(16, dying=0) == [count]
        said = capsys.readouterr().err
        assert (f"/dev/shm has room for {count} of 16 decoding processes" in said) == (count < 16)


def test_few_processes_decode_on_hardware_unless_a_number_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.pool.available_cores", lambda: 64)
    for extract, count in (
        ({}, 64),
        ({"hardware_decoding": "cuda"}, 4),
        ({"hardware_decoding": "cuda", "workers": 9}, 9),
    ):
        config = Config.model_validate({"extract": extract})
        assert decoders_for(config, 10_000) == count


@contextmanager
def numbered_frames(video: int, awaited: Path | None = None) -> Iterator[SampledFrames]:
    """Twelve frames of one pixel that hold their number; from the fourth on once a file exists, or after a minute."""

    def frames() -> Iterator[np.ndarray]:
        until = time.monotonic() + 60
        for number in range(12):
            while number > 3 and awaited and not awaited.exists() and time.monotonic() < until:
                time.sleep(0.02)
            yield np.full((1, 1, 3), number, np.uint8)

    yield SampledFrames(frames(), {"video": str(video)})


@pytest.mark.slow
def test_a_slow_process_does_not_hold_back_the_others(tmp_path: Path) -> None:
    released = tmp_path / "released"
    videos = [partial(numbered_frames, 0, released), *(partial(numbered_frames, video) for video in range(1, 6))]
    ended, seen = list[int](), dict[int, list[Any]]()
    begun = time.monotonic()
    for video, message in decoding_processes(videos, 2, 2, pinned=False):
        seen.setdefault(video, []).append(message)
        if message is None:
            ended.append(video)
        if set(ended) == {1, 2, 3, 4, 5}:
            released.touch()
    assert ended == [1, 2, 3, 4, 5, 0]
    assert time.monotonic() - begun < 60
    for video, (origin, *batches, end) in seen.items():  # in order
        assert (origin, end) == ({"video": str(video)}, None)
        assert list(itertools.chain(*(batch[:, 0, 0, 0].tolist() for batch in batches))) == list(range(12))


@contextmanager
def damaged() -> Iterator[SampledFrames]:
    raise UserError("video03.mp4: damaged")
    yield


@contextmanager
def deadly(once: Path) -> Iterator[SampledFrames]:
    """Ends its process after the first frames, the first time."""

    def frames() -> Iterator[np.ndarray]:
        for number in range(12):
            if number == 5 and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield np.full((1, 1, 3), number, np.uint8)

    yield SampledFrames(frames(), {"video": "deadly"})


def ahead(choice: str) -> Config:
    return Config.model_validate(
        {"device": "cpu", "extract": {"decode_ahead": choice, "workers": 2, "batch_frames": 5}}
    )


def content(messages: Iterator[tuple[int, Any]]) -> dict[int, list[Any]]:
    """What each video's messages say, from its last beginning on."""
    seen: dict[int, list[Any]] = {}
    for video, message in messages:
        if isinstance(message, dict):
            seen[video] = []
        said = message[:, 0, 0, 0].tolist() if isinstance(message, torch.Tensor) else message
        seen.setdefault(video, []).append(said)
    return seen


def no_process_is_left() -> bool:
    """Whether all decoding processes end; torch waits 5 s for each, which may be too short on a busy machine."""
    until = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < until:
        time.sleep(0.02)
    return not multiprocessing.active_children()


def test_videos_are_decoded_in_turn_on_a_cpu() -> None:
    videos = [partial(numbered_frames, video) for video in range(2)]
    batches = [list(range(5)), list(range(5, 10)), [10, 11]]
    expected = [[{"video": str(video)}, *batches, None] for video in range(2)]
    assert content(frames_of_videos(videos, ahead("auto"), 24)) == dict(enumerate(expected))
    unwanted: set[int] = set()
    messages = frames_of_videos(videos, ahead("auto"), 24, unwanted)
    next(messages)
    unwanted.add(0)
    assert {video for video, _ in messages} == {1}


@pytest.mark.slow
def test_videos_decoded_ahead_give_the_same_and_leave_no_process(tmp_path: Path) -> None:
    videos = [*(partial(numbered_frames, video) for video in range(4)), damaged]
    expected = content(frames_of_videos(videos, ahead("off"), 60))
    assert expected[4] == ["video03.mp4: damaged"]
    assert content(frames_of_videos(videos, ahead("on"), 60)) == expected
    assert no_process_is_left()
    messages = frames_of_videos(videos, ahead("on"), 60)
    next(messages)
    assert multiprocessing.active_children()
    messages.close()
    assert no_process_is_left()


@pytest.mark.slow
def test_a_process_that_died_leaves_no_traceback_of_a_destructor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's handler of SIGCHLD may raise its error while the other processes are ended."""
    shut_down, ended = _MultiProcessingDataLoaderIter._shutdown_workers, list[bool]()

    def interrupted(iterator: Any) -> None:
        shut_down(iterator)
        ended.append(True)
        if len(ended) == 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", interrupted)
    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    messages = frames_of_videos([partial(numbered_frames, 0)], ahead("on"), 12)
    next(messages)
    messages.close()
    assert ended
    assert printed == []
    assert no_process_is_left()


@pytest.mark.slow
def test_a_video_begins_again_after_its_process_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = [partial(numbered_frames, 0), partial(deadly, tmp_path / "once"), partial(numbered_frames, 2)]
    found = content(frames_of_videos(videos, ahead("on"), 36))
    assert (tmp_path / "once").exists()
    assert found == content(frames_of_videos(videos, ahead("off"), 36))
    assert "continuing with 1 instead of 2 decoding processes" in capsys.readouterr().err
    assert no_process_is_left()


@contextmanager
def opened(meeting: Meeting, ballast: np.ndarray) -> Iterator[SampledFrames]:
    yield SampledFrames(iter([np.full((1, 1, 3), meeting.complete, np.uint8)]), {})


@pytest.mark.slow
def test_decoding_processes_start_at_the_same_time(tmp_path: Path) -> None:
    videos = [partial(opened, Meeting(tmp_path), np.zeros(1 << 20, np.uint8))] * 2
    messages = content(iter(decoding_processes(videos, 1, 2, pinned=False)))
    assert messages == {0: [{}, [1], None], 1: [{}, [1], None]}


@pytest.mark.slow
def test_decoding_processes_do_not_import_what_computes() -> None:
    """Which would double the time that each takes to start."""
    program = (
        "import sys, stage1_cnn.decoding; print({'torchvision', 'torch._dynamo', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
