"""Fit the decoding of a label track: the graph on training labels, the parameters on validation predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.counts import FloatArray, IntArray
from evaluation.metrics.transitions import false_transitions_per_hour
from stage2_temporal.decoding.calibration import LIMITS, fit_temperature, log_probabilities
from stage2_temporal.decoding.fitted import TrackDecoding, ValidationScores
from stage2_temporal.decoding.graph import learn_graph
from stage2_temporal.decoding.inference import Chains, Viterbi, filtered, smoothed

KAPPAS = (0.05, 0.1, 0.2, 0.5)
MIN_DURATIONS_S = (0.0, 5.0, 15.0, 30.0)
# Without validation videos. A posterior sums up evidence and so is too certain; docs/results.md has the temperatures
# that were fitted on five operations.
USUAL_KAPPA, USUAL_MIN_DURATION_S, USUAL_FILTER_TEMPERATURE, USUAL_SMOOTHER_TEMPERATURE = 0.1, 5.0, 2.0, 3.0
POSTERIOR_LIMITS = (0.5, 50.0)
# One validation video may be far easier or harder than others: it makes no probability more certain, nor much less.
LIMITS_OF_ONE, POSTERIOR_LIMITS_OF_ONE = (1.0, 2.0), (1.0, 4.0)
TOLERANCE = 0.005  # settings with at most this much less accuracy than the best count as equally accurate


@dataclass(frozen=True)
class Validation:
    """The validation videos of one track at `fps`: log-probabilities (T, V, C) and labels (T, V).

    Videos are padded at their ends; labels are -1 for padding and for frames that do not count.
    """

    log_p: FloatArray
    labels: IntArray
    frames: Sequence[int]
    fps: float

    @classmethod
    def of(
        cls, probabilities: Sequence[NDArray[np.floating]], labels: Sequence[NDArray[np.integer]], fps: float
    ) -> Validation:
        """Every frame, or at a higher rate than 1 fps one frame per second: the parameters are per second."""
        step = max(1, round(fps))
        kept = [(p[::step], one[::step]) for p, one in zip(probabilities, labels, strict=True) if (one >= 0).any()]
        longest, classes = max((len(one) for _, one in kept), default=0), probabilities[0].shape[1]
        log_p, padded = np.zeros((longest, len(kept), classes)), np.full((longest, len(kept)), -1)
        for at, (p, one) in enumerate(kept):
            log_p[: len(p), at], padded[: len(one), at] = log_probabilities(p), one
        return cls(log_p, padded, [len(one) for _, one in kept], fps / step)

    def scores(self, predicted: IntArray) -> ValidationScores:
        """The results of predictions (T, V)."""
        known = self.labels >= 0
        accuracy = ((predicted == self.labels) & known).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        false = false_transitions_per_hour(list(self.labels.T), list(predicted.T), self.fps)
        return ValidationScores(accuracy=float(100 * accuracy.mean()), false_transitions_per_h=false)


def fit_track(
    classes: Sequence[str],
    train: Sequence[NDArray[np.integer]],
    probabilities: Sequence[NDArray[np.floating]],
    labels: Sequence[NDArray[np.integer]],
    fps: float,
) -> TrackDecoding:
    """The decoding of a track with `classes`.

    `train` are the labels (T,) of the training videos, `probabilities` (T, C) and `labels` (T,) those of the validation
    videos. Without labels in these, the head's temperature is 1, and the other parameters have their usual values.
    """
    found = TrackDecoding(
        classes=tuple(classes),
        filter_kappa=USUAL_KAPPA,
        viterbi_kappa=USUAL_KAPPA,
        min_duration_s=USUAL_MIN_DURATION_S,
        filter_temperature=USUAL_FILTER_TEMPERATURE,
        smoother_temperature=USUAL_SMOOTHER_TEMPERATURE,
        graph=learn_graph(train, len(classes), fps),
    )
    if not any((one >= 0).any() for one in labels):
        return found
    videos = Validation.of(probabilities, labels, fps)
    known = videos.labels >= 0
    if not known.any():
        return found
    limits = LIMITS if len(videos.frames) > 1 else LIMITS_OF_ONE
    found = replace(
        found,
        temperature=fit_temperature(videos.log_p[known], videos.labels[known], limits),
        undecoded=videos.scores(videos.log_p.argmax(axis=2)),
    )
    return _with_viterbi(_with_filter(found, videos), videos)


def _best(tried: Sequence[tuple[ValidationScores, TrackDecoding]]) -> TrackDecoding:
    """Of the settings within `TOLERANCE` of the best accuracy, that with the fewest false transitions per hour."""
    least = max(scores.accuracy for scores, _ in tried) - 100 * TOLERANCE
    good = [one for one in tried if one[0].accuracy >= least]
    return min(good, key=lambda one: (one[0].false_transitions_per_h, -one[0].accuracy))[1]


def _with_filter(found: TrackDecoding, videos: Validation) -> TrackDecoding:
    """The decoding with the best weight of the filter, and the temperatures of the posteriors."""
    posteriors = {
        kappa: filtered(found.graph, videos.fps, found.emissions(videos.log_p, videos.fps, kappa)) for kappa in KAPPAS
    }
    tried = []
    for kappa, values in posteriors.items():
        scores = videos.scores(values.argmax(axis=2))
        tried.append((scores, replace(found, filter_kappa=kappa, filter=scores)))
    found = _best(tried)
    past = posteriors[found.filter_kappa]
    emissions, smooth = found.emissions(videos.log_p, videos.fps, found.filter_kappa), np.empty_like(past)
    for at, frames in enumerate(videos.frames):  # without padding, which would count as later frames
        one = slice(0, frames), slice(at, at + 1)
        smooth[one] = smoothed(found.graph, videos.fps, emissions[one], past[one])
    known = videos.labels >= 0
    limits = POSTERIOR_LIMITS if len(videos.frames) > 1 else POSTERIOR_LIMITS_OF_ONE
    of_filter, of_smoother = (
        fit_temperature(log_probabilities(values[known]), videos.labels[known], limits) for values in (past, smooth)
    )
    return replace(found, filter_temperature=of_filter, smoother_temperature=of_smoother)


def _with_viterbi(found: TrackDecoding, videos: Validation) -> TrackDecoding:
    """The decoding with the best weight and minimum duration of the causal decoder without a lag."""
    frames, count, classes = videos.log_p.shape
    emissions = np.stack([found.emissions(videos.log_p, videos.fps, kappa) for kappa in KAPPAS], axis=1)  # (T, K, V, C)
    tried = []
    for minimum in MIN_DURATIONS_S:
        viterbi = Viterbi(Chains.of(found.graph, videos.fps, minimum), 0, len(KAPPAS) * count)
        steps = [viterbi.step(one.reshape(-1, classes)) for one in emissions]
        labels = np.array(steps).reshape(frames, len(KAPPAS), count)
        for at, kappa in enumerate(KAPPAS):
            scores = videos.scores(labels[:, at])
            tried.append((scores, replace(found, viterbi_kappa=kappa, min_duration_s=minimum, causal=scores)))
    return _best(tried)
