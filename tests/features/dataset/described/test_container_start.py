"""Times that count from the container's start, in videos whose first frame comes later than their sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.schema import DataConfig
from features.dataset.build import build_index
from features.dataset.check import check_index
from features.dataset.index import Dataset, Index
from features.dataset.labels import load_labels
from tests.videos import VideoSpec, write_video

ROWS = "start\tend\tlabel\n00:00:00.400\t00:00:01.200\tA\n00:00:01.200\t00:00:01.680\tB\n"


def spec_of(zero: str) -> DataSetSpec:
    labels = {"files": r"video(?P<id>\d+)\.txt", "form": "intervals", "unit": "clock", "zero": zero}
    labels["columns"] = {"end": "end", "label": "label"}
    patterns = {"video": r"video(?P<id>\d+)(_(?P<part>\d))?\.{video}", "frames": r"video(?P<id>\d+)"}
    fields = {"name": "own", "annotation_fps": 25, "phases": ("A", "B"), "default_split": "1/0/0"}
    return DataSetSpec.model_validate({**fields, "patterns": patterns, "labels": {"phases": labels}})


def phases(index: Index, root: Path) -> list[int]:
    entry = index.videos[0]
    return load_labels(Dataset(index, root), entry, np.arange(entry.frame_count))[0].tolist()


@pytest.mark.parametrize("ending", ["ts", "mp4"])
def test_times_count_from_the_containers_start_if_the_description_says_so(tmp_path: Path, ending: str) -> None:
    write_video(tmp_path / f"video01.{ending}", VideoSpec(count=30, start_s=0.48, with_audio=True))
    (tmp_path / "video01.txt").write_text(ROWS)
    index = build_index(tmp_path, spec_of("container"), DataConfig())
    assert index.videos[0].start_s == 0.48
    assert phases(index, tmp_path) == [0] * 18 + [1] * 12
    assert check_index(Dataset(index, tmp_path)) == []
    assert Index.from_json(index.to_json()) == index
    plain = build_index(tmp_path, spec_of("first_frame"), DataConfig())
    assert "start_s" not in plain.to_json()["videos"][0]
    assert phases(plain, tmp_path) == [-1] * 10 + [0] * 20


def test_a_recording_in_parts_counts_from_its_first_file(tmp_path: Path) -> None:
    write_video(tmp_path / "video01_1.mp4", VideoSpec(count=20, start_s=0.48, with_audio=True))
    write_video(tmp_path / "video01_2.mp4", VideoSpec(count=10))
    (tmp_path / "video01.txt").write_text(ROWS)
    index = build_index(tmp_path, spec_of("container"), DataConfig())
    assert phases(index, tmp_path) == [0] * 18 + [1] * 12


def test_folders_of_frames_have_no_container(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "video01").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "video01" / f"{number:06d}.png")
    (tmp_path / "video01.txt").write_text(ROWS)
    with pytest.raises(UserError, match=r"video01: its labels count from the start of a video's container .*offset_s"):
        build_index(tmp_path, spec_of("container"), DataConfig())
