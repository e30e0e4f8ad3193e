"""What `index` uses and passes over, and which sources later commands use: the command line and the catalogue."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load_config, load_dataset
from configs.schema import Config, DataConfig
from engine.files import LinkedRoot
from features.dataset.build import build_index
from features.dataset.catalogue import data_root, index_dataset, open_dataset
from features.dataset.check import check_index
from features.dataset.index import Dataset, Index
from tests.cli import run
from tests.videos import VideoSpec, write_video

# As released before patterns could hold {video} and {image}.
OLD_PATTERNS = {
    "video": r"video_?(?P<id>\d+)\.(mp4|avi|mkv)",
    "frames": r"video_?(?P<id>\d+)",
    "frame": r"(.*[_-])?(?P<frame>\d+)\.(jpg|jpeg|png)",
    "phase": r"video_?(?P<id>\d+)-phase\.txt",
    "tool": r"video_?(?P<id>\d+)-tool\.txt",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data/videos").mkdir(parents=True)
    for number in (1, 2):
        write_video(tmp_path / f"data/videos/video{number:02d}.mp4", VideoSpec(count=10))
    return tmp_path / "data"


def config(root: Path, *more: str) -> Config:
    given = (f"data.root={root}", f"data.index={root.parent / 'index.json'}", "data.split.rule=50%/50%")
    return load_config("mini", [*given, *more])


def test_files_that_are_passed_over_cost_exit_code_1_each_time_until_they_are_excluded(root: Path) -> None:
    for name in ("video03_part1.mp4", "video03_part2.mp4", "case_7.mov", "Video 04.MKV"):
        shutil.copyfile(root / "videos/video01.mp4", root / f"videos/{name}")
    words = ["index", "--config", "mini", "--root", str(root), "--out", "i.json", "--set", "data.split.rule=1/1/1"]
    first = run(words, root.parent)
    assert first.returncode == 1, first.stderr
    said = first.stdout + first.stderr
    assert "passed over: videos/case_7.mov: its name does not match patterns.video" in said
    assert "passed over: videos/video03_part1.mp4, videos/video03_part2.mp4: looks like one part of a recording" in said
    again = run(words, root.parent)
    assert again.returncode == 1
    assert "i.json: unchanged" in again.stdout + again.stderr
    checked = run([*words, "--check"], root.parent)
    assert checked.returncode == 1
    assert "3 problem(s) found" in checked.stdout
    excluding = [*words, "--set", 'data.exclude={"*_part?.mp4": joined elsewhere, videos/case_7.mov: not ours}']
    assert run(excluding, root.parent).returncode == 2  # another index than the one that is there
    assert run([*excluding, "--force"], root.parent).returncode == 0
    index = Index.load(root.parent / "i.json")
    assert [entry.id for entry in index.videos] == ["video01", "video02", "video04"]
    assert {one.id: one.reason for one in index.passed_over} == {
        "videos/case_7.mov": "excluded: not ours",
        "videos/video03_part1.mp4": "excluded: joined elsewhere",
        "videos/video03_part2.mp4": "excluded: joined elsewhere",
    }


def test_an_index_made_with_older_patterns_is_used_until_the_present_ones_find_more(root: Path) -> None:
    spec = load_dataset("cholec80")
    old = spec.model_copy(update={"patterns": spec.patterns.model_copy(update=OLD_PATTERNS)})
    asked = config(root)
    build_index(root, old, asked.data).save(asked.data.index)
    before = asked.data.index.read_bytes()
    index = open_dataset(asked).index
    assert [entry.id for entry in index.videos] == ["video01", "video02"]
    index_dataset(asked)
    assert asked.data.index.read_bytes() == before
    shutil.copyfile(root / "videos/video01.mp4", root / "videos/video03.mov")
    with pytest.raises(UserError, match="run `index --force`"):
        open_dataset(asked)
    with pytest.raises(UserError, match="replace it with --force"):
        index_dataset(asked)


def test_an_index_of_other_sources_than_the_settings_ask_for_is_refused(root: Path) -> None:
    index_dataset(config(root))
    open_dataset(config(root, "data.sources=video:videos"))
    with pytest.raises(UserError, match=r"data\.sources=frames does not select; run `index --force`"):
        open_dataset(config(root, "data.sources=frames"))


def test_links_out_of_the_root_need_the_setting_in_every_command(root: Path) -> None:
    shutil.move(root / "videos", root.parent / "elsewhere")
    (root / "videos").symlink_to(root.parent / "elsewhere")
    allowed = config(root, "data.follow_links=true")
    assert isinstance(data_root(allowed), LinkedRoot)
    index = index_dataset(allowed)
    assert check_index(Dataset(index, data_root(allowed))) == []
    assert all("data.follow_links=true" in problem for problem in check_index(Dataset(index, data_root(config(root)))))
    with pytest.raises(UserError, match=r"data\.follow_links=true to allow such links"):
        build_index(root, index.dataset, DataConfig())
