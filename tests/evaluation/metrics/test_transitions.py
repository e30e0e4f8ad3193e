"""Transitions: delays, missed and false ones, by hand and in random tracks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics.transitions import Transitions, changes, false_transitions_per_hour, find_transitions


def track(*parts: tuple[int, int]) -> np.ndarray:
    """A track of (phase, frames)."""
    return np.concatenate([np.empty(0, np.int16), *(np.full(frames, phase, np.int16) for phase, frames in parts)])


def found(truth: np.ndarray, predicted: np.ndarray, fps: float = 1.0) -> tuple[list[float | None], int, int]:
    """Delays (None if missed), and the numbers of predicted and of false transitions."""
    one = find_transitions(truth, predicted, fps)
    return [None if np.isnan(delay) else delay for delay in one.delays_s.tolist()], one.predicted, one.false


TRUTH = track((0, 100), (1, 100), (2, 100))


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (TRUTH, ([0, 0], 2, 0)),
        (track((0, 300)), ([None, None], 0, 0)),  # the trivial decoder: nothing false, all missed
        (track((2, 300)), ([None, None], 0, 0)),  # a phase predicted all the time is no transition
        (track((0, 104), (1, 90), (2, 106)), ([4, -6], 2, 0)),
        (track((0, 110), (1, 79), (2, 111)), ([10, -11], 2, 1)),  # 10 s late is not false, 11 s early is
        (track((0, 161), (1, 39), (2, 100)), ([None, 0], 2, 1)),  # more than 60 s late: missed, and false
        (track((0, 200), (2, 100)), ([None, 0], 1, 0)),  # a skipped phase is missed
        (track((0, 102), (1, 3), (0, 3), (1, 92), (2, 100)), ([2, 0], 4, 2)),  # the first change counts, once
        (track((0, 40), (1, 3), (0, 60), (1, 97), (2, 100)), ([3, 0], 4, 2)),  # a flicker long before is no detection
        (track((0, 95), (1, 3), (0, 5), (1, 97), (2, 100)), ([3, 0], 4, 2)),  # one-to-one: one of the two is false
        (track((1, 3), (0, 97), (1, 100), (2, 100)), ([0, 0], 3, 1)),  # the change to 0 is not in the truth
        (np.where(np.arange(300) % 10 == 3, -2, TRUTH), ([0, 0], 2, 0)),  # frames without a prediction
    ],
)
def test_by_hand(predicted, expected):
    assert found(TRUTH, predicted) == expected


def test_a_gap_of_labels_is_no_transition_but_a_change_in_it_is_not_false():
    gap = track((0, 50), (-1, 60), (1, 50))
    for at, false in ((39, 1), (40, 0), (80, 0), (120, 0), (121, 1)):
        delays, predicted, wrong = found(gap, track((0, at), (1, 160 - at)))
        assert (delays, wrong) == ([], false)
        assert predicted == (not 50 <= at < 110)  # those at frames without a label are not counted
    same = track((0, 50), (-1, 60), (0, 50))
    assert found(same, track((0, 160))) == ([], 0, 0)
    assert found(same, track((0, 70), (1, 20), (0, 70))) == ([], 0, 0)
    assert changes(gap)[0] == (50, 110, 1)


def test_phases_may_recur():
    truth = track((0, 50), (1, 50), (0, 50), (1, 50))
    assert found(truth, truth) == ([0, 0, 0], 3, 0)
    assert found(truth, track((0, 50), (1, 150))) == ([0, None, None], 1, 0)


@pytest.mark.parametrize("frames", [0, 1])
def test_no_transitions_without_two_frames(frames):
    labels = np.zeros(frames, np.int16)
    one = find_transitions(labels, labels, 1.0)
    assert (len(one.delays_s), one.predicted, one.false, one.missed) == (0, 0, 0, 0)
    none = find_transitions(labels - 1, labels, 1.0)
    assert np.isnan(none.false_per_hour)
    assert np.isnan(false_transitions_per_hour([labels - 1], [labels], 1.0))


def test_rates_are_over_the_time_with_labels():
    truth, predicted = track((0, 1800), (-1, 9000)), track((0, 900), (1, 9900))
    assert find_transitions(truth, predicted, 1.0).false_per_hour == pytest.approx(2.0)
    assert find_transitions(truth, predicted, 25.0).false_per_hour == pytest.approx(50.0)
    both = false_transitions_per_hour([truth, TRUTH], [predicted, TRUTH], 1.0)
    assert both == pytest.approx(3600 / 2100)


SEGMENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=8)


@settings(max_examples=60)
@given(segments=SEGMENTS, other=SEGMENTS, fps=st.sampled_from([0.5, 1.0, 25.0]))
def test_a_perfect_prediction_has_no_error_and_counts_are_consistent(segments, other, fps):
    truth, predicted = track(*segments), np.resize(track(*other), len(track(*segments)))
    perfect = find_transitions(truth, truth, fps)
    assert (perfect.missed, perfect.false, perfect.predicted) == (0, 0, len(perfect.delays_s))
    assert not perfect.delays_s.any()
    one = find_transitions(truth, predicted, fps)
    assert len(one.delays_s) == len(changes(truth))
    assert max(0, one.predicted - len(one.delays_s)) <= one.false <= one.predicted
    assert (np.abs(one.delays_s[~np.isnan(one.delays_s)]) <= 60.001).all()
    known = np.repeat(truth, 3), np.repeat(predicted, 3)  # the same operation at three times the rate
    assert_same(one, find_transitions(*known, 3 * fps))


def assert_same(one: Transitions, other: Transitions) -> None:
    assert (one.predicted, one.false) == (other.predicted, other.false)
    np.testing.assert_allclose(one.delays_s, other.delays_s)
    assert one.hours == pytest.approx(other.hours)


@settings(max_examples=40)
@given(phases=st.lists(st.integers(0, 3), min_size=1, max_size=6), shift=st.integers(-20, 20))
def test_delays_of_a_shifted_copy_are_the_shift(phases, shift):
    truth = track(*((phase, 45) for phase in phases))
    predicted = track((phases[0], 45 + shift), *((phase, 45) for phase in phases[1:]), (phases[-1], 45))[: len(truth)]
    one = find_transitions(truth, predicted, 1.0)
    assert (one.delays_s == shift).all()
    assert one.false == (0 if abs(shift) <= 10 else one.predicted)
