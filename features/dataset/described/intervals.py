"""Labelled intervals of a video, and the labels of its frames that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from features.dataset.annotations import LabelTrack
from features.dataset.row_numbers import Extent
from features.video.times import ROUNDING_S, same_rate

# Times are written with milliseconds, rounded up or down, so a frame may be shown up to half of one before its label.
HALF_TICK_S = 5e-4
# Intervals may end this much after the last frame, since the durations that players show include the sound.
BEYOND_S = 1.0


@dataclass(frozen=True, eq=False)
class TimedLabels:
    """N intervals of a video, each from `start` (N,) to before `end` (N,), with a class (N,) int8.

    `per_s` is the number of units per second: 1 for times in seconds (`is_time`), the rate of numbered samples, or None
    for numbers of the video's own frames. `overlaps` says which of several intervals counts: "refuse", "inner",
    "outer", "first", "last", or classes of which the first counts most. Frames in no interval have the class `gap`, or
    no label if it is -1. With `tool_count`, classes are tools; several may be present, and frames outside their
    intervals do not show them. `places` (N,) says where each interval was read, for messages.
    """

    start: NDArray[np.float64]
    end: NDArray[np.float64]
    classes: NDArray[np.int8]
    places: Sequence[str]
    per_s: float | None
    is_time: bool
    overlaps: str | tuple[int, ...] = "refuse"
    gap: int = -1
    tool_count: int = 0

    def last_frame(self, fps: float) -> int:
        """Return the frame after the last interval's end, at the rate `fps` of the source."""
        known = np.where(np.isfinite(self.end), self.end, self.start)
        return round(float(known.max(initial=0.0)) * (fps / self.per_s if self.per_s else 1.0))

    def place(self, path: Path, extent: Extent) -> LabelTrack:
        """Return the label of each of the video's frames, as a track with one row per frame.

        A frame is in an interval if the time at which it is shown is. Raises UserError naming `path` and the place of
        an interval that begins or ends after the video, or that overlaps another one with another label.
        """
        first, stop = self._frames(extent)
        self._require_inside(path, first, stop, extent)
        labels: NDArray[np.int8]
        if self.tool_count:
            labels = np.zeros((extent.frame_count, self.tool_count), dtype=np.int8)
            for tool, begin, end in zip(self.classes.tolist(), first, stop, strict=True):
                labels[begin:end, tool] = 1
        else:
            if self.overlaps == "refuse":
                self._refuse_overlaps(path, first, stop)
            labels = np.full(extent.frame_count, self.gap, dtype=np.int8)
            for at in self._painting_order(first, stop):
                labels[first[at] : stop[at]] = self.classes[at]
        return LabelTrack(np.arange(extent.frame_count, dtype=np.int64), labels, 1)

    def _frames(self, extent: Extent) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first frame (N,) of each interval and the first one after it (N,)."""
        if self.per_s is None or (not self.is_time and same_rate(self.per_s, extent.fps)):
            most = float(2**53)
            return self.start.astype(np.int64), np.minimum(np.ceil(self.end), most).astype(np.int64)
        tolerance_s = HALF_TICK_S if self.is_time else ROUNDING_S
        return tuple(self._first_at(bound / self.per_s - tolerance_s, extent) for bound in (self.start, self.end))  # type: ignore[return-value]

    @staticmethod
    def _first_at(time_s: NDArray[np.float64], extent: Extent) -> NDArray[np.int64]:
        """Return the first frame (N,) shown at each time (N,) or later; after the last, frames are counted on."""
        if extent.times_s is None:
            return np.ceil(np.clip(time_s * extent.fps, 0, 2.0**53)).astype(np.int64)
        within = np.searchsorted(extent.times_s, time_s, side="left")
        after = np.ceil(np.clip((time_s - extent.times_s[-1]) * extent.fps, 0, 2.0**52)).astype(np.int64)
        return within + np.maximum(after - 1, 0)

    def _require_inside(self, path: Path, first: NDArray[np.int64], stop: NDArray[np.int64], extent: Extent) -> None:
        last = extent.frame_count + max(round(BEYOND_S * extent.fps), extent.stride)
        ends_late = np.isfinite(self.end) & (stop > last)
        for what, late, bounds in (("begins", first >= last, self.start), ("ends", ends_late, self.end)):
            if late.any():
                at = int(np.argmax(late))
                raise UserError(
                    f"{path}: {self.places[at]} {what} at {bounds[at]:.10g}{' s' * self.is_time}, after the end of "
                    f"{extent.name} ({extent.frame_count} frames, {extent.duration_s:.1f} s); check unit, rate and "
                    "origin in `labels` of the data set's description, or whether these are the labels of another cut "
                    "of the video"
                )

    def _refuse_overlaps(self, path: Path, first: NDArray[np.int64], stop: NDArray[np.int64]) -> None:
        """Raise UserError if two intervals with different labels share a frame."""
        reaching: dict[int, int] = {}  # by class: the interval that ends last among those that begin earlier
        for at in np.argsort(first, kind="stable").tolist():
            mine = int(self.classes[at])
            for other, longest in reaching.items():
                if other != mine and first[at] < min(stop[longest], stop[at]):
                    raise UserError(
                        f"{path}: {self.places[at]} overlaps {self.places[longest]}, which has another label; correct "
                        "them, choose an annotator with `where`, or say which counts with `overlaps`, in `labels` of "
                        "the data set's description"
                    )
            if mine not in reaching or stop[at] > stop[reaching[mine]]:
                reaching[mine] = at

    def _painting_order(self, first: NDArray[np.int64], stop: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the intervals (N,) in the order in which they are painted over each other."""
        length = stop - first
        if isinstance(self.overlaps, tuple):  # the classes that count most come last; the others as with `inner`
            rank = {number: len(self.overlaps) - at for at, number in enumerate(self.overlaps)}
            ranks = np.array([rank.get(number, 0) for number in self.classes.tolist()], dtype=np.int64)
            return np.lexsort((-length, ranks))
        keys = {"inner": -length, "outer": length, "first": -first, "last": first, "refuse": first}
        return np.argsort(keys[self.overlaps], kind="stable")
