"""Fixtures of stage one's tests: a tiny data set and settings for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.stage1_cnn.material import World, make_world, write_dataset


@pytest.fixture(scope="session")
def tiny_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos with annotations; read only."""
    return write_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def world(tmp_path: Path, tiny_videos: Path) -> World:
    """Settings for the four videos, with empty runs, cache and store."""
    return make_world(tmp_path, tiny_videos)


@pytest.fixture
def own_world(tmp_path: Path, tiny_videos: Path) -> World:
    """The same with its own copy of the videos, which tests may damage."""
    root = Path(shutil.copytree(tiny_videos, tmp_path / "data"))
    return make_world(tmp_path, root)


@pytest.fixture(autouse=True)
def _files_of_these_tests_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests write their weights themselves; the refusal of an old torch is tested with the checkpoints."""
    monkeypatch.setattr("engine.checkpoints.SAFE_TORCH", (2, 0))
