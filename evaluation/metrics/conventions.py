"""Conventions: papers compute accuracy and F1 in different ways, and each way has a name here.

A convention counts frames or segments, averages the counts, and describes its rules in words. The conventions
registered in `CONVENTIONS` can be chosen in `evaluate` and `compare`, and the report shows them. This file contains the
class of conventions that compare frames, and the three strict conventions; the others are in
files of their own. docs/evaluation.md has formulas, sources and worked examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from configs.registry import Registry
from evaluation.metrics.counts import BoolArray, FloatArray, PhasePair, PhaseTable, count, strict_right
from evaluation.metrics.results import OnePhase, PhaseAbout, PhaseResults, PooledScore, Score, json_number
from evaluation.metrics.scores import METRICS, phase_scores

MAIN_CONVENTION = "phase_mean"  # the convention used if only one number is shown

LEFT_OUT = "a phase absent from a video's truth is left out of that video, even where it is predicted"
DROPPED = f"{LEFT_OUT}; one never predicted has no precision there (0/0 is left out), and recall, Jaccard and F1 0"
OVER_PHASES = "accuracy: over videos; the rest: over phases, of their means over videos (n - 1)"

Table = TypeVar("Table")
Videos = Sequence[PhasePair]


@dataclass(frozen=True, kw_only=True)
class Convention(ABC, Generic[Table]):
    """A way of counting and averaging, with a description of its numbers.

    `absent_phase` is the rule for phases that do not occur, `std` says what the standard deviation is computed over,
    `source` is the paper or program that the convention follows, and `window_s` is the time around phase boundaries in
    which errors are accepted, in seconds. `titles` has the titles of scores that only this convention has. If it
    compares frames, these scores are shown below the table of all conventions. `unit` is that of its numbers,
    `needs_scores` says that it cannot be computed from labels alone, and `has_background` that it leaves out segments
    of the background.
    """

    title: str
    absent_phase: str
    std: str
    source: str
    window_s: float | None = None
    titles: Mapping[str, str] = field(default_factory=dict)
    unit: str = "percent"
    of_frames: ClassVar[bool] = False  # whether it averages over a table of frame counts, with numbers for each phase
    needs_scores: ClassVar[bool] = False
    has_background: ClassVar[bool] = False

    def unavailable(self, phases: Sequence[str], fps: float | None) -> str | None:
        """Return why the convention cannot be computed for these phases at this rate, and what to do; None if it can.

        `fps` is None if the rate is not known.
        """
        return None

    @abstractmethod
    def count(self, videos: Videos, classes: int, fps: float | None, background: Sequence[int]) -> Table:
        """Return the counts of each video that `means` averages; `background` has ids of phases without activity.

        Either all videos have scores or none has.
        """

    @abstractmethod
    def means(self, table: Table, weights: FloatArray) -> dict[str, FloatArray]:
        """Average over the videos, once for each row of weights: returns {metric: (B,)} in the convention's unit.

        In row b of `weights` (B, V), video v counts `weights[b, v]` times. A row of ones gives the result itself;
        random rows give a bootstrap of it (`evaluation.metrics.statistics`).
        """

    def phase_means(self, table: Table, weights: FloatArray) -> dict[str, FloatArray]:
        """Average for each phase as `means` does over all: {metric: (B, C)}; empty without such numbers."""
        return {}

    @abstractmethod
    def results(self, table: Table, videos: Videos, phases: Sequence[str], about: PhaseAbout) -> PhaseResults:
        """Return all results of the convention."""


CONVENTIONS: Registry[Convention[Any]] = Registry("convention", "surgstage.conventions")


def convention_titles() -> dict[str, str]:
    """Return the titles of all scores that are computed by a convention and are not registered metrics."""
    titles = {"accuracy": "Accuracy"}
    for name in CONVENTIONS.names():
        titles |= CONVENTIONS.find(name).titles
    return titles


def metric_title(name: str) -> str:
    """Return the title of a metric or of a convention's own score, or its name if no registered entry has a title."""
    return METRICS.find(name).title if name in METRICS.names() else convention_titles().get(name, name)


@dataclass(frozen=True, kw_only=True)
class FrameConvention(Convention[PhaseTable]):
    """A convention that averages over a (videos x phases) table of frame counts.

    `order` is the order of averaging. `phases`: each phase is averaged over videos, and then the phases are averaged.
    `videos`: each video is averaged over its phases, and then the videos are averaged. `pooled`: the frames of all
    videos are treated as one video, and its phases are averaged.

    The function `right` decides which frames of a video are right, `refuses` returns the reason for `unavailable`, and
    `extra` computes scores that only this convention has.
    """

    of_frames: ClassVar[bool] = True
    order: Literal["phases", "videos", "pooled"]
    right: Callable[[PhasePair, float | None], BoolArray] = strict_right
    refuses: Callable[[Sequence[str], float | None], str | None] | None = None
    extra: Callable[[PhaseTable], dict[str, Score]] | None = None

    def unavailable(self, phases: Sequence[str], fps: float | None) -> str | None:
        """See `Convention.unavailable`."""
        return self.refuses(phases, fps) if self.refuses else None

    def count(self, videos: Videos, classes: int, fps: float | None, background: Sequence[int]) -> PhaseTable:
        """See `Convention.count`; a phase of the background counts like any other phase."""
        return count(videos, classes, lambda video: self.right(video, fps))

    def means(self, table: PhaseTable, weights: FloatArray) -> dict[str, FloatArray]:
        """See `Convention.means`."""
        if self.order == "videos":
            scores = phase_scores(table, absent_is_zero=True)
            means = {metric: over_videos(mean_known(values, axis=1), weights) for metric, values in scores.items()}
        else:
            single = self.phase_means(table, weights)
            means = {metric: mean_known(values, axis=1) for metric, values in single.items()}
        pooled = self.order == "pooled"
        accuracy = _accuracy(table.pooled(weights)) if pooled else over_videos(_accuracy(table), weights)
        return {"accuracy": accuracy, **means}

    def phase_means(self, table: PhaseTable, weights: FloatArray) -> dict[str, FloatArray]:
        """See `Convention.phase_means`."""
        if self.order == "pooled":  # each row of weights gives one long video
            return phase_scores(table.pooled(weights), absent_is_zero=True)
        scores = phase_scores(table, absent_is_zero=self.order == "videos")
        return {metric: over_videos(values, weights) for metric, values in scores.items()}

    def results(self, table: PhaseTable, videos: Videos, phases: Sequence[str], about: PhaseAbout) -> PhaseResults:
        """See `Convention.results`."""
        once, pooled = np.ones((1, len(videos))), self.order == "pooled"
        means = {metric: float(value[0]) for metric, value in self.means(table, once).items()}
        cells = phase_scores(table.pooled(once) if pooled else table, self.order != "phases")  # (1 or V, C)
        accuracy = _accuracy(table)
        # The values over which the standard deviation is computed: those of videos (V,) or of phases (C,).
        spread = {"accuracy": np.empty(0) if pooled else accuracy}
        spread |= {m: mean_known(values, axis=int(self.order == "videos")) for m, values in cells.items()}
        per_video, extra = {"accuracy": accuracy}, self.extra(table) if self.extra else {}
        if pooled:
            per_video["balanced_accuracy"] = mean_known(phase_scores(table, absent_is_zero=False)["recall"], axis=1)
            extra |= {f"video_{m}": Score.of(float(values.mean()), values) for m, values in per_video.items()}
        else:
            per_video |= {metric: mean_known(values, axis=1) for metric, values in cells.items()}
        return PhaseResults(
            scores={
                **{metric: Score.of(mean, spread[metric]) for metric, mean in means.items()},
                "f1_of_means": _f1_of_means(means["precision"], means["recall"]),
                **extra,
            },
            per_phase={
                phase: OnePhase(
                    {m: Score.of(mean_known(values[:, c], axis=0), values[:, c]) for m, values in cells.items()},
                    int((table.truth[:, c] > 0).sum()),
                )
                for c, phase in enumerate(phases)
            },
            per_video=numbers_by_video(videos, {**per_video, "frames": table.frames}),
            about=about,
        )


for _name, _convention in {
    MAIN_CONVENTION: FrameConvention(
        title="strict, per phase over videos, then over phases",
        order="phases",
        absent_phase=DROPPED,
        std=OVER_PHASES,
        source="the averaging of the M2CAI 2016 workflow script, without relaxed boundaries",
    ),
    "video_macro": FrameConvention(
        title="strict, per video over its phases, then over videos",
        order="videos",
        absent_phase="a phase in neither truth nor prediction of a video is left out; one falsely predicted scores 0",
        std="over videos (n - 1)",
        source="scikit-learn's macro average on each video (labels in truth or prediction, zero_division=0)",
    ),
    "pooled": FrameConvention(
        title="strict, the frames of all videos as one, then over phases",
        order="pooled",
        absent_phase="a phase in neither truth nor prediction of any video is left out; one falsely predicted scores 0",
        std="over phases (n - 1); video_accuracy and video_balanced_accuracy: over videos (n - 1)",
        source="scikit-learn's macro average on the concatenated videos",
    ),
}.items():
    CONVENTIONS.register(_name, _convention)


# ------------------------------------------------------------------------------------- means of what is known


def _accuracy(table: PhaseTable) -> FloatArray:
    """Return the percentage of each video's labelled frames that are right, (V,)."""
    return np.asarray(100.0 * table.right / table.frames)


def _f1_of_means(precision: float, recall: float) -> float | None:
    """Return the harmonic mean of the averaged precision and recall, which several papers call F1."""
    return json_number(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def over_videos(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Average `values` (V, ...) over videos with `weights` (B, V), without those that are NaN.

    Returns (B, ...), with NaN where no video has a value.
    """
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray((weights @ np.where(known, values, 0.0)) / (weights @ known))


def mean_known(values: FloatArray, axis: int) -> FloatArray:
    """Return the mean along `axis` of the values that are not NaN, or NaN if all are NaN."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis) / known.sum(axis))


def numbers_by_video(videos: Videos, columns: Mapping[str, Any]) -> dict[str, dict[str, int | float | None]]:
    """Convert columns (V,) to {video: {column: number}}; counts stay integers, and NaN becomes None."""

    def number(value: Any) -> int | float | None:
        return int(value) if isinstance(value, np.integer) else json_number(value)

    return {video.id: {name: number(values[v]) for name, values in columns.items()} for v, video in enumerate(videos)}


def pooled_scores(means: Mapping[str, FloatArray], single: Mapping[str, FloatArray]) -> dict[str, PooledScore]:
    """Return the scores of a convention that pools and also averages over videos.

    `single` has the values (V,) of the videos, and `means` (from `Convention.means`, (1,)) the mean NAME over videos
    and the value NAME_pooled of all videos.
    """
    found = {name: Score.of(means[name][0], values) for name, values in single.items()}
    pooled = {name: json_number(means[f"{name}_pooled"][0]) for name in found}
    return {name: PooledScore(score.mean, score.std, pooled[name]) for name, score in found.items()}
