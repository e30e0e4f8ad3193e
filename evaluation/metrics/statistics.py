"""Estimate uncertainty, with bootstrap intervals over videos and paired tests between models.

A bootstrap draws videos at random, to show how much a result would vary on other patients. Frames are never drawn,
since those of one video are not independent. Variation over training seeds is another matter (`evaluation.comparison`).
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

_EXACT_VIDEOS = 13  # with at most this many videos, all sign patterns (8,192) are enumerated


@dataclass(frozen=True)
class Intervals:
    """Bootstrap intervals over videos, in the unit of each convention.

    Over all phases they are {convention: {metric: interval}}, and for each phase {convention: {phase: {metric:
    interval}}}. Conventions that do not count frames for each phase have none for each phase.
    """

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
    scores: Mapping[str, NDArray[Any]] | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Intervals:
    """Compute percentile bootstrap intervals over videos.

    The arguments are those of `evaluation.metrics.phases.evaluate_phases`. Each of `resamples` draws takes as many
    videos as there are, with replacement, and averages them as the convention does. The same draws are used for all
    phases; for a phase, draws without any video that has it do not count. A single video has no interval (None).
    """
    videos, _ = label_pairs(truth, predicted, len(phases), scores)
    once, draws, tails = _draws(len(videos), resamples, confidence, seed)
    ids = background_ids(background, phases)
    overall, per_phase = {}, {}
    for name in chosen_conventions(conventions, phases, fps, scores is not None):
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
    """Return the weights of the videos for the estimate, (1, V), and for each draw, (B, V), and the interval's
    percentiles.

    For a single video there are no draws.
    """
    once = np.ones((1, videos))
    draws = np.random.default_rng(seed).multinomial(videos, once[0] / videos, size=resamples if videos > 1 else 0)
    return once, draws.astype(float), [50.0 * (1.0 - confidence), 50.0 * (1.0 + confidence)]


def _interval(mean: float, drawn: FloatArray, tails: Sequence[float]) -> Interval:
    known = drawn[np.isfinite(drawn)]
    low, high = np.percentile(known, tails).tolist() if known.size else (None, None)
    return Interval(json_number(mean), low, high)


@dataclass(frozen=True)
class PairedTest(Record):
    """The result of one paired test: the mean difference over `videos`, in percentage points, and the p value.

    `exact` says whether all sign patterns were enumerated. `per_video` contains the differences, with None if one of
    the two models has no value.
    """

    difference: float
    p_value: float
    videos: int
    exact: bool
    per_video: Mapping[str, float | None]


def paired_permutation(
    first: Mapping[str, float | None], second: Mapping[str, float | None], *, resamples: int = 10_000, seed: int = 0
) -> PairedTest:
    """Run a two-sided paired permutation test on one number per video.

    `difference` is the mean of first - second over the videos that have both numbers. Under the null hypothesis, each
    video's difference is equally likely to have the opposite sign. With up to 13 videos, all sign patterns are
    enumerated (`exact`). With more, `resamples` random patterns are drawn, and the observed pattern is counted as one
    of them (Phipson and Smyth, 2010). Raises UserError naming a video that only one of the two has, or if no video has
    both numbers.
    """
    if set(first) != set(second):
        odd = sorted(set(first) ^ set(second))[0]
        raise UserError(f"{odd}: only one of the two has this video; compare runs evaluated on the same videos")
    pairs = {video: (first[video], second[video]) for video in first}
    per_video = {video: None if a is None or b is None else a - b for video, (a, b) in pairs.items()}
    differences = np.array([per_video[video] for video in sorted(first) if per_video[video] is not None])
    if not differences.size:
        raise UserError("no video has a number for both, so there is nothing to compare; choose another metric")
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
    """Compute a percentile bootstrap interval of the mean difference over videos; a single video has none (None)."""
    values = np.asarray(differences, dtype=float)
    if not values.size:
        return Interval(None, None, None)
    _, draws, tails = _draws(len(values), resamples, confidence, seed)
    return _interval(float(values.mean()), draws @ values / len(values), tails)


def holm(p_values: Mapping[T, float]) -> dict[T, float]:
    """Apply Holm's correction for several tests (Holm, 1979); returns adjusted p values under the same keys."""
    adjusted: dict[T, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
