"""Gather the content of a report, about one run or several side by side, from the run folders.

If there are several runs, they must have been evaluated on the same videos with the same labels. `html_tables` and
`plotly_figures` make tables and figures from the content, `page` writes it as one HTML file, and `static_files` writes
the figures as PDF and PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, listed
from configs.load import flatten, load_config, read_yaml
from configs.schema import JOINT_FOLDER, TEMPORAL_FOLDER, Config
from engine.files import read_json_object
from engine.logs import METRICS_LOG, read_metrics
from evaluation.files.predictions import TOOLS_ALONE, PredictionFile, read_prediction_csv
from evaluation.files.truth import TRUTH_FILE, Truth, is_simulated, read_truth
from evaluation.metrics.conventions import MAIN_CONVENTION
from evaluation.metrics.counts import improper_row
from evaluation.metrics.results import HEAD, METRICS_FILE, ByConvention, Evaluation, read_evaluation
from evaluation.metrics.statistics import Intervals, bootstrap_intervals
from evaluation.reports.ablation import ABLATION_PAGE
from evaluation.reports.paper_figures import sample_edges_s
from evaluation.reports.summary import settings_behind
from evaluation.reports.tables import ResultTable
from features.dataset.catalogue import data_root
from features.dataset.index import Dataset, Index
from features.ids import file_stem
from features.run_lengths import runs
from features.store_folder import INDEX_FILE, find_feature_folder

EVALUATE_FOLDER = "evaluate"
TRUTH_NAME = "truth"


@dataclass(frozen=True)
class RunResults:
    """The results of one run, read from its folder.

    `settings` and `environment` are those of the training of the evaluated net. If another program trained it,
    `environment` is empty, and `settings` only describe the net. `curves` maps a training's folder below the run to its
    epochs. `predictions` is empty for a net that predicts tools only. For any net, `times_s` contains the times (T,) of
    the samples, and `tool_scores` the probabilities (T, K) of its tools. `of_tracks` has the predictions of additional
    label tracks, by track and video.
    """

    name: str
    evaluation: Evaluation
    truth: Truth
    predictions: dict[str, PredictionFile]
    times_s: dict[str, NDArray[np.float64]]
    tool_scores: dict[str, NDArray[np.float32]]
    summary: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    curves: dict[str, list[dict[str, Any]]]
    of_tracks: dict[str, dict[str, PredictionFile]] = field(default_factory=dict)

    def of_track(self, name: str) -> RunResults:
        """The results of an additional label track in place of those of the phases, without tools."""
        return replace(
            self,
            evaluation=self.evaluation.of_track(name),
            truth=self.truth.of_track(name),
            predictions=self.of_tracks[name],
            tool_scores={},
            of_tracks={},
        )

    @property
    def phases(self) -> Mapping[str, ByConvention]:
        """The results of each head under each convention; empty if no video has phases."""
        return self.evaluation.phases

    @property
    def tools_alone(self) -> bool:
        """Whether the net has no phase branch."""
        return self.evaluation.tasks == "tool"

    @property
    def simulated(self) -> bool:
        """Whether the run was evaluated on simulated operations."""
        known = self.evaluation.simulated
        return is_simulated(self.truth.spec, None) if known is None else known

    @property
    def labelled(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """The true and the predicted phases (T,) of the videos that have both."""
        names = [name for name in self.predictions if (self.truth.videos[name].phase >= 0).any()]
        truth = {name: self.truth.videos[name].phase for name in names}
        return truth, {name: self.predictions[name].phase for name in names}

    @cached_property
    def intervals(self) -> Intervals:
        """The bootstrap intervals of the head whose predictions are in files; empty without labels."""
        truth, predicted = self.labelled
        if not truth:
            return Intervals({}, {})
        scores = {name: self.predictions[name].probabilities for name in truth}
        return bootstrap_intervals(truth, predicted, self.truth.spec.phases, self.truth.fps, scores=scores)

    def accuracy(self, video: str) -> float | None:
        """Return the percentage of the video's labelled frames that are right, or None without labels."""
        results = self.phases.get(HEAD, {}).get(MAIN_CONVENTION)
        return results.per_video.get(video, {}).get("accuracy") if results else None


@dataclass(frozen=True)
class Disagreement:
    """Consecutive frames in which prediction and truth disagree; `frame` is the source frame in their middle."""

    video: str
    frame: int
    time_s: float
    length_s: float
    truth: int
    predicted: int


@dataclass(frozen=True)
class Thumbnail:
    """A frame, as JPEG bytes, in which prediction and truth disagree."""

    disagreement: Disagreement
    jpeg: bytes


@dataclass(frozen=True)
class Report:
    """The content of the page: runs, videos from worst to best, frames, a note about the frames, and tables."""

    runs: list[RunResults]
    videos: list[str]
    thumbnails: list[Thumbnail] = field(default_factory=list)
    thumbnails_note: str = ""
    across: Sequence[ResultTable] = ()  # training sets against test sets, if a run was evaluated on other data sets

    @property
    def truth(self) -> Truth:
        """The labels and the data set, which are the same for all runs."""
        return self.runs[0].truth

    @property
    def tracks(self) -> list[str]:
        """The additional label tracks that all runs recognise."""
        first, *others = self.runs
        return [name for name in first.of_tracks if all(name in run.of_tracks for run in others)]

    def of_track(self, name: str) -> Report:
        """The report on an additional label track, which it has in place of the phases."""
        return Report([run.of_track(name) for run in self.runs], self.videos)

    @property
    def phase_metrics(self) -> dict[str, list[str]]:
        """The metrics with intervals for each phase, by convention; empty if no run has phases with labels."""
        known = next((found for run in self.runs if (found := run.intervals.per_phase)), {})
        return {name: list(next(iter(by_phase.values()))) for name, by_phase in known.items()}

    def times_s(self, video: str) -> NDArray[np.float64] | None:
        """Return the times of a video's samples, (T,), or None if no run has predictions."""
        return next((run.times_s[video] for run in self.runs if video in run.times_s), None)


# ---------------------------------------------------------------------------------------------- gathering


def find_run(named: Path) -> Path:
    """Return the folder of a run, which may be given as that folder, or by its name below `runs`."""
    folder = Config().runs / named
    return folder if folder.is_dir() and not (named / EVALUATE_FOLDER).is_dir() else named


def recordings(run: Path) -> tuple[Config, Dataset]:
    """Return the settings and the data set of a run's last stage. Raises UserError if they are not there."""
    files = sorted(run.rglob("config.yaml"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{run}: has no config.yaml, so the location of its videos is not known")
    config = load_config(files[-1])
    root = data_root(config)
    path = config.data.index
    if not path.exists():
        path = find_feature_folder(None, run, config.extract.store) / INDEX_FILE
    return config, Dataset(Index.load(path), root)


def gather(folders: Sequence[Path], split: str = "test") -> Report:
    """Read the runs' evaluations in `RUN/evaluate/<split>/`.

    If a run has not been evaluated, raises UserError naming the command to run. If two runs were evaluated on different
    videos, raises UserError naming these.
    """
    names = _names(folders)
    runs = [_gather_run(folder, name, split) for folder, name in zip(folders, names, strict=True)]
    for run in runs[1:]:
        _require_comparable(runs[0], run)
    scores = {video: runs[0].accuracy(video) for video in runs[0].truth.videos}
    return Report(runs, sorted(scores, key=lambda video: (scores[video] is None, scores[video], video)))


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the runs' folder names, or their paths if a name is not unique or is that of the truth in figures."""
    names = [folder.resolve().name for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{folders[0]}: a run is given twice; give each only once")
    return [
        str(folder) if names.count(name) > 1 or name == TRUTH_NAME else name
        for folder, name in zip(folders, names, strict=True)
    ]


def _gather_run(folder: Path, name: str, split: str) -> RunResults:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; give the name or the folder of an evaluated run")
    if (folder / ABLATION_PAGE).is_file():
        raise UserError(f"{folder}: this is an ablation, not a run; open {folder / ABLATION_PAGE}")
    evaluated = folder / EVALUATE_FOLDER / split
    evaluation = _evaluation(folder, evaluated, split)
    truth = read_truth(evaluated / TRUTH_FILE)
    files = {video: evaluated / "predictions" / f"{file_stem(video)}.csv" for video in truth.videos}
    has_phases = HEAD in evaluation.phases or any(path.exists() for path in files.values())
    if not has_phases:
        alone = evaluated / TOOLS_ALONE
        files = {video: alone / path.name for video, path in files.items()} if alone.is_dir() else {}
    predictions = {video: read_prediction_csv(path, truth.spec, has_phases) for video, path in files.items()}
    of_tracks = {
        track: {
            video: read_prediction_csv(path.parent / track / path.name, truth.spec.as_track(track), track=track)
            for video, path in files.items()
        }
        for track in truth.tracks
    }
    for video, found in (pair for each in (predictions, *of_tracks.values()) for pair in each.items()):
        if len(found.phase) != len(truth.videos[video].phase):
            raise UserError(
                f"{evaluated}: {video} has {len(found.phase)} predictions, but another number of labels in "
                f"{TRUTH_FILE}; run evaluate again"
            )
        if (row := improper_row(found.probabilities, np.ones(len(found.phase), bool))) is not None:
            raise UserError(f"{evaluated}: {video}: the probabilities of row {row + 2} exceed 1; run evaluate again")
    stage = stage_of(folder, evaluation)
    environment = stage / "environment.json" if stage else None
    settings = read_yaml(stage / "config.yaml") if stage else {}
    settings = settings_behind(folder, settings, evaluation.encoder)
    imported = bool(evaluation.imported)
    return RunResults(
        name=name,
        evaluation=evaluation,
        truth=truth,
        predictions=predictions if has_phases else {},
        times_s={video: found.time_s for video, found in predictions.items()},
        tool_scores={video: p for video, found in predictions.items() if (p := found.tool_probabilities) is not None},
        summary=_read_if_there(folder / "summary.json"),
        settings=without_training(settings) if imported else settings,
        environment=_read_if_there(environment) if environment and not imported else {},
        curves=_curves(folder),
        of_tracks=of_tracks,
    )


def _evaluation(folder: Path, evaluated: Path, split: str) -> Evaluation:
    path = evaluated / METRICS_FILE
    command = f"python pipeline.py evaluate --name {folder.resolve().name}"
    if split in ("train", "val", "test", "all"):
        command += f" --split {split}"
    if not path.exists():
        others = sorted(other.parent.name for other in folder.glob(f"{EVALUATE_FOLDER}/*/{METRICS_FILE}"))
        instead = f", or choose --split {' or '.join(others)}" if others else ""
        raise UserError(f"{evaluated}: not evaluated yet; run `{command}` with the run's --config first{instead}")
    if not (evaluated / TRUTH_FILE).exists():
        raise UserError(f"{evaluated}: evaluated without {TRUTH_FILE}; run `{command}` with the run's --config again")
    return read_evaluation(path, f"run `{command}` with the run's --config again")


def stage_of(folder: Path, evaluation: Evaluation) -> Path | None:
    """Return the folder in which the evaluated net was trained.

    This is the folder of its joint training step, or else of stage two, or else of the stage that was started last.
    """
    if evaluation.joint and evaluation.joint.checkpoint:
        named = folder / JOINT_FOLDER / Path(evaluation.joint.checkpoint).parent.name
    else:
        named = folder / TEMPORAL_FOLDER
    if (named / "config.yaml").is_file():
        return named
    # Stages in the order in which they were started.
    stages = sorted(folder.rglob("config.yaml"), key=lambda path: (path.stat().st_mtime, str(path.parent)))
    return stages[-1].parent if stages else None


def without_training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return only the settings that describe an imported net: its input images and its parts.

    Another program trained it, so the other settings were never used.
    """
    parts = {"preprocess": None, "cnn": "backbone", "temporal": "head", "joint": "net"}
    return {
        name: {key: settings[name][key]} if key else settings[name]
        for name, key in parts.items()
        if name in settings and (key is None or key in settings[name])
    }


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    files = sorted(folder.rglob(METRICS_LOG))
    curves = {path.parent.relative_to(folder).as_posix(): read_metrics(path, "epoch") for path in files}
    return {name: rows for name, rows in curves.items() if rows}


def _require_comparable(first: RunResults, other: RunResults) -> None:
    one, two = first.truth, other.truth
    if odd := sorted(set(one.videos) ^ set(two.videos)):
        raise UserError(
            f"{first.name} and {other.name} were evaluated on different videos ({listed(odd, 6)} in one only); "
            "only runs on the same videos can be compared"
        )
    for what, a, b in (
        ("phases", one.spec.phases, two.spec.phases),
        ("tools", one.spec.tools, two.spec.tools),
        ("frames per second", one.fps, two.fps),
        *((name, one.spec.tracks[name], two.spec.tracks[name]) for name in one.tracks if name in two.tracks),
    ):
        if a != b:
            raise UserError(f"{first.name} and {other.name} differ in {what} ({a} and {b}); report them one by one")
    for video, labels in one.videos.items():
        same = np.array_equal(labels.phase, two.videos[video].phase) and labels.source == two.videos[video].source
        for name in set(labels.tracks) & set(two.videos[video].tracks):
            same = same and np.array_equal(labels.tracks[name], two.videos[video].tracks[name])
        if not (same and np.array_equal(labels.tools, two.videos[video].tools)):
            raise UserError(
                f"{video}: {first.name} and {other.name} were evaluated against different labels or recordings of it; "
                "run evaluate again on both"
            )


def differing_settings(runs: Sequence[RunResults]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the runs differ, with each run's value."""
    trees = [flatten(run.settings) for run in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    rows = [(key, [str(tree.get(key, "-")) for tree in trees]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def disagreements(report: Report, videos: int = 3, frames: int = 4) -> list[Disagreement]:
    """Return the longest sequences of wrong frames of the first run, in its worst videos, in order of time."""
    run, found = report.runs[0], []
    wrong = [video for video in report.videos if (run.accuracy(video) or 0.0) < 100.0 and video in run.labelled[0]]
    for video in wrong[:videos]:
        longest = sorted(_wrong_runs(run, video), key=lambda part: -part.length_s)[:frames]
        found += sorted(longest, key=lambda part: part.time_s)
    return found


def _wrong_runs(run: RunResults, video: str) -> list[Disagreement]:
    prediction, truth = run.predictions[video], run.truth.videos[video].phase
    classes = len(run.truth.spec.phases)
    edges_s = sample_edges_s(prediction.time_s, len(truth), run.truth.fps)
    # Each pair of truth and prediction gets one number; right frames and frames without a label get -1.
    pair = np.where((truth >= 0) & (truth != prediction.phase), truth.astype(int) * classes + prediction.phase, -1)
    return [
        Disagreement(
            video,
            int(prediction.frame_index[(start + end) // 2]),
            float(prediction.time_s[(start + end) // 2]),
            float(edges_s[end] - edges_s[start]),
            *divmod(value, classes),
        )
        for start, end, value in runs(pair)
        if value >= 0
    ]


def settings_of(run: RunResults, *keys: str) -> Any:
    """Return a nested setting of a run, or None if the run does not have it."""
    value: Any = run.settings
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
