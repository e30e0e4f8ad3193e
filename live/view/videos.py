"""The videos that were opened, and their frames as JPEG, read by the project's own reader."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.file_pattern import IMAGE_ENDINGS, VIDEO_ENDINGS
from configs.schema import Config
from engine.files import inside
from features.dataset.build import dataset_of_source
from features.dataset.index import Dataset, VideoEntry
from features.dataset.sampling import frame_times_s
from features.frames.source import open_source
from features.ids import id_key, id_problem, natural_key, normal_id
from features.video.base import FrameReader

_QUALITY = 92  # of JPEG: no visible difference
_CACHE_BYTES = 96 << 20  # of all encoded frames together
_BACK = 24  # frames read before one that is asked for out of order, so that stepping back does not seek each time
_AHEAD = 1000  # frames for which a reading is planned at once
# Of these, browsers can play some; whether a file can be played, only the browser knows.
_MEDIA_TYPES = {
    **dict.fromkeys(("mp4", "m4v", "f4v"), "video/mp4"),
    **dict.fromkeys(("mov", "qt"), "video/quicktime"),
    "webm": "video/webm",
    "ogv": "video/ogg",
    "mkv": "video/x-matroska",
}


@dataclass(frozen=True)
class Opened:
    """A video that was named: its id, its file or folder, and, if a run's index knows it, its entry there."""

    id: str
    path: Path
    known: tuple[Config, Dataset, VideoEntry] | None = None


@dataclass(frozen=True)
class Timing:
    """The frames of a video: their numbers (F,), and when each is shown and the last one ends, (F + 1,), in seconds."""

    numbers: NDArray[np.int64]
    edges_s: NDArray[np.float64]
    fps: float
    even: bool  # whether frame k is number k and shown at k / fps

    def to_json(self) -> dict[str, Any]:
        """Return what the page needs; times and numbers only where they do not follow from the rate."""
        about: dict[str, Any] = {"fps": self.fps, "count": len(self.numbers), "end_s": float(self.edges_s[-1])}
        if not self.even:
            about |= {"numbers": self.numbers.tolist(), "edges_s": self.edges_s.round(6).tolist()}
        return about


def named_videos(paths: Sequence[Path]) -> list[Opened]:
    """Return the videos of the command line: files, folders of frames, and the videos directly in a folder.

    Raises UserError for a path that does not exist, a folder with neither videos nor images, and equal names.
    """
    found: list[Opened] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such video or folder")
        places = _in_folder(path) if path.is_dir() else [path]
        found += [Opened(normal_id(place.name if place.is_dir() else place.stem), place) for place in places]
    return require_distinct(found)


def require_distinct(videos: list[Opened]) -> list[Opened]:
    """Return the videos. Raises UserError if two have one id, as their labels would be one file, or one has none."""
    seen: dict[str, Opened] = {}
    for video in videos:
        if problem := id_problem(video.id):
            raise UserError(f"{video.path}: the video's name {problem}; rename it")
        if (other := seen.setdefault(id_key(video.id), video)) is not video:
            raise UserError(f"{other.path} and {video.path}: both are called {video.id}; open one of them")
    return videos


def _in_folder(folder: Path) -> list[Path]:
    """Return the videos in a folder, or the folder itself if it holds frames."""
    try:
        files = [one for one in folder.iterdir() if one.is_file() and not one.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    videos = [one for one in files if one.suffix[1:].lower() in VIDEO_ENDINGS]
    if not videos and not any(one.suffix[1:].lower() in IMAGE_ENDINGS for one in files):
        raise UserError(f"{folder}: contains neither videos nor images of frames; name a video, or its folder")
    return sorted(videos, key=lambda one: natural_key(one.name)) or [folder]


class Video:
    """A video that the page shows: its times and, one at a time, its frames. Methods may be called by any thread."""

    def __init__(self, opened: Opened, spec: DataSetSpec, pictures: Pictures) -> None:
        self.id, self.path, self._spec, self._known, self._pictures = (
            opened.id,
            opened.path,
            spec,
            opened.known,
            pictures,
        )
        self._lock = threading.Lock()
        self._reader: FrameReader | None = None
        self._reading: Iterator[NDArray[np.uint8]] = iter(())
        self._next = self._end = 0  # positions in `timing.numbers` of what `_reading` yields next, and of its end

    @cached_property
    def _source(self) -> tuple[Config, Dataset, VideoEntry]:
        if self._known is not None:
            return self._known
        config = Config()
        dataset = dataset_of_source(self.path, self._spec, config.data)
        return config, dataset, dataset.index.videos[0]

    @property
    def entry(self) -> VideoEntry:
        """What is known about the source; measured when first asked for. Raises UserError if it cannot be read."""
        with self._lock:
            return self._source[2]

    @cached_property
    def timing(self) -> Timing:
        """When the frames are shown. Raises UserError if the source cannot be read."""
        entry = self.entry
        numbers = entry.image_frames
        shown_s = frame_times_s(entry, numbers)
        last_s = (entry.image_stride if entry.frames else 1) / entry.sources[-1].fps
        even = entry.times is None and bool(np.array_equal(numbers, np.arange(len(numbers))))
        return Timing(numbers, np.append(shown_s, shown_s[-1] + last_s), entry.fps, even)

    @property
    def media(self) -> tuple[Path, str] | None:
        """The file and its type, if it is a single file that a browser may be able to play."""
        kind = _MEDIA_TYPES.get(self.path.suffix[1:].lower())
        entry = self.entry
        if kind is None or entry.kind != "video" or entry.parts:
            return None
        return (inside(self._source[1].root, entry.source), kind)

    def jpeg(self, position: int) -> bytes:
        """Return the frame at a position from 0 as JPEG. Raises UserError if there is none or it cannot be read."""
        timing = self.timing
        if not 0 <= position < len(timing.numbers):
            raise UserError(f"{self.id}: has {len(timing.numbers)} frames, so there is no frame {position}")
        with self._lock:
            found = self._pictures.get((self.id, position))
            return found if found is not None else self._read(position)

    def _read(self, position: int) -> bytes:
        """Read on to a position; a little before it if it is not the next one, so that stepping back is quick."""
        if not (self._next <= position <= self._next + _BACK and position < self._end):
            self._start(max(position - _BACK, 0) if position < self._next else position)
        try:
            for at in range(self._next, position + 1):
                picture = _encoded(next(self._reading))
                self._pictures.put((self.id, at), picture)
                self._next = at + 1
        except StopIteration as error:  # a reader must yield every frame that it was asked for
            raise UserError(f"{self.path}: frame {position} cannot be read") from error
        except BaseException:
            self._next = self._end = 0
            raise
        return picture

    def _start(self, first: int) -> None:
        config, dataset, entry = self._source
        if self._reader is None:
            self._reader = open_source(config, dataset, entry)
        numbers = self.timing.numbers[first : first + _AHEAD]
        self._next = self._end = 0
        self._reading = self._reader.read(numbers.tolist())
        self._next, self._end = first, first + len(numbers)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._reader is not None:
                self._reader.close()
            self._reader, self._next, self._end = None, 0, 0


class Pictures:
    """Encoded frames of all videos, by video and position; those used longest ago are dropped."""

    def __init__(self, most_bytes: int = _CACHE_BYTES) -> None:
        self._held: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes, self._most, self._lock = 0, most_bytes, threading.Lock()

    def get(self, key: tuple[str, int]) -> bytes | None:
        """Return a frame, if it is held."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: tuple[str, int], picture: bytes) -> None:
        """Hold a frame."""
        with self._lock:
            self._bytes += len(picture) - len(self._held.pop(key, b""))
            self._held[key] = picture
            while self._bytes > self._most and len(self._held) > 1:
                self._bytes -= len(self._held.popitem(last=False)[1])


def _encoded(rgb: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue()
