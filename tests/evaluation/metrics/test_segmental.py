"""Edit score and F1 at an overlap against a slow restatement of ms-tcn's evaluation, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from evaluation.metrics.segmental import OVERLAPS_PERCENT, edit_distance, edit_score, overlap_hits, segments
from tests.evaluation.in_json import evaluate_phases

tracks = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=12).map(
    lambda runs: np.repeat([p for p, _ in runs], [n for _, n in runs]).astype(np.int16)
)


@st.composite
def pairs(draw):
    truth = draw(tracks)
    predicted = np.resize(draw(tracks), len(truth))
    return truth, predicted


def slow_segments(labels) -> list[tuple[int, set[int]]]:
    """Each run as (label, frames)."""
    runs: list[tuple[int, set[int]]] = []
    for frame, label in enumerate(labels):
        if not runs or runs[-1][0] != label:
            runs.append((int(label), set()))
        runs[-1][1].add(frame)
    return runs


def slow_distance(a: list[int], b: list[int]) -> int:
    """Levenshtein by its recursive definition, memoised."""
    known: dict[tuple[int, int], int] = {}

    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        if (i, j) not in known:
            known[i, j] = min(
                distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
            )
        return known[i, j]

    return distance(len(a), len(b))


def slow_hits(predicted, truth, overlap: float) -> tuple[int, int, int]:
    """True positives, false positives and misses, segment by segment on sets of frames."""
    targets = slow_segments(truth)
    taken = [False] * len(targets)
    false = 0
    for label, frames in slow_segments(predicted):
        overlaps = [len(frames & other) / len(frames | other) * (label == name) for name, other in targets]
        best = overlaps.index(max(overlaps))
        if overlaps[best] >= overlap and not taken[best]:
            taken[best] = True
        else:
            false += 1
    return sum(taken), false, len(targets) - sum(taken)


@settings(deadline=None, max_examples=150)
@given(pairs())
def test_edit_score_equals_the_slow_one(pair):
    truth, predicted = pair
    a, b = ([label for label, _ in slow_segments(track)] for track in (predicted, truth))
    assert edit_distance(np.array(a), np.array(b)) == slow_distance(a, b)
    assert edit_score(predicted, truth) == pytest.approx(100 * (1 - slow_distance(a, b) / max(len(a), len(b))))


@settings(deadline=None, max_examples=150)
@given(pairs())
def test_overlap_hits_equal_the_slow_ones(pair):
    truth, predicted = pair
    hits, in_prediction, in_truth = overlap_hits(predicted, truth)
    for hit, percent in zip(hits, OVERLAPS_PERCENT, strict=True):
        assert (hit, in_prediction - hit, in_truth - hit) == slow_hits(predicted, truth, percent / 100)


@settings(deadline=None, max_examples=30)
@given(st.lists(pairs(), min_size=1, max_size=4))
def test_f1_pooled_over_the_corpus_and_averaged_over_videos(corpus):
    truth = {f"v{k}": pair[0] for k, pair in enumerate(corpus)}
    predicted = {f"v{k}": pair[1] for k, pair in enumerate(corpus)}
    result = evaluate_phases(truth, predicted, tuple("abcd"), 1.0, ["segmental"])["segmental"]

    def f1(counts):
        tp, fp, fn = counts
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        return 100 * 2 * precision * recall / (precision + recall) if tp else 0.0

    for percent in OVERLAPS_PERCENT:
        counts = np.array([slow_hits(predicted[v], truth[v], percent / 100) for v in truth])
        assert result[f"f1@{percent}"]["pooled"] == pytest.approx(f1(counts.sum(axis=0)))
        assert result[f"f1@{percent}"]["mean"] == pytest.approx(np.mean([f1(row) for row in counts]))
    scores = [edit_score(predicted[v], truth[v]) for v in truth]
    assert result["edit"]["mean"] == pytest.approx(np.mean(scores))


def test_segments_by_hand():
    label, start, stop = segments(np.array([2, 2, 0, 1, 1, 1]))
    assert label.tolist() == [2, 0, 1]
    assert start.tolist() == [0, 2, 3]
    assert stop.tolist() == [2, 3, 6]


def test_a_true_segment_is_hit_once_and_overlap_decides():
    # One true segment of ten frames against two predicted pieces of 4 and 5: overlaps .4 and .5, one hit at most.
    truth, predicted = np.zeros(10, int), np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 0])
    hits, in_prediction, in_truth = overlap_hits(predicted, truth)
    assert (hits, in_prediction, in_truth) == ([1, 1, 1], 3, 1)
    assert overlap_hits(np.array([0, 0, 0, 0, 1, 1, 0, 0, 0, 0]), truth)[0] == [1, 1, 0]


def test_long_noisy_sequences_stay_fast_and_exact():
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 7, 3000).astype(np.int16)
    assert edit_score(noisy, noisy) == 100
    assert edit_distance(np.arange(2000), np.arange(2000)[::2]) == 1000


def without(runs, background):
    return [run for run in runs if run[0] not in background]


@settings(deadline=None, max_examples=100)
@given(pairs(), st.sets(st.integers(0, 3), min_size=1, max_size=4))
def test_background_is_left_out_of_segments(pair, background):
    truth, predicted = pair
    left, right = (without(slow_segments(track), background) for track in (predicted, truth))
    a, b = ([label for label, _ in runs] for runs in (left, right))
    score = edit_score(predicted, truth, sorted(background))
    longest = max(len(a), len(b))
    assert np.isnan(score) if not longest else score == pytest.approx(100 * (1 - slow_distance(a, b) / longest))
    hits, in_prediction, in_truth = overlap_hits(predicted, truth, sorted(background))
    assert (in_prediction, in_truth) == (len(a), len(b))
    taken = set()
    for label, frames in left:  # at 50 %, as ms-tcn's f_score with bg_class
        overlaps = [len(frames & other) / len(frames | other) * (label == name) for name, other in right]
        best = int(np.argmax(overlaps)) if overlaps else 0
        if overlaps and overlaps[best] >= 0.5:
            taken.add(best)
    assert hits[-1] == len(taken)


def test_background_by_hand_and_in_the_result():
    # Without background A: two segments B, C against one B and one C cut in two by A, so that both halves count.
    truth, predicted = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2, 0]), np.array([0, 1, 1, 1, 1, 2, 0, 2, 2, 2])
    found = evaluate_phases({"v": truth}, {"v": predicted}, tuple("ABC"), None, ["segmental"], background=("A",))
    result = found["segmental"]
    assert result["edit"]["mean"] == pytest.approx(100 * 2 / 3)
    assert result["f1@25"]["pooled"] == pytest.approx(200 * 2 / 5)
    assert (result["per_video"]["v"]["segments_truth"], result["per_video"]["v"]["segments_predicted"]) == (2, 3)
    assert result["accuracy"]["mean"] == 70
    assert result["about"]["background"] == ["A"]


def test_a_video_of_background_alone_has_no_segments_and_does_not_count():
    truth = {"v": np.array([0, 0, 0]), "w": np.array([0, 1, 1])}
    result = evaluate_phases(truth, truth, tuple("AB"), None, ["segmental"], background=("A",))["segmental"]
    assert result["per_video"]["v"]["edit"] is None
    assert result["per_video"]["v"]["f1@10"] is None
    assert result["edit"]["mean"] == result["f1@10"]["mean"] == result["f1@10"]["pooled"] == 100
    only = evaluate_phases({"v": truth["v"]}, {"v": truth["v"]}, tuple("AB"), None, background=("A", "B"))
    assert only["segmental"]["edit"]["mean"] is only["segmental"]["f1@10"]["pooled"] is None
    with pytest.raises(UserError, match="background 'X': no such phase; choose from A, B"):
        evaluate_phases(truth, truth, tuple("AB"), None, background=("X",))
