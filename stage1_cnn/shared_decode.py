"""One decode for several encoders: a video's frames are read once and go to every encoder that needs them.

Each encoder writes its own file, and fails for itself: the others continue. One encoder is the case of one.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from configs.schema import Config, PreprocessConfig
from engine.memory import keep_freed_memory
from engine.pool import VIDEO_ERRORS, Advance, attempt
from features.dataset.index import Dataset
from features.dataset.labels import sampled_labels
from features.dataset.sampling import sampled_frames
from features.frames.preprocess import different_geometries, split_sizes
from features.frames.source import open_frames, source_frames
from features.video_labels import VideoLabels
from stage1_cnn.decoding import Message, OpenVideo, messages_of
from stage1_cnn.encoders.encoder import encoded_at_once
from stage1_cnn.segments import VideoJob
from stage1_cnn.video_features import EncoderTask


@dataclass(frozen=True)
class SharedJob:
    """A video, or a part of one, that is read once: the job of each encoder that needs it, with the encoder's number.

    The jobs differ in the files of their parts only. `number` counts the shared jobs of a call.
    """

    number: int
    by_encoder: tuple[tuple[int, VideoJob], ...]

    @property
    def video(self) -> VideoJob:
        """The job of the first encoder, for what all have in common."""
        return self.by_encoder[0][1]

    @property
    def frames(self) -> int:
        """Frames to read."""
        return self.video.frames

    @property
    def encoders(self) -> tuple[int, ...]:
        """The numbers of the encoders."""
        return tuple(number for number, _ in self.by_encoder)


class Reasons(str):
    """Why encoders have failed on a job: `by_encoder` has the reason of each; the string itself is the first."""

    by_encoder: dict[int, str]

    def __new__(cls, by_encoder: Mapping[int, str]) -> Reasons:
        reasons = super().__new__(cls, next(iter(by_encoder.values())))
        reasons.by_encoder = dict(by_encoder)
        return reasons

    def __getnewargs__(self) -> tuple[Mapping[int, str]]:  # type: ignore[override]
        return (self.by_encoder,)


def reason_of(reason: str | None, encoder: int) -> str | None:
    """Why an encoder has failed on a job that ended with `reason`; None if it has not.

    A reason that is a plain string applies to all encoders.
    """
    return reason.by_encoder.get(encoder) if isinstance(reason, Reasons) else reason


class Seconds:
    """Seconds of work for each encoder, added up over jobs and processes: getting its frames, and encoding them.

    The seconds of getting frames count for every encoder that the frames are for. They are in shared memory, where each
    job has its own place, and only one process at a time does a job.
    """

    def __init__(self, jobs: int, encoders: int) -> None:
        self._of = torch.zeros(max(1, jobs), 2, encoders, dtype=torch.float64).share_memory_()

    def of(self, encoder: int) -> tuple[float, float]:
        """The seconds of getting the encoder's frames, and of encoding them."""
        decode, encode = self._of[:, :, encoder].sum(dim=0).tolist()
        return decode, encode

    def decoded(self, job: SharedJob, seconds: float) -> None:
        """Add the seconds that getting some of a job's frames took."""
        self._of[job.number, 0, list(job.encoders)] += seconds

    def encoded(self, job: SharedJob, encoder: int, seconds: float) -> None:
        """Add the seconds that one of a job's encoders took."""
        self._of[job.number, 1, encoder] += seconds


@dataclass
class ExtractTask:
    """A callable that does one job: it reads a video's frames, and each encoder of the job writes its features of them.

    Settings other than those of the encoders are the same for all `encoders`.
    """

    encoders: Sequence[EncoderTask]
    seconds: Seconds

    @property
    def config(self) -> Config:
        """The settings, of which those that concern all encoders may be used."""
        return self.encoders[0].config

    @property
    def dataset(self) -> Dataset:
        """The data set, which is the same for all encoders."""
        return self.encoders[0].dataset

    def __call__(self, job: SharedJob, advance: Advance) -> str | None:
        """Do one job. Returns None, or the reasons of the encoders that have failed, whose files are removed."""
        if job.video.labels_only:
            failed = {number: attempt(self.encoders[number].relabel, own) for number, own in job.by_encoder}
            reasons = {number: reason for number, reason in failed.items() if reason is not None}
            return Reasons(reasons) if reasons else None
        keep_freed_memory()  # must be called in every process
        messages = messages_of(self.source(job), encoded_at_once(self.config))
        with closing(Writing(self, job)) as writing, closing(messages):
            while not writing.ended:
                begun = time.perf_counter()
                message = next(messages)
                self.seconds.decoded(job, time.perf_counter() - begun)
                writing.take(message)
                if isinstance(message, torch.Tensor):
                    advance(len(message))
        return writing.reason

    def source(self, job: SharedJob) -> OpenVideo:
        """A picklable function that opens a job's frames; the process that decodes them calls it."""
        config, video = self.encoders[job.encoders[0]].config, job.video
        entry = self.dataset.index.entry(video.video_id)
        frame_index = sampled_frames(entry, config.data.fps)
        sizes, _ = self.sizes(job.encoders)
        if len(sizes) == 1:
            return partial(open_frames, config, self.dataset, entry, frame_index, video.samples)
        return partial(source_frames, config, self.dataset, entry, frame_index[video.samples], sizes)

    def sizes(self, encoders: Sequence[int]) -> tuple[list[PreprocessConfig], list[int]]:
        """How the frames are resized for these encoders, and for each of them which of the sizes it takes."""
        return different_geometries([self.encoders[number].config.preprocess for number in encoders])

    def labels(self, job: SharedJob) -> VideoLabels:
        """The labels at all samples of the job's video. Raises UserError if they cannot be read."""
        return sampled_labels(self.dataset, self.dataset.index.entry(job.video.video_id), self.config.data)


class Writing:
    """The files of one job, which are written while its messages arrive. Closing it removes unfinished ones."""

    def __init__(self, task: ExtractTask, job: SharedJob) -> None:
        self._task, self._job = task, job
        sizes, which = task.sizes(job.encoders)
        self._sizes_px = [size.resize_px for size in sizes]
        self._size_of = dict(zip(job.encoders, which, strict=True))
        self._writers: dict[int, Generator[None, Any, None]] = {}
        self._failed: dict[int, str] = {}
        self.ended = False

    @property
    def reason(self) -> str | None:
        """The reasons of the encoders that have failed; None if none has."""
        return Reasons(self._failed) if self._failed else None

    def take(self, message: Message) -> None:
        """Process the next message about the job's video (`stage1_cnn.decoding.Message`).

        A dict begins (again), and `ended` is then true after the last message, or when all encoders have failed. Raises
        errors of a GPU, and NoRoomError if the disk is full.
        """
        if isinstance(message, dict):
            self.close()
            self._failed.clear()
            reason = attempt(self._begin, message)
        elif isinstance(message, str):
            reason = message
        else:
            reason = None
            frames = split_sizes(message, self._sizes_px) if isinstance(message, torch.Tensor) else None
            for number in list(self._writers):
                begun = time.perf_counter()
                self._send(number, frames[self._size_of[number]] if frames is not None else None)
                self._task.seconds.encoded(self._job, number, time.perf_counter() - begun)
        if reason is not None:
            self._failed |= {number: reason for number in self._job.encoders if number not in self._failed}
            self.close()
        self.ended = message is None or not self._writers

    def _begin(self, provenance: Mapping[str, str]) -> None:
        labels = self._task.labels(self._job)
        for number, own in self._job.by_encoder:
            self._writers[number] = self._task.encoders[number].write(own, labels, provenance)
            self._send(number, None)

    def _send(self, number: int, value: torch.Tensor | None) -> None:
        reason = attempt(self._writers[number].send, value)
        if reason is not None:
            self._failed[number] = reason
            self._abandon(number)

    def _abandon(self, number: int) -> None:
        """Remove the file that an encoder has begun; without effect on a file that is complete."""
        with suppress(*VIDEO_ERRORS):
            self._writers.pop(number).close()

    def close(self) -> None:
        """Remove the files that are not complete."""
        for number in list(self._writers):
            self._abandon(number)
