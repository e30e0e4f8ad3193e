"""Specificity: of the frames that are not of a phase, the fraction that is not predicted as the phase.

SURGSTAGE_PLUGINS=metric_example.py python pipeline.py evaluate --predictions DIR --ground-truth DIR
"""

from evaluation.metrics.counts import FloatArray, PhaseTable
from evaluation.metrics.scores import METRICS, Metric, percent


def specificity(table: PhaseTable) -> FloatArray:
    """100 (true negatives / negatives), (V, C); NaN where every frame of a video is of the phase."""
    frames = table.frames[:, None]  # (V, 1) beside the counts of each phase, which are (V, C)
    return percent(frames - table.union, frames - table.truth)


METRICS.register("specificity", Metric("Specificity", specificity))
