"""The Optuna study of an ablation, in a journal file; made again from the trainings' folders where that is damaged."""

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
from optuna.trial import TrialState, create_trial

from configs.errors import UserError
from configs.load import flatten, read_yaml
from configs.schema import AblationConfig
from engine.files import as_user_error, make_folder, read_json_object
from engine.progress import say
from engine.runs import RESULT_FILE

NAMED = "setting"  # the parameter that chooses among the named settings


def corners(spec: AblationConfig, drawn: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Every combination of the lists and named settings; a range stands with its two ends, or with what was `drawn`."""
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
    """What the trainings' own folders, below `trials`, say of what was tried; `name_of` gives a training's folder."""

    trials: Path
    spec: AblationConfig
    name_of: Callable[[Mapping[str, Any], int], str]

    def scores(self, point: Mapping[str, Any]) -> dict[int, float]:
        """The score of each seed of a point that is finished."""
        found = {}
        for seed in self.spec.seeds:
            path = self.trials / self.name_of(point, seed) / "temporal" / RESULT_FILE
            if path.exists() and isinstance(score := read_json_object(path).get("val_accuracy"), int | float):
                found[seed] = score
        return found

    def finished_but(self, points: Iterable[Mapping[str, Any]]) -> bool:
        """Whether there are finished trainings of points of the space besides these."""
        known = {self.name_of(point, seed) for point in points for seed in self.spec.seeds}
        strange = {path.parent.parent.name for path in self.trials.glob(f"*/temporal/{RESULT_FILE}")} - known
        return bool(strange) and not {self.name_of(p, s) for p in self.points() for s in self.spec.seeds} <= known

    def points(self) -> list[dict[str, Any]]:
        """The points that have folders.

        A folder's settings tell what a range gave; its name, which is a digest of the point, proves it.
        """
        if not self.spec.has_ranges:
            known = {path.name for path in self.trials.glob("*")}
            return [p for p in corners(self.spec) if any(self.name_of(p, seed) in known for seed in self.spec.seeds)]
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.trials.glob("*/temporal/config.yaml"), key=lambda path: (path.stat().st_mtime, path)):
            run = path.parent.parent.name
            with suppress(UserError):  # settings that cannot be read tell nothing
                drawn = flatten(read_yaml(path))
                of_run = (p for p in corners(self.spec, drawn) if run in [self.name_of(p, s) for s in self.spec.seeds])
                found |= {key_of(point): point for point in of_run}
        return list(found.values())


def distributions(spec: AblationConfig) -> dict[str, BaseDistribution]:
    """What Optuna draws each key of the space from, and the named setting."""
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
    """The study of the ablation in `folder`, which this process alone works on.

    A journal that cannot be read, or that disagrees with the trainings' folders, is kept as `study.journal.damaged`,
    one line says so, and a new one gets what the folders hold. Raises UserError where it cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = make_folder(folder) / "study.journal"
    with suppress(OSError):
        os.unlink(f"{journal}.lock")  # a killed process left it; waiting for it to be abandoned takes half a minute
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
    # Another process must not draw what the one before it has drawn.
    study.sampler = optuna.samplers.TPESampler(seed=spec.seeds[0] + 1000 * len(study.get_trials(deepcopy=False)))
    return study


def _load(journal: Path, name: str) -> optuna.Study | None:
    """The study in a journal, a new one where there is no file; None for a journal that is damaged."""
    try:
        # Optuna overlooks a last line that was cut off, and then writes on behind it.
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
    except Exception:  # whatever Optuna stumbles over while it replays the records
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
    """Points of the space that a study has drawn or is to ask for."""
    trials = study.get_trials(deepcopy=False)
    return [trial.params or trial.system_attrs.get("fixed_params", {}) for trial in trials]


def _tell(study: optuna.Study, folders: TrialFolders, point: Mapping[str, Any]) -> int:
    """Give a new study a point that is finished, or let it ask for one that is not; returns the trainings done."""
    scores, drawn_from = folders.scores(point), distributions(folders.spec)
    if len(scores) == len(folders.spec.seeds):
        study.add_trial(create_trial(params=dict(point), distributions=drawn_from, value=_mean(scores)))
    else:
        study.enqueue_trial(dict(point))
    return len(scores)


def _mean(scores: Mapping[int, float]) -> float:
    return sum(scores.values()) / len(scores)


def key_of(point: Mapping[str, Any]) -> str:
    """A point of the space as text, whatever the order of its keys."""
    return json.dumps(point, sort_keys=True)
