"""The format of labels of docs/extending.md: one file outside the package, named by a description's `labels`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli import run, run_fresh
from tests.videos import VideoSpec, write_video

EXAMPLE = Path(__file__).with_name("label_format_example.py")
WORDS = ["index", "--root", "data", "--set", "data.dataset=own.yaml", "--set", "data.index=index.json"]
DESCRIPTION = r"""
name: own
annotation_fps: 25
phases: [Access, Closure]
id_format: "op{number}"
patterns: {video: 'op(?P<id>\d+)\.{video}', frames: 'op(?P<id>\d+)'}
labels:
  phases: {files: 'op(?P<id>\d+)\.srt', format: srt, form: intervals, unit: clock,
           columns: {start: start, end: end, label: label}}
"""
SUBTITLES = "1\n00:00:00,000 --> 00:00:01,200\nAccess\n\n2\n00:00:01,200 --> 00:00:02,000\nClosure\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.yaml").write_text(DESCRIPTION, encoding="utf-8")
    (tmp_path / "data").mkdir()
    write_video(tmp_path / "data" / "op1.mp4", VideoSpec(count=50))
    (tmp_path / "data" / "op1.srt").write_text(SUBTITLES, encoding="utf-8")
    return tmp_path


def test_a_format_of_labels_is_one_file(folder: Path) -> None:
    done = run_fresh(WORDS, folder, SURGSTAGE_PLUGINS=str(EXAMPLE))
    assert done.returncode == 0, done.stderr
    [video] = json.loads((folder / "index.json").read_text())["videos"]
    assert (video["phase_file"]["path"], video["phase_file"]["rows"]) == ("op1.srt", 2)
    assert "without a label" not in done.stderr


def test_without_it_the_name_is_unknown(folder: Path) -> None:
    done = run(WORDS, folder)
    assert done.returncode == 2
    assert "unknown format of labels srt" in done.stderr
