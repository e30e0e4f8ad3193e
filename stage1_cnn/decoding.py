"""Processes that decode videos and send the frames, ahead of the process that computes on a GPU.

PyTorch's DataLoader serves as the bounded queue between them; it also watches its worker processes and pins memory.
Each worker takes the number of the next video (or part of one) from a shared counter and sends the video's resized
frames. What this module imports, each of these processes imports when it starts: no networks, and thus no torchvision,
which takes as long as torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from multiprocessing import get_context
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from engine.pool import VIDEO_ERRORS, Shared, failure_reason, serve_parent
from features.frames.source import SampledFrames, frame_batches

# How many batches of one decoding process may wait for the device.
QUEUE_BATCHES = 4
# What a decoding process sends about a video: which reader and source its frames come from (a dict), a batch of frames
# (a tensor (N, R, R, 3), or in several sizes that of `resize_each`), the end of the video (None), or why it failed (a
# string).
Message = dict[str, str] | torch.Tensor | str | None


# A picklable call that opens a video (or a part of one) in the process that decodes it.
OpenVideo = Callable[[], AbstractContextManager[SampledFrames]]


class _DecodedFrames(IterableDataset[tuple[int, Message]]):
    """The messages of one decoding process, each with its video's number; a video's messages come in order."""

    def __init__(self, videos: Sequence[OpenVideo], batch_frames: int, taken: Any) -> None:
        self._videos, self._batch_frames = Shared(list(videos)), batch_frames
        self._taken = taken  # shared counter: how many videos all processes together have taken so far

    def __iter__(self) -> Iterator[tuple[int, Message]]:
        videos = self._videos.value
        while (number := self._take()) < len(videos):
            for message in messages_of(videos[number], self._batch_frames):
                yield number, message

    def _take(self) -> int:
        with self._taken.get_lock():
            self._taken.value += 1
            return int(self._taken.value) - 1


def messages_of(open_video: OpenVideo, batch_frames: int) -> Generator[Message, None, None]:
    try:
        with open_video() as sampled:
            yield sampled.provenance
            for batch in frame_batches(sampled.frames, batch_frames):
                yield torch.from_numpy(batch)
        yield None
    except VIDEO_ERRORS as error:
        yield failure_reason(error)


def decoding_processes(
    videos: Sequence[OpenVideo], batch_frames: int, decoders: int, pinned: bool
) -> Generator[tuple[int, Message], None, None]:
    """The messages about `videos` from `decoders` processes, which end when the generator is closed.

    `pinned` puts frames into pinned memory. Messages are taken in the order in which they arrive: if the processes were
    read in turn, all would wait for the slowest. Raises RuntimeError, EOFError or ConnectionError if a process died.
    """
    taken = get_context("spawn").Value("q", 0)
    loader = DataLoader(
        _DecodedFrames(videos, batch_frames, taken),
        batch_size=None,
        num_workers=decoders,
        prefetch_factor=QUEUE_BATCHES,
        pin_memory=pinned,
        in_order=False,
        worker_init_fn=serve_parent,
        multiprocessing_context="spawn",
    )
    messages = iter(loader)
    try:
        yield from messages
    finally:
        end_processes(messages)


def end_processes(batches: object) -> None:
    """End the processes of a DataLoader's iterator, even while they still send.

    torch has no public function for this, so a private one is called. Without it, the iterator's destructor ends the
    processes, and prints a traceback if one of them has died.
    """
    shut_down = getattr(batches, "_shutdown_workers", None)
    if shut_down is not None:
        with suppress(RuntimeError):
            shut_down()
