"""Ablations of stage two: many trainings on one copy of the features, a training a core, resumable at any moment.

A setting (one point of the space, or a named one) is a trial of an Optuna study, kept in a journal beside the runs;
each of its seeds is an ordinary run folder `<ablation>/trials/<setting>-seed<k>`, so a training that is finished is
never done again, and one that was stopped goes on. Several processes, on one machine or many, may work on one ablation.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live

from configs.errors import UserError
from configs.load import load_ablation, load_config, to_yaml
from configs.schema import AblationConfig, Config
from engine.files import make_folder, process_is_dead, process_mark, read_json, sha256_json, write_text
from engine.progress import say
from engine.runs import RESULT_FILE, StageFolder
from engine.stopping import StopRequest
from evaluation.ablation import Trial, ablation_page, ablation_table, write_ablation_csv
from features.store import find_feature_folder
from stage1_cnn.pool import Advance, available_cores, choose_processes, work_through
from stage2_temporal.data import TrainingData, read_training_data
from stage2_temporal.train import SCORE, train_temporal

NAMED = "setting"  # the parameter that chooses among the named settings
BASE = "base"
# Trainings claimed at once, a core: many where settings are known (processes start once), few where they are drawn, so
# that the sampler learns from the ones before.
_CLAIM_KNOWN, _CLAIM_DRAWN = 8, 2
_NOBODY = ""


@dataclass(frozen=True)
class Unit:
    """One training: a setting with a seed. `trial` is the study's number, None for the base settings."""

    trial: int | None
    changes: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def frames(self) -> int:
        """Counts as one for the progress bar."""
        return 1

    @property
    def folder(self) -> str:
        """Name of its run: the same setting always has the same."""
        name = BASE if not self.changes else sha256_json(sorted(self.changes))[:10]
        return f"{name}-seed{self.seed}"


@dataclass
class UnitTask:
    """Trains one unit. Goes to each process once, with the features in shared memory."""

    source: str
    overrides: tuple[str, ...]
    features: Path
    trials: Path
    data: TrainingData
    threads: int

    def __call__(self, unit: Unit, advance: Advance) -> None:
        """Raises UserError for settings that do not fit together."""
        torch.set_num_threads(self.threads)
        config = unit_config(self.source, self.overrides, unit)
        train_temporal(config, self.trials / unit.folder, self.features, _StopWithParent(advance), self.data)
        advance(1)


class _StopWithParent(StopRequest):
    """Asks the parent process, between steps, whether to stop."""

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self._advance = advance

    def __bool__(self) -> bool:
        try:
            self._advance(0)
        except Exception:  # whatever the pool unwinds its jobs with; `raise_if_set` lets it through
            return True
        return False

    def raise_if_set(self) -> None:
        self._advance(0)


def unit_config(source: str, overrides: Sequence[str], unit: Unit) -> Config:
    """The settings of one training."""
    changes = [f"{key}={json.dumps(value)}" for key, value in unit.changes]
    return load_config(source, [*overrides, *changes, f"seed={unit.seed}"])


def read_ablation(source: str, base: str | None = None) -> AblationConfig:
    """An ablation file, or one shipped by name, with another base where one is given."""
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
    """Try everything that an ablation asks for; returns what failed, with reasons.

    `folder` takes the trials, the study's journal and the outcome: `ablation.csv` (a row a training), `ablation.html`
    (the ranked table and Optuna's plots), `best.yaml` (the winner's settings, ready to train). `run` is where features
    are looked for where none are named. Raises UserError for an ablation of another configuration in `folder`, features
    without validation videos, and settings that are wrong from the start; Stopped, with everything kept, when asked to.
    """
    started = time.monotonic()
    base = load_config(spec.base, overrides)
    where = find_feature_folder(features, run, base.extract.store)
    data = read_training_data(where)
    if not data.val:
        raise UserError(f"{where}: no validation videos, so settings cannot be compared; index with another split")
    data.bank.features.share_memory_()
    data.bank.phase.share_memory_()
    _claim_folder(folder, spec, base, data)
    plan = _Plan(spec, base, tuple(overrides), _open_study(folder, spec))
    cores = available_cores() if workers == -1 else workers
    threads = max(1, available_cores() // max(1, cores))
    task = UnitTask(spec.base, tuple(overrides), where, folder / "trials", data, threads)
    failed: list[tuple[str, str]] = []
    try:
        with _live_table(plan, folder) as show:
            for units in plan.rounds(cores, started):
                processes = choose_processes(cores, units) if len(units) > 1 else 1
                for unit, reason in work_through(
                    task, units, processes, "trainings", stop, unit="training", disable=True
                ):
                    label = f"{plan.label(unit.changes)}, seed {unit.seed}"
                    if reason is not None:
                        failed.append((label, reason))
                    plan.ended(unit, _result(folder / "trials" / unit.folder), reason)
                    show(label, reason)
    finally:
        plan.release()
    _write_outcome(folder, plan)
    return failed


# ---------------------------------------------------------------------------------------------- what to try


class _Plan:
    """Which settings there are, and what became of them."""

    def __init__(self, spec: AblationConfig, base: Config, overrides: tuple[str, ...], study: optuna.Study) -> None:
        self.spec, self.base, self.overrides, self.study = spec, base, overrides, study
        self.results: dict[Unit, dict[str, Any]] = {}
        self._left: dict[int, set[int]] = {}  # seeds still to come, of each trial in work
        self._scores: dict[int, dict[int, float]] = {}
        if not spec.has_ranges:
            for point in self._grid():
                study.enqueue_trial(point, skip_if_exists=True)

    def _grid(self) -> Iterator[dict[str, Any]]:
        keys = [*self.spec.space, *([NAMED] if self.spec.settings else [])]
        values: list[Sequence[Any]] = [self.spec.space[key] for key in self.spec.space]  # type: ignore[misc]
        names = [[*self.spec.settings]] if self.spec.settings else []
        for point in itertools.product(*values, *names):
            yield dict(zip(keys, point, strict=True))

    def rounds(self, cores: int, started: float) -> Iterator[list[Unit]]:
        """Trainings to do now, until nothing is left or the budget is spent. The base settings come first."""
        first = [] if self._base_is_in_grid() else [Unit(None, (), seed) for seed in self.spec.seeds]
        seeds = len(self.spec.seeds)
        most = max(1, (_CLAIM_DRAWN if self.spec.has_ranges else _CLAIM_KNOWN) * cores // seeds)
        while True:
            claimed = list(itertools.islice(self._claims(started), most))
            units = first + [unit for trial in claimed for unit in self._units(trial)]
            if not units:
                return
            first = []
            yield units

    def _claims(self, started: float) -> Iterator[FrozenTrial | optuna.Trial]:
        """Trials of dead processes, then waiting ones or, for ranges, new ones as far as the budget goes."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = str(trial.user_attrs.get("owner", _NOBODY))
            if trial.number not in self._left and (owner == _NOBODY or process_is_dead(owner)):
                self._own(trial, process_mark())
                yield trial
        while self._budget_left(started):
            if not self.spec.has_ranges and not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                return
            new = self.study.ask()
            new.set_user_attr("owner", process_mark())
            self._suggest(new)
            yield new

    def _own(self, trial: FrozenTrial, mark: str) -> None:
        self.study._storage.set_trial_user_attr(trial._trial_id, "owner", mark)

    def release(self) -> None:
        """Leave unfinished trials to whoever comes next."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._left.get(trial.number):
                self._own(trial, _NOBODY)

    def _suggest(self, trial: optuna.Trial) -> None:
        for key, values in self.spec.space.items():
            if isinstance(values, list):
                trial.suggest_categorical(key, values)
            elif isinstance(values.low, int) and isinstance(values.high, int):
                trial.suggest_int(key, values.low, values.high, log=values.log)
            else:
                trial.suggest_float(key, values.low, values.high, log=values.log)
        if self.spec.settings:
            trial.suggest_categorical(NAMED, list(self.spec.settings))

    def _budget_left(self, started: float) -> bool:
        budget, seeds = self.spec.budget, len(self.spec.seeds)
        begun = len(self.study.get_trials(deepcopy=False)) - len(
            self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        )
        if budget.trials is not None and (begun + 1) * seeds > budget.trials:
            return False
        return budget.minutes is None or time.monotonic() - started < 60 * budget.minutes

    def _units(self, trial: FrozenTrial | optuna.Trial) -> list[Unit]:
        self._left[trial.number] = set(self.spec.seeds)
        self._scores[trial.number] = {}
        changes = self.changes(trial.params)
        return [Unit(trial.number, changes, seed) for seed in self.spec.seeds]

    def changes(self, point: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        """What a point of the space changes: (key, value) pairs."""
        named = self.spec.settings.get(point.get(NAMED, ""), {}) if self.spec.settings else {}
        return (*((key, value) for key, value in point.items() if key != NAMED), *named.items())

    def label(self, changes: Sequence[tuple[str, Any]]) -> str:
        """A setting in words: its named setting, or the ends of its keys with their values."""
        if not changes:
            return BASE
        names = {name: tuple(what.items()) for name, what in self.spec.settings.items()}
        named = next((name for name, what in names.items() if what == tuple(changes[len(self.spec.space) :])), None)
        parts = [f"{_leaf(key, self.spec.space)}={value}" for key, value in changes[: len(self.spec.space)]]
        return ", ".join([*parts, *([named] if named else [])])

    def _base_is_in_grid(self) -> bool:
        """Whether one of the settings is the base itself, so that it need not be trained twice."""
        if self.spec.has_ranges:
            return False
        return any(self.is_base(self.changes(point)) for point in self._grid())

    def is_base(self, changes: Sequence[tuple[str, Any]]) -> bool:
        """Whether these changes change nothing."""
        tried = unit_config(self.spec.base, self.overrides, Unit(None, tuple(changes), self.base.seed))
        return tried.temporal == self.base.temporal

    def ended(self, unit: Unit, result: dict[str, Any] | None, reason: str | None) -> None:
        """Note a training's outcome; tell the study when it was its setting's last."""
        if result is not None and reason is None:
            self.results[unit] = result
        if unit.trial is None:
            return
        self._left[unit.trial].discard(unit.seed)
        if reason is None and result is not None:
            self._scores[unit.trial][unit.seed] = result["val_accuracy"]
        if self._left[unit.trial]:
            return
        scores = self._scores[unit.trial]
        if len(scores) < len(self.spec.seeds):
            self.study.tell(unit.trial, state=TrialState.FAIL)
        else:
            self.study.tell(unit.trial, sum(scores.values()) / len(scores))

    def trials(self, folder: Path) -> list[Trial]:
        """Every training there is a result of, whoever did it, for tables."""
        points = [trial.params for trial in self.study.get_trials(deepcopy=False) if trial.params]
        settings = dict.fromkeys([(), *(self.changes(point) for point in points)])
        found = []
        for changes in settings:
            is_base = self.is_base(changes)
            for seed in self.spec.seeds:
                unit = Unit(None, changes, seed)
                result = self.results.get(unit) or _result(folder / "trials" / unit.folder)
                if result is not None:
                    found.append(Trial(self.label(changes), dict(changes), seed, is_base, result, unit.folder))
        return found


def _leaf(key: str, keys: Mapping[str, Any]) -> str:
    """The last part of a dotted key, unless two keys share it."""
    leaf = key.rsplit(".", 1)[-1]
    return leaf if sum(other.rsplit(".", 1)[-1] == leaf for other in keys) == 1 else key


def _result(run: Path) -> dict[str, Any] | None:
    path = run / "temporal" / RESULT_FILE
    return read_json(path) if path.exists() else None


# ---------------------------------------------------------------------------------------------- the study


def _claim_folder(folder: Path, spec: AblationConfig, base: Config, data: TrainingData) -> None:
    """Raise UserError where the folder holds another ablation. More budget is no other ablation."""
    identity = {
        "ablation": spec.model_dump(mode="json", exclude={"budget", "title"}),
        "temporal": base.temporal.model_dump(mode="json"),
        "encoder_digest": data.encoder_digest,
        "labels_sha256": data.labels_sha256,
    }
    StageFolder(folder.parent, folder.name, base, identity).open()


def _open_study(folder: Path, spec: AblationConfig) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = JournalFileBackend(str(make_folder(folder) / "study.journal"))
    return optuna.create_study(
        study_name=folder.name,
        storage=JournalStorage(backend),
        sampler=optuna.samplers.TPESampler(seed=spec.seeds[0]),
        direction="maximize",
        load_if_exists=True,
    )


# ---------------------------------------------------------------------------------------------- what comes out


class _live_table:  # noqa: N801 (used as a function)
    """The ranked table, redrawn after each training on a terminal; a line a training in a log."""

    def __init__(self, plan: _Plan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        console = Console(stderr=True)
        self._live: Any = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Callable[[str, str | None], None]:
        (self._live or nullcontext()).__enter__()
        return self._show

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)

    def _show(self, label: str, reason: str | None) -> None:
        trials = self._plan.trials(self._folder)
        if self._live is not None and reason is None:
            self._live.update(ablation_table(trials, SCORE), refresh=True)
            return
        last = next((trial for trial in reversed(trials) if f"{trial.label}, seed {trial.seed}" == label), None)
        say(f"{label}: {reason or (f'{100 * last.score:.2f} %' if last else 'done')} ({len(trials)} trainings done)")


def _write_outcome(folder: Path, plan: _Plan) -> None:
    trials = plan.trials(folder)
    if not trials:
        return
    write_ablation_csv(folder / "ablation.csv", trials)
    figures = _figures(plan.study)
    write_text(folder / "ablation.html", ablation_page(plan.spec.title or folder.name, trials, SCORE, figures))
    best = ranked(trials)[0]
    config = unit_config(plan.spec.base, plan.overrides, Unit(None, tuple(best.changes.items()), best.seed))
    header = f"# The best setting of the ablation {folder.name} on the validation videos: {best.label}.\n"
    write_text(folder / "best.yaml", header + to_yaml(config))
    Console().print(ablation_table(trials, SCORE))
    names = ", ".join(str(folder / name) for name in ("ablation.csv", "ablation.html", "best.yaml"))
    say(f"written: {names} (for train-temporal --config)")


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """One training a setting (its first seed), the setting with the highest mean first."""
    means: dict[str, list[float]] = {}
    for trial in trials:
        means.setdefault(trial.label, []).append(trial.score)
    order = sorted(means, key=lambda label: -sum(means[label]) / len(means[label]))
    return [next(trial for trial in trials if trial.label == label) for label in order]


def _figures(study: optuna.Study) -> list[Any]:
    """Optuna's own plots, those that the study has enough trials for."""
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
