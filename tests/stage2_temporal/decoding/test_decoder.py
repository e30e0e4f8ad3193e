"""A decoder sees no later frame than its lag allows, and decides each frame once."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import DecodingConfig
from stage2_temporal.decoding.decoder import Decoder, decode
from stage2_temporal.decoding.fitted import TrackDecoding
from stage2_temporal.decoding.graph import learn_graph

GRAPH = learn_graph([np.repeat([0, 1, 2, 1], [30, 12, 50, 9]), np.repeat([0, 2], [25, 40])], 3, 1.0)
FITTED = TrackDecoding(
    classes=("a", "b", "c"), temperature=1.7, filter_kappa=0.3, viterbi_kappa=0.4, min_duration_s=3.0, graph=GRAPH
)
MODES = st.builds(
    DecodingConfig,
    mode=st.sampled_from(["calibrated", "filter"]),
) | st.builds(
    DecodingConfig,
    mode=st.just("causal"),
    lag_s=st.sampled_from([0.0, 1.0, 3.0, 4.0]),
    min_duration_s=st.sampled_from([None, 0.0, 8.0]),
)


def probabilities(seed: int, frames: int, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), frames).astype(np.float32)


@given(MODES, st.integers(0, 1000), st.integers(0, 40), st.integers(1, 41), st.sampled_from([0.25, 0.7, 1.0, 2.5]))
@settings(max_examples=25, deadline=None)
def test_frames_after_the_lag_change_no_decision(
    chosen: DecodingConfig, seed: int, before: int, frames: int, fps: float
) -> None:
    lag = max(n for n in range(11) if n / fps <= chosen.lag_s) if chosen.mode == "causal" else 0
    one, other = probabilities(seed, frames), probabilities(seed + 1, frames + 3)
    other[:before] = one[:before] if before <= frames else np.resize(one, (before, 3))[: len(other[:before])]
    shared = min(before, frames)
    (labels, values), (others, other_values) = (decode(FITTED, chosen, fps, p) for p in (one, other))
    assert len(labels) == len(values) == frames
    assert len(others) == frames + 3
    certain = max(0, shared - lag)
    np.testing.assert_array_equal(labels[:certain], others[:certain])
    np.testing.assert_array_equal(values[:shared], other_values[:shared])  # the filter looks at no later frame at all


@given(MODES | st.just(DecodingConfig(mode="offline")), st.integers(0, 1000), st.integers(0, 30))
@settings(max_examples=20, deadline=None)
def test_a_whole_video_is_decoded_as_frame_by_frame(chosen: DecodingConfig, seed: int, frames: int) -> None:
    given_p = probabilities(seed, frames)
    decoder, lag = Decoder(FITTED, chosen, 1.0), int(chosen.lag_s) if chosen.mode == "causal" else 0
    counts, found = [], []
    for frame in given_p:
        found += decoder.step(frame)
        counts.append(len(found))
    expected = [0] * frames if chosen.mode == "offline" else [max(0, t + 1 - lag) for t in range(frames)]
    assert counts == expected
    found += decoder.finish()
    labels, values = decode(FITTED, chosen, 1.0, given_p)
    assert [one.label for one in found] == labels.tolist()
    assert [one.probabilities.tolist() for one in found] == values.tolist()
    assert values.shape == (frames, 3)
    np.testing.assert_allclose(values.sum(axis=1), 1, rtol=1e-6)


def test_decoding_removes_flicker_and_a_temperature_changes_no_label() -> None:
    truth = np.repeat([0, 1, 2], [30, 15, 40])
    given_p = np.full((len(truth), 3), 0.2, np.float32)
    given_p[np.arange(len(truth)), truth] = 0.6
    given_p[[7, 60]] = [0.2, 0.2, 0.6], [0.6, 0.2, 0.2]
    certain = replace(FITTED, viterbi_kappa=1.0, filter_kappa=1.0)
    for mode in ("filter", "causal", "offline"):
        chosen = DecodingConfig(mode=mode, min_duration_s=None if mode == "filter" else 5.0)
        labels, _ = decode(certain, chosen, 1.0, given_p)
        changes = np.flatnonzero(np.diff(labels))
        assert labels[changes].tolist() == [0, 1]
        assert np.abs(changes - [29, 44]).max() <= (1 if mode == "offline" else 20)
    labels, values = decode(FITTED, DecodingConfig(mode="calibrated"), 1.0, given_p)
    np.testing.assert_array_equal(labels, given_p.argmax(axis=1))
    np.testing.assert_allclose(values[0], given_p[0] ** (1 / 1.7) / (given_p[0] ** (1 / 1.7)).sum(), rtol=1e-6)


def test_certain_probabilities_are_decoded_without_a_warning_and_undefined_ones_are_refused() -> None:
    certain = np.eye(3, dtype=np.float32)[[0] * 20 + [2] * 20]
    for mode in ("calibrated", "filter", "causal", "offline"):
        labels, values = decode(FITTED, DecodingConfig(mode=mode), 1.0, certain)
        assert (labels[0], labels[-1]) == (0, 2)
        assert np.isfinite(values).all()
        damaged = certain.copy()
        damaged[5, 1] = np.nan
        with pytest.raises(UserError, match="sampled frame 5: the net gave a probability that is not finite"):
            decode(FITTED, DecodingConfig(mode=mode), 1.0, damaged)


def test_the_state_does_not_grow_with_the_video() -> None:
    decoder = Decoder(replace(FITTED, min_duration_s=8.0), DecodingConfig(mode="causal", lag_s=3.0), 1.0)
    given_p, sizes = probabilities(0, 64), []
    for t in range(320):
        assert len(decoder.step(given_p[t % 64])) == (t >= 3)
        sizes.append(len(pickle.dumps(decoder)))
    assert max(sizes[8:]) <= sizes[8] + 64
    assert len(decoder.finish()) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"lag_s": -1},
        {"lag_s": 61},
        {"mode": "offline", "lag_s": 2},
        {"mode": "filter", "lag_s": 2},
        {"min_duration_s": 1e9},
        {"tool_smoothing_s": 5e-324},
        {"mode": "calibrated", "lag_s": 2},
        {"mode": "filter", "min_duration_s": 2},
    ],
)
def test_impossible_settings_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"lag_s|min_duration_s|tool_smoothing_s"):
        DecodingConfig.model_validate({"mode": "causal", **changes})
