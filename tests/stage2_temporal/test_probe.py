"""Linear probes: equal to scikit-learn's own pipeline, and independent of order, scale and threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from configs.errors import UserError
from engine.device import cpu_threads
from engine.stopping import Stopped, StopRequest
from evaluation.metrics.tools import pooled_map
from features.store import VideoFeatures
from stage2_temporal.probe import DEFAULT_C, GRID, fit_phases, fit_tools

TOOLS, PHASES = ("hook", "clipper", "bag"), ("a", "b", "c", "d")
D = 12


def a_video(seed: int, frames: int = 60) -> VideoFeatures:
    """A video whose tools and phases depend on its features, with noise; every ninth frame is unlabelled."""
    random = np.random.default_rng(seed)
    truth = np.random.default_rng(1000).normal(size=(D, len(TOOLS) + len(PHASES)))
    features = (random.normal(size=(frames, D)) * np.linspace(0.5, 3, D) + 2).astype(np.float32)
    scores = (features - 2) @ truth + random.normal(size=(frames, truth.shape[1])) * 2
    tools = (scores[:, : len(TOOLS)] > [0, 2, 4]).astype(np.int8)
    phase = scores[:, len(TOOLS) :].argmax(axis=1).astype(np.int8)
    tools[::9], phase[::9] = -1, -1
    tools[1::9, 0] = -1
    return VideoFeatures(
        np.arange(frames), np.arange(frames) / 1.0, phase, tools, features, np.full(tools.shape, np.nan, np.float32)
    )


TRAIN = {f"video{i:02}": a_video(i) for i in range(1, 7)}
VAL = {f"video{i:02}": a_video(i) for i in range(7, 10)}


def changed(videos: Mapping[str, VideoFeatures], **changes: object) -> dict[str, VideoFeatures]:
    """The videos with fields replaced; a value is called with the video."""
    return {name: replace(one, **{key: make(one) for key, make in changes.items()}) for name, one in videos.items()}


def test_tools_equal_a_plain_scikit_learn_pipeline() -> None:
    """Chosen by validation mAP, and equal to StandardScaler and LogisticRegression fitted on the labelled frames."""
    found = fit_tools(TRAIN, VAL, TOOLS)
    x = np.concatenate([video.features for video in TRAIN.values()]).astype(np.float64)
    y = np.concatenate([video.tools for video in TRAIN.values()])
    any_label = (y >= 0).any(axis=1)
    scaler = StandardScaler().fit(x[any_label])
    scores = {}
    for c in GRID:
        logits = {name: np.empty((len(video), len(TOOLS)), np.float32) for name, video in VAL.items()}
        for k in range(len(TOOLS)):
            rows = y[:, k] >= 0
            plain = LogisticRegression(C=c, max_iter=1000).fit(scaler.transform(x[rows]), y[rows, k])
            for name, video in VAL.items():
                logits[name][:, k] = plain.decision_function(scaler.transform(video.features))
        scores[c] = pooled_map({name: video.tools for name, video in VAL.items()}, logits, TOOLS)
        if c == found.c:
            for name, video in VAL.items():
                np.testing.assert_allclose(found.logits(video.features), logits[name], atol=2e-3)
    assert found.score == pytest.approx(max(scores.values()), abs=1e-6)
    assert found.c == max(GRID, key=lambda c: scores[c])


def test_phases_equal_a_plain_scikit_learn_pipeline() -> None:
    found = fit_phases(TRAIN, VAL, PHASES)
    x = np.concatenate([video.features for video in TRAIN.values()]).astype(np.float64)
    y = np.concatenate([video.phase for video in TRAIN.values()])
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=found.c, max_iter=1000)).fit(x[y >= 0], y[y >= 0])
    accuracies = []
    for video in VAL.values():
        expected = plain.predict_log_proba(video.features)
        np.testing.assert_allclose(found.log_probabilities(video.features), expected, atol=2e-3)
        accuracies.append((expected.argmax(axis=1) == video.phase)[video.phase >= 0].mean())
    assert found.score == pytest.approx(np.mean(accuracies))
    assert found.score > 0.6


@settings(max_examples=8, deadline=None)
@given(factor=st.floats(1e-3, 1e3), shift=st.floats(-10, 10), order=st.permutations(sorted(TRAIN)))
def test_scale_shift_and_order_do_not_matter(factor: float, shift: float, order: list[str]) -> None:
    """Features times a constant plus another give the same probabilities; another order of videos the same bits."""
    val = TRAIN["video01"]
    base = fit_tools(TRAIN, {}, TOOLS)
    again = fit_tools({name: TRAIN[name] for name in order}, {}, TOOLS)
    assert np.array_equal(again.logits(val.features), base.logits(val.features))
    moved = changed(TRAIN, features=lambda video: video.features * np.float32(factor) + np.float32(shift))
    other = fit_tools(moved, {}, TOOLS)
    p, q = (1 / (1 + np.exp(-one)) for one in (base.logits(val.features), other.logits(moved["video01"].features)))
    np.testing.assert_allclose(p, q, atol=1e-3)


def test_the_number_of_threads_does_not_matter() -> None:
    found = []
    for threads in (1, 3):
        with cpu_threads(threads):
            found.append([fit_tools(TRAIN, VAL, TOOLS), fit_phases(TRAIN, VAL, PHASES)])
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one.weights, other.weights)
        assert (one.c, one.score) == (other.c, other.score)


def test_tools_that_never_or_always_appear_get_constant_logits(capfd: pytest.CaptureFixture[str]) -> None:
    """Finite, low and high; the other tool is not affected."""

    def constant(video: VideoFeatures) -> np.ndarray:
        tools = video.tools.copy()
        tools[:, 1] = np.where(tools[:, 1] >= 0, 0, -1)
        tools[:, 2] = np.where(tools[:, 2] >= 0, 1, -1)
        return tools

    probe = fit_tools(changed(TRAIN, tools=constant), VAL, TOOLS)
    logits = probe.logits(VAL["video07"].features)
    assert np.ptp(logits[:, 1:], axis=0).tolist() == [0, 0]
    assert logits[0, 1] < -5
    assert logits[0, 2] > 5
    assert np.ptp(logits[:, 0]) > 1
    assert "clipper never; bag always" in capfd.readouterr().err


def test_without_validation_labels_c_is_1(capfd: pytest.CaptureFixture[str]) -> None:
    unlabelled = changed(VAL, tools=lambda v: np.full_like(v.tools, -1), phase=lambda v: np.full_like(v.phase, -1))
    for val in ({}, unlabelled):
        for fit, classes in ((fit_tools, TOOLS), (fit_phases, PHASES)):
            probe = fit(TRAIN, val, classes)
            assert (probe.c, probe.score) == (DEFAULT_C, None)
            assert "C=1" in capfd.readouterr().err


@pytest.mark.parametrize("seen", [[2], [1, 3], [0, 1, 3]])
def test_phases_that_no_training_frame_has_are_never_predicted(seen: list[int]) -> None:
    """Also if only one or two phases are left; log-probabilities stay finite and sum to 1."""
    only = changed(TRAIN, phase=lambda v: np.where(np.isin(v.phase, seen), v.phase, -1).astype(np.int8))
    probe = fit_phases(only, VAL, PHASES)
    for video in VAL.values():
        found = probe.log_probabilities(video.features)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)
        assert set(found.argmax(axis=1)) <= set(seen)
        right = (found.argmax(axis=1) == video.phase)[np.isin(video.phase, seen)]
        assert right.mean() > 0.6


def test_another_track() -> None:
    steps = changed(TRAIN, tracks=lambda v: {"steps": v.phase}, phase=lambda v: np.full_like(v.phase, -1))
    probe = fit_phases(steps, {}, PHASES, track="steps")
    assert np.array_equal(probe.weights, fit_phases(TRAIN, {}, PHASES).weights)


def test_no_labels_at_all_is_an_error() -> None:
    bare = changed(TRAIN, tools=lambda v: np.full_like(v.tools, -1), phase=lambda v: np.full_like(v.phase, -1))
    with pytest.raises(UserError, match="no training video has tool labels"):
        fit_tools(bare, VAL, TOOLS)
    with pytest.raises(UserError, match="no training video has phase labels"):
        fit_phases(bare, VAL, PHASES)


def test_a_channel_that_never_varies_does_no_harm() -> None:
    """As dead channels of a ReLU net; float16 as features are stored."""

    def dead(video: VideoFeatures) -> np.ndarray:
        features = video.features.astype(np.float16)
        features[:, 3] = 0
        return features

    probe = fit_tools(changed(TRAIN, features=dead), changed(VAL, features=dead), TOOLS)
    assert np.isfinite(probe.weights).all()
    assert np.isfinite(probe.scale).all()
    assert not probe.weights[3].any()


def test_stops_between_fits() -> None:
    stop = StopRequest()
    stop.number = 15
    with pytest.raises(Stopped):
        fit_tools(TRAIN, VAL, TOOLS, stop)
