"""Labels of a video's frames: its annotation files, fitted to it, sampled at any frames. -1 means no label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, listed
from configs.schema import DataConfig
from engine.files import inside
from features.dataset.annotations import LabelTrack, parse_phases, parse_tools, read_content, row_error
from features.dataset.index import AnnotationFile, Dataset, VideoEntry
from features.dataset.row_numbers import Extent, RowNumbering
from features.dataset.sampling import frame_times_s, sampled_frames
from features.video_labels import VideoLabels

BetweenRows = Literal["mask", "hold"]
Labels = tuple[NDArray[np.int8], NDArray[np.int8]]  # phase (T,), tools (T, K)
Role = Literal["phase", "tool"]
Rows = tuple[NDArray[np.int64], NDArray[np.bool_]]  # the row of each frame, and whether there is one: (T,) each


def load_labels(
    dataset: Dataset,
    entry: VideoEntry,
    frame_index: NDArray[np.int64] | Sequence[int],
    between_rows: BetweenRows = "mask",
) -> Labels:
    """Labels of source frames `frame_index` (T,): phase (T,) int8 and tools (T, K) int8, -1 where there is none.

    Raises UserError if an annotation file is missing or is not the one that was indexed.
    """
    tracks = load_tracks(dataset, entry)
    return sample_labels(frame_index, tracks.phase, tracks.tools, between_rows, len(dataset.spec.tools))


def sampled_labels(dataset: Dataset, entry: VideoEntry, data: DataConfig) -> VideoLabels:
    """The frames of a video that `data.fps` samples, their times and labels. Raises UserError as `load_labels`."""
    frame_index = sampled_frames(entry, data.fps)
    phase, tools = load_labels(dataset, entry, frame_index, data.tools_between_rows)
    return VideoLabels(frame_index, frame_times_s(entry, frame_index), phase, tools)


# ---------------------------------------------------------------------------------------------- annotation files


class FittedTracks(NamedTuple):
    """A video's tracks on its timeline, and notes on frames without a label."""

    phase: LabelTrack | None
    tools: LabelTrack | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Annotation:
    """An annotation file that was read: what goes into the index, and its rows as they are numbered."""

    path: Path
    file: AnnotationFile
    track: LabelTrack

    def with_numbering(self, numbering: RowNumbering) -> Annotation:
        """The same file with the meaning of its rows' numbers."""
        update = {"row_fps": numbering.fps, "row_base": numbering.base}
        return replace(self, file=self.file.model_copy(update=update))

    def placed(self, extent: Extent) -> tuple[Path, LabelTrack]:
        """The file's path and its rows on the video's timeline."""
        return self.path, self.file.numbering.place(self.path, self.track, extent)


def read_annotation(root: Path, relative: str, role: Role, spec: DataSetSpec) -> Annotation:
    """Read and parse an annotation file. Raises UserError as `parse_phases` and `parse_tools`."""
    path = inside(root, relative)
    content = read_content(path)
    track = (parse_phases if role == "phase" else parse_tools)(content, path, spec)
    file = AnnotationFile(path=relative, sha256=sha256(content).hexdigest(), rows=len(track.frame_index))
    return Annotation(path, file, track)


def load_tracks(dataset: Dataset, entry: VideoEntry) -> FittedTracks:
    """The video's tracks, fitted to it. Raises UserError for annotation files that are missing or have changed."""
    if entry.records is not None:
        return FittedTracks(*entry.records.tracks(dataset.spec))
    files: dict[Role, AnnotationFile | None] = {"phase": entry.phase_file, "tool": entry.tool_file}
    read = {role: _reread_annotation(dataset, file, role) for role, file in files.items() if file}
    return fit_annotations(read, extent_of(entry, dataset.spec))


def fit_annotations(read: Mapping[Role, Annotation], extent: Extent) -> FittedTracks:
    """A video's annotations on its timeline, fitted to it (`fit_tracks`)."""
    return fit_tracks({role: one.placed(extent) for role, one in read.items()}, extent)


def _reread_annotation(dataset: Dataset, file: AnnotationFile, role: Role) -> Annotation:
    path = dataset.root / file.path
    if not path.exists():
        raise UserError(f"{path}: no such file; restore it, or run `index --force` to continue without its labels")
    read = read_annotation(dataset.root, file.path, role, dataset.spec)
    if read.file.sha256 != file.sha256:
        raise UserError(f"{path}: has changed since it was indexed; run `index --force`, then this again")
    return read.with_numbering(file.numbering)


def extent_of(entry: VideoEntry, spec: DataSetSpec) -> Extent:
    """The extent of an indexed video."""
    base = entry.frames.base if entry.frames else 0
    times_s = frame_times_s(entry, np.arange(entry.frame_count)) if entry.times else None
    return Extent(entry.source, entry.frame_count, entry.fps, spec.annotation_fps, entry.image_stride, base, times_s)


# ---------------------------------------------------------------------------------------------- rows to frames


def sample_labels(
    frame_index: NDArray[np.int64] | Sequence[int],
    phase: LabelTrack | None,
    tools: LabelTrack | None,
    between_rows: BetweenRows,
    tool_count: int,
) -> Labels:
    """Labels of the frames `frame_index` (T,): phase (T,) int8 and tools (T, K) int8, -1 where there is no label.

    A phase row holds until the next row, for at most a stride, so that missing rows leave their frames without labels.
    A tool row labels its own frame alone, or the sampled frame nearest to it where its own was not sampled
    (`between_rows` "mask"), or holds like a phase ("hold"). `tool_count` is K, for videos without tool rows.
    """
    frames = np.asarray(frame_index, dtype=np.int64)
    phase_labels = np.full(len(frames), -1, dtype=np.int8)
    tool_labels = np.full((len(frames), tool_count), -1, dtype=np.int8)
    if phase is not None:
        row, covered = _rows_at(frames, phase)
        phase_labels[covered] = phase.labels[row[covered]]
    if tools is not None:
        row, covered = _rows_at(frames, tools) if between_rows == "hold" else _rows_next_to(frames, tools)
        tool_labels[covered] = tools.labels[row[covered]]
    return phase_labels, tool_labels


def _rows_at(frames: NDArray[np.int64], track: LabelTrack) -> Rows:
    """The row (T,) that holds at each frame, and whether there is one (T,); the first of two rows of one frame."""
    starts = track.frame_index
    row = np.searchsorted(starts, starts[np.searchsorted(starts, frames, "right") - 1])
    return row, (frames >= starts[0]) & (frames < starts[row] + track.stride)


def _rows_next_to(frames: NDArray[np.int64], track: LabelTrack) -> Rows:
    """The row (T,) nearest to each frame, and whether it labels the frame (T,).

    It does where the two are nearest to each other and near enough: the same frame where samples are evenly spaced,
    otherwise (29.97 fps sampled at 1 fps, with a row every 30 frames) at most half the distance between samples apart.
    """
    steps = np.diff(frames)
    if not len(frames):
        return frames, np.zeros(0, dtype=bool)
    row = _nearest(track.frame_index, frames)
    distance = np.abs(track.frame_index[row] - frames)
    apart = np.median(steps) if len(set(steps.tolist())) > 1 else 0
    return row, (_nearest(frames, track.frame_index)[row] == np.arange(len(frames))) & (2 * distance <= apart)


def _nearest(places: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """The position in `places` (increasing) of the value nearest to each of `wanted`; the first of two equally near."""
    after = np.searchsorted(places, wanted).clip(0, len(places) - 1)
    before = (after - 1).clip(0)
    return np.where(wanted - places[before] <= np.abs(places[after] - wanted), before, after)


def unlabelled_note(phases: Mapping[str, NDArray[np.int8]], means: str) -> list[str]:
    """A note on frames without a phase (`phases`: id to (T,)) and what that `means`; empty if all have one."""
    bare = {video_id: int((phase < 0).sum()) for video_id, phase in phases.items() if (phase < 0).any()}
    if not bare:
        return []
    total = sum(map(len, phases.values()))
    return [f"note: {sum(bare.values()):,} of {total:,} frames have no phase label ({listed([*bare])}) and {means}"]


def fit_tracks(given: Mapping[Role, tuple[Path, LabelTrack]], extent: Extent) -> FittedTracks:
    """The tracks, already on the video's timeline, cut to the video and to each other, and notes on missing labels.

    The usual trailing row is cut: one that starts after the end of the video, or of the other file, by at most one row
    of the coarsest stride among the files and the images. Raises UserError naming file and row for rows further beyond
    the video. Labels that start late, lack rows or end early leave frames without labels, with a note.
    """
    slack = max([extent.stride, *(track.stride for _, track in given.values())])
    notes: list[str] = []
    for path, track in given.values():
        _check_end(path, track, extent, slack)
    end = min([extent.frame_count, *(track.end for _, track in given.values())])
    if any(track.frame_index[-1] >= end + slack for _, track in given.values()):  # one file ends early
        end = extent.frame_count
    cut = {role: _cut(path, track, end, extent, notes) for role, (path, track) in given.items()}
    for path, track in given.values():
        notes += _uncovered(path, track, extent, slack)
    return FittedTracks(cut.get("phase"), cut.get("tool"), tuple(notes))


def labelled_fractions(frames: NDArray[np.int64], phase: LabelTrack | None, tools: LabelTrack | None) -> list[float]:
    """The fraction of `frames` (T,) that each given track labels; here a tool row, too, holds until the next one."""
    labels, tool_labels = sample_labels(frames, phase, tools, "hold", 0 if tools is None else tools.labels.shape[1])
    covered = [labels >= 0] * (phase is not None) + [(tool_labels >= 0).any(axis=1)] * (tools is not None)
    return [float(one.mean()) for one in covered]


def _check_end(path: Path, track: LabelTrack, extent: Extent, slack: int) -> None:
    """Raise UserError if rows lie beyond the video by more than `slack` frames."""
    if track.frame_index[-1] < extent.frame_count + slack:
        return
    row = int(np.searchsorted(track.frame_index, extent.frame_count))
    raise row_error(
        path,
        row,
        f"is frame {int(track.frame_index[row])}, beyond the {extent.frame_count} frames ({extent.duration_s:.1f} s at "
        f"{extent.fps:g} fps) of {extent.name}: as they are numbered, the rows last {track.end / extent.fps:.1f}"
        " s; set data.row_fps if they count something else",
    )


def _cut(path: Path, track: LabelTrack, end: int, extent: Extent, notes: list[str]) -> LabelTrack:
    """The track without rows at or after `end`; a note is added when there were any."""
    rows = len(track.frame_index)
    kept = int(np.searchsorted(track.frame_index, end))
    if kept == 0:
        raise UserError(f"{path}: no row lies inside the {extent.frame_count} frames of {extent.name}")
    if kept < rows:
        notes.append(f"{path.name}: {_count(rows - kept, 'trailing row')} cut, from frame {end} on")
    return track.head(kept)


def _uncovered(path: Path, track: LabelTrack, extent: Extent, slack: int) -> list[str]:
    """Notes on frames without a label: before the first row, between rows, in rows and after the last row."""
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
    unlabelled = int((track.labels < 0).reshape(len(track.labels), -1).any(axis=1).sum())
    if unlabelled:
        notes.append(f"{path.name}: {_count(unlabelled, 'row')} without a label (-1 or empty)")
    missing = extent.frame_count - track.end
    if missing >= slack:
        fraction = missing / extent.frame_count
        notes.append(f"{path.name}: ends early; the last {_count(missing, 'frame')} ({fraction:.1%}) have no label")
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
