"""Read and write prediction files: one CSV per video, `frame,time_s,phase,phase_name,p_<Phase>...,p_<Tool>...`.

`frame` is the frame's number in the source video, from 0, and `phase` is the predicted id, from 0. The columns `p_...`
are probabilities, written with the fewest digits that give the same float32 when read. Evaluating a file therefore
gives exactly the results of the run that wrote it. Equal predictions give equal bytes.

Each additional label track has files of its own, in a folder with the track's name next to the files of the phases. In
them, the track's name stands in place of `phase`, and there are no tools. They are written and read with the
description that `DataSetSpec.as_track` returns.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from engine.files import read_bounded, write_text

PHASE = "phase"  # name of the column; in files of an additional label track, it is the track's name
TOOLS_ALONE = "tool_predictions"  # folder for nets without a phase branch, instead of `predictions`
MAX_FILE_BYTES = 256 << 20  # enough for a million rows of 14 float32 numbers
_FRAME_LIMIT = 2**53  # larger frame numbers cannot be represented exactly in float64
_ROUNDING = 1e-5  # how far a probability may be outside 0 to 1, because of rounding


@dataclass(frozen=True)
class PredictionFile:
    """The prediction for one video: `frame_index`, `time_s` and `phase` (T,), and `probabilities` (T, C).

    `tool_probabilities` is (T, K), or None if the model has no tool branch. For a net that predicts tools only, `phase`
    is -1 and C is 0.
    """

    frame_index: NDArray[np.int64]
    time_s: NDArray[np.float64]
    phase: NDArray[np.int8]
    probabilities: NDArray[np.float32]
    tool_probabilities: NDArray[np.float32] | None


def prediction_columns(spec: DataSetSpec, tools: bool, phases: bool = True, track: str = PHASE) -> list[str]:
    """Return the header of a prediction file; without `phases`, that of a net that predicts tools only."""
    names = [*(spec.phases if phases else ()), *(spec.tools if tools else ())]
    return ["frame", "time_s", *([track, f"{track}_name"] if phases else []), *(f"p_{name}" for name in names)]


def write_prediction_csv(path: Path, prediction: PredictionFile, spec: DataSetSpec, track: str = PHASE) -> None:
    """Write one video's prediction atomically; `time_s` is rounded to the millisecond.

    Raises UserError if the disk is full, the folder cannot be written or a value is not a probability (NaN included).
    """
    phases, tools = prediction.probabilities, prediction.tool_probabilities
    columns = np.concatenate([phases] if tools is None else [phases, tools], axis=1).astype(np.float32)  # (T, C + K)
    header = prediction_columns(spec, tools is not None, phases.shape[1] > 0, track)
    labels = [[int(phase), spec.phases[phase]] if phases.shape[1] else [] for phase in prediction.phase.astype(int)]
    frames, named = len(prediction.frame_index), sum(name.startswith("p_") for name in header)
    if not (len(prediction.time_s) == len(labels) == frames and columns.shape == (frames, named)):
        raise ValueError(f"shapes do not agree: {frames} frames, probabilities {columns.shape}")
    if not ((columns >= -_ROUNDING) & (columns <= 1 + _ROUNDING)).all():  # also refuses NaN
        raise UserError(f"{path}: not written: the model gave a probability outside 0 to 1, so it has diverged")
    buffer = io.StringIO(newline="")
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(header)
    texts = columns.astype(str)  # the shortest text that gives the same float32 when read
    for frame, seconds, cells, numbers in zip(prediction.frame_index, prediction.time_s, labels, texts, strict=True):
        rows.writerow([int(frame), f"{seconds:.3f}", *cells, *numbers])
    write_text(path, buffer.getvalue())


def read_prediction_csv(path: Path, spec: DataSetSpec, phases: bool = True, track: str = PHASE) -> PredictionFile:
    """Read a prediction file of this data set; without `phases`, one of a net that predicts tools only.

    Raises UserError naming file and row if anything is not as `write_prediction_csv` writes it.
    """
    rows = _rows(path)
    tools = _has_tools(path, rows[0], spec, phases, track)
    width = len(rows[0])
    numbers = np.empty((len(rows) - 1, width - 1 if phases else width + 1))
    for number, row in enumerate(rows[1:], start=2):
        numbers[number - 2] = _numbers(f"{path}: row {number}", row, width, spec, phases)
    frame_index = numbers[:, 0].astype(np.int64)
    if (late := np.flatnonzero(np.diff(frame_index) <= 0)).size:
        raise UserError(f"{path}: row {int(late[0]) + 3}: frame numbers must rise; sort the rows and remove repeats")
    outside = ~((numbers[:, 3:] >= -_ROUNDING) & (numbers[:, 3:] <= 1.0 + _ROUNDING)).all(axis=1)  # NaN is outside too
    if outside.any():
        raise UserError(f"{path}: row {int(outside.argmax()) + 2}: a probability is outside 0 to 1")
    values, classes = numbers[:, 3:].astype(np.float32), len(spec.phases) if phases else 0
    return PredictionFile(
        frame_index=frame_index,
        time_s=numbers[:, 1].copy(),
        phase=numbers[:, 2].astype(np.int8),
        probabilities=values[:, :classes].copy(),
        tool_probabilities=values[:, classes:].copy() if tools else None,
    )


def _rows(path: Path) -> list[list[str]]:
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8; write it again with this program") from error
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file ({error}); write it again with this program") from error
    if len(rows) < 2:
        raise UserError(f"{path}: contains no predictions, only {len(rows)} row(s); write it again")
    if not text.endswith("\n"):
        raise UserError(f"{path}: row {len(rows)} is cut off; write the file again")
    return rows


def _has_tools(path: Path, header: Sequence[str], spec: DataSetSpec, phases: bool, track: str) -> bool:
    """Whether the header has tool columns. Raises UserError if it is not a header of a prediction file."""
    for tools in (True, False) if phases else (True,):
        if header == prediction_columns(spec, tools, phases, track):
            return tools and bool(spec.tools)
    expected = prediction_columns(spec, not phases or len(header) != 4 + len(spec.phases), phases, track)
    differing = (
        f"column {column} is {found!r}, but data set {spec.name} has {wanted!r}"
        for column, (found, wanted) in enumerate(zip(header, expected, strict=False), start=1)
        if found != wanted
    )
    problem = next(differing, f"there are {len(header)} columns, but data set {spec.name} has {len(expected)}")
    raise UserError(f"{path}: row 1: {problem}; evaluate it with the data set it was made for")


def _numbers(where: str, row: Sequence[str], width: int, spec: DataSetSpec, phases: bool) -> list[float]:
    """Check a row, and return its frame, time, phase (-1 without `phases`) and probabilities."""
    if len(row) != width:
        raise UserError(f"{where}: {len(row)} columns instead of {width}; the file is damaged, write it again")
    try:
        frame, phase = int(row[0]), int(row[2]) if phases else -1
        time_s, *probabilities = map(float, (row[1], *row[4 if phases else 2 :]))
    except ValueError as error:
        raise UserError(f"{where}: {error}; all columns except phase_name must be numbers") from error
    if not (0 <= frame < _FRAME_LIMIT and math.isfinite(time_s) and time_s >= 0):
        raise UserError(f"{where}: frame {row[0]} at {row[1]} s is not a position in a video; write the file again")
    if phases and not 0 <= phase < len(spec.phases):
        raise UserError(f"{where}: phase {phase}, but data set {spec.name} has ids 0 to {len(spec.phases) - 1}")
    if phases and row[3] != spec.phases[phase]:
        raise UserError(
            f"{where}: phase {phase} is called {row[3]!r}, but data set {spec.name} has {spec.phases[phase]!r}; "
            "the file was written with another order of phases"
        )
    return [frame, time_s, phase, *probabilities]
