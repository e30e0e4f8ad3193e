"""Uncertainty: bootstrap intervals over videos, and paired tests between models.

A bootstrap draws videos, to show how far the number would vary on other patients. Frames are never drawn, since those
of one video are not independent. The spread over training seeds is a different question (`evaluation.comparison`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from engine.records import Record
from evaluation.metrics.conventions import CONVENTIONS
from evaluation.metrics.counts import FloatArray, label_pairs
from evaluation.metrics.phases import background_ids, chosen_conventions
from evaluation.metrics.results import Interval, json_number

T = TypeVar("T")

_EXACT_VIDEOS = 13  # up to here all sign patterns (8,192) are enumerated


@dataclass(frozen=True)
class Intervals:
    """Bootstrap intervals over videos, percent: {convention: {metric: interval}}, and those of each phase, {convention:
    {phase: {metric: interval}}}, which conventions of segments do not have."""

    overall: Mapping[str, Mapping[str, Interval]]
    per_phase: Mapping[str, Mapping[str, Mapping[str, Interval]]]


def bootstrap_intervals(
    truth: Mapping[str, NDArray[Any]],
    predicted: Mapping[str, NDArray[Any]],
    phases: Sequence[str],
    fps: float | None,
    conventions: Sequence[str] | None = None,
    *,
    background: Sequence[str] = (),
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Intervals:
    """Percentile bootstrap over videos.

    Arguments as in `evaluation.metrics.phases.evaluate_phases`. Each of `resamples` draws as many videos as there are,
    with replacement, and averages them as the convention does. Videos are drawn over all phases at once; draws without
    any video that has a phase do not count for it. One video alone has no interval (None).
    """
    videos, _ = label_pairs(truth, predicted, len(phases))
    once, draws, tails = _draws(len(videos), resamples, confidence, seed)
    ids = background_ids(background, phases)
    overall, per_phase = {}, {}
    for name in chosen_conventions(conventions, phases, fps):
        convention = CONVENTIONS.find(name)
        table = convention.count(videos, len(phases), fps, ids)
        means, drawn = (convention.means(table, weights) for weights in (once, draws))  # {metric: (1 or B,)}
        overall[name] = {m: _interval(float(value[0]), drawn[m], tails) for m, value in means.items()}
        if not convention.of_frames:
            continue
        means, drawn = (convention.phase_means(table, weights) for weights in (once, draws))  # {metric: (1 or B, C)}
        per_phase[name] = {
            phase: {m: _interval(float(values[0, c]), drawn[m][:, c], tails) for m, values in means.items()}
            for c, phase in enumerate(phases)
        }
    return Intervals(overall, per_phase)


def _draws(videos: int, resamples: int, confidence: float, seed: int) -> tuple[FloatArray, FloatArray, list[float]]:
    """Weights of the videos: all once (1, V), and in each draw (B, V), none for a single video; and the percentiles of
    the interval."""
    once = np.ones((1, videos))
    draws = np.random.default_rng(seed).multinomial(videos, once[0] / videos, size=resamples if videos > 1 else 0)
    return once, draws.astype(float), [50.0 * (1.0 - confidence), 50.0 * (1.0 + confidence)]


def _interval(mean: float, drawn: FloatArray, tails: Sequence[float]) -> Interval:
    known = drawn[np.isfinite(drawn)]
    low, high = np.percentile(known, tails).tolist() if known.size else (None, None)
    return Interval(json_number(mean), low, high)


@dataclass(frozen=True)
class PairedTest(Record):
    """The mean difference over `videos`, in percent points, and the p value of one test; `exact` where all sign
    patterns were enumerated. `per_video` has None if one of the two has no number."""

    difference: float
    p_value: float
    videos: int
    exact: bool
    per_video: Mapping[str, float | None]


def paired_permutation(
    first: Mapping[str, float | None], second: Mapping[str, float | None], *, resamples: int = 10_000, seed: int = 0
) -> PairedTest:
    """Two-sided paired permutation test on one number per video.

    `difference` is the mean of first - second over the videos that have both. Under the null hypothesis each video's
    difference could as well have the other sign; up to 13 videos all sign patterns are enumerated (`exact`), beyond
    that `resamples` random ones, the observed one counted among them (Phipson and Smyth, 2010). Raises UserError naming
    a video that only one of the two has, and if no video has both numbers.
    """
    if set(first) != set(second):
        odd = sorted(set(first) ^ set(second))[0]
        raise UserError(f"{odd}: only one of the two has this video; compare runs evaluated on the same videos")
    pairs = {video: (first[video], second[video]) for video in first}
    per_video = {video: None if a is None or b is None else a - b for video, (a, b) in pairs.items()}
    differences = np.array([per_video[video] for video in sorted(first) if per_video[video] is not None])
    if not differences.size:
        raise UserError("no video has a number on both sides, so there is nothing to compare")
    count = len(differences)
    exact = count <= _EXACT_VIDEOS
    if exact:
        signs = 1.0 - 2.0 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(resamples, count))
    observed = abs(differences.mean())
    extreme = int((np.abs(signs @ differences) / count >= observed - 1e-12).sum())
    p_value = extreme / len(signs) if exact else (extreme + 1) / (resamples + 1)
    return PairedTest(float(differences.mean()), p_value, count, exact, per_video)


def paired_interval(
    differences: Sequence[float], *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap of a mean difference over videos; one video has no interval (None)."""
    values = np.asarray(differences, dtype=float)
    if not values.size:
        return Interval(None, None, None)
    _, draws, tails = _draws(len(values), resamples, confidence, seed)
    return _interval(float(values.mean()), draws @ values / len(values), tails)


def holm(p_values: Mapping[T, float]) -> dict[T, float]:
    """Holm's correction for several tests: adjusted p values under the same names (Holm, 1979)."""
    adjusted: dict[T, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
