"""Processes that only decode, for one process that computes: how a GPU is kept busy.

PyTorch's DataLoader is the bounded queue: it watches its worker processes and pins memory. Each worker takes the next
video (or part) from a shared counter and sends resized frames; cropping, normalisation and the net run on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from configs.errors import UserError
from configs.schema import Config
from engine.pool import VIDEO_ERRORS, attempt, failure_reason, serve_parent, work_through
from engine.progress import progress_bar, say
from engine.stopping import StopRequest
from features.dataset.index import Index
from features.dataset.sampling import sampled_frames
from features.frames.source import frame_batches, open_frames
from stage1_cnn.encoders.encoder import encoded_at_once
from stage1_cnn.segments import Rows, VideoJob
from stage1_cnn.video_features import ExtractTask

# Batches that wait for the device, per decoding process.
QUEUE_BATCHES = 4
# What a decoding process sends about a job: the origin of its frames (a dict), frames (a tensor), the end of the job
# (None), or the reason of its failure (a string).
Message = dict[str, str] | torch.Tensor | str | None


class _DecodedFrames(IterableDataset[tuple[int, Message]]):
    """The messages of one decoding process, each with its job's number; those of one job come in order."""

    def __init__(self, config: Config, index: Index, root: Path, jobs: Sequence[VideoJob], taken: Any) -> None:
        self._config, self._index, self._root = config, index, root
        self._jobs = list(jobs)
        self._taken = taken  # number of jobs that all processes have taken so far

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
        frame_index = sampled_frames(entry, self._config.data.fps)
        with open_frames(self._config, entry, self._root, self._index, frame_index, job.samples) as sampled:
            yield sampled.provenance
            for batch in frame_batches(sampled.frames, encoded_at_once(self._config)):
                yield torch.from_numpy(batch)


def decoding_processes(
    task: ExtractTask, jobs: Sequence[VideoJob], decoders: int, pinned: bool
) -> Iterable[tuple[int, Message]]:
    """Start `decoders` processes and yield pairs (number of the job, message); `pinned`: frames in pinned memory.

    The processes end when the iterator is deleted.
    """
    taken = get_context("spawn").Value("q", 0)
    return DataLoader(
        _DecodedFrames(task.config, task.index, task.root, jobs, taken),
        batch_size=None,
        num_workers=decoders,
        prefetch_factor=QUEUE_BATCHES,
        pin_memory=pinned,
        worker_init_fn=serve_parent,
        multiprocessing_context="spawn",
    )


def work_ahead(
    task: ExtractTask,
    jobs: Sequence[VideoJob],
    decoders: int,
    title: str,
    stop: StopRequest,
    *,
    pinned: bool,
    decode: Callable[[ExtractTask, Sequence[VideoJob], int, bool], Iterable[tuple[int, Message]]] = decoding_processes,
) -> Generator[tuple[VideoJob, str | None], None, None]:
    """Do the jobs in this process with frames that `decoders` other processes decode; yields as `work_through` does.

    If one of them dies, this process does the remaining jobs alone. Raises Stopped when asked to stop, and
    NoRoomError when the disk is full.
    """
    with_frames = [job for job in jobs if not job.labels_only]
    left = list(jobs)
    try:
        if with_frames:
            messages = decode(task, with_frames, decoders, pinned)
            for job, reason in _encode_decoded(task, with_frames, messages, title, stop):
                left.remove(job)
                yield job, reason
    except _DecoderDied as error:
        say(f"{error}; continuing without decoding processes", every_rank=True)
    yield from work_through(task, left, 1, title, stop)


class _DecoderDied(Exception):
    """A decoding process has died (out of memory, or killed)."""


def _encode_decoded(
    task: ExtractTask, jobs: Sequence[VideoJob], decoded: Iterable[tuple[int, Message]], title: str, stop: StopRequest
) -> Iterator[tuple[VideoJob, str | None]]:
    writers = {number: _JobWriter(task, job) for number, job in enumerate(jobs)}
    messages = iter(decoded)
    with progress_bar(sum(job.frames for job in jobs), title, "frame") as bar:
        try:
            while writers:
                stop.raise_if_set()
                number, message = _next(messages)
                if number not in writers:  # it has failed here, but its frames still arrive
                    continue
                reason = writers[number].take(message)
                bar.update(len(message) if isinstance(message, torch.Tensor) else 0)
                if message is None or reason is not None:
                    del writers[number]
                    yield jobs[number], reason
        finally:
            for writer in writers.values():
                writer.abandon()
            del messages  # ends the processes


def _next(messages: Iterator[tuple[int, Message]]) -> tuple[int, Message]:
    try:
        return next(messages)
    except StopIteration as error:
        raise _DecoderDied("a decoding process ended early") from error
    except (RuntimeError, EOFError, ConnectionError) as error:  # EOFError, ConnectionError: it died while sending
        raise _DecoderDied(f"a decoding process died ({failure_reason(error)})") from error


class _JobWriter:
    """Writes one job's rows from its messages, which arrive between those of other jobs."""

    _rows: Rows

    def __init__(self, task: ExtractTask, job: VideoJob) -> None:
        self._task, self._job = task, job
        self._file = ExitStack()  # what is open from the first message to the last

    def take(self, message: Message) -> str | None:
        """Write what a message contains; None in it completes the file.

        Returns the reason if the job has failed, after removing its file. Raises NoRoomError.
        """
        if isinstance(message, str):
            self.abandon()
            return message
        return attempt(self._write, message)

    def abandon(self) -> None:
        """Remove the file, if there is one."""
        with suppress(*VIDEO_ERRORS), self._file:
            raise UserError("abandoned")

    def _write(self, message: dict[str, str] | torch.Tensor | None) -> None:
        with self._file as file:
            if isinstance(message, dict):
                labels = self._task.labels_and_room(self._job)
                self._rows = file.enter_context(self._task.sink(self._job, labels, message))
            elif message is not None:
                self._task.encode(message, self._rows)
            if message is not None:
                self._file = file.pop_all()  # stays open for the next message
