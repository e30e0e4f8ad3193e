"""The interface of readers, and the definition of "frame k" that all sources of frames share.

**Definition.** Frame k of a video is the k-th frame that a player shows, counted from 0; frames hidden by an edit list
are not counted. Its pixels are FFmpeg's conversion to 8-bit RGB with the stream's own colour matrix and range. Its time
is its time stamp relative to that of frame 0. If the container says that the video is rotated (by a multiple of 90
degrees), every reader applies this rotation, because annotators saw the video as their player showed it. In a folder of
frames, frame k is the image of source frame k, with its EXIF rotation applied. In a recording in several files, frames
are counted through all of them, and each file begins where the last frame of the one before it ends.

**Time stamps and numbers.** Frames are numbered by their time stamps only if these are known to be presentation times:
decoding times must never decrease, and only B-frames may be shown before a frame that was decoded earlier. Otherwise
(for other codecs, and where time stamps are decoding times, as after a copy from AVI to MP4), frames are counted in the
order in which the decoder returns them. If the rate varies as well, each frame must have the time stamp of its packet.
`probe_video` checks this on the first frames, and reading checks it on every frame. If a recording starts inside a
group of pictures, frame 0 is the first frame that can be shown. An empty chunk of an AVI file shows the previous frame
again. Files that were joined without adjusting their clocks are refused.

**Damage.** If FFmpeg reports damage, reading a frame that depends on the damaged frame raises ReaderError; other pixels
are never returned instead. Changed bytes that still decode to a valid frame cannot be detected. A file is refused when
it is opened if its container claims to be longer than the file, or to contain more frames than it does (apart from a
missing last frame).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from configs.errors import UserError
from features.video.times import FrameTimes

# Larger frames are refused before anything is decoded: 8K video has 33 million pixels.
MAX_PIXELS = 50_000_000
REMEDY = "re-encode the video or leave it out"
AnyReader = TypeVar("AnyReader", bound="FrameReader")


class ReaderError(UserError):
    """A source of frames cannot be read exactly. The message names the file, the frame, and what to do."""


class FrameReader(ABC):
    """Base class of all sources of frames. Readers are context managers, and `close` may be called twice."""

    name: str
    version: str
    path: Path
    frame_count: int
    times: FrameTimes | None = None  # set for a video without a constant rate

    def read(self, frame_index: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield one (H, W, 3) uint8 RGB array per requested source frame, lazily and with bounded memory.

        `frame_index` must be strictly increasing. Raises ReaderError naming the file and the first frame that cannot be
        read.
        """
        wanted = [int(k) for k in frame_index]
        if any(b <= a for a, b in itertools.pairwise(wanted)) or (wanted and wanted[0] < 0):
            raise ValueError("frame numbers must be strictly increasing and not negative")
        if missing := [k for k in wanted if k >= self.frame_count]:
            known = f"has {self.frame_count} frames, so frame {missing[0]} cannot be read"
            raise ReaderError(f"{self.path}: {known}; rebuild the index")
        return self._frames(wanted)

    @abstractmethod
    def _frames(self, wanted: list[int]) -> Iterator[np.ndarray]:
        """Yield the frames with these numbers, which `read` has checked."""

    def spread(self, count: int) -> list[int]:
        """Return at most `count` numbers of existing frames, evenly spaced from the first to the last."""
        return spread_evenly(range(self.frame_count), count)

    def close(self) -> None:  # noqa: B027, most readers keep nothing open between two calls of `read`
        """Release the reader's resources."""

    def __enter__(self: AnyReader) -> AnyReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def spread_evenly(numbers: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the numbers, evenly spaced from the first to the last."""
    chosen = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return [numbers[i] for i in chosen.tolist()]
