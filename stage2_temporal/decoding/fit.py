"""Fit the decoding of a label track: the graph on training labels, the parameters on validation predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.counts import FloatArray, IntArray
from evaluation.metrics.transitions import false_transitions_per_hour
from stage2_temporal.decoding.calibration import fit_temperature, log_probabilities
from stage2_temporal.decoding.fitted import TrackDecoding, ValidationScores
from stage2_temporal.decoding.graph import learn_graph
from stage2_temporal.decoding.inference import Chains, Viterbi, filtered, smoothed

KAPPAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0)
ALPHAS = (0.0, 0.5)
MIN_DURATIONS_S = (0.0, 5.0, 15.0, 30.0)
USUAL = (0.1, 0.0, 5.0)  # kappa, alpha, minimum duration without validation videos
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
    videos. Without labels in these, the temperatures are 1 and the other parameters `USUAL`.
    """
    kappa, alpha, minimum = USUAL
    graph = learn_graph(train, len(classes), fps)
    found = TrackDecoding(classes=tuple(classes), kappa=kappa, alpha=alpha, min_duration_s=minimum, graph=graph)
    if not any((one >= 0).any() for one in labels):
        return found
    videos = Validation.of(probabilities, labels, fps)
    known = videos.labels >= 0
    if not known.any():
        return found
    found = replace(found, temperature=fit_temperature(videos.log_p[known], videos.labels[known]))
    found = replace(_with_parameters(found, videos), before=videos.scores(videos.log_p.argmax(axis=2)))
    return _with_temperatures(found, videos)


def _with_parameters(found: TrackDecoding, videos: Validation) -> TrackDecoding:
    """The decoding with the best kappa, alpha and minimum duration: accuracy first, then false transitions.

    Of the settings within `TOLERANCE` of the best accuracy, it is the one with the fewest false transitions per hour.
    """
    tried = []
    weights = [replace(found, kappa=kappa, alpha=alpha) for kappa, alpha in product(KAPPAS, ALPHAS)]
    for minimum in MIN_DURATIONS_S:
        for one, labels in zip(weights, _decoded(weights, videos, minimum), strict=True):
            tried.append(replace(one, min_duration_s=minimum, after=videos.scores(labels)))
    accuracies = [one.after.accuracy for one in tried if one.after]
    least = max(accuracies) - 100 * TOLERANCE
    good = [one for one, accuracy in zip(tried, accuracies, strict=True) if accuracy >= least]

    def badness(one: TrackDecoding) -> tuple[float, float]:
        assert one.after
        return one.after.false_transitions_per_h, -one.after.accuracy

    return min(good, key=badness)


def _decoded(weights: Sequence[TrackDecoding], videos: Validation, minimum: float) -> list[IntArray]:
    """The labels (T, V) of the causal decoder without lag, for each of the settings, all in parallel."""
    frames, count, classes = videos.log_p.shape
    chains = Chains.of(weights[0].graph, videos.fps, minimum)
    viterbi = Viterbi(chains, 0, len(weights) * count)
    emissions = np.stack([one.emissions(videos.log_p, videos.fps) for one in weights], axis=1)  # (T, W, V, C)
    steps = [viterbi.step(one.reshape(-1, classes)) for one in emissions]
    labels = np.array(steps).reshape(frames, len(weights), count)
    return list(labels.transpose(1, 0, 2))


def _with_temperatures(found: TrackDecoding, videos: Validation) -> TrackDecoding:
    """The decoding with the temperatures of the posteriors of filter and smoother."""
    emissions, known = found.emissions(videos.log_p, videos.fps), videos.labels >= 0
    past = filtered(found.graph, videos.fps, emissions)
    both = [past]
    smooth = np.empty_like(past)
    for at, frames in enumerate(videos.frames):  # without padding, which would count as later frames
        one = slice(0, frames), slice(at, at + 1)
        smooth[one] = smoothed(found.graph, videos.fps, emissions[one], past[one])
    both.append(smooth)
    fitted = [fit_temperature(log_probabilities(one[known]), videos.labels[known]) for one in both]
    return replace(found, filter_temperature=fitted[0], smoother_temperature=fitted[1])
