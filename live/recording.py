"""A video of the sampled frames of a stream, with what was known when each was shown."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from engine.files import atomic_path
from evaluation.reports.overlay import Overlay
from features.video.write import WriteFrame, mp4_writer
from live.recogniser import Recognition

# Encodes fast, with sufficient quality: the annotated video illustrates a prediction and is not an archive.
ENCODER = {"preset": "veryfast", "crf": "23"}


class Recording:
    """Writes an MP4 of frames with the newest recognition below each, and the phases so far on a line.

    The file appears under its name when it is closed, if anything was recognised. Raises UserError if it cannot be
    written.
    """

    def __init__(self, path: Path, spec: DataSetSpec, fps: float) -> None:
        self._path, self._spec, self._fps, self._labels = path, spec, fps, bytearray()
        self._size: tuple[int, int] | None = None
        self._first_s: float | None = None
        self._newest: Recognition | None = None
        self._stack = ExitStack()
        self._write: WriteFrame | None = None

    def recognised(self, one: Recognition) -> None:
        """Take the next recognition."""
        self._labels.append(one.phase)
        self._newest = one

    def add(self, frame: NDArray[np.uint8], time_s: float) -> None:
        """Write a frame (H, W, 3) that is shown at `time_s`, unless nothing has been recognised yet."""
        newest = self._newest
        if newest is None:
            return
        if self._write is None:  # a video without frames could not be written
            temporary = self._stack.enter_context(atomic_path(self._path))
            self._write = self._stack.enter_context(mp4_writer(temporary, self._fps, ENCODER, timed=True))
        self._size = self._size or (frame.shape[1], frame.shape[0])
        self._first_s = time_s if self._first_s is None else self._first_s
        past = np.frombuffer(self._labels, np.uint8).astype(np.int8)
        # the overlay looks up its last row only, so the newest probabilities stand for all rows
        rows = np.broadcast_to(newest.probabilities, (len(past), len(newest.probabilities)))
        tools = None if newest.tools is None else np.broadcast_to(newest.tools, (len(past), len(newest.tools)))
        overlay = Overlay(*self._size, rows, tools, self._spec.phases, self._spec.tools, past)
        self._write(overlay.add(frame, len(past) - 1), time_s - self._first_s)

    def close(self) -> None:
        self._stack.close()
