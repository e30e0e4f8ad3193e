"""The few numbers a run is known by, as fractions, for `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def summarise(
    phase_results: Mapping[str, Any] | None, tool_results: Mapping[str, Any] | None
) -> dict[str, float | None]:
    """Fractions from what `evaluate_phases` and `evaluate_tools` return; None where a task was not evaluated.

    `phase_accuracy` is the mean over videos, `phase_f1` the F1 of the convention `phase_mean`, `tool_map` the mean
    average precision pooled over frames.
    """
    strict = (phase_results or {}).get("phase_mean")
    return {
        "phase_accuracy": _fraction(strict["accuracy"]["mean"] if strict else None),
        "phase_f1": _fraction(strict["f1"]["mean"] if strict else None),
        "tool_map": _fraction(tool_results["map_pooled"] if tool_results else None),
    }


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else percent / 100.0
