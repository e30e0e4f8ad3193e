"""Inference in a hidden Markov model: Viterbi with minimum durations and a lag, forward filter, and smoother.

All take the emissions' logarithms frame by frame, for B independent sequences in parallel, in float64. They are
normalised in each step, so that sequences may have any length.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from evaluation.metrics.counts import BoolArray, FloatArray, IntArray
from stage2_temporal.decoding.graph import TransitionGraph


@dataclass(frozen=True)
class Chains:
    """The states of a Viterbi decoder: each class is a chain of as many states as its minimum duration has frames.

    Only the last state of a chain can be kept or left. A recording may begin anywhere in a chain, and end there.
    States are numbered chain by chain: `first` and `last` (C,) are those of each class, and `of_state` (S,) is the
    class of each state. The others are logarithms: `initial` (S,), `staying` (C,), and `changing` (C, C) from the last
    state of one class to the first of another.
    """

    first: IntArray
    last: IntArray
    of_state: IntArray
    initial: FloatArray
    staying: FloatArray
    changing: FloatArray

    @classmethod
    def of(cls, graph: TransitionGraph, fps: float, min_duration_s: float) -> Chains:
        """The states at a sampling rate. The minimum duration is limited by `TransitionGraph.chain_frames`."""
        frames = graph.chain_frames(min_duration_s, fps)
        leaving, last = graph.leaving(fps, frames), frames.cumsum() - 1
        of_state = np.repeat(np.arange(len(frames)), frames)
        with np.errstate(divide="ignore"):
            return cls(
                first=last - frames + 1,
                last=last,
                of_state=of_state,
                initial=np.log(np.array(graph.initial) / frames)[of_state],
                staying=np.log1p(-leaving),
                changing=np.log(leaving[:, None] * np.array(graph.following)),
            )


class Viterbi:
    """The most probable path, of which the class of a frame is decided when `lag` further frames are known.

    With `lag` None it is decided at the end. The state is one score per state and `lag` links per class, which each
    decision follows.
    """

    def __init__(self, chains: Chains, lag: int | None, batch: int = 1) -> None:
        self._chains, self._lag = chains, lag
        self._rows = np.arange(batch)
        self._score: FloatArray | None = None  # (B, S)
        # From the second frame on: the class from which each class is entered (B, C), and whether it is kept (B, C).
        self._links: deque[tuple[IntArray, BoolArray]] = deque(maxlen=lag)
        self._waiting = 0  # frames that are not yet decided

    def step(self, emission: FloatArray) -> IntArray | None:
        """Take the log-emissions (B, C) of the next frame; the classes (B,) of the frame `lag` ago, if there is one."""
        chains = self._chains
        if self._score is None:
            score = chains.initial + emission[:, chains.of_state]
        else:
            ends = self._score[:, chains.last]  # (B, C)
            entering = ends[:, :, None] + chains.changing  # (B, from C, to C)
            origin = entering.argmax(axis=1)
            score = np.empty_like(self._score)
            score[:, 1:] = self._score[:, :-1]
            score[:, chains.first] = entering.max(axis=1)
            kept, ended = ends + chains.staying, score[:, chains.last]
            score[:, chains.last] = np.maximum(kept, ended)
            score += emission[:, chains.of_state]
            self._links.append((origin, kept > ended))
        self._score = score - score.max(axis=1, keepdims=True)
        self._waiting += 1
        if self._lag is None or self._waiting <= self._lag:
            return None
        self._waiting -= 1
        return self._path(self._lag + 1)[0]

    def finish(self) -> list[IntArray]:
        """The classes (B,) of each of the frames that are not yet decided, in order."""
        count, self._waiting = self._waiting, 0
        return self._path(count) if count else []

    def state(self) -> dict[str, Any]:
        """What the decoder remembers of the frames so far, as plain containers and arrays."""
        return {"score": self._score, "links": list(self._links), "waiting": self._waiting}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which a decoder with the same chains and lag returned."""
        self._score, self._waiting = state["score"], state["waiting"]
        self._links = deque(state["links"], maxlen=self._lag)

    def _path(self, frames: int) -> list[IntArray]:
        """The classes of the last `frames` frames on the path that is the most probable one now."""
        assert self._score is not None
        chains, states = self._chains, self._score.argmax(axis=1)
        found = [chains.of_state[states]]
        for origin, kept in islice(reversed(self._links), frames - 1):
            one = found[-1]
            stays = (states == chains.last[one]) & kept[self._rows, one]
            entered = chains.last[origin[self._rows, one]]
            states = np.where(stays, states, np.where(states == chains.first[one], entered, states - 1))
            found.append(chains.of_state[states])
        return found[::-1]


class ForwardFilter:
    """The posterior of the class of each frame, given this frame and those before it; without minimum durations."""

    def __init__(self, graph: TransitionGraph, fps: float) -> None:
        self._matrix = graph.matrix(fps)
        self._predicted = np.array(graph.initial)  # (C,) or (B, C): before the next frame is seen

    def step(self, emission: FloatArray) -> FloatArray:
        """The posterior (B, C), given the log-emissions (B, C) of the next frame."""
        weighted = self._predicted * np.exp(emission - emission.max(axis=1, keepdims=True))
        posterior: FloatArray = weighted / weighted.sum(axis=1, keepdims=True)
        self._predicted = posterior @ self._matrix
        return posterior

    def state(self) -> FloatArray:
        """What the filter remembers of the frames so far."""
        return self._predicted

    def restore(self, state: FloatArray) -> None:
        """Continue from `state`."""
        self._predicted = state


def filtered(graph: TransitionGraph, fps: float, emissions: FloatArray) -> FloatArray:
    """The posteriors (T, B, C) of `ForwardFilter` for log-emissions (T, B, C)."""
    forward = ForwardFilter(graph, fps)
    return np.stack([forward.step(one) for one in emissions])


def smoothed(graph: TransitionGraph, fps: float, emissions: FloatArray, posteriors: FloatArray) -> FloatArray:
    """The posteriors (T, B, C) given all frames, from those of the filter for the same emissions (forward-backward)."""
    matrix, found = graph.matrix(fps), posteriors.copy()
    later = np.ones_like(posteriors[0])  # (B, C), the likelihood of all later frames up to a factor
    for t in range(len(emissions) - 2, -1, -1):
        one = emissions[t + 1]
        later = (later * np.exp(one - one.max(axis=1, keepdims=True))) @ matrix.T
        later /= later.sum(axis=1, keepdims=True)
        found[t] *= later
    found /= found.sum(axis=2, keepdims=True)
    return found
