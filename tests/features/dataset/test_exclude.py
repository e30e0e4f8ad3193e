"""`data.exclude`: videos left out permanently, by id or pattern, each with a reason; no other video's split changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config, DataConfig
from features.dataset.build import build_index
from features.dataset.catalogue import check_dataset, index_dataset, open_dataset
from features.dataset.index import Index
from tests.stage1_cnn.material import SPEC, write_labels
from tests.videos import VideoSpec, write_video


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five video files, the third of which contains no video."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(1, 6):
        write_video(folder / f"video{number:02d}.mp4", VideoSpec(count=65, width_px=32, height_px=32))
        write_labels(folder, number)
    (folder / "video03.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def settings(root: Path, tmp_path: Path):
    """Settings of these videos, from a file and further `--set` values."""
    described = tmp_path / "tiny-set.yaml"
    described.write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    data = {"dataset": str(described), "root": str(root), "index": str(tmp_path / "index.json"), "fps": 5}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"data": {**data, "split": {"rule": "2/2/1"}}}))
    return lambda *overrides: load_config(tmp_path / "tiny.yaml", overrides)


@pytest.mark.parametrize(
    ("value", "reasons"),
    [
        ("{video02: wrong patient}", {"video02": "excluded: wrong patient"}),
        ('{"video0[24]": no consent}', dict.fromkeys(("video02", "video04"), "excluded: no consent")),
        ("[video02]", {"video02": "excluded by data.exclude"}),
        ("{video02: one, '*02': two}", {"video02": "excluded: one"}),
        ("{video03: damaged}", {"video03": "excluded: damaged"}),
    ],
)
def test_excluded_videos_are_recorded_and_move_no_split(settings, value: str, reasons: dict[str, str]) -> None:
    before = index_dataset(settings())
    config = settings(f"data.exclude={value}")
    index = index_dataset(config, replace=True)
    assert {video.id: video.reason for video in index.left_out if video.excluded} == reasons
    assert [(v.id, v.split) for v in index.videos] == [(v.id, v.split) for v in before.videos if v.id not in reasons]
    assert index.found_ids() == [f"video{number:02d}" for number in range(1, 6)]
    assert [video.id for video in index.missing] == ["video03"] * ("video03" not in reasons)
    assert open_dataset(config).index == index == Index.load(config.data.index)
    assert not any(name in problem for problem in check_dataset(config) for name in reasons)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[vido02]", r"data.exclude: there is no video 'vido02'; did you mean video02\?"),
        ("{case_*: no consent}", r"data.exclude: there is no video 'case_\*'"),
        ("['*']", "data.exclude leaves out all 5 videos"),
    ],
)
def test_a_pattern_that_names_nothing_or_everything(settings, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        index_dataset(settings(f"data.exclude={value}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("first", "then"), [([], ["[video02]"]), (["[video02]"], []), (["[video02]"], ["[video04]"])])
def test_another_exclusion_than_the_indexs_is_noticed(settings, first: list[str], then: list[str]) -> None:
    made: Config = settings(*(f"data.exclude={value}" for value in first))
    asked: Config = settings(*(f"data.exclude={value}" for value in then))
    index_dataset(made)
    with pytest.raises(UserError, match=r"data.exclude now treats video02 differently .* run `index --force`"):
        open_dataset(asked)
    with pytest.raises(UserError, match="differs from what is found now; replace it with --force"):
        index_dataset(asked)
    index_dataset(asked, replace=True)
    open_dataset(asked)


def test_an_excluded_video_keeps_its_place_if_an_unused_folder_has_its_name(tmp_path: Path) -> None:
    patterns = SPEC.patterns.model_copy(update={"video": r"(?P<id>\w+)\.mp4", "frames": r"case(?P<id>\d+)"})
    spec = SPEC.model_copy(update={"patterns": patterns, "tools": ()})
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", VideoSpec(count=5, width_px=32, height_px=32))
    for folder in ("case1", "b"):  # the second is passed over next to the first
        (tmp_path / folder).mkdir()
        for number in range(3):
            (tmp_path / folder / f"{number}.png").write_bytes(b"\x89PNG")
    index = build_index(tmp_path, spec, DataConfig(exclude={"b": "no consent"}), leave_out=True)
    assert "b" in [one.id for one in index.passed_over]
    assert [one.id for one in index.left_out if one.excluded] == ["b"]
    assert index.found_ids()[:3] == ["a", "b", "c"]
