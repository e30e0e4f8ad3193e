"""Segmental metrics, which compare segments instead of frames: edit score and F1 at an overlap, as in ms-tcn's program.

Sources: Lea et al., "Temporal Convolutional Networks for Action Segmentation and Detection" (CVPR 2017); Farha and
Gall, "MS-TCN" (CVPR 2019), whose program computes F1 on the segments of all videos pooled, and averages the edit score
over videos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics.conventions import CONVENTIONS, Convention, Videos, numbers_by_video, over_videos, pooled_scores
from evaluation.metrics.counts import Counts, FloatArray, IntArray
from evaluation.metrics.results import PhaseAbout, PhaseResults, Score
from features.run_lengths import runs

OVERLAPS_PERCENT = (10, 25, 50)


@dataclass(frozen=True)
class SegmentTable:
    """Segment counts of V videos.

    `edit` (V,) is the edit score in percent, `hits` (V, 3) the hits at each overlap, and `predicted` and `truth` (V,)
    the numbers of segments. False positives are predicted - hits, and misses are truth - hits. `right` and `frames`
    (V,) count frames, for the accuracy.
    """

    edit: FloatArray
    hits: IntArray
    predicted: IntArray
    truth: IntArray
    right: IntArray
    frames: IntArray


def segments(labels: IntArray, background: Sequence[int] = ()) -> tuple[IntArray, IntArray, IntArray]:
    """Return label, start and stop, (S,) each, of the runs of equal labels, without those of `background`."""
    kept = [run for run in runs(labels) if run.value not in background]
    start, stop, label = np.array(kept, dtype=np.int64).reshape(-1, 3).T
    return label, start, stop


def edit_distance(first: IntArray, second: IntArray) -> int:
    """Return the Levenshtein distance of two label sequences, computed row by row."""
    column = np.arange(len(second) + 1)
    row = column.copy()
    for i, label in enumerate(first, start=1):
        best = np.r_[i, np.minimum(row[1:] + 1, row[:-1] + (second != label))]
        # Several insertions in a row: row[j] = min over k <= j of best[k] + (j - k).
        row = np.minimum.accumulate(best - column) + column
    return int(row[-1])


def edit_score(predicted: IntArray, truth: IntArray, background: Sequence[int] = ()) -> float:
    """Return 100 (1 - d / n), where d is the distance of the two segment sequences, and n the length of the longer one.

    The result is NaN if there are no segments.
    """
    first, second = segments(predicted, background)[0], segments(truth, background)[0]
    longer = max(len(first), len(second))
    return 100.0 * (1.0 - edit_distance(first, second) / longer) if longer else math.nan


def overlap_hits(predicted: IntArray, truth: IntArray, background: Sequence[int] = ()) -> tuple[list[int], int, int]:
    """Return the hits at each overlap, and the numbers of predicted and true segments, without those of `background`.

    A predicted segment is assigned to the true segment of the same label with which its intersection over union is
    largest. It is a hit if that value reaches the overlap and no earlier predicted segment has hit the same true
    segment.
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


def segment_f1(hits: Counts, predicted: Counts, truth: Counts) -> FloatArray:
    """Return F1 in percent from `hits` (..., 3) and the numbers of predicted and true segments (...), or NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray(200.0 * hits / (predicted + truth)[..., None])


class SegmentConvention(Convention[SegmentTable]):
    """A convention that compares segments, which are runs of equal phases.

    Frames without a label are removed first, so that the frames around them become neighbours. Edit score and F1 ignore
    segments of the background. `right` and `frames` count all labelled frames.
    """

    has_background = True

    def count(self, videos: Videos, classes: int, fps: float | None, background: Sequence[int]) -> SegmentTable:
        """See `Convention.count`."""
        rows = []
        for video in videos:
            truth, predicted = video.truth[video.labelled], video.predicted[video.labelled]
            edit, hits = edit_score(predicted, truth, background), overlap_hits(predicted, truth, background)
            rows.append((edit, *hits, int((truth == predicted).sum()), len(truth)))
        return SegmentTable(*(np.array(column) for column in zip(*rows, strict=True)))

    def means(self, table: SegmentTable, weights: FloatArray) -> dict[str, FloatArray]:
        """See `Convention.means`; `f1@k` is a mean over videos, `f1@k_pooled` is computed on all segments pooled."""
        pooled = segment_f1(weights @ table.hits, weights @ table.predicted, weights @ table.truth)
        single = over_videos(segment_f1(table.hits, table.predicted, table.truth), weights)
        means = {
            "accuracy": 100.0 * (weights @ table.right) / (weights @ table.frames),
            "edit": over_videos(table.edit, weights),
        }
        for k, percent in enumerate(OVERLAPS_PERCENT):
            means |= {f"f1@{percent}": single[:, k], f"f1@{percent}_pooled": pooled[:, k]}
        return means

    def results(self, table: SegmentTable, videos: Videos, phases: Sequence[str], about: PhaseAbout) -> PhaseResults:
        """See `Convention.results`."""
        means = self.means(table, np.ones((1, len(videos))))
        f1 = segment_f1(table.hits, table.predicted, table.truth).T  # (3, V)
        single = {f"f1@{percent}": f1[k] for k, percent in enumerate(OVERLAPS_PERCENT)}
        spread = {"accuracy": np.empty(0), "edit": table.edit}
        scores: dict[str, Score] = {name: Score.of(means[name][0], values) for name, values in spread.items()}
        scores |= pooled_scores(means, single)
        counts = {"segments_truth": table.truth, "segments_predicted": table.predicted}
        per_video = numbers_by_video(videos, {"edit": table.edit, **single, **counts})
        return PhaseResults(scores=scores, per_video=per_video, about=about)


CONVENTIONS.register(
    "segmental",
    SegmentConvention(
        title="segments: edit score and F1 at an overlap",
        absent_phase="not applicable: segments are compared, whatever their phase",
        std="over videos (n - 1)",
        titles={"edit": "Edit score", **{f"f1@{percent}": f"F1@{percent}" for percent in OVERLAPS_PERCENT}},
        source="ms-tcn's evaluation (accuracy and F1 pooled, edit a mean over videos), "
        "the mean of F1 over videos beside",
    ),
)
