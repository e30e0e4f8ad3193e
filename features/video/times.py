"""Represent when frames are shown, and select frames by sampling.

Times are in seconds from the first shown frame. A constant rate is a single number. For any other video, the time
stamps of all frames are stored (`FrameTimes`).
"""

from __future__ import annotations

import base64
import binascii
import functools
import zlib
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from configs.strict import Strict

RATE_TOLERANCE = 0.005  # relative: 29.97 counts as 30 and 23.976 as 24, but 24 and 25 differ
# Tolerance in seconds for rounded times and rates: a frame shown this little after a sampling time counts as on screen.
ROUNDING_S = 1e-6


class FrameTimes(Strict):
    """The time stamps of a video without a constant rate.

    `steps` contains the intervals between frames, (F - 1,) uint32 (little endian, compressed with zlib, in base64), in
    ticks. A tick is `tick_s` = (numerator, denominator) seconds.
    """

    tick_s: tuple[int, int]
    steps: str = Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")

    @classmethod
    def of_stream(cls, pts: NDArray[np.int64], tick_s: Fraction, fps: float) -> FrameTimes | None:
        """Build the times of frames shown at `pts` (F,), increasing, in ticks; None if they follow the rate `fps`.

        Following the rate allows a deviation of one tick, since the container's clock is rounded. Raises ValueError if
        there is a pause of years.
        """
        time_s = (pts - pts[:1]) * float(tick_s)
        tolerance_s = max(min(float(tick_s), 0.25 / fps), ROUNDING_S)
        if (np.abs(time_s - np.arange(len(pts)) / fps) <= tolerance_s * 1.001).all():
            return None
        steps = np.diff(pts)
        if (steps >= 2**32).any():
            raise ValueError(f"frame {int(np.argmax(steps)) + 1} is shown years after the frame before it")
        packed = base64.b64encode(zlib.compress(steps.astype("<u4").tobytes(), 9))
        return cls(tick_s=tick_s.as_integer_ratio(), steps=packed.decode())

    def seconds(self, frame_count: int) -> NDArray[np.float64]:
        """Return the times in seconds from the first frame, (F,). Raises ValueError unless F is `frame_count`."""
        numerator, denominator = self.tick_s
        if not (0 < numerator < 2**31 and 0 < denominator < 2**31):
            raise ValueError("tick_s is not a duration")
        return np.multiply(_ticks(self.steps, frame_count), numerator / denominator, dtype=np.float64)


@functools.lru_cache(maxsize=4)
def _ticks(steps: str, frame_count: int) -> NDArray[np.int64]:
    """Unpack the times in ticks from the first frame, (F,), but no more than `frame_count` frames need."""
    size = 4 * (frame_count - 1)
    try:
        unpacked = zlib.decompressobj().decompress(base64.b64decode(steps, validate=True), size + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError("steps are not packed times") from error
    if len(unpacked) != size or not size:
        raise ValueError("steps do not match the frame count")
    ticks = np.concatenate([[0], np.cumsum(np.frombuffer(unpacked, dtype="<u4"), dtype=np.int64)])
    ticks.flags.writeable = False
    return ticks


def on_screen(time_s: NDArray[np.float64], end_s: float, fps: float) -> NDArray[np.int64]:
    """Return the positions (T,), increasing, of the frames that sampling at `fps` selects.

    Each frame is shown from its `time_s` (N,) to that of the next, and the last to `end_s`. Sampling times are the
    first frame's time and every 1 / fps seconds after it. For each, the frame on screen is selected. A frame that is on
    screen at several sampling times is selected once.
    """
    # A frame is selected if the first sampling time at or after its own time is before the next frame's time.
    due = np.ceil((np.append(time_s, end_s) - time_s[0] - ROUNDING_S) * fps)
    return np.flatnonzero(due[:-1] < due[1:])


def same_rate(fps: float, other_fps: float) -> bool:
    """Whether two rates, such as 29.97 and 30, are the same within `RATE_TOLERANCE`."""
    return abs(fps - other_fps) <= RATE_TOLERANCE * other_fps
