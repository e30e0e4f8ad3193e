"""Calibration: whether frames predicted with a confidence of 80 % are right in 80 % of the cases.

The confidence of a frame is the probability of the phase that is predicted for it. After decoding, this need not be the
most probable phase. The expected calibration error is that of Guo et al., "On Calibration of Modern Neural Networks"
(ICML 2017), and the Brier score the sum over classes of squared differences (Brier, 1950), from 0 to 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics.conventions import CONVENTIONS, Convention, Videos, numbers_by_video, over_videos, pooled_scores
from evaluation.metrics.counts import BoolArray, FloatArray, IntArray
from evaluation.metrics.results import PhaseAbout, PhaseResults
from evaluation.metrics.transitions import changes

BINS = 15
NEAR_S = 10.0  # a frame is near a transition up to this time before or after it


@dataclass(frozen=True)
class Reliability:
    """Bins of equal width of the confidence, of several sets of frames: (..., BINS) each.

    `frames` is the number of frames in each bin, `confidence` the sum of their confidences, and `right` the number of
    those that are predicted rightly.
    """

    frames: FloatArray
    confidence: FloatArray
    right: FloatArray

    @property
    def error(self) -> FloatArray:
        """The expected calibration error (...), from 0 to 1; NaN without frames."""
        with np.errstate(invalid="ignore"):
            return np.asarray(np.abs(self.right - self.confidence).sum(axis=-1) / self.frames.sum(axis=-1))


def reliability(confidence: FloatArray, right: BoolArray) -> Reliability:
    """Sort frames into bins, given their `confidence` (T,), from 0 to 1, and whether they are `right` (T,).

    Bin m of M contains confidences above (m - 1) / M and up to m / M, and the first one also 0.
    """
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    columns = (None, confidence, right.astype(float))
    return Reliability(*(np.bincount(number, weights, BINS).astype(float) for weights in columns))


def brier_scores(scores: FloatArray, truth: IntArray) -> FloatArray:
    """Return the Brier score of each frame, (T,), from 0 to 2: the sum over C phases of (probability - truth)^2.

    `scores` is (T, C), and `truth` (T,) has ids 0..C-1.
    """
    return np.asarray(((scores - np.eye(scores.shape[1])[truth]) ** 2).sum(axis=1))


def near_transitions(truth: IntArray, fps: float) -> BoolArray:
    """Return whether each frame (T,) is near a transition of the truth.

    These are the frames up to 10 s before the last frame of one phase, up to 10 s after the first frame of the next
    one, and those between the two, which have no label.
    """
    near, window = np.zeros(len(truth), bool), int(NEAR_S * fps + 1e-9)
    for first, last, _ in changes(truth):
        near[max(first - 1 - window, 0) : last + window + 1] = True
    return near


# ---------------------------------------------------------------------------------------------- the convention


@dataclass(frozen=True)
class CalibrationTable:
    """The frames of V videos: `bins` of all and of those near a transition, (V, 2, BINS), and sums of their scores.

    `brier` (V,) is the sum of the Brier scores of each video's `frames` (V,).
    """

    bins: Reliability
    brier: FloatArray
    frames: IntArray

    def scores(self, weights: FloatArray) -> dict[str, FloatArray]:
        """Return errors and Brier score in percent of one, (B,) each, with video v counted weights[b, v] times."""
        parts = (np.einsum("bv,vkm->bkm", weights, part) for part in vars(self.bins).values())
        error = 100.0 * Reliability(*parts).error  # (B, 2)
        with np.errstate(invalid="ignore"):
            brier = 100.0 * (weights @ self.brier) / (weights @ self.frames)
        return {"ece": error[:, 0], "ece_near": error[:, 1], "brier": brier}


def calibrate(videos: Videos, fps: float | None) -> CalibrationTable:
    """Count the frames of V `videos` that have a label and a prediction; ValueError if a video has no scores.

    If the rate is not known, there are none near a transition.
    """
    parts, brier, frames = [], [], []
    for video in videos:
        if video.scores is None:
            raise ValueError(f"{video.id}: no scores")
        rows = np.flatnonzero(video.labelled & (video.predicted >= 0))
        scores, truth, predicted = video.scores[rows], video.truth[rows], video.predicted[rows]
        confidence, right = scores[np.arange(len(rows)), predicted], predicted == truth
        near = near_transitions(video.truth, fps)[rows] if fps else np.zeros(len(rows), bool)
        parts += [reliability(confidence, right), reliability(confidence[near], right[near])]
        brier.append(brier_scores(scores, truth).sum())
        frames.append(len(rows))
    columns = zip(*(vars(one).values() for one in parts), strict=True)
    bins = Reliability(*(np.reshape(column, (len(videos), 2, BINS)) for column in columns))
    return CalibrationTable(bins, np.array(brier), np.array(frames))


class CalibrationConvention(Convention[CalibrationTable]):
    """A convention that compares probabilities with labels; frames without a prediction are left out."""

    needs_scores = True

    def count(self, videos: Videos, classes: int, fps: float | None, background: Sequence[int]) -> CalibrationTable:
        """See `Convention.count`."""
        return calibrate(videos, fps)

    def means(self, table: CalibrationTable, weights: FloatArray) -> dict[str, FloatArray]:
        """See `Convention.means`; NAME_pooled is computed on the frames of all videos, NAME averages videos."""
        single = {name: over_videos(values, weights) for name, values in _single(table).items()}
        return single | {f"{name}_pooled": values for name, values in table.scores(weights).items()}

    def results(
        self, table: CalibrationTable, videos: Videos, phases: Sequence[str], about: PhaseAbout
    ) -> PhaseResults:
        """See `Convention.results`."""
        single = _single(table)
        return PhaseResults(
            scores={**pooled_scores(self.means(table, np.ones((1, len(videos)))), single)},
            per_video=numbers_by_video(videos, {**single, "frames": table.frames}),
            about=about,
        )


def _single(table: CalibrationTable) -> dict[str, FloatArray]:
    """Return the scores of each video, (V,) each."""
    return table.scores(np.eye(len(table.frames)))


CONVENTIONS.register(
    "calibration",
    CalibrationConvention(
        title="calibration of the predicted phase's probability",
        absent_phase="not applicable: frames are compared, whatever their phase",
        std="over videos (n - 1)",
        unit="percent (errors from 0 to 100, Brier score from 0 to 200)",
        titles={"ece": "ECE", "ece_near": "ECE near", "brier": "Brier"},
        source=f"expected calibration error of Guo et al. (ICML 2017), {BINS} bins; Brier score summed over phases",
    ),
)
