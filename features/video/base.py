"""The reader interface and the definition of "frame k", which every source of frames shares.

**Definition.** Frame k of a video is the k-th frame that a player shows; frames hidden by an edit list are not counted.
Its pixels are FFmpeg's conversion to 8-bit RGB with the stream's own colour matrix and range. Its time is that of its
time stamp, relative to frame 0. A rotation noted in the container (a multiple of 90 degrees) is applied by every
reader, because annotators worked on what their player showed. In a folder of frames, frame k is the image of source
frame k, with its EXIF rotation applied.

**Time stamps and numbers.** Time stamps number the frames only if they are known to be presentation times: decoding
times never decrease, and only B-frames are shown before a frame that was decoded earlier. Otherwise (stamps that are
decoding times, as after a copy from AVI to MP4; other codecs) frames are counted in the order in which the decoder
returns them; if the rate varies too, each must have the time stamp of its packet. `probe_video` checks this on the
first frames, reading checks it on every frame. If a recording starts inside a group of pictures, frame 0 is the first
frame that can be shown. An empty chunk of AVI shows the previous frame again. Files that were
joined without adjusting their clocks are refused.

**Damage.** If FFmpeg reports damage, the frames that depend on the damaged frame raise ReaderError; other pixels are
never returned in their place. Changed bytes that still decode to a valid frame cannot be detected.
Containers that claim to be longer than the file, or to hold more frames than they do (apart from a missing last one),
are refused when opened.
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
    """A source of frames that cannot be read exactly: names the file, the frame, and what to do."""


class FrameReader(ABC):
    """What every source of frames offers. A context manager; `close` may be called twice."""

    name: str
    version: str
    path: Path
    frame_count: int
    times: FrameTimes | None = None  # of a video without a constant rate

    def read(self, frame_index: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield one (H, W, 3) uint8 RGB array per requested source frame, lazily and with bounded memory.

        `frame_index` is strictly increasing. Raises ReaderError naming the file and the first frame that cannot be
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
        """The frames with these numbers, which `read` has checked."""

    def spread(self, count: int) -> list[int]:
        """At most `count` numbers of existing frames, evenly spaced, first and last included."""
        return spread_evenly(range(self.frame_count), count)

    def close(self) -> None:  # noqa: B027, most readers hold nothing between two calls of `read`
        """Release what the reader holds."""

    def __enter__(self: AnyReader) -> AnyReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def spread_evenly(numbers: Sequence[int], count: int) -> list[int]:
    """At most `count` of the numbers, evenly spaced, first and last included."""
    chosen = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return [numbers[i] for i in chosen.tolist()]
