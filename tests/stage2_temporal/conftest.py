"""A toy problem in which only earlier frames determine the phase, and training on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.schema import Config
from engine.stopping import StopRequest
from features.dataset.index import Index
from features.store import VideoFeatures
from features.store_folder import load_feature_set
from stage2_temporal.train import train_temporal
from tests.stage2_temporal.toy import cue_video, small, write_folder


@pytest.fixture(scope="session")
def cue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine short videos of unequal lengths: six for training, two for validation, one for testing; few unlabelled
    frames.
    """
    rng = np.random.default_rng(0)
    lengths = {"train": (70, 41, 55, 90, 33, 62), "val": (80, 45), "test": (50,)}
    videos = {
        f"video{i:02d}": cue_video(rng, split, frames)
        for i, (split, frames) in enumerate((s, n) for s, group in lengths.items() for n in group)
    }
    for _, _, phase in videos.values():
        phase[10:13] = -1
    return write_folder(tmp_path_factory.mktemp("cue") / "toy-features", videos)


Train = Callable[..., dict]


@pytest.fixture
def train(tmp_path: Path, cue_folder: Path) -> Train:
    """`train(name, temporal={...}, folder=..., stop=..., seed=...)` into a run below `tmp_path`."""

    def run(
        name: str = "run",
        temporal: dict | None = None,
        folder: Path | None = None,
        stop: StopRequest | None = None,
        seed: int = 0,
        data: dict | None = None,
    ) -> dict:
        config = Config.model_validate(
            {"seed": seed, "device": "cpu", "runs": tmp_path, "temporal": small(**(temporal or {})), "data": data or {}}
        )
        stop = StopRequest() if stop is None else stop
        return train_temporal(config, tmp_path / name, folder or cue_folder, stop).to_json()

    return run


@pytest.fixture
def videos_of() -> Callable[[Path, str], dict[str, VideoFeatures]]:
    """Features of one split of a folder."""

    def read(folder: Path, split: str) -> dict[str, VideoFeatures]:
        index = Index.load(folder / "index.json")
        return load_feature_set(folder, [entry.id for entry in index.by_split(split)])

    return read
