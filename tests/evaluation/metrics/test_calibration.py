"""Calibration and PhaKIR's scores: hand-made examples, scikit-learn, properties and wrong input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, f1_score, roc_auc_score

from configs.errors import UserError
from evaluation.metrics.calibration import BINS, brier_scores, near_transitions, reliability
from evaluation.metrics.counts import NO_PREDICTION, PhasePair
from evaluation.metrics.phakir import phase_auroc
from tests.evaluation.in_json import bootstrap_intervals, evaluate_phases

NAMES = ["calibration", "phakir", "transitions"]


def soft(rng: np.random.Generator, frames: int, classes: int) -> np.ndarray:
    values = np.exp(3 * rng.normal(size=(frames, classes)))
    return values / values.sum(axis=1, keepdims=True)


def material(seed: int, videos: int = 3, classes: int = 4) -> tuple[dict, dict, dict]:
    """Truth, predictions that are not always the most probable phase, and probabilities of random videos."""
    rng = np.random.default_rng(seed)
    truth = {f"v{k}": np.sort(rng.integers(0, classes, 60 + 10 * k)) for k in range(videos)}
    scores = {name: soft(rng, len(labels), classes) for name, labels in truth.items()}
    predicted = {
        name: np.where(rng.random(len(one)) < 0.2, rng.integers(0, classes, len(one)), one.argmax(axis=1))
        for name, one in scores.items()
    }
    return truth, predicted, scores


def evaluate(truth: dict, predicted: dict, scores: dict | None, phases="ABCD", fps: float | None = 1.0) -> dict:
    return evaluate_phases(truth, predicted, tuple(phases), fps, scores=scores)


def test_the_example_of_the_docs():
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.3, 0.7]])
    truth, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])
    found = evaluate({"v": truth}, {"v": predicted}, {"v": scores}, "AB")["calibration"]
    assert found["ece"] == {"pooled": pytest.approx(25), "mean": pytest.approx(25), "std": None}
    assert found["ece_near"]["pooled"] == pytest.approx(25)
    assert found["brier"]["pooled"] == pytest.approx(39)
    assert found["per_video"]["v"]["frames"] == 4
    assert found["about"]["unit"].startswith("percent")


def test_the_confidence_is_that_of_the_predicted_phase():
    scores = np.array([[0.4, 0.6]] * 10)
    found = evaluate({"v": np.zeros(10, int)}, {"v": np.zeros(10, int)}, {"v": scores}, "AB")["calibration"]
    assert found["ece"]["pooled"] == pytest.approx(60)


def test_phakir_example_of_the_docs():
    letters = {"v1": ("AAAABBBBBB", "AAABBBBBBC"), "v2": ("AABBBBCCCC", "AAABBBCCCC")}
    truth, predicted = ({k: np.array([ord(c) - 65 for c in v[i]]) for k, v in letters.items()} for i in (0, 1))
    found = evaluate(truth, predicted, None, "ABC")["phakir"]
    assert found["balanced_accuracy"]["mean"] == pytest.approx(85.42, abs=0.01)
    assert found["f1"]["mean"] == pytest.approx(72.46, abs=0.01)
    assert found["auroc"] == {"mean": None, "std": None}
    of_a = np.array([0.9, 0.8, 0.7, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1])
    area = phase_auroc(PhasePair("v1", truth["v1"], predicted["v1"], np.stack([of_a, 1 - of_a, 0 * of_a], axis=1)), 3)
    np.testing.assert_allclose(area, [23 / 24, 23 / 24, np.nan])


@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_learn(seed):
    truth, predicted, scores = material(seed)
    results = evaluate(truth, predicted, scores)
    for name in truth:
        y, p, s = truth[name], predicted[name], scores[name]
        row = results["phakir"]["per_video"][name]
        assert row["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(y, p))
        assert row["f1"] == pytest.approx(100 * f1_score(y, p, average="macro", zero_division=0))
        present = np.unique(y)
        assert row["auroc"] == pytest.approx(100 * np.mean([roc_auc_score(y == c, s[:, c]) for c in present]))
        brier = brier_score_loss(y, s, labels=range(4), scale_by_half=False)
        assert results["calibration"]["per_video"][name]["brier"] == pytest.approx(100 * brier)
        right, confidence = p == y, s[np.arange(len(y)), p]
        bins = reliability(confidence, right)
        expected = calibration_curve(right, confidence, n_bins=BINS)
        filled = bins.frames > 0
        np.testing.assert_allclose(bins.right[filled] / bins.frames[filled], expected[0])
        np.testing.assert_allclose(bins.confidence[filled] / bins.frames[filled], expected[1])
        assert results["calibration"]["per_video"][name]["ece"] == pytest.approx(100 * bins.error)


def test_pooled_values_are_those_of_all_frames_as_one():
    truth, predicted, scores = material(4)
    found = evaluate(truth, predicted, scores)["calibration"]
    y, p, s = (np.concatenate(list(one.values())) for one in (truth, predicted, scores))
    assert found["ece"]["pooled"] == pytest.approx(100 * reliability(s[np.arange(len(y)), p], p == y).error)
    near = np.concatenate([near_transitions(labels, 1.0) for labels in truth.values()])
    expected = reliability(s[np.arange(len(y)), p][near], (p == y)[near]).error
    assert found["ece_near"]["pooled"] == pytest.approx(100 * expected)
    assert found["brier"]["pooled"] == pytest.approx(100 * brier_scores(s, y).mean())


@pytest.mark.parametrize(("fps", "reach"), [(0.25, 2), (1.0, 10), (29.97, 299), (25.0, 250)])
@pytest.mark.parametrize("gap", [0, 20])
def test_near_a_transition_is_ten_seconds_on_both_sides(fps, reach, gap):
    """From the last frame of one phase and the first frame of the next."""
    labels = np.repeat([0, -1, 1], [300, gap, 300])
    expected = range(299 - reach, 300 + gap + reach + 1)
    assert np.flatnonzero(near_transitions(labels, fps)).tolist() == list(expected)


def test_without_a_transition_no_frame_is_near_one():
    assert not near_transitions(np.zeros(30, int), 1.0).any()
    assert not near_transitions(np.zeros(30, int), 1.0).any()


@settings(max_examples=12)
@given(seed=st.integers(0, 2**16), classes=st.integers(1, 4), frames=st.integers(1, 40))
def test_bounds_and_videos_in_any_order(seed, classes, frames):
    rng = np.random.default_rng(seed)
    truth = {f"v{k}": rng.integers(-1, classes, frames) for k in range(3)}
    truth["v0"][0] = 0
    scores = {name: soft(rng, frames, classes) for name in truth}
    predicted = {name: rng.integers(0, classes, frames) for name in truth}
    results = evaluate(truth, predicted, scores, "ABCD"[:classes])
    found = results["calibration"]
    for key, most in (("ece", 100), ("ece_near", 100), ("brier", 200)):
        values = [found[key]["pooled"], *(row[key] for row in found["per_video"].values())]
        assert all(value is None or 0 <= value <= most + 1e-9 for value in values)
    renamed = dict(zip(truth, reversed(truth), strict=True))
    swapped = ({renamed[name]: one for name, one in each.items()} for each in (truth, predicted, scores))
    other = evaluate(*swapped, "ABCD"[:classes])
    for name in NAMES:
        for key in [key for key in results[name] if key not in ("per_video", "about")]:
            assert _numbers(other[name][key]) == pytest.approx(_numbers(results[name][key]), nan_ok=True)


def _numbers(score: object) -> list[float]:
    values = score.values() if isinstance(score, dict) else [score]
    return [np.nan if value is None else value for value in values]


def test_a_certain_and_right_prediction_is_perfect():
    truth = {"v": np.repeat([0, 1, 2, 3], 20)}
    results = evaluate(truth, truth, {"v": np.eye(4)[truth["v"]]})
    assert [results["calibration"][key]["pooled"] for key in ("ece", "ece_near", "brier")] == [0, 0, 0]
    assert [results["phakir"][key]["mean"] for key in ("balanced_accuracy", "f1", "auroc")] == [100, 100, 100]
    found = results["transitions"]
    assert [found[key]["pooled"] for key in ("delay_median", "delay_p90", "missed", "false_per_hour")] == [0, 0, 0, 0]
    assert found["transitions_truth"] == 3


def test_transitions_example_of_the_docs():
    truth = {"v": np.repeat([0, 1, 2], 100)}
    predicted = {"v": np.repeat([0, 1, 0, 1, 2], [40, 3, 61, 90, 106])}
    found = evaluate(truth, predicted, None)["transitions"]
    values = [found[key]["pooled"] for key in ("delay_median", "delay_p90", "missed", "false_per_hour")]
    assert values == pytest.approx([-1, 3, 0, 24])
    skipped = evaluate(truth, {"v": np.repeat([0, 2], [200, 100])}, None)["transitions"]
    assert skipped["missed"]["pooled"] == 50


def test_percentiles_of_draws_are_those_of_the_repeated_videos():
    truth, predicted, _ = material(5, videos=2)
    predicted = {name: np.roll(labels, 3 + k) for k, (name, labels) in enumerate(truth.items())}
    once = evaluate(truth, predicted, None)["transitions"]
    twice = {f"{name}{k}": one for name, one in truth.items() for k in range(2)}
    both = evaluate(twice, {f"{n}{k}": one for n, one in predicted.items() for k in range(2)}, None)["transitions"]
    assert both["missed"]["pooled"] == once["missed"]["pooled"]
    interval = bootstrap_intervals(truth, predicted, "ABCD", 1.0, ["transitions"], resamples=300)["transitions"]
    for name in ("delay_median", "delay_p90", "missed", "false_per_hour"):
        one = interval[f"{name}_pooled"]
        assert one["mean"] == once[name]["pooled"]
        single = [row[name] for row in once["per_video"].values()]
        assert (one["low"], one["high"]) == (pytest.approx(min(single)), pytest.approx(max(single)))


def test_what_cannot_be_computed_is_left_out():
    truth, predicted, scores = material(6)
    assert "calibration" not in evaluate(truth, predicted, None)
    with pytest.raises(UserError, match="convention calibration: it needs a probability"):
        evaluate_phases(truth, predicted, "ABCD", 1.0, ["calibration"])
    with pytest.raises(UserError, match=r"convention transitions: .*--fps"):
        evaluate_phases(truth, predicted, "ABCD", None, ["transitions"])
    unknown = evaluate(truth, predicted, scores, fps=None)
    assert "transitions" not in unknown
    assert unknown["calibration"]["ece_near"] == {"pooled": None, "mean": None, "std": None}


@pytest.mark.parametrize("frames", [1, 2])
def test_few_frames_and_one_phase(frames):
    zeros = {"v": np.zeros(frames, int)}
    results = evaluate(zeros, zeros, {"v": np.ones((frames, 1))}, "A")
    assert results["calibration"]["ece"]["pooled"] == 0
    assert results["phakir"]["auroc"]["mean"] is None
    assert results["transitions"]["missed"]["pooled"] is None
    assert results["transitions"]["false_per_hour"]["pooled"] == 0


def test_frames_without_prediction():
    truth, scores = {"v": np.array([0, 0, 1, 1])}, {"v": np.array([[0.9, 0.1], [0, 0], [0.1, 0.9], [0.1, 0.9]])}
    results = evaluate(truth, {"v": np.array([0, NO_PREDICTION, 1, 1])}, scores, "AB")
    assert results["calibration"]["per_video"]["v"]["frames"] == 3
    assert results["calibration"]["ece"]["pooled"] == pytest.approx(10)
    assert results["phakir"]["balanced_accuracy"]["mean"] == 75
    assert results["phakir"]["auroc"]["mean"] == pytest.approx(100 * (0.5 + 1.0) / 2)


@pytest.mark.parametrize(
    ("row", "text"), [([0.9, 0.9, 0, 0], "0.9, 0.9"), ([np.nan] * 4, "nan"), ([-0.5, 1.5, 0, 0], "-0.5, 1.5")]
)
def test_scores_that_are_no_probabilities_are_one_line(row, text):
    truth, predicted, scores = material(7)
    scores["v1"][3] = row
    with pytest.raises(UserError, match=f"^v1: row 3: the scores {text}.* are not probabilities"):
        evaluate(truth, predicted, scores)
    scores["v1"] = scores["v1"][:, :3]
    with pytest.raises(UserError, match=r"^v1: probabilities of shape \(70, 3\) for 70 frames and 4 phases"):
        evaluate(truth, predicted, scores)
