"""Count frames in a (videos x phases) table, given a rule that decides which frames are right.

Every convention that compares frames averages over such a table. `strict_right` is the rule that truth and prediction
are equal; the rules in `evaluation.metrics.relaxed` accept errors near phase boundaries. docs/evaluation.md has
formulas with worked examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
Counts = IntArray | FloatArray

_ROUNDING = 1e-3  # how far a sum of probabilities may exceed 1; those of bf16 and of rounded text do
NO_PREDICTION = -2  # id in a prediction for a frame without one, which counts as wrong if the frame has a label


@dataclass(frozen=True)
class PhasePair:
    """Truth and prediction of all T frames of one video.

    `truth` (T,) int16 is -1 for frames without a label, which are never counted. `predicted` (T,) int16 is 0..C-1 or
    NO_PREDICTION for all frames with a label. `scores` (T, C) are the probabilities, or None if only labels are known.
    """

    id: str
    truth: IntArray
    predicted: IntArray
    scores: FloatArray | None = None

    @property
    def labelled(self) -> BoolArray:
        """Whether each frame has a label, (T,)."""
        return self.truth >= 0


@dataclass(frozen=True)
class PhaseTable:
    """Frame counts of V videos and C phases, under a rule that decides which frames are right.

    These are (V, C), for each video and phase: `hits` are the right frames that have the phase in truth or prediction,
    `predicted` the frames that are predicted as the phase, `truth` those that have it in the truth, and `union` those
    that have it in either. `right` (V,) are the right frames of each video, and `frames` (V,) all its labelled frames.
    """

    hits: IntArray
    predicted: IntArray
    truth: IntArray
    union: IntArray
    right: IntArray
    frames: IntArray

    def pooled(self, weights: FloatArray) -> PhaseTable:
        """Return a (B, C) table of sums over videos, in which row b counts video v `weights[b, v]` times."""
        return PhaseTable(*(weights @ getattr(self, name) for name in self.__dataclass_fields__))


def label_pairs(
    truth: Mapping[str, NDArray[Any]],
    predicted: Mapping[str, NDArray[Any]],
    classes: int,
    scores: Mapping[str, NDArray[Any]] | None = None,
) -> tuple[list[PhasePair], list[str]]:
    """Check truth and predictions, and return both for the videos with labels, and the ids of the others.

    `truth` and `predicted` map video ids to phase ids (T,), which are -1 in the truth for frames without a label;
    `scores` has the probabilities (T, C) of each prediction. The pairs are sorted by id. Raises UserError naming the
    video if one of the two is missing, if lengths differ, if a phase id is out of range, or if scores are not
    probabilities.
    """
    for ids, other, has, lacks in (
        (truth, predicted, "ground truth", "prediction"),
        (predicted, truth, "prediction", "ground truth"),
    ):
        if missing := sorted(set(ids) - set(other)):
            many = f" ({len(missing)} such videos)" if len(missing) > 1 else ""
            what = f"has a {has} but no {lacks}{many}; add the {lacks}, or leave the video out"
            raise UserError(f"{missing[0]}: {what}")
    videos = [_pair(video, truth[video], predicted[video], classes) for video in sorted(truth)]
    if scores is not None:
        videos = [replace(video, scores=_probabilities(video, scores[video.id], classes)) for video in videos]
    without = [video.id for video in videos if not video.labelled.any()]
    if len(without) == len(videos):
        raise UserError("no video has phase labels, so there is nothing to evaluate; give videos with annotations")
    return [video for video in videos if video.id not in set(without)], without


def _pair(video: str, truth: NDArray[Any], predicted: NDArray[Any], classes: int) -> PhasePair:
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise UserError(
            f"{video}: truth has {len(truth)} frames, but the prediction {len(predicted)}; both need the same frames"
        )
    if truth.size and (truth.min() < -1 or truth.max() >= classes):
        raise UserError(
            f"{video}: truth has phase ids outside 0 to {classes - 1}; check the order and number of phases"
        )
    known = ((predicted >= 0) & (predicted < classes)) | (predicted == NO_PREDICTION)
    if not known[truth >= 0].all():
        frame = int(np.flatnonzero((truth >= 0) & ~known)[0])
        raise UserError(f"{video}: row {frame} predicts phase {predicted[frame]}; ids are 0 to {classes - 1}")
    return PhasePair(video, truth.astype(np.int16), predicted.astype(np.int16))


def _probabilities(video: PhasePair, scores: NDArray[Any], classes: int) -> FloatArray:
    """Check the probabilities of the frames that are scored, and return those of all frames, (T, C).

    Their sum may be below 1, since a mapping of classes can leave some out.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (len(video.truth), classes):
        raise UserError(
            f"{video.id}: probabilities of shape {values.shape} for {len(video.truth)} frames and {classes} phases; "
            "give one for each frame and phase"
        )
    if (row := improper_row(values, video.labelled & (video.predicted >= 0))) is not None:
        raise UserError(f"{video.id}: row {row}: the scores {short_row(values[row])} are not probabilities")
    return values


def improper_row(scores: NDArray[Any], asked: BoolArray) -> int | None:
    """Return the first of the rows `asked` (T,) whose scores (T, C) are not probabilities, or None.

    They are not if one is NaN or below 0, or if their sum exceeds 1.
    """
    proper = (scores >= -_ROUNDING).all(axis=1) & (scores.sum(axis=1) <= 1.0 + _ROUNDING)  # NaN fails too
    return int((asked & ~proper).argmax()) if (asked & ~proper).any() else None


def short_row(scores: NDArray[Any]) -> str:
    """Return up to four scores as text, for messages."""
    return ", ".join(f"{value:.3g}" for value in scores[:4]) + ", ..." * (len(scores) > 4)


# ------------------------------------------------------------------------------------- which frames are right


def strict_right(video: PhasePair, fps: float | None = None) -> BoolArray:
    """Return whether each labelled frame is predicted exactly, (T,). The rate does not matter."""
    return video.labelled & (video.truth == video.predicted)


# ------------------------------------------------------------------------------------------------- the table


def count(videos: Sequence[PhasePair], classes: int, decide: Callable[[PhasePair], BoolArray]) -> PhaseTable:
    """Count the frames of V `videos` and `classes` phases; `decide` says which frames are right."""
    return PhaseTable(
        *(np.stack(column) for column in zip(*(_row(v, classes, decide(v)) for v in videos), strict=True))
    )


def _row(video: PhasePair, classes: int, right: BoolArray) -> tuple[IntArray, ...]:
    def frames_of(phases: IntArray) -> IntArray:
        return np.bincount(phases[phases >= 0], minlength=classes)

    truth, predicted, right = video.truth[video.labelled], video.predicted[video.labelled], right[video.labelled]
    same = truth == predicted
    # A frame that is right only by a relaxed rule counts as a hit of two phases, the true and the predicted one. This
    # is why precision and recall of the official script can exceed 100.
    hits = frames_of(truth[right]) + frames_of(predicted[right & ~same])
    in_truth, in_prediction = frames_of(truth), frames_of(predicted)
    union = in_truth + in_prediction - frames_of(truth[same])
    return hits, in_prediction, in_truth, union, np.asarray(right.sum()), np.asarray(len(truth))
