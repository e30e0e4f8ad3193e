"""Counting: one (videos x phases) table per way of deciding which frames are right.

Every phase convention but the segmental one is an average over such a table. Three ways of deciding exist: `strict`
(prediction equals truth) and the two relaxed ones of the field's official script, which forgive errors within ten
seconds of a phase boundary (see `relaxed_right`). Formulas with worked examples: docs/evaluation.md.
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

RELAXED_WINDOW_S = 10.0
NO_PREDICTION = -2  # in a prediction: none was made. Unlike a frame without a label, one without a prediction is wrong

# The official script numbers Cholec80's phases 1..7 in this order and has rules for these alone.
CHOLEC80_PHASES = (
    "Preparation",
    "CalotTriangleDissection",
    "ClippingCutting",
    "GallbladderDissection",
    "GallbladderPackaging",
    "CleaningCoagulation",
    "GallbladderRetraction",
)
# Prediction minus truth that counts as right at the start and at the end of a run of each of the seven phases. The
# wider ones are the script's, since packaging, cleaning and retraction come in any order.
LATE_DIFFERENCES: tuple[tuple[int, ...], ...] = ((-1,),) * 5 + ((-1, -2),) * 2
EARLY_DIFFERENCES: tuple[tuple[int, ...], ...] = ((1,),) * 3 + ((1, 2),) * 4


@dataclass(frozen=True)
class LabelledVideo:
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
    """Frame counts of V videos and C phases under one way of deciding which frames are right.

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
        """Each row of `weights` (B, V) says how often a video is taken: a (B, C) table of the weighted sums."""
        return PhaseTable(*(weights @ getattr(self, name) for name in self.__dataclass_fields__))


def label_pairs(
    truth: Mapping[str, NDArray[Any]], predicted: Mapping[str, NDArray[Any]], classes: int
) -> tuple[list[LabelledVideo], list[str]]:
    """Check what is to be compared; the videos in the order of their ids, and the ids of those without any label.

    `truth` and `predicted` map video ids to (T,) phase ids, -1 in the truth where a frame has no label. Raises
    UserError naming the video when the two sets differ, lengths differ or an id is out of range.
    """
    for ids, other, what in ((truth, predicted, "prediction"), (predicted, truth, "ground truth")):
        if missing := sorted(set(ids) - set(other)):
            raise UserError(f"{missing[0]}: no {what} for this video ({len(missing)} such); give both or leave it out")
    videos = [_labelled_video(video, truth[video], predicted[video], classes) for video in sorted(truth)]
    without = [video.id for video in videos if not video.labelled.any()]
    if len(without) == len(videos):
        raise UserError("no video has phase labels, so there is nothing to evaluate; give videos with annotations")
    return [video for video in videos if video.id not in set(without)], without


def _labelled_video(video: str, truth: NDArray[Any], predicted: NDArray[Any], classes: int) -> LabelledVideo:
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise UserError(
            f"{video}: truth has {len(truth)} frames and the prediction {len(predicted)}; both must cover the same"
        )
    if truth.size and (truth.min() < -1 or truth.max() >= classes):
        raise UserError(
            f"{video}: truth has phase ids outside 0 to {classes - 1}; check the order and number of phases"
        )
    known = ((predicted >= 0) & (predicted < classes)) | (predicted == NO_PREDICTION)
    if not known[truth >= 0].all():
        frame = int(np.flatnonzero((truth >= 0) & ~known)[0])
        raise UserError(f"{video}: row {frame} predicts phase {predicted[frame]}; ids are 0 to {classes - 1}")
    return LabelledVideo(video, truth.astype(np.int16), predicted.astype(np.int16))


# ------------------------------------------------------------------------------------- which frames are right


def strict_right(video: LabelledVideo) -> BoolArray:
    """(T,) whether a labelled frame is predicted exactly."""
    return video.labelled & (video.truth == video.predicted)


def stretches(track: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """Stretches of one value in `track` (T,): their starts, stops and values (N,) each; no label is a value too."""
    start = np.flatnonzero(np.r_[True, track[1:] != track[:-1]][: len(track)])
    return start, np.r_[start[1:], len(track)][: len(start)], track[start]


def phase_runs(truth: IntArray) -> list[tuple[int, int, int]]:
    """Runs of one phase as (start, stop, phase), positions on the whole timeline.

    Unlabelled frames are passed over: they lie inside a run where the phase is the same on both sides and belong to
    none where it differs. Windows are therefore in time even where only some frames carry a label.
    """
    labelled = np.flatnonzero(truth >= 0)
    phase = truth[labelled]
    first = np.flatnonzero(np.r_[True, phase[1:] != phase[:-1]])
    last = np.r_[first[1:] - 1, len(labelled) - 1]
    return list(zip(labelled[first].tolist(), (labelled[last] + 1).tolist(), phase[first].tolist(), strict=True))


def relaxed_window_frames(fps: float) -> int:
    """How many samples at `fps` lie within the ten seconds; below 0.1 fps none do."""
    return int(RELAXED_WINDOW_S * fps + 1e-9)


def relaxed_right(video: LabelledVideo, fps: float, mask_fault: bool) -> BoolArray:
    """(T,) whether a labelled frame is right once ten seconds around phase boundaries are forgiven.

    With t = min(10 s, length of the run), in each run of a phase in the truth: among the first t samples the previous
    phase is right (late transition), among the last t the next one (early transition); `LATE_DIFFERENCES` and
    `EARLY_DIFFERENCES` say how far. `mask_fault` restates the official script (M2CAI 2016, Cholec80 variant): it
    finds early transitions among the last t samples and then marks the *first* t, in MATLAB
    `curDiff(curDiff(end-t+1:end)==1) = 0`.
    """
    right, labelled = strict_right(video), video.labelled & (video.predicted >= 0)
    difference = video.predicted - video.truth
    window = relaxed_window_frames(fps)
    for start, stop, phase in phase_runs(video.truth):
        t = min(window, stop - start)
        first, last = slice(start, start + t), slice(stop - t, stop)
        late = labelled[first] & np.isin(difference[first], LATE_DIFFERENCES[phase])
        early = labelled[last] & np.isin(difference[last], EARLY_DIFFERENCES[phase])
        right[first] |= late
        right[first if mask_fault else last] |= early
    return right & labelled


# ------------------------------------------------------------------------------------------------- the table


def count(videos: Sequence[LabelledVideo], classes: int, decide: Callable[[LabelledVideo], BoolArray]) -> PhaseTable:
    """The table over `videos` (V rows) and `classes` phases, `decide` giving each frame's verdict."""
    return PhaseTable(
        *(np.stack(column) for column in zip(*(_row(v, classes, decide(v)) for v in videos), strict=True))
    )


def _row(video: LabelledVideo, classes: int, right: BoolArray) -> tuple[IntArray, ...]:
    def frames_of(phases: IntArray) -> IntArray:
        return np.bincount(phases[phases >= 0], minlength=classes)

    truth, predicted, right = video.truth[video.labelled], video.predicted[video.labelled], right[video.labelled]
    same = truth == predicted
    # A forgiven frame counts for two phases, the true and the predicted one: this is how the script's precision and
    # recall can pass 100.
    hits = frames_of(truth[right]) + frames_of(predicted[right & ~same])
    in_truth, in_prediction = frames_of(truth), frames_of(predicted)
    union = in_truth + in_prediction - frames_of(truth[same])
    return hits, in_prediction, in_truth, union, np.asarray(right.sum()), np.asarray(len(truth))


def f1_surgformer(table: PhaseTable) -> FloatArray:
    """(V, C) F1 in percent as Surgformer's copy of the official script has it, NaN where it drops a cell.

    2PR / (P + R) of precision and recall *before* they are cut, then cut to 100. A phase absent from the truth, never
    predicted, or without a right frame (0/0) is dropped.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = 100.0 * table.hits / table.predicted, 100.0 * table.hits / table.truth
        f1 = np.minimum(2.0 * precision * recall / (precision + recall), 100.0)
    return np.where((table.truth == 0) | ~np.isfinite(precision), np.nan, f1)


def phase_scores(table: PhaseTable, absent_is_zero: bool) -> dict[str, FloatArray]:
    """Precision, recall, Jaccard and F1 in percent, shaped like the table's counts, NaN where a cell does not count.

    A phase absent from the truth does not count; with `absent_is_zero` it counts 0 where it is predicted (and a phase
    never predicted has precision 0 rather than 0/0). Values above 100, x/0 included, are cut to 100.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = {
            "precision": np.minimum(100.0 * table.hits / table.predicted, 100.0),
            "recall": np.minimum(100.0 * table.hits / table.truth, 100.0),
            "jaccard": np.minimum(100.0 * table.hits / table.union, 100.0),
        }
        precision, recall = np.nan_to_num(scores["precision"]), np.nan_to_num(scores["recall"])
        scores["f1"] = np.nan_to_num(2.0 * precision * recall / (precision + recall))
    left_out = table.union == 0 if absent_is_zero else table.truth == 0
    if absent_is_zero:
        scores = {name: np.nan_to_num(values) for name, values in scores.items()}
    return {name: np.where(left_out, np.nan, values) for name, values in scores.items()}
