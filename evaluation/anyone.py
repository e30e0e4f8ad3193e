"""Evaluate anyone's predictions: two folders of phase files, paired by video number, under every convention.

Needs no run, no settings and no torch. What is assumed (the rate, the meaning of ids) is printed and stands in every
result's `about`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import DataSetSpec
from engine.files import require_replaceable_json, write_json
from engine.progress import say
from evaluation.foreign import PhaseFile, find_phase_files, read_foreign_phases
from evaluation.phases import chosen_conventions, evaluate_phases
from evaluation.statistics import bootstrap_intervals
from evaluation.tables import conventions_table, intervals_table, phase_table, segment_table
from features.class_order import describe_order, parse_phase_order

ASSUMED_FPS = 1.0
Tracks = dict[str, NDArray[np.int16]]


@dataclass(frozen=True)
class Reading:
    """How folders of phase files are read: what the options of the command line say.

    `fps` is the rate of the compared rows (None: what the files say, else 1). `phase_order` names ids as
    `features.class_order.parse_phase_order` takes it (None: the data set's own order).
    """

    ground_truth: Path
    fps: float | None = None
    skip_first_row: bool = False
    phase_order: str | None = None
    allow_missing: bool = False


@dataclass(frozen=True)
class Paired:
    """Truth and prediction (T,) a video at `fps`; `about` goes into every result, `notes` to the user."""

    truth: Tracks
    predicted: Tracks
    fps: float
    about: Mapping[str, Any]
    notes: Sequence[str]


def evaluate_folder(
    predictions: Path,
    reading: Reading,
    spec: DataSetSpec,
    conventions: Sequence[str] | None = None,
    *,
    split: str | None = None,
    out: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a folder of predictions, print tables, and write the results as JSON to `out` if given.

    Returns what `evaluation.phases.evaluate_phases` does, with 95 % bootstrap intervals over videos in `intervals` and
    what was read in `about`. Raises UserError naming file and row for anything that cannot be used; nothing is written
    then.
    """
    results, notes = score_folder(predictions, reading, spec, conventions, split=split)
    for note in notes:
        say(note)
    print_results(results)
    if out is not None:
        require_replaceable_json(out)
        write_json(out, results)
        say(f"written: {out}")
    return results


def score_folder(
    predictions: Path,
    reading: Reading,
    spec: DataSetSpec,
    conventions: Sequence[str] | None = None,
    *,
    split: str | None = None,
) -> tuple[dict[str, dict[str, Any]], Sequence[str]]:
    """`evaluate_folder` without printing or writing: the results, and notes for the user."""
    names = chosen_conventions(conventions, spec.phases)
    pairs = read_pairs(predictions, reading, spec)
    results = evaluate_phases(pairs.truth, pairs.predicted, spec.phases, pairs.fps, names, split=split)
    intervals = bootstrap_intervals(pairs.truth, pairs.predicted, spec.phases, pairs.fps, names)
    for name, result in results.items():
        result["intervals"] = intervals[name]
        result["about"] |= pairs.about
    return results, pairs.notes


def print_results(results: Mapping[str, Any]) -> None:
    """Tables: conventions, their intervals, phases, segments, as far as evaluated."""
    from rich.console import Console

    console = Console()
    of_frames = [name for name in results if name != "segmental"]
    if of_frames:
        console.print(conventions_table(results))
        console.print(intervals_table(results))
        console.print(phase_table(results, of_frames[0]))
    if "segmental" in results:
        console.print(segment_table(results))


# ---------------------------------------------------------------------------------------------- pairing


def read_pairs(predictions: Path, reading: Reading, spec: DataSetSpec) -> Paired:
    """Read both folders and pair their videos and rows. Raises UserError naming the file."""
    order = spec.phases
    if reading.phase_order is not None:
        order = parse_phase_order(reading.phase_order, spec, str(predictions))
    predicted_files, stray = find_phase_files(predictions, spec)
    truth_files, stray_truth = find_phase_files(reading.ground_truth, spec)
    left_out = _unpaired(predicted_files, truth_files, predictions, reading)
    notes = [f"left out, no video number in the name: {name}" for name in (*stray, *stray_truth)]
    notes += [f"left out, in one folder only: {path}" for path in left_out]
    truth: Tracks = {}
    predicted: Tracks = {}
    files: list[tuple[PhaseFile, PhaseFile]] = []
    for video in (name for name in truth_files if name in predicted_files):
        true = read_foreign_phases(truth_files[video], spec, order, unlabelled=True)
        guess = read_foreign_phases(predicted_files[video], spec, order)
        files.append((true, guess))
        rows_true, rows_guess = _matching_rows(true, guess)
        skip = int(reading.skip_first_row)
        truth[video], predicted[video] = true.phase[rows_true][skip:], guess.phase[rows_guess][skip:]
    fps, fps_from = _rate(reading.fps, files)
    numbered = any(file.numbered for pair in files for file in pair)
    about = {
        "predictions": str(predictions),
        "ground_truth": str(reading.ground_truth),
        "phase_order": list(order) if numbered else None,
        "fps_from": fps_from,
        "first_row_skipped": reading.skip_first_row,
        "files_left_out": [path.name for path in left_out],
    }
    notes += _notes(files, truth, reading, spec, order if numbered else None, fps, fps_from)
    return Paired(truth, predicted, fps, about, notes)


def _unpaired(
    predicted: Mapping[str, Path], truth: Mapping[str, Path], predictions: Path, reading: Reading
) -> list[Path]:
    """Files whose video is in one folder only: an error unless allowed, and always one when no video is in both."""
    lonely = [(path, predictions) for video, path in truth.items() if video not in predicted]
    lonely += [(path, reading.ground_truth) for video, path in predicted.items() if video not in truth]
    if lonely and not (reading.allow_missing and set(predicted) & set(truth)):
        path, other = lonely[0]
        many = f" ({len(lonely)} such files)" if len(lonely) > 1 else ""
        advice = "no video is in both" if reading.allow_missing else "add it, or leave it out with --allow-missing"
        raise UserError(f"{path}: {other} has no file for this video{many}; {advice}")
    return [path for path, _ in lonely]


def _matching_rows(truth: PhaseFile, predicted: PhaseFile) -> tuple[slice, slice]:
    """Which rows of the two files are the same frames: all, or of the denser file every k-th by frame number."""
    everything = slice(None)
    t, p = truth.frame, predicted.frame
    if len(truth.phase) == len(predicted.phase):
        if t is not None and p is not None and len(t) > 1:
            steps = (t[-1] - t[0]) / (len(t) - 1), (p[-1] - p[0]) / (len(p) - 1)
            # Numbered from 0 in one and from 1 in the other is usual; further apart they are not the same frames.
            if np.isclose(*steps, rtol=1e-3) and abs(t[0] - p[0]) > 1.001 * steps[0]:
                raise UserError(f"{predicted.path}: starts at frame {p[0]:g}, but {truth.path} at {t[0]:g}")
        return everything, everything
    counts = f"{predicted.path}: {len(predicted.phase)} rows, but {truth.path} has {len(truth.phase)}"
    if t is None or p is None:
        raise UserError(f"{counts}; both must cover the same frames (without a frame column rows cannot be matched)")
    for dense, sparse, dense_is_truth in ((t, p, True), (p, t, False)):
        rows = _every_kth(dense, sparse)
        if rows is not None:
            return (rows, everything) if dense_is_truth else (everything, rows)
    raise UserError(
        f"{counts}; the frame columns ({p[0]:g} to {p[-1]:g} and {t[0]:g} to {t[-1]:g}) do not make one every k-th row "
        "of the other to its end"
    )


def _every_kth(dense: NDArray[np.float64], sparse: NDArray[np.float64]) -> slice | None:
    """The rows of `dense` that are the frames of `sparse`, if they are every k-th from its start to its end."""
    if not 1 < len(sparse) < len(dense):
        return None
    first, second = np.searchsorted(dense, sparse[:2] - 1e-6)
    rows = slice(int(first), None, max(int(second - first), 1))
    chosen = dense[rows]
    fits = first < second - first and len(chosen) == len(sparse) and np.allclose(chosen, sparse, rtol=0, atol=1e-6)
    return rows if fits else None


# ---------------------------------------------------------------------------------------------- what is assumed


def _rate(given: float | None, files: Sequence[tuple[PhaseFile, PhaseFile]]) -> tuple[float, str]:
    """Rate of the compared rows, and where it is from. What the files say (`time_s`) must agree with what is given."""
    said = [(file.path, file.fps) for pair in files for file in pair if file.fps and len(file.phase) == _shorter(pair)]
    if given is None and not said:
        return ASSUMED_FPS, "assumed"
    wanted, source = (given, "--fps") if given is not None else (round(said[0][1], 3), str(said[0][0]))
    for path, fps in said:
        if abs(fps - wanted) > 0.02 * wanted:
            raise UserError(f"{path}: its column time_s means {fps:.4g} rows a second, but {source} says {wanted:g}")
    return wanted, "--fps" if given is not None else "time_s"


def _shorter(pair: tuple[PhaseFile, PhaseFile]) -> int:
    return min(len(file.phase) for file in pair)


def _notes(
    files: Sequence[tuple[PhaseFile, PhaseFile]],
    truth: Tracks,
    reading: Reading,
    spec: DataSetSpec,
    order: Sequence[str] | None,
    fps: float,
    fps_from: str,
) -> list[str]:
    """What a reader of the numbers should know, a line each."""
    notes = []
    if order is not None:
        whose = f"--phase-order {reading.phase_order}" if reading.phase_order else f"the data set {spec.name}"
        hint = "" if reading.phase_order else "; another one is named with --phase-order"
        notes.append(f"ids are numbered as in {whose}: {describe_order(order)}{hint}")
    elif reading.phase_order:
        notes.append("--phase-order was not needed: the files hold names")
    if any(len(true.phase) != len(guess.phase) for true, guess in files):
        notes.append("rows are matched by frame number: one side has every k-th row of the other")
    longest_h = max(map(len, truth.values())) / fps / 3600
    where = {"--fps": "given", "time_s": "from the column time_s", "assumed": "assumed, name another with --fps"}
    notes.append(f"rate: {fps:g} rows a second ({where[fps_from]}); the longest video then lasts {longest_h:.2f} h")
    if reading.skip_first_row:
        headers = sum(file.header for pair in files for file in pair)
        also = f"; {headers} files have a header, which alone is what the official script skips there"
        notes.append("the first row of every video is left out" + also * bool(headers))
    return notes
