"""Viterbi, filter and smoother against the enumeration of all paths."""

from __future__ import annotations

from itertools import groupby, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage2_temporal.decoding.graph import TransitionGraph, learn_graph
from stage2_temporal.decoding.inference import Chains, Viterbi, filtered, smoothed

FPS = 1.0


def graph_of(rng: np.random.Generator, classes: int) -> TransitionGraph:
    """A graph learnt from random labels with segments of at least 4 frames."""
    labels = [np.repeat(rng.integers(0, classes, 6), rng.integers(4, 9, 6)) for _ in range(3)]
    return learn_graph(labels, classes, FPS)


def paths_with_minimum(graph: TransitionGraph, frames: int, minimum: int) -> dict[tuple[int, ...], float]:
    """The log-probability of each path of T frames; segments but the first and the last have the minimum duration.

    A first segment may have begun anywhere in its minimum before the recording.
    """
    classes = len(graph.initial)
    chain = graph.chain_frames(float(minimum), FPS)
    leave = graph.leaving(FPS, chain)
    found = {}
    for path in product(range(classes), repeat=frames):
        lengths = [(own, len(list(group))) for own, group in groupby(path)]
        best = -np.inf
        for before in range(chain[path[0]]):  # frames of the first segment before the recording
            total = np.log(graph.initial[path[0]] / chain[path[0]])
            for at, (own, length) in enumerate(lengths):
                length += before if at == 0 else 0
                ends = at + 1 < len(lengths)
                if ends and length < chain[own]:
                    total = -np.inf
                    break
                total += max(0, length - chain[own]) * np.log1p(-leave[own])
                if ends:
                    total += np.log(leave[own] * graph.following[own][lengths[at + 1][0]])
            best = max(best, total)
        found[path] = best
    return found


@given(st.integers(0, 10_000), st.sampled_from([(2, 7), (3, 6)]), st.integers(1, 3), st.sampled_from([0, 1, 3, None]))
@settings(max_examples=12, deadline=None)
def test_viterbi_finds_the_best_of_all_paths(seed: int, size: tuple[int, int], minimum: int, lag: int | None) -> None:
    rng, (classes, frames) = np.random.default_rng(seed), size
    graph = graph_of(rng, classes)
    emissions = rng.normal(0, 2, (frames, classes))
    priors = {n: paths_with_minimum(graph, n, minimum) for n in range(1, frames + 1)}

    def best(known: int) -> tuple[int, ...]:
        """The best path of the first `known` frames."""
        scores = {
            path: prior + sum(emissions[t, own] for t, own in enumerate(path)) for path, prior in priors[known].items()
        }
        return max(scores, key=scores.__getitem__)

    wait = frames if lag is None else lag
    expected = [best(min(t + wait + 1, frames))[t] for t in range(frames)]
    viterbi = Viterbi(Chains.of(graph, FPS, float(minimum)), lag)
    found = [one for t in range(frames) if (one := viterbi.step(emissions[t][None])) is not None]
    assert len(found) == max(0, frames - wait)
    assert [int(one[0]) for one in (*found, *viterbi.finish())] == expected


@given(st.integers(0, 10_000))
@settings(max_examples=3, deadline=None)
def test_filter_and_smoother_are_the_posteriors_of_all_paths(seed: int) -> None:
    rng, classes, frames = np.random.default_rng(seed), 3, 5
    graph, emissions = graph_of(rng, 3), rng.normal(0, 2, (5, 2, 3))
    past = filtered(graph, FPS, emissions)
    every = smoothed(graph, FPS, emissions, past)
    matrix = graph.matrix(FPS)
    for video in range(2):
        for t in range(frames):
            for known, found in ((t + 1, past), (frames, every)):
                weights = np.zeros(classes)
                for path in product(range(classes), repeat=known):
                    steps = np.prod([matrix[a, b] for a, b in pairwise(path)])
                    evidence = np.exp(sum(emissions[k, video, own] for k, own in enumerate(path)))
                    weights[path[t]] += graph.initial[path[0]] * steps * evidence
                np.testing.assert_allclose(found[t, video], weights / weights.sum(), rtol=1e-9)


def test_sequences_in_parallel_are_decoded_as_alone() -> None:
    rng = np.random.default_rng(0)
    graph, emissions = graph_of(rng, 4), rng.normal(0, 1, (60, 3, 4))
    chains = Chains.of(graph, FPS, 3.0)

    def labels(values: np.ndarray) -> np.ndarray:
        viterbi = Viterbi(chains, 4, values.shape[1])
        found = [one for frame in values if (one := viterbi.step(frame)) is not None]
        return np.array(found + viterbi.finish())

    alone = [labels(emissions[:, [at]])[:, 0] for at in range(3)]
    np.testing.assert_array_equal(labels(emissions), np.stack(alone, axis=1))


def test_long_videos_do_not_underflow() -> None:
    graph = graph_of(np.random.default_rng(0), 3)
    viterbi, emission = Viterbi(Chains.of(graph, FPS, 2.0), 2), np.array([[0.0, -50.0, -80.0]])
    for _ in range(2000):
        decided = viterbi.step(emission)
    assert decided is not None
    assert decided[0] == 0
    other = np.array([[-80.0, -50.0, 0.0]])  # and still follows what it sees
    assert [int(one[0]) for _ in range(6) if (one := viterbi.step(other)) is not None][-1] == 2


@pytest.mark.parametrize("fps", [0.5, 1.0, 25.0])
def test_a_graph_keeps_its_durations_in_seconds_at_every_rate(fps: float) -> None:
    graph = learn_graph([np.repeat([0, 1, 2], [600, 300, 900])], 3, 1.0)
    for minimum in (0.0, 20.0):
        chain = graph.chain_frames(minimum, fps)
        mean_frames = chain - 1 + 1 / graph.leaving(fps, chain)
        np.testing.assert_allclose(mean_frames[:2] / fps, [600, 300], rtol=1e-9)
    np.testing.assert_allclose(graph.matrix(fps).sum(axis=1), 1)


def test_a_graph_counts_what_the_labels_show() -> None:
    videos = [np.array([-1, 0, 0, -1, 0, 1, 1, 1, 2, 2]), np.array([0, 1, 1, 2, 1, 1, 2, 2])]
    graph = learn_graph([*videos, np.full(5, -1)], 4, 0.5)
    assert graph.shortest_s == (2.0, 4.0, 2.0, 0.0)
    assert graph.mean_s[:2] == ((3 + 1) / 2 / 0.5, (3 + 2 + 2) / 3 / 0.5)
    assert graph.initial == pytest.approx((2.1 / 2.4, 0.1 / 2.4, 0.1 / 2.4, 0.1 / 2.4))
    assert graph.following[0] == pytest.approx((0, 2.1 / 2.3, 0.1 / 2.3, 0.1 / 2.3))
    assert graph.following[1] == pytest.approx((0.1 / 3.3, 0, 3.1 / 3.3, 0.1 / 3.3))
    assert graph.chain_frames(60.0, 0.5).tolist() == [1, 2, 1, 1]


@pytest.mark.parametrize("labels", [[], [np.full(3, -1)], [np.zeros(1, int)]])
def test_too_few_labels_still_give_a_graph(labels: list[np.ndarray]) -> None:
    for classes in (1, 3):
        graph = learn_graph(labels, classes, 1.0)
        graph.require_classes(classes)
        viterbi = Viterbi(Chains.of(graph, 1.0, 5.0), 0)
        decided = [viterbi.step(np.zeros((1, classes))) for _ in range(3)]
        assert all(one is not None and 0 <= one[0] < classes for one in decided)
