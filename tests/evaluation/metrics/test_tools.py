"""Tool metrics by hand, against scikit-learn, and with everything that can be missing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score

from configs.errors import UserError
from evaluation.metrics.tools import choose_thresholds
from tests.evaluation.in_json import evaluate_tools

TOOLS = ("Grasper", "Hook")


def column(*values) -> np.ndarray:
    return np.array(values)[:, None]


def test_average_precision_by_hand_pooled_and_per_video():
    # Video 1 ranks present, absent, present: precision 1 at the first, 2/3 at the second hit. Video 2: absent, present.
    truth = {"v1": column(1, 0, 1), "v2": column(0, 1)}
    scores = {"v1": column(0.9, 0.8, 0.7), "v2": column(0.95, 0.1)}
    result = evaluate_tools(truth, scores, ("Hook",))
    first, second = 100 * (1 + 2 / 3) / 2, 100 * 1 / 2
    assert result["per_video"]["v1"] == {"map": pytest.approx(first), "ap": {"Hook": pytest.approx(first)}}
    assert result["map_video"] == pytest.approx((first + second) / 2)
    # Pooled order .95 absent, .9 present, .8 absent, .7 present, .1 present: 1/2, 2/4, 3/5.
    assert result["map_pooled"] == pytest.approx(100 * (1 / 2 + 2 / 4 + 3 / 5) / 3)
    hook = result["per_tool"]["Hook"]
    assert hook["ap_video"]["std"] == pytest.approx(np.std([first, second], ddof=1))
    assert (hook["present"], hook["frames"], hook["videos"]) == (3, 5, 2)
    assert result["about"]["videos"] == 2


def test_tool_absent_from_a_video_is_left_out_there_and_unlabelled_frames_everywhere():
    truth = {"v1": np.array([[1, 0], [0, 0], [-1, -1]]), "v2": np.array([[0, 1], [1, 0], [-1, -1]])}
    scores = {
        "v1": np.array([[0.9, 0.9], [0.1, 0.2], [np.nan, np.inf]]),
        "v2": np.array([[0.3, 0.6], [0.2, 0.5], [1, 1]]),
    }
    result = evaluate_tools(truth, scores, TOOLS)
    assert result["per_video"]["v1"] == {"map": 100, "ap": {"Grasper": 100, "Hook": None}}
    assert result["per_tool"]["Hook"]["ap_video"] == {"mean": 100, "std": None}
    assert result["per_tool"]["Hook"]["videos"] == 1
    assert result["per_tool"]["Grasper"]["ap_video"]["mean"] == 75
    assert result["map_video"] == pytest.approx((75 + 100) / 2)
    assert result["per_tool"]["Hook"]["frames"] == 4


def test_tool_that_never_appears_has_no_number_and_no_weight():
    truth, scores = {"v": np.array([[1, 0], [0, 0]])}, {"v": np.array([[0.9, 0.9], [0.1, 0.2]])}
    result = evaluate_tools(truth, scores, TOOLS, dict.fromkeys(TOOLS, 0.5))
    assert result["per_tool"]["Hook"]["ap_pooled"] is None
    assert result["per_tool"]["Hook"]["precision"] is None
    assert result["per_tool"]["Hook"]["f1"] is None
    assert result["map_pooled"] == result["map_video"] == 100
    assert result["at_threshold"] == {"precision": 100, "recall": 100, "f1": 100}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_video_without_tool_labels_is_left_out_and_named():
    truth = {"v1": column(1, 0), "v2": column(-1, -1)}
    result = evaluate_tools(truth, {"v1": column(0.6, 0.4), "v2": column(0.5, 0.5)}, ("Hook",))
    assert list(result["per_video"]) == ["v1"]
    assert result["about"]["videos_without_labels"] == ["v2"]


def test_threshold_scores_by_hand():
    truth, scores = {"v": column(1, 1, 0, 0, 1)}, {"v": column(0.9, 0.4, 0.6, 0.1, 0.7)}
    hook = evaluate_tools(truth, scores, ("Hook",), {"Hook": 0.5})["per_tool"]["Hook"]
    assert hook["threshold"] == 0.5
    assert hook["precision"] == hook["recall"] == hook["f1"] == pytest.approx(200 / 3)
    hook = evaluate_tools(truth, scores, ("Hook",), {"Hook": 0.4})["per_tool"]["Hook"]
    assert (hook["precision"], hook["recall"]) == (pytest.approx(75), 100)
    nothing = evaluate_tools(truth, scores, ("Hook",), {"Hook": 2.0})["per_tool"]["Hook"]
    assert (nothing["precision"], nothing["recall"], nothing["f1"]) == (None, 0, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**16), st.integers(2, 40))
def test_pooled_equals_scikit_learn_and_chosen_thresholds_are_the_best(seed, frames):
    rng = np.random.default_rng(seed)
    truth = {"v1": rng.integers(0, 2, (frames, 2)), "v2": rng.integers(0, 2, (5, 2))}
    truth["v1"][0] = 1
    scores = {name: rng.random(labels.shape).round(1) for name, labels in truth.items()}  # rounded: ties
    result = evaluate_tools(truth, scores, TOOLS)
    labels, values = (np.concatenate(list(part.values())) for part in (truth, scores))
    assert result["map_pooled"] == pytest.approx(100 * average_precision_score(labels, values))
    chosen = choose_thresholds(truth, scores, TOOLS)
    for k, tool in enumerate(TOOLS):
        f1 = {limit: f1_score(labels[:, k], values[:, k] >= limit) for limit in np.unique(values[:, k])}
        assert f1[chosen[tool]] == pytest.approx(max(f1.values()))
        at_best = evaluate_tools(truth, scores, TOOLS, chosen)
        assert at_best["per_tool"][tool]["f1"] == pytest.approx(100 * max(f1.values()))


def test_perfect_scores_are_100_and_logits_give_the_same_as_probabilities():
    truth = {"v1": np.array([[1, 0], [0, 1], [1, 1]]), "v2": np.array([[0, 1], [1, 0]])}
    perfect = evaluate_tools(truth, truth, TOOLS, choose_thresholds(truth, truth, TOOLS))
    assert perfect["map_pooled"] == perfect["map_video"] == perfect["at_threshold"]["f1"] == 100
    logits = {name: np.random.default_rng(0).normal(size=labels.shape) for name, labels in truth.items()}
    probabilities = {name: 1 / (1 + np.exp(-values)) for name, values in logits.items()}
    assert evaluate_tools(truth, logits, TOOLS) == evaluate_tools(truth, probabilities, TOOLS)


def test_threshold_of_a_tool_that_never_appears_in_validation():
    assert choose_thresholds({"v": column(0, 0)}, {"v": column(0.1, 0.9)}, ("Hook",)) == {"Hook": 0.5}


@pytest.mark.parametrize(
    ("truth", "scores", "message"),
    [
        ({"v1": column(1, 0)}, {}, "v1: has no tool scores"),
        ({"v1": column(1, 0)}, {"v1": column(1, 0), "v2": column(1)}, "v2: has no tool labels"),
        ({"v1": column(1, 0)}, {"v1": column(1, 0, 1)}, r"v1: tool labels \(2, 1\) and scores \(3, 1\)"),
        ({"v1": column(1, 2)}, {"v1": column(1, 0)}, "v1: tool labels must be 1, 0 or -1"),
        ({"v1": column(1, 0)}, {"v1": column(np.nan, 0)}, "v1: tool scores contain NaN"),
        ({"v1": column(-1, -1)}, {"v1": column(1, 0)}, "no video has tool labels"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_line(truth, scores, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluate_tools(truth, scores, ("Hook",))
    assert "\n" not in str(caught.value)
