"""Phase metrics under named conventions: the same words mean different computations, so each has a name.

`evaluate_phases` builds the (videos x phases) tables of `evaluation.metrics.counts` and averages them as each
convention of `CONVENTIONS` says. Every result says which convention, absent-phase rule and standard deviation it has.
Formulas, sources and worked examples: docs/evaluation.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import class_ids, folded_name
from evaluation.metrics.counts import (
    CHOLEC80_PHASES,
    RELAXED_WINDOW_S,
    FloatArray,
    LabelledVideo,
    PhaseTable,
    count,
    f1_surgformer,
    label_pairs,
    phase_scores,
    relaxed_right,
    strict_right,
)
from evaluation.metrics.segmental import OVERLAPS_PERCENT, SegmentTable, count_segments, segment_f1

METRICS = ("precision", "recall", "jaccard", "f1")

_LEFT_OUT = "a phase absent from a video's truth is left out of that video, even where it is predicted"
_DROPPED = f"{_LEFT_OUT}; one never predicted has no precision there (0/0 is left out), and recall, Jaccard and F1 0"
_OVER_PHASES = "accuracy: over videos; the rest: over phases, of their means over videos (n - 1)"


@dataclass(frozen=True)
class Convention:
    """A way of averaging, with the words that go with its numbers.

    `order` is what is averaged first: `phases` = each phase over videos, then over phases; `videos` = each video over
    its phases, then over videos; `pooled` = the frames of all videos as one, then over phases; `segments` = runs
    instead of frames.
    """

    title: str
    order: Literal["phases", "videos", "pooled", "segments"]
    absent_phase: str
    std: str
    source: str
    relaxed: bool = False
    mask_fault: bool = False


CONVENTIONS: dict[str, Convention] = {
    "phase_mean": Convention(
        "strict, per phase over videos, then over phases",
        "phases",
        _DROPPED,
        _OVER_PHASES,
        "the averaging of the M2CAI 2016 workflow script, without relaxed boundaries",
    ),
    "video_macro": Convention(
        "strict, per video over its phases, then over videos",
        "videos",
        "a phase in neither truth nor prediction of a video is left out; one falsely predicted scores 0",
        "over videos (n - 1)",
        "scikit-learn's macro average on each video (labels in truth or prediction, zero_division=0)",
    ),
    "pooled": Convention(
        "strict, the frames of all videos as one, then over phases",
        "pooled",
        "a phase in neither truth nor prediction of any video is left out; one falsely predicted scores 0",
        "over phases (n - 1); video_accuracy and video_balanced_accuracy: over videos (n - 1)",
        "scikit-learn's macro average on the concatenated videos",
    ),
    "relaxed_matlab": Convention(
        "10 s relaxed boundaries, the official script with its mask fault",
        "phases",
        _DROPPED,
        _OVER_PHASES,
        "Evaluate.m and Main.m of the M2CAI 2016 workflow challenge, Cholec80 variant",
        relaxed=True,
        mask_fault=True,
    ),
    "relaxed_fixed": Convention(
        "10 s relaxed boundaries, the official script with its mask fault fixed",
        "phases",
        _DROPPED,
        _OVER_PHASES,
        "Evaluate.m and Main.m of the M2CAI 2016 workflow challenge, early transitions applied to the last samples",
        relaxed=True,
    ),
    "segmental": Convention(
        "segments: edit score and F1 at an overlap",
        "segments",
        "not applicable: segments are compared, whatever their phase",
        "over videos (n - 1)",
        "ms-tcn's evaluation (accuracy and F1 pooled, edit a mean over videos), the mean of F1 over videos beside",
    ),
}

Table = PhaseTable | SegmentTable


def evaluate_phases(
    truth: Mapping[str, NDArray[Any]],
    predicted: Mapping[str, NDArray[Any]],
    phases: Sequence[str],
    fps: float | None,
    conventions: Sequence[str] | None = None,
    *,
    split: str | None = None,
    seeds: int = 1,
    background: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Score predicted phases against the truth.

    `truth` and `predicted` map video ids to (T,) phase ids at `fps` frames per second (None: not known); truth -1 = no
    label, and such frames are not counted; prediction NO_PREDICTION (-2) = none was made, which counts as wrong.
    `phases` (C names) gives the order of ids; those in `background` are left out of segments. `conventions` None takes
    all that phases and rate allow (see `unavailable_conventions`). `split` and `seeds` only travel into the result.

    Returns {convention: {accuracy, precision, recall, jaccard, f1: {mean, std}, f1_of_means, per_phase, per_video,
    about}}, percent, ready for JSON: what is undefined is None. Videos without any label are left out and named in
    `about`. Raises UserError for an unknown or unavailable convention and for truth and prediction that do not match.
    """
    if fps is not None and not 1e-3 <= fps <= 1e4:  # NaN fails too
        raise UserError(f"fps {fps}: the rate of the labels must be a positive number of frames a second")
    names = chosen_conventions(conventions, phases, fps)
    ids = background_ids(background, phases)
    videos, without = label_pairs(truth, predicted, len(phases))
    results = {}
    for name in names:
        table = build_table(videos, len(phases), fps, CONVENTIONS[name], ids)
        results[name] = _result(table, videos, phases, CONVENTIONS[name])
        results[name]["about"] = _about(name, videos, without, fps, split, seeds)
        if ids and isinstance(table, SegmentTable):
            results[name]["about"]["background"] = list(background)
    return results


def background_ids(background: Sequence[str], phases: Sequence[str]) -> list[int]:
    """Ids of the phases named in `background`. Raises UserError for a name that is not among them."""
    known = class_ids(phases, {})
    for name in background:
        if folded_name(name) not in known:
            raise UserError(f"background {name!r}: no such phase; choose from {', '.join(phases)}")
    return [known[folded_name(name)] for name in background]


def unavailable_conventions(phases: Sequence[str], fps: float | None = 1.0) -> dict[str, str]:
    """Conventions that these phases or an unknown rate do not allow: why, and what to do."""
    if tuple(map(folded_name, phases)) != tuple(map(folded_name, CHOLEC80_PHASES)):
        reason = (
            "the official script has rules for Cholec80's seven phases in their usual order only; leave it out for "
            "this data set"
        )
    elif fps is None:
        reason = (
            f"its window of {RELAXED_WINDOW_S:g} s needs the rate of the rows, which the files leave open; add --fps"
        )
    else:
        return {}
    return {name: reason for name, convention in CONVENTIONS.items() if convention.relaxed}


def majority_phase(train_truths: Sequence[NDArray[Any]]) -> int:
    """The phase with most labelled frames in the training videos ((T,) ids, -1 = no label), the lowest id on a tie."""
    labels = np.concatenate([np.asarray(track).ravel() for track in train_truths] or [np.empty(0, np.int8)])
    labels = labels[labels >= 0]
    if not labels.size:
        raise UserError("no training video has phase labels, so there is no majority phase; check the split")
    return int(np.bincount(labels.astype(np.int64)).argmax())


def chosen_conventions(conventions: Sequence[str] | None, phases: Sequence[str], fps: float | None) -> list[str]:
    """The conventions asked for, checked; all that can be computed for `phases` at `fps` where None is asked for."""
    unavailable = unavailable_conventions(phases, fps)
    if conventions is None:
        return [name for name in CONVENTIONS if name not in unavailable]
    for name in conventions:
        if name not in CONVENTIONS:
            raise UserError(f"unknown convention {name!r}; choose from {', '.join(CONVENTIONS)}")
        if name in unavailable:
            raise UserError(f"convention {name}: {unavailable[name]}")
    return list(dict.fromkeys(conventions))


# ------------------------------------------------------------------------------------- tables and their means


def build_table(
    videos: Sequence[LabelledVideo],
    classes: int,
    fps: float | None,
    convention: Convention,
    background: Sequence[int] = (),
) -> Table:
    """The counts that `convention` averages, one row per video; `background` (ids) is left out of segments."""
    if convention.order == "segments":
        return count_segments(videos, background)
    if convention.relaxed and fps is not None:
        return count(videos, classes, lambda video: relaxed_right(video, fps, convention.mask_fault))
    return count(videos, classes, strict_right)


def weighted_means(table: Table, convention: Convention, weights: FloatArray) -> dict[str, FloatArray]:
    """The convention's numbers with video v counted `weights[b, v]` times: {metric: (B,)} in percent.

    A row of ones is the estimate itself; rows drawn at random are its bootstrap (`evaluation.metrics.statistics`).
    """
    if isinstance(table, SegmentTable):
        return _segment_means(table, weights)
    if convention.order == "videos":
        scores = phase_scores(table, absent_is_zero=True)
        means = {metric: _over_videos(mean_known(values, axis=1), weights) for metric, values in scores.items()}
    else:
        single = weighted_phase_means(table, convention, weights)
        means = {metric: mean_known(values, axis=1) for metric, values in single.items()}
    pooled = convention.order == "pooled"
    accuracy = _video_accuracy(table.pooled(weights)) if pooled else _over_videos(_video_accuracy(table), weights)
    return {"accuracy": accuracy, **means}


def weighted_phase_means(table: PhaseTable, convention: Convention, weights: FloatArray) -> dict[str, FloatArray]:
    """A phase's numbers with video v counted `weights[b, v]` times: {metric: (B, C)} in percent."""
    if convention.order == "pooled":  # each row of weights makes one long video
        return phase_scores(table.pooled(weights), absent_is_zero=True)
    scores = phase_scores(table, absent_is_zero=convention.order == "videos")
    return {metric: _over_videos(values, weights) for metric, values in scores.items()}


def _video_accuracy(table: PhaseTable) -> FloatArray:
    return np.asarray(100.0 * table.right / table.frames)


def _video_balanced_accuracy(table: PhaseTable) -> FloatArray:
    """(V,) mean recall over the phases in a video's truth."""
    return mean_known(phase_scores(table, absent_is_zero=False)["recall"], axis=1)


def _segment_means(table: SegmentTable, weights: FloatArray) -> dict[str, FloatArray]:
    pooled = segment_f1(weights @ table.hits, weights @ table.predicted, weights @ table.truth)
    single = _over_videos(segment_f1(table.hits, table.predicted, table.truth), weights)
    means = {
        "accuracy": 100.0 * (weights @ table.right) / (weights @ table.frames),
        "edit": _over_videos(table.edit, weights),
    }
    for k, percent in enumerate(OVERLAPS_PERCENT):
        means[f"f1@{percent}"] = single[:, k]
        means[f"f1@{percent}_pooled"] = pooled[:, k]
    return means


def _over_videos(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Mean of `values` (V, ...) over the videos where they are known: (B, ...), NaN where none is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray((weights @ np.where(known, values, 0.0)) / (weights @ known))


def mean_known(values: FloatArray, axis: int) -> FloatArray:
    """Mean along `axis` of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis) / known.sum(axis))


def std_known(values: FloatArray) -> float:
    """Sample standard deviation (n - 1) of the known entries of `values` (n,); NaN below two."""
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else math.nan


# ------------------------------------------------------------------------------------- results for JSON


def json_number(value: float | np.floating[Any]) -> float | None:
    """A plain float; None where there is no number, since JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def mean_and_std(mean: float | np.floating[Any], spread: FloatArray) -> dict[str, float | None]:
    """{mean, std}: the std is that of the entries of `spread`."""
    return {"mean": json_number(mean), "std": json_number(std_known(spread))}


def _result(
    table: Table, videos: Sequence[LabelledVideo], phases: Sequence[str], convention: Convention
) -> dict[str, Any]:
    if isinstance(table, SegmentTable):
        return _segment_result(table, videos, convention)
    once = np.ones((1, len(videos)))
    pooled = convention.order == "pooled"
    means = {metric: float(value[0]) for metric, value in weighted_means(table, convention, once).items()}
    cells = phase_scores(table.pooled(once) if pooled else table, convention.order != "phases")  # (1 or V, C)
    accuracy = _video_accuracy(table)
    # What the standard deviation is taken over: videos (V,) or phases (C,).
    spread = {m: mean_known(values, axis=int(convention.order == "videos")) for m, values in cells.items()}
    result: dict[str, Any] = {
        "accuracy": mean_and_std(means["accuracy"], np.empty(0) if pooled else accuracy),
        **{metric: mean_and_std(means[metric], spread[metric]) for metric in METRICS},
        "f1_of_means": _f1_of_means(means["precision"], means["recall"]),
    }
    if convention.mask_fault:
        result["f1_surgformer"] = _f1_surgformer(table)
    if pooled:
        per_video = {"accuracy": accuracy, "balanced_accuracy": _video_balanced_accuracy(table)}
        result |= {f"video_{m}": mean_and_std(float(values.mean()), values) for m, values in per_video.items()}
    else:
        per_video = {"accuracy": accuracy, **{m: mean_known(values, axis=1) for m, values in cells.items()}}
    result["per_phase"] = {
        phase: {
            **{m: mean_and_std(float(mean_known(values[:, c], axis=0)), values[:, c]) for m, values in cells.items()},
            "videos": int((table.truth[:, c] > 0).sum()),
        }
        for c, phase in enumerate(phases)
    }
    result["per_video"] = {
        video.id: {**{m: json_number(values[v]) for m, values in per_video.items()}, "frames": int(table.frames[v])}
        for v, video in enumerate(videos)
    }
    return result


def _segment_result(table: SegmentTable, videos: Sequence[LabelledVideo], convention: Convention) -> dict[str, Any]:
    means = weighted_means(table, convention, np.ones((1, len(videos))))
    single = segment_f1(table.hits, table.predicted, table.truth)  # (V, 3)
    result: dict[str, Any] = {
        "accuracy": {"mean": json_number(means["accuracy"][0]), "std": None},
        "edit": mean_and_std(means["edit"][0], table.edit),
    }
    for k, percent in enumerate(OVERLAPS_PERCENT):
        name = f"f1@{percent}"
        pooled = json_number(means[f"{name}_pooled"][0])
        result[name] = {"pooled": pooled, **mean_and_std(means[name][0], single[:, k])}
    result["per_video"] = {
        video.id: {
            "edit": json_number(table.edit[v]),
            **{f"f1@{percent}": json_number(single[v, k]) for k, percent in enumerate(OVERLAPS_PERCENT)},
            "segments_truth": int(table.truth[v]),
            "segments_predicted": int(table.predicted[v]),
        }
        for v, video in enumerate(videos)
    }
    return result


def _f1_surgformer(table: PhaseTable) -> dict[str, float | None]:
    """Mean over phases of their means over videos; the standard deviation is over videos, unlike that of `f1`."""
    cells = f1_surgformer(table)  # (V, C)
    mean = mean_known(mean_known(cells, axis=0), axis=0)
    return mean_and_std(float(mean), mean_known(cells, axis=1))


def _f1_of_means(precision: float, recall: float) -> float | None:
    """What several papers print as F1: the harmonic mean of the averaged precision and recall."""
    return json_number(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _truth_sha256(videos: Sequence[LabelledVideo]) -> str:
    """What was true, video by video: numbers are only comparable where this is the same."""
    digest = sha256()
    for video in videos:
        digest.update(f"{video.id} {len(video.truth)} ".encode() + np.asarray(video.truth, np.int8).tobytes())
    return digest.hexdigest()


def _about(
    name: str, videos: Sequence[LabelledVideo], without: Sequence[str], fps: float | None, split: str | None, seeds: int
) -> dict[str, Any]:
    convention = CONVENTIONS[name]
    return {
        "convention": name,
        "title": convention.title,
        "source": convention.source,
        "unit": "percent",
        "split": split,
        "fps": None if fps is None else float(fps),
        "window_s": RELAXED_WINDOW_S if convention.relaxed else None,
        "absent_phase": convention.absent_phase,
        "std": convention.std,
        "videos": len(videos),
        "frames": int(sum(video.labelled.sum() for video in videos)),
        "truth_sha256": _truth_sha256(videos),
        "seeds": seeds,
        "videos_without_labels": list(without),
    }
