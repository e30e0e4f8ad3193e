"""Files of the last release are read, resumed or left alone by the current commands (tests/released)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from pipeline import cli
from tests.cli import run, succeed

RELEASED = Path(__file__).resolve().parent / "released" / "7ce8cba"
OLD = ["--config", "old.yaml", "--name", "old"]
STORE = "artifacts/features/shufflenet_v2_x0_5-b6fede3f859d"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the release wrote, for one module's tests to work on in their order."""
    folder = tmp_path_factory.mktemp("released") / "copy"
    shutil.copytree(RELEASED, folder)
    (folder / "store").rename(folder / "artifacts")
    for video in json.loads((folder / "index.json").read_text())["videos"]:  # a checkout gives files a time of its own
        os.utime(folder / "videos" / video["source"], ns=(video["modified_ns"],) * 2)
    return folder


def test_settings_shown_then_still_mean_the_same(released: Path) -> None:
    then = yaml.safe_load((released / "settings_shown.yaml").read_text())
    now = yaml.safe_load(succeed(["config", "show", "--config", "settings_shown.yaml"], released))
    assert _part_of(then, now) == then


def test_index_is_read_and_found_unchanged(released: Path) -> None:
    before = (released / "index.json").read_bytes()
    assert "unchanged" in succeed(["index", "--config", "old.yaml"], released)
    assert (released / "index.json").read_bytes() == before


def test_features_verify_and_are_not_extracted_again(released: Path) -> None:
    before = {path.name: path.read_bytes() for path in (released / STORE).glob("*.h5")}
    succeed(["features", "verify", STORE], released)
    out = succeed(["extract", *OLD], released)
    assert "0 video(s) extracted, 4 unchanged" in out
    assert {path.name: path.read_bytes() for path in (released / STORE).glob("*.h5")} == before


def test_a_finished_run_has_nothing_to_do(released: Path) -> None:
    weights = [(released / "runs/old" / name).read_bytes() for name in ("cnn/best.pt", "temporal/best.pt")]
    succeed(["run", *OLD], released)
    assert [(released / "runs/old" / name).read_bytes() for name in ("cnn/best.pt", "temporal/best.pt")] == weights


def test_stage_two_resumes_from_its_checkpoint(released: Path) -> None:
    (released / "runs/old/temporal/result.json").unlink()
    succeed(["train-temporal", *OLD], released)
    then = json.loads((RELEASED / "runs/old/temporal/result.json").read_text())
    now = json.loads((released / "runs/old/temporal/result.json").read_text())
    assert (now["best_epoch"], now["steps"]) == (then["best_epoch"], then["steps"])
    assert now["frames_per_s"] == then["frames_per_s"]  # nothing was trained again


def test_evaluation_gives_the_same_predictions(released: Path) -> None:
    shutil.rmtree(released / "runs/old/evaluate")
    succeed(["evaluate", *OLD], released)
    name = "runs/old/evaluate/test/predictions/video04.csv"
    _assert_same_csv(RELEASED / name, released / name)


def test_new_videos_are_predicted_the_same(released: Path) -> None:
    shutil.rmtree(released / "runs/old/predict")
    succeed(["predict", *OLD, "videos/videos/video04.mp4"], released)
    _assert_same_csv(RELEASED / "runs/old/predict/video04.csv", released / "runs/old/predict/video04.csv")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["predict", *OLD, "videos/videos/video04.mp4", "--out", "other"],
        ["predict", "--config", "old.yaml", "--name", "joint", "videos/videos/video04.mp4", "--out", "other"],
        ["evaluate", *OLD],
        ["train-temporal", "--config", "old.yaml", "--name", "other", "--features", STORE],
        ["ablate", "abl.yaml", "--run", "old", "--name", "other"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(("key", "other", "own"), [("data.fps", "2", "1"), ("cnn.backbone", "resnet18", "shufflenet")])
def test_frame_settings_that_contradict_the_net_or_features_are_refused(
    released: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], key: str, other: str, own: str
) -> None:
    monkeypatch.chdir(released)
    done = CliRunner().invoke(cli, [*command, "--set", f"{key}={other}"])
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert f"{key}={other} given, but " in done.output
    assert own in done.output.partition(" given, but ")[2]
    assert not (released / "other").exists()
    assert not (released / "runs/other").exists()


def test_an_index_of_other_splits_is_not_passed_over(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(released)
    index = json.loads(Path("index.json").read_text())
    index["videos"][0]["split"] = "test"
    Path("moved.json").write_text(json.dumps(index))
    done = CliRunner().invoke(cli, ["evaluate", *OLD, "--set", "data.index=moved.json"])
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert "data.index=moved.json: has other videos or splits than the features in" in done.output
    assert "--index" in done.output


def test_joint_net_and_ablation_are_known(released: Path) -> None:
    succeed(["evaluate", "--config", "old.yaml", "--name", "joint"], released)
    before = (released / "runs/ablation/ablation.csv").read_text()
    done = run(["ablate", "abl.yaml", "--run", "old", "--name", "ablation"], released)
    assert done.returncode == 0, done.stderr
    assert (released / "runs/ablation/ablation.csv").read_text() == before
    succeed(["report", "runs/old", "runs/joint"], released)


def _part_of(then: dict, now: dict) -> dict:
    """The part of `now` for the settings that existed `then`."""
    return {
        key: _part_of(value, now[key]) if isinstance(value, dict) and isinstance(now.get(key), dict) else now.get(key)
        for key, value in then.items()
    }


def _assert_same_csv(then: Path, now: Path) -> None:
    old, new = then.read_text().splitlines(), now.read_text().splitlines()
    assert new[0] == old[0]
    assert len(new) == len(old)
    for one, other in zip(old[1:], new[1:], strict=True):
        left, right = one.split(","), other.split(",")
        assert left[:2] == right[:2]
        np.testing.assert_allclose([float(x) for x in left[4:]], [float(x) for x in right[4:]], atol=2e-3)
