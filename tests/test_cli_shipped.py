"""Whole runs on tiny copies of public data sets of three forms, by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from features.store import read_features
from tests.cli import succeed
from tests.shipped_sets import make

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "preprocess": {"resize_px": 40, "crop_px": 32},
    "cnn": {
        "backbone": "shufflenet_v2_x0_5",
        "weights": "random",
        "phase_head": True,
        "epochs": 1,
        "batch_frames": 8,
        "workers": 0,
        "backbone_lr_factor": 1.0,
    },
    "extract": {"precision": "fp32", "workers": 1},
    "temporal": {
        "head": {"name": "lstm", "hidden": 8},
        "sequence": {"mode": "chunked", "frames": 8, "batch": 1},
        "epochs": 1,
    },
}


@pytest.mark.parametrize(
    ("name", "fps", "rule", "test"),
    [
        ("autolaparo", 2, "official", "15"),
        ("strasbypass70", 25, "fold0", "SBP70"),
        ("cataract-101", 25, "1/1/1", "case_1001"),
    ],
)
def test_a_run_on_a_public_data_set(name: str, fps: int, rule: str, test: str, tmp_path: Path) -> None:
    truth = make(name, tmp_path / "data")
    data = {"dataset": name, "root": "data", "index": "index.json", "fps": fps, "split": {"rule": rule}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"data": data, **SETTINGS}))
    succeed(["run", "--config", "tiny.yaml"], tmp_path)
    files = {path.stem: path for path in (tmp_path / "artifacts/features").glob("*/*.h5")}
    assert files.keys() == truth.keys()
    for video_id, path in files.items():
        np.testing.assert_array_equal(read_features(path).phase, truth[video_id]["phase"])
    scored = json.loads((tmp_path / "runs/tiny/evaluate/test/truth.json").read_text())["videos"]
    assert scored.keys() == {test}
    labels = [label for count, label in scored[test]["phase"] for _ in range(count)]
    np.testing.assert_array_equal(labels, truth[test]["phase"])
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["phase_accuracy_temporal"] >= 0
