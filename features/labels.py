"""Labels for sampled frames: how rows spread over them, and tracks fitted to their video.

Times are source frame numbers, counted from 0. -1 means no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from configs.errors import UserError
from features.annotations import PhaseTrack, ToolTrack, row_error
from features.times import RATE_TOLERANCE

Track = PhaseTrack | ToolTrack
AnyTrack = TypeVar("AnyTrack", PhaseTrack, ToolTrack)
BetweenRows = Literal["mask", "hold"]

# Rates that annotation programs number rows at; 1 is a row a second, counted instead of placed.
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

    A phase row holds until the next row, the last one for a stride. A tool row labels its own frame alone, or where
    that was not sampled the sampled frame next to it (`between_rows` "mask"), or holds like a phase ("hold").
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
    """The row (T,) that holds at each frame, and whether (T,) there is one; strides are even, so no search."""
    row = (frames - track.frame_index[0]) // track.stride
    return row, (row >= 0) & (row < len(track.frame_index))


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


# ---------------------------------------------------------------------------------------------- tracks to video


@dataclass(frozen=True)
class Extent:
    """What labels must fit into: a video's or folder's frames.

    `stride` is the distance in source frames between images (1 for a video); `row_fps` the rate at which the data
    set's annotation files number frames.
    """

    name: str
    frame_count: int
    fps: float
    row_fps: float
    stride: int = 1

    @property
    def duration_s(self) -> float:
        return self.frame_count / self.fps


def fit_tracks(
    phase: tuple[Path, PhaseTrack] | None, tools: tuple[Path, ToolTrack] | None, extent: Extent
) -> tuple[PhaseTrack | None, ToolTrack | None, tuple[str, ...]]:
    """Both tracks cut to the video and to each other, and notes on what was cut or is not labelled.

    The usual trailing row is cut: what starts after the end of the video, or after the end of the other list, by no
    more than one row of the coarsest stride among the lists and the images. More than that, or rows numbered at
    another rate than the video's, is an error naming file, row and both rates. Where the video's rate is not the one
    that the data set's rows are numbered at, rows that number the video's own frames are accepted (and noted): their
    count says so. Labels that start late or end early leave frames without labels, with a note. Raises UserError.
    """
    given: list[tuple[Path, Track]] = [pair for pair in (phase, tools) if pair is not None]
    slack = max([extent.stride, *(track.stride for _, track in given)])
    notes: list[str] = []
    for path, track in given:
        notes += _check_rate(path, track, extent, slack)
        _check_end(path, track, extent, slack)
    if len(given) == 2:
        _check_agreement(given[0], given[1], slack)
    end = min([extent.frame_count, *(track_end(track) for _, track in given)])
    cut_phase = _cut(phase, end, extent, notes)
    cut_tools = _cut(tools, end, extent, notes)
    for path, track in given:
        notes += _uncovered(path, track, extent, slack)
    return cut_phase, cut_tools, tuple(notes)


def _check_rate(path: Path, track: Track, extent: Extent, slack: int) -> list[str]:
    """Raise UserError where rows are numbered at another rate than the video's, as far as lengths tell.

    Returns a note where the video's rate is not the data set's and rows number the video's own frames all the same.
    """
    last = len(track.frame_index) - 1
    if abs(extent.fps - extent.row_fps) <= RATE_TOLERANCE * extent.row_fps:
        rate = _telling_rate(track, extent)
        if rate is None:
            return []
        raise row_error(
            path,
            last,
            f"is frame {int(track.frame_index[last])}: rows are numbered as if at {rate:g} fps, but {extent.name} runs "
            f"at {extent.fps:g} fps ({extent.frame_count} frames, {extent.duration_s:.1f} s); renumber them by the "
            "video's frames",
        )
    end = track_end(track)
    off_by_frame = abs(end - extent.frame_count)
    off_by_time = abs(end - extent.duration_s * extent.row_fps)
    problem = (
        f"is frame {int(track.frame_index[last])}: {extent.name} runs at {extent.fps:g} fps ({extent.frame_count} "
        f"frames, {extent.duration_s:.1f} s) and rows are numbered at {extent.row_fps:g} fps"
    )
    if min(off_by_frame, off_by_time) > max(slack, extent.fps):
        raise row_error(path, last, f"{problem}, which fits neither; set annotation_fps in the data set's description")
    if off_by_time <= off_by_frame:
        raise row_error(path, last, f"{problem}; renumber them by the video's frames")
    return [f"{path.name}: rows number the video's own frames at {extent.fps:g} fps, not at {extent.row_fps:g} fps"]


def _telling_rate(track: Track, extent: Extent) -> float | None:
    """A common rate other than the video's at which the rows last exactly as long as the video; None mostly.

    Exactly means within a row and a half and an image. A rate tells nothing where that is not small against the
    difference that it makes, so short videos and coarse rows pass.
    """
    for rate in _COMMON_FPS:
        tolerance_s = 1.5 * track.stride / rate + extent.stride / extent.fps
        difference_s = abs(extent.frame_count - extent.duration_s * rate) / extent.fps
        mismatch_s = abs(track_end(track) / rate - extent.duration_s)
        if mismatch_s <= tolerance_s and difference_s > 10 * tolerance_s:
            return rate
    return None


def _check_end(path: Path, track: Track, extent: Extent, slack: int) -> None:
    """Raise UserError when rows lie beyond the video by more than `slack` frames."""
    if track.frame_index[-1] < extent.frame_count + slack:
        return
    row = int(np.searchsorted(track.frame_index, extent.frame_count))
    raise row_error(
        path,
        row,
        f"is frame {int(track.frame_index[row])}, beyond the {extent.frame_count} frames ({extent.duration_s:.1f} s at "
        f"{extent.fps:g} fps) of {extent.name}: the rows, numbered at {extent.row_fps:g} fps, last "
        f"{track_end(track) / extent.row_fps:.1f} s",
    )


def _check_agreement(one: tuple[Path, Track], other: tuple[Path, Track], slack: int) -> None:
    """Raise UserError when one list goes on after the other has ended by more than a row of the coarser stride."""
    (short_path, short), (long_path, long) = sorted((one, other), key=lambda pair: track_end(pair[1]))
    end = track_end(short)
    if long.frame_index[-1] < end + slack:
        return
    row = int(np.searchsorted(long.frame_index, end))
    raise row_error(
        long_path,
        row,
        f"is frame {int(long.frame_index[row])}, but {short_path.name} ends with frame {end - short.stride}: more than "
        f"the usual trailing row ({slack} frames) apart; correct or remove one of the two",
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
    missing = extent.frame_count - track_end(track)
    if missing >= slack:
        share = missing / extent.frame_count
        notes.append(f"{path.name}: ends early; the last {_count(missing, 'frame')} ({share:.1%}) have no label")
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
