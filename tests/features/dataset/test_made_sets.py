"""Copies of four layouts that an independent program makes: every frame has the label that it wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from configs.dataset_spec import DataSetSpec
from configs.load import load_dataset
from configs.schema import DataConfig
from features.dataset.build import build_index
from features.dataset.index import Dataset, Index
from features.dataset.labels import sampled_labels

SECONDS, FRAMES = 28, 400  # of AutoLaparo and CholecT50; of M2CAI16
# The program with smaller pictures, since only labels matter here.
PROGRAM = """
import runpy, sys
folder, out = sys.argv[1:]
sys.path.insert(0, folder)
import tools
tools.picture.__defaults__ = (64, 48)
tools.video.__defaults__ = (25, 64, 48, (), None)
sys.argv = ["make_sets.py", out]
runpy.run_path(folder + "/make_sets.py", run_name="__main__")
"""
OWN = r"""
name: own
annotation_fps: 25
phases: [Preparation, CalotTriangleDissection, ClippingCutting, GallbladderDissection, GallbladderPackaging,
         CleaningCoagulation, GallbladderRetraction]
patterns: {video: 'video(?P<id>\d+)\.{video}', frames: 'video(?P<id>\d+)'}
labels:
  phases: {files: 'video(?P<id>\d+)-phase\.txt', unit: sample, rate: 1, columns: {start: Frame, label: Phase}}
"""


@pytest.fixture(scope="module")
def sets(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the four copies, of which AutoLaparo's is there as videos and as images."""
    cases, out = shared_data.parent / "cases", tmp_path_factory.mktemp("sets")
    if not (cases / "make_sets.py").is_file() or shutil.which("ffmpeg") is None:
        reason = f"no ffmpeg on this machine, or no make_sets.py in {cases}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    subprocess.run([sys.executable, "-c", PROGRAM, str(cases), str(out)], check=True, capture_output=True)
    return out


def indexed(root: Path, spec: DataSetSpec) -> tuple[Index, dict[str, dict[str, np.ndarray]]]:
    """The index of a copy, and the labels (T,) or (T, K) of all images of each video."""
    index = build_index(root, spec, DataConfig())
    assert not index.is_partial
    labels = {}
    for entry in index.videos:
        found = sampled_labels(Dataset(index, root), entry, DataConfig(fps=entry.most_fps))
        assert len(found.frame_index) == len(entry.image_frames)
        labels[entry.id] = {"phase": found.phase, "tool": found.tools}
    return index, labels


@pytest.mark.parametrize(("folder", "frames_per_row"), [("autolaparo_videos", 25), ("autolaparo_frames", 1)])
def test_autolaparo(sets: Path, folder: str, frames_per_row: int) -> None:
    index, labels = indexed(sets / folder / "data", load_dataset("autolaparo"))
    assert [entry.split for entry in index.videos] == ["train"] * 3
    expected = np.repeat(np.arange(SECONDS) * 7 // SECONDS, frames_per_row)
    assert labels.keys() == {"01", "02", "03"}
    for found in labels.values():
        np.testing.assert_array_equal(found["phase"], expected)


def test_cholect50(sets: Path) -> None:
    _, labels = indexed(sets / "cholect50/data", load_dataset("cholect50"))
    assert labels.keys() == {"VID01", "VID02", "VID04"}
    for found in labels.values():
        np.testing.assert_array_equal(found["phase"], np.arange(SECONDS) * 7 // SECONDS)
        np.testing.assert_array_equal(found["tool"], np.eye(6)[np.arange(SECONDS) % 6])


def test_m2cai16(sets: Path) -> None:
    index, labels = indexed(sets / "m2cai/data", load_dataset("m2cai16-workflow"))
    splits = {entry.id: entry.split for entry in index.videos}
    assert splits == {name: "test" if name.startswith("test_") else "train" for name in labels}
    assert len(labels) == 6
    for name, found in labels.items():
        expected = np.arange(FRAMES) * 8 // FRAMES
        expected[FRAMES - name.endswith("video_05") :] = -1  # its file has one row fewer
        np.testing.assert_array_equal(found["phase"], expected)


def test_a_set_of_its_own_with_a_row_per_second(sets: Path) -> None:
    _, labels = indexed(sets / "own_1fps_videos/data", DataSetSpec.model_validate(yaml.safe_load(OWN)))
    assert len(labels) == 3
    for found in labels.values():
        np.testing.assert_array_equal(found["phase"], np.repeat(np.minimum(np.arange(60) * 7 // 60, 6), 25))
