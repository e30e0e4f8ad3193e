"""Metrics of tool presence: average precision per tool (on pooled frames, and per video), and scores at a threshold.

Papers call both averages mAP, so both are always computed. docs/evaluation.md has the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.registry import Registry
from evaluation.metrics.conventions import mean_known
from evaluation.metrics.counts import FloatArray, IntArray
from evaluation.metrics.results import (
    OneTool,
    PooledScore,
    Score,
    ThresholdScores,
    ToolAbout,
    ToolMetricResults,
    ToolResults,
    ToolVideo,
    json_number,
)

DEFAULT_THRESHOLD = 0.5

LabelsAndScores = tuple[IntArray, FloatArray]  # (T, K) each
Measure = Callable[[IntArray, FloatArray], float]


@dataclass(frozen=True)
class ToolMetric:
    """A metric of one tool, computed for each video and for the frames of all videos pooled.

    `title` is used in column headers. `measure` returns percent from presence (T,), which is 1, 0 or -1 for no label,
    and probabilities or logits (T,), or NaN if it is undefined; such values are left out of means.
    """

    title: str
    measure: Measure


# Metrics that are computed in addition to average precision.
TOOL_METRICS: Registry[ToolMetric] = Registry("tool metric", "surgstage.tool_metrics", reserved={"ap", "map"})


def tool_metric_title(name: str) -> str:
    """Return the title of a tool metric, or its name if it is not registered (results may come from elsewhere)."""
    return TOOL_METRICS.find(name).title if name in TOOL_METRICS.names() else name


def evaluate_tools(
    truth: Mapping[str, NDArray[Any]],
    scores: Mapping[str, NDArray[Any]],
    tools: Sequence[str],
    thresholds: Mapping[str, float] | None = None,
    *,
    split: str | None = None,
    fps: float | None = None,
) -> ToolResults:
    """Score tool presence, in percent.

    `truth` maps video ids to presence (T, K): 1, 0, or -1 for no label, which is not counted. `scores` maps them to
    probabilities or logits (T, K). If `thresholds` (one per tool) are given, precision, recall and F1 on pooled frames
    are computed too. Choose thresholds on validation videos (`choose_thresholds`), never on the videos scored here.

    A tool that never appears has no average precision (None) and is left out of the means. Raises UserError naming the
    video if shapes differ, if scores are not finite, or if labels are not -1, 0 or 1. Raises UserError if no video has
    labels.
    """
    videos = _checked(truth, scores, len(tools))
    labels, values = _concatenated(videos)
    pooled, single = _each_tool(average_precision, videos)  # (K,), (V, K)
    over_videos = mean_known(single, axis=0)
    limits = [thresholds[tool] for tool in tools] if thresholds else []
    at_threshold = [_at_threshold(labels[:, k], values[:, k], limits[k]) for k in range(len(limits))]
    return ToolResults(
        map_pooled=json_number(float(mean_known(pooled, axis=0))),
        map_video=json_number(float(mean_known(over_videos, axis=0))),
        per_tool={
            tool: OneTool(
                ap_pooled=json_number(pooled[k]),
                ap_video=Score.of(over_videos[k], single[:, k]),
                videos=int(np.isfinite(single[:, k]).sum()),
                present=int((labels[:, k] == 1).sum()),
                frames=int((labels[:, k] >= 0).sum()),
                threshold=limits[k] if limits else None,
                at_threshold=_threshold_scores(at_threshold[k]) if at_threshold else None,
            )
            for k, tool in enumerate(tools)
        },
        per_video={
            video: ToolVideo(
                json_number(float(mean_known(single[v], axis=0))),
                {tool: json_number(single[v, k]) for k, tool in enumerate(tools)},
            )
            for v, video in enumerate(videos)
        },
        at_threshold=_threshold_scores(mean_known(np.array(at_threshold), axis=0)) if at_threshold else None,
        metrics={name: _registered(name, videos, tools) for name in TOOL_METRICS.names()} or None,
        about=ToolAbout(
            split=split, fps=fps, videos=len(videos), videos_without_labels=sorted(set(truth) - set(videos))
        ),
    )


def pooled_map(
    truth: Mapping[str, NDArray[np.int8]], logits: Mapping[str, NDArray[np.float32] | None], tools: Sequence[str]
) -> float | None:
    """Return the tool mAP, as a fraction, on the pooled frames of all videos with tool labels.

    Returns None if there are no labels or logits, or if no tool ever appears.
    """
    labelled = {name: labels for name, labels in truth.items() if (labels >= 0).any()}
    scores = {name: one for name in labelled if (one := logits[name]) is not None}
    percent = evaluate_tools(labelled, scores, tools).map_pooled if scores else None
    return None if percent is None else percent / 100


def sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the logistic function without overflow, also for large logits of either sign."""
    value: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))
    return value


def average_precision(truth: IntArray, scores: FloatArray) -> float:
    """Return the average precision, in percent, of one tool on its labelled frames (T,); NaN if it never appears."""
    from sklearn.metrics import average_precision_score

    labelled = truth >= 0
    if not (truth == 1).any():
        return math.nan
    return float(100.0 * average_precision_score(truth[labelled], scores[labelled]))


def choose_thresholds(
    truth: Mapping[str, NDArray[Any]], scores: Mapping[str, NDArray[Any]], tools: Sequence[str]
) -> dict[str, float]:
    """Return the threshold of each tool with the best F1 on pooled frames (the highest threshold on a tie).

    Pass truth and scores of the validation videos, as for `evaluate_tools`. A tool that never appears gets 0.5.
    """
    from sklearn.metrics import precision_recall_curve

    labels, values = _concatenated(_checked(truth, scores, len(tools)))
    chosen = {}
    for k, tool in enumerate(tools):
        labelled = labels[:, k] >= 0
        if not (labels[:, k] == 1).any():
            chosen[tool] = DEFAULT_THRESHOLD
            continue
        precision, recall, thresholds = precision_recall_curve(labels[labelled, k], values[labelled, k])
        f1 = 2.0 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
        f1 = f1[:-1]  # the curve's last point (precision 1, recall 0) does not belong to a threshold
        chosen[tool] = float(thresholds[np.flatnonzero(f1 == f1.max())[-1]])
    return chosen


def _each_tool(measure: Measure, videos: Mapping[str, LabelsAndScores]) -> tuple[FloatArray, FloatArray]:
    """Return a metric of each tool over the frames of all videos pooled, (K,), and in each video, (V, K)."""
    pairs = [_concatenated(videos), *videos.values()]
    rows = np.array([[measure(labels[:, k], values[:, k]) for k in range(labels.shape[1])] for labels, values in pairs])
    return rows[0], rows[1:]


def _registered(name: str, videos: Mapping[str, LabelsAndScores], tools: Sequence[str]) -> ToolMetricResults:
    """Return the results of a registered metric."""
    pooled, single = _each_tool(TOOL_METRICS.find(name).measure, videos)
    over_videos = mean_known(single, axis=0)
    scores = {tool: Score.of(over_videos[k], single[:, k]) for k, tool in enumerate(tools)}
    return ToolMetricResults(
        pooled=json_number(float(mean_known(pooled, axis=0))),
        video=json_number(float(mean_known(over_videos, axis=0))),
        per_tool={
            tool: PooledScore(score.mean, score.std, json_number(pooled[k]))
            for k, (tool, score) in enumerate(scores.items())
        },
    )


def _at_threshold(labels: IntArray, values: FloatArray, limit: float) -> FloatArray:
    """Return precision, recall and F1 of one tool in percent, (3,); NaN if it never appears."""
    labelled = labels >= 0
    present, predicted = labels[labelled] == 1, values[labelled] >= limit
    hits, found, actual = (float(mask.sum()) for mask in (present & predicted, predicted, present))
    with np.errstate(invalid="ignore", divide="ignore"):
        row = 100.0 * np.divide([hits, hits, 2 * hits], [found, actual, found + actual])
    return row if actual else np.full(3, math.nan)


def _threshold_scores(values: FloatArray) -> ThresholdScores:
    return ThresholdScores(*map(json_number, values))


def _concatenated(videos: Mapping[str, LabelsAndScores]) -> LabelsAndScores:
    """Concatenate the frames of all videos."""
    return (
        np.concatenate([labels for labels, _ in videos.values()]),
        np.concatenate([values for _, values in videos.values()]),
    )


def _checked(
    truth: Mapping[str, NDArray[Any]], scores: Mapping[str, NDArray[Any]], classes: int
) -> dict[str, LabelsAndScores]:
    """Check labels and scores, and return the videos that have any label, in the order of their ids."""
    for ids, other, what in ((truth, scores, "tool scores"), (scores, truth, "tool labels")):
        if missing := sorted(set(ids) - set(other)):
            many = f" ({len(missing)} such videos)" if len(missing) > 1 else ""
            raise UserError(f"{missing[0]}: has no {what}{many}; add them, or leave the video out")
    videos: dict[str, LabelsAndScores] = {}
    for video in sorted(truth):
        labels, values = np.asarray(truth[video]), np.asarray(scores[video], dtype=np.float64)
        if labels.shape != values.shape or labels.ndim != 2 or labels.shape[1] != classes:
            raise UserError(
                f"{video}: tool labels {labels.shape} and scores {values.shape} must both be (frames, {classes})"
            )
        if not np.isin(labels, (-1, 0, 1)).all():
            raise UserError(f"{video}: tool labels must be 1, 0 or -1 (no label)")
        if not np.isfinite(values[labels >= 0]).all():
            raise UserError(f"{video}: tool scores contain NaN or infinity; the model that wrote them has diverged")
        if (labels >= 0).any():
            videos[video] = (labels.astype(np.int8), values)
    if not videos:
        raise UserError("no video has tool labels, so there is nothing to evaluate; give videos with annotations")
    return videos


def logit(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the inverse of `sigmoid`, limited to +-16.6, the largest that a float32 probability can represent."""
    half_step = 2.0**-24
    inner = np.clip(probabilities.astype(np.float64), half_step, 1 - half_step)
    value: NDArray[np.float64] = np.log(inner) - np.log1p(-inner)
    return value
