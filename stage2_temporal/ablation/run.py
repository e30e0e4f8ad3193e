"""Ablations of stage two: many trainings on one copy of the features, one per core. They can be resumed at any time.

A setting (a point of the space, or a named setting) is a trial of an Optuna study. It is trained with each seed, in an
ordinary run folder `<ablation>/trials/<setting>-seed<k>`, so that finished trainings are never repeated and interrupted
ones resume. Only these folders are kept: the study is built from them at each start. A coordinating process starts one
worker process per core.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live

from configs.ablation import FEATURE_KEYS, AblationConfig
from configs.errors import UserError
from configs.load import differences, keys_given, load_ablation, load_config, to_yaml
from configs.schema import TEMPORAL_FOLDER, Config
from engine.device import choose_device, cpu_threads
from engine.files import exclusive_lock, sha256_json, write_text
from engine.launch import available_cores
from engine.pool import Advance, choose_processes, work_through
from engine.progress import no_bars, say
from engine.runs import ABSENT, StageFolder, StageIdentity, settings_without
from engine.stopping import StopRequest
from evaluation.metrics.results import counted
from evaluation.reports.ablation import (
    ABLATION_PAGE,
    Trial,
    ablation_page,
    ablation_rows,
    ablation_table,
    write_ablation_csv,
)
from features.frames.settings_match import require_features_of
from features.store_folder import find_feature_folder
from stage2_temporal.ablation.features import SharedFeatures, folder_of, share_features
from stage2_temporal.ablation.study import NAMED, TrialFolders, corners, distributions, open_study, size
from stage2_temporal.data import TrainingData
from stage2_temporal.joint.start import start_weights
from stage2_temporal.train import require_arithmetic, score_of, train_temporal

BASE = "base"
# Trainings per core in one round. If all settings are known, there are many, which saves starts of processes. If they
# are drawn at random, there are few, so that the sampler learns from earlier trainings.
_CLAIM_KNOWN, _CLAIM_DRAWN = 8, 2
# One training leaves a GPU idle most of the time, so several share it. There are not more, since each process has a
# CUDA context of its own.
_MOST_ON_ONE_GPU = 4


@dataclass(frozen=True)
class Unit:
    """One training: a setting and a seed."""

    changes: tuple[tuple[str, Any], ...]
    seed: int
    features: Path = Path()
    encoder_digest: str = ""  # the digest of the features' encoder, if the setting names features

    @property
    def frames(self) -> int:
        """What this unit adds to the progress bar: 1, since the bar counts trainings."""
        return 1

    @property
    def folder(self) -> str:
        """The name of the unit's run folder, which depends on the setting and the seed alone."""
        known = [pair for pair in self.changes if pair[0] not in FEATURE_KEYS]
        known += [("features", self.encoder_digest)] if self.encoder_digest else []
        name = BASE if not known else sha256_json(sorted(known))[:10]
        return f"{name}-seed{self.seed}"


@dataclass
class UnitTask:
    """A callable that trains one unit; it is sent to each worker process once, with the features in shared memory."""

    source: str
    overrides: tuple[str, ...]
    trials: Path
    shared: SharedFeatures
    threads: int
    gpus: GpuTurn | None = None
    _resident: tuple[tuple[Path, bool], TrainingData] | None = None

    def __call__(self, unit: Unit, advance: Advance) -> None:
        """Train the unit. Raises UserError for settings that contradict each other."""
        if self.gpus is not None:
            self.gpus.take()
        config = unit_config(self.source, self.overrides, unit)
        data = self._data(unit.features, config)
        with cpu_threads(self.threads), no_bars():  # the table shows the progress
            folder, stop = self.trials / unit.folder, StopWithParent(advance)
            train_temporal(config, folder, unit.features, stop, data, start=start_weights(config))
        advance(1)

    def _data(self, features: Path, config: Config) -> TrainingData:
        """The shared features. On a GPU, this process keeps a copy until a training needs other features."""
        key = (features, config.temporal.tool_logits)
        device = choose_device(config.device)
        if device.type == "cpu":
            return self.shared.of(*key)
        if self._resident is None or self._resident[0] != key:
            self._resident = None  # frees the memory before the next copy is made
            self._resident = (key, self.shared.of(*key).to(device))
        return self._resident[1]


class GpuTurn:
    """Assigns the visible GPUs to the worker processes in turn.

    The object is pickled once for each worker, and each time the pickle contains the next GPU. The process that starts
    the workers sees all GPUs.
    """

    def __init__(self, gpus: Sequence[str]) -> None:
        self._turns = itertools.cycle(gpus)
        self._own: str | None = None

    def __getstate__(self) -> str:
        return next(self._turns)

    def __setstate__(self, gpu: str) -> None:
        self._own = gpu

    def take(self) -> None:
        """Hide all GPUs except this process's own. Call it before CUDA is used, which counts the GPUs only once."""
        if self._own is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self._own


class StopWithParent(StopRequest):
    """A stop request that asks the parent process, between steps, whether to stop."""

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self._advance = advance

    def poll(self) -> int | None:
        try:
            self._advance(0)
        except Exception:  # the pool ends jobs with various exceptions; `raise_if_set` raises the original one
            return signal.SIGTERM
        return None

    def raise_if_set(self) -> None:
        self._advance(0)


def unit_config(source: str, overrides: Sequence[str], unit: Unit) -> Config:
    """The settings of one training."""
    changes = {key: value for key, value in unit.changes if key not in FEATURE_KEYS}
    try:
        return load_config(source, overrides, {**changes, "seed": unit.seed})
    except UserError as error:
        reason = str(error).removeprefix("--set").lstrip(": ")
        raise UserError(f"the ablation's settings: {reason}") from error


def read_ablation(source: str, base: str | None = None) -> AblationConfig:
    """Read an ablation from a file, or one of the included ablations by name; `base` replaces its base settings."""
    spec = load_ablation(source)
    return spec.model_copy(update={"base": base}) if base else spec


def ablate(
    spec: AblationConfig,
    folder: Path,
    overrides: Sequence[str],
    features: Path | None,
    run: Path,
    *,
    workers: int = -1,
    stop: StopRequest,
) -> list[tuple[str, str]]:
    """Run all trainings of an ablation; returns failed trainings and left-out videos, each with the reason.

    Trials and results are written to `folder`. The results are `ablation.csv` (one row per training), `ablation.html`
    (the ranked table and Optuna's plots) and `best.yaml` (the best settings). The features are those of `run`, unless
    `features` names a folder. Raises UserError if `folder` holds another ablation, if there are no validation videos,
    or if settings are wrong. When `stop` is set, keeps everything and raises Stopped.
    """
    started = time.monotonic()
    base = load_config(spec.base, overrides)
    shared = _read_features(spec, base, overrides, find_feature_folder(features, run, base.extract.store))
    own = shared.of(shared.base, False)
    require_features_of(own.encoder, base, keys_given(spec.base, overrides), own.folder)
    _claim_folder(folder, spec, base, shared)
    cores = trainings_at_once(base.device) if workers == -1 else workers
    threads = max(1, available_cores() // max(1, cores))
    gpus = gpus_in_sight(base.device)
    turn = GpuTurn(gpus) if len(gpus) > 1 else None
    task = UnitTask(spec.base, tuple(overrides), folder / "trials", shared, threads, turn)
    say(f"ablate: {cores} training(s) at once on {f'{len(gpus)} GPU(s)' if gpus else choose_device(base.device)}")
    failed: list[tuple[str, str]] = []
    with exclusive_lock(folder, "ablation"), _live_table() as live:
        plan = _Plan(spec, base, tuple(overrides), folder, shared)
        plan.trials()  # raises UserError for folders with other settings before any training starts
        for units in plan.rounds(cores, started):
            processes = choose_processes(cores, units) if len(units) > 1 else 1
            for unit, reason in work_through(task, units, processes, "trainings", stop, unit="training", disable=True):
                label = f"{plan.label(unit.changes)}, seed {unit.seed}"
                if reason is not None:
                    failed.append((label, reason))
                result = plan.folders.result(unit.folder)
                _show(live, plan.trials(), plan.score, label, result, reason)
        _write_outcome(folder, plan)
    left_out = shared.of(shared.base, False).index.missing
    return failed + [(f"{video.id} is left out", video.reason) for video in left_out]


def trainings_at_once(device: str) -> int:
    """The number of trainings at the same time: one per core; on GPUs at most `_MOST_ON_ONE_GPU` on each."""
    cores = available_cores()
    if choose_device(device).type == "cpu":
        return cores
    return min(cores, _MOST_ON_ONE_GPU * max(1, len(gpus_in_sight(device))))


def gpus_in_sight(device: str) -> list[str]:
    """The NVIDIA GPUs that trainings on `device` can use, as CUDA_VISIBLE_DEVICES names them."""
    if choose_device(device).type != "cuda":
        return []
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    count = torch.cuda.device_count()  # CUDA ignores the first invalid name and all after it
    return named[:count] if any(named) else [str(number) for number in range(count)]


def _read_features(spec: AblationConfig, base: Config, overrides: Sequence[str], where: Path) -> SharedFeatures:
    """The features of every setting, including settings that may be drawn from a range.

    Raises UserError for wrong settings, and for two settings that are the same training.
    """
    for seed in spec.seeds:
        unit_config(spec.base, overrides, Unit((), seed))
    wanted = dict.fromkeys([(where, base.temporal.tool_logits)])
    named: dict[tuple[str, Path], str] = {}
    for point in corners(spec):
        unit = Unit(changes_of(spec, point), spec.seeds[0])
        config = unit_config(spec.base, overrides, unit)
        require_arithmetic(config.temporal, choose_device(config.device))
        features = folder_of(dict(unit.changes), where, base)
        name = ", ".join(f"{key}={value!r}" for key, value in point.items())
        other = named.setdefault((config.temporal.model_dump_json(), features), name)
        _require_effect(config, unit)
        if other != name:
            raise UserError(f"the ablation's settings: {other} and {name} are the same training; leave one out")
        wanted[features, config.temporal.tool_logits] = None
    return share_features(where, wanted, base)


def _require_effect(config: Config, unit: Unit) -> None:
    """Raise UserError if a setting has no effect, since the table would list it as if it made a difference."""
    for key, _ in unit.changes:
        if key not in FEATURE_KEYS:
            *above, leaf = key.split(".")
            block = functools.reduce(getattr, above, config)
            if reason := getattr(block, "unused", {}).get(leaf):
                raise UserError(f"the ablation's settings: {key} has no effect with {reason} in the same block")


def changes_of(spec: AblationConfig, point: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The settings that a point of the space changes, as pairs (key, value)."""
    named = spec.settings.get(point.get(NAMED, ""), {}) if spec.settings else {}
    return (*((key, value) for key, value in point.items() if key != NAMED), *named.items())


# ---------------------------------------------------------------------------------------------- plan


class _Plan:
    """The settings to train, their state in the study, and their results."""

    def __init__(
        self, spec: AblationConfig, base: Config, overrides: tuple[str, ...], folder: Path, shared: SharedFeatures
    ) -> None:
        self.spec, self.base, self.overrides, self.shared = spec, base, overrides, shared
        self.folders = TrialFolders(folder / "trials", spec, self._folder)
        self.score = score_of(shared.of(shared.base, False).tracks)
        self._points = self.folders.points()
        self.study = open_study(self.folders, self._points)
        self._as_named: set[Unit] = set()  # finished trainings that `_require_as_named` has checked
        for name in self.folders.strays(self._points):
            say(f"note: {self.folders.trials / name}: not a training of this ablation; it is left out of the table")

    def _folder(self, point: Mapping[str, Any], seed: int) -> str:
        return self._unit(changes_of(self.spec, point), seed).folder

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def rounds(self, cores: int, started: float) -> Iterator[list[Unit]]:
        """Yield rounds of trainings until none is left or the budget is spent. The base settings come first."""
        first = [] if self._base_is_in_grid else [self._unit((), seed) for seed in self.spec.seeds]
        seeds = len(self.spec.seeds)
        most = max(1, (_CLAIM_DRAWN if self.spec.has_ranges else _CLAIM_KNOWN) * cores // seeds)
        while True:
            claimed = list(itertools.islice(self._claims(started), most))
            settings = [changes_of(self.spec, trial.params) for trial in claimed]
            units = first + [self._unit(changes, seed) for changes in settings for seed in self.spec.seeds]
            if not units:
                return
            first = []
            yield list(dict.fromkeys(units))  # without repetitions: an integer may be drawn twice
            for trial in claimed:  # a trial without a score has a training that failed
                score = self.folders.score(trial.params)
                self.study.tell(trial, score, state=TrialState.FAIL if score is None else TrialState.COMPLETE)

    def _claims(self, started: float) -> Iterator[optuna.Trial]:
        """The points to train next, within the budget: queued ones and, if there are ranges, newly drawn ones."""
        while self._budget_left(started) and (self.spec.has_ranges or self._trials(TrialState.WAITING)):
            yield self.study.ask(distributions(self.spec))

    def _budget_left(self, started: float) -> bool:
        budget, seeds = self.spec.budget, len(self.spec.seeds)
        trials = self._trials(TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL)
        begun = len({tuple(sorted(trial.params.items(), key=str)) for trial in trials})
        if begun >= size(self.spec):  # otherwise a range of integers would be drawn from endlessly
            return False
        begun += not self._base_is_in_grid
        if budget.trials is not None and (begun + 1) * seeds > budget.trials:
            return False
        return budget.minutes is None or time.monotonic() - started < 60 * budget.minutes

    def _unit(self, changes: tuple[tuple[str, Any], ...], seed: int) -> Unit:
        folder = folder_of(dict(changes), self.shared.base, self.base)
        named = any(key in FEATURE_KEYS for key, _ in changes)
        return Unit(changes, seed, folder, self.shared.digest(folder) if named else "")

    def label(self, changes: Sequence[tuple[str, Any]]) -> str:
        """A setting's label in tables: the last part of each key with its value, and the name of a named setting."""
        if not changes:
            return BASE
        names = {name: tuple(what.items()) for name, what in self.spec.settings.items()}
        named = next((name for name, what in names.items() if what == tuple(changes[len(self.spec.space) :])), None)
        parts = [f"{_leaf(key, self.spec.space)}={value}" for key, value in changes[: len(self.spec.space)]]
        return ", ".join([*parts, *([named] if named else [])])

    @functools.cached_property
    def _base_is_in_grid(self) -> bool:
        """Whether one of the settings equals the base settings, which then need not be trained separately."""
        if self.spec.has_ranges:
            return False
        return any(self.is_base(changes_of(self.spec, point)) for point in corners(self.spec))

    def is_base(self, changes: Sequence[tuple[str, Any]]) -> bool:
        """Whether these changes leave the base settings as they are."""
        unit = self._unit(tuple(changes), self.base.seed)
        tried = unit_config(self.spec.base, self.overrides, unit)
        return tried.temporal == self.base.temporal and self.shared.is_base(unit.features)

    def trials(self) -> list[Trial]:
        """All trainings with a result, including those of earlier processes, for the tables.

        Raises UserError if a training's settings differ from those that the table would show.
        """
        asked = self._trials(TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL)
        points: list[Mapping[str, Any]] = [{}, *self._points, *(trial.params for trial in asked)]
        found = []
        for changes in dict.fromkeys(changes_of(self.spec, point) for point in points):
            for seed in self.spec.seeds:
                unit = self._unit(changes, seed)
                result = self.folders.result(unit.folder)
                if result is not None:
                    self._require_as_named(unit, self.folders.trials / unit.folder)
                    is_base = self.is_base(changes)
                    found.append(Trial(self.label(changes), dict(changes), seed, is_base, result, unit.folder))
        return found

    def _require_as_named(self, unit: Unit, run: Path) -> None:
        settings = run / TEMPORAL_FOLDER / "config.yaml"
        if unit in self._as_named or not settings.is_file():
            return
        trained = load_config(settings).temporal.model_dump()
        named = unit_config(self.spec.base, self.overrides, unit).temporal.model_dump()
        if changed := differences(trained, named):
            raise UserError(
                f"{run}: trained with other settings than the table would show ({'; '.join(changed[:3])}); give the "
                "ablation another --name to train them again"
            )
        self._as_named.add(unit)


def _leaf(key: str, keys: Mapping[str, Any]) -> str:
    """The last part of a dotted key, or the whole key if two keys have the same last part."""
    leaf = key.rsplit(".", 1)[-1]
    return leaf if sum(other.rsplit(".", 1)[-1] == leaf for other in keys) == 1 else key


# ---------------------------------------------------------------------------------------------- the folder


def _claim_folder(folder: Path, spec: AblationConfig, base: Config, shared: SharedFeatures) -> None:
    """Raise UserError if the folder holds another ablation; a different budget alone does not count as another one."""
    data = shared.of(shared.base, False)
    identity = StageIdentity(
        {
            "ablation": settings_without(spec, "budget", "title"),
            "temporal": settings_without(base.temporal, "features"),
            "encoder_digest": data.encoder_digest,
            "labels_sha256": data.labels_sha256,
            "tracks": data.classes if len(data.tracks) > 1 else ABSENT,
            "other_features": sorted(shared.others.values()) or ABSENT,
        }
    )
    StageFolder(folder.parent, folder.name, base, identity).open()


# ---------------------------------------------------------------------------------------------- results


@contextmanager
def _live_table() -> Iterator[Live | None]:
    """A display of the ranked table that is redrawn after each training; None without a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Live(console=console, auto_refresh=False) as live:
        yield live


def _show(
    live: Live | None,
    trials: Sequence[Trial],
    score: str,
    label: str,
    result: Mapping[str, Any] | None,
    reason: str | None,
) -> None:
    """Redraw the table on a terminal; without one, print one line per training."""
    if live is not None and reason is None:
        live.update(ablation_table(trials, score), refresh=True)
        return
    outcome = reason or (f"{100 * result['val_accuracy']:.2f} %" if result else "no result")
    say(f"{label}: {outcome} ({counted(len(trials), 'training')} done)")


def _write_outcome(folder: Path, plan: _Plan) -> None:
    trials = plan.trials()
    if not trials:
        return
    write_ablation_csv(folder / "ablation.csv", trials)
    figures = _figures(plan.study)
    write_text(folder / ABLATION_PAGE, ablation_page(plan.spec.title or folder.name, trials, plan.score, figures))
    winner = ablation_rows(trials)[0].label
    best = next(trial for trial in trials if trial.label == winner)
    config = unit_config(plan.spec.base, plan.overrides, Unit(tuple(best.changes.items()), best.seed))
    features = folder_of(best.changes, plan.shared.base, plan.base)
    header = f"# The best setting of the ablation {folder.name} on the validation videos: {best.label}.\n"
    header += f"# Its features: train-temporal --features {features}\n"
    write_text(folder / "best.yaml", header + to_yaml(config))
    Console().print(ablation_table(trials, plan.score))
    names = ", ".join(str(folder / name) for name in ("ablation.csv", ABLATION_PAGE, "best.yaml"))
    say(f"written: {names} (for train-temporal --config)")


def _figures(study: optuna.Study) -> list[Any]:
    """Optuna's own plots, those for which the study has enough trials."""
    from optuna import visualization

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < 2:
        return []
    figures = [visualization.plot_optimization_history(study), visualization.plot_slice(study)]
    if len(done[0].params) > 1:
        figures.append(visualization.plot_parallel_coordinate(study))
    if len({trial.value for trial in done}) > 1 and len(done) > 3 and len(done[0].params) > 1:
        figures.append(visualization.plot_param_importances(study))
    return figures
