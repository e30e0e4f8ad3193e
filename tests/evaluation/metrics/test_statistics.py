"""Intervals and tests: by hand, exhaustively on small data, and against scipy's permutation test."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import permutation_test

from configs.errors import UserError
from evaluation.metrics.statistics import holm, paired_permutation
from tests.evaluation.in_json import bootstrap_intervals, evaluate_phases, paired_interval, phase_intervals

PHASES = ("A", "B", "C")


def corpus(videos: int, noise: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    truth = {f"v{k}": np.sort(rng.integers(0, 3, 60)) for k in range(videos)}
    predicted = {
        name: np.where(rng.random(60) < noise * rng.random(), rng.integers(0, 3, 60), track)
        for name, track in truth.items()
    }
    return truth, predicted


def test_bootstrap_equals_evaluating_each_drawn_set_of_videos():
    """With three videos there are 27 equally likely draws: the interval's ends are their percentiles."""
    truth, predicted = corpus(3, 0.8)
    found = bootstrap_intervals(truth, predicted, PHASES, 1.0, resamples=40_000)
    drawn = []
    for draw in itertools.product(truth, repeat=3):
        copies = {f"{k}-{name}": name for k, name in enumerate(draw)}
        drawn.append(
            evaluate_phases(
                {new: truth[old] for new, old in copies.items()},
                {new: predicted[old] for new, old in copies.items()},
                PHASES,
                1.0,
            )
        )
    for convention in ("phase_mean", "video_macro", "pooled"):
        for metric in ("accuracy", "precision", "f1"):
            values = [result[convention][metric]["mean"] for result in drawn]
            interval = found[convention][metric]
            # 2.5 % of 27 is less than one draw, so both ends are the extremes.
            assert (interval["low"], interval["high"]) == (pytest.approx(min(values)), pytest.approx(max(values)))
    pooled = [result["segmental"]["f1@50"]["pooled"] for result in drawn]
    assert found["segmental"]["f1@50_pooled"]["low"] == pytest.approx(min(pooled))


def test_bootstrap_surrounds_the_estimate_and_is_repeatable():
    truth, predicted = corpus(20, 0.8)
    first = bootstrap_intervals(truth, predicted, PHASES, 1.0, ["phase_mean"], resamples=2000, seed=3)
    assert first == bootstrap_intervals(truth, predicted, PHASES, 1.0, ["phase_mean"], resamples=2000, seed=3)
    narrow = bootstrap_intervals(truth, predicted, PHASES, 1.0, ["phase_mean"], resamples=2000, seed=3, confidence=0.5)
    estimate = evaluate_phases(truth, predicted, PHASES, 1.0)["phase_mean"]
    for metric, interval in first["phase_mean"].items():
        assert interval["mean"] == pytest.approx(estimate[metric]["mean"])
        inner = narrow["phase_mean"][metric]
        assert interval["low"] < inner["low"] < interval["mean"] < inner["high"] < interval["high"]


def test_one_video_has_no_interval():
    truth, predicted = corpus(1, 0.5)
    interval = bootstrap_intervals(truth, predicted, PHASES, 1.0)["pooled"]["accuracy"]
    assert interval["low"] is None
    assert interval["high"] is None
    assert interval["mean"] is not None


def named(values) -> dict[str, float]:
    return {f"v{k:02d}": float(value) for k, value in enumerate(values)}


def test_permutation_by_hand():
    # All three differences positive: of eight sign patterns two are as extreme.
    result = paired_permutation(named([3, 5, 9]), named([2, 3, 5]))
    assert (result.difference, result.p_value, result.videos, result.exact) == (pytest.approx(7 / 3), 2 / 8, 3, True)
    assert paired_permutation(named([1, 2]), named([1, 2])).p_value == 1


def test_permutation_equals_scipy():
    rng = np.random.default_rng(1)
    for count in (6, 15):
        a, b = rng.normal(0.5, 1, count), rng.normal(0, 1, count)
        wanted = permutation_test(
            (a, b),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
        ).pvalue
        found = paired_permutation(named(a), named(b), resamples=20_000)
        assert found.exact is (count == 6)
        assert found.p_value == pytest.approx(wanted, abs=1e-9 if count == 6 else 0.015)


def test_random_permutations_never_give_zero():
    result = paired_permutation(named(range(100, 130)), named(range(30)), resamples=99)
    assert (result.p_value, result.exact) == (0.01, False)


def test_permutation_leaves_out_videos_without_a_number_and_refuses_different_videos():
    assert paired_permutation({"a": 1.0, "b": None}, {"a": 0.0, "b": 2.0}).videos == 1
    assert paired_permutation({"a": 1.0, "b": None}, {"a": 0.0, "b": 2.0}).per_video == {"a": 1.0, "b": None}
    with pytest.raises(UserError, match="c: only one of the two has this video"):
        paired_permutation({"a": 1.0, "c": 1.0}, {"a": 1.0})
    with pytest.raises(UserError, match="nothing to compare"):
        paired_permutation({"a": None}, {"a": 1.0})


def test_paired_interval_equals_all_draws_of_three_videos():
    differences = [1.0, 4.0, -2.0]
    draws = [np.mean(draw) for draw in itertools.product(differences, repeat=3)]
    found = paired_interval(differences, resamples=100_000)
    assert found["mean"] == pytest.approx(1)
    # The lowest and the highest draw have a probability of 1/27 each, more than the tails' 2.5 %.
    assert (found["low"], found["high"]) == pytest.approx((min(draws), max(draws)))
    assert found == paired_interval(differences, resamples=100_000)
    assert paired_interval([3.0]) == {"mean": 3.0, "low": None, "high": None}


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_intervals_of_a_phase_are_around_its_results():
    rng = np.random.default_rng(5)
    truth = {f"v{i}": np.sort(rng.integers(0, 3, 50)) for i in range(6)}
    truth["v0"] = np.minimum(truth["v0"], 1)  # one video lacks the last phase
    predicted = {name: np.where(rng.random(50) < 0.8, track, 0) for name, track in truth.items()}
    results = evaluate_phases(truth, predicted, "ABC", 1.0)
    intervals = phase_intervals(truth, predicted, "ABC", 1.0, resamples=500)
    assert set(intervals) == {name for name, result in results.items() if "per_phase" in result}
    for convention, phases in intervals.items():
        for phase, metrics in phases.items():
            for metric, entry in metrics.items():
                assert entry["mean"] == pytest.approx(results[convention]["per_phase"][phase][metric]["mean"])
                assert entry["low"] <= entry["mean"] + 1e-9
                assert entry["high"] >= entry["mean"] - 1e-9


def test_one_video_has_no_interval_per_phase():
    track = np.array([0, 0, 1, 1])
    entry = phase_intervals({"v": track}, {"v": track}, "AB", 1.0)["pooled"]["A"]["f1"]
    assert entry == {"mean": 100.0, "low": None, "high": None}
