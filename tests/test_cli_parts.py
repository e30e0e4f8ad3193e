"""A recording in three files against the same in one, from the index to the features, by the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from features.store import VideoFeatures, read_features
from tests.cli import run, succeed
from tests.stage1_cnn.material import SPEC, paint
from tests.videos import VideoSpec, cut_video, damage_packet, write_video

FRAMES, GOP, CUTS = 250, 10, (7, 16)  # parts of 70, 90 and 90 frames
FIRST = (0, 70, 160, FRAMES)
CLINIC: dict[str, Any] = {
    "name": "clinic",
    "annotation_fps": 25,
    "phases": list(SPEC.phases),
    "tools": list(SPEC.tools),
    "patterns": {
        "video": r"video_(?P<id>\d+)(_(?P<part>\d))?/left\.{video}",
        "frames": r"NONE(?P<id>\d+)",
        "tool": r"video_(?P<id>\d+)(_(?P<part>\d))?/tools\.txt",
    },
    "labels": {
        "phases": {
            "files": r"video_(?P<id>\d+)(_(?P<part>\d))?/phases\.csv",
            "delimiter": "comma",
            "columns": {"start": "second", "end": "to", "label": "phase"},
            "form": "intervals",
            "unit": "second",
        }
    },
}
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "data": {"dataset": "clinic.yaml", "root": "data", "index": "index.json", "split": {"rule": "1/1/1"}},
    "cache": {"dir": "cache"},
    "preprocess": {"resize_px": 40, "crop_px": 32},
    "cnn": {"backbone": "shufflenet_v2_x0_5", "weights": "random", "batch_frames": 8},
    "extract": {
        "encoder": "initial",
        "precision": "fp32",
        "storage": "float32",
        "segment_frames": 8,
        "batch_frames": 4,
    },
}


def write_labels(folder: Path, first: int, end: int) -> None:
    """Phases and tools of these frames of the recording, with times and numbers that start at 0."""
    phases = [(SPEC.phases[at], start, stop) for at, (start, stop) in enumerate(((10, 80), (80, 165), (165, FRAMES)))]
    bounds = [(name, max(start, first) - first, min(stop, end) - first) for name, start, stop in phases]
    lines = [f"{start / 25},{stop / 25},{name}" for name, start, stop in bounds if start < stop]
    (folder / "phases.csv").write_text("\n".join(["second,to,phase", *lines]) + "\n")
    rows = [f"{k - first}\t{k // 20 % 2}\t{k // 30 % 2}" for k in range(first, end, 5)]
    (folder / "tools.txt").write_text("\n".join(["Frame\tGrasper\tHook", *rows]) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Video 1 in one file, 2 in three with labels of the whole, 3 in three with labels of their own."""
    base = tmp_path_factory.mktemp("parts")
    for number in (1, 2, 3):
        (base / f"data/video_{number}").mkdir(parents=True)
        write_labels(base / f"data/video_{number}", 0, FRAMES)
    whole = base / "data/video_1/left.mp4"
    write_video(whole, VideoSpec(count=FRAMES, gop=GOP, width_px=64, height_px=48, paint=paint))
    for number in (2, 3):
        cut_video(whole, [base / f"data/video_{number}_{part}/left.mp4" for part in (1, 2, 3)], CUTS)
    shutil.rmtree(base / "data/video_3")
    for part in (1, 2, 3):
        write_labels(base / f"data/video_3_{part}", FIRST[part - 1], FIRST[part])
    (base / "clinic.yaml").write_text(yaml.safe_dump(CLINIC))
    (base / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    return base


def extract(place: Path, fps: float, workers: int = 1) -> tuple[int, str]:
    """Extract at a rate; the exit code, and all that was said, in one line."""
    given = f"data.fps={fps}", f"extract.store=at-{fps}", f"extract.workers={workers}"
    options = [word for setting in given for word in ("--set", setting)]
    done = run(["extract", "--config", "settings.yaml", "--name", f"at-{fps}", *options], place)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def stored(place: Path, fps: float) -> dict[str, VideoFeatures]:
    return {path.stem: read_features(path) for path in (place / f"at-{fps}").glob("*/*.h5")}


@pytest.mark.parametrize(("fps", "workers"), [(1, 1), (7.3, 2)])
def test_features_of_a_recording_in_parts_are_those_of_the_uncut_one(place: Path, fps: float, workers: int) -> None:
    said = succeed(["index", "--config", "settings.yaml", "--force"], place)
    assert "left out" not in said
    code, said = extract(place, fps, workers)
    assert code == 0, said
    videos = stored(place, fps)
    assert sorted(videos) == ["video01", "video02", "video03"]
    whole, *cut = (videos[name] for name in sorted(videos))
    assert len(whole.time_s) == int(fps * 10)
    for video in cut:
        for name in ("features", "tool_logits", "frame_index", "time_s", "phase", "tools"):
            one, other = (np.asarray(getattr(features, name)) for features in (video, whole))
            assert np.array_equal(one, other, equal_nan=name == "tool_logits"), name
    assert (whole.phase[whole.frame_index < 10] == -1).all()
    assert set(whole.phase.tolist()) == {-1, 0, 1, 2}
    assert "index and files agree" in succeed(["index", "--config", "settings.yaml", "--check"], place)


def test_changed_labels_and_a_damaged_part_are_noticed(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    for name in ("clinic.yaml", "settings.yaml"):
        shutil.copyfile(place / name, tmp_path / name)
    assert extract(tmp_path, 1)[0] == 0
    labels = tmp_path / "data/video_3_2/phases.csv"
    labels.write_text(labels.read_text().replace("cut", "close"))
    code, said = extract(tmp_path, 1)
    assert code == 1
    assert "video_3_2/phases.csv: has changed since it was indexed" in said
    damage_packet(tmp_path / "data/video_2_3/left.mp4", 40)
    succeed(["index", "--config", "settings.yaml", "--force"], tmp_path)
    code, said = extract(tmp_path, 1)
    assert code == 1
    assert "video_2_3/left.mp4: damaged, frame" in said
    relabelled = stored(tmp_path, 1)["video03"]
    assert relabelled.phase[(relabelled.frame_index >= 80) & (relabelled.frame_index < 160)].tolist() == [2] * 3
    shutil.rmtree(tmp_path / "data/video_3_2")
    done = run(["index", "--config", "settings.yaml", "--force"], tmp_path)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1
    assert "left out: video03" in said
    assert "is part 3 of a recording, but there is no part 2" in said
