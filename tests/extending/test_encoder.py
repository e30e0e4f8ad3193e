"""The encoder example, added by a plug-in file, in every command that finds an encoder by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from configs.registry import PLUGINS_VARIABLE
from tests.cli import Forks
from tests.stage1_cnn.material import SPEC, make_world, write_dataset

EXAMPLE = Path(__file__).with_name("encoder_example.py")
NAME = "colour_histogram"


@pytest.fixture
def forks() -> Iterator[Forks]:
    server = Forks(**{PLUGINS_VARIABLE: str(EXAMPLE)})
    yield server
    server.close()


@pytest.mark.slow
def test_the_example_takes_part_in_every_command(tmp_path: Path, forks: Forks) -> None:
    folder = tmp_path / "work"
    world = make_world(tmp_path, write_dataset(tmp_path / "data"))
    folder.mkdir()
    (folder / "tiny_spec.yaml").write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    config = world.set(
        data={"dataset": "tiny_spec.yaml"},
        cnn={"backbone": NAME},
        extract={"workers": 2},
        temporal={"epochs": 1, "precision": "fp32"},
        joint={"multitask": {"epochs": 1, "precision": "fp32"}, "sequence": {"frames": 4, "batch": 2}},
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    settings = ["--config", "tiny.yaml"]

    def succeed(*arguments: str) -> str:
        ended = forks.run(arguments, folder)
        assert ended.code == 0, ended.output
        return ended.output

    assert f"weights: {NAME} " in succeed("doctor", *settings)
    succeed("index", *settings)
    succeed("run", *settings, "--name", "first")  # train-cnn, extract in two processes, train-temporal, evaluate
    [encoder] = world.config.extract.store.glob(f"{NAME}-*/encoder.json")
    described = json.loads(encoder.read_text())
    assert (described["backbone"], described["embedding_dim"]) == (NAME, 24)
    assert "finished before" in succeed("train-cnn", *settings, "--name", "first")
    assert "4 unchanged" in succeed("extract", *settings, "--name", "first")
    succeed("train-joint", *settings, "--name", "joint", "--from-cnn", "first", "--from-temporal", "first")
    succeed("predict", *settings, "--name", "first", str(world.root / "video04.mp4"))
    refused = forks.run(["train-cnn", *settings, "--name", "other", "--set", "cnn.backbone=colour_histogramm"], folder)
    assert refused.code == 2
    assert f"did you mean {NAME}?" in refused.last_line
    weights = forks.run(["train-cnn", *settings, "--name", "other", "--set", "cnn.weights=imagenet"], folder)
    assert (weights.code, "has no published weights" in weights.last_line) == (2, True)
