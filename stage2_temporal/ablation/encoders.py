"""Comparisons of encoders under the same heads: `compare-encoders`.

First the features of all encoders are made (`encoder_features`). Then every head is trained on them with every seed in
every fold, one training per core, and a frame probe is fitted in every fold. Each is an ordinary folder with the
predictions for the fold's test videos, `<comparison>/trainings/<encoder>/<head>/fold<k>-seed<s>`. A training whose
folder has its predictions is not repeated, so the command can be stopped and started again at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from configs.encoder_comparison import PROBE
from configs.errors import UserError, printable
from configs.schema import MAIN_TRACK, TEMPORAL_FOLDER, Config
from engine.device import choose_device, cpu_threads
from engine.files import exclusive_lock, read_json_object, sha256_json, write_json
from engine.launch import available_cores
from engine.pool import Advance, choose_processes, work_through
from engine.progress import no_bars, say
from engine.runs import StageFolder, StageIdentity, settings_without
from engine.stopping import StopRequest
from evaluation.comparison import DEFAULT_CONVENTION
from evaluation.encoders import METRICS, TOOL_HEAD, EncoderFacts, Encoders, EncodersAbout, Training, compare_encoders
from evaluation.files.predictions import PredictionFile, read_prediction_csv, write_prediction_csv
from evaluation.files.truth import is_simulated
from evaluation.metrics.phases import evaluate_phases
from evaluation.metrics.results import ToolResults
from evaluation.metrics.tools import evaluate_tools, sigmoid
from evaluation.reports.encoders import (
    ENCODERS_PAGE,
    encoders_notes,
    encoders_tables,
    ranking_sentences,
    write_encoders_csv,
    write_encoders_page,
)
from features.dataset.catalogue import open_dataset
from features.dataset.index import Index
from features.ids import file_stem
from features.store import VideoFeatures
from features.store_folder import load_feature_set
from stage2_temporal.ablation.encoder_features import (
    Folders,
    Plan,
    check_plan,
    make_features,
    make_folds,
    save_folds,
    usable_everywhere,
    with_costs,
    with_notes,
)
from stage2_temporal.ablation.run import GpuTurn, StopWithParent, gpus_in_sight, trainings_at_once
from stage2_temporal.data import TrainingData, read_training_data
from stage2_temporal.joint.start import start_weights
from stage2_temporal.predict import load_temporal, predict_phases
from stage2_temporal.probe import fit_phases, fit_tools
from stage2_temporal.train import train_temporal

_TRAININGS, _PREDICTIONS, _DONE_FILE = "trainings", "predictions", "done.json"
JSON_FILE, CSV_FILE = "encoders.json", "encoders.csv"
Videos = Mapping[str, VideoFeatures]


@dataclass(frozen=True)
class Unit:
    """One training: of a head with a seed, or (seed None) of the frame probe, on an encoder's features in a fold."""

    encoder: str
    head: str
    fold: int
    seed: int | None

    @property
    def frames(self) -> int:
        """What this unit adds to the progress bar: 1, since the bar counts trainings."""
        return 1

    @property
    def label(self) -> str:
        """The unit in messages."""
        return f"{self.encoder}, {self.head}, fold {self.fold}" + ("" if self.seed is None else f", seed {self.seed}")

    def folder(self, plan: Plan) -> Path:
        """The unit's folder, a run folder for a head."""
        name = f"fold{self.fold}" + ("" if self.seed is None else f"-seed{self.seed}")
        return plan.folder / _TRAININGS / self.encoder / self.head / name


@dataclass
class EncoderTask:
    """A callable that trains one unit of an encoder; it is sent to each worker process once, features in shared memory.

    `data` and `folders` are those of each fold.
    """

    plan: Plan
    folders: Folders
    data: Mapping[int, TrainingData]
    threads: int
    gpus: GpuTurn | None = None

    def __call__(self, unit: Unit, advance: Advance) -> None:
        """Train the unit, and write its predictions. Raises UserError for settings that contradict each other."""
        if self.gpus is not None:
            self.gpus.take()
        with cpu_threads(self.threads), no_bars():
            (self._probe if unit.head == PROBE else self._train)(unit, StopWithParent(advance))
        advance(1)

    def identity(self, unit: Unit) -> str:
        """A digest of the data of a training, which tells whether its folder belongs to them."""
        data = self.data[unit.fold]
        videos = [[part, [one.id for one in data.index.by_split(part)]] for part in ("train", "val", "test")]
        return sha256_json([data.encoder_digest, data.labels_sha256, videos])

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit was trained on these data, and all its predictions are there."""
        path = unit.folder(self.plan) / _DONE_FILE
        return path.is_file() and _recorded(path).get("identity_sha256") == self.identity(unit)

    def _videos(self, fold: int, split: str) -> Videos:
        ids = [one.id for one in self.data[fold].index.by_split(split)]
        return load_feature_set(self.folders[fold], ids, in_memory=False)

    def _train(self, unit: Unit, stop: StopRequest) -> None:
        config, run = self.plan.config(unit.encoder, unit.fold, unit.head, unit.seed), unit.folder(self.plan)
        folder, data = self.folders[unit.fold], self.data[unit.fold]
        result = train_temporal(config, run, folder, stop, data, start=start_weights(config))
        model, about = load_temporal(run / TEMPORAL_FOLDER)
        videos, tool_logits = self._videos(unit.fold, "test"), bool(about.tool_inputs)
        inference, device = about.inference, config.device
        found = predict_phases(
            model, videos, inference, about.frames, device=device, stop=stop, tool_logits=tool_logits
        )
        phases = {name: about.by_track(values)[MAIN_TRACK] for name, values in found.items()}
        self._finish(unit, videos, phases, {}, _numbers(result.to_json()))

    def _probe(self, unit: Unit, stop: StopRequest) -> None:
        spec = self.data[unit.fold].index.dataset
        train, val, videos = (self._videos(unit.fold, split) for split in ("train", "val", "test"))
        phases = fit_phases(train, val, spec.phases, stop=stop)
        found = {name: np.exp(phases.log_probabilities(video.features)) for name, video in videos.items()}
        tools = {}
        if any((video.tools >= 0).any() for video in train.values()):
            probe = fit_tools(train, val, spec.tools, stop=stop)
            tools = {name: sigmoid(probe.logits(video.features)) for name, video in videos.items()}
        self._finish(unit, videos, found, tools, {"val_accuracy": phases.score, "c": phases.c})

    def _finish(
        self,
        unit: Unit,
        videos: Videos,
        phases: Mapping[str, NDArray[np.float32]],
        tools: Mapping[str, NDArray[Any]],
        result: Mapping[str, Any],
    ) -> None:
        """Write the predictions of the test videos, and then the file that says that they are complete."""
        spec, folder = self.data[unit.fold].index.dataset, unit.folder(self.plan)
        for name, video in videos.items():
            values = phases[name].astype(np.float32)
            scores = tools[name].astype(np.float32) if name in tools else None
            labels = values.argmax(axis=1).astype(np.int8)
            prediction = PredictionFile(video.frame_index, video.time_s, labels, values, scores)
            write_prediction_csv(folder / _PREDICTIONS / f"{file_stem(name)}.csv", prediction, spec)
        tested = _test_scores(videos, phases, spec.phases)
        write_json(folder / _DONE_FILE, {"identity_sha256": self.identity(unit), **result, **tested})


def _test_scores(
    videos: Videos, probabilities: Mapping[str, NDArray[np.float32]], phases: Sequence[str]
) -> dict[str, float | None]:
    """The scores of one training on the test videos of its fold, in percent; none if no video has labels."""
    truth = {name: video.phase for name, video in videos.items() if (video.phase >= 0).any()}
    if not truth:
        return {}
    predicted = {name: probabilities[name].argmax(axis=1) for name in truth}
    fps = float(next(iter(videos.values())).attributes["fps"])
    results = evaluate_phases(truth, predicted, phases, fps, [DEFAULT_CONVENTION])[DEFAULT_CONVENTION]
    return {f"test_{metric}": score.mean for metric in METRICS if (score := results.score(metric)) is not None}


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the table of trainings shows of the result of stage two."""
    keys = ("val_accuracy", "best_epoch", "epochs", "parameters", "seconds", "frames_per_s")
    return {key: result.get(key) for key in keys}


def compare(plan: Plan, *, workers: int = -1, stop: StopRequest, trusted: bool = False) -> list[tuple[str, str]]:
    """Run a whole comparison; returns failed trainings, and videos left out, each with the reason.

    The results are `encoders.json`, `encoders.csv` (one row per training) and `encoders.html` in `plan.folder`. Raises
    UserError if the folder holds another comparison, or if settings, weights or data are wrong. When `stop` is set,
    keeps everything and raises Stopped.
    """
    base = plan.base()
    facts = check_plan(plan, trusted)
    dataset = open_dataset(base)
    folds = make_folds(plan, dataset.index)
    facts = {name: with_notes(plan, known, name, dataset.index, folds) for name, known in facts.items()}
    identity = _identity(plan, base, dataset.index)
    with exclusive_lock(plan.folder, "comparison"):
        StageFolder(plan.folder.parent, plan.folder.name, base, identity).open()
        save_folds(plan, folds)
        folders, failed = make_features(plan, dataset, folds, stop, trusted)
        folds = usable_everywhere(folds, folders)
        trainings: list[Training] = []
        for encoder, own in folders.items():
            done, lost = _trained(plan, encoder, own, folds, workers, stop)
            trainings += done
            failed += lost
            facts[encoder] = with_costs(plan, facts[encoder], encoder, own, folds[min(folds)])
        result = _compared(plan, base, folds, folders, trainings, facts, dataset.root)
        _write(plan.folder, result, trainings)
    return failed + [(f"{one.id} is left out", one.reason) for one in dataset.index.missing]


def _identity(plan: Plan, base: Config, index: Index) -> StageIdentity:
    """Everything that a comparison's numbers depend on. Each training also checks the features that it is given."""
    return StageIdentity(
        {
            "comparison": settings_without(plan.spec, "title", "reference"),
            "seed": base.seed,
            "fps": base.data.fps,
            "split": settings_without(base.data.split),
            "tracks": list(base.data.tracks),
            "preprocess": settings_without(base.preprocess),
            "cnn": settings_without(base.cnn, "backbone", "weights", "workers", "checkpoint_minutes"),
            "temporal": settings_without(base.temporal, "head", "baseline", "features", "checkpoint_minutes"),
            "dataset": index.dataset.name,
            "videos": {one.id: one.sha256_ends for one in index.videos},
        }
    )


# ---------------------------------------------------------------------------------------------- trainings


def _trained(
    plan: Plan, encoder: str, folders: Folders, folds: Mapping[int, Index], workers: int, stop: StopRequest
) -> tuple[list[Training], list[tuple[str, str]]]:
    """Train all heads and the probe on one encoder's features; returns the trainings done, and those that failed."""
    device = plan.base().device
    cores = trainings_at_once(device) if workers == -1 else workers
    gpus = gpus_in_sight(device)
    threads = max(1, available_cores() // max(1, cores))
    data = _shared(plan, encoder, folders, folds)
    task = EncoderTask(plan, folders, data, threads, GpuTurn(gpus) if len(gpus) > 1 else None)
    units = [Unit(encoder, PROBE, fold, None) for fold in folds]
    units += [Unit(encoder, head, fold, seed) for head in plan.spec.heads for fold in folds for seed in plan.spec.seeds]
    missing = [unit for unit in units if not task.is_done(unit)]
    failed: list[tuple[str, str]] = []
    if missing:
        where = f"{len(gpus)} GPU(s)" if gpus else choose_device(device)
        say(f"== {encoder}: {len(missing)} of {len(units)} trainings, {cores} at once on {where}")
    processes = choose_processes(cores, missing) if len(missing) > 1 else 1
    done = len(units) - len(missing)
    for unit, reason in work_through(task, missing, processes, "trainings", stop, unit="training", disable=True):
        if reason is not None:
            failed.append((unit.label, reason))
        done += reason is None
        say(f"{unit.label}: {reason or _outcome(plan, unit)} ({done} of {len(units)} done)")
    return [_read(plan, unit, folds[unit.fold]) for unit in units if task.is_done(unit)], failed


def _shared(plan: Plan, encoder: str, folders: Folders, folds: Mapping[int, Index]) -> dict[int, TrainingData]:
    """The features for each fold, in shared memory; folds whose features are in the same folder share one copy."""
    found: dict[int, TrainingData] = {}
    banks: dict[Path, TrainingData] = {}
    for fold, folder in folders.items():
        if folder not in banks:
            sharing = [folds[other] for other, same in folders.items() if same == folder]
            banks[folder] = _read_all(plan.config(encoder, fold), folder, sharing)
        found[fold] = banks[folder].under(folds[fold])
    return found


def _read_all(config: Config, folder: Path, folds: Sequence[Index]) -> TrainingData:
    """The features of all videos that some fold trains on or validates with."""
    used = {one.id for index in folds for part in ("train", "val") for one in index.by_split(part)}
    videos = [one.model_copy(update={"split": "train" if one.id in used else "none"}) for one in folds[0].videos]
    index = folds[0].model_copy(update={"videos": tuple(videos)})
    data = read_training_data(folder, config.temporal.features, config.device, config.data.tracks, index)
    data.bank.features.share_memory_()
    data.bank.labels.share_memory_()
    return data


def _outcome(plan: Plan, unit: Unit) -> str:
    """The score of a finished training on the validation videos."""
    score = _recorded(unit.folder(plan) / _DONE_FILE).get("val_accuracy")
    return f"validation accuracy {100 * score:.2f} %" if isinstance(score, int | float) else "no validation videos"


def _read(plan: Plan, unit: Unit, index: Index) -> Training:
    """A finished training with its predictions. Raises UserError naming the folder to delete if files are damaged."""
    folder = unit.folder(plan)
    result = _recorded(folder / _DONE_FILE)
    predicted = {one.id: _prediction(folder, one.id, index).phase for one in index.by_split("test")}
    return Training(unit.encoder, unit.head, unit.fold, unit.seed, predicted, {**result, "folder": str(folder)})


def _recorded(path: Path) -> dict[str, Any]:
    """The file that ends a training. Raises UserError naming the folder to delete if it is damaged."""
    with _naming(path.parent):
        return read_json_object(path)


def _prediction(folder: Path, video_id: str, index: Index) -> PredictionFile:
    """The prediction of a training for a test video. Raises UserError naming the folder to delete if it is damaged."""
    with _naming(folder):
        return read_prediction_csv(folder / _PREDICTIONS / f"{file_stem(video_id)}.csv", index.dataset)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; delete {folder} to train it again") from error


# ---------------------------------------------------------------------------------------------- results


def _compared(
    plan: Plan,
    base: Config,
    folds: Mapping[int, Index],
    folders: Mapping[str, Folders],
    trainings: Sequence[Training],
    facts: Mapping[str, EncoderFacts],
    root: Path,
) -> Encoders:
    spec = next(iter(folds.values())).dataset
    videos = _test_videos(folds, next(iter(folders.values())))
    truth = {name: video.phase for name, video in videos.items() if (video.phase >= 0).any()}
    if not truth:
        raise UserError(f"{base.data.index}: no test video has phase labels, so there is nothing to compare")
    known = [_only(one, truth) for one in trainings]
    about = EncodersAbout(
        title=plan.spec.title or plan.folder.name,
        dataset=spec.title or spec.name,
        simulated=is_simulated(spec, root),
        fps=float(next(iter(videos.values())).attributes["fps"]),
        folds=_described(plan.spec.folds, len(folds)),
        videos=list(truth),
        frames=sum(int((phase >= 0).sum()) for phase in truth.values()),
        seeds=plan.spec.seeds,
        reference=plan.spec.reference,
        offline=[name for name, head in plan.spec.heads.items() if not head.causal] or None,
    )
    tools = {encoder: _tools(plan, encoder, own, folds, trainings) for encoder, own in folders.items()}
    return compare_encoders(about, truth, spec, known, facts, tools, list(plan.spec.heads))


def _described(folds: str | int | None, count: int) -> str:
    if folds is None:
        return "the split of the base settings"
    return f"leave one out, {count} folds" if folds == "leave_one_out" else f"{count} folds"


def _only(training: Training, truth: Mapping[str, Any]) -> Training:
    """The training without predictions of videos that have no labels."""
    predicted = {name: phase for name, phase in training.predicted.items() if name in truth}
    values = (training.encoder, training.head, training.fold, training.seed)
    return Training(*values, predicted, training.result)


def _test_videos(folds: Mapping[int, Index], folders: Folders) -> dict[str, VideoFeatures]:
    """Each test video, from the features of the fold that tests on it."""
    found: dict[str, VideoFeatures] = {}
    for fold, index in folds.items():
        ids = [one.id for one in index.by_split("test")]
        found |= load_feature_set(folders[fold], ids, in_memory=False)
    return found


def _tools(
    plan: Plan, encoder: str, folders: Folders, folds: Mapping[int, Index], trainings: Sequence[Training]
) -> dict[str, ToolResults | None]:
    """The tool metrics of the probe's predictions and of the head that was trained with the encoder, if there is one.

    None if a fold is missing, or if there are no labels.
    """
    videos, spec = _test_videos(folds, folders), next(iter(folds.values())).dataset
    labels = {name: video.tools for name, video in videos.items() if (video.tools >= 0).any()}
    scores: dict[str, NDArray[Any]] = {}
    for one in trainings:
        if one.encoder == encoder and one.head == PROBE:
            read = {name: _prediction(Path(one.result["folder"]), name, folds[one.fold]) for name in one.predicted}
            scores |= {name: p.tool_probabilities for name, p in read.items() if p.tool_probabilities is not None}
    trained = {name: sigmoid(v.tool_logits) for name, v in videos.items() if np.isfinite(v.tool_logits).all()}
    found = {PROBE: scores, TOOL_HEAD: trained if plan.spec.encoders[encoder].finetune else {}}
    fps = float(next(iter(videos.values())).attributes["fps"])
    return {by: _tool_results(labels, values, spec.tools, fps) for by, values in found.items()}


def _tool_results(
    labels: Mapping[str, NDArray[np.int8]], scores: Mapping[str, NDArray[Any]], tools: Sequence[str], fps: float
) -> ToolResults | None:
    if not labels or not labels.keys() <= scores.keys():
        return None
    return evaluate_tools(labels, {name: scores[name] for name in labels}, tools, split="test", fps=fps)


def _write(folder: Path, result: Encoders, trainings: Sequence[Training]) -> None:
    """Print the tables, and write the files."""
    console = Console()
    for table in encoders_tables(result):
        console.print(table)
    for line in (*ranking_sentences(result), *encoders_notes(result)):
        console.print(Text(printable(line)))
    write_json(folder / JSON_FILE, result.to_json())
    write_encoders_csv(folder / CSV_FILE, trainings)
    write_encoders_page(folder / ENCODERS_PAGE, result)
    say(f"written: {', '.join(str(folder / name) for name in (CSV_FILE, JSON_FILE, ENCODERS_PAGE))}")
