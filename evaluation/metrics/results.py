"""Results as values, and their JSON (docs/evaluation.md, "JSON").

`evaluate_phases` gives one `PhaseResults` per convention, `evaluate_tools` a `ToolResults`; an `Evaluation` is the
content of a run's `metrics.json`. All numbers are in percent; None stands for what is undefined, since JSON has no NaN.
The fields are the keys of the files, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, one_line
from engine.files import read_json
from engine.records import FLAT, Record

METRICS_FILE = "metrics.json"
HEAD = "temporal"  # the head whose predictions are in files, among others in a `metrics.json`


def json_number(value: float | np.floating[Any]) -> float | None:
    """A plain float; None if there is no number."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Score(Record):
    """A mean and a sample standard deviation (n - 1); a single value has none."""

    mean: float | None
    std: float | None

    @classmethod
    def of(cls, mean: float | NDArray[np.float64], spread: NDArray[np.float64]) -> Score:
        """The mean, and the standard deviation of the known entries of `spread` (n,)."""
        known = spread[np.isfinite(spread)]
        return cls(json_number(float(mean)), json_number(known.std(ddof=1)) if len(known) > 1 else None)


@dataclass(frozen=True)
class PooledScore(Score):
    """A score over videos, and the same number over all videos pooled."""

    pooled: float | None

    def to_json(self) -> dict[str, Any]:
        """{pooled, mean, std}."""
        return {"pooled": self.pooled, **Score(self.mean, self.std).to_json()}

    @classmethod
    def _by_field(cls, tree: Any) -> Any:
        return tree  # without `pooled` it is a plain `Score`


@dataclass(frozen=True)
class Interval(Record):
    """A number and the ends of its interval; both None for a single video."""

    mean: float | None
    low: float | None
    high: float | None


# ---------------------------------------------------------------------------------------------- phases


@dataclass(frozen=True)
class OnePhase(Record):
    """One phase: mean and standard deviation of each metric over the `videos` whose truth has the phase."""

    scores: Mapping[str, Score] = field(metadata=FLAT)
    videos: int


@dataclass(frozen=True, kw_only=True)
class PhaseAbout(Record):
    """What a result's numbers are: the rules they follow, and what they were computed from.

    `background` names the phases that were left out of segments, `files` what was read (predictions of other programs).
    """

    convention: str
    title: str
    source: str
    unit: str = "percent"
    split: str | None
    fps: float | None
    window_s: float | None
    absent_phase: str
    std: str
    videos: int
    frames: int
    truth_sha256: str | None
    seeds: int = 1
    videos_without_labels: Sequence[str] = ()
    background: Sequence[str] | None = None
    files: Mapping[str, Any] | None = field(default=None, metadata=FLAT)


@dataclass(frozen=True, kw_only=True)
class PhaseResults(Record):
    """Phases under one convention.

    `scores` are the numbers over all videos, accuracy first, with those that this convention alone has. `per_phase` is
    None if segments are compared, and not frames. `per_video` is {video: {metric: number}}, counts of frames or
    segments among them. `intervals` are 95 % bootstrap intervals over videos.
    """

    scores: Mapping[str, PooledScore | Score | float | None] = field(metadata=FLAT)
    per_phase: Mapping[str, OnePhase] | None = None
    per_video: Mapping[str, Mapping[str, int | float | None]]
    about: PhaseAbout
    intervals: Mapping[str, Interval] | None = None

    @property
    def of_frames(self) -> bool:
        """Whether frames are compared, and not segments."""
        return self.per_phase is not None

    @property
    def metrics(self) -> list[str]:
        """Accuracy and the per-phase (or segmental) metrics; scores that only one convention has are excluded."""
        per_phase = next(iter((self.per_phase or {}).values()), None)
        return ["accuracy", *per_phase.scores] if per_phase else list(self.scores)

    def score(self, metric: str) -> Score | None:
        """Mean and standard deviation of a metric; None if the results do not have it."""
        found = self.scores.get(metric)
        return found if isinstance(found, Score) else None


ByConvention = Mapping[str, PhaseResults]


# ---------------------------------------------------------------------------------------------- tools


@dataclass(frozen=True)
class ThresholdScores(Record):
    """Precision, recall and F1 over the pooled frames at a threshold."""

    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class OneTool(Record):
    """One tool: average precision pooled and over `videos`; how many `frames` are labelled, and how often it is
    `present`; its scores at `threshold` where one was given."""

    ap_pooled: float | None
    ap_video: Score
    videos: int
    present: int
    frames: int
    threshold: float | None = None
    at_threshold: ThresholdScores | None = field(default=None, metadata=FLAT)


@dataclass(frozen=True)
class ToolVideo(Record):
    """One video: mean average precision over tools, and that of each tool."""

    map: float | None
    ap: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class ToolAbout(Record):
    """What the numbers are; see `PhaseAbout`, which does the same for phases."""

    unit: str = "percent"
    map_pooled: str = "average precision of each tool over the frames of all videos, then the mean over tools"
    map_video: str = "average precision of each tool a video, mean over videos, then the mean over tools"
    absent_tool: str = "a tool that never appears (in a video, or at all) has no average precision and is left out"
    std: str = "over videos (n - 1)"
    split: str | None
    fps: float | None
    videos: int
    videos_without_labels: Sequence[str]
    seeds: int = 1


@dataclass(frozen=True, kw_only=True)
class ToolResults(Record):
    """Tool presence: mAP over pooled frames and over videos; `at_threshold` is the mean over the tools that appear."""

    map_pooled: float | None
    map_video: float | None
    per_tool: Mapping[str, OneTool]
    per_video: Mapping[str, ToolVideo]
    at_threshold: ThresholdScores | None = None
    about: ToolAbout


# ---------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True, kw_only=True)
class JointDetails(Record):
    """What is recorded of a joint net: its file, the other program's file that it was `imported` or `fine_tuned_from`,
    how it was run, and the tools mapped from its phase branch with their divergence from the tool branch."""

    checkpoint: str | None
    tasks: str = "both"
    imported: str | None
    fine_tuned_from: str | None
    inference: str | None
    crops: str | None
    precision: str | None
    mapped_tools: ToolResults | None
    gap_nats: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    """The content of `metrics.json`.

    `phases` is {head: {convention: results}}; the head of a run's own predictions is `temporal`. `scored` and
    `videos_without_labels` are {"phases", "tools": video ids}, `left_out` are the index's records of videos. `encoder`
    made the features, None for a net that reads frames. `simulated` is None in files that do not say it.
    """

    split: str
    fps: float
    simulated: bool | None = None
    videos: Sequence[str]
    scored: Mapping[str, Sequence[str]] = field(default_factory=dict)
    videos_without_labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    left_out: Sequence[dict[str, Any]] = ()
    convention: str = "phase_mean"
    phases: Mapping[str, ByConvention]
    tools: ToolResults | None
    identity_sha256: str | None = None
    encoder: Mapping[str, Any] | None = None
    joint: JointDetails | None = field(default=None, metadata=FLAT)

    @classmethod
    def _by_field(cls, tree: Any) -> Any:
        """Unknown keys, which a later version may write, are ignored and do not make it a joint net."""
        known = {one.name for one in (*fields(cls), *fields(JointDetails))}
        own = {key: value for key, value in tree.items() if key in known} if isinstance(tree, Mapping) else tree
        return super()._by_field(own)

    @property
    def imported(self) -> str | None:
        """The other program's file that the net comes from."""
        return self.joint.imported if self.joint else None

    @property
    def fine_tuned_from(self) -> str | None:
        """The other program's file that the net's training started from."""
        return self.joint.fine_tuned_from if self.joint else None

    @property
    def tasks(self) -> str:
        """`both`, `phase` or `tool`: the branches of the net."""
        return self.joint.tasks if self.joint else "both"

    @property
    def scored_words(self) -> str:
        """How many videos were scored: `2 videos`, or by task if the tasks differ."""
        counts = {task: len(ids) for task, ids in self.scored.items() if getattr(self, task)}
        if len(set(counts.values())) < 2:
            return counted(next(iter(counts.values()), len(self.videos)), "video")
        return " and ".join(f"{task} of {counted(count, 'video')}" for task, count in counts.items())

    @property
    def left_out_lines(self) -> list[str]:
        """The videos that are not scored, one line each; those without labels by task."""
        lines = [f"{video['id']}: {video['reason']}" for video in self.left_out]
        return lines + [
            f"{', '.join(ids)}: no labels of {task}" for task, ids in self.videos_without_labels.items() if ids
        ]


def counted(number: int, noun: str) -> str:
    """`1 video`, `2 videos`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def read_evaluation(path: Path, again: str = "run evaluate again") -> Evaluation:
    """Read a `metrics.json`. Raises UserError if it is missing or not that, with `again` as what to do."""
    try:
        return Evaluation.from_json(read_json(path))
    except ValueError as error:
        raise UserError(f"{path}: not the metrics of an evaluation ({one_line(error)}); {again}") from error
