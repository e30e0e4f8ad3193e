"""Scores of one phase in one video: precision, recall, Jaccard and F1, and those that others register.

A metric is a function from a table of counts to percent, registered under the name that it has in JSON. What is
registered in `METRICS` is in every result of a convention of frames, and so in tables, intervals, comparisons and the
report. docs/extending.md adds one from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from configs.errors import UserError
from configs.registry import Registry
from evaluation.metrics.counts import Counts, FloatArray, PhaseTable


@dataclass(frozen=True)
class Metric:
    """`title` heads columns; `cells` gives percent from a table, shaped like its `hits` (videos or draws x phases), NaN
    or infinity if it is undefined (0/0). Which cells count for a mean is the convention's rule for absent phases."""

    title: str
    cells: Callable[[PhaseTable], FloatArray]


# Other keys of a result in JSON, which a metric's name must not repeat.
RESERVED = {"accuracy", "videos", "frames", "segments", "about", "per_phase", "per_video", "intervals"}
METRICS: Registry[Metric] = Registry("metric", "surgstage.metrics", RESERVED)


def metric_title(name: str) -> str:
    """The title of a metric; its name if a result has a metric that is not registered here."""
    known = METRICS.find(name).title if name in METRICS.names() else name.replace("f1@", "F1@")
    return {"accuracy": "Accuracy", "edit": "Edit score"}.get(name, known)


def percent(part: Counts, whole: Counts) -> FloatArray:
    """100 part / whole, cut to 100 (x/0 included); NaN for 0/0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.minimum(100.0 * part / whole, 100.0))


def precision(table: PhaseTable) -> FloatArray:
    """Of the frames predicted as a phase, those that are right."""
    return percent(table.hits, table.predicted)


def recall(table: PhaseTable) -> FloatArray:
    """Of the frames of a phase, those that are right."""
    return percent(table.hits, table.truth)


def jaccard(table: PhaseTable) -> FloatArray:
    """Of the frames that are a phase in truth or prediction, those that are right."""
    return percent(table.hits, table.union)


def f1(table: PhaseTable) -> FloatArray:
    """The harmonic mean of precision and recall, as they are after the cut; 0 if nothing is right."""
    p, r = np.nan_to_num(precision(table)), np.nan_to_num(recall(table))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(2.0 * p * r / (p + r))


METRICS.register("precision", Metric("Precision", precision))
METRICS.register("recall", Metric("Recall", recall))
METRICS.register("jaccard", Metric("Jaccard", jaccard))
METRICS.register("f1", Metric("F1", f1))


def phase_scores(table: PhaseTable, absent_is_zero: bool) -> dict[str, FloatArray]:
    """Every registered metric, shaped like the table's `hits`, NaN where a cell does not count.

    A phase absent from the truth does not count; with `absent_is_zero` it counts 0 if it is predicted (and a phase
    never predicted has precision 0 rather than 0/0). Raises UserError for a metric of another shape.
    """
    left_out = table.union == 0 if absent_is_zero else table.truth == 0
    scores = {}
    for name in METRICS.names():
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.asarray(METRICS.find(name).cells(table), dtype=np.float64)
        if values.shape != left_out.shape:
            raise UserError(f"metric {name}: gives shape {values.shape} where the table of counts has {left_out.shape}")
        values = np.where(np.isfinite(values), values, 0.0 if absent_is_zero else np.nan)
        scores[name] = np.where(left_out, np.nan, values)
    return scores
