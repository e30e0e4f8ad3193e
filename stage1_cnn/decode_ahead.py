"""Processes that only decode, for one that computes: how a GPU is fed.

PyTorch's DataLoader is the bounded queue: its workers are processes that are watched, and it pins memory. Each worker
takes the next video (or part) that nobody has, and sends resized frames; cropping, scaling and the net are the
device's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from configs.schema import Config
from engine.files import NoRoomError
from engine.pool import VIDEO_ERRORS, Advance, failure_reason, serve_parent, work_through
from engine.progress import progress_bar, say
from engine.stopping import StopRequest
from features.dataset.index import Index
from features.frames.source import encoded_at_once, frame_batches, open_frames
from stage1_cnn.segments import Rows, VideoJob

# Batches that wait for the device, a decoding process.
QUEUE_BATCHES = 4
# What a decoding process says of a job: its frames come from (a dict), frames (a tensor), it has ended (None), or the
# reason why it failed (a string).
Message = dict[str, str] | torch.Tensor | str | None


class Encodes(Protocol):
    """The task of extraction as this module needs it."""

    config: Config
    index: Index
    root: Path

    def __call__(self, job: VideoJob, advance: Advance) -> None: ...

    def require_sound_labels_and_room(self, job: VideoJob) -> None: ...

    def sink(self, job: VideoJob, provenance: dict[str, str]) -> AbstractContextManager[Rows]: ...

    def encode(self, pictures: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...


class _DecodedFrames(IterableDataset[tuple[int, Message]]):
    """What one decoding process gives: messages about jobs, those of a job in order."""

    def __init__(self, config: Config, index: Index, root: Path, jobs: Sequence[VideoJob], taken: Any) -> None:
        self._config, self._index, self._root = config, index, root
        self._jobs = list(jobs)
        self._taken = taken  # how many jobs have been taken by anybody

    def __iter__(self) -> Iterator[tuple[int, Message]]:
        while (number := self._take()) < len(self._jobs):
            try:
                for message in self._messages(self._jobs[number]):
                    yield number, message
                yield number, None
            except VIDEO_ERRORS as error:
                yield number, failure_reason(error)

    def _take(self) -> int:
        with self._taken.get_lock():
            self._taken.value += 1
            return int(self._taken.value) - 1

    def _messages(self, job: VideoJob) -> Iterator[Message]:
        entry = self._index.entry(job.video_id)
        with open_frames(self._config, entry, self._root, self._index, job.samples) as pictures:
            yield pictures.provenance
            for batch in frame_batches(pictures.frames, encoded_at_once(self._config)):
                yield torch.from_numpy(batch)


@dataclass
class _Open:
    """A job whose frames arrive."""

    job: VideoJob
    sink: AbstractContextManager[Rows] | None = None
    rows: Rows | None = None

    def leave(self, error: BaseException | None) -> None:
        """Finish the file, or with an error drop it."""
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.__exit__(type(error) if error else None, error, None)


def work_ahead(
    task: Encodes, jobs: Sequence[VideoJob], decoders: int, title: str, stop: StopRequest, *, pinned: bool
) -> Generator[tuple[VideoJob, str | None], None, None]:
    """Do the jobs in this process with frames that `decoders` others decode; yields as `work_through` does.

    Where one of them dies, this process goes on alone with what is left. Raises Stopped when asked to stop,
    and NoRoomError when the disk is full.
    """
    with_frames = [job for job in jobs if not job.labels_only]
    left = list(jobs)
    try:
        for job, reason in _fed(task, with_frames, decoders, title, stop, pinned):
            left.remove(job)
            yield job, reason
    except _DecoderDied as error:
        say(f"{error}; going on without")
    yield from work_through(task, left, 1, title, stop)


class _DecoderDied(Exception):
    """One of the processes is gone (out of memory, or killed)."""


def _fed(
    task: Encodes, jobs: Sequence[VideoJob], decoders: int, title: str, stop: StopRequest, pinned: bool
) -> Iterator[tuple[VideoJob, str | None]]:
    if not jobs:
        return
    frames = _DecodedFrames(task.config, task.index, task.root, jobs, get_context("spawn").Value("q", 0))
    messages = iter(
        DataLoader(
            frames,
            batch_size=None,
            num_workers=decoders,
            prefetch_factor=QUEUE_BATCHES,
            pin_memory=pinned,
            worker_init_fn=serve_parent,
            multiprocessing_context="spawn",
        )
    )
    opened = {number: _Open(job) for number, job in enumerate(jobs)}
    with progress_bar(sum(job.frames for job in jobs), title, "frame") as bar:
        try:
            while opened:
                stop.raise_if_set()
                number, message = _next(messages)
                if number not in opened:  # it has failed here, and its frames keep coming
                    continue
                ended, reason = _take_in(task, opened[number], message)
                bar.update(len(message) if isinstance(message, torch.Tensor) else 0)
                if ended:
                    yield opened.pop(number).job, reason
        except BaseException as error:
            for waiting in opened.values():
                _drop(waiting, error)
            raise
        finally:
            del messages  # ends the processes


def _next(messages: Iterator[tuple[int, Message]]) -> tuple[int, Message]:
    try:
        return next(messages)
    except StopIteration as error:
        raise _DecoderDied("a decoding process ended early") from error
    except (RuntimeError, EOFError, ConnectionError) as error:  # the latter where it was handing something over
        raise _DecoderDied(f"a decoding process died ({failure_reason(error)})") from error


def _take_in(task: Encodes, at: _Open, message: Message) -> tuple[bool, str | None]:
    """Deal with one message: whether the job has ended, and why where it failed."""
    try:
        if isinstance(message, str):
            _drop(at, RuntimeError(message))
            return True, message
        if isinstance(message, dict):
            task.require_sound_labels_and_room(at.job)
            at.sink = task.sink(at.job, message)
            at.rows = at.sink.__enter__()
        elif message is None:
            at.leave(None)
            return True, None
        else:
            assert at.rows is not None  # the first message of a job opens it
            with np.errstate(over="ignore"):  # the writer says in words what does not fit
                at.rows.append(*task.encode(message))
    except NoRoomError:
        raise
    except VIDEO_ERRORS as error:
        _drop(at, error)
        return True, failure_reason(error)
    return False, None


def _drop(at: _Open, error: BaseException) -> None:
    """Unwind a job's file; the error is known already."""
    try:
        at.leave(error)
    except type(error):
        pass
    except VIDEO_ERRORS:
        pass
