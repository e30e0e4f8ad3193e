"""Evaluate predictions of any program: two folders of phase files, matched by video number, under every convention.

This needs no run, no settings and no torch. How the files were interpreted (rate, ids, missing rows) is printed, and
recorded in the `about` of every result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, listed
from engine.files import require_replaceable_json, write_json
from engine.progress import say
from engine.records import as_json
from evaluation.files.matching import Matched, match_rows
from evaluation.files.third_party import PhaseFile, find_phase_files, read_external_phases
from evaluation.metrics.counts import NO_PREDICTION
from evaluation.metrics.phases import chosen_conventions, evaluate_phases, unavailable_conventions
from evaluation.metrics.results import PhaseResults
from evaluation.metrics.statistics import bootstrap_intervals
from evaluation.reports.tables import conventions_table, intervals_table, others_table, phase_table
from features.dataset.phase_order import describe_order, parse_phase_order

_LONGEST_S = 24 * 3600.0
Tracks = dict[str, NDArray[np.int16]]


@dataclass(frozen=True)
class Reading:
    """How to read folders of phase files, as given on the command line.

    `fps` is the rate of the rows that are compared, and `prediction_fps` the rate of the prediction files; None means
    that they are inferred from the files. `phase_order` is a text for `features.dataset.phase_order.parse_phase_order`,
    or None for the data set's own order. `background` names phases that segmental metrics ignore, in addition to those
    of the data set.
    """

    ground_truth: Path
    fps: float | None = None
    prediction_fps: float | None = None
    skip_first_row: bool = False
    phase_order: str | None = None
    allow_missing: bool = False
    background: tuple[str, ...] = ()


@dataclass(frozen=True)
class Paired:
    """Truth and prediction (T,) of each video at `fps` (None if the rate is not known).

    `about` is recorded in every result, and `notes` are printed. Where the truth has a label and the files have no
    prediction, the prediction is NO_PREDICTION. `scores` are the probabilities (T, C), if all files of predictions have
    them.
    """

    truth: Tracks
    predicted: Tracks
    fps: float | None
    about: Mapping[str, Any]
    notes: Sequence[str]
    scores: Mapping[str, NDArray[np.float64]] | None = None


def evaluate_folder(
    predictions: Path,
    reading: Reading,
    spec: DataSetSpec,
    conventions: Sequence[str] | None = None,
    *,
    split: str | None = None,
    out: Path | None = None,
) -> dict[str, PhaseResults]:
    """Score a folder of predictions, print tables, and write the results as JSON to `out` if given.

    Returns the results of `evaluation.metrics.phases.evaluate_phases`, with 95 % bootstrap intervals over videos in
    `intervals`, and with a record of what was read in `about.files`. Raises UserError naming file and row if anything
    cannot be used; then nothing is written.
    """
    results, notes = score_folder(predictions, reading, spec, conventions, split=split)
    for note in notes:
        say(note)
    print_results(results)
    write_results(out, results)
    return results


def score_folder(
    predictions: Path,
    reading: Reading,
    spec: DataSetSpec,
    conventions: Sequence[str] | None = None,
    *,
    split: str | None = None,
) -> tuple[dict[str, PhaseResults], Sequence[str]]:
    """Score a folder of predictions like `evaluate_folder`, and return the results and notes without printing them."""
    background = tuple(dict.fromkeys((*spec.background, *reading.background)))
    pairs = read_pairs(predictions, reading, spec)
    truth, predicted, fps = pairs.truth, pairs.predicted, pairs.fps
    known: dict[str, Any] = {"background": background, "scores": pairs.scores}
    names = chosen_conventions(conventions, spec.phases, fps, pairs.scores is not None)
    left_out = unavailable_conventions(spec.phases, fps, pairs.scores is not None) if conventions is None else {}
    results = evaluate_phases(truth, predicted, spec.phases, fps, names, split=split, **known)
    intervals = bootstrap_intervals(truth, predicted, spec.phases, fps, names, **known).overall
    results = {
        name: replace(result, intervals=intervals[name], about=replace(result.about, files=pairs.about))
        for name, result in results.items()
    }
    notes = list(pairs.notes)
    for reason in dict.fromkeys(left_out.values()):
        those = [name for name, why in left_out.items() if why == reason]
        notes.append(f"{' and '.join(those)}: left out, for {reason}")
    without = next(iter(results.values())).about.videos_without_labels
    if without:
        notes.append(f"videos not counted, since their ground truth has no labels: {listed(without, 10)}")
    return results, notes


def write_results(out: Path | None, results: Any) -> None:
    """Write results as JSON to `out` if given. Raises UserError if that file exists and contains something else."""
    if out is not None:
        require_replaceable_json(out)
        write_json(out, as_json(results))
        say(f"written: {out}")


def print_results(results: Mapping[str, PhaseResults]) -> None:
    """Print tables of conventions, intervals, phases and segments, as far as they were evaluated."""
    from rich.console import Console

    console = Console()
    of_frames = [name for name, result in results.items() if result.of_frames]
    if of_frames:
        console.print(conventions_table(results))
        console.print(intervals_table(results))
        console.print(phase_table(results, of_frames[0]))
    if len(of_frames) < len(results):
        console.print(others_table(results))


# ---------------------------------------------------------------------------------------------- pairing


def read_pairs(predictions: Path, reading: Reading, spec: DataSetSpec) -> Paired:
    """Read both folders, and match their videos and rows. Raises UserError naming the file that cannot be used."""
    order = parse_phase_order(reading.phase_order, spec, str(predictions)) if reading.phase_order else None
    predicted_files, stray = find_phase_files(predictions, spec)
    truth_files, stray_truth = find_phase_files(reading.ground_truth, spec)
    left_out = _unpaired(predicted_files, truth_files, predictions, reading)
    pairs: dict[str, _Pair] = {}
    for video in (name for name in truth_files if name in predicted_files):
        true = read_external_phases(truth_files[video], spec, order)
        guess = read_external_phases(predicted_files[video], spec, order)
        if (true.phase >= 0).any() and not (guess.phase >= 0).any():
            if not reading.allow_missing:
                raise UserError(f"{guess.path}: contains no prediction; leave the video out with --allow-missing")
            left_out.append(guess.path)
            continue
        pairs[video] = _Pair(true, guess, match_rows(true, guess, spec.annotation_fps, reading.prediction_fps))
    if not pairs:
        raise UserError(f"{predictions}: no file contains a prediction for a video of {reading.ground_truth}")
    fps, fps_from = _rate(reading.fps, pairs.values())
    skip = int(reading.skip_first_row)
    truth = {video: pair.rows.truth[skip:] for video, pair in pairs.items()}
    predicted = {video: pair.rows.predicted[skip:] for video, pair in pairs.items()}
    scores = {video: found[skip:] for video, pair in pairs.items() if (found := pair.scores) is not None}
    holes = {v: int(((truth[v] >= 0) & (predicted[v] == NO_PREDICTION)).sum()) for v in truth}
    holes = {video: count for video, count in holes.items() if count}
    numbered = any(file.numbered for pair in pairs.values() for file in (pair.true, pair.guess))
    shown = (order or spec.phases) if numbered else None
    about = {
        "predictions": str(predictions),
        "ground_truth": str(reading.ground_truth),
        "phase_order": None if shown is None else list(shown),
        "fps_from": fps_from,
        "prediction_fps": reading.prediction_fps,
        "first_row_skipped": reading.skip_first_row,
        "files_left_out": [path.name for path in left_out],
        "frames_without_prediction": holes,
    }
    notes = []
    if stray or stray_truth:
        notes.append(
            f"files left out, since their name has no video number or they are not text: "
            f"{listed([*stray, *stray_truth], 10)}"
        )
    if left_out:
        notes.append(
            "files left out, since they are in only one folder or empty: "
            f"{listed([str(path) for path in left_out], 10)}"
        )
    paired = Paired(truth, predicted, fps, about, notes, scores if len(scores) == len(pairs) else None)
    return replace(paired, notes=[*notes, *_notes(pairs, paired, reading, spec)])


class _Pair(NamedTuple):
    """The two files of one video, and their matched rows."""

    true: PhaseFile
    guess: PhaseFile
    rows: Matched

    @property
    def scores(self) -> NDArray[np.float64] | None:
        """The probabilities (T, C) of the compared rows, 0 where there is no prediction; None without any."""
        if self.guess.scores is None:
            return None
        return np.where(self.rows.predicted[:, None] >= 0, self.guess.scores[self.rows.row], 0.0)


def _unpaired(
    predicted: Mapping[str, Path], truth: Mapping[str, Path], predictions: Path, reading: Reading
) -> list[Path]:
    """Return the files whose video is in only one of the two folders.

    Raises UserError for them unless `reading.allow_missing` is true, and in any case if no video is in both folders.
    """
    unpaired = [(path, predictions) for video, path in truth.items() if video not in predicted]
    unpaired += [(path, reading.ground_truth) for video, path in predicted.items() if video not in truth]
    if unpaired and not (reading.allow_missing and set(predicted) & set(truth)):
        path, other = unpaired[0]
        many = f" ({len(unpaired)} such files)" if len(unpaired) > 1 else ""
        advice = "no video is in both" if reading.allow_missing else "add it, or leave it out with --allow-missing"
        raise UserError(f"{path}: {other} has no file for this video{many}; {advice}")
    return [path for path, _ in unpaired]


# ---------------------------------------------------------------------------------------------- the rate, notes


def _rate(given: float | None, pairs: Collection[_Pair]) -> tuple[float | None, str | None]:
    """Return the rate of the compared rows and where it comes from; the rate is None if it is unknown.

    A given rate must agree with seconds in the files and with `--prediction-fps`; frame numbers may differ from it. If
    no rate is given, the rates in all files must agree. Frame numbers are ignored if an operation would last days
    according to them, since they then count something else (such as milliseconds).
    """
    stated = [(pair.guess.path, pair.rows.fps, pair.rows.fps_from) for pair in pairs if pair.rows.fps]
    stated.sort(key=lambda one: one[2] == "frame numbers")
    if given is not None:
        for path, fps, source in stated:
            if source != "frame numbers" and abs(fps - given) > 0.02 * given:
                what = "its column time_s means" if source == "time_s" else "--prediction-fps means"
                raise UserError(f"{path}: {what} {fps:.4g} rows per second, but --fps says {given:g}")
        return given, "--fps"
    for path, fps, source in stated[1:]:
        if abs(fps - stated[0][1]) > 0.02 * stated[0][1]:
            fix = "give the rate with --fps if the rows of all videos have the same rate"
            fix = fix if source == "frame numbers" else "evaluate videos of one rate at a time"
            raise UserError(
                f"{path}: {fps:g} rows per second by its {source}, but {stated[0][0]} has {stated[0][1]:g}; {fix}"
            )
    longest = max(len(pair.rows.truth) for pair in pairs)
    if not stated or (stated[0][2] == "frame numbers" and longest / stated[0][1] > _LONGEST_S):
        return None, None
    return stated[0][1], stated[0][2]


def _notes(pairs: Mapping[str, _Pair], paired: Paired, reading: Reading, spec: DataSetSpec) -> list[str]:
    """Return notes on how the files were interpreted, one line each."""
    notes, holes = [], paired.about["frames_without_prediction"]
    if (order := paired.about["phase_order"]) is not None:
        whose = f"--phase-order {reading.phase_order}" if reading.phase_order else f"the data set {spec.name}"
        hint = "" if reading.phase_order else "; use --phase-order for another order"
        notes.append(f"ids are numbered as in {whose}: {describe_order(order)}{hint}")
    elif reading.phase_order:
        notes.append("--phase-order was not needed, since the files contain names")
    how = {pair.rows.how for pair in pairs.values()} - {"row by row"}
    if how:
        notes.append(f"rows are matched {' and '.join(sorted(how))} if the two files differ in length")
    for name, files in (
        ("ground truth", [p.true for p in pairs.values()]),
        ("prediction", [p.guess for p in pairs.values()]),
    ):
        if missing := sum(file.missing for file in files):
            notes.append(f"{missing} {name} rows are missing, according to the frame numbers in their files")
    if unread := [pair.guess.unread for pair in pairs.values() if pair.guess.unread]:
        notes.append(f"scores of {len(unread)} prediction files are not used: {unread[0]}")
    if unlabelled := sum(int((track < 0).sum()) for track in paired.truth.values()):
        notes.append(f"{unlabelled} frames have no label in the ground truth and are not scored")
    if unscored := sum(pair.rows.unscored for pair in pairs.values()):
        notes.append(f"{unscored} predictions are outside the frames of the ground truth and are not scored")
    if holes:
        notes.append(
            f"{sum(holes.values())} labelled frames have no prediction and count as wrong: {listed(list(holes), 10)}"
        )
    notes.append(_rate_note(pairs, paired, spec))
    if reading.skip_first_row:
        headers = sum(pair.true.header + pair.guess.header for pair in pairs.values())
        also = f"; {headers} files have a header, and there the official script skips only the header"
        notes.append("the first row of every video is left out" + also * bool(headers))
    return notes


def _rate_note(pairs: Mapping[str, _Pair], paired: Paired, spec: DataSetSpec) -> str:
    fps, fps_from = paired.fps, paired.about["fps_from"]
    if fps is None:
        return (
            "rate: not known (rows without numbers or numbered one by one may be frames or samples); give it with --fps"
        )
    longest_h = max(map(len, paired.truth.values())) / fps / 3600
    where = {
        "--fps": "given",
        "--prediction-fps": "by --prediction-fps",
        "time_s": "from a column of seconds",
        "frame numbers": f"the frame numbers count source frames, {spec.annotation_fps:g} per second in {spec.name}",
    }[fps_from or "--fps"]
    numbers = {pair.rows.fps for pair in pairs.values() if pair.rows.fps_from == "frame numbers"}
    odd = [number for number in numbers if number and fps_from == "--fps" and abs(number - fps) > 0.02 * fps]
    also = f"; the frame numbers would mean {odd[0]:g}" if odd else ""
    return f"rate: {fps:g} rows per second ({where}{also}); the longest video then lasts {longest_h:.2f} h"
