"""The functions that give results, as JSON, so that tests of numbers check the keys of the files, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from engine.records import as_json
from evaluation import comparison, external
from evaluation.metrics import phases, statistics, tools
from evaluation.metrics.results import PhaseResults, ToolResults


def _in_json(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options)
        return (as_json(found[0]), *found[1:]) if isinstance(found, tuple) else as_json(found)

    return call


def evaluate_phases(*arguments: Any, **options: Any) -> dict[str, dict[str, Any]]:
    """As `evaluation.metrics.phases`; checks that the results survive a round trip through a file."""
    found = phases.evaluate_phases(*arguments, **options)
    for result in found.values():
        assert PhaseResults.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False))) == result
    return as_json(found)


def evaluate_tools(*arguments: Any, **options: Any) -> dict[str, Any]:
    """As `evaluation.metrics.tools`; checks that the results survive a round trip through a file."""
    found = tools.evaluate_tools(*arguments, **options)
    assert ToolResults.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    return found.to_json()


def bootstrap_intervals(*arguments: Any, **options: Any) -> dict[str, Any]:
    """The intervals over all phases."""
    return as_json(statistics.bootstrap_intervals(*arguments, **options).overall)


def phase_intervals(*arguments: Any, **options: Any) -> dict[str, Any]:
    """The intervals of each phase."""
    return as_json(statistics.bootstrap_intervals(*arguments, **options).per_phase)


compare_models = _in_json(comparison.compare_models)
paired_interval = _in_json(statistics.paired_interval)
score_folder = _in_json(external.score_folder)
