"""Area under the ROC curve of a tool's scores.

SURGSTAGE_PLUGINS=tool_metric_example.py python pipeline.py evaluate --name RUN
"""

import math

from evaluation.metrics.counts import FloatArray, IntArray
from evaluation.metrics.tools import TOOL_METRICS, ToolMetric


def area(truth: IntArray, scores: FloatArray) -> float:
    """Percent; NaN where the tool is always or never present. `truth` and `scores` (T,); -1 means no label."""
    present, absent = scores[truth == 1], scores[truth == 0]
    if not (len(present) and len(absent)):
        return math.nan
    difference = present[:, None] - absent  # (P, A)
    return 100 * float(((difference > 0) + 0.5 * (difference == 0)).mean())


TOOL_METRICS.register("auroc", ToolMetric("AUROC", area))
