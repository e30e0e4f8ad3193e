"""The annotation format of docs/extending.md: one file outside the package, and its labels are indexed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.load import load_dataset
from features.dataset.formats.base import FORMATS
from features.dataset.formats.cholec80 import parse_phases
from tests.cli import run, run_fresh
from tests.videos import VideoSpec, write_video

EXAMPLE = Path(__file__).with_name("annotation_example.py")
DATASET = EXAMPLE.with_name("dataset_example.yaml")
WORDS = ["index", "--root", "data", "--set", "data.dataset=hernia.yaml", "--set", "data.index=index.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three videos of four seconds; the labels of one are JSON, those of the others are text."""
    text = DATASET.read_text(encoding="utf-8").replace(r"-phases\.txt", r"-phases\.(txt|json)")
    (tmp_path / "hernia.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "data").mkdir()
    for number in (1, 2, 3):
        write_video(tmp_path / "data" / f"op{number}.mp4", VideoSpec(count=100))
    for number in (1, 2):
        labels = "Frame\tPhase\n" + "".join(f"{second}\t0\n" for second in range(4))
        (tmp_path / "data" / f"op{number}-phases.txt").write_text(labels, encoding="utf-8")
    write_segments(tmp_path, "Closure")
    return tmp_path


def write_segments(folder: Path, last: str) -> None:
    segments = [[0, 1, "Access"], [2, 4, last]]
    (folder / "data" / "op3-phases.json").write_text(json.dumps(segments), encoding="utf-8")


def test_a_format_is_one_file(folder: Path) -> None:
    done = run_fresh(WORDS, folder, SURGSTAGE_PLUGINS=str(EXAMPLE))
    assert done.returncode == 0, done.stderr
    [video] = [one for one in json.loads((folder / "index.json").read_text())["videos"] if one["id"] == "hernia003"]
    assert (video["phase_file"]["path"], video["phase_file"]["rows"]) == ("op3-phases.json", 4)
    assert "1 row without a label" in done.stdout + done.stderr
    write_segments(folder, "Clossure")
    done = run_fresh([*WORDS, "--force"], folder, SURGSTAGE_PLUGINS=str(EXAMPLE))
    assert done.returncode == 1  # the video is left out
    assert "op3-phases.json: unknown phase 'Clossure'; did you mean Closure?" in done.stderr


def test_without_the_format_the_file_is_not_in_cholec80s(folder: Path) -> None:
    done = run(WORDS, folder)
    assert done.returncode == 1  # the video is left out
    assert "op3-phases.json: has no row below the header" in done.stderr


def test_the_projects_own_format_comes_first() -> None:
    content, path, spec = (
        b"\xef\xbb\xbfframe\tPhase\r\n0\tPreparation\r\n",
        Path("labels.json"),
        load_dataset("cholec80"),
    )
    assert FORMATS.names(plugins=False)[0] == "cholec80"
    own = FORMATS.find("cholec80")
    assert own.recognises(content, path)
    assert not own.recognises(b'[[0, 1, "Access"]]', path)
    np.testing.assert_array_equal(own.phases(content, path, spec).labels, parse_phases(content, path, spec).labels)
