"""Infer what the numbers in an annotation file's Frame column count: the video's frames, its images, or seconds."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import DataConfig
from features.dataset.annotations import LabelTrack, row_error
from features.video.times import ROUNDING_S, same_rate

# Fractions of a video's duration. _EXACT: rows that end this close to the video's end fit exactly. If no numbering fits
# exactly, the chosen one must cover at least _COVERS of the video, and all others at most _HARDLY_ANY.
_EXACT, _COVERS, _HARDLY_ANY = 0.02, 0.75, 0.1
# Rates at which annotation programs number rows, per second; with 1, rows are numbered by seconds.
_COMMON_FPS = (1.0, 2.0, 5.0, 10.0, 12.5, 15.0, 24.0, 25.0, 30.0, 50.0, 60.0)


@dataclass(frozen=True)
class Extent:
    """The number and times of the frames of a video or folder, which its labels must fit.

    `row_fps` is the rate at which annotation files number frames according to the data set's description. `stride` is
    the distance between images in source frames (1 for a video), and `base` is the number of a folder's first image. If
    the rate is not constant, `times_s` (F,) contains the times of the frames. `container_start_s` is the time of the
    first frame from the container's start, where a description of labels needs it.
    """

    name: str
    frame_count: int
    fps: float
    row_fps: float
    stride: int = 1
    base: int = 0
    times_s: NDArray[np.float64] | None = None
    container_start_s: float = 0.0

    @property
    def duration_s(self) -> float:
        return self.frame_count / self.fps

    def on_screen(self, time_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the frame (T,) int64 that is on screen at each time (T,).

        After the last frame, frames are counted on at the video's rate.
        """
        last_s = 0.0 if self.times_s is None else float(self.times_s[-1])
        # A file may contain any number, so clip it where float64 can no longer represent every integer.
        after = np.floor(np.minimum((time_s - last_s + ROUNDING_S) * self.fps, 2.0**53)).astype(np.int64)
        if self.times_s is None:
            return after
        shown: NDArray[np.int64] = np.searchsorted(self.times_s, time_s + ROUNDING_S, side="right") - 1
        return shown + np.maximum(after, 0)


@dataclass(frozen=True)
class RowNumbering:
    """What the numbers of an annotation file's rows mean: row number r starts at (r - `base`) / `fps` seconds.

    If `fps` is None, the numbers count the video's own frames.
    """

    fps: float | None = None
    base: int = 0

    def place(self, path: Path, track: LabelTrack, extent: Extent) -> LabelTrack:
        """Return the track with rows numbered by source frames: each row gets the frame on screen at its time.

        Raises UserError naming `path` and row if a number is below `base`.
        """
        numbers = track.frame_index - self.base
        if numbers[0] < 0:
            problem = f"is number {int(track.frame_index[0])}, before {track.set_base(self.base)}; set"
            raise row_error(path, 0, f"{problem} {track.set_base(0)}", track.places)
        if self.fps is None:
            return replace(track, frame_index=numbers)
        starts = extent.on_screen(numbers / self.fps)
        spans = extent.on_screen((numbers + track.stride) / self.fps) - starts
        return replace(track, frame_index=starts, stride=max(int(spans.max()), 1))

    def notes(self, path: Path, extent: Extent) -> list[str]:
        """Return notes for the user if the numbers do not start at 0, or do not have the data set's usual rate."""
        if self.fps is not None:
            what = [f"rows are numbered at {self.fps:g} fps"]
        elif not same_rate(extent.fps, extent.row_fps):
            what = [f"rows count the video's own frames at {extent.fps:g} fps, not frames at {extent.row_fps:g} fps"]
        else:
            what = []
        return [f"{path.name}: {text}" for text in (*what, *[f"rows are numbered from {self.base}"] * bool(self.base))]


def infer_numberings(
    lists: Sequence[tuple[Path, LabelTrack]], extent: Extent, data: DataConfig, stated: Sequence[DataConfig] = ()
) -> list[RowNumbering]:
    """Return the numbering of each of a video's annotation files: from the settings, or inferred.

    Rows may count the video's own frames, frames at the rate in the data set's description, a folder's images, or
    seconds. A numbering is impossible if rows would continue after the end of the video. Of the possible ones, the one
    whose rows last as long as the video is chosen. If there is none, one that covers the video is chosen, provided that
    all others cover hardly any of it. An ambiguous file is read like the video's other file. Raises UserError naming
    the setting if both are ambiguous. Where the data set's description states the numbering, `stated` has the settings
    of each file in place of `data`.
    """
    settings = stated or [data] * len(lists)
    numberings: dict[int, RowNumbering] = {}
    slack = max((track.stride for _, track in lists), default=1)
    problem: UserError | None = None
    for at, (path, track) in (*enumerate(lists), *enumerate(lists)):  # the second time, another's numbering is known
        if at not in numberings:
            try:
                numberings[at] = _infer_numbering(
                    path, track, slack, extent, settings[at], next(iter(numberings.values()), None)
                )
            except UserError as error:
                problem = problem or error
    if problem and len(numberings) < len(lists):
        raise problem
    return [numberings[at] for at in range(len(lists))]


def _infer_numbering(
    path: Path, track: LabelTrack, slack: int, extent: Extent, data: DataConfig, other: RowNumbering | None
) -> RowNumbering:
    rates: list[float | None] = [None, rate_of_rows(extent.row_fps, extent.fps)]
    if track.stride == 1:
        rates += [rate_of_rows(extent.fps / extent.stride, extent.fps), rate_of_rows(1.0, extent.fps)]
    if data.row_fps != "auto":
        rates = [rate_of_rows(data.row_fps, extent.fps)]
        if data.row_fps != "source":  # 30 for a video of 29.97 fps may be meant exactly, which makes a difference
            rates.append(data.row_fps)
        if data.row_fps != "source" and extent.times_s is not None and track.places is not None:
            rates = [data.row_fps]  # frames of a varying rate are counted only if the description says `source`
    candidates = [_Candidate.of(rate, track, slack, extent, data) for rate in dict.fromkeys(rates)]
    possible = [one for one in candidates if one.possible]
    exact = [one for one in possible if one.exact]
    if other and not exact and any(one.fps == other.fps for one in possible):
        possible = [one for one in possible if one.fps == other.fps]
    if data.row_fps != "auto":
        possible = exact or possible[:1]
    elif not exact:
        _refuse_common_rate(path, track, extent)
    if exact or len(possible) < 2:  # if none is possible, take the first, which is refused later for its last row
        best = min(exact or possible or candidates[:1], key=lambda one: abs(one.end_s - extent.duration_s))
    else:
        stated = {rate_of_rows(rate, extent.fps) for rate in (extent.row_fps, data.folder_fps) if rate} - {None}
        best = _covering(path, track, extent, possible, stated)
    base = _base(path, track, extent, data, best.fps, other)
    return RowNumbering(best.fps, base)


def _covering(
    path: Path, track: LabelTrack, extent: Extent, possible: Sequence[_Candidate], stated: Container[float | None]
) -> _Candidate:
    """Return the candidate that covers the video or has a `stated` rate, if all others cover hardly any of the video.

    Raises UserError naming the choices if there is no such candidate.
    """
    *rest, best = sorted(possible, key=lambda one: one.end_s)
    covers = best.fps in stated or best.end_s >= _COVERS * extent.duration_s
    if covers and rest[-1].end_s <= _HARDLY_ANY * extent.duration_s:
        return best
    ways = " or ".join(
        f"{'source' if one.fps is None else f'{one.fps:g}'} (covers {min(one.end_s / extent.duration_s, 1):.0%})"
        for one in (best, *reversed(rest))
    )
    raise UserError(
        f"{path}: it is unclear what its numbers, up to {int(track.frame_index[-1])}, count; {extent.name} lasts "
        f"{extent.duration_s:.1f} s ({extent.frame_count} frames); set {track.set_rate()} to the numbers per second, "
        f"or to source for the video's own frames: {ways}"
    )


def _base(
    path: Path, track: LabelTrack, extent: Extent, data: DataConfig, fps: float | None, other: RowNumbering | None
) -> int:
    """Return the number that stands for the video's first frame. Raises UserError if that is ambiguous."""
    if data.row_base != "auto":
        return data.row_base
    first, last = int(track.frame_index[0]), int(track.frame_index[-1])
    if first == extent.base > 1:
        return first
    if first == 0 or (first > track.stride and extent.base < 2):
        return 0
    if first > 1:
        raise row_error(
            path,
            0,
            f"starts at {first}, not at 0 or 1: renumber the file, or set {track.set_base(0)} if rows 0 to {first - 1} "
            "are missing",
            track.places,
        )
    rows = extent.duration_s * (fps or extent.fps)
    if track.stride > 1 or extent.base == 1 or last > rows - 1:
        return 1
    if other:
        return other.base
    raise row_error(
        path,
        0,
        f"is number 1, and the last row is number {last} of {rows:.10g} in {extent.name}: set {track.set_base(1)} if "
        f"rows are numbered from 1, or {track.set_base(0)} if row 0 is missing",
        track.places,
    )


def rate_of_rows(fps: float | Literal["source"], video_fps: float) -> float | None:
    """Return `RowNumbering.fps` for a rate: None if it means the video's own frames."""
    return None if fps == "source" or same_rate(fps, video_fps) else fps


@dataclass(frozen=True)
class _Candidate:
    """A rate at which rows may be numbered, and the time at which the last row would then end.

    It is `possible` if at most one trailing row is beyond the video's end, and `exact` if the rows end with the video.
    """

    fps: float | None
    end_s: float
    possible: bool
    exact: bool

    @classmethod
    def of(cls, fps: float | None, track: LabelTrack, slack: int, extent: Extent, data: DataConfig) -> _Candidate:
        rate, image_s = fps or extent.fps, extent.stride / extent.fps
        first = int(track.frame_index[0])
        base = data.row_base if data.row_base != "auto" else first if first in (1, extent.base) else 0
        last_s = (int(track.frame_index[-1]) - base) / rate
        end_s = last_s + track.stride / rate
        tolerance_s = max(track.stride / rate, image_s, min(1.0, _EXACT * extent.duration_s))
        return cls(
            fps,
            end_s,
            last_s < extent.duration_s + max(slack / max(rate, extent.row_fps), tolerance_s),
            abs(end_s - extent.duration_s) <= tolerance_s,
        )


def _refuse_common_rate(path: Path, track: LabelTrack, extent: Extent) -> None:
    """Raise UserError if rows, which fit the video exactly under no numbering, would do so at another common rate.

    "Fit" means a difference of at most 1.5 rows and an image. This is taken as evidence only if the change of rate
    makes a difference more than ten times as large, so short videos and coarse rows are never refused.
    """
    for rate in _COMMON_FPS:
        tolerance_s = 1.5 * track.stride / rate + extent.stride / extent.fps
        difference_s = abs(extent.frame_count - extent.duration_s * rate) / extent.fps
        if abs(track.end / rate - extent.duration_s) <= tolerance_s and difference_s > 10 * tolerance_s:
            last = len(track.frame_index) - 1
            raise row_error(
                path,
                last,
                f"is frame {int(track.frame_index[last])}: rows are numbered as if at {rate:g} fps, but {extent.name} "
                f"runs at {extent.fps:g} fps ({extent.frame_count} frames, {extent.duration_s:.1f} s); set "
                f"{track.set_rate(rate)}, or {track.set_rate('source')} if they count the video's frames",
                track.places,
            )
