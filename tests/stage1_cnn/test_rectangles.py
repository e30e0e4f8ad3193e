"""Frames and crops that are not square: extraction gives the embeddings that a restatement gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from configs.schema import Config
from engine.stopping import StopRequest
from features.dataset.sampling import sampled_frames
from features.frames.source import frame_cache, open_source
from features.frames.training_cache import fill_cache
from features.store import read_features
from stage1_cnn.encoders.backbone import initial_backbone
from stage1_cnn.extract import extract
from tests.stage1_cnn.material import World

PIXELS = {"resize_px": [40, 60], "crop_px": [32, 48], "cut_margin": True}  # of frames with 48 x 64 pixels


def settings(world: World, **extract_settings: Any) -> Config:
    return world.set(preprocess=PIXELS, extract={"encoder": "initial", **extract_settings})


@pytest.fixture
def restated(world: World) -> NDArray[np.float32]:
    """The embeddings (T, D) of the first video."""
    config, dataset = settings(world), world.dataset()
    entry, pixels = dataset.index.videos[0], config.preprocess
    images = []
    with open_source(config, dataset, entry) as reader:
        for frame in reader.read(sampled_frames(entry, config.data.fps).tolist()):
            resized = np.asarray(Image.fromarray(frame).resize((60, 40), Image.Resampling.BILINEAR))
            crop = resized[4:36, 6:54].astype(np.float32) / 255
            images.append((crop - pixels.mean) / pixels.std)
    batch = torch.from_numpy(np.stack(images).astype(np.float32)).permute(0, 3, 1, 2)  # (T, 3, 32, 48)
    with torch.inference_mode():
        return initial_backbone(config).eval()(batch).numpy()


@pytest.mark.parametrize(("way", "tolerance"), [({}, 1e-4), ({"precision": "bf16"}, 0.05)], ids=str)
def test_features_are_those_of_a_restatement(
    world: World, restated: NDArray[np.float32], way: dict[str, Any], tolerance: float
) -> None:
    report = extract(settings(world, **way), world.run, world.dataset(), stop=StopRequest())
    found = read_features(report.folder / "video01.h5").features
    np.testing.assert_allclose(found, restated, atol=tolerance * np.abs(restated).max())


def test_cached_frames_give_the_same_features(world: World) -> None:
    config, dataset = settings(world), world.dataset()
    fill_cache(config, dataset, dataset.index.videos, StopRequest())
    assert len(list(frame_cache(config).folder.glob("*.h5"))) == 4
    stored = []
    for store, use in (("cached", True), ("source", False)):
        changed = config.model_copy(
            update={
                "cache": config.cache.model_copy(update={"use_for_extract": use}),
                "extract": config.extract.model_copy(update={"store": Path(config.extract.store / store)}),
            }
        )
        report = extract(changed, None, dataset, stop=StopRequest())
        stored.append(read_features(report.folder / "video02.h5"))
    assert [one.attributes["frames_from"] for one in stored] == ["cache", "source"]
    assert np.array_equal(stored[0].features, stored[1].features)
