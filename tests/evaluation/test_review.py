"""`annotations review` ranks intervals in which a model and the labels disagree; predictions as intervals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.load import load_dataset
from evaluation.files.pre_annotations import ENDINGS, pre_annotation_text, predicted_intervals
from evaluation.files.predictions import PredictionFile, write_prediction_csv
from evaluation.files.truth import Truth, VideoTruth
from evaluation.review import doubts, source_fps
from features.annotation_files.eaf import read_eaf
from features.annotation_files.intervals import Interval, VideoAnnotations
from features.annotation_files.label_studio import read_label_studio
from features.annotation_files.table import read_csv
from tests.cli import run, succeed
from tests.report_material import write_run

SPEC = load_dataset("cholec80")
PREPARATION, CALOT, CLIPPING = SPEC.phases[:3]


def prediction(rows: list[tuple[int, dict[int, float]]], step: int = 25) -> PredictionFile:
    """A prediction of seconds, given by phase and the probabilities that are not 0."""
    probabilities = np.zeros((len(rows), 7), np.float32)
    for at, (_, given) in enumerate(rows):
        for phase, value in given.items():
            probabilities[at, phase] = value
    seconds = np.arange(len(rows))
    phases = np.array([phase for phase, _ in rows], np.int8)
    return PredictionFile(seconds * step, seconds.astype(np.float64), phases, probabilities, None)


def truth_of(phase: list[int]) -> Truth:
    return Truth(SPEC, "test", 1.0, {"v": VideoTruth(np.array(phase, np.int8), np.zeros((len(phase), 0), np.int8), "")})


def test_doubt_is_the_margin_added_up_over_time() -> None:
    rows = [
        (0, {0: 0.9}),
        (1, {1: 0.8, 0: 0.2}),
        (1, {1: 0.6, 0: 0.4}),
        (2, {2: 1.0}),
        (2, {2: 0.5, 1: 0.5}),
        (1, {1: 1.0}),
    ]
    first, second = doubts("v", prediction(rows), truth_of([0, 0, 0, 1, 2, -1]))
    assert (first.track, first.start_s, first.end_s, first.frame, first.label, first.predicted) == (
        "phase",
        1,
        3,
        25,
        PREPARATION,
        CALOT,
    )
    assert (first.p_label, first.p_predicted, first.doubt_s) == (0.3, 0.7, pytest.approx(0.8))
    assert (second.start_s, second.end_s, second.label, second.predicted) == (3, 4, CALOT, CLIPPING)
    assert second.doubt_s == 1


@pytest.mark.parametrize(
    ("fps", "count"), [(25.0, 60), (30000 / 1001, 3000), (24000 / 1001, 3000), (59.94, 30), (12.5, 900)]
)
def test_the_rate_of_the_source_is_inferred(fps: float, count: int) -> None:
    frames = np.round(np.arange(count) * fps).astype(np.int64)
    found = PredictionFile(
        frames, np.round(frames / fps, 3), np.zeros(count, np.int8), np.ones((count, 1), np.float32), None
    )
    assert source_fps(found, 1.0) == pytest.approx(fps, rel=1e-4)
    if count == 3000:
        assert source_fps(found, 1.0) == pytest.approx(fps, rel=1e-9)


@pytest.mark.parametrize("joint", [False, True])
def test_review_ranks_prints_and_writes(tmp_path: Path, joint: bool) -> None:
    more: dict[str, Any] = {"more": {"checkpoint": "both/best.pt"}} if joint else {}
    write_run(tmp_path / "runs" / "one", **more)
    words = ["annotations", "review", "one", "--min-confidence", "0.2", "--as", "eaf", "--as", "labelstudio"]
    output = succeed(words, tmp_path)
    assert "Intervals to check" in output
    folder = tmp_path / "runs/one/evaluate/test/review"
    rows = list(csv.DictReader((folder / "review.csv").open(encoding="utf-8")))
    scores = [float(row["doubt_s"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 1
    assert all(float(row["p_predicted"]) >= 0.2 for row in rows)
    assert all(row["label"] != row["predicted"] for row in rows)
    first = rows[0]["video"]
    [video] = read_eaf((folder / f"{first}.eaf").read_bytes(), Path(f"{first}.eaf")).videos
    model = [one for one in video.intervals if one.track == "model"]
    wanted = [row for row in rows if row["video"] == first]
    assert sorted((one.start_s, one.label, one.confidence) for one in model) == sorted(
        (float(row["start_s"]), row["predicted"], float(row["p_predicted"])) for row in wanted
    )
    labels = [one for one in video.intervals if one.track == "phase"]
    assert (labels[0].start_s, labels[-1].end_s) == (0, 300)
    content = (folder / "labelstudio.json").read_bytes()
    assert {task["data"]["fps"] for task in json.loads(content)} == {25}
    tasks = read_label_studio(content, Path("labelstudio.json")).videos
    assert next(one for one in tasks if one.video == first).intervals == video.intervals
    assert '<TimelineLabels name="model"' in (folder / "labelstudio.xml").read_text(encoding="utf-8")
    only = succeed(["annotations", "review", "one", "--min-confidence", "1"], tmp_path)
    assert "no interval in which the model disagrees" in only


def test_review_needs_an_evaluated_run_with_phases(tmp_path: Path) -> None:
    done = run(["annotations", "review", "nothing"], tmp_path)
    assert (done.returncode, "no such run" in done.stderr) == (2, True)
    write_run(tmp_path / "runs" / "tools", tools_alone=True)
    done = run(["annotations", "review", "tools"], tmp_path)
    assert (done.returncode, "predicts tools only" in done.stderr) == (2, True)


def test_predictions_become_intervals_with_their_mean_probability() -> None:
    found = prediction([(0, {0: 0.9}), (0, {0: 0.6}), (1, {1: 0.7})])
    edges_s = np.array([0.0, 1.0, 2.0, 2.4])
    intervals = predicted_intervals(found.phase, found.probabilities, edges_s, SPEC.phases, "me")
    assert intervals == (
        Interval("phase", PREPARATION, 0.0, 2.0, 0.75, "me"),
        Interval("phase", CALOT, 2.0, 2.4, 0.7, "me"),
    )
    video = VideoAnnotations("v", intervals, 25.0, "v.mp4")
    texts = {kind: pre_annotation_text(kind, video).encode() for kind in ENDINGS}
    for kind, read in (("csv", read_csv), ("eaf", read_eaf), ("labelstudio", read_label_studio)):
        assert (kind, read(texts[kind], Path("v")).videos[0].intervals) == (kind, intervals)
    assert "predictions" in json.loads(texts["labelstudio"])[0]


def test_probabilities_just_above_1_are_no_error(tmp_path: Path) -> None:
    found = prediction([(0, {0: 1.000001})])
    write_prediction_csv(tmp_path / "v.csv", found, SPEC)
    [interval] = predicted_intervals(found.phase, found.probabilities, np.array([0.0, 1.0]), SPEC.phases)
    assert interval.confidence == 1.0
