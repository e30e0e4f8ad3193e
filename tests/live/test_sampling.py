"""Frames of a running video are sampled as those of a whole one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from features.video.times import on_screen
from live.sampling import Counts, Sampler

steps = st.one_of(st.sampled_from([1 / 25, 1 / 30, 1001 / 30000, 0.5]), st.floats(1e-4, 3))
RATES = st.sampled_from([0.5, 1.0, 3.0, 24.0, 25.0])


def chosen_of(times_s: list[float], end_s: float, fps: float) -> list[int]:
    sampler = Sampler[None](fps)
    found = [one for number, time_s in enumerate(times_s) for one in sampler.push(number, time_s, None)]
    return [one.number for one in [*found, *sampler.finish(end_s)]]


@given(st.lists(steps, min_size=1, max_size=200), RATES, st.floats(0, 1e5))
def test_frames_of_any_times_are_those_of_the_whole_video(gaps: list[float], fps: float, begin_s: float) -> None:
    times_s = begin_s + np.cumsum([0.0, *gaps])
    expected = on_screen(times_s[:-1], float(times_s[-1]), fps)
    assert chosen_of(times_s[:-1].tolist(), float(times_s[-1]), fps) == expected.tolist()


@given(st.sampled_from([23.976, 24.0, 25.0, 29.97, 30.0, 59.94]), RATES, st.integers(1, 3000))
def test_frames_at_a_constant_rate_are_those_of_the_whole_video(rate: float, fps: float, count: int) -> None:
    times_s = np.arange(count) / rate
    end_s = float(times_s[-1]) + 1 / rate
    assert chosen_of(times_s.tolist(), end_s, fps) == on_screen(times_s, end_s, fps).tolist()


def test_a_frame_at_a_sampling_time_is_chosen_when_it_arrives_and_others_with_the_next() -> None:
    sampler = Sampler[str](1.0)
    assert [one.number for one in sampler.push(0, 5.0, "a")] == [0]
    assert sampler.push(1, 5.9, "b") == []
    assert [one.picture for one in sampler.push(2, 6.1, "c")] == ["b"]
    assert [one.picture for one in sampler.push(3, 7.0, "d")] == ["d"]


def test_late_repeated_and_missing_frames_are_counted() -> None:
    sampler = Sampler[None](1.0)
    for number, time_s in enumerate([0.0, 1.0, 1.0, 0.5, 2.0, 6.0]):
        sampler.push(number, time_s, None)
    assert sampler.counts == Counts(frames=6, sampled=4, late=1, repeated=1, missed=3)


@pytest.mark.parametrize("time_s", [math.nan, math.inf])
def test_a_time_that_is_no_number_is_refused(time_s: float) -> None:
    with pytest.raises(UserError, match="frame 7: its time"):
        Sampler[None](1.0).push(7, time_s, None)


@given(st.lists(steps, min_size=2, max_size=60), RATES, st.integers(0, 50))
def test_a_restored_sampler_continues_after_the_last_chosen_frame(gaps: list[float], fps: float, cut: int) -> None:
    times_s = np.cumsum([0.0, *gaps]).tolist()
    whole = chosen_of(times_s, times_s[-1], fps)
    first, second = Sampler[None](fps), Sampler[None](fps)
    found = [one for number, time_s in enumerate(times_s[: cut + 1]) for one in first.push(number, time_s, None)]
    second.restore(first.state(found[-1].time_s))
    rest = range(found[-1].number + 1, len(times_s))
    found += [one for number in rest for one in second.push(number, times_s[number], None)]
    found += second.finish(times_s[-1])
    assert [one.number for one in found] == whole
