"""Labels for sampled frames: how rows spread over them, and tracks fitted to their video.

Times are source frame numbers, counted from 0. -1 means no label.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from configs.errors import UserError, listed
from configs.schema import DataConfig
from features.dataset.annotations import PhaseTrack, ToolTrack, row_error
from features.video.times import ROUNDING_S, same_rate

Track = PhaseTrack | ToolTrack
AnyTrack = TypeVar("AnyTrack", PhaseTrack, ToolTrack)
BetweenRows = Literal["mask", "hold"]

# Fractions of a video: how near its end rows are as long as it; where one of two readings is taken, the other not.
_EXACT, _COVERS, _HARDLY_ANY = 0.02, 0.75, 0.1
# Rates that annotation programs number rows at; 1 is one row per second, counted instead of placed.
_COMMON_FPS = (1.0, 2.0, 5.0, 10.0, 12.5, 15.0, 24.0, 25.0, 30.0, 50.0, 60.0)


# ---------------------------------------------------------------------------------------------- rows to frames


def sample_labels(
    frame_index: np.ndarray | Sequence[int],
    phase: PhaseTrack | None,
    tools: ToolTrack | None,
    between_rows: BetweenRows,
    tool_count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the frames `frame_index` (T,): phase (T,) int8 and tools (T, K) int8, -1 where there is no label.

    A phase row holds until the next row or for a stride, whichever is first, so that missing rows leave their frames
    without labels. A tool row labels its own frame alone, or where that was not sampled the sampled frame next to it
    (`between_rows` "mask"), or holds like a phase ("hold").
    `tool_count` is K, for videos without tool rows.
    """
    frames = np.asarray(frame_index, dtype=np.int64)
    phase_labels = np.full(len(frames), -1, dtype=np.int8)
    tool_labels = np.full((len(frames), tool_count), -1, dtype=np.int8)
    if phase is not None:
        row, covered = _rows_at(frames, phase)
        phase_labels[covered] = phase.phase[row[covered]]
    if tools is not None:
        row, covered = _rows_at(frames, tools) if between_rows == "hold" else _rows_next_to(frames, tools)
        tool_labels[covered] = tools.tools[row[covered]]
    return phase_labels, tool_labels


def _rows_at(frames: np.ndarray, track: Track) -> tuple[np.ndarray, np.ndarray]:
    """The row (T,) that holds at each frame, and whether (T,) there is one. Of rows of one frame the first counts."""
    starts = track.frame_index
    row = np.searchsorted(starts, starts[np.searchsorted(starts, frames, "right") - 1])
    return row, (frames >= starts[0]) & (frames < starts[row] + track.stride)


def _rows_next_to(frames: np.ndarray, track: Track) -> tuple[np.ndarray, np.ndarray]:
    """The row (T,) nearest to each frame, and whether (T,) it labels it: each is nearest to the other, and near enough.

    Where samples are evenly spaced, that is the row of the very frame. Where they are not (29.97 fps sampled at 1 fps,
    with a row every 30 frames), no row lies further off than half the distance between samples.
    """
    steps = np.diff(frames)
    if not len(frames):
        return frames, np.zeros(0, dtype=bool)
    row = _nearest(track.frame_index, frames)
    distance = np.abs(track.frame_index[row] - frames)
    apart = np.median(steps) if len(set(steps.tolist())) > 1 else 0
    return row, (_nearest(frames, track.frame_index)[row] == np.arange(len(frames))) & (2 * distance <= apart)


def _nearest(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The position in `places`, rising, of what is nearest to each of `wanted`; the first of two as near."""
    after = np.searchsorted(places, wanted).clip(0, len(places) - 1)
    before = (after - 1).clip(0)
    return np.where(wanted - places[before] <= np.abs(places[after] - wanted), before, after)


def track_end(track: Track) -> int:
    """The first frame after the last row's span."""
    return int(track.frame_index[-1]) + track.stride


def unlabelled_note(phases: Mapping[str, np.ndarray], means: str) -> list[str]:
    """A note where some frames of videos have no phase, by id (T,), and what that means; nothing where all have one."""
    bare = {video_id: int((phase < 0).sum()) for video_id, phase in phases.items() if (phase < 0).any()}
    if not bare:
        return []
    total = sum(map(len, phases.values()))
    return [f"note: {sum(bare.values()):,} of {total:,} frames have no phase label ({listed([*bare])}) and {means}"]


# ---------------------------------------------------------------------------------------------- tracks to video


@dataclass(frozen=True)
class Extent:
    """What labels must fit into: a video's or folder's frames.

    `row_fps` is the rate at which the data set's description says that annotation files number frames. `stride` is the
    distance in source frames between images (1 for a video), `base` the number of a folder's first image. `times_s`
    (F,) holds when frames are shown where that is not at a constant rate.
    """

    name: str
    frame_count: int
    fps: float
    row_fps: float
    stride: int = 1
    base: int = 0
    times_s: np.ndarray | None = None

    @property
    def duration_s(self) -> float:
        return self.frame_count / self.fps

    def on_screen(self, time_s: np.ndarray) -> np.ndarray:
        """The frame (T,) int64 that is shown at each time (T,); times after the last frame count on at the rate."""
        last_s = 0.0 if self.times_s is None else float(self.times_s[-1])
        # a list may hold any number: beyond the precision of float64 one frame is as good as another
        after = np.floor(np.minimum((time_s - last_s + ROUNDING_S) * self.fps, 2.0**53)).astype(np.int64)
        if self.times_s is None:
            return after
        shown: np.ndarray = np.searchsorted(self.times_s, time_s + ROUNDING_S, side="right") - 1
        return shown + np.maximum(after, 0)


@dataclass(frozen=True)
class Reading:
    """What the numbers of a list's rows mean: row r holds from (r - `base`) / `fps` seconds on.

    Where `fps` is None, numbers are those of the video's own frames.
    """

    fps: float | None = None
    base: int = 0

    def place(self, path: Path, track: AnyTrack, extent: Extent) -> AnyTrack:
        """The list on the video's timeline: a row is at the frame on screen at its time. Raises UserError."""
        numbers = track.frame_index - self.base
        if numbers[0] < 0:
            raise row_error(path, 0, f"is number 0, before data.row_base={self.base}; set data.row_base=0")
        if self.fps is None:
            return replace(track, frame_index=numbers)
        starts = extent.on_screen(numbers / self.fps)
        spans = extent.on_screen((numbers + track.stride) / self.fps) - starts
        return replace(track, frame_index=starts, stride=max(int(spans.max()), 1))

    def notes(self, path: Path, extent: Extent) -> list[str]:
        """What the user should know that it was taken so."""
        if self.fps is not None:
            what = [f"rows are numbered at {self.fps:g} fps"]
        elif not same_rate(extent.fps, extent.row_fps):
            what = [f"rows number the video's own frames at {extent.fps:g} fps, not at {extent.row_fps:g} fps"]
        else:
            what = []
        return [f"{path.name}: {text}" for text in (*what, *[f"rows are numbered from {self.base}"] * bool(self.base))]


def read_numbers(lists: Sequence[tuple[Path, Track]], extent: Extent, data: DataConfig) -> list[Reading]:
    """What the numbers in the Frame columns of a video's lists count, and from what: as set, or inferred from lengths.

    Possible are the video's own frames, the rate in the data set's description, a folder's images, and seconds; none
    that would go on after the end. The one whose rows last as long as the video is taken, otherwise one that covers the
    video where all others cover hardly any of it. A list that leaves it open is read as the video's other list.
    Raises UserError that names the setting where both do.
    """
    readings: dict[Path, Reading] = {}
    slack = max((track.stride for _, track in lists), default=1)
    problem: UserError | None = None
    for path, track in (*lists, *lists):  # the second time with what the other list says
        if path not in readings:
            try:
                readings[path] = _read_numbers(path, track, slack, extent, data, next(iter(readings.values()), None))
            except UserError as error:
                problem = problem or error
    if problem and len(readings) < len(lists):
        raise problem
    return [readings[path] for path, _ in lists]


def _read_numbers(
    path: Path, track: Track, slack: int, extent: Extent, data: DataConfig, other: Reading | None
) -> Reading:
    rates: list[float | None] = [None, rate_of_rows(extent.row_fps, extent.fps)]
    if track.stride == 1:
        rates += [rate_of_rows(extent.fps / extent.stride, extent.fps), rate_of_rows(1.0, extent.fps)]
    if data.row_fps != "auto":
        rates = [rate_of_rows(data.row_fps, extent.fps)]
        if data.row_fps != "source":  # 30 on 29.97 fps may be meant to the letter: they drift apart
            rates.append(data.row_fps)
    candidates = [_Candidate.of(rate, track, slack, extent, data) for rate in dict.fromkeys(rates)]
    possible = [one for one in candidates if one.possible]
    exact = [one for one in possible if one.exact]
    if other and not exact and any(one.fps == other.fps for one in possible):
        possible = [one for one in possible if one.fps == other.fps]
    if data.row_fps != "auto":
        possible = exact or possible[:1]
    elif not exact:
        _refuse_common_rate(path, track, extent)
    if exact or len(possible) < 2:  # none: the first, whose end is refused with its row
        best = min(exact or possible or candidates[:1], key=lambda one: abs(one.end_s - extent.duration_s))
    else:
        stated = {rate_of_rows(rate, extent.fps) for rate in (extent.row_fps, data.folder_fps) if rate} - {None}
        best = _covering(path, track, extent, possible, stated)
    base = _base(path, track, extent, data, best.fps, other)
    return Reading(best.fps, base)


def _covering(
    path: Path, track: Track, extent: Extent, possible: Sequence[_Candidate], stated: Container[float | None]
) -> _Candidate:
    """The one that covers the video, or is at a `stated` rate, where the others cover hardly any of it.

    Raises UserError where there is none.
    """
    *rest, best = sorted(possible, key=lambda one: one.end_s)
    covers = best.fps in stated or best.end_s >= _COVERS * extent.duration_s
    if covers and rest[-1].end_s <= _HARDLY_ANY * extent.duration_s:
        return best
    ways = " or ".join(
        f"{'source' if one.fps is None else f'{one.fps:g}'} ({min(one.end_s / extent.duration_s, 1):.0%} of it)"
        for one in (best, *reversed(rest))
    )
    raise UserError(
        f"{path}: what do its numbers, up to {int(track.frame_index[-1])}, count? {extent.name} lasts "
        f"{extent.duration_s:.1f} s ({extent.frame_count} frames); set data.row_fps to the numbers per second, or to "
        f"source for the video's own frames: {ways}"
    )


def _base(path: Path, track: Track, extent: Extent, data: DataConfig, fps: float | None, other: Reading | None) -> int:
    """The number that rows are counted from. Raises UserError where the numbers leave that open."""
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
            f"starts at {first}, neither 0 nor 1: renumber the file, or set data.row_base=0 if rows 0 to {first - 1} "
            "are missing",
        )
    rows = extent.duration_s * (fps or extent.fps)
    if track.stride > 1 or extent.base == 1 or last > rows - 1:
        return 1
    if other:
        return other.base
    raise row_error(
        path,
        0,
        f"is number 1 and the last row {last}, of {rows:.10g} in {extent.name}: are they numbered from 1, or is row 0 "
        "missing? Set data.row_base=1 or data.row_base=0",
    )


def rate_of_rows(fps: float | Literal["source"], video_fps: float) -> float | None:
    """A rate as `Reading` has it: None where numbers are those of the video's own frames."""
    return None if fps == "source" or same_rate(fps, video_fps) else fps


@dataclass(frozen=True)
class _Candidate:
    """A rate at which a list's rows may be numbered, and when the last one would end.

    It is possible where no more than the usual trailing row would lie beyond the video.
    """

    fps: float | None
    end_s: float
    possible: bool
    exact: bool

    @classmethod
    def of(cls, fps: float | None, track: Track, slack: int, extent: Extent, data: DataConfig) -> _Candidate:
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


def fit_tracks(
    phase: tuple[Path, PhaseTrack] | None, tools: tuple[Path, ToolTrack] | None, extent: Extent
) -> tuple[PhaseTrack | None, ToolTrack | None, tuple[str, ...]]:
    """Both tracks, on the video's timeline, cut to the video and to each other, and notes on what has no label.

    The usual trailing row is cut: what starts after the end of the video, or after the end of the other list, by no
    more than one row of the coarsest stride among the lists and the images. More than that after the video is an error
    naming file and row. Labels that start late, miss rows or end early leave frames without labels, with a note.
    Raises UserError.
    """
    given: list[tuple[Path, Track]] = [pair for pair in (phase, tools) if pair is not None]
    slack = max([extent.stride, *(track.stride for _, track in given)])
    notes: list[str] = []
    for path, track in given:
        _check_end(path, track, extent, slack)
    end = min([extent.frame_count, *(track_end(track) for _, track in given)])
    if any(track.frame_index[-1] >= end + slack for _, track in given):  # one of the two ends early
        end = extent.frame_count
    cut_phase = _cut(phase, end, extent, notes)
    cut_tools = _cut(tools, end, extent, notes)
    for path, track in given:
        notes += _uncovered(path, track, extent, slack)
    return cut_phase, cut_tools, tuple(notes)


def labelled_fractions(frames: np.ndarray, phase: PhaseTrack | None, tools: ToolTrack | None) -> list[float]:
    """The fraction of `frames` (T,) that each list given labels: with a phase, and with some tool (rows held)."""
    labels, tool_labels = sample_labels(frames, phase, tools, "hold", 0 if tools is None else tools.tools.shape[1])
    covered = [labels >= 0] * (phase is not None) + [(tool_labels >= 0).any(axis=1)] * (tools is not None)
    return [float(one.mean()) for one in covered]


def _refuse_common_rate(path: Path, track: Track, extent: Extent) -> None:
    """Raise UserError where rows that fit no reading exactly last as long as the video at a common rate.

    Exactly means within a row and a half and an image. A rate is no evidence where that is not small against
    the difference that it makes, so short videos and coarse rows pass.
    """
    end = track_end(track)
    for rate in _COMMON_FPS:
        tolerance_s = 1.5 * track.stride / rate + extent.stride / extent.fps
        difference_s = abs(extent.frame_count - extent.duration_s * rate) / extent.fps
        if abs(end / rate - extent.duration_s) <= tolerance_s and difference_s > 10 * tolerance_s:
            last = len(track.frame_index) - 1
            raise row_error(
                path,
                last,
                f"is frame {int(track.frame_index[last])}: rows are numbered as if at {rate:g} fps, but {extent.name} "
                f"runs at {extent.fps:g} fps ({extent.frame_count} frames, {extent.duration_s:.1f} s); set "
                f"data.row_fps={rate:g}, or data.row_fps=source if they count the video's frames",
            )


def _check_end(path: Path, track: Track, extent: Extent, slack: int) -> None:
    """Raise UserError when rows lie beyond the video by more than `slack` frames."""
    if track.frame_index[-1] < extent.frame_count + slack:
        return
    row = int(np.searchsorted(track.frame_index, extent.frame_count))
    raise row_error(
        path,
        row,
        f"is frame {int(track.frame_index[row])}, beyond the {extent.frame_count} frames ({extent.duration_s:.1f} s at "
        f"{extent.fps:g} fps) of {extent.name}: as they are numbered, the rows last {track_end(track) / extent.fps:.1f}"
        " s; set data.row_fps if they count something else",
    )


def _cut(pair: tuple[Path, AnyTrack] | None, end: int, extent: Extent, notes: list[str]) -> AnyTrack | None:
    """The track without rows at or after `end`, with a note when there were any."""
    if pair is None:
        return None
    path, track = pair
    rows = len(track.frame_index)
    kept = int(np.searchsorted(track.frame_index, end))
    if kept == 0:
        raise UserError(f"{path}: no row lies inside the {extent.frame_count} frames of {extent.name}")
    if kept < rows:
        notes.append(f"{path.name}: {_count(rows - kept, 'trailing row')} cut, from frame {end} on")
    return track.head(kept)


def _uncovered(path: Path, track: Track, extent: Extent, slack: int) -> list[str]:
    """Notes on frames before the first row and after the last one that have no label."""
    notes = []
    first = int(track.frame_index[0])
    if first > 0:
        notes.append(f"{path.name}: starts late; the first {_count(first, 'frame')} have no label")
    steps = np.diff(track.frame_index)
    holes = np.flatnonzero(steps > track.stride)
    if len(holes):
        frames = int((steps[holes] - track.stride).sum())
        first_hole = int(track.frame_index[holes[0]]) + track.stride
        notes.append(
            f"{path.name}: rows are missing, first from frame {first_hole}; {_count(frames, 'frame')} without a label"
        )
    unlabelled = int((track.phase < 0).sum() if isinstance(track, PhaseTrack) else (track.tools < 0).any(axis=1).sum())
    if unlabelled:
        notes.append(f"{path.name}: {_count(unlabelled, 'row')} without a label (-1 or empty)")
    missing = extent.frame_count - track_end(track)
    if missing >= slack:
        fraction = missing / extent.frame_count
        notes.append(f"{path.name}: ends early; the last {_count(missing, 'frame')} ({fraction:.1%}) have no label")
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
