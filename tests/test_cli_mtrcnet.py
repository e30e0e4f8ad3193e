"""`import-checkpoint` and `export-checkpoint` as a user types them, on a tiny data set and on hostile files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

import pipeline
from configs.load import load_config
from engine.checkpoints import load_checkpoint
from features.dataset.index import Index
from stage2_temporal.joint.train import Start, initial_net
from tests.interop.originals import original_state
from tests.stage1_cnn.material import SPEC, make_world, write_dataset
from tests.test_cli import refuse

NAME = "cnn_lstm1_p2t_epoch_25_length_4_opt_1_mulopt_1_flip_0_crop_1_batch_400_train1_1_train2_2_val1_3_val2_4.pth"
ORDER = ["--phase-order", "close,open,cut"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(pipeline.cli, list(arguments), catch_exceptions=False)


def succeed(*arguments: str) -> str:
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    return done.output


def settings_file(folder: Path, **blocks: Any) -> list[str]:
    """Settings for the tiny data set of three phases and two tools in `folder`, as options."""
    spec = folder / "tiny-data.yaml"
    spec.write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    tree = make_world(folder, folder / "data").config.model_dump(mode="json")
    tree["data"]["dataset"] = str(spec)
    for block, values in blocks.items():
        tree[block].update(values)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", str(folder / "tiny.yaml")]


@pytest.mark.slow
def test_an_imported_net_is_evaluated_trained_on_encoded_with_and_exported(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    settings = settings_file(tmp_path)
    file = tmp_path / NAME
    torch.save(original_state("cl", phases=3, tools=2), file)
    succeed("index", *settings)
    output = succeed("import-checkpoint", str(file), *settings, "--name", "old", *ORDER)
    assert "MTRCNet-CL" in output
    assert "0 close, 1 open, 2 cut" in output
    succeed("evaluate", *settings, "--model", "joint", "--name", "old")
    other = ["--set", "preprocess.mean=[0.5, 0.5, 0.5]", "--set", "preprocess.std=[0.5, 0.5, 0.5]"]
    done = call("evaluate", *settings, *other, "--model", "joint", "--name", "old")
    assert done.exit_code == 2
    assert (
        "joint/imported/best.pt: preprocess.mean=[0.5, 0.5, 0.5], preprocess.std=[0.5, 0.5, 0.5] given" in done.output
    )
    assert "normalisation given" in succeed("import-checkpoint", str(file), *settings, *other, "--name", "mine", *ORDER)
    succeed("evaluate", *settings, *other, "--model", "joint", "--name", "mine")
    metrics = json.loads((tmp_path / "runs/old/evaluate/test/metrics.json").read_text())
    assert metrics["inference"] == "clip"
    assert metrics["mapped_tools"]["map_pooled"] is not None
    fitting = ["--config", str(tmp_path / "runs/old/joint/imported/config.yaml")]
    quick = ["--set", "joint.multitask={epochs: 1, precision: fp32}", "--set", "joint.sequence.batch=2"]
    quick += ["--set", "joint.clips_per_epoch=4", "--set", "joint.workers=0"]
    output = succeed("train-joint", *fitting, *quick, "--name", "tuned", "--from-joint", "old")
    assert "prepared otherwise" not in output
    for name in ("old", "tuned"):
        succeed("evaluate", *fitting, *quick, "--model", "joint", "--name", name)
        card = (tmp_path / f"runs/{name}/MODEL_CARD.md").read_text()
        assert (f"Imported from `{NAME}`" in card) == (name == "old")
        assert (f"Fine-tuned from `{NAME}`" in card) == (name == "tuned")
        assert "Which videos" in card
    succeed("extract", *fitting, "--name", "features", "--from-joint", "old")
    exported = succeed("export-checkpoint", "old", str(tmp_path / "out"), *settings, *ORDER)
    assert NAME in exported
    succeed("import-checkpoint", str(tmp_path / "out" / NAME), *settings, "--name", "again", *ORDER)
    one, two = (load_checkpoint(tmp_path / f"runs/{name}/joint/imported/best.pt")["model"] for name in ("old", "again"))
    assert all(torch.equal(value, two[name]) for name, value in one.items() if isinstance(value, torch.Tensor))
    trained = succeed("export-checkpoint", "tuned", str(tmp_path / "out"), *settings, *ORDER)
    assert "cnn_lstm1_p2t_epoch_1_length_4_opt_0_mulopt_1_flip_1_crop_1_batch_8_train1_0" in trained
    assert not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.slow
def test_settings_of_another_net_are_refused_and_other_preprocessing_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data")
    settings = settings_file(tmp_path, cnn={"backbone": "resnet18"})
    torch.save(original_state("cl", phases=3, tools=2), tmp_path / NAME)
    succeed("index", *settings)
    succeed("import-checkpoint", str(tmp_path / NAME), *settings, "--name", "old", *ORDER)
    plain = ["--set", "temporal.head.hidden=16"]  # of the same shapes, but without the ReLU
    done = call("train-joint", *settings, *plain, "--name", "tuned", "--from-joint", "old")
    assert done.exit_code == 2
    assert "its head differs from temporal.head (relu: True there, False now)" in done.output
    plain += ["--set", "temporal.head.relu=true"]
    done = call("train-joint", *settings, *plain, "--name", "tuned", "--from-joint", "old")
    assert "tool_head does not fit the settings" in done.output
    other = load_config(tmp_path / "runs/old/joint/imported/config.yaml", ["preprocess.mean=[0.5, 0.5, 0.5]"])
    capsys.readouterr()
    initial_net(other, Index.load(other.data.index), Start(joint=tmp_path / "runs/old"))
    assert "was trained on frames preprocessed differently (preprocess: mean:" in capsys.readouterr().err


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def hostile(folder: Path, kind: str) -> Path:
    file = folder / f"{kind}.pth"
    if kind == "harmful":
        torch.save(original_state("phase") | {"extra": Payload(folder / "pwned")}, file)
    elif kind == "harmful-old":
        content = original_state("phase") | {"extra": Payload(folder / "pwned")}
        torch.save(content, file, _use_new_zipfile_serialization=False)
    elif kind == "harmful-pickle":
        file.write_bytes(pickle.dumps(Payload(folder / "pwned")))
    elif kind == "page":
        file.write_text("<!DOCTYPE html>\n<html><title>Quota exceeded</title></html>\n")
    elif kind == "classes":
        torch.save(original_state("cl", phases=8), file)
    elif kind == "truncated":
        torch.save(original_state("phase"), file)
        file.write_bytes(file.read_bytes()[:1_000_000])
    return file


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("harmful", "nothing in it was run"),
        ("harmful-old", "nothing in it was run"),
        ("harmful-pickle", "nothing in it was run"),
        ("page", "not a checkpoint but a web page"),
        ("truncated", "damaged: its end is missing"),
        ("classes", "has 8 phases, but cholec80 has 7"),
        ("missing", "no such checkpoint"),
    ],
)
def test_hostile_files_are_one_line_and_exit_code_2(
    kind: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = hostile(tmp_path, kind)
    done = call("import-checkpoint", str(file), "--name", "x", "--phase-order", "mtrcnet")
    assert done.exit_code == 2
    (line,) = done.output.strip().splitlines()
    assert line.startswith(f"error: {file}: ")
    assert reason in line
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "pwned").exists()


def test_a_harmful_file_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = hostile(tmp_path, "harmful-pickle")
    line = refuse(["import-checkpoint", str(file), "--name", "x", "--phase-order", "mtrcnet"], tmp_path)
    assert "harmful-pickle.pth" in line
    assert os.listdir(tmp_path) == ["harmful-pickle.pth"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["import-checkpoint", "net.pth"], "--name RUN"),
        (["import-checkpoint", "net.pth", "--name", "x"], "--phase-order NAME (mtrcnet, tf-cholec80, dataset)"),
        (["import-checkpoint", "net.pth", "--name", "x", "--phase-order", "mtrc"], "no such order"),
        (["export-checkpoint", "nowhere", "out", "--phase-order", "mtrcnet"], "run train-joint"),
    ],
)
def test_missing_parts_are_named(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(original_state("phase"), tmp_path / "net.pth")
    done = call(*arguments)
    assert done.exit_code == 2
    assert expected in done.output
    assert os.listdir(tmp_path) == ["net.pth"]
