"""Segments instead of frames: edit score and F1 at an overlap, as defined by ms-tcn's evaluation.

Sources: Lea et al., "Temporal Convolutional Networks for Action Segmentation and Detection" (CVPR 2017); Farha and
Gall, "MS-TCN" (CVPR 2019), whose program pools F1 over the corpus and averages the edit score over videos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics.counts import FloatArray, IntArray, LabelledVideo, stretches

OVERLAPS_PERCENT = (10, 25, 50)

Counts = IntArray | FloatArray


@dataclass(frozen=True)
class SegmentTable:
    """Of V videos: `edit` (V,) in percent, `hits` (V, 3) at each overlap, and how many segments either side has, (V,).

    False positives are predicted - hits, misses truth - hits. `right` and `frames` (V,) count frames, for accuracy.
    """

    edit: FloatArray
    hits: IntArray
    predicted: IntArray
    truth: IntArray
    right: IntArray
    frames: IntArray


def segments(labels: IntArray, background: Sequence[int] = ()) -> tuple[IntArray, IntArray, IntArray]:
    """Runs of equal labels but those of `background`: (S,) label, start and stop of each."""
    start, stop, label = stretches(labels)
    kept = ~np.isin(label, background)
    return label[kept], start[kept], stop[kept]


def edit_distance(first: IntArray, second: IntArray) -> int:
    """Levenshtein distance of two label sequences, a row at a time."""
    column = np.arange(len(second) + 1)
    row = column.copy()
    for i, label in enumerate(first, start=1):
        best = np.r_[i, np.minimum(row[1:] + 1, row[:-1] + (second != label))]
        # Insertions chain along the row: row[j] = min over k <= j of best[k] + (j - k).
        row = np.minimum.accumulate(best - column) + column
    return int(row[-1])


def edit_score(predicted: IntArray, truth: IntArray, background: Sequence[int] = ()) -> float:
    """Percent: 100 (1 - distance of the two segment sequences / length of the longer); NaN where neither has any."""
    first, second = segments(predicted, background)[0], segments(truth, background)[0]
    longer = max(len(first), len(second))
    return 100.0 * (1.0 - edit_distance(first, second) / longer) if longer else math.nan


def overlap_hits(predicted: IntArray, truth: IntArray, background: Sequence[int] = ()) -> tuple[list[int], int, int]:
    """True positives at each overlap, and how many segments either side has, those of `background` left out.

    A predicted segment goes to the true one of its label with the greatest intersection over union; it is a hit when
    that reaches the overlap and no earlier segment has hit the same one.
    """
    label_p, start_p, stop_p = segments(predicted, background)
    label_t, start_t, stop_t = segments(truth, background)
    if not (len(label_p) and len(label_t)):
        return [0] * len(OVERLAPS_PERCENT), len(label_p), len(label_t)
    shared = np.minimum.outer(stop_p, stop_t) - np.maximum.outer(start_p, start_t)  # (P, S)
    spanned = np.maximum.outer(stop_p, stop_t) - np.minimum.outer(start_p, start_t)
    overlap = np.where(np.equal.outer(label_p, label_t), shared / spanned, 0.0)
    target, reached = overlap.argmax(axis=1), overlap.max(axis=1)
    hits = [len(np.unique(target[reached >= percent / 100.0])) for percent in OVERLAPS_PERCENT]
    return hits, len(label_p), len(label_t)


def count_segments(videos: Sequence[LabelledVideo], background: Sequence[int] = ()) -> SegmentTable:
    """The table over `videos`; unlabelled frames are taken out and the gap is closed before segments are cut.

    Segments of `background` (ids) are left out of edit score and F1; `right` and `frames` count all labelled frames.
    """
    rows = []
    for video in videos:
        truth, predicted = video.truth[video.labelled], video.predicted[video.labelled]
        score = edit_score(predicted, truth, background)
        rows.append((score, *overlap_hits(predicted, truth, background), int((truth == predicted).sum()), len(truth)))
    return SegmentTable(*(np.array(column) for column in zip(*rows, strict=True)))


def segment_f1(hits: Counts, predicted: Counts, truth: Counts) -> FloatArray:
    """F1 in percent from counts: `hits` (..., 3), segments predicted and true (...); NaN where there is neither."""
    with np.errstate(invalid="ignore"):
        return np.asarray(200.0 * hits / (predicted + truth)[..., None])
