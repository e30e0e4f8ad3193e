"""A run is evaluated on features of its own encoder, in whatever precision this machine computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import Config
from engine.stopping import StopRequest
from stage2_temporal.evaluate import evaluate_run
from tests.stage2_temporal.toy import cue_video, write_folder


def test_features_made_in_another_precision_are_evaluated_with_a_note(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    videos = {f"video{i}": cue_video(rng, split, 30) for i, split in enumerate(("train", "val", "test"))}
    made_there = write_folder(tmp_path / "bf16", videos, precision="bf16", arithmetic="folded, fused")
    made_here = write_folder(tmp_path / "fp32", videos)
    another = write_folder(tmp_path / "another", videos, weights=dict.fromkeys(videos, "1" * 64))
    train(folder=made_there, temporal={"epochs": 1, "baseline": False})
    config = Config.model_validate({"device": "cpu", "runs": tmp_path})

    def evaluate(features: Path) -> str:
        evaluate_run(config, tmp_path / "run", features=features, stop=StopRequest())
        return "".join(capsys.readouterr())

    assert "features were computed in" not in evaluate(made_there)
    assert (
        "note: the training's features were computed in bf16 (folded, fused), these are computed in fp32 (plain)"
        in evaluate(made_here)
    )
    metrics = json.loads((tmp_path / "run/evaluate/test/metrics.json").read_text())
    assert (metrics["encoder"]["precision"], metrics["encoder"]["arithmetic"]) == ("fp32", "plain")
    with pytest.raises(UserError, match=r"features of encoder .*weights_sha256: 000.*name the right folder"):
        evaluate(another)


def test_features_of_two_encoders_are_named_by_their_files(train: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    splits = {"video0": "train", "video1": "val", "video2": "test", "case:1": "test"}
    videos = {name: cue_video(rng, split, 30) for name, split in splits.items()}
    train(folder=write_folder(tmp_path / "one", videos), temporal={"epochs": 1, "baseline": False})
    mixed = write_folder(tmp_path / "two", videos, weights={"case:1": "1" * 64})
    config = Config.model_validate({"device": "cpu", "runs": tmp_path})
    with pytest.raises(UserError, match=r"case%3A1\.h5: made by encoder"):
        evaluate_run(config, tmp_path / "run", features=mixed, stop=StopRequest())
