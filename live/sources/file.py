"""A video file or a folder of frames as a source: at its own speed, or as fast as it is recognised."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.schema import Config
from engine.progress import say
from features.dataset.build import dataset_of_source
from features.dataset.sampling import frame_times_s
from features.frames.preprocess import Geometry
from features.frames.source import open_source
from live.sources.base import Begin, Grabbed, Source


class FileSource(Source):
    """All frames of a stored video, with the numbers and times that `extract` and `predict` use.

    With `real` a frame arrives when it is due, as from a camera. Raises UserError if the file cannot be read.
    """

    def __init__(self, path: Path, config: Config, spec: DataSetSpec, real: bool) -> None:
        dataset = dataset_of_source(path, spec, config.data)
        for note in dataset.index.notes:
            say(f"note: {note}")
        self._entry = entry = dataset.index.videos[0]
        self._open = partial(open_source, config, dataset, entry, config.extract.hardware_decoding)
        self._real = real
        first, step = entry.frames.first if entry.frames else 0, entry.image_stride
        self._shown = np.arange(first, entry.frame_count, step)
        self._time_s = frame_times_s(entry, self._shown)
        with self._open() as reader:
            geometry = Geometry.of_video(config.preprocess, reader)
        super().__init__(
            path.name,
            live=real,
            identity={"sha256_ends": entry.sha256_ends, "frames": entry.frame_count, "fps": entry.fps},
            geometry=geometry,
            end_s=float(self._time_s[-1]) + step / entry.sources[-1].fps,
        )

    def frames(self, begin: Begin, stop: threading.Event) -> Iterator[Grabbed]:
        rest = slice(int(np.searchsorted(self._shown, begin.number)), None)
        numbers, times_s = self._shown[rest].tolist(), self._time_s[rest].tolist()
        stored = set(self._entry.image_frames.tolist())
        started = time.perf_counter()
        with self._open() as reader:
            pictures = reader.read([one for one in numbers if one in stored])
            for number, time_s in zip(numbers, times_s, strict=True):
                due = started + time_s - times_s[0]
                if self._real and stop.wait(max(due - time.perf_counter(), 0)):
                    return
                if stop.is_set():
                    return
                begun = time.perf_counter()
                picture = _ready(next(pictures)) if number in stored else None
                arrived = due if self._real else begun
                yield Grabbed(number, time_s, picture, arrived, time.perf_counter() - begun)


def _ready(rgb: NDArray[np.uint8]) -> Callable[[], NDArray[np.uint8]]:
    return lambda: rgb
