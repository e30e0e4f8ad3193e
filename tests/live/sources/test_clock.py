"""The clock of a live source: stamps as long as they are plausible, this machine's clock otherwise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from live.sources.clock import BACK_S, LEAP_S, StreamClock


def test_stamps_are_used_from_the_first_one_on() -> None:
    clock = StreamClock(100.0)
    assert [clock.time_s(5.0 + k / 25, 50 + k / 25) for k in range(3)] == pytest.approx([100.0, 100.04, 100.08])
    assert clock.time_s(5.0, 50.2) == pytest.approx(100.0)  # late, as it says itself
    assert clock.leaps == 0


def test_a_pause_of_the_source_is_a_pause() -> None:
    clock = StreamClock(0.0)
    clock.time_s(0.0, 0.0)
    assert clock.time_s(60.0, 60.0) == 60.0


@pytest.mark.parametrize("leap_s", [-BACK_S - 0.1, LEAP_S + 1.1, 1e9, -1e9])
def test_after_a_leap_time_goes_on(leap_s: float) -> None:
    clock = StreamClock(0.0)
    clock.time_s(1000.0, 7.0)
    assert clock.time_s(1000.0 + leap_s, 8.0) == pytest.approx(1.0)
    assert clock.time_s(1000.5 + leap_s, 8.5) == pytest.approx(1.5)
    assert clock.leaps == 1


def test_another_connection_has_another_clock() -> None:
    clock = StreamClock(0.0)
    clock.time_s(10.0, 7.0)
    clock.connect()
    assert clock.time_s(10.1, 9.0) == pytest.approx(2.0)
    assert clock.leaps == 0


@given(st.lists(st.tuples(st.none() | st.floats(-1e9, 1e9), st.floats(0, 100)), max_size=30))
def test_time_never_leaps_whatever_arrives(arrivals: list[tuple[float | None, float]]) -> None:
    clock, now, latest_s = StreamClock(3.0), 0.0, 3.0
    for stamp_s, pause_s in arrivals:
        now += pause_s
        time_s = clock.time_s(stamp_s, now)
        assert latest_s - BACK_S - 1e-6 <= time_s <= latest_s + now + LEAP_S + 1e-6
        latest_s = max(latest_s, time_s)
