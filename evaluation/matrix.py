"""Evaluate across data sets: one row per training set, one column per test set, each cell with its interval.

The cells are evaluations that exist already: those of each run on its own test videos and, made with `evaluate
--index`, on other data sets. With a mapping of classes, all must have been made with `--mapping`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from configs.errors import UserError, listed
from configs.schema import MAIN_TRACK
from engine.progress import say
from engine.records import Record
from evaluation.external import write_results
from evaluation.files.truth import TRUTH_FILE, Truth, read_truth
from evaluation.metrics.conventions import CONVENTIONS
from evaluation.metrics.phases import require_convention
from evaluation.metrics.results import (
    HEAD,
    METRICS_FILE,
    Evaluation,
    Interval,
    PhaseResults,
    mark_of_seeds,
    marked,
    read_evaluation,
)
from evaluation.metrics.statistics import paired_interval
from evaluation.reports.gather import EVALUATE_FOLDER, stage_of
from evaluation.reports.matrix import matrix_tables, write_matrix_csv, write_matrix_page
from features.dataset.trained_on import TrainedOn, require_separate, trained_on

DEFAULT_METRICS = ("accuracy", "f1")


@dataclass(frozen=True)
class Cell(Record):
    """The results of one row's model on one data set: the interval of each metric, over `videos` videos.

    `own` says that it is the data set of the training. `overlap` says that it has been trained on test videos.
    """

    metrics: Mapping[str, Interval]
    videos: int
    own: bool
    overlap: bool


@dataclass(frozen=True)
class Row(Record):
    """One model: its name, its runs (one per training seed), the data sets of its training, and a cell per test set."""

    name: str
    members: Sequence[str]
    trained_on: Sequence[str]
    cells: Mapping[str, Cell]

    @property
    def title(self) -> str:
        """The training set and the model's name."""
        return f"{' + '.join(self.trained_on) or 'unknown'}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class MatrixAbout(Record):
    """How the numbers of a matrix were computed."""

    convention: str
    title: str
    unit: str = "percent"
    split: str
    mapping: str | None
    mean: str = "over videos, of each video's own number averaged over seeds"
    interval: str = "95 %, percentile bootstrap over videos"


@dataclass(frozen=True)
class Matrix(Record):
    """The content of the file that `compare --matrix --json` writes; `tested_on` has the columns in order."""

    about: MatrixAbout
    metrics: Sequence[str]
    tested_on: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class MatrixPlace:
    """Which evaluations to take: of runs below `runs`, on `split`, with the mapping of this name (None: without one).

    `track` is the label track. `allow_overlap` allows cells whose test videos the model was trained on.
    """

    runs: Path
    split: str
    mapping: str | None
    allow_overlap: bool
    track: str = MAIN_TRACK

    @property
    def folder(self) -> str:
        """The name of the folder of a run's evaluation on its own data set."""
        return f"{self.split}-{self.mapping}" if self.mapping else self.split


@dataclass(frozen=True)
class _Found:
    """One evaluation of one run."""

    path: Path
    truth: Truth
    results: PhaseResults
    trained: Sequence[TrainedOn]

    def overlap(self, place: MatrixPlace) -> bool:
        """Whether the run was trained on these videos. Raises UserError unless the settings allow it."""
        tested = {name: video.source for name, video in self.truth.videos.items()}
        run = str(self.path.parent.parent)
        own = self.path.name == place.folder and place.split != "test"  # a training video is never a test video
        return require_separate(self.trained, self.truth.spec.name, tested, run, place.allow_overlap, own=own)


@dataclass(frozen=True)
class MatrixFiles:
    """The files to which a matrix is written, in addition to the tables that are printed."""

    json: Path | None = None
    csv: Path | None = None
    html: Path | None = None


def show_matrix(
    names: Sequence[str],
    place: MatrixPlace,
    files: MatrixFiles,
    *,
    convention: str,
    metrics: Sequence[str] | None = None,
) -> Matrix:
    """Make a matrix (`make_matrix`), print a table per metric, and write the files."""
    from rich.console import Console

    matrix = make_matrix(names, place, convention, metrics)
    console = Console()
    for table in matrix_tables(matrix):
        console.print(table)
    write_results(files.json, matrix)
    for path, write in ((files.csv, write_matrix_csv), (files.html, write_matrix_page)):
        if path is not None:
            write(path, matrix)
            say(f"written: {path}")
    return matrix


def make_matrix(
    names: Sequence[str], place: MatrixPlace, convention: str, metrics: Sequence[str] | None = None
) -> Matrix:
    """Gather the evaluations of each of `names`: a run, or runs of one model with several seeds, joined by commas.

    Raises UserError if a run has no evaluation, if two evaluations on one data set differ in videos or labels, or if a
    model was tested on operations on which it was trained.
    """
    require_convention(convention)
    found = {name: [_evaluations(_run(one, place), place, convention) for one in _members(name)] for name in names}
    first: dict[str, _Found] = {}
    for one in (one for members in found.values() for member in members for one in member.values()):
        other = first.setdefault(one.truth.spec.name, one)
        _require_same_labels(other, one)
    chosen = _chosen_metrics(next(iter(first.values())), convention, metrics)
    rows = [_row(name, members, place, chosen) for name, members in found.items()]
    own = [name for row in rows for name in row.trained_on if name in first]
    columns = list(dict.fromkeys([*own, *first]))
    for row in rows:
        if missing := [name for name in columns if name not in row.cells]:
            say(f"note: {row.name}: not evaluated on {listed(missing)}; run `evaluate --index` with their index first")
    rows = [replace(row, cells={name: row.cells[name] for name in columns if name in row.cells}) for row in rows]
    title = CONVENTIONS.find(convention).title
    about = MatrixAbout(convention=convention, title=title, split=place.split, mapping=place.mapping)
    return Matrix(about, chosen, columns, rows)


def _members(name: str) -> list[str]:
    parts = [part.strip() for part in name.split(",") if part.strip()]
    if not parts or len(set(parts)) != len(parts):
        raise UserError(f"compare {name}: name each seed's run once")
    return parts


def _run(name: str, place: MatrixPlace) -> Path:
    named = place.runs / name
    run = named if named.is_dir() else Path(name)
    if not run.is_dir():
        raise UserError(f"{named}: no such run; give the name or the folder of an evaluated run")
    return run


def _evaluations(run: Path, place: MatrixPlace, convention: str) -> dict[str, _Found]:
    """Return the run's evaluations by data set."""
    found: dict[str, _Found] = {}
    files = sorted(run.glob(f"{EVALUATE_FOLDER}/*/{METRICS_FILE}"))
    for path in (file.parent for file in files):
        if path.name != place.folder and not path.name.endswith(f"-{place.folder}"):
            continue
        evaluation = read_evaluation(path / METRICS_FILE)
        if (evaluation.mapping or {}).get("name") != place.mapping:
            continue
        one = _Found(
            path,
            _truth(path, place.track),
            _results(path, evaluation, convention, place.track),
            trained_on(stage_of(run, evaluation) or run),
        )
        if (twice := found.get(one.truth.spec.name)) is not None:
            name = one.truth.spec.name
            raise UserError(f"{twice.path} and {path}: two evaluations on {name}; delete one of the folders")
        found[one.truth.spec.name] = one
    if not found:
        made = "with this --mapping" if place.mapping else "without --mapping"
        raise UserError(f"{run}: has no evaluation of split {place.split} {made}; run evaluate --name {run.name} first")
    return found


def _results(path: Path, evaluation: Evaluation, convention: str, track: str) -> PhaseResults:
    heads = evaluation.phases if track == MAIN_TRACK else (evaluation.tracks or {}).get(track, {})
    results = heads.get(HEAD, {}).get(convention)
    if results is None:
        what = f"results of {track} under the convention {convention}"
        raise UserError(f"{path / METRICS_FILE}: contains no {what}")
    return results


def _truth(path: Path, track: str) -> Truth:
    truth = read_truth(path / TRUTH_FILE)
    return truth.of_track(track) if track in truth.tracks else truth


def _require_same_labels(first: _Found, other: _Found) -> None:
    one, two = first.results.about, other.results.about
    if one.truth_sha256 != two.truth_sha256 or first.truth.spec.phases != other.truth.spec.phases:
        raise UserError(
            f"{first.path} and {other.path}: other videos, labels or phases of {first.truth.spec.name}; evaluate all "
            "runs on the same videos with the same mapping"
        )


def _chosen_metrics(found: _Found, convention: str, metrics: Sequence[str] | None) -> list[str]:
    known = [name for name in next(iter(found.results.per_video.values())) if found.results.score(name)]
    for metric in metrics or ():
        if metric not in known:
            raise UserError(f"--metric {metric}: {convention} has {', '.join(known)} per video")
    return list(dict.fromkeys(metrics or [name for name in DEFAULT_METRICS if name in known] or known))


def _row(name: str, members: Sequence[Mapping[str, _Found]], place: MatrixPlace, metrics: Sequence[str]) -> Row:
    parts, cells = _members(name), {}
    trained = list(dict.fromkeys(one.dataset for member in members for one in next(iter(member.values())).trained))
    for dataset, first in members[0].items():
        seeds = [member[dataset] for member in members if dataset in member]
        if len(seeds) < len(members):
            say(f"note: {name}: not every seed was evaluated on {dataset}, so its cell stays empty")
            continue
        overlap = any(one.overlap(place) for one in seeds)
        intervals = {metric: paired_interval(_video_means(seeds, metric)) for metric in metrics}
        own = first.path.name == place.folder
        cells[dataset] = Cell(intervals, len(first.results.per_video), own, overlap)
    shown = parts[0] if len(parts) == 1 else f"{parts[0]} ({len(parts)} seeds)"
    mark = mark_of_seeds(name, [one.results for member in members for one in member.values()])
    return Row(marked(Path(shown).name, mark), parts, trained or _own_dataset(members[0], place), cells)


def _own_dataset(evaluations: Mapping[str, _Found], place: MatrixPlace) -> list[str]:
    """Return the data set of the run's own test videos, for runs that do not record their training videos."""
    return [name for name, one in evaluations.items() if one.path.name == place.folder]


def _video_means(seeds: Sequence[_Found], metric: str) -> list[float]:
    """Return the mean over seeds of each video that has a number for every seed."""
    values = [[one.results.per_video[video].get(metric) for one in seeds] for video in seeds[0].results.per_video]
    return [float(np.mean(np.array(row, float))) for row in values if None not in row]
