"""Tools over time: a moving average that sees the past only, the same frame by frame and as a whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics.tools import sigmoid
from stage2_temporal.decoding.tools import ToolSmoother, smoothed_tool_logits


@given(
    frames=st.integers(1, 40),
    cuts=st.lists(st.integers(1, 39), max_size=5, unique=True),
    time_s=st.floats(0.1, 100),
    seed=st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_batches_of_any_size_agree_and_later_frames_change_nothing(
    frames: int, cuts: list[int], time_s: float, seed: int
) -> None:
    p = np.random.default_rng(seed).random((frames, 3))
    whole = ToolSmoother(time_s, 0.25).step(p)
    smoother = ToolSmoother(time_s, 0.25)
    parts = [smoother.step(part) for part in np.split(p, sorted(cut for cut in cuts if cut < frames))]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(ToolSmoother(time_s, 0.25).step(p[: frames // 2 + 1]), whole[: frames // 2 + 1])
    assert (whole.min(axis=0) >= p.min(axis=0) - 1e-12).all()
    assert (whole.max(axis=0) <= p.max(axis=0) + 1e-12).all()


def test_a_step_falls_to_1_over_e_within_the_time() -> None:
    p = np.array([[1.0]] + [[0.0]] * 100)
    found = ToolSmoother(10.0, 5.0).step(p)  # 10 s at 5 frames per second
    assert found[50, 0] == pytest.approx(math.exp(-1))


def test_logits_of_videos_are_smoothed_apart_and_stay_finite() -> None:
    logits = {"a": np.array([[900.0, -900.0], [-900.0, 0.0]], np.float32), "b": np.array([[1.0, 2.0]], np.float32)}
    found = smoothed_tool_logits(logits, 4.0, 0.25)
    assert all(np.isfinite(one).all() for one in found.values())
    assert sigmoid(found["a"][1].astype(np.float64)) == pytest.approx([math.exp(-1), 0.5 * (1 - math.exp(-1))])
    assert found["b"] == pytest.approx(logits["b"])
    assert smoothed_tool_logits(logits, 0.0, 0.25)["a"] is logits["a"]
