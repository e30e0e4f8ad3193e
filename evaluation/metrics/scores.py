"""Metrics of one phase in one video: precision, recall, Jaccard and F1, and those that plug-ins register.

A metric is a function that computes percentages from a table of counts. It is registered in `METRICS` under its name in
JSON. Every convention that compares frames computes all registered metrics, so they appear in results, tables,
intervals, comparisons and the report. docs/extending.md shows how to add one from outside.
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
    """A metric: its `title` in tables, and the function `cells` that computes it.

    `cells` returns percentages with the shape of the table's `hits` (videos or bootstrap draws x phases), and NaN or
    infinity where the metric is undefined (0/0). Which cells count in a mean is decided by the convention's rule for
    absent phases.
    """

    title: str
    cells: Callable[[PhaseTable], FloatArray]


# Names that a metric cannot have, since they are other keys of a result in JSON.
RESERVED = {"accuracy", "videos", "frames", "segments", "about", "per_phase", "per_video", "intervals"}
METRICS: Registry[Metric] = Registry("metric", "surgstage.metrics", RESERVED)


def percent(part: Counts, whole: Counts) -> FloatArray:
    """Return 100 * part / whole, limited to 100 (also for x/0), and NaN for 0/0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.minimum(100.0 * part / whole, 100.0))


def precision(table: PhaseTable) -> FloatArray:
    """Return the percentage of frames predicted as a phase that are right."""
    return percent(table.hits, table.predicted)


def recall(table: PhaseTable) -> FloatArray:
    """Return the percentage of a phase's frames in the truth that are right."""
    return percent(table.hits, table.truth)


def jaccard(table: PhaseTable) -> FloatArray:
    """Return the percentage of frames with a phase in truth or prediction that are right."""
    return percent(table.hits, table.union)


def f1(table: PhaseTable) -> FloatArray:
    """Return the harmonic mean of precision and recall, after these are limited to 100; 0 if no frame is right."""
    p, r = np.nan_to_num(precision(table)), np.nan_to_num(recall(table))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(2.0 * p * r / (p + r))


METRICS.register("precision", Metric("Precision", precision))
METRICS.register("recall", Metric("Recall", recall))
METRICS.register("jaccard", Metric("Jaccard", jaccard))
METRICS.register("f1", Metric("F1", f1))


def phase_scores(table: PhaseTable, absent_is_zero: bool) -> dict[str, FloatArray]:
    """Compute all registered metrics, with the shape of the table's `hits`, and NaN for cells that do not count.

    A cell does not count if the phase is absent from the truth. With `absent_is_zero`, it counts as 0 if the phase is
    predicted nevertheless, and a phase that is never predicted has precision 0 instead of 0/0. Raises UserError if a
    metric returns another shape.
    """
    left_out = table.union == 0 if absent_is_zero else table.truth == 0
    scores = {}
    for name in METRICS.names():
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.asarray(METRICS.find(name).cells(table), dtype=np.float64)
        if values.shape != left_out.shape:
            raise UserError(f"metric {name}: returns shape {values.shape} instead of {left_out.shape}; correct it")
        values = np.where(np.isfinite(values), values, 0.0 if absent_is_zero else np.nan)
        scores[name] = np.where(left_out, np.nan, values)
    return scores
