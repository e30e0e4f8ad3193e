"""Match the rows of a ground truth and a prediction that are the same frames, and find out their rate.

Rows are matched one by one if both files have the same number of rows and start at the same frame, by frame number if
both have frame numbers, and by rate if the prediction's rate is given. Nothing else is assumed. Numbers that are one
apart may count source frames or samples, so they do not determine the rate. Numbers further apart are assumed to count
source frames at the rate of the data set's annotations. A frame that only the prediction has is not scored; a frame
that only the ground truth has counts as wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from evaluation.files.third_party import PhaseFile
from evaluation.metrics.counts import NO_PREDICTION

_COMMON_FPS = (1.0, 5.0, 25.0, 2.0, 10.0, 12.5, 15.0, 30.0)
_DENSE_FPS = (30.0, 50.0, 60.0)
_TOLERANCE = 0.03  # relative difference up to which rates are equal; 24 and 25 rows per second differ
_HALF = 0.5  # fraction of the compared rows that may be missing at the ends, if it is certain what the numbers count


@dataclass(frozen=True, eq=False)
class Matched:
    """Truth and prediction (T,) int16 of one video, on the T rows that are compared.

    `fps` is the rate of these rows, or None if it is unknown. `fps_from` says where the rate comes from: `time_s` (a
    column of seconds), `frame numbers` or `--prediction-fps`. `how` says how rows were matched: `row by row`, `by frame
    number` or `by rate`. `row` (T,) is the row of the prediction's file for each of the rows, or any where there is
    none. `unscored` is the number of predictions for frames before or after the ground truth.
    """

    truth: NDArray[np.int16]
    predicted: NDArray[np.int16]
    fps: float | None
    fps_from: str | None
    how: str
    row: NDArray[np.int64]
    unscored: int = 0


def match_rows(
    truth: PhaseFile, predicted: PhaseFile, annotation_fps: float, prediction_fps: float | None = None
) -> Matched:
    """Match the rows of one video's two files. Raises UserError naming both files if they cover different frames."""
    if prediction_fps is not None:
        return _by_rate(truth, predicted, annotation_fps, prediction_fps)
    t, p = truth.frame, predicted.frame
    if len(truth.phase) != len(predicted.phase):
        if t is None or p is None:
            why = "both must cover the same frames (rows can only be matched if both files have a frame column)"
            raise _unmatched(truth, predicted, annotation_fps, why)
        return _by_number(truth, predicted, t, p, annotation_fps)
    step = truth.step or 0.0
    if t is not None and p is not None and step and np.isclose(step, predicted.step or 0.0, rtol=1e-3):
        # Often one file counts from 0 and the other from 1. If the starts differ by more, they are different frames.
        if step > 1.0 + 1e-6 and abs(t[0] - p[0]) > 0.999 * step:
            return _by_number(truth, predicted, t, p, annotation_fps)
        if abs(t[0] - p[0]) > 1.001 * step:
            raise UserError(
                f"{predicted.path}: starts at frame {p[0]:g}, but {truth.path} at {t[0]:g}; give the same frames the "
                "same numbers in both, and leave out rows that are in only one"
            )
    stated = [one for one in (stated_fps(truth, annotation_fps), stated_fps(predicted, annotation_fps)) if one]
    if len(stated) == 2 and stated[0][1] == stated[1][1] and abs(stated[0][0] - stated[1][0]) > 0.02 * stated[0][0]:
        rates = f"the truth has {stated[0][0]:g} rows per second and the prediction {stated[1][0]:g}"
        raise _unmatched(truth, predicted, annotation_fps, f"by their {stated[0][1]}, {rates}")
    stated.sort(key=lambda one: one[1] != "time_s")  # time_s is more reliable than a rate inferred from frame numbers
    if stated and stated[0][1] == "frame numbers" and stated[0][0] < 0.999:  # the numbers may be milliseconds
        stated = []
    rows = np.arange(len(predicted.phase))
    return _matched(truth.phase, predicted.phase, stated[0] if stated else None, "row by row", rows)


def stated_fps(file: PhaseFile, annotation_fps: float) -> tuple[float, str] | None:
    """Return the rate of a file's rows and where it comes from; None if the file does not determine the rate."""
    if file.fps is not None:
        return round(file.fps, 3), "time_s"
    step = file.step
    if step is None or step <= 1.0 + 1e-6:
        return None
    return round(annotation_fps / step, 3), "frame numbers"


def _matched(
    truth: NDArray[np.int16],
    predicted: NDArray[np.int16],
    stated: tuple[float, str] | None,
    how: str,
    row: NDArray[np.int64],
    unscored: int = 0,
) -> Matched:
    fps, fps_from = stated or (None, None)
    known = np.where(predicted < 0, np.int16(NO_PREDICTION), predicted)
    return Matched(truth, known.astype(np.int16), fps, fps_from, how, row, unscored)


def _unmatched(truth: PhaseFile, predicted: PhaseFile, annotation_fps: float, why: str) -> UserError:
    """Return the error for rows that cannot be matched, with both numbers of rows.

    If these numbers fit a usual rate, it suggests the option for that rate.
    """
    usual = _COMMON_FPS if len(predicted.phase) <= len(truth.phase) else (annotation_fps, *_DENSE_FPS)
    if stated := stated_fps(predicted, annotation_fps):
        usual = (stated[0], *usual)
    fits = [fps for fps in usual if _truth_fps(truth, predicted, annotation_fps, fps) is not None]
    hint = "; -1 stands for a frame without a label or prediction"
    rows = len(truth.phase), len(predicted.phase)
    if fits and 0 < max(rows) - min(rows) <= max(1.0, max(rows) * _TOLERANCE):  # nearly equal numbers fit any rate
        hint += "; or give the rate of the rows with --prediction-fps: missing rows are then assumed to be at the end"
    elif fits:
        seconds = f"{fits[0]:g} row{'s' * (fits[0] != 1)} per second"
        hint = f"; if the prediction has {seconds}, add --prediction-fps {fits[0]:g}"
    return UserError(
        f"{predicted.path}: {len(predicted.phase)} rows, but {truth.path} has {len(truth.phase)}; {why}{hint}"
    )


# ---------------------------------------------------------------------------------------------- by frame number


def _by_number(
    truth: PhaseFile, predicted: PhaseFile, t: NDArray[np.float64], p: NDArray[np.float64], annotation_fps: float
) -> Matched:
    step_t, step_p = truth.step, predicted.step
    why = f"the frame columns ({p[0]:g} to {p[-1]:g} and {t[0]:g} to {t[-1]:g}) do not cover the same frames"
    # A single row has no distance to another row; and if one file starts after the other ends, they share no frame.
    if step_t is None or step_p is None or max(t[0], p[0]) > min(t[-1], p[-1]) + 1:
        raise _unmatched(truth, predicted, annotation_fps, why)
    if np.isclose(step_t, step_p, rtol=1e-3) and t[0] != p[0]:
        if abs(t[0] - p[0]) < 0.999 * step_t:
            p = p + (t[0] - p[0])  # one file is numbered from 0 and the other from 1
        elif {t[0], p[0]} == {0.0, 1.0}:
            raise _unmatched(truth, predicted, annotation_fps, f"{why}; number both from 0 or both from 1")
    step, small = max(step_t, step_p), 0.02 * min(step_t, step_p)
    sparser = predicted if step_p > 0.999 * step_t else truth
    grid = t
    if sparser is predicted:
        before, after = np.arange(p[0] - step, t[0] - small, -step)[::-1], np.arange(p[-1] + step, t[-1] + small, step)
        grid = np.concatenate([before, p, after])
    row_t, row_p = _rows_of(t, grid, small), _rows_of(p, grid, small)
    labels, guesses = _taken(truth.phase, row_t), _taken(predicted.phase, row_p)
    off = np.maximum(np.abs(t[row_t] - grid), np.abs(p[row_p] - grid)) > small
    covered = row_t >= 0
    unscored = int((~covered).sum())
    if sparser is truth:
        unscored = int(((p < t[0] - small) | (p > t[-1] + step - small)).sum() * step_p / step_t)
    sure = step > 1.0 + 1e-6 or (truth.fps is not None and predicted.fps is not None)
    allowed = len(grid) * _HALF if sure else max(1.0, len(grid) * _TOLERANCE)
    absent = int(((row_p < 0) & (labels >= 0)).sum())
    if off[(labels >= 0) & (guesses >= 0)].any() or max(absent, unscored) > allowed:
        raise _unmatched(truth, predicted, annotation_fps, why)
    stated = stated_fps(sparser, annotation_fps)
    return _matched(labels[covered], guesses[covered], stated, "by frame number", row_p[covered], unscored)


def _rows_of(numbers: NDArray[np.float64], grid: NDArray[np.float64], small: float) -> NDArray[np.int64]:
    """Return the last row at or before each number of `grid`, or -1 before the first and after the last row."""
    row = np.searchsorted(numbers, grid + small, side="right") - 1
    return np.where(grid <= numbers[-1] + small, row, -1)


# ---------------------------------------------------------------------------------------------- by rate


def _by_rate(truth: PhaseFile, predicted: PhaseFile, annotation_fps: float, prediction_fps: float) -> Matched:
    if not 1e-3 <= prediction_fps <= 1e4:  # NaN fails too
        raise UserError(f"--prediction-fps {prediction_fps}: must be between 0.001 and 10000 rows per second")
    truth_fps = _truth_fps(truth, predicted, annotation_fps, prediction_fps)
    if truth_fps is None:
        why = f"at {prediction_fps:g} predicted rows per second (--prediction-fps) they do not cover the same time"
        raise _unmatched(truth, predicted, annotation_fps, why)
    fps = min(truth_fps, prediction_fps)
    rows_t, rows_p = _lead(truth) + len(truth.phase), _lead(predicted) + len(predicted.phase)
    count = int(np.ceil(rows_t * fps / truth_fps - 1e-6))
    sample = np.arange(count)
    row_t = np.floor(sample * (truth_fps / fps) + 1e-6).astype(np.int64) - _lead(truth)
    row_p = np.floor(sample * (prediction_fps / fps) + 1e-6).astype(np.int64) - _lead(predicted)
    unscored = max(int(rows_p * fps / prediction_fps) - count, 0)
    labels, guesses = _taken(truth.phase, row_t), _taken(predicted.phase, row_p)
    inside = np.clip(row_p, 0, len(predicted.phase) - 1)
    return _matched(labels, guesses, (fps, "--prediction-fps"), "by rate", inside, unscored)


def _taken(phase: NDArray[np.int16], row: NDArray[np.int64]) -> NDArray[np.int16]:
    inside = (row >= 0) & (row < len(phase))
    return np.where(inside, phase[np.where(inside, row, 0)], np.int16(-1))


def _lead(file: PhaseFile) -> int:
    """Return how many rows are missing before the first one, by its frame number; 0 if it is at most one step."""
    if file.frame is None or file.step is None or file.frame[0] <= 1.001 * file.step:
        return 0
    return int(file.frame[0] // file.step)


def _truth_fps(truth: PhaseFile, predicted: PhaseFile, annotation_fps: float, prediction_fps: float) -> float | None:
    """Return the truth's rows per second if the prediction has `prediction_fps`, or None if it cannot be determined.

    It is the rate in the truth's file, if there is one. Otherwise these are tried, until the lengths agree: the
    prediction's rate, the rate of the annotations, and the rates of every k-th row (at least one row per second).
    """
    rows_t, rows_p = _lead(truth) + len(truth.phase), _lead(predicted) + len(predicted.phase)
    stated = stated_fps(truth, annotation_fps)
    every = max(round(rows_p / rows_t), 1)
    sparser = (prediction_fps / every,) if prediction_fps / every > 0.999 else ()
    for fps in (stated[0],) if stated else (prediction_fps, annotation_fps, *sparser):
        compared = min(fps, prediction_fps)
        lengths = rows_t * compared / fps, rows_p * compared / prediction_fps
        if abs(lengths[0] - lengths[1]) <= max(1.0, max(lengths) * (_HALF if stated else _TOLERANCE)):
            return fps
    return None
