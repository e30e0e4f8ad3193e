"""Run-length encoding."""

from itertools import groupby

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features.run_lengths import Run, runs, true_spans


@given(st.lists(st.integers(-1, 2)))
def test_runs_are_those_of_groupby_and_cover_the_track(track: list[int]) -> None:
    found = runs(np.array(track, dtype=np.int8))
    assert [(run.value, run.end - run.start) for run in found] == [(v, len(list(g))) for v, g in groupby(track)]
    assert [value for run in found for value in [run.value] * (run.end - run.start)] == track


def test_a_mask_gives_the_spans_where_it_is_true() -> None:
    assert runs(np.array([True, False])) == [Run(0, 1, True), Run(1, 2, False)]
    assert true_spans(np.array([False, True, True, False, True])) == [(1, 3), (4, 5)]
    assert true_spans(np.array([], dtype=bool)) == true_spans(np.zeros(3, dtype=bool)) == []
