"""Select the frames of an indexed video by sampling, and look up when they are shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from features.dataset.index import Index, VideoEntry
from features.video.times import RATE_TOLERANCE, on_screen


def sampled_frames(entry: VideoEntry, fps: float) -> NDArray[np.int64]:
    """Return the source frames (T,) int64 that sampling at `fps` selects, in increasing order.

    Sampling selects the frames that are on screen at the first frame's time and every 1 / fps seconds after it. A frame
    that is on screen at several of these times is selected once. Raises UserError if `fps` is higher than the rate of
    the frames or images.
    """
    stride = entry.image_stride
    if fps > entry.most_fps * (1 + RATE_TOLERANCE):
        held = f"{entry.fps:.4g} fps" if stride == 1 else f"images of one in {stride} frames at {entry.fps:g} fps"
        held += " on average" * (entry.times_s is not None)
        raise UserError(f"{entry.id}: data.fps={fps:g} is too high for {held}; the most is {entry.most_fps:.4g}")
    first = entry.frames.first if entry.frames else 0
    shown = np.arange(first, entry.frame_count, stride, dtype=np.int64)
    time_s = frame_times_s(entry, shown)
    sampled = shown[on_screen(time_s, float(time_s[-1]) + stride / entry.sources[-1].fps, fps)]
    return sampled[np.isin(sampled, entry.image_frames)] if entry.frames else sampled  # images may be missing


def in_whole_steps(entry: VideoEntry, fps: float, frame_index: NDArray[np.int64]) -> bool:
    """Whether these sampled frames (T,) are simply every n-th frame, as earlier versions selected at all rates.

    Results of stages record this, so that a stage never resumes a result that an earlier version made with other
    frames.
    """
    first = entry.frames.first if entry.frames else 0
    return np.array_equal(frame_index, np.arange(first, entry.frame_count, max(round(entry.fps / fps), 1)))


def frame_times_s(entry: VideoEntry, frame_index: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float64]:
    """Return when source frames `frame_index` (T,) are shown, (T,) float64, in seconds from the first frame."""
    frames = np.asarray(frame_index, dtype=np.int64)
    times_s = entry.times_s
    return frames / entry.fps if times_s is None else times_s[frames]


def most_fps(index: Index) -> float:
    """Return the highest rate at which every video of the index can be sampled."""
    return min(entry.most_fps for entry in index.videos)
