"""Dataclasses of results, and their JSON form (docs/evaluation.md, "JSON").

`evaluate_phases` returns one `PhaseResults` per convention, and `evaluate_tools` returns a `ToolResults`. An
`Evaluation` is the content of a run's `metrics.json`. All numbers are in percent, unless `unit` says
otherwise. Undefined numbers are None, since JSON has no NaN. The fields are the keys in the files, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, one_line
from engine.files import read_json
from engine.records import FLAT, Record

METRICS_FILE = "metrics.json"
HEAD = "temporal"  # of the heads in a `metrics.json`, the one whose predictions are also written to files
OFFLINE = "offline"  # the mark of predictions that depend on all later frames
UNDECODED = "undecoded"  # the same head without decoding, if its predictions are decoded


def json_number(value: float | np.floating[Any]) -> float | None:
    """Convert a number to a plain float, or to None if it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Score(Record):
    """A mean and a sample standard deviation (n - 1), which is None for a single value."""

    mean: float | None
    std: float | None

    @classmethod
    def of(cls, mean: float | NDArray[np.float64], spread: NDArray[np.float64]) -> Score:
        """Build a score from a mean and the values `spread` (n,), whose standard deviation is computed without NaN."""
        known = spread[np.isfinite(spread)]
        return cls(json_number(float(mean)), json_number(known.std(ddof=1)) if len(known) > 1 else None)


@dataclass(frozen=True)
class PooledScore(Score):
    """A score averaged over videos, and the same metric computed on all videos pooled."""

    pooled: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the keys in the order pooled, mean, std."""
        return {"pooled": self.pooled, **Score(self.mean, self.std).to_json()}

    @classmethod
    def _by_field(cls, tree: Any) -> Any:
        return tree  # without `pooled` it is a plain `Score`


@dataclass(frozen=True)
class Interval(Record):
    """A mean and the two ends of its interval, which are None for a single video."""

    mean: float | None
    low: float | None
    high: float | None


# ---------------------------------------------------------------------------------------------- phases


@dataclass(frozen=True)
class OnePhase(Record):
    """Results of one phase: mean and standard deviation of each metric over the `videos` that have the phase."""

    scores: Mapping[str, Score] = field(metadata=FLAT)
    videos: int


@dataclass(frozen=True, kw_only=True)
class PhaseAbout(Record):
    """The rules that a result's numbers follow, and the data from which they were computed.

    `background` names the phases that segmental metrics ignored. `offline` is true if predictions depend on all
    later frames, and None if they do not or if it is not known. `decoding` is the mode in which they are decoded, with
    its lag; None if they are not. For predictions of other programs, `files` records what was
    read.
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
    offline: bool | None = None
    decoding: str | None = None
    files: Mapping[str, Any] | None = field(default=None, metadata=FLAT)

    @property
    def mark(self) -> str | None:
        """What a name in a table must say of the predictions: that they are offline, and how they are decoded."""
        marks = [*([OFFLINE] if self.offline else []), *([self.decoding] if self.decoding else [])]
        return ", ".join(dict.fromkeys(marks)) or None


@dataclass(frozen=True, kw_only=True)
class PhaseResults(Record):
    """The results of phase recognition under one convention.

    `scores` are the results over all videos, accuracy first, including scores that only this convention has.
    `per_phase` is None if frames are not counted for each phase. `per_video` is {video: {metric: number}}, and
    includes counts, such as of frames. `intervals` are 95 % bootstrap intervals over videos.
    """

    scores: Mapping[str, PooledScore | Score | float | None] = field(metadata=FLAT)
    per_phase: Mapping[str, OnePhase] | None = None
    per_video: Mapping[str, Mapping[str, int | float | None]]
    about: PhaseAbout
    intervals: Mapping[str, Interval] | None = None

    @property
    def of_frames(self) -> bool:
        """Whether frames are counted for each phase."""
        return self.per_phase is not None

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics: accuracy and those per phase or, without these, all scores with a mean."""
        per_phase = next(iter((self.per_phase or {}).values()), None)
        return ["accuracy", *per_phase.scores] if per_phase else [m for m in self.scores if self.score(m)]

    def score(self, metric: str) -> Score | None:
        """Return mean and standard deviation of a metric, or None if the results do not contain it."""
        found = self.scores.get(metric)
        return found if isinstance(found, Score) else None


ByConvention = Mapping[str, PhaseResults]


# ---------------------------------------------------------------------------------------------- tools


@dataclass(frozen=True)
class ThresholdScores(Record):
    """Precision, recall and F1 at a threshold, over the frames of all videos pooled."""

    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class OneTool(Record):
    """Results of one tool: average precision, on pooled frames and as a mean over `videos`.

    `frames` is the number of labelled frames, and `present` the number of those that show the tool. If a `threshold`
    was given, there are scores at the threshold.
    """

    ap_pooled: float | None
    ap_video: Score
    videos: int
    present: int
    frames: int
    threshold: float | None = None
    at_threshold: ThresholdScores | None = field(default=None, metadata=FLAT)


@dataclass(frozen=True)
class ToolVideo(Record):
    """Results of one video: the average precision of each tool, and their mean (mAP)."""

    map: float | None
    ap: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class ToolAbout(Record):
    """The rules that tool results follow, and their data, as `PhaseAbout` for phases."""

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
class ToolMetricResults(Record):
    """Results of one registered metric: means over tools on pooled frames and over videos, and each tool's."""

    pooled: float | None
    video: float | None
    per_tool: Mapping[str, PooledScore]


@dataclass(frozen=True, kw_only=True)
class ToolResults(Record):
    """Results of tool recognition: mAP on pooled frames and over videos.

    `at_threshold` contains means over the tools that appear, and `metrics` the results of metrics that plug-ins have
    registered, or None without such metrics.
    """

    map_pooled: float | None
    map_video: float | None
    per_tool: Mapping[str, OneTool]
    per_video: Mapping[str, ToolVideo]
    at_threshold: ThresholdScores | None = None
    metrics: Mapping[str, ToolMetricResults] | None = None
    about: ToolAbout


# ---------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True, kw_only=True)
class JointDetails(Record):
    """What an evaluation records about a joint net.

    `checkpoint` is the net's file. `imported` or `fine_tuned_from` is the other program's file that the net or its
    initial weights come from. `inference`, `crops` and `precision` say how the net was run. `mapped_tools` are the
    results of the tools that are derived from its phase branch, and `gap_nats` is their divergence from the tool
    branch.
    """

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

    `phases` is {head: {convention: results}}, where `temporal` is the head of the run's own predictions. `scored` and
    `videos_without_labels` have the keys "phases" and "tools", with lists of video ids. `left_out` contains the index's
    records of videos left out. `encoder` is the encoder that made the features, or None for a net that reads frames.
    `mapping` has the name of a mapping of classes and its effect, if one was used. `simulated` is None in files of
    versions that did not record it. `tracks` has the results of additional label tracks, in the form of `phases`; None
    for a run that recognises phases only. `tool_probe` has C, validation mAP (a fraction) and the hash of the linear
    probe of the features that recognised the tools; None for tools of the net itself. `decoding` says how the
    predictions of `temporal` were decoded, beside which there is then the head `undecoded`; None if they were not.
    `tool_smoothing_s` is the time over which the probabilities of tools were averaged; None for single frames.
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
    tracks: Mapping[str, Mapping[str, ByConvention]] | None = None
    mapping: Mapping[str, Any] | None = None
    tool_probe: Mapping[str, Any] | None = None
    decoding: Mapping[str, Any] | None = None
    tool_smoothing_s: float | None = None
    joint: JointDetails | None = field(default=None, metadata=FLAT)

    @classmethod
    def _by_field(cls, tree: Any) -> Any:
        """Return the values of the fields in a JSON object, ignoring unknown keys, which a later version may write."""
        known = {one.name for one in (*fields(cls), *fields(JointDetails))}
        own = {key: value for key, value in tree.items() if key in known} if isinstance(tree, Mapping) else tree
        return super()._by_field(own)

    def of_track(self, name: str) -> Evaluation:
        """The results of an additional label track in place of those of the phases, without tools."""
        scored = {"phases": self.scored.get(name, ()), "tools": ()}
        without = {"phases": self.videos_without_labels.get(name, ()), "tools": ()}
        phases = (self.tracks or {}).get(name, {})
        return replace(
            self, scored=scored, videos_without_labels=without, phases=phases, tools=None, tracks=None, joint=None
        )

    @property
    def offline(self) -> bool:
        """Whether the run's own head depends on all later frames."""
        return any(result.about.offline for result in self.phases.get(HEAD, {}).values())

    @property
    def mark(self) -> str | None:
        """The mark of the run's own head (`PhaseAbout.mark`)."""
        return next((result.about.mark for result in self.phases.get(HEAD, {}).values()), None)

    @property
    def imported(self) -> str | None:
        """The other program's file from which the net was imported, or None."""
        return self.joint.imported if self.joint else None

    @property
    def fine_tuned_from(self) -> str | None:
        """The other program's file from which the net's training started, or None."""
        return self.joint.fine_tuned_from if self.joint else None

    @property
    def tasks(self) -> str:
        """The branches of the net: `both`, `phase` or `tool`."""
        return self.joint.tasks if self.joint else "both"

    @property
    def decoding_words(self) -> str | None:
        """How the phases were decoded, and how far a decision looks ahead, in words; None without decoding."""
        if self.decoding is None:
            return None
        mode, lag = self.decoding.get("mode"), self.decoding.get("lag_s")
        if mode == "causal":
            words = f"decoded causally, with a lag of {lag:g} s" if lag else "decoded causally, without a lag"
            heads = self.phases.get(UNDECODED, {}).values()
            return words + (", after a head that looks into the future" if any(o.about.offline for o in heads) else "")
        known = {
            "calibrated": "not decoded, with calibrated probabilities",
            "filter": "decoded by a forward filter",
            "offline": "decoded offline, from whole videos",
        }
        return known.get(str(mode), f"decoded ({mode})")

    @property
    def scored_words(self) -> str:
        """Describe how many videos were scored: `2 videos`, or a number for each task if they differ."""
        results = {"phases": self.phases, "tools": self.tools, **(self.tracks or {})}
        counts = {task: len(ids) for task, ids in self.scored.items() if results.get(task)}
        if len(set(counts.values())) < 2:
            return counted(next(iter(counts.values()), len(self.videos)), "video")
        return " and ".join(f"{task} of {counted(count, 'video')}" for task, count in counts.items())

    @property
    def left_out_lines(self) -> list[str]:
        """Return lines about videos that are not scored: one per video left out, one per task for missing labels."""
        lines = [f"{video['id']}: {video['reason']}" for video in self.left_out]
        return lines + [
            f"{', '.join(ids)}: no labels of {task}" for task, ids in self.videos_without_labels.items() if ids
        ]


def marked(name: str, mark: str | None) -> str:
    """Return a name as tables show it, with the mark of what it names, if any (`PhaseAbout.mark`)."""
    return f"{name} ({mark})" if mark else name


def decoding_mark(decoding: Mapping[str, Any] | None) -> str | None:
    """Return `PhaseAbout.decoding` of an evaluation with this `decoding`, such as `causal, lag 5 s`."""
    if decoding is None:
        return None
    return f"{decoding['mode']}, lag {decoding['lag_s']:g} s" if decoding.get("lag_s") else str(decoding["mode"])


def mark_of_seeds(name: str, seeds: Sequence[PhaseResults]) -> str | None:
    """Return the mark of a model, of which these are the results. Raises UserError if they are decoded differently."""
    found = dict.fromkeys(seed.about.decoding or "not decoded" for seed in seeds)
    if len(found) > 1:
        raise UserError(f"{name}: decoded in different ways ({'; '.join(found)}); evaluate all in the same way")
    return next((seed.about.mark for seed in seeds if seed.about.offline), seeds[0].about.mark)


def counted(number: int, noun: str) -> str:
    """Return a number with a noun in the right form: `1 video`, `2 videos`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def read_evaluation(path: Path, again: str = "run evaluate again") -> Evaluation:
    """Read a `metrics.json`. Raises UserError, with the advice `again`, if it is missing or another kind of file."""
    try:
        return Evaluation.from_json(read_json(path))
    except ValueError as error:
        raise UserError(f"{path}: not the metrics of an evaluation ({one_line(error)}); {again}") from error
