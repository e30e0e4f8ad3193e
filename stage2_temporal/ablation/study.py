"""The Optuna study of an ablation, in a journal file; rebuilt from the trainings' folders if that is damaged."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from configs.errors import UserError
from configs.load import flatten, read_yaml
from configs.schema import AblationConfig
from engine.files import as_user_error, make_folder, read_json_object
from engine.progress import say
from engine.runs import RESULT_FILE

NAMED = "setting"  # the parameter that selects one of the named settings


def corners(spec: AblationConfig, drawn: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Every combination of the lists and named settings; a range has its two ends, or the value in `drawn`."""
    axes: dict[str, Sequence[Any]] = {}
    for key, values in spec.space.items():
        ends = values if isinstance(values, list) else [values.low, values.high]
        axes[key] = ends if isinstance(values, list) or drawn is None else [drawn.get(key)]
    if spec.settings:
        axes[NAMED] = list(spec.settings)
    for point in itertools.product(*axes.values()):
        yield dict(zip(axes, point, strict=True))


@dataclass(frozen=True)
class TrialFolders:
    """The folders of trainings below `trials`, which record what was tried; `name_of` gives a training's folder."""

    trials: Path
    spec: AblationConfig
    name_of: Callable[[Mapping[str, Any], int], str]

    def scores(self, point: Mapping[str, Any]) -> dict[int, float]:
        """Scores of the finished seeds of a point."""
        found = {}
        for seed in self.spec.seeds:
            path = self.trials / self.name_of(point, seed) / "temporal" / RESULT_FILE
            if path.exists() and isinstance(score := read_json_object(path).get("val_accuracy"), int | float):
                found[seed] = score
        return found

    def finished_but(self, points: Iterable[Mapping[str, Any]]) -> bool:
        """Whether there are finished trainings of other points of the space than these."""
        known = {self.name_of(point, seed) for point in points for seed in self.spec.seeds}
        unknown = {path.parent.parent.name for path in self.trials.glob(f"*/temporal/{RESULT_FILE}")} - known
        return bool(unknown) and not {self.name_of(p, s) for p in self.points() for s in self.spec.seeds} <= known

    def points(self) -> list[dict[str, Any]]:
        """The points that have folders.

        A value drawn from a range is read from the folder's settings and verified by the folder's name, a digest of the
        point.
        """
        if not self.spec.has_ranges:
            known = {path.name for path in self.trials.glob("*")}
            return [p for p in corners(self.spec) if any(self.name_of(p, seed) in known for seed in self.spec.seeds)]
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.trials.glob("*/temporal/config.yaml"), key=lambda path: (path.stat().st_mtime, path)):
            run = path.parent.parent.name
            with suppress(UserError):  # a damaged settings file is skipped
                drawn = flatten(read_yaml(path))
                of_run = (p for p in corners(self.spec, drawn) if run in [self.name_of(p, s) for s in self.spec.seeds])
                found |= {key_of(point): point for point in of_run}
        return list(found.values())


def distributions(spec: AblationConfig) -> dict[str, BaseDistribution]:
    """The distribution of each key of the space and of the named settings."""
    found: dict[str, BaseDistribution] = {}
    for key, values in spec.space.items():
        if isinstance(values, list):
            found[key] = CategoricalDistribution(values)
        elif isinstance(values.low, int) and isinstance(values.high, int):
            found[key] = IntDistribution(values.low, values.high, log=values.log)
        else:
            found[key] = FloatDistribution(values.low, values.high, log=values.log)
    return found | ({NAMED: CategoricalDistribution(list(spec.settings))} if spec.settings else {})


def open_study(folder: Path, spec: AblationConfig, folders: TrialFolders) -> optuna.Study:
    """The study of the ablation in `folder`; only one process may have it open.

    A journal that is damaged or disagrees with the trainings' folders is renamed to `study.journal.damaged`, which is
    reported in one line, and replaced by a new one made from the folders. Raises UserError if it cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = make_folder(folder) / "study.journal"
    with suppress(OSError):
        os.unlink(f"{journal}.lock")  # left by a killed process; Optuna would wait for half a minute
    study = _load(journal, folder.name)
    if study is None or not _agrees(study, folders):
        old = [p for p in _points_of(study) if p.keys() == distributions(spec).keys()] if study is not None else []
        points = {key_of(point): point for point in (*folders.points(), *old)}
        aside = next(p for n in itertools.count() if not (p := folder / f"{journal.name}.damaged{n or ''}").exists())
        journal.rename(aside)
        study = _load(journal, folder.name)
        assert study is not None
        done = sum(_tell(study, folders, point) for point in points.values())
        made = f"kept as {aside.name} and made again from the {done} finished trainings there"
        say(f"{journal}: damaged, or at odds with trials/; {made}")
    # A later process must not repeat the draws of an earlier one.
    study.sampler = optuna.samplers.TPESampler(seed=spec.seeds[0] + 1000 * len(study.get_trials(deepcopy=False)))
    return study


def _load(journal: Path, name: str) -> optuna.Study | None:
    """The study in a journal, or a new one if there is no file; None for a damaged journal."""
    try:
        # Optuna ignores a truncated last line and then appends to it.
        if journal.exists() and not journal.is_file():
            return None
        content = journal.read_bytes() if journal.exists() else b""
        if not content.endswith(b"\n") and content:
            return None
        if not all(isinstance(json.loads(line), dict) for line in content.splitlines()):
            return None
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
        study.get_trials(deepcopy=False)
    except OSError as error:
        raise as_user_error(error, journal) from error
    except Exception:  # whatever Optuna raises while it replays damaged records
        return None
    return study


def _agrees(study: optuna.Study, folders: TrialFolders) -> bool:
    """Whether every finished trial has its trainings with their scores, and every finished training is known."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.params.keys() != distributions(folders.spec).keys():
            return False
        scores = folders.scores(trial.params)
        if len(scores) < len(folders.spec.seeds) or not math.isclose(_mean(scores), trial.values[0], rel_tol=1e-9):
            return False
    return not folders.finished_but([*_points_of(study), {}])  # {}: the base settings


def _points_of(study: optuna.Study) -> list[dict[str, Any]]:
    """Points of the space that a study has drawn or that are queued."""
    return [point_of(trial) for trial in study.get_trials(deepcopy=False)]


def point_of(trial: FrozenTrial) -> dict[str, Any]:
    """The point of a trial; of a queued one, what `enqueue_trial` stored (no public method reads it)."""
    return trial.params or trial.system_attrs.get("fixed_params", {})


def _tell(study: optuna.Study, folders: TrialFolders, point: Mapping[str, Any]) -> int:
    """Add a finished point to a new study, or enqueue an unfinished one; returns the number of finished trainings."""
    scores, drawn_from = folders.scores(point), distributions(folders.spec)
    if len(scores) == len(folders.spec.seeds):
        study.add_trial(create_trial(params=dict(point), distributions=drawn_from, value=_mean(scores)))
    else:
        study.enqueue_trial(dict(point))
    return len(scores)


def _mean(scores: Mapping[int, float]) -> float:
    return sum(scores.values()) / len(scores)


def key_of(point: Mapping[str, Any]) -> str:
    """A point of the space as text, independent of the order of its keys."""
    return json.dumps(point, sort_keys=True)
