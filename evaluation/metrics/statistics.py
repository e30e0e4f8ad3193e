"""How sure a number is: bootstrap intervals over videos, paired tests between models, spread over seeds.

Videos and seeds are kept apart: a bootstrap draws videos (would the number hold on other patients?), `over_seeds`
describes training runs (would it hold if trained again?). Frames are never drawn, since those of one video are not
independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from evaluation.metrics.counts import FloatArray, label_pairs
from evaluation.metrics.phases import (
    CONVENTIONS,
    METRICS,
    background_ids,
    build_table,
    chosen_conventions,
    json_number,
    mean_and_std,
    weighted_means,
    weighted_phase_means,
)
from evaluation.metrics.segmental import SegmentTable

_EXACT_VIDEOS = 13  # up to here all sign patterns (8,192) are gone through


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
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Percentile bootstrap over videos: {convention: {metric: {mean, low, high}}}, percent.

    Arguments as in `evaluation.metrics.phases.evaluate_phases`. Each of `resamples` draws as many videos as there are,
    with replacement, and averages them as the convention does. One video alone has no interval (None).
    """
    videos, _ = label_pairs(truth, predicted, len(phases))
    once, draws, tails = _draws(len(videos), resamples, confidence, seed)
    result = {}
    ids = background_ids(background, phases)
    for name in chosen_conventions(conventions, phases, fps):
        table = build_table(videos, len(phases), fps, CONVENTIONS[name], ids)
        estimates = weighted_means(table, CONVENTIONS[name], once)
        drawn = weighted_means(table, CONVENTIONS[name], draws)
        result[name] = {
            metric: _interval(float(estimates[metric][0]), drawn[metric] if len(videos) > 1 else np.empty(0), tails)
            for metric in estimates
        }
    return result


def phase_intervals(
    truth: Mapping[str, NDArray[Any]],
    predicted: Mapping[str, NDArray[Any]],
    phases: Sequence[str],
    fps: float,
    conventions: Sequence[str] | None = None,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
    """`bootstrap_intervals` a phase: {convention: {phase: {metric: {mean, low, high}}}}, percent.

    Videos are drawn over all phases at once; draws without any video that has the phase do not count for it.
    Conventions of segments have no numbers a phase and are left out.
    """
    videos, _ = label_pairs(truth, predicted, len(phases))
    once, draws, tails = _draws(len(videos), resamples, confidence, seed)
    result = {}
    for name in chosen_conventions(conventions, phases, fps):
        table = build_table(videos, len(phases), fps, CONVENTIONS[name])
        if isinstance(table, SegmentTable):
            continue
        estimates = weighted_phase_means(table, CONVENTIONS[name], once)  # (1, C) a metric
        drawn = weighted_phase_means(table, CONVENTIONS[name], draws if len(videos) > 1 else draws[:0])  # (B, C)
        result[name] = {
            phase: {m: _interval(float(estimates[m][0, c]), drawn[m][:, c], tails) for m in METRICS}
            for c, phase in enumerate(phases)
        }
    return result


def _draws(videos: int, resamples: int, confidence: float, seed: int) -> tuple[FloatArray, FloatArray, list[float]]:
    """Weights of the videos as they are (1, V) and in each draw (B, V), and the percentiles of the interval."""
    once = np.ones((1, videos))
    draws = np.random.default_rng(seed).multinomial(videos, once[0] / videos, size=resamples).astype(float)
    return once, draws, _tails(confidence)


def _interval(mean: float, drawn: FloatArray, tails: Sequence[float]) -> dict[str, float | None]:
    known = drawn[np.isfinite(drawn)]
    low, high = np.percentile(known, tails).tolist() if known.size else (None, None)
    return {"mean": json_number(mean), "low": low, "high": high}


def paired_permutation(
    first: Mapping[str, float | None], second: Mapping[str, float | None], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Two-sided paired permutation test on one number a video: {difference, p_value, videos, exact}.

    `difference` is the mean of first - second over the videos that have both. Under the null hypothesis each video's
    difference could as well have the other sign; up to 13 videos all sign patterns are gone through (`exact`), beyond
    that `resamples` random ones, the observed one counted among them (Phipson and Smyth, 2010).
    """
    if set(first) != set(second):
        odd = sorted(set(first) ^ set(second))[0]
        raise UserError(f"{odd}: only one of the two has this video; compare runs evaluated on the same videos")
    pairs = [(first[video], second[video]) for video in sorted(first)]
    differences = np.array([a - b for a, b in pairs if a is not None and b is not None])
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
    return {"difference": float(differences.mean()), "p_value": p_value, "videos": count, "exact": exact}


def paired_interval(
    differences: Sequence[float], *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> dict[str, float | None]:
    """Percentile bootstrap of a mean difference over videos: {mean, low, high}; one video has no interval (None)."""
    values = np.asarray(differences, dtype=float)
    count = len(values)
    if count < 2:
        return {"mean": json_number(values.mean()) if count else None, "low": None, "high": None}
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=resamples)
    return _interval(float(values.mean()), draws @ values / count, _tails(confidence))


def _tails(confidence: float) -> list[float]:
    return [50.0 * (1.0 - confidence), 50.0 * (1.0 + confidence)]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction for several tests: adjusted p values under the same names (Holm, 1979)."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def compare(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    convention: str = "phase_mean",
    metrics: Sequence[str] = ("accuracy", *METRICS),
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Paired comparison of two results of `evaluate_phases`, one test per metric.

    {metric: {difference, p_value, videos, exact, per_video}}: differences first - second in percent points. p values
    are those of the single tests; `holm` corrects them over all tests that were made.
    """
    for results in (first, second):
        if convention not in results:
            raise UserError(f"no results under the convention {convention!r}; evaluate both runs with it first")
    rows = [results[convention]["per_video"] for results in (first, second)]
    result = {}
    for metric in metrics:
        a, b = ({video: row[metric] for video, row in videos.items()} for videos in rows)
        result[metric] = paired_permutation(a, b, resamples=resamples, seed=seed)
        result[metric]["per_video"] = {
            video: None if a[video] is None or b[video] is None else a[video] - b[video] for video in a
        }
    return result


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and deviation (n - 1) over training seeds: {convention: {metric: {mean, std}, seeds}}, percent.

    `runs` are results of `evaluate_phases` of the same model trained with different seeds, on the same videos.
    """
    if not runs:
        raise UserError("no runs to take the mean over; give at least one")
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    result: dict[str, dict[str, Any]] = {}
    for name in shared:
        metrics = [key for key, value in runs[0][name].items() if isinstance(value, dict) and "mean" in value]
        result[name] = {"seeds": len(runs)}
        for metric in metrics:
            values = np.array([run[name][metric]["mean"] for run in runs], dtype=float)  # None becomes NaN
            result[name][metric] = mean_and_std(float(values.mean()), values)
    return result
