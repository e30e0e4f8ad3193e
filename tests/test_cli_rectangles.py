"""Joint training, its evaluation and `predict` on frames that are not square, through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from configs.errors import UserError
from configs.load import load_config, load_dataset
from evaluation.files.predictions import read_prediction_csv
from tests.cli import succeed

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "data": {"root": "data", "index": "index.json", "split": {"rule": "1/1/1"}},
    "cache": {"dir": "cache"},
    "preprocess": {"resize_px": [40, 64], "crop_px": [32, 48], "cut_margin": True},
    "cnn": {"backbone": "shufflenet_v2_x0_5", "weights": "random"},
    "temporal": {"head": {"name": "lstm", "hidden": 8}},
    "joint": {"sequence": {"frames": 4, "stride": 4, "batch": 4}, "multitask": {"epochs": 1}, "crops": "ten"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rectangles")
    options = ["--videos", "3", "--fps", "1", "--width", "96", "--height", "64", "--speed-up", "100"]
    succeed(["simulate", "data", *options], folder)
    (folder / "wide.yaml").write_text(yaml.safe_dump(SETTINGS))
    succeed(["index", "--config", "wide.yaml"], folder)
    return folder


def test_predict_gives_the_numbers_of_the_evaluated_joint_net(place: Path) -> None:
    succeed(["train-joint", "--config", "wide.yaml", "--name", "wide"], place)
    succeed(["evaluate", "--config", "wide.yaml", "--name", "wide", "--model", "joint"], place)
    ahead = ["--set", "extract.decode_ahead=on", "--video"]
    succeed(["predict", "--config", "wide.yaml", "--name", "wide", "data/videos/video03.mp4", *ahead], place)
    spec = load_dataset("cholec80")
    (known,) = (place / "runs/wide/evaluate").glob("*/predictions/video03.csv")
    evaluated, predicted = (
        read_prediction_csv(file, spec) for file in (known, place / "runs/wide/predict/video03.csv")
    )
    np.testing.assert_allclose(predicted.probabilities, evaluated.probabilities, atol=2e-5)


@pytest.mark.parametrize("size", ["[40]", "[40, 90.5]", "[40, true]", "[8, 40]", "wide", ".inf", "{a: 1}", "null"])
def test_a_wrong_size_is_one_line(size: str) -> None:
    with pytest.raises(
        UserError, match=r"crop_px: must be a number of pixels or \[height, width\], each from 16 to 2048"
    ):
        load_config(overrides=[f"preprocess.crop_px={size}"])


def test_a_crop_that_is_too_large_is_named_as_it_was_given() -> None:
    with pytest.raises(UserError, match=r"crop_px \[40, 65\] is larger than resize_px \[40, 64\]"):
        load_config(overrides=["preprocess.crop_px=[40, 65]", "preprocess.resize_px=[40, 64]"])
