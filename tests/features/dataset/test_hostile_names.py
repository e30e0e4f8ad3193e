"""Names of files and folders that break lines, terminals and pages, and paths that leave the data root."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import UserError, printable
from configs.schema import DataConfig
from features.dataset.build import build_index, dataset_of_source
from features.dataset.check import check_index
from features.dataset.index import Dataset, Index
from tests.cli import run
from tests.stage1_cnn.material import SPEC, make_world, write_dataset
from tests.videos import VideoSpec, write_video

NAMES = {
    "line break": b"two\nlines",
    "tab": b"a\tb",
    "carriage return": b"error: all well\rhidden",
    "page": b"<script>alert(1)<",
    "terminal": b"\x1b[2J\x1b[31mred",
    "title": b"\x1b]0;owned\x07",
    "backwards": "\u202egnp.exe".encode(),
    "not UTF-8": b"\xff\xfe\x80",
    "255 bytes": b"x" * 255,
    "blanks and quotes": b" a 'b' \"c\" $(touch canary) `id` ",
    "rich markup": b"[[red]x[",
    "leading dash": b"-rf",
}


REFUSED = {"line break", "tab", "carriage return", "terminal", "title", "backwards", "not UTF-8"}


def settings(tmp_path: Path, root: Path) -> None:
    (tmp_path / "tiny-set.yaml").write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    tree = make_world(tmp_path, root).config.model_dump(mode="json")
    tree["data"] |= {"dataset": str(tmp_path / "tiny-set.yaml"), "split": {}}
    tree["extract"] |= {"encoder": "initial"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))


def one_printable_line_each(text: str) -> bool:
    return all(line.isprintable() for line in re.split(r"[\r\n]", text))


@pytest.mark.slow
def test_folders_of_any_name_are_indexed_or_named_in_one_line(tmp_path: Path) -> None:
    """A video and an orphaned annotation file in a folder of each name; names that JSON cannot hold are left out."""
    root = write_dataset(tmp_path / "data", 1)
    for number, name in enumerate(NAMES.values(), start=10):
        folder = os.path.join(os.fsencode(root), name)
        os.mkdir(folder)
        shutil.copyfile(root / "video01.mp4", os.path.join(folder, b"video%02d.mp4" % number))
        shutil.copyfile(root / "video01-phase.txt", os.path.join(folder, b"video%02d-phase.txt" % (number + 50)))
    settings(tmp_path, root)
    for arguments, code in ((["index"], 1), (["index", "--check"], 1), (["extract"], 1)):
        done = run([*arguments, "--config", "tiny.yaml"], tmp_path)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert one_printable_line_each(done.stdout + done.stderr)
    index = Index.load(tmp_path / "index.json")
    assert len(index.videos) + len(index.left_out) == 1 + len(NAMES)
    assert {video.id for video in index.left_out} == {
        f"video{number}" for number, name in enumerate(NAMES, start=10) if name in REFUSED
    }
    assert not (tmp_path / "canary").exists()
    assert len(list((tmp_path / "features").rglob("video*.h5"))) == len(index.videos)


@pytest.mark.parametrize("name", NAMES)
def test_a_video_of_any_name_is_accepted_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    stem = NAMES[name][:240]
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), stem + b".mp4")))
    try:
        write_video(tmp_path / "a.mp4", VideoSpec(count=10)).rename(path)
    except OSError as error:
        pytest.skip(f"this file system does not take the name: {error}")
    if name in REFUSED:
        with pytest.raises(UserError) as caught:
            dataset_of_source(path, SPEC, DataConfig())
        assert str(caught.value).isprintable()
    else:
        dataset = dataset_of_source(path, SPEC, DataConfig())
        index = dataset.index
        assert Index.from_json(json.loads(json.dumps(index.to_json()))) == index
        assert index.videos[0].id == path.stem
        assert (dataset.root / index.videos[0].source).samefile(path)


SOURCES: dict[str, str] = {
    "absolute": "/etc/passwd",
    "climbing": "../outside.mp4",
    "climbing later": "a/../../outside.mp4",
    "a link out": "out.mp4",
    "a link to a folder out": "outer/outside.mp4",
    "a link to itself": "loop.mp4",
    "links in a ring": "ring1/video.mp4",
    "NUL": "a\0b.mp4",
    "nothing": "",
    "the root": ".",
    "a device": "zero.mp4",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_paths_that_leave_the_root_are_refused(tmp_path: Path, kind: str) -> None:
    root = write_dataset(tmp_path / "data", 1)
    tree = indexed(root)
    write_video(tmp_path / "outside.mp4", VideoSpec(count=10))
    (root / "out.mp4").symlink_to(tmp_path / "outside.mp4")
    (root / "outer").symlink_to(tmp_path)
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    (root / "ring1").symlink_to(root / "ring2")
    (root / "ring2").symlink_to(root / "ring1")
    (root / "zero.mp4").symlink_to("/dev/zero")
    tree["videos"][0]["source"] = SOURCES[kind]
    (tmp_path / "index.json").write_text(json.dumps(tree))
    try:
        problems = check_index(Dataset(Index.load(tmp_path / "index.json"), root))
    except UserError as error:
        problems = [str(error)]
    assert len(problems) == 1
    assert problems[0].isprintable()


def indexed(root: Path) -> dict[str, Any]:
    return build_index(root, SPEC, DataConfig()).to_json()


def test_backslashes_are_part_of_a_name_not_separators(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", 1)
    write_video(tmp_path / "outside.mp4", VideoSpec(count=10))
    tree = indexed(root)
    tree["videos"][0]["source"] = "..\\outside.mp4"
    (problem,) = check_index(Dataset(Index.from_json(tree), root))
    assert "no such file" in problem


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 中 🔪", "plain é 中 🔪"),
        ("two\nlines", "two\\nlines"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\u202egnp", "\\u202egnp"),
        ("\udcff", "\\udcff"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_what_is_printed_is_one_line_that_a_terminal_does_not_obey(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert str(UserError(text)) == shown


def test_an_id_that_is_no_text_is_left_out_too(tmp_path: Path) -> None:
    """If a data set's pattern matches any name, a line break in a name caused a ValidationError."""
    root = write_dataset(tmp_path / "data", 1)
    shutil.copyfile(root / "video01.mp4", root / "video\n2.mp4")
    patterns = SPEC.patterns.model_copy(update={"video": r"video(?P<id>[\s\S]+)\.mp4"})
    index = build_index(root, SPEC.model_copy(update={"patterns": patterns}), DataConfig(), leave_out=True)
    assert [video.id for video in index.left_out] == ["\\n2"]
    assert Index.from_json(index.to_json()) == index
