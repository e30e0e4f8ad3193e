"""The transition graph of a label track: which class begins, how long classes last, and which follows which.

It is learnt from the labels of training videos. Durations are in seconds, so that the graph can be used at any sampling
rate. No transition is impossible (`SMOOTHING`): after one wrong transition a causal decoder must find its way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.records import Record
from evaluation.metrics.counts import FloatArray, IntArray
from features.run_lengths import runs

SMOOTHING = 0.1  # added to each count of a first class and of a transition
LEAST_LEAVING, MOST_LEAVING = 1e-6, 0.5  # limits of the probability that a class ends with a frame


@dataclass(frozen=True, kw_only=True)
class TransitionGraph(Record):
    """The transitions of C classes.

    `initial` (C,) and `following` (C, C) are the probabilities that a video begins with a class, and that one class is
    followed by another, given that it ends; the diagonal is 0. `mean_s` and `shortest_s` (C,) are the mean and the
    shortest duration of an uninterrupted segment (0 for a class that does not occur).
    """

    initial: tuple[float, ...]
    following: tuple[tuple[float, ...], ...]
    mean_s: tuple[float, ...]
    shortest_s: tuple[float, ...]

    def require_classes(self, classes: int) -> None:
        """Raise ValueError unless all values are possible, and those of `classes` classes."""
        for one in fields(self):
            values = np.array(getattr(self, one.name), dtype=float)
            if values.shape != ((classes, classes) if one.name == "following" else (classes,)):
                raise ValueError(f"{one.name} is not of {classes} classes")
            if not (np.isfinite(values) & (values >= 0)).all():
                raise ValueError(f"{one.name} has a value that is not a number from 0 up")
        sums = np.array([sum(self.initial), *map(sum, self.following)])
        if classes == 1:
            sums[1] += 1  # the only class is never followed
        if (np.abs(sums - 1) > 1e-6).any() or np.diag(self.following).any() or not all(self.initial):
            raise ValueError("initial and following are not the probabilities of a transition graph")

    def chain_frames(self, min_duration_s: float, fps: float) -> IntArray:
        """The minimum duration (C,) in frames, at least 1: no longer than the class's shortest training segment."""
        shortest: IntArray = np.floor(np.minimum(self.shortest_s, min_duration_s) * fps + 1e-9).astype(np.int64)
        return np.maximum(shortest, 1)

    def leaving(self, fps: float, chain: IntArray) -> FloatArray:
        """The probability (C,) that a class ends with a frame, once the minimum `chain` (C,) of frames is over.

        The mean duration in seconds is then that of the training, at every rate and with every minimum.
        """
        if len(self.initial) == 1:
            return np.zeros(1)
        rest = np.array(self.mean_s) * fps - (chain - 1)
        return np.clip(1 / np.maximum(rest, 1), LEAST_LEAVING, MOST_LEAVING)

    def matrix(self, fps: float) -> FloatArray:
        """The transition matrix (C, C) from one frame to the next, without minimum durations; rows add up to 1."""
        leaving = self.leaving(fps, np.ones(len(self.initial), np.int64))
        found: FloatArray = leaving[:, None] * np.array(self.following) + np.diag(1 - leaving)
        return found


def learn_graph(labels: Sequence[NDArray[np.integer]], classes: int, fps: float) -> TransitionGraph:
    """The graph of videos with `labels` (T,) at `fps`; frames without a label (-1) are left out.

    A class that never ends, such as the last one of an operation, counts as having ended half a time. A class that does
    not occur gets the mean duration of all classes.
    """
    first, changes = np.zeros(classes), np.zeros((classes, classes))
    segments: list[list[int]] = [[] for _ in range(classes)]
    for one in labels:
        found = runs(one[one >= 0])
        for run in found:
            segments[run.value].append(run.end - run.start)
        for before, after in pairwise(found):
            changes[before.value, after.value] += 1
        first[[run.value for run in found[:1]]] += 1
    frames = np.array([sum(own) for own in segments], dtype=float)
    ended = np.maximum(changes.sum(axis=1), 0.5)
    overall = frames.sum() / max(sum(map(len, segments)), 1)
    mean = np.where(frames > 0, frames / ended, max(overall, 1.0)) / fps
    smoothed = (changes + SMOOTHING) * (1 - np.eye(classes))
    following = smoothed / np.maximum(smoothed.sum(axis=1, keepdims=True), SMOOTHING)
    return TransitionGraph(
        initial=tuple(((first + SMOOTHING) / (first + SMOOTHING).sum()).tolist()),
        following=tuple(map(tuple, following.tolist())),
        mean_s=tuple(mean.tolist()),
        shortest_s=tuple(min(own, default=0) / fps for own in segments),
    )
