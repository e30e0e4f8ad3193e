"""Compare models video by video: paired differences with bootstrap intervals, permutation tests and Holm's correction.

A model is a run, a folder of predictions or a file of results. If a model was trained with several seeds, their names
are joined by commas, and their results are averaged for each video. Variation over videos and over seeds is kept
separate: intervals and tests are over videos, that is, over patients; the standard deviation next to a mean is over
seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.schema import MAIN_TRACK
from engine.files import read_json
from engine.progress import say
from engine.records import Record
from evaluation.external import Reading, score_folder, write_results
from evaluation.metrics.conventions import CONVENTIONS
from evaluation.metrics.phases import require_convention
from evaluation.metrics.results import HEAD, METRICS_FILE, PhaseResults, Score, mark_of_seeds, marked
from evaluation.metrics.statistics import PairedTest, holm, paired_interval, paired_permutation
from evaluation.reports.tables import difference_table

# Only in this convention, a model's result is the mean of its results on single videos, so that the mean difference
# over videos is the difference between the models.
DEFAULT_CONVENTION = "video_macro"
_COUNTS = (
    "frames",
    *(f"segments_{kind}" for kind in ("truth", "predicted")),
    *(f"transitions_{kind}" for kind in ("truth", "predicted", "missed", "false")),
)


@dataclass(frozen=True)
class Place:
    """Where to find models: runs are below `runs` and evaluated on `split`; `reading` says how to read predictions.

    `track` names the additional label track to compare, in place of the phases.
    """

    runs: Path
    split: str
    spec: DataSetSpec
    reading: Reading | None = None
    track: str = MAIN_TRACK


@dataclass(frozen=True)
class Model:
    """A model with the results of each of its seeds, under one convention."""

    name: str
    members: Sequence[str]
    results: Sequence[PhaseResults]


@dataclass(frozen=True, kw_only=True)
class MetricComparison(PairedTest):
    """The comparison of two models under one metric.

    Besides the paired test, it has the difference's 95 % interval (`low`, `high`), the mean of each model (with its
    standard deviation over seeds), and the p value after Holm's correction over all tests of the comparison.
    """

    low: float | None
    high: float | None
    first: Score
    second: Score
    p_holm: float


@dataclass(frozen=True)
class ModelPair(Record):
    """The names of two models, and their comparison under each metric."""

    first: str
    second: str
    metrics: Mapping[str, MetricComparison]


@dataclass(frozen=True, kw_only=True)
class ComparisonAbout(Record):
    """How the numbers of a comparison were computed. `seeds` is the number of seeds of each model."""

    convention: str
    title: str
    unit: str
    split: str | None
    fps: float | None
    absent_phase: str
    mean: str = "over videos, of each video's own number averaged over seeds"
    std: str = "over seeds (n - 1)"
    interval: str = "95 %, percentile bootstrap of the paired difference, over videos"
    test: str = "two-sided paired permutation test over videos"
    correction: str
    videos: int
    frames: int
    videos_without_labels: Sequence[str]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Comparison(Record):
    """The content of the file that `compare --json` writes. `models` is [{name, members, seeds}]."""

    about: ComparisonAbout
    models: Sequence[Mapping[str, Any]]
    comparisons: Sequence[ModelPair]


def compare_models(
    names: Sequence[str],
    place: Place,
    *,
    convention: str = DEFAULT_CONVENTION,
    metrics: Sequence[str] | None = None,
    out: Path | None = None,
) -> Comparison:
    """Compare the first of `names` with each of the others, print tables, and write the result as JSON to `out` if
    given.

    Differences are first - second, in percentage points unless the convention has another unit. With
    `metrics=None`, all metrics are compared that the convention has per video. Raises UserError if models were not
    evaluated on the same frames.
    """
    from rich.console import Console

    if len(names) < 2:
        raise UserError("compare: needs two models or more, for example compare RUN_A RUN_B")
    require_convention(convention)
    result = compare_results([load_model(name, place, convention) for name in names], convention, metrics)
    console = Console()
    for pair in result.comparisons:
        console.print(difference_table(pair, result.about))
    write_results(out, result)
    return result


def compare_results(models: Sequence[Model], convention: str, metrics: Sequence[str] | None = None) -> Comparison:
    """Compare the first of `models` with each of the others, as `compare_models` does."""
    first = models[0]
    for model in models:
        _require_same_frames(first, model)
    chosen = _chosen_metrics(first, convention, metrics)
    tests = [
        {m: paired_permutation(_seed_means(first, m), _seed_means(other, m)) for m in chosen} for other in models[1:]
    ]
    p_values = {(i, m): test.p_value for i, pair in enumerate(tests) for m, test in pair.items()}
    corrected = holm(p_values)
    return Comparison(
        _about(models, convention, len(corrected)),
        [{"name": model.name, "members": list(model.members), "seeds": len(model.members)} for model in models],
        [
            ModelPair(
                first.name, other.name, {m: _compared(first, other, m, t, corrected[i, m]) for m, t in pair.items()}
            )
            for i, (other, pair) in enumerate(zip(models[1:], tests, strict=True))
        ],
    )


def over_seeds(model: Model, metric: str) -> Score:
    """Average each seed over the videos that have the metric; return mean and standard deviation over seeds (n - 1)."""
    known = [video for video, value in _seed_means(model, metric).items() if value is not None]
    return _over_seeds(model, metric, known) if known else Score(None, None)


# ---------------------------------------------------------------------------------------------- models


def load_model(text: str, place: Place, convention: str) -> Model:
    """Load the model that `text` names: one source of results, or several (one per seed) joined by commas."""
    parts = _parts(text)
    if len(set(parts)) != len(parts) or not parts:
        raise UserError(f"compare {text}: name each seed's run once")
    name = parts[0] if len(parts) == 1 else f"{parts[0]} ({len(parts)} seeds)"
    results = [_load_results(part, place, convention) for part in parts]
    name = marked(name, mark_of_seeds(name, results))
    model = Model(name, parts, results)
    for result in model.results[1:]:
        _require_same_frames(model, Model(name, parts, [result]))
    return model


def _parts(text: str) -> list[str]:
    return [text] if Path(text).exists() else [part.strip() for part in text.split(",") if part.strip()]


def require_use(names: Sequence[str], runs: Path, *, reading: bool, split: bool) -> None:
    """Raise UserError for options without effect: reading options if no model is a prediction folder, and a split if no
    model is a run."""
    found = [runs / part if (runs / part).is_dir() else Path(part) for name in names for part in _parts(name)]
    if reading and all(p.is_file() or (p / "evaluate").is_dir() or (p / METRICS_FILE).is_file() for p in found):
        raise UserError("--ground-truth: all these models are evaluated already; leave it out")
    if split and not any((path / "evaluate").is_dir() for path in found):
        raise UserError("--split: no model here is a run; leave it out")


def _load_results(text: str, place: Place, convention: str) -> PhaseResults:
    """Load results under `convention` from a JSON file, a run, its evaluation folder, or a folder of predictions."""
    path, named = Path(text), place.runs / text
    if (named / "evaluate").is_dir() or not (path.exists() or len(path.parts) > 1):
        path = named
    files = (path, path / "evaluate" / place.split / METRICS_FILE, path / METRICS_FILE)
    file = next((file for file in files if file.is_file()), None)
    if file is None and path.is_dir() and not (path / "evaluate").is_dir() and place.reading is not None:
        results, notes = score_folder(path, place.reading, place.spec, [convention], split=None)
        for note in notes:
            say(f"{path}: {note}")
        return results[convention]
    if file is None:
        evaluated = f"run evaluate first (there is no {files[1]})"
        raise UserError(
            f"{path}: {evaluated if path.is_dir() else 'no such run or folder'}; for a folder of predictions add "
            "--ground-truth"
        )
    tree = read_json(file)
    try:
        phases = _of_track(file, tree, place.track)
        found = PhaseResults.from_json(phases.get(HEAD, phases)[convention])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"contains no phase results under the convention {convention}; evaluate with it first"
        raise UserError(f"{file}: {problem}") from error
    if without := found.about.videos_without_labels:
        say(f"{path}: videos not counted, since their ground truth has no labels: {', '.join(without)}")
    return found


def _of_track(file: Path, tree: Any, track: str) -> Any:
    """Return the results of one label track, of each head, in a file of results."""
    if track == MAIN_TRACK:
        return tree.get("phases", tree)  # only a run's file has the key `phases`
    tracks = tree.get("tracks", {})
    if track not in tracks:
        known = ", ".join([MAIN_TRACK, *tracks])
        raise UserError(f"{file}: has no results of the track {track!r}, only of {known}; choose another --track")
    return tracks[track]


def _require_same_frames(first: Model, other: Model) -> None:
    """Raise UserError unless both models were evaluated on the same videos, frame for frame."""
    ours, theirs = first.results[0], other.results[0]
    if odd := sorted(set(ours.per_video) ^ set(theirs.per_video)):
        has = first.name if odd[0] in ours.per_video else other.name
        raise UserError(
            f"{first.name} and {other.name}: only {has} was evaluated on {odd[0]}; evaluate both on the same videos"
        )
    one, two = ours.about, theirs.about
    differing = [
        (one.frames != two.frames, f"{one.frames} and {two.frames} frames"),
        # Rates are compared only if both are known. If not, labels are compared row by row.
        (None not in (one.fps, two.fps) and one.fps != two.fps, f"{one.fps} and {two.fps} fps"),
        (one.truth_sha256 != two.truth_sha256, "other labels of the same videos"),
        (one.background != two.background, f"{one.background} and {two.background} as background"),
    ]
    for differs, shown in differing:
        if differs:
            raise UserError(f"{first.name} and {other.name}: {shown}; evaluate both on the same frames")


def _chosen_metrics(model: Model, convention: str, metrics: Sequence[str] | None) -> list[str]:
    row = next(iter(model.results[0].per_video.values()))
    known = [metric for metric in row if metric not in _COUNTS]
    for metric in metrics or ():
        if metric not in known:
            raise UserError(f"--metric {metric}: {convention} has {', '.join(known)} per video")
    return list(dict.fromkeys(metrics or known))


# ---------------------------------------------------------------------------------------------- numbers


def _compared(first: Model, second: Model, metric: str, test: PairedTest, p_holm: float) -> MetricComparison:
    shared = {video: value for video, value in test.per_video.items() if value is not None}
    interval = paired_interval(list(shared.values()))
    return MetricComparison(
        **vars(test),
        low=interval.low,
        high=interval.high,
        first=_over_seeds(first, metric, list(shared)),
        second=_over_seeds(second, metric, list(shared)),
        p_holm=p_holm,
    )


def _seed_means(model: Model, metric: str) -> dict[str, float | None]:
    """Return the mean over seeds for each video, or None if a seed has no value for it."""

    def mean(video: str) -> float | None:
        values = [result.per_video[video].get(metric) for result in model.results]
        return None if None in values else float(np.mean(np.array(values, dtype=float)))

    return {video: mean(video) for video in model.results[0].per_video}


def _over_seeds(model: Model, metric: str, videos: Sequence[str]) -> Score:
    """Average each seed over `videos`, and return mean and standard deviation (n - 1) of these averages over seeds."""
    tables = (np.array([result.per_video[video][metric] for video in videos], float) for result in model.results)
    values = np.array([table.mean() for table in tables])
    return Score.of(float(values.mean()), values)


def _about(models: Sequence[Model], convention: str, tests: int) -> ComparisonAbout:
    about = models[0].results[0].about
    return ComparisonAbout(
        convention=convention,
        title=CONVENTIONS.find(convention).title,
        unit="percent points" if about.unit == "percent" else about.unit,
        split=about.split,
        fps=about.fps,
        absent_phase=CONVENTIONS.find(convention).absent_phase,
        correction=f"Holm over {tests} tests",
        videos=len(models[0].results[0].per_video),
        frames=about.frames,
        videos_without_labels=about.videos_without_labels,
        seeds=[len(model.members) for model in models],
    )
