"""`train-tools`: what is trained on what, when it is skipped or refused, and when an evaluation uses it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import Config
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.stopping import StopRequest
from evaluation.metrics.results import Evaluation
from features.dataset.trained_on import TRAINED_ON
from stage2_temporal.evaluate import evaluate_run
from stage2_temporal.tool_probe import ToolProbeResult, train_tools, wants_probe
from tests.stage2_temporal.toy import Video, cue_video, write_folder

RNG = np.random.default_rng(0)
SPLITS = {"video0": "train", "video1": "train", "video2": "val", "video3": "test"}
VIDEOS: dict[str, Video] = {name: cue_video(RNG, split, 60) for name, split in SPLITS.items()}
TOOLS = {name: (features[:, :2] > 1).astype(np.int8) for name, (_, features, _) in VIDEOS.items()}  # at the cues
LOGITS = {name: 2 - 4 * labels.astype(np.float32) for name, labels in TOOLS.items()}  # as bad as can be


def folder_of(path: Path, tools: Mapping[str, NDArray[np.int8]] | None = TOOLS, **changes: Any) -> Path:
    return write_folder(path, VIDEOS, tools=tools, **changes)


@pytest.fixture
def work(tmp_path: Path) -> Callable[..., ToolProbeResult]:
    """`work(folder)`: `train-tools` into the run `tmp_path/run`."""
    config = Config.model_validate({"device": "cpu", "runs": tmp_path})
    return lambda folder, stop=None: train_tools(config, tmp_path / "run", folder, stop or StopRequest())


def evaluate(tmp_path: Path, features: Path, **data: Any) -> Evaluation:
    config = Config.model_validate({"device": "cpu", "runs": tmp_path, "data": data})
    return evaluate_run(config, tmp_path / "run", features=features, stop=StopRequest())


def test_frozen_features_get_tool_metrics(
    train: Any, work: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result's numbers, and the evaluation's; without the probe there are none."""
    folder = folder_of(tmp_path / "features")
    assert wants_probe(folder)
    train(folder=folder, temporal={"epochs": 1, "baseline": False})
    assert evaluate(tmp_path, folder).tools is None
    assert "train-tools trains a linear probe" in capsys.readouterr().err
    result = work(folder)
    assert (result.train_videos, result.train_frames, result.val_videos, result.constant) == (2, 120, 1, [])
    assert result.val_map is not None
    assert result.val_map > 0.95
    found = evaluate(tmp_path, folder)
    assert found.tools is not None
    assert found.tools.map_pooled is not None
    assert found.tools.map_pooled > 95
    assert found.tools.at_threshold is not None  # of thresholds that the validation videos chose
    assert found.tool_probe is not None
    assert found.tool_probe["c"] == result.c
    assert "tools are recognised by the linear probe" in capsys.readouterr().err


def test_features_of_a_trained_encoder_keep_their_own_logits(train: Any, work: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "features", tool_logits=LOGITS)
    assert not wants_probe(folder)
    train(folder=folder, temporal={"epochs": 1, "baseline": False})
    before = evaluate(tmp_path, folder)
    assert work(folder).val_map > 0.95
    after = evaluate(tmp_path, folder)
    assert after.to_json() == before.to_json()
    assert after.tools is not None
    assert after.tools.map_pooled is not None
    assert after.tools.map_pooled < 50
    assert "tool_probe" not in after.to_json()


def test_a_finished_probe_is_skipped_and_another_refused(work: Any, tmp_path: Path) -> None:
    first = work(folder_of(tmp_path / "features"))
    written = (tmp_path / "run/tools/best.pt").stat().st_mtime_ns
    assert work(folder_of(tmp_path / "again")) == first  # the same content elsewhere
    assert (tmp_path / "run/tools/best.pt").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"run/tools: this run exists with other settings \(encoder_digest"):
        work(folder_of(tmp_path / "other", weights=dict.fromkeys(VIDEOS, "1" * 64)))
    changed = {name: 1 - labels for name, labels in TOOLS.items()}
    with pytest.raises(UserError, match="labels_sha256"):
        work(folder_of(tmp_path / "labels", changed))


def test_a_stopped_training_leaves_no_result_and_starts_again(work: Any, tmp_path: Path) -> None:
    from engine.stopping import Stopped

    folder, stop = folder_of(tmp_path / "features"), StopRequest()
    stop.number = 15
    with pytest.raises(Stopped):
        work(folder, stop)
    assert not (tmp_path / "run/tools/result.json").exists()
    assert work(folder).val_map > 0.95


def test_nothing_to_train_on_is_one_line(work: Any, tmp_path: Path) -> None:
    bare = write_folder(tmp_path / "bare", VIDEOS)
    with pytest.raises(UserError, match=r"index.json: the data set toy has no tools to recognise"):
        work(bare)
    unlabelled = folder_of(tmp_path / "unlabelled", {name: np.full_like(one, -1) for name, one in TOOLS.items()})
    with pytest.raises(UserError, match=r"index.json: no training video has tool labels"):
        work(unlabelled)
    assert not wants_probe(bare)
    assert not wants_probe(unlabelled)
    assert not (tmp_path / "run").exists()


def test_never_and_always_present_tools_are_in_the_result(work: Any, tmp_path: Path) -> None:
    labels = {name: np.column_stack([one, 0 * one[:, 0], 0 * one[:, 0] + 1]) for name, one in TOOLS.items()}
    assert work(folder_of(tmp_path / "features", labels)).constant == ["t2", "t3"]


def test_features_of_an_encoder_that_saw_test_videos_are_refused(work: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "features")
    record = {"data": [{"dataset": "toy", "videos": {"video3": ""}}]}
    (folder / TRAINED_ON).write_text(json.dumps(record))
    with pytest.raises(UserError, match="trained on video3 of toy"):
        work(folder)


def test_a_probe_that_saw_the_tested_videos_is_refused(train: Any, work: Any, tmp_path: Path) -> None:
    """The run's stage two was trained on other videos than its probe."""
    folder = folder_of(tmp_path / "features")
    train(folder=folder, temporal={"epochs": 1, "baseline": False})
    work(folder)
    path = tmp_path / "run/tools" / TRAINED_ON
    path.write_text(json.dumps({"data": [{"dataset": "toy", "videos": {"video3": "0" * 64}}]}))
    with pytest.raises(UserError, match="run/tools: trained on video3 of toy"):
        evaluate(tmp_path, folder)
    assert evaluate(tmp_path, folder, allow_overlap=True).tools is not None


def test_a_probe_of_another_encoder_is_refused(train: Any, work: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "features")
    train(folder=folder, temporal={"epochs": 1, "baseline": False})
    work(folder_of(tmp_path / "other", weights=dict.fromkeys(VIDEOS, "1" * 64)))
    with pytest.raises(UserError, match=r"tools/best.pt: trained on features of another encoder \(weights_sha256"):
        evaluate(tmp_path, folder)


def test_a_probe_of_features_in_another_precision_is_used_with_a_note(
    train: Any, work: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for stage two: another machine may compute the same encoder in another precision."""
    folder = folder_of(tmp_path / "features")
    train(folder=folder, temporal={"epochs": 1, "baseline": False})
    work(folder_of(tmp_path / "bf16", precision="bf16", arithmetic="folded"))
    assert evaluate(tmp_path, folder).tool_probe is not None
    assert "features were computed in bf16 (folded), these are computed in fp32 (plain)" in capsys.readouterr().err


def test_a_probe_of_other_tools_is_not_used(
    train: Any, work: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "features")
    train(folder=folder, temporal={"epochs": 1, "baseline": False})
    work(folder_of(tmp_path / "other", {name: one[:, :1] for name, one in TOOLS.items()}))
    assert evaluate(tmp_path, folder).tools is None
    assert "a probe of other tools (t0), so it is not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "temporal"},
        {"model": 3},
        {"model": {}},
        {"tools": 7},
        {"c": "much"},
        {"tools": ["t0", "t1", "t2"]},
    ],
)
def test_a_damaged_checkpoint_is_one_line(train: Any, work: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = folder_of(tmp_path / "features")
    train(folder=folder, temporal={"epochs": 1, "baseline": False})
    work(folder)
    path = tmp_path / "run/tools/best.pt"
    save_checkpoint(path, {**load_checkpoint(path), **change})
    with pytest.raises(UserError, match=r"best\.pt: (damaged|not a checkpoint of train-tools)"):
        evaluate(tmp_path, folder)
