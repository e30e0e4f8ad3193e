"""`datasets list`, `show` and `check`: what they print, their exit codes, and that they write nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from configs.file_pattern import example_of, file_pattern
from configs.load import dataset_names, load_dataset
from features.dataset.describe import dataset_lines, label_form
from tests.cli import run, succeed
from tests.shipped_sets import make

OWN = """name: own
title: Our operations
licence: CC BY 4.0
homepage: https://example.org
videos: 4
unverified: the rate of the labels
annotation_fps: 25
phases: [Access, Dissection, Closure]
tools: [Hook, Clip Applier]
id_format: 'op{number}'
patterns: {video: 'op(?P<id>\\d+)\\.{video}', frames: 'op(?P<id>\\d+)'}
labels:
  phases:
    files: 'all\\.csv'
    delimiter: comma
    columns: {video: case, start: from, end: to, label: phase}
    form: intervals
    unit: second
  tools: {files: 'op(?P<id>\\d+)-tools\\.csv', delimiter: comma, unit: sample, rate: 1, columns: {start: n}}
splits: {fixed: {train: [op1, op2], test: ['op[34]']}}
default_split: fixed
"""


def make_own(folder: Path, videos: int = 3, images: int = 8) -> None:
    """A description in `own.yaml` and its data in `data`: folders of images at 1 per second."""
    (folder / "own.yaml").write_text(OWN)
    rows = ["case,from,to,phase"]
    for number in range(1, videos + 1):
        (folder / f"data/op{number}").mkdir(parents=True)
        for second in range(images):
            Image.new("RGB", (32, 32)).save(folder / f"data/op{number}/{25 * second:06d}.png")
        rows += [f"{number},0,3,access", f"{number},3,{images},dissection"]
        tools = "".join(f"{second},{int(second > 1)},0\n" for second in range(images))
        (folder / f"data/op{number}-tools.csv").write_text("n,Hook,Clip Applier\n" + tools)
    (folder / "data/all.csv").write_text("\n".join(rows) + "\n")


def test_the_list_names_every_data_set(tmp_path: Path) -> None:
    out = succeed(["datasets", "list"], tmp_path)
    assert [line.split()[0] for line in out.splitlines()[1:]] == dataset_names()
    assert "7 phases, 7 tools" in out


@pytest.mark.parametrize("name", dataset_names())
def test_every_data_set_can_be_shown(name: str) -> None:
    spec = load_dataset(name)
    text = "\n".join(dataset_lines(spec))
    for role in spec.roles:
        assert spec.classes_of(role)[0][0] in text
        assert label_form(role, spec)
    assert max(map(len, text.splitlines())) <= 120


def test_a_description_in_words(tmp_path: Path) -> None:
    make_own(tmp_path)
    out = " ".join(succeed(["datasets", "show", "own.yaml"], tmp_path).split())
    for part in (
        "own: Our operations",
        "licence: CC BY 4.0",
        "where to get it: https://example.org",
        "not verified: the rate of the labels",
        "phases (3) 0 Access, 1 Dissection, 2 Closure",
        "fixed (default): train 2 videos, test 2 videos",
        "videos: op1.mp4",
        "labels of phases: all.csv; one file for all videos; comma-separated; each row is an interval, whose end is "
        "exclusive; times in seconds; columns: video in case, start in from, end in to, label in phase",
        "labels of tools: op01-tools.csv; one file per video; comma-separated; one row per labelled frame; numbers at "
        "1 per second, from 0; columns: start in n, one per tool, named like it",
    ):
        assert part in out, part


def test_a_description_is_tried_and_nothing_is_written(tmp_path: Path) -> None:
    make_own(tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    out = succeed(["datasets", "check", "own.yaml", "--root", "data"], tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    for line in (
        "own in data: 3 videos",
        "  folders of frames: 3, such as op1",
        "  labels of phases: 1 file, all.csv",
        "  labels of tools: 3 files, such as op1-tools.csv",
        "  split fixed: train 2, test 1",
        "  op1: Access from 0:00:00, Dissection from 0:00:03; labelled until 0:00:08",
        "  op1, tools: none from 0:00:00, Hook from 0:00:02; labelled until 0:00:08",
        "  phases: 100.0%, least in op1 (100.0%); never: Closure",
    ):
        assert line in out.splitlines(), line


def test_a_shipped_description_is_tried_with_the_splits_of_the_copy(tmp_path: Path) -> None:
    for name, line in (
        ("grasp", "  split official: train 2, test 1"),
        ("multibypass140", "  split fold0: train 2, val 2, test 2"),
        ("phakir", "  note: the description of phakir is unverified: "),
    ):
        make(name, tmp_path / name)
        assert line in succeed(["datasets", "check", name, "--root", name], tmp_path)


def test_short_labels_show_tenths_of_seconds_and_missing_patterns_are_named(tmp_path: Path) -> None:
    make_own(tmp_path, videos=1)
    (tmp_path / "data/all.csv").write_text("case,from,to,phase\n1,0,0.12,access\n1,0.2,2.5,dissection\n")
    text = (tmp_path / "own.yaml").read_text()
    before, _, after = text.partition("  tools: {files")
    (tmp_path / "own.yaml").write_text(before + after.partition("\n")[2].replace("default_split: fixed", ""))
    out = run(["datasets", "check", "own.yaml", "--root", "data", "--set", "data.min_labelled=0.1"], tmp_path).stdout
    assert "  op1: Access from 0:00:00, no label from 0:00:00.1, Dissection from 0:00:00.2, no label" in out
    assert "labelled until 0:00:02.5" in out
    assert "  labels of tools: none, since the description has neither labels.tools nor patterns.tool" in out
    assert "their names do not match patterns.tool, which is not set: op1-tools.csv" in out


def test_what_is_missing_is_named_with_exit_code_1(tmp_path: Path) -> None:
    make_own(tmp_path)
    (tmp_path / "data/op2-tools.csv").write_text("n,Hook,Clip Applier\n0,1,x\n")
    (tmp_path / "data/op3-tools.csv").unlink()
    (tmp_path / "data/op9.mp4").write_bytes(b"no video")
    done = run(["datasets", "check", "own.yaml", "--root", "data"], tmp_path)
    assert done.returncode == 1
    assert "  left out: op2: op2-tools.csv: line 2" in done.stdout
    assert "  left out: op9: " in done.stdout
    assert "  tools: no labels of op3" in done.stdout.splitlines()
    first = run(["datasets", "check", "own.yaml", "--root", "data", "--videos", "1"], tmp_path)
    assert first.returncode == 0
    excluded = ["--set", "data.exclude={op1: no consent}"]
    third = run(["datasets", "check", "own.yaml", "--root", "data", "--videos", "2", *excluded], tmp_path)
    assert "  op3: Access from 0:00:00, Dissection from 0:00:03; labelled until 0:00:08" in third.stdout.splitlines()
    assert "only the first 1 of 4 videos were read" in first.stdout


def test_a_wrong_description_is_one_line_with_exit_code_2(tmp_path: Path) -> None:
    make_own(tmp_path)
    (tmp_path / "wrong.yaml").write_text(OWN.replace("form: intervals", "form: interval"))
    (tmp_path / "none.yaml").write_text(OWN.replace("'op(?P<id>\\d+)'", "'case(?P<id>\\d+)'"))
    for name, root, message in (
        ("wrong.yaml", "data", "labels.phases.form"),
        ("none.yaml", "data", "no videos of own found"),
        ("own.yaml", "nowhere", "no such folder"),
        ("owm", "data", "no such data set"),
    ):
        done = run(["datasets", "check", name, "--root", root], tmp_path)
        assert done.returncode == 2, done.stdout
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("pattern", "example"),
    [
        (r"label_(?P<id>\d+)\.txt", "label_01.txt"),
        (r"vid(eo)?[ _-]?(?P<id>\d{3})[_-]phases?\.(csv|txt)", "vid001_phase.csv"),
        (r"(?P<id>(test_)?workflow_video_\d+)\.txt", "workflow_video_01.txt"),
        (r"Annotations/(?P<id>\d+)/x\.csv", "Annotations/01/x.csv"),
        (r"(?P<id>\w+)x", None),
    ],
)
def test_an_example_is_one_that_the_pattern_matches(pattern: str, example: str | None) -> None:
    assert example_of(pattern) == example
    assert example is None or file_pattern(pattern).fullmatch(example)
