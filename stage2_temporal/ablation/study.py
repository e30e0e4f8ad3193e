"""The Optuna study of an ablation, which is built at each start from the folders of the trainings and not stored."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial

from configs.ablation import AblationConfig, RangeConfig
from configs.errors import UserError
from configs.load import flatten, read_yaml
from configs.schema import TEMPORAL_FOLDER
from engine.files import read_json_object
from engine.runs import RESULT_FILE

NAMED = "setting"  # the parameter that selects one of the named settings


def corners(spec: AblationConfig, drawn: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Every combination of the values in lists and of the named settings.

    A range contributes its two ends or, with `drawn`, the value that was drawn from it.
    """
    axes: dict[str, Sequence[Any]] = {}
    for key, values in spec.space.items():
        if isinstance(values, list):
            axes[key] = values
        else:
            axes[key] = [values.low, values.high] if drawn is None else [_as_drawn(drawn.get(key), values)]
    if spec.settings:
        axes[NAMED] = list(spec.settings)
    for point in itertools.product(*axes.values()):
        yield dict(zip(axes, point, strict=True))


def _as_drawn(value: Any, values: RangeConfig) -> Any:
    """The value as it was drawn: an integer of a range is stored as, for example, 2.0 if the setting is a float."""
    integers = isinstance(values.low, int) and isinstance(values.high, int)
    return int(value) if integers and isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class TrialFolders:
    """The folders of the trainings below `trials`, from which the study is built.

    `name_of` returns the name of a training's folder. Every method raises UserError for a damaged file in a folder,
    naming the folder to delete.
    """

    trials: Path
    spec: AblationConfig
    name_of: Callable[[Mapping[str, Any], int], str]

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of the training in the folder `name`; None if there is none."""
        path = self.trials / name / TEMPORAL_FOLDER / RESULT_FILE
        if not path.exists():
            return None
        with self._read(name):
            found: dict[str, Any] = read_json_object(path)
            if not isinstance(found.get("val_accuracy"), int | float):
                raise UserError(f"{path}: has no val_accuracy")
            return found

    def score(self, point: Mapping[str, Any]) -> float | None:
        """The mean score of a point over its seeds; None unless all of them are finished."""
        results = [self.result(self.name_of(point, seed)) for seed in self.spec.seeds]
        scores = [result["val_accuracy"] for result in results if result is not None]
        return sum(scores) / len(scores) if len(scores) == len(results) else None

    def points(self) -> list[dict[str, Any]]:
        """All points of the space or, if there are ranges, those that have folders, in the order of their first start.

        A value drawn from a range is read from the settings in the folder. The folder's name, which is a digest of the
        point, is used to check it.
        """
        if not self.spec.has_ranges:
            return list(corners(self.spec))
        found: dict[str, dict[str, Any]] = {}
        files = self.trials.glob("*/temporal/config.yaml")
        for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path)):
            name = path.parent.parent.name
            with self._read(name):
                drawn = flatten(read_yaml(path))
            for point in corners(self.spec, drawn):
                if name in [self.name_of(point, seed) for seed in self.spec.seeds]:
                    found[json.dumps(point, sort_keys=True)] = point
        return list(found.values())

    def strays(self, points: Iterable[Mapping[str, Any]]) -> list[str]:
        """The folders of finished trainings that belong neither to one of `points` nor to the base settings."""
        known = {self.name_of(point, seed) for point in (*points, {}) for seed in self.spec.seeds}
        return sorted({path.parent.parent.name for path in self.trials.glob(f"*/temporal/{RESULT_FILE}")} - known)

    @contextmanager
    def _read(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{error}; delete {self.trials / name} to train it again") from error


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


def size(spec: AblationConfig) -> float:
    """The number of points in the space; infinite if it has a range of fractions."""
    counts = (
        len(one.choices)
        if isinstance(one, CategoricalDistribution)
        else one.high - one.low + 1
        if isinstance(one, IntDistribution)
        else math.inf
        for one in distributions(spec).values()
    )
    return math.prod(counts)


def open_study(folders: TrialFolders, points: Sequence[Mapping[str, Any]]) -> optuna.Study:
    """A study with the scores of those `points` that are finished; the others are queued in it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec = folders.spec
    # The seed depends on the number of points, so that a later process does not draw the same values again.
    sampler = optuna.samplers.TPESampler(seed=spec.seeds[0] + 1000 * len(points))
    study = optuna.create_study(sampler=sampler, direction="maximize")
    for point in points:
        if (score := folders.score(point)) is None:
            study.enqueue_trial(dict(point))
        else:
            study.add_trial(create_trial(params=dict(point), distributions=distributions(spec), value=score))
    return study
