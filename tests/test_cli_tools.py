"""Tools of a frozen encoder, recognised by the probe of `train-tools`, through the real command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from configs.load import load_dataset
from evaluation.files.predictions import read_prediction_csv
from tests.cli import run, succeed
from tests.test_cli import SETTINGS, refuse

SPEC = load_dataset("cholec80")
FROZEN = ["--config", "frozen.yaml"]
SIMULATE = ["--seed", "1", "--fps", "5", "--width", "96", "--height", "96", "--speed-up", "100"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `run` has finished with an encoder that was not trained; three simulated operations."""
    folder = tmp_path_factory.mktemp("frozen")
    succeed(["simulate", "data", "--videos", "3", *SIMULATE], folder)
    tree = json.loads(json.dumps(SETTINGS))
    tree["data"] |= {"root": str(folder / "data"), "split": {"rule": "1/1/1"}}
    tree["cnn"] |= {"backbone": "shufflenet_v2_x0_5"}  # whose random weights tell frames apart
    tree["extract"] |= {"encoder": "initial"}
    tree["temporal"] |= {"epochs": 1, "baseline": False}
    (folder / "frozen.yaml").write_text(yaml.safe_dump(tree))
    (folder / "printed.txt").write_text(succeed(["run", *FROZEN], folder))
    return folder


def test_run_reports_map_of_a_frozen_encoder(place: Path) -> None:
    """The stage, the summary, the metrics with what the probe was, the predictions, and the model card."""
    folder = place / "runs/frozen"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["seconds"]) == ["index", "extract", "train-tools", "train-temporal", "evaluate"]
    assert 0 < summary["tool_map"] <= 1
    result = json.loads((folder / "tools/result.json").read_text())
    assert {"config.yaml", "environment.json", "identity.json", "best.pt", "trained_on.json"} <= {
        path.name for path in (folder / "tools").iterdir()
    }
    metrics = json.loads((folder / "evaluate/test/metrics.json").read_text())
    assert metrics["tools"]["map_pooled"] == pytest.approx(100 * summary["tool_map"])
    assert (metrics["tool_probe"]["c"], metrics["tool_probe"]["val_map"]) == (result["c"], result["val_map"])
    found = read_prediction_csv(folder / "evaluate/test/predictions/video03.csv", SPEC)
    assert found.tool_probabilities is not None
    assert "recognised by the linear probe" in (place / "printed.txt").read_text()
    card = (folder / "MODEL_CARD.md").read_text()
    assert "for phases and tools" in card
    assert "by a linear probe of the frozen features" in card


def test_again_nothing_is_trained(place: Path) -> None:
    result = place / "runs/frozen/tools/result.json"
    before, checkpoint = result.read_bytes(), (result.parent / "best.pt").stat().st_mtime_ns
    assert "evaluate/test: unchanged" in succeed(["run", *FROZEN], place)
    assert "tools: validation mAP" in succeed(["train-tools", *FROZEN], place)
    assert (result.read_bytes(), (result.parent / "best.pt").stat().st_mtime_ns) == (before, checkpoint)


def test_predict_recognises_tools_of_new_videos(place: Path) -> None:
    new = place / "new.mp4"
    shutil.copyfile(next((place / "data").rglob("video03.mp4")), new)
    succeed(["predict", *FROZEN, new, "--out", "predicted"], place)
    found = read_prediction_csv(place / "predicted/new.csv", SPEC)
    known = read_prediction_csv(place / "runs/frozen/evaluate/test/predictions/video03.csv", SPEC)
    np.testing.assert_allclose(found.tool_probabilities, known.tool_probabilities, atol=2e-5)
    assert "tools" in json.loads((place / "predicted/new.json").read_text())["made_by"]


def test_another_data_set_is_scored_with_the_probe(place: Path) -> None:
    """`evaluate --index`: its features are extracted, and have tool metrics too."""
    succeed(["simulate", "elsewhere", "--videos", "1", *SIMULATE, "--first", "11"], place)
    there = ["--set", "data.root=elsewhere", "--set", "data.split.rule=0/0/1"]
    succeed(["index", *FROZEN, *there, "--out", "other.json"], place)
    printed = succeed(["evaluate", *FROZEN, *there, "--index", "other.json"], place)
    assert "recognised by the linear probe" in printed
    metrics = json.loads((place / "runs/frozen/evaluate/other-test/metrics.json").read_text())
    assert metrics["tools"]["map_pooled"] > 0
    assert metrics["tool_probe"]["c"] > 0

    # the backbone and its frames follow the training, whatever the settings say
    tree = yaml.safe_load((place / "frozen.yaml").read_text()) | {"preprocess": {"resize_px": 96, "crop_px": 96}}
    del tree["cnn"]["backbone"]
    (place / "default.yaml").write_text(yaml.safe_dump(tree))
    again = ["evaluate", "--config", "default.yaml", "--name", "frozen", *there, "--index", "other.json"]
    assert "evaluate/other-test" in succeed(again, place)

    # other weights are refused before a frame is read, and leave nothing behind
    line = refuse([*again[:-1], "other.json", "--set", "seed=7", "--split", "val"], place)
    assert "trained on features of another encoder than the settings name (weights_sha256: " in line
    assert "extract.encoder, cnn.weights" in line
    assert not (place / "runs/frozen/evaluate/other-val").exists()

    # features of an encoder that is not the run's any more
    folder = place / "runs/frozen/evaluate/other-test/features"
    encoder = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps(encoder | {"digest": "0" * 64}))
    assert refuse(again, place).endswith(
        "evaluate/other-test/features: holds features of another encoder than this "
        "run's; delete this folder and try again"
    )


def test_without_a_probe_a_note_says_what_to_do(place: Path, tmp_path: Path) -> None:
    """And features of a run without one are evaluated as before; a damaged probe is one line."""
    shutil.copytree(place, tmp_path / "work")
    tools = tmp_path / "work/runs/frozen/tools"
    (tools / "best.pt").write_bytes(b"")
    assert "best.pt: damaged" in refuse(["evaluate", *FROZEN], tmp_path / "work")
    shutil.rmtree(tools)
    done = run(["evaluate", *FROZEN], tmp_path / "work")
    assert done.returncode == 0
    assert "no trained tool head in this run, so no tool metrics; train-tools trains a linear probe" in done.stderr
    metrics = json.loads((tmp_path / "work/runs/frozen/evaluate/test/metrics.json").read_text())
    assert metrics["tools"] is None
    assert "tool_probe" not in metrics


def test_two_encoders_in_one_command_are_refused(place: Path) -> None:
    chosen = ["--encoder", "resnet18", "--weights", "random", "--set", "extract.checkpoint=joint.pt"]
    line = refuse(["extract", *FROZEN, *chosen], place)
    assert line.endswith("--encoder: the settings name another one, extract.checkpoint=joint.pt; leave one of them out")
