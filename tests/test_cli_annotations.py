"""Files of annotation tools through the command line: `index` reads them, and `annotations convert` knows its index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from features.annotation_files.eaf import eaf_text
from features.annotation_files.intervals import Interval, Losses, VideoAnnotations
from features.annotation_files.label_studio import label_studio_tasks
from features.annotation_files.table import csv_text
from features.dataset.index import Dataset, Index
from features.dataset.labels import load_labels
from tests.cli import run, succeed
from tests.videos import VideoSpec, write_video

FRAMES = 50  # of each video, at 25 fps
DESCRIPTION = r"""
name: own
annotation_fps: 25
phases: [Access, Calot triangle dissection, Closure]
id_format: "video{number:02d}"
patterns: {video: 'video(?P<id>\d+)\.{video}', frames: 'video(?P<id>\d+)'}
labels:
  phases: LABELS
"""
LABELLED = {
    "video01": [("Access", 0, 20), ("CalotTriangleDissection", 20, 31), ("closure", 36, 50)],
    "video02": [("Closure", 10, 50)],
}
INDEX = ["index", "--root", "data", "--set", "data.dataset=own.yaml", "--set", "data.index=index.json"]


def annotated(video: str, fps: float | None = 25) -> VideoAnnotations:
    """A video's phases, and a step that runs across them."""
    phases = [Interval("phase", name, start / 25, end / 25) for name, start, end in LABELLED[video]]
    return VideoAnnotations(video, (*phases, Interval("step", "Across", 0.4, 1.6)), fps, f"{video}.mp4")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for video in LABELLED:
        write_video(folder / f"{video}.mp4", VideoSpec(count=FRAMES))
    return folder


@pytest.fixture
def folder(tmp_path: Path, videos: Path) -> Path:
    (tmp_path / "data").mkdir()
    for video in LABELLED:
        (tmp_path / "data" / f"{video}.mp4").write_bytes((videos / f"{video}.mp4").read_bytes())
    return tmp_path


def describe(folder: Path, labels: str) -> None:
    (folder / "own.yaml").write_text(DESCRIPTION.replace("LABELS", labels), encoding="utf-8")


def require_labels(folder: Path) -> None:
    """The index gives each frame the label that its interval has, and none in gaps."""
    dataset = Dataset(Index.load(folder / "index.json"), folder / "data")
    for entry in dataset.index.videos:
        wanted = np.full(FRAMES, -1)
        for (_, start, end), number in zip(LABELLED[entry.id], (0, 1, 2)[-len(LABELLED[entry.id]) :], strict=True):
            wanted[start:end] = number
        found, _ = load_labels(dataset, entry, np.arange(FRAMES))
        np.testing.assert_array_equal(found, wanted)


def test_elan_files_need_only_their_tier(folder: Path) -> None:
    describe(folder, r"{files: 'video(?P<id>\d+)\.eaf', format: eaf, where: {tier: phase}}")
    for video in LABELLED:
        (folder / "data" / f"{video}.eaf").write_text(eaf_text(annotated(video), Losses()), encoding="utf-8")
    succeed(INDEX, folder)
    require_labels(folder)
    succeed([*INDEX, "--check"], folder)


@pytest.mark.parametrize(("fps", "more"), [(25, ""), (None, ", unit: source"), (None, ", unit: sample, rate: 25")])
def test_an_export_of_label_studio_has_all_videos(folder: Path, fps: float | None, more: str) -> None:
    describe(folder, rf"{{files: 'export\.json', format: labelstudio, where: {{track: phase}}{more}}}")
    tasks = label_studio_tasks([annotated(video) for video in LABELLED], lambda name: 25, Losses())
    for task in tasks:
        task["data"] = {"video": task["data"]["video"]} | ({} if fps is None else {"fps": fps})
        task["predictions"] = [one | {"result": one["result"][:1]} for one in task["annotations"]]
    (folder / "data" / "export.json").write_text(json.dumps(tasks), encoding="utf-8")
    succeed(INDEX, folder)
    require_labels(folder)


def test_frames_at_an_unknown_rate_are_refused(folder: Path) -> None:
    describe(folder, r"{files: 'export\.json', format: labelstudio}")
    tasks = label_studio_tasks([annotated("video01")], lambda name: 25, Losses())
    del tasks[0]["data"]["fps"]
    (folder / "data" / "export.json").write_text(json.dumps(tasks), encoding="utf-8")
    done = run(INDEX, folder)
    assert done.returncode == 2
    assert "export.json: task 1, annotation 1, region video01-1: the task's data have no fps; " in done.stderr


def test_notes_on_a_file_are_in_the_index(folder: Path) -> None:
    describe(folder, r"{files: 'video(?P<id>\d+)\.eaf', format: eaf, where: {tier: phase}}")
    for video in LABELLED:
        text = eaf_text(annotated(video), Losses()).replace('FORMAT="3.0"', 'FORMAT="9.0"')
        (folder / "data" / f"{video}.eaf").write_text(text, encoding="utf-8")
    assert ": EAF version 9.0; read like 3.0" in succeed(INDEX, folder)


def test_a_table_of_intervals_is_a_table(folder: Path) -> None:
    describe(
        folder,
        r"{files: 'all\.csv', delimiter: comma, form: intervals, unit: second, where: {track: phase}, "
        r"columns: {video: video, start: start, end: end, label: label}}",
    )
    text = csv_text([annotated(video) for video in LABELLED], Losses())
    (folder / "data" / "all.csv").write_text(text, encoding="utf-8")
    succeed(INDEX, folder)
    require_labels(folder)


def test_an_index_knows_rates_lengths_and_files(folder: Path) -> None:
    describe(folder, r"{files: 'video(?P<id>\d+)\.eaf', format: eaf, where: {tier: phase}}")
    for video in LABELLED:
        (folder / "data" / f"{video}.eaf").write_text(eaf_text(annotated(video), Losses()), encoding="utf-8")
    succeed(INDEX, folder)
    (folder / "in").mkdir()
    (folder / "data" / "video01.eaf").rename(folder / "in" / "corrected by ann.eaf")  # it is linked to video01.mp4
    words = ["annotations", "convert", "in", "out", "--index", "index.json", "--to"]
    succeed([*words, "labelstudio"], folder)
    [task] = json.loads((folder / "out" / "labelstudio.json").read_text(encoding="utf-8"))
    assert task["data"] == {"video": "/data/local-files/?d=video01.mp4", "video_id": "video01", "fps": 25}
    labels = [one["value"]["timelinelabels"][0] for one in task["annotations"][0]["result"]]
    assert labels == ["Access", "Calot triangle dissection", "Closure", "Across"]  # the data set's spelling
    output = succeed([*words, "cholec80", "--track", "phase"], folder)
    assert "note: video01: 5 frame(s) without a label have no row" in output
    assert len((folder / "out" / "video01-phase.txt").read_text(encoding="utf-8").splitlines()) == 1 + 45
    (folder / "in" / "other.eaf").write_text(eaf_text(annotated("video02"), Losses()).replace("video02", "x"))
    assert "note: other: not in the index" in succeed([*words, "csv"], folder)
