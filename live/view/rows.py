"""The rows of the page's timeline: labels and predictions of a video, from runs, prediction files and label files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import dataset_names, load_dataset
from engine.progress import say
from evaluation.files.predictions import PHASE, PredictionFile, prediction_columns, read_prediction_csv
from evaluation.reports.gather import TRUTH_NAME, RunResults
from evaluation.reports.paper_figures import sample_edges_s
from features.annotation_files.intervals import DEFAULT_TRACK, Interval, VideoAnnotations
from features.dataset.index import VideoEntry
from features.ids import id_key, id_of_stem
from features.run_lengths import runs
from interop.annotations import Conversion, annotation_files, read_annotation_file
from live.view.videos import Video

TOOL = "tool"
Kind = Literal["truth", "prediction", "labels"]


@dataclass(frozen=True)
class Row:
    """What one source says about one track of a video.

    `spans` (N, 2) are the labelled intervals in seconds, and `labels` (N,) their positions in `classes`. With
    `several`, intervals of different classes overlap, as those of tools do. A prediction has values (T, K) uint8 from 0
    to 255 for `names`: the probability of the predicted class, or of each tool, for the samples that begin and end at
    `edges_s` (T + 1,).
    """

    name: str
    kind: Kind
    track: str
    classes: tuple[str, ...]
    spans: NDArray[np.float64]
    labels: NDArray[np.int64]
    several: bool = False
    edges_s: NDArray[np.float64] | None = None
    names: tuple[str, ...] = ()
    values: NDArray[np.uint8] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all but the values, which the page fetches as bytes."""
        about = {"name": self.name, "kind": self.kind, "track": self.track, "classes": self.classes}
        spans = {"spans": self.spans.round(6).ravel().tolist(), "labels": self.labels.tolist()}
        samples = 0 if self.values is None else len(self.values)
        return {**about, **spans, "several": self.several, "names": self.names, "samples": samples}

    def value_bytes(self) -> bytes:
        """Return `edges_s` as float32 (T + 1,) and the values of each of `names` as uint8 (K, T), one after another."""
        if self.values is None or self.edges_s is None:
            return b""
        return self.edges_s.astype("<f4").tobytes() + np.ascontiguousarray(self.values.T).tobytes()


class Source(Protocol):
    """Something that has labels or predictions of videos."""

    def rows(self, video: VideoEntry) -> list[Row]:
        """Return the rows of a video; none if the source does not know it."""

    def classes(self) -> dict[str, Sequence[str]]:
        """Return the classes of each track."""


# ---------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class RunSource:
    """An evaluated run: the labels that it was scored against, and its predictions."""

    name: str
    results: RunResults

    def rows(self, video: VideoEntry) -> list[Row]:
        """Return the rows of the run's video with the same recording, or else with the same name."""
        found = self._video(video)
        if found is None:
            return []
        rows = _run_rows(self.name, self.results, found, DEFAULT_TRACK)
        for track in self.results.of_tracks:
            rows += _run_rows(self.name, self.results.of_track(track), found, track)
        return rows

    def _video(self, video: VideoEntry) -> str | None:
        known = self.results.truth.videos
        same = next((name for name, one in known.items() if one.source == video.sha256_ends), None)
        if same is None and any(id_key(name) == id_key(video.id) for name in known):
            say(f"note: {video.id}: {self.name} was evaluated on another recording of this name; it is not shown")
        return same

    def classes(self) -> dict[str, Sequence[str]]:
        """See `Source`."""
        return spec_classes(self.results.truth.spec)


def spec_classes(spec: DataSetSpec) -> dict[str, Sequence[str]]:
    """Return the classes of the tracks of a data set."""
    tools = {TOOL: spec.tools} if spec.tools else {}
    return {DEFAULT_TRACK: spec.phases, **tools, **{name: track.classes for name, track in spec.tracks.items()}}


def _run_rows(name: str, results: RunResults, video: str, track: str) -> list[Row]:
    truth, spec = results.truth.videos[video], results.truth.spec
    edges_s = sample_edges_s(results.times_s.get(video), len(truth.phase), results.truth.fps)
    rows = []
    if (truth.phase >= 0).any():
        rows.append(Row(TRUTH_NAME, "truth", track, spec.phases, *_spans(truth.phase, edges_s)))
    if truth.tools.size and (truth.tools >= 0).any() and track == DEFAULT_TRACK:
        parts = [_spans(np.where(one == 1, number, -1), edges_s) for number, one in enumerate(truth.tools.T)]
        spans, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
        rows.append(Row(TRUTH_NAME, "truth", TOOL, spec.tools, spans, labels, several=True))
    if video in results.predictions:
        rows.append(_predicted(name, track, spec.phases, results.predictions[video], edges_s))
    if (scores := results.tool_scores.get(video)) is not None:
        rows.append(_tools(name, spec.tools, scores, edges_s))
    return rows


def _spans(labels: NDArray[Any], edges_s: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the intervals (N, 2) of the runs of equal labels (T,), and their labels (N,); without those of -1."""
    found = [run for run in runs(labels) if run.value >= 0]
    spans = np.array([[edges_s[run.start], edges_s[run.end]] for run in found], dtype=np.float64).reshape(-1, 2)
    return spans, np.array([run.value for run in found], dtype=np.int64)


def _predicted(
    name: str, track: str, classes: Sequence[str], found: PredictionFile, edges_s: NDArray[np.float64]
) -> Row:
    chosen = np.take_along_axis(found.probabilities, found.phase[:, None].astype(np.int64), axis=1)  # (T, 1)
    spans = _spans(found.phase, edges_s)
    more: dict[str, Any] = {"edges_s": edges_s, "names": ("confidence",), "values": _as_bytes(chosen)}
    return Row(name, "prediction", track, tuple(classes), *spans, **more)


def _tools(name: str, tools: Sequence[str], scores: NDArray[np.float32], edges_s: NDArray[np.float64]) -> Row:
    """Return the row of tools: intervals in which a probability is at least one half, and the probabilities."""
    parts = [_spans(np.where(one >= 0.5, number, -1), edges_s) for number, one in enumerate(scores.T)]
    spans, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    more: dict[str, Any] = {"edges_s": edges_s, "names": tuple(tools), "values": _as_bytes(scores)}
    return Row(name, "prediction", TOOL, tuple(tools), spans, labels, several=True, **more)


def _as_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return probabilities as whole numbers from 0 to 255."""
    scaled: NDArray[np.uint8] = np.clip(values * 255 + 0.5, 0, 255).astype(np.uint8)
    return scaled


# ---------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class PredictionSource:
    """Prediction files (CSV) of one origin, by video and track, with the description of their data set."""

    name: str
    spec: DataSetSpec
    files: dict[str, dict[str, PredictionFile]] = field(default_factory=dict)

    def rows(self, video: VideoEntry) -> list[Row]:
        """See `Source`."""
        rows = []
        for track, found in self.files.get(id_key(video.id), {}).items():
            gap_s = float(np.median(np.diff(found.time_s))) if len(found.time_s) > 1 else 1.0
            edges_s = np.append(found.time_s, found.time_s[-1] + gap_s)
            spec = self.spec.as_track(track) if track in self.spec.tracks else self.spec
            rows.append(_predicted(self.name, track, spec.phases, found, edges_s))
            if found.tool_probabilities is not None:
                rows.append(_tools(self.name, spec.tools, found.tool_probabilities, edges_s))
        return rows

    def classes(self) -> dict[str, Sequence[str]]:
        """See `Source`."""
        return spec_classes(self.spec)


@dataclass(frozen=True)
class LabelSource:
    """A file of labels, such as another person's."""

    name: str
    videos: tuple[VideoAnnotations, ...]

    def rows(self, video: VideoEntry) -> list[Row]:
        """See `Source`."""
        own = [one for one in self.videos if id_key(one.video) == id_key(video.id)]
        return [row for one in own for row in interval_rows(self.name, one.intervals)]

    def classes(self) -> dict[str, Sequence[str]]:
        """See `Source`."""
        return classes_used(one for video in self.videos for one in video.intervals)


def classes_used(intervals: Iterable[Interval]) -> dict[str, Sequence[str]]:
    """Return the classes of each track in the order of their first use."""
    found: dict[str, dict[str, None]] = {}
    for one in intervals:
        found.setdefault(one.track, {})[one.label] = None
    return {track: tuple(labels) for track, labels in found.items()}


def interval_rows(name: str, intervals: Sequence[Interval], kind: Kind = "labels") -> list[Row]:
    """Return a row for each annotator and track of a file of labels."""
    groups: dict[tuple[str | None, str], list[Interval]] = {}
    for one in sorted(intervals, key=lambda one: (one.start_s, one.end_s)):
        groups.setdefault((one.annotator, one.track), []).append(one)
    rows = []
    for (who, track), own in groups.items():
        classes = tuple(classes_used(own)[track])
        spans = np.array([[one.start_s, one.end_s] for one in own]).reshape(-1, 2)
        labels = np.array([classes.index(one.label) for one in own], dtype=np.int64)
        overlap = bool((spans[1:, 0] < np.maximum.accumulate(spans[:-1, 1]) - 1e-6).any())
        title = f"{name} ({who})" if who else name
        rows.append(Row(title, kind, track, classes, spans, labels, several=overlap or track in (TOOL, "tools")))
    return rows


@dataclass(frozen=True)
class OfVideos(Conversion):
    """Reading and writing labels of the opened videos, whose rates their files say."""

    videos: tuple[Video, ...] = ()

    def fps_of(self, video: str) -> float | None:
        """Return the rate of an opened video; None for others, and for those that cannot be read."""
        found = next((one for one in self.videos if id_key(one.id) == id_key(video)), None)
        with suppress(UserError):
            return found.entry.fps if found else None
        return None


def read_shown(path: Path, specs: Sequence[DataSetSpec], ask: Conversion) -> list[Source]:
    """Return what a file or folder of `--show` has: predictions of `predict`, and labels of annotation tools.

    `specs` are the data sets whose classes prediction files may have; after them, the known ones are tried. A file in a
    folder that cannot be read is left out with a note. Raises UserError if nothing can be read.
    """
    files = annotation_files(path, ask)
    headers = {file: _header(file) for file, kind in files if kind == "csv"}
    predicted = {file: header for file, header in headers.items() if header[:2] == ["frame", "time_s"]}
    found: list[Source] = []
    failed: list[UserError] = []
    predictions: dict[str, PredictionSource] = {}
    for file, header in predicted.items():
        try:
            spec, track = _fitting(file, header, specs)
            own, column = (spec, PHASE) if track == DEFAULT_TRACK else (spec.as_track(track), track)
            known = predictions.setdefault(spec.name, PredictionSource(path.stem, spec))
            by_track = known.files.setdefault(id_key(id_of_stem(file.stem)), {})
            by_track[track] = read_prediction_csv(file, own, track=column)
        except UserError as error:
            failed.append(error)
    for file, kind in files:
        if file in predicted or (kind == "labelstudio" and file.with_suffix(".csv") in predicted):
            continue  # `predict` writes ID.json beside ID.csv, about how that was made
        try:
            content = read_annotation_file(file, kind, ask)
            found.append(LabelSource(path.name if file == path else file.parent.name, content.videos))
        except UserError as error:
            failed.append(error)
    found += [one for one in predictions.values() if any(one.files.values())]
    if not found:
        raise failed[0] if failed else UserError(f"{path}: has no predictions and no labels")
    for problem in failed:
        say(f"note: not shown: {problem}")
    return found


def _header(path: Path) -> list[str]:
    """Return the cells of a table's first line; none if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return next(csv.reader([stream.readline(1 << 16)]), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return []  # reading it as a file of labels says what is wrong


def _fitting(path: Path, header: Sequence[str], specs: Sequence[DataSetSpec]) -> tuple[DataSetSpec, str]:
    """Return the data set and the track whose prediction files have this header."""
    known = (load_dataset(name) for name in dataset_names())
    for spec in (*specs, *known):
        for track in (DEFAULT_TRACK, *spec.tracks):
            own = spec if track == DEFAULT_TRACK else spec.as_track(track)
            name = PHASE if track == DEFAULT_TRACK else track
            if any(header == prediction_columns(own, tools, track=name) for tools in (True, False)):
                return spec, track
    raise UserError(f"{path}: a prediction file with classes of no known data set; name its data set with --dataset")


def all_rows(sources: Sequence[Source], video: VideoEntry) -> list[Row]:
    """Return the rows of a video of all sources, truth first, and the same truth of several runs once."""
    found: list[Row] = []
    for row in (row for source in sources for row in source.rows(video)):
        same = (one for one in found if (one.kind, one.track, one.classes) == (row.kind, row.track, row.classes))
        if row.kind == "truth" and any(
            np.array_equal(one.labels, row.labels) and np.array_equal(one.spans, row.spans) for one in same
        ):
            continue
        twice = sum((one.name.split(" #")[0], one.track) == (row.name, row.track) for one in found)
        found.append(replace(row, name=f"{row.name} #{twice + 1}") if twice else row)
    return sorted(found, key=lambda row: row.kind != "truth")
