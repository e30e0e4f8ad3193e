"""Read a video's annotation files, fit them to the video, and look up the labels of frames. -1 means no label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, listed
from configs.label_source import LabelSource
from configs.schema import DataConfig
from engine.files import inside
from features.dataset.annotations import LabelTrack, read_content, row_error
from features.dataset.described.intervals import TimedLabels, TimedRows
from features.dataset.described.labels import parse_described, read_described
from features.dataset.formats.base import find_format
from features.dataset.frame_folders import LabelEnd
from features.dataset.index import AnnotationFile, Dataset, VideoEntry
from features.dataset.parts import joined_track
from features.dataset.row_numbers import Extent, RowNumbering
from features.dataset.sampling import frame_times_s, sampled_frames
from features.ids import id_key
from features.video_labels import VideoLabels

BetweenRows = Literal["mask", "hold"]
Labels = tuple[NDArray[np.int8], NDArray[np.int8]]  # phase (T,), tools (T, K)
Role = str  # "phase", "tool" or the name of an additional track of the data set's description
Rows = tuple[NDArray[np.int64], NDArray[np.bool_]]  # (T,) the row of each frame, and (T,) whether there is one


def load_labels(
    dataset: Dataset,
    entry: VideoEntry,
    frame_index: NDArray[np.int64] | Sequence[int],
    between_rows: BetweenRows = "mask",
) -> Labels:
    """Return the labels of source frames `frame_index` (T,): phase (T,) int8 and tools (T, K) int8, -1 for no label.

    Raises UserError if an annotation file is missing or is not the one that was indexed.
    """
    tracks = load_tracks(dataset, entry)
    return sample_labels(frame_index, tracks.phase, tracks.tools, between_rows, len(dataset.spec.tools))


def sampled_labels(dataset: Dataset, entry: VideoEntry, data: DataConfig) -> VideoLabels:
    """Return the frames of a video that sampling at `data.fps` selects, with their times and labels.

    Raises UserError as `load_labels` does.
    """
    frame_index = sampled_frames(entry, data.fps)
    tracks = load_tracks(dataset, entry)
    tool_count = len(dataset.spec.tools)
    phase, tools = sample_labels(frame_index, tracks.phase, tracks.tools, data.tools_between_rows, tool_count)
    others = {
        name: sample_labels(frame_index, tracks.others.get(name), None, "mask", 0)[0] for name in dataset.spec.tracks
    }
    return VideoLabels(frame_index, frame_times_s(entry, frame_index), phase, tools, tracks=others)


# ---------------------------------------------------------------------------------------------- annotation files


class FittedTracks(NamedTuple):
    """A video's tracks with rows numbered by source frames, and notes on frames without a label.

    `others` has the additional tracks by name.
    """

    phase: LabelTrack | None
    tools: LabelTrack | None
    notes: tuple[str, ...] = ()
    others: Mapping[str, LabelTrack] = {}


@dataclass(frozen=True)
class Annotation:
    """Labels that were read: what the index records about their file, and intervals or rows with the file's numbers.

    `source` is their form as the data set's description states it, None for formats that are recognised. `notes` are
    the reader's, for the user.
    """

    path: Path
    file: AnnotationFile
    track: LabelTrack | TimedLabels | TimedRows
    source: LabelSource | None = None
    notes: Sequence[str] = ()

    def with_numbering(self, numbering: RowNumbering) -> Annotation:
        """Return a copy that records what the numbers of its rows count."""
        update = {"row_fps": numbering.fps, "row_base": numbering.base}
        return replace(self, file=self.file.model_copy(update=update))

    def placed(self, extent: Extent) -> tuple[Path, LabelTrack]:
        """Return the file's path, and its rows numbered by source frames."""
        if isinstance(self.track, LabelTrack):
            return self.path, self.file.numbering.place(self.path, self.track, extent)
        return self.path, self.track.place(self.path, extent)

    def notes_on(self, extent: Extent) -> list[str]:
        """Return the notes on the file, and on how its labels fit the video."""
        placing = self.track.notes(self.path, extent) if isinstance(self.track, TimedLabels) else []
        return [*self.notes, *self.file.numbering.notes(self.path, extent), *placing]

    def numbered_by(self, data: DataConfig) -> DataConfig:
        """Return the settings of row numbers that hold for this file: those of its description, or else the user's."""
        if self.source is None:
            return data
        rates: dict[str, Any] = {"auto": "auto", "source": "source", "sample": self.source.rate}
        return data.model_copy(update={"row_fps": rates[self.source.unit], "row_base": self.source.origin})

    def length(self, fps: float) -> LabelEnd:
        """Return how far the labels reach in the source's frames, at the rate `fps`."""
        track = self.track
        if not isinstance(track, LabelTrack):
            is_least = isinstance(track, TimedLabels)
            return LabelEnd(track.last_frame(fps), max(round(fps), 1), is_least=is_least)
        if self.source is not None and self.source.rate is not None:
            scale, origin = fps / self.source.rate, int(track.frame_index[0] == 1)
            return LabelEnd(round((track.end - origin) * scale), max(round(track.stride * scale), 1))
        return LabelEnd(track.end - int(track.frame_index[0] == 1), track.stride, int(track.frame_index[0]))


def read_annotation(root: Path, relative: str, role: Role, spec: DataSetSpec, video_id: str) -> Annotation:
    """Read and parse a video's labels in a file. Raises UserError as `parse_phases` and `parse_tools` do."""
    path = inside(root, relative)
    if source := spec.label_source(role):
        return _read_described(path, relative, role, spec, source, video_id)
    content = read_content(path)
    found = find_format(content, path)
    track = (found.phases if role == "phase" else found.tools)(content, path, spec)
    file = AnnotationFile(path=relative, sha256=sha256(content).hexdigest(), rows=len(track.frame_index))
    return Annotation(path, file, track)


def _read_described(
    path: Path, relative: str, role: Role, spec: DataSetSpec, source: LabelSource, video_id: str
) -> Annotation:
    videos, file_sha256 = read_described(path, source, spec)
    records = videos.get(id_key(video_id) if source.is_shared else None)
    if records is None:
        raise UserError(f"{path}: has no labels of {video_id}")
    digest = records.digest(path) if source.is_shared else file_sha256
    track = parse_described(records, path, source, role, spec)
    file = AnnotationFile(path=relative, sha256=digest, rows=len(records))
    return Annotation(path, file, track, source, records.notes)


def load_tracks(dataset: Dataset, entry: VideoEntry) -> FittedTracks:
    """Read a video's tracks and fit them to it. Raises UserError if an annotation file is missing or has changed."""
    if entry.records is not None:
        return FittedTracks(*entry.records.tracks(dataset.spec))
    whole, *parts = entry.annotated
    return join_fitted(_load_own(dataset, whole), [_load_own(dataset, part) for part in parts], entry)


def _load_own(dataset: Dataset, entry: VideoEntry) -> FittedTracks:
    """Read the labels whose numbers refer to this entry: a video, or one part of a recording."""
    read = {role: reread_annotation(dataset, file, role, entry.id) for role, file in entry.files_by_role.items()}
    return fit_annotations(read, extent_of(entry, dataset.spec))


def fit_annotations(read: Mapping[Role, Annotation], extent: Extent) -> FittedTracks:
    """Number the rows of a video's annotations by source frames, and fit them to the video (`fit_tracks`)."""
    return fit_tracks({role: one.placed(extent) for role, one in read.items()}, extent)


def join_fitted(whole: FittedTracks, parts: Sequence[FittedTracks], entry: VideoEntry) -> FittedTracks:
    """Return the labels of a recording: those of the `whole`, and those of its `parts`, put together."""
    if not parts:
        return whole
    lengths = [part.frame_count for part in entry.parts]
    names = dict.fromkeys([*whole.others, *(name for part in parts for name in part.others)])
    others = {name: joined_track([part.others.get(name) for part in parts], lengths) for name in names}
    return FittedTracks(
        whole.phase or joined_track([part.phase for part in parts], lengths),
        whole.tools or joined_track([part.tools for part in parts], lengths),
        (*whole.notes, *(note for part in parts for note in part.notes)),
        {**whole.others, **{name: track for name, track in others.items() if track is not None}},
    )


def reread_annotation(dataset: Dataset, file: AnnotationFile, role: Role, video_id: str) -> Annotation:
    """Read a video's labels in an indexed file again. Raises UserError if it is missing, or if they have changed."""
    path = dataset.root / file.path
    if not path.exists():
        raise UserError(f"{path}: no such file; restore it, or run `index --force` to continue without its labels")
    read = read_annotation(dataset.root, file.path, role, dataset.spec, video_id)
    if read.file.sha256 != file.sha256:
        raise UserError(f"{path}: has changed since it was indexed; run `index --force`, then this again")
    return read.with_numbering(file.numbering)


def extent_of(entry: VideoEntry, spec: DataSetSpec) -> Extent:
    """Return the extent of an indexed video, which its labels must fit."""
    base = entry.frames.base if entry.frames else 0
    name, rate = entry.source if not entry.parts else f"{entry.id} ({len(entry.parts)} files)", spec.annotation_fps
    return Extent(name, entry.frame_count, entry.fps, rate, entry.image_stride, base, entry.times_s, entry.start_s)


# ---------------------------------------------------------------------------------------------- rows to frames


def sample_labels(
    frame_index: NDArray[np.int64] | Sequence[int],
    phase: LabelTrack | None,
    tools: LabelTrack | None,
    between_rows: BetweenRows,
    tool_count: int,
) -> Labels:
    """Return the labels of frames `frame_index` (T,): phase (T,) int8 and tools (T, K) int8, -1 for no label.

    A phase row is valid until the next row, but for at most a stride, so that frames of missing rows have no label. A
    tool row is valid in the same way if `between_rows` is "hold". With "mask" it labels only its own frame, or the
    nearest sampled frame if its own frame was not sampled. `tool_count` is K, which is needed for videos without tool
    rows.
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
    """Return the row (T,) that is valid at each frame, and whether there is one (T,).

    If two rows have the same frame, the first is valid.
    """
    starts = track.frame_index
    row = np.searchsorted(starts, starts[np.searchsorted(starts, frames, "right") - 1])
    return row, (frames >= starts[0]) & (frames < starts[row] + track.stride)


def _rows_next_to(frames: NDArray[np.int64], track: LabelTrack) -> Rows:
    """Return the row (T,) nearest to each frame, and whether that row labels the frame (T,).

    It does if the frame is also the nearest one to the row, and if both are close enough: they must be the same frame
    if samples are evenly spaced, and at most half the distance between samples apart otherwise (for example at 29.97
    fps sampled at 1 fps, with a row every 30 frames).
    """
    steps = np.diff(frames)
    if not len(frames):
        return frames, np.zeros(0, dtype=bool)
    row = _nearest(track.frame_index, frames)
    distance = np.abs(track.frame_index[row] - frames)
    apart = np.median(steps) if len(set(steps.tolist())) > 1 else 0
    return row, (_nearest(frames, track.frame_index)[row] == np.arange(len(frames))) & (2 * distance <= apart)


def _nearest(places: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position in `places` (increasing) of the value nearest to each of `wanted`; of two, the first."""
    after = np.searchsorted(places, wanted).clip(0, len(places) - 1)
    before = (after - 1).clip(0)
    return np.where(wanted - places[before] <= np.abs(places[after] - wanted), before, after)


def unlabelled_note(phases: Mapping[str, NDArray[np.int8]], means: str, what: str = "phase label") -> list[str]:
    """Return a note on frames without a phase label, or nothing if all frames have one.

    `phases` contains the phases (T,) by video id. The note ends with `means`, the consequence. `what` is the label's
    name.
    """
    bare = {video_id: int((phase < 0).sum()) for video_id, phase in phases.items() if (phase < 0).any()}
    if not bare:
        return []
    total = sum(map(len, phases.values()))
    return [f"note: {sum(bare.values()):,} of {total:,} frames have no {what} ({listed([*bare])}) and {means}"]


def fit_tracks(given: Mapping[Role, tuple[Path, LabelTrack]], extent: Extent) -> FittedTracks:
    """Cut tracks, whose rows are numbered by source frames, to the length of the video and of each other.

    Annotation files often have a trailing row, which starts after the end of the video or of the other file. Such rows
    are cut if they are beyond the end by at most one stride (the largest of the files' and the images'). Raises
    UserError naming file and row if rows are further beyond the video. If labels start late, lack rows or end early,
    frames have no label, and a note says so.
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
    others = {role: track for role, track in cut.items() if role not in ("phase", "tool")}
    return FittedTracks(cut.get("phase"), cut.get("tool"), tuple(notes), others)


def labelled_fractions(frames: NDArray[np.int64], fitted: FittedTracks) -> dict[Role, float]:
    """Return the fraction of `frames` (T,) that each track labels, by role.

    Here a tool row is valid until the next one, like a phase row.
    """
    covered: dict[Role, float] = {}
    for role, track in {"phase": fitted.phase, "tool": fitted.tools, **fitted.others}.items():
        if track is not None:
            row, valid = _rows_at(frames, track)
            covered[role] = float((valid & (track.labels.reshape(len(track.labels), -1)[row] >= 0).any(axis=1)).mean())
    return covered


def _check_end(path: Path, track: LabelTrack, extent: Extent, slack: int) -> None:
    """Raise UserError if rows lie beyond the video by more than `slack` frames."""
    if track.frame_index[-1] < extent.frame_count + slack:
        return
    row = int(np.searchsorted(track.frame_index, extent.frame_count))
    raise row_error(
        path,
        row,
        f"is frame {int(track.frame_index[row])}, beyond the {extent.frame_count} frames ({extent.duration_s:.1f} s at "
        f"{extent.fps:g} fps) of {extent.name}: by their numbers, the rows last {track.end / extent.fps:.1f} s; set "
        f"{track.set_rate()} if the numbers count something else",
        track.places,
    )


def _cut(path: Path, track: LabelTrack, end: int, extent: Extent, notes: list[str]) -> LabelTrack:
    """Return the track without rows at or after `end`, and add a note if there were any."""
    rows = len(track.frame_index)
    kept = int(np.searchsorted(track.frame_index, end))
    if kept == 0:
        raise UserError(f"{path}: none of its rows is within the {extent.frame_count} frames of {extent.name}")
    if kept < rows:
        notes.append(f"{path.name}: {_count(rows - kept, 'trailing row')} cut, from frame {end} on")
    return track.head(kept)


def _uncovered(path: Path, track: LabelTrack, extent: Extent, slack: int) -> list[str]:
    """Return notes on frames without a label: before the first row, between rows, in rows, and after the last row."""
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
        each = "row" if len(track.labels) != extent.frame_count else "frame"  # intervals were placed on frames
        notes.append(f"{path.name}: {_count(unlabelled, each)} without a label (-1 or empty)")
    missing = extent.frame_count - track.end
    if missing >= slack:
        fraction = missing / extent.frame_count
        notes.append(f"{path.name}: ends early; the last {_count(missing, 'frame')} ({fraction:.1%}) have no label")
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
