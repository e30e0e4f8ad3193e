"""Labels with times or numbers of their own, and the labels of a video's frames that follow from them."""

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

# Intervals may end this much after the last frame, since the durations that players show include the sound.
BEYOND_S = 1.0
# Times written this many frames apart, or more, are those of samples; times written more exactly are moments.
_COARSE_FRAMES = 1.5
_SUSPICIOUSLY_EARLY = 0.1  # a fraction of the video, in which all labels start if, say, seconds are read as frames
_MOST = 2.0**52  # frames; float64 represents every integer below

Numbers = NDArray[np.float64]
Frames = NDArray[np.int64]


@dataclass(frozen=True)
class TimeScale:
    """What the numbers in a file of labels count.

    `per_s` is how many there are per second: 1 for times in seconds, the rate of numbered samples, or None for the
    video's own frames, of which `origin` is the first. `tick_s` is how exactly times are written (0.001 for 12.345),
    and 0 for numbers of samples and frames. `offset_s` is added to all times. With `from_container`, they count from
    the container's start, not from the first frame.
    """

    per_s: float | None
    origin: int = 0
    tick_s: float = 0.0
    offset_s: float = 0.0
    from_container: bool = False

    def starts(self, numbers: Numbers, extent: Extent) -> Frames:
        """Return the first frame (N,) of labels that start at these numbers (N,).

        A time is a moment: the label starts with the first frame shown then or later. The number of a sample, and a
        time in whole seconds or otherwise written more coarsely than frames follow each other, means the frame that is
        on screen when the sample is taken.
        """
        if self._counts_frames(extent):
            return np.clip(numbers - self.origin, 0, _MOST).astype(np.int64)
        time_s = self._seconds(numbers, extent)
        if self._is_coarse(extent):
            return np.maximum(_on_screen(time_s, extent), 0)
        return _first_at(time_s - self._tolerance_s(extent, 0.5) - ROUNDING_S, extent)

    def stops(self, numbers: Numbers, extent: Extent, inclusive: bool) -> Frames:
        """Return the first frame (N,) after labels that end at these numbers (N,)."""
        if inclusive and self.tick_s and not self._is_coarse(extent):
            return _first_at(self._seconds(numbers, extent) + self._tolerance_s(extent, 1.0) + ROUNDING_S, extent)
        return self.starts(numbers + inclusive * (self.tick_s or 1.0), extent)

    def rows(self, numbers: Numbers, extent: Extent) -> Frames:
        """Return the frame (N,) on screen at these numbers (N,), which may be negative for rows before the video."""
        if self._counts_frames(extent):
            return np.clip(numbers - self.origin, 0, _MOST).astype(np.int64)
        tolerance_s = 0.0 if self._is_coarse(extent) else self._tolerance_s(extent, 1.0)
        return _on_screen(self._seconds(numbers, extent) + tolerance_s, extent)

    def before_s(self, numbers: Numbers, extent: Extent) -> Numbers:
        """Return by how many seconds each number (N,) is before the first frame; 0 for those that are not."""
        if self._counts_frames(extent):
            return np.zeros(len(numbers))
        return np.maximum(-self._seconds(numbers, extent), 0.0)

    def _counts_frames(self, extent: Extent) -> bool:
        return self._rate(extent) is None and not self.offset_s

    def _rate(self, extent: Extent) -> float | None:
        """Return the numbers per second; None for the video's frames, also if they are counted at a nominal rate."""
        nominal = self.per_s and not self.tick_s and extent.times_s is None and same_rate(self.per_s, extent.fps)
        return None if nominal else self.per_s

    def _seconds(self, numbers: Numbers, extent: Extent) -> Numbers:
        """Return these numbers (N,) in seconds from the first frame."""
        rate, counted = self._rate(extent), numbers - self.origin
        if rate is None and extent.times_s is not None:
            known = np.clip(counted, 0, extent.frame_count - 1)
            time_s = extent.times_s[known.astype(np.int64)] + (counted - known) / extent.fps
        else:
            time_s = counted / (rate or extent.fps)
        return time_s + self.offset_s - (extent.container_start_s if self.from_container else 0.0)

    def _is_coarse(self, extent: Extent) -> bool:
        return not self.tick_s or self.tick_s * extent.fps > _COARSE_FRAMES

    def _tolerance_s(self, extent: Extent, ticks: float) -> float:
        """Return the time of some `ticks`, by which rounding may have moved a time, but at most half a frame."""
        return min(ticks * self.tick_s, 0.5 / extent.fps)


def _on_screen(time_s: Numbers, extent: Extent) -> Frames:
    """Return the frame (N,) on screen at each time (N,), counted on before the first frame and after the last."""
    before = np.floor(np.clip((time_s + ROUNDING_S) * extent.fps, -_MOST, 0)).astype(np.int64)
    return np.where(before < 0, before, extent.on_screen(time_s))


def _first_at(time_s: Numbers, extent: Extent) -> Frames:
    """Return the first frame (N,) shown at each time (N,) or later; after the last, frames are counted on."""
    if extent.times_s is None:
        return np.ceil(np.clip(time_s * extent.fps, 0, _MOST)).astype(np.int64)
    within = np.searchsorted(extent.times_s, time_s, side="left")
    after = np.ceil(np.clip((time_s - extent.times_s[-1]) * extent.fps, 0, _MOST)).astype(np.int64)
    return within + np.maximum(after - 1, 0)


@dataclass(frozen=True, eq=False)
class TimedRows:
    """N rows in order, each for the frame on screen at `start` (N,), with labels (N,) or, for tools, (N, K) int8.

    A row is valid until the next one, but at most for the usual distance of rows. `places` (N,) says where each row is.
    """

    start: Numbers
    labels: NDArray[np.int8]
    places: Sequence[str]
    scale: TimeScale

    def last_frame(self, fps: float) -> int:
        """Return the frame after the last row's, at the rate `fps` of the source."""
        return _in_frames(float(self.start[-1] - self.scale.origin) + self._step(), self.scale, fps)

    def place(self, path: Path, extent: Extent) -> LabelTrack:
        """Return the rows numbered by the video's frames; `path` is for messages."""
        starts, step = self.scale.rows(self.start, extent), self._step()
        if step / (self.scale.per_s or extent.fps) * extent.fps <= _COARSE_FRAMES:
            return LabelTrack(starts, self.labels, 1, self.places)
        ends = self.scale.rows(self.start + step, extent)
        stride = max(int((ends - starts).max()), 1)
        # Rows have different numbers of frames. Where the next one is missing, a row without a label ends the last.
        last = extent.frame_count - stride * (extent.times_s is None)  # at a constant rate, spans differ by a frame
        is_missing = ends < np.append(starts[1:], last)
        gaps = ends[is_missing & (np.ptp(ends - starts) > 0)]
        if not len(gaps):
            return LabelTrack(starts, self.labels, stride, self.places)
        order = np.argsort(np.append(starts, gaps), kind="stable")
        none = np.full((len(gaps), *self.labels.shape[1:]), -1, dtype=np.int8)
        places = [self.places[at] if at < len(starts) else "a missing row" for at in order.tolist()]
        labels = np.concatenate([self.labels, none])[order]
        return LabelTrack(np.append(starts, gaps)[order], labels, stride, places)

    def _step(self) -> float:
        """Return the usual distance of rows in the file's unit."""
        steps = np.diff(self.start)
        usual = float(np.median(steps)) if len(steps) else self.scale.tick_s or 1.0
        alike = steps[np.abs(steps - usual) <= usual / 4]
        return float(alike.mean()) if len(alike) else usual


@dataclass(frozen=True, eq=False)
class TimedLabels:
    """N intervals of a video, each from `start` (N,) to `end` (N,), with a class (N,) int8.

    With `inclusive`, the frame at `end` is the last one of the interval; otherwise it is the first one after it.
    `overlaps` says which of several intervals counts: "refuse", "inner", "outer", "first", "last", or classes of which
    the first counts most. Frames in no interval have the class `gap`, or no label if it is -1. With `tool_count`,
    classes are tools; several may be present, frames outside their intervals do not show them, and frames in an
    interval of class -1 have no label. `places` (N,) says where each interval was read, for messages.
    """

    start: Numbers
    end: Numbers
    classes: NDArray[np.int8]
    places: Sequence[str]
    scale: TimeScale
    inclusive: bool = False
    overlaps: str | tuple[int, ...] = "refuse"
    gap: int = -1
    tool_count: int = 0

    def last_frame(self, fps: float) -> int:
        """Return the frame after the last interval's end, at the rate `fps` of the source."""
        known = np.where(np.isfinite(self.end), self.end, self.start) - self.scale.origin
        return _in_frames(float(known.max(initial=0.0)), self.scale, fps)

    def place(self, path: Path, extent: Extent) -> LabelTrack:
        """Return the label of each of the video's frames, as a track with one row per frame.

        Raises UserError naming `path` and the place of an interval that begins or ends after the video, that ends
        before it, or that overlaps another one with another label.
        """
        first, stop = self.scale.starts(self.start, extent), self.scale.stops(self.end, extent, self.inclusive)
        self._require_inside(path, first, stop, extent)
        labels: NDArray[np.int8]
        if self.tool_count:
            labels = np.zeros((extent.frame_count, self.tool_count), dtype=np.int8)
            for at in np.argsort(-self.classes, kind="stable").tolist():  # those without a label come last
                tool = self.classes[at]
                labels[first[at] : stop[at], tool if tool >= 0 else slice(None)] = 1 if tool >= 0 else -1
        else:
            for alike in self._equally_important():
                self._refuse_overlaps(path, first, stop, alike)
            labels = np.full(extent.frame_count, self.gap, dtype=np.int8)
            for at in self._painting_order().tolist():
                labels[first[at] : stop[at]] = self.classes[at]
        return LabelTrack(np.arange(extent.frame_count, dtype=np.int64), labels, 1)

    def notes(self, path: Path, extent: Extent) -> list[str]:
        """Return notes on intervals that are cut or label no frame, and on starts that suggest another unit."""
        first, stop = self.scale.starts(self.start, extent), self.scale.stops(self.end, extent, self.inclusive)
        before_s, count, notes = self.scale.before_s(self.start, extent), len(self.start), []
        early = before_s * extent.fps > 1.0
        if early.any():
            notes.append(
                f"{path.name}: {early.sum()} of {count} labels begin before the first frame of {extent.name}, up to "
                f"{before_s.max():.1f} s, and are cut there"
            )
        if short := int((~early & (stop <= first)).sum()):
            notes.append(f"{path.name}: {short} of {count} labels end before the next frame and label none")
        last = first.max(initial=0) / extent.frame_count
        if count > 2 and np.isinf(self.end).any() and last < _SUSPICIOUSLY_EARLY:
            notes.append(
                f"{path.name}: all {count} labels begin in the first {max(last, 0.001):.1%} of {extent.name}; check "
                "unit and rate in `labels` of the data set's description"
            )
        return notes

    def _require_inside(self, path: Path, first: Frames, stop: Frames, extent: Extent) -> None:
        last = extent.frame_count + max(round(BEYOND_S * extent.fps), extent.stride)
        ends_late = np.isfinite(self.end) & (stop > last)
        for what, late, bounds in (("begins", first >= last, self.start), ("ends", ends_late, self.end)):
            if late.any():
                at = int(np.argmax(late))
                unit = " s" if self.scale.tick_s else ""
                raise UserError(
                    f"{path}: {self.places[at]} {what} at {bounds[at]:.10g}{unit}, after the end of {extent.name} "
                    f"({extent.frame_count} frames, {extent.duration_s:.1f} s); check unit, rate and origin in "
                    "`labels` of the data set's description, or whether these are the labels of another cut of the "
                    "video"
                )
        before_s = self.scale.before_s(self.end, extent)
        if (before_s > BEYOND_S).any():
            at = int(np.argmax(before_s > BEYOND_S))
            raise UserError(
                f"{path}: {self.places[at]} ends {before_s[at]:.1f} s before the first frame of {extent.name}; check "
                "offset_s and zero in `labels` of the data set's description, or whether these are the labels of "
                "another cut of the video"
            )

    def _refuse_overlaps(self, path: Path, first: Frames, stop: Frames, alike: Frames) -> None:
        """Raise UserError if two intervals with different labels, of those in `alike` (M,), share a frame."""
        order = alike[np.argsort(first[alike], kind="stable")]
        if (first[order][1:] >= np.maximum.accumulate(stop[order])[:-1]).all():
            return  # none overlap
        reaching: dict[int, int] = {}  # by class: the interval that ends last among those that begin earlier
        for at in order.tolist():
            mine = int(self.classes[at])
            for other, longest in reaching.items():
                if other != mine and first[at] < min(stop[longest], stop[at]):
                    equal = "" if self.overlaps == "refuse" else " and counts as much by its `overlaps`"
                    raise UserError(
                        f"{path}: {self.places[at]} overlaps {self.places[longest]}, which has another label{equal}; "
                        "correct them, choose an annotator with `where`, or say which counts with `overlaps`, in "
                        "`labels` of the data set's description"
                    )
            if mine not in reaching or stop[at] > stop[reaching[mine]]:
                reaching[mine] = at

    def _importance(self) -> Numbers:
        """Return what decides which of several intervals counts, (N, 2): the first number, and if equal the second.

        The larger one counts. All are equal if overlaps are refused.
        """
        rank, length = np.zeros(len(self.start)), np.round(self.end - self.start, 6)  # decimals differ inexactly
        if isinstance(self.overlaps, tuple):  # the classes that count most; the others as with `inner`
            ranks = {number: len(self.overlaps) - at for at, number in enumerate(self.overlaps)}
            rank = np.array([ranks.get(number, 0) for number in self.classes.tolist()], dtype=np.float64)
            return np.stack([rank, -length], axis=1)
        rules = {"inner": -length, "outer": length, "first": -self.start, "last": self.start}
        return np.stack([rank, rules.get(self.overlaps, rank)], axis=1)

    def _equally_important(self) -> list[Frames]:
        """Return the groups of two or more intervals of which none counts more than the others."""
        _, group, count = np.unique(self._importance(), axis=0, return_inverse=True, return_counts=True)
        order = np.argsort(group.reshape(-1), kind="stable")
        return [alike for alike in np.split(order, np.cumsum(count)[:-1]) if len(alike) > 1]

    def _painting_order(self) -> Frames:
        """Return the intervals (N,) in the order in which they are painted over each other."""
        rank, then = self._importance().T
        return np.lexsort((then, rank))


def _in_frames(number: float, scale: TimeScale, fps: float) -> int:
    return round(min(number * (fps / scale.per_s if scale.per_s else 1.0) + scale.offset_s * fps, _MOST))
