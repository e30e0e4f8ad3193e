"""Counting: one (videos x phases) table for each rule that decides which frames are right.

Every convention that compares frames is an average over such a table. `strict_right` decides by equality;
`evaluation.metrics.relaxed` forgives errors near phase boundaries. Formulas with worked examples: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
Counts = IntArray | FloatArray

NO_PREDICTION = -2  # in a prediction: none was made; counts as wrong, whereas a frame without a label does not count


@dataclass(frozen=True)
class PhasePair:
    """Truth and prediction of one video on its whole timeline.

    `truth` (T,) int16 has -1 where a frame has no label: such frames are never counted. `predicted` (T,) int16 is
    0..C-1 or NO_PREDICTION wherever there is a label.
    """

    id: str
    truth: IntArray
    predicted: IntArray

    @property
    def labelled(self) -> BoolArray:
        """(T,) whether a frame has a label."""
        return self.truth >= 0


@dataclass(frozen=True)
class PhaseTable:
    """Frame counts of V videos and C phases under one rule that decides which frames are right.

    `hits`, `predicted`, `truth`, `union` are (V, C): right frames in truth or prediction, frames predicted, frames in
    the truth, frames in either. `right` and `frames` are (V,).
    """

    hits: IntArray
    predicted: IntArray
    truth: IntArray
    union: IntArray
    right: IntArray
    frames: IntArray

    def pooled(self, weights: FloatArray) -> PhaseTable:
        """A (B, C) table of weighted sums; each row of `weights` (B, V) holds how often each video is counted."""
        return PhaseTable(*(weights @ getattr(self, name) for name in self.__dataclass_fields__))


def label_pairs(
    truth: Mapping[str, NDArray[Any]], predicted: Mapping[str, NDArray[Any]], classes: int
) -> tuple[list[PhasePair], list[str]]:
    """Check what is to be compared; the videos in the order of their ids, and the ids of those without any label.

    `truth` and `predicted` map video ids to (T,) phase ids, -1 in the truth where a frame has no label. Raises
    UserError naming the video if the two sets differ, lengths differ or an id is out of range.
    """
    for ids, other, what in ((truth, predicted, "prediction"), (predicted, truth, "ground truth")):
        if missing := sorted(set(ids) - set(other)):
            raise UserError(f"{missing[0]}: no {what} for this video ({len(missing)} in all); give both or omit it")
    videos = [_pair(video, truth[video], predicted[video], classes) for video in sorted(truth)]
    without = [video.id for video in videos if not video.labelled.any()]
    if len(without) == len(videos):
        raise UserError("no video has phase labels, so there is nothing to evaluate; give videos with annotations")
    return [video for video in videos if video.id not in set(without)], without


def _pair(video: str, truth: NDArray[Any], predicted: NDArray[Any], classes: int) -> PhasePair:
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise UserError(
            f"{video}: truth has {len(truth)} frames and the prediction {len(predicted)}; both need the same frames"
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


# ------------------------------------------------------------------------------------- which frames are right


def strict_right(video: PhasePair, fps: float | None = None) -> BoolArray:
    """(T,) whether a labelled frame is predicted exactly; the rate does not matter."""
    return video.labelled & (video.truth == video.predicted)


# ------------------------------------------------------------------------------------------------- the table


def count(videos: Sequence[PhasePair], classes: int, decide: Callable[[PhasePair], BoolArray]) -> PhaseTable:
    """The table over `videos` (V rows) and `classes` phases; `decide` says which frames are right."""
    return PhaseTable(
        *(np.stack(column) for column in zip(*(_row(v, classes, decide(v)) for v in videos), strict=True))
    )


def _row(video: PhasePair, classes: int, right: BoolArray) -> tuple[IntArray, ...]:
    def frames_of(phases: IntArray) -> IntArray:
        return np.bincount(phases[phases >= 0], minlength=classes)

    truth, predicted, right = video.truth[video.labelled], video.predicted[video.labelled], right[video.labelled]
    same = truth == predicted
    # A forgiven frame counts for two phases, the true and the predicted one, so the script's precision and recall can
    # exceed 100.
    hits = frames_of(truth[right]) + frames_of(predicted[right & ~same])
    in_truth, in_prediction = frames_of(truth), frames_of(predicted)
    union = in_truth + in_prediction - frames_of(truth[same])
    return hits, in_prediction, in_truth, union, np.asarray(right.sum()), np.asarray(len(truth))
