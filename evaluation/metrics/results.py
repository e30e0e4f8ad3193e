"""Results as values, and their JSON (docs/evaluation.md, "JSON").

`evaluate_phases` gives one `PhaseResults` per convention, `evaluate_tools` a `ToolResults`; an `Evaluation` is what a
run's `metrics.json` holds. All numbers are in percent; None stands for what is undefined, since JSON has no NaN.
`to_json` and `from_json` are the only places that know the keys of the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, one_line
from engine.files import read_json

METRICS_FILE = "metrics.json"

T = TypeVar("T", bound="Record")


class Record:
    """A dataclass that is a JSON object; an optional field (one with a default) is left out where it is None."""

    def to_json(self) -> dict[str, Any]:
        """The JSON object, its keys in the order of the fields."""
        known = {field: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {f.name: as_json(v) for f, v in known.items() if v is not None or f.default is MISSING}

    @classmethod
    def from_json(cls: type[T], tree: Mapping[str, Any]) -> T:
        """What `to_json` gave; other keys are ignored. Raises KeyError where a required one is missing."""
        found = [f for f in fields(cls) if f.name in tree or f.default is MISSING]  # type: ignore[arg-type]
        return cls(**{f.name: tree[f.name] for f in found})


def as_json(value: Any) -> Any:
    """Records, also those inside mappings and sequences, as plain JSON values."""
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def json_number(value: float | np.floating[Any]) -> float | None:
    """A plain float; None where there is no number."""
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
        return {"pooled": self.pooled, "mean": self.mean, "std": self.std}


@dataclass(frozen=True)
class Interval(Record):
    """A number and the ends of its interval; both None for a single video."""

    mean: float | None
    low: float | None
    high: float | None


def _scores(tree: Mapping[str, Any]) -> dict[str, Score]:
    found = {name: entry for name, entry in tree.items() if isinstance(entry, Mapping) and "mean" in entry}
    return {name: (PooledScore if "pooled" in one else Score).from_json(one) for name, one in found.items()}


# ---------------------------------------------------------------------------------------------- phases


@dataclass(frozen=True)
class OnePhase(Record):
    """One phase: mean and standard deviation of each metric over the `videos` whose truth has the phase."""

    scores: Mapping[str, Score]
    videos: int

    def to_json(self) -> dict[str, Any]:
        """{metric: {mean, std}, videos}."""
        return {**as_json(self.scores), "videos": self.videos}


@dataclass(frozen=True, kw_only=True)
class PhaseAbout(Record):
    """What a result's numbers are: the rules they follow, and what they were computed from.

    `background` names the phases that were left out of segments, `files` what was read for them (predictions of other
    programs).
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
    seeds: int
    videos_without_labels: Sequence[str]
    background: Sequence[str] | None = None
    files: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object; the entries of `files` are keys of it."""
        tree = super().to_json()
        return tree | tree.pop("files", {})

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> PhaseAbout:
        """What `to_json` gave, here or in an earlier version."""
        names = [field.name for field in fields(cls)]
        missing = {"split": None, "fps": None, "window_s": None, "truth_sha256": None, "seeds": 1}
        known = {**missing, "videos_without_labels": [], **{name: tree[name] for name in names if name in tree}}
        return cls(**known, files={name: tree[name] for name in tree if name not in names} or None)


@dataclass(frozen=True, kw_only=True)
class PhaseResults(Record):
    """Phases under one convention.

    `scores` are the numbers over all videos, accuracy first; `extra` are those that this convention alone has.
    `per_phase` is None where segments are compared, and not frames. `per_video` is {video: {metric: number}}, counts
    of frames or segments among them. `intervals` are 95 % bootstrap intervals over videos.
    """

    scores: Mapping[str, Score]
    f1_of_means: float | None = None
    extra: Mapping[str, Score]
    per_phase: Mapping[str, OnePhase] | None
    per_video: Mapping[str, Mapping[str, float | None]]
    about: PhaseAbout
    intervals: Mapping[str, Interval] | None = None

    @property
    def of_frames(self) -> bool:
        """Whether frames are compared, and not segments."""
        return self.per_phase is not None

    def to_json(self) -> dict[str, Any]:
        """The JSON object: every score is a key of it."""
        tree = super().to_json()
        frames = {"f1_of_means": self.f1_of_means, **tree.pop("extra"), "per_phase": tree.pop("per_phase")}
        tree.pop("f1_of_means", None)
        return tree.pop("scores") | (frames if self.of_frames else {}) | tree

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> PhaseResults:
        """What `to_json` gave."""
        names = list(tree)
        cut = names.index("f1_of_means") if "f1_of_means" in tree else len(names)
        per_phase, intervals = tree.get("per_phase"), tree.get("intervals")
        return cls(
            scores=_scores({name: tree[name] for name in names[:cut]}),
            f1_of_means=tree.get("f1_of_means"),
            extra=_scores({name: tree[name] for name in names[cut:]}),
            per_phase=None
            if per_phase is None
            else {p: OnePhase(_scores(e), e["videos"]) for p, e in per_phase.items()},
            per_video=dict(tree["per_video"]),
            about=PhaseAbout.from_json(tree["about"]),
            intervals=None if intervals is None else {m: Interval.from_json(e) for m, e in intervals.items()},
        )


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
    at_threshold: ThresholdScores | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object; the scores at the threshold are keys of it."""
        tree = super().to_json()
        return tree | tree.pop("at_threshold", {})

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> OneTool:
        """What `to_json` gave."""
        scores = {"at_threshold": ThresholdScores.from_json(tree)} if "threshold" in tree else {}
        return super().from_json({**tree, "ap_video": Score.from_json(tree["ap_video"]), **scores})


@dataclass(frozen=True)
class ToolVideo(Record):
    """One video: mean average precision over tools, and that of each tool."""

    map: float | None
    ap: Mapping[str, float | None]


@dataclass(frozen=True)
class ToolAbout(Record):
    """What the numbers are, as `PhaseAbout` says it of phases."""

    unit: str
    map_pooled: str
    map_video: str
    absent_tool: str
    std: str
    split: str | None
    fps: float | None
    videos: int
    videos_without_labels: Sequence[str]
    seeds: int


@dataclass(frozen=True, kw_only=True)
class ToolResults(Record):
    """Tool presence: mAP over pooled frames and over videos; `at_threshold` is the mean over the tools that appear."""

    map_pooled: float | None
    map_video: float | None
    per_tool: Mapping[str, OneTool]
    per_video: Mapping[str, ToolVideo]
    at_threshold: ThresholdScores | None = None
    about: ToolAbout

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> ToolResults:
        """What `to_json` gave."""
        at_threshold = tree.get("at_threshold")
        return cls(
            map_pooled=tree["map_pooled"],
            map_video=tree["map_video"],
            per_tool={tool: OneTool.from_json(entry) for tool, entry in tree["per_tool"].items()},
            per_video={video: ToolVideo.from_json(entry) for video, entry in tree["per_video"].items()},
            at_threshold=None if at_threshold is None else ThresholdScores.from_json(at_threshold),
            about=ToolAbout.from_json(tree["about"]),
        )


# ---------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class JointDetails(Record):
    """What is recorded of a joint net: its file, the other program's file that it was `imported` or `fine_tuned_from`,
    how it was run, and the tools mapped from its phase branch with their divergence from the tool branch."""

    checkpoint: str | None
    tasks: str
    imported: str | None
    fine_tuned_from: str | None
    inference: str
    crops: str
    precision: str
    mapped_tools: ToolResults | None
    gap_nats: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    """What `metrics.json` holds.

    `phases` is {head: {convention: results}}; the head of a run's own predictions is `temporal`. `scored` and
    `videos_without_labels` are {"phases", "tools": video ids}, `left_out` are the index's records of videos. `encoder`
    made the features, None for a net that reads frames. `simulated` is None in files that do not say it.
    """

    split: str
    fps: float
    simulated: bool | None
    videos: Sequence[str]
    scored: Mapping[str, Sequence[str]]
    videos_without_labels: Mapping[str, Sequence[str]]
    left_out: Sequence[dict[str, Any]]
    convention: str
    phases: Mapping[str, ByConvention]
    tools: ToolResults | None
    identity_sha256: str | None = None
    encoder: Mapping[str, Any] | None = None
    joint: JointDetails | None = None

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

    def to_json(self) -> dict[str, Any]:
        """The JSON object; what is recorded of a joint net are keys of it."""
        tree = super().to_json()
        return tree | tree.pop("joint", {})

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Evaluation:
        """What `to_json` gave, here or in an earlier version."""
        tools, mapped = (
            None if tree.get(key) is None else ToolResults.from_json(tree[key]) for key in ("tools", "mapped_tools")
        )
        joint = dict.fromkeys(field.name for field in fields(JointDetails)) | {"tasks": "both"}
        found = {key: tree[key] for key in joint if key in tree}
        earlier: dict[str, Any] = {
            "simulated": None,
            "scored": {},
            "videos_without_labels": {},
            "left_out": [],
            "convention": "phase_mean",
        }
        return super().from_json(
            {
                **earlier,
                **tree,
                "phases": {
                    head: {name: PhaseResults.from_json(result) for name, result in results.items()}
                    for head, results in tree["phases"].items()
                },
                "tools": tools,
                "joint": JointDetails(**{**joint, **found, "mapped_tools": mapped}) if found else None,
            }
        )


def read_evaluation(path: Path, again: str = "run evaluate again") -> Evaluation:
    """Read a `metrics.json`. Raises UserError where it is missing or not that, with `again` as what to do."""
    tree = read_json(path)
    try:
        return Evaluation.from_json(tree)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the metrics of an evaluation ({one_line(error)}); {again}") from error
