"""Percentiles of durations in constant memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from live.latency import Durations, Latencies


@given(st.lists(st.floats(1e-5, 1000), min_size=1, max_size=300))
def test_percentiles_are_those_of_all_durations(seconds: list[float]) -> None:
    durations = Durations()
    for one in seconds:
        durations.add(one)
    found = durations.to_json()
    assert found["count"] == len(seconds)
    assert found["max_ms"] == pytest.approx(1000 * max(seconds), abs=1e-3)
    for percent in (50, 95, 99):
        exact = 1000 * np.quantile(seconds, percent / 100, method="inverted_cdf")
        assert found[f"p{percent}_ms"] == pytest.approx(exact, rel=0.006, abs=1e-3)


def test_extremes_are_counted() -> None:
    durations = Durations()
    for one in (0.0, 1e-12, 1e9):
        durations.add(one)
    assert durations.to_json()["count"] == 3


def test_the_table_has_the_parts_that_occurred() -> None:
    latencies = Latencies(("head", "decoding"))
    latencies.add("head", 0.0123)
    assert list(latencies.to_json()) == ["head"]
    assert latencies.lines()[1].split() == ["head", "12.3", "12.3", "12.3", "12.3"]
