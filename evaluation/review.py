"""Find the intervals of a run's videos in which model and labels disagree, and rank them for people to check.

The rank is the time by which the labels are in doubt: the sum over an interval's seconds of p(prediction) - p(label).
That is the margin by which confident learning ranks samples (Northcutt et al., "Confident Learning", JAIR 2021,
arXiv 1911.00068), added up over time: long and confident disagreements come first, and one of 60 s with a margin of
0.5 counts like one of 30 s with a margin of 1.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.errors import UserError
from engine.files import make_folder, write_text
from engine.progress import say
from evaluation.files.predictions import PredictionFile
from evaluation.files.truth import Truth
from evaluation.reports.gather import EVALUATE_FOLDER, RunResults, find_run, gather
from evaluation.reports.paper_figures import sample_edges_s
from evaluation.reports.plotly_base import clock
from features.annotation_files.eaf import eaf_text
from features.annotation_files.intervals import DEFAULT_TRACK, Interval, Losses, VideoAnnotations
from features.annotation_files.label_studio import label_studio_config, label_studio_tasks
from features.ids import file_stem
from features.run_lengths import runs

REVIEW_FILE = "review.csv"
_NTSC = 1000 / 1001  # 23.976, 29.97 and 59.94 fps


@dataclass(frozen=True)
class Doubt:
    """An interval in which the model prefers one phase to that of the labels: with which probabilities, on average.

    `doubt_s` is the sum of p_predicted - p_label over its seconds; `frame` is the first source frame. On another label
    track than that of the phases, its classes take their place.
    """

    video: str
    track: str
    start_s: float
    end_s: float
    frame: int
    label: str
    predicted: str
    p_label: float
    p_predicted: float
    doubt_s: float


def review_run(
    run: Path, split: str = "test", *, least: float, top: int, formats: Sequence[str] = (), out: Path | None = None
) -> list[Doubt]:
    """Rank the disagreements of an evaluated run, print the first `top`, and write all as a table.

    Each label track that the net recognises is reviewed. Only intervals with a mean probability of the prediction of at
    least `least` count. `formats` (eaf, labelstudio) are written as well: the labels, and the model's phase where it
    disagrees. Files go to `out`, by default `RUN/evaluate/SPLIT/review`. Raises UserError if the run has not been
    evaluated, or predicts no phases.
    """
    folder = find_run(run)
    [results] = gather([folder], split).runs
    if not results.predictions:
        raise UserError(f"{folder}: its net predicts tools only; there are no phases to review")
    tracks = {DEFAULT_TRACK: results, **{name: results.of_track(name) for name in results.of_tracks}}
    found = [
        one
        for name, of_track in tracks.items()
        for video, prediction in of_track.predictions.items()
        for one in doubts(video, prediction, of_track.truth, name)
        if one.p_predicted >= least
    ]
    found.sort(key=lambda one: (-one.doubt_s, one.video, one.start_s))
    if split in ("train", "all"):
        say(f"note: split {split} has videos that the net was trained on; it may have learnt their labels by heart")
    place = make_folder(out or folder / EVALUATE_FOLDER / split / "review")
    write_text(place / REVIEW_FILE, _table_text(found))
    _write_formats(place, formats, tracks, found)
    _print(found, top, least, several=len(tracks) > 1)
    say(f"{place}: {REVIEW_FILE}{''.join(f', {one}' for one in formats)} written, {len(found)} interval(s)")
    return found


def doubts(video: str, prediction: PredictionFile, truth: Truth, track: str = DEFAULT_TRACK) -> list[Doubt]:
    """Return the intervals of one video in which labels and predictions disagree, each with one pair of phases."""
    label, phases = truth.videos[video].phase, truth.spec.phases
    edges_s = sample_edges_s(prediction.time_s, len(label), truth.fps)
    length_s = np.diff(edges_s)
    pair = np.where((label >= 0) & (label != prediction.phase), label.astype(int) * len(phases) + prediction.phase, -1)
    found = []
    for start, end, value in runs(pair):
        if value < 0:
            continue
        labelled, predicted = divmod(value, len(phases))
        of_label = prediction.probabilities[start:end, labelled].astype(np.float64)
        of_prediction = prediction.probabilities[start:end, predicted].astype(np.float64)
        found.append(
            Doubt(
                video,
                track,
                round(float(edges_s[start]), 3),
                round(float(edges_s[end]), 3),
                int(prediction.frame_index[start]),
                phases[labelled],
                phases[predicted],
                round(float(of_label.mean()), 4),
                round(float(of_prediction.mean()), 4),
                round(float(((of_prediction - of_label) * length_s[start:end]).sum()), 3),
            )
        )
    return found


def _table_text(found: Sequence[Doubt]) -> str:
    buffer = io.StringIO(newline="")
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow([field.name for field in fields(Doubt)])
    rows.writerows(astuple(one) for one in found)
    return buffer.getvalue()


def _print(found: Sequence[Doubt], top: int, least: float, several: bool) -> None:
    if not found:
        say(f"no interval in which the model disagrees with the labels with a probability of at least {least:g}")
        return
    table = Table(box=HEAVY_HEAD, title="Intervals to check", title_justify="left")
    for name in ("video", *(["track"] if several else []), "from", "to", "label", "predicted"):
        table.add_column(name)
    for name in ("p(label)", "p(predicted)", "in doubt"):
        table.add_column(name, justify="right")
    for one in found[:top]:
        cells = (one.video, *([one.track] if several else []), clock(one.start_s), clock(one.end_s))
        numbers = (f"{one.p_label:.2f}", f"{one.p_predicted:.2f}", f"{one.doubt_s:.1f} s")
        table.add_row(*(Text(cell) for cell in (*cells, one.label, one.predicted, *numbers)))
    Console().print(table)


# ---------------------------------------------------------------------------------------------- for annotation tools


def _write_formats(
    folder: Path, formats: Sequence[str], tracks: Mapping[str, RunResults], found: Sequence[Doubt]
) -> None:
    """Write labels and doubts of the videos that have doubts."""
    videos = [
        _annotations(video, tracks, [one for one in found if one.video == video])
        for video in dict.fromkeys(one.video for one in found)
    ]
    if "eaf" in formats:
        for one in videos:
            write_text(folder / f"{file_stem(one.video)}.eaf", eaf_text(one, Losses()))
    if "labelstudio" in formats:
        tasks = label_studio_tasks(videos, lambda video: None, Losses())
        write_text(folder / "labelstudio.json", json.dumps(tasks, indent=1, ensure_ascii=False) + "\n")
        classes = [(name, of_track.truth.spec.phases) for name, of_track in tracks.items()]
        of_model = [(_of_model(name), names) for name, names in classes]
        write_text(folder / "labelstudio.xml", label_studio_config([*classes, *of_model]))


def _annotations(video: str, tracks: Mapping[str, RunResults], found: Sequence[Doubt]) -> VideoAnnotations:
    """Return a video's labels on each track, and beside it the model's classes where they are in doubt."""
    intervals = []
    for name, of_track in tracks.items():
        truth, prediction = of_track.truth, of_track.predictions[video]
        label = truth.videos[video].phase
        edges_s = sample_edges_s(prediction.time_s, len(label), truth.fps)
        intervals += [
            Interval(name, truth.spec.phases[value], float(edges_s[start]), float(edges_s[end]))
            for start, end, value in runs(label)
            if value >= 0
        ]
    intervals += [
        Interval(_of_model(one.track), one.predicted, one.start_s, one.end_s, one.p_predicted) for one in found
    ]
    results = tracks[DEFAULT_TRACK]
    return VideoAnnotations(video, tuple(intervals), source_fps(results.predictions[video], results.truth.fps))


def _of_model(track: str) -> str:
    return "model" if track == DEFAULT_TRACK else f"model {track}"


def source_fps(prediction: PredictionFile, sampled_fps: float) -> float:
    """Return the rate of the source's frames, from their numbers and times, which are rounded to the millisecond."""
    frames = int(prediction.frame_index[-1] - prediction.frame_index[0])
    span_s = float(prediction.time_s[-1] - prediction.time_s[0])
    if frames <= 0 or span_s <= 0:
        return sampled_fps
    fps = frames / span_s
    usual = (float(round(fps)), round(fps / _NTSC) * _NTSC)
    nearest = min(usual, key=lambda rate: abs(rate - fps))
    return nearest if abs(nearest - fps) <= fps * 1.1e-3 / span_s else round(fps, 6)
