"""Videos that stage two leaves out, what evaluation counts, and what its numbers depend on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.load import GivenKeys
from configs.schema import Config, SplitConfig
from engine.stopping import StopRequest
from features.store import feature_path, rewrite_labels
from features.store_folder import record_fault
from stage2_temporal.data import read_training_data
from stage2_temporal.evaluate import evaluate_run
from stage2_temporal.train import train_temporal
from tests.cli import succeed
from tests.stage2_temporal.toy import cue_video, small, write_folder

FRAMES = 40
SPLITS = {"v1": "train", "v2": "train", "v3": "val", "v4": "test", "v5": "test"}
SOURCE = "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Features of five videos with phases, tool logits and tool labels."""
    rng = np.random.default_rng(0)
    videos = {name: cue_video(rng, split, FRAMES) for name, split in SPLITS.items()}
    logits = {name: rng.normal(size=(FRAMES, 2)).astype(np.float32) for name in videos}
    made = write_folder(tmp_path / "features", videos, tool_logits=logits)
    for name, (_, _, phase) in videos.items():
        rewrite_labels(feature_path(made, name), phase, (logits[name] > 0.3).astype(np.int8), {})
    return made


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.model_validate({"device": "cpu", "runs": tmp_path, "temporal": small()})


def relabel(folder: Path, name: str, phase: int = 0, tool: int = 0, **attributes: str) -> None:
    tools = np.full((FRAMES, 2), tool, np.int8)
    rewrite_labels(feature_path(folder, name), np.full(FRAMES, phase, np.int8), tools, attributes)


def test_a_recorded_fault_leaves_a_video_out_until_its_source_changes(folder: Path) -> None:
    record_fault(folder, "v2", "1" * 64, "damaged at frame 7")
    assert read_training_data(folder).split["train"] == ["v1", "v2"]
    record_fault(folder, "v2", SOURCE, "damaged at frame 7")
    data = read_training_data(folder)
    assert data.split == {"train": ["v1"], "val": ["v3"]}
    assert [(video.id, video.split) for video in data.index.missing] == [("v2", "train")]
    feature_path(folder, "v1").unlink()
    with pytest.raises(UserError, match="no features of v1; run extract to make them"):
        read_training_data(folder)
    record_fault(folder, "v1", SOURCE, "no such file")
    with pytest.raises(UserError, match=r"train split has no videos left: v1 and 1 more were left out \(no such"):
        read_training_data(folder)


def test_features_verify_names_the_videos_that_were_left_out(folder: Path, tmp_path: Path) -> None:
    assert succeed(["features", "verify", folder], tmp_path).endswith("v5.h5: ok\nall files are intact\n")
    feature_path(folder, "v2").unlink()
    record_fault(folder, "v2", SOURCE, "damaged at frame 7")
    assert succeed(["features", "verify", folder], tmp_path).endswith(
        "all files are intact\n1 video(s) were left out, since extract could not read them:\n  v2: damaged at frame 7\n"
    )


@pytest.mark.parametrize(("label", "what"), [(-1, "no tool labels in these videos"), (1, "no trained tool head in")])
def test_why_there_are_no_tool_metrics(
    label: int, what: str, folder: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    videos = {name: cue_video(rng, split, FRAMES) for name, split in SPLITS.items()}
    no_head = {name: np.full((FRAMES, 2), np.nan, np.float32) for name in videos}
    made = write_folder(tmp_path / "no_head", videos, tool_logits=no_head) if label == 1 else folder
    for name in ("v4", "v5"):
        relabel(made, name, tool=label)
    train_temporal(config, tmp_path / "run", made, StopRequest())
    evaluate_run(config, tmp_path / "run", features=made, stop=StopRequest())
    assert f"note: {what}" in "".join(capsys.readouterr())


def test_features_of_a_video_that_is_excluded_since(folder: Path, config: Config, tmp_path: Path) -> None:
    train_temporal(config, tmp_path / "run", folder, StopRequest())
    data = config.data.model_copy(update={"exclude": {"other*": "", "v[25]": "no consent"}})
    changed = config.model_copy(update={"data": data})
    said = r"contains v2, which data.exclude leaves out; run `index --force`, then extract"
    with pytest.raises(UserError, match=said):
        train_temporal(changed, tmp_path / "run", folder, StopRequest())
    with pytest.raises(UserError, match=said):
        evaluate_run(changed, tmp_path / "run", features=folder, stop=StopRequest())


def test_other_splits_than_those_of_the_features_are_refused(folder: Path, config: Config, tmp_path: Path) -> None:
    own = {part: [name for name, of in SPLITS.items() if of == part] for part in ("train", "val", "test")}
    other = own | {"val": ["v4"], "test": ["v3", "v5"]}

    def with_split(lists: dict[str, list[str]]) -> Config:
        split = SplitConfig.model_validate({"rule": "lists", **lists})
        return config.model_copy(update={"data": config.data.model_copy(update={"split": split})})

    given = GivenKeys(frozenset({"data.split.rule", "data.split.val"}))
    train_temporal(with_split(own), tmp_path / "run", folder, StopRequest(), given=given)
    said = r"v3 is in split val of these features, but data.split says test; leave data.split out, or run index and"
    with pytest.raises(UserError, match=said):
        train_temporal(with_split(other), tmp_path / "other", folder, StopRequest(), given=given)
    with pytest.raises(UserError, match=said):
        evaluate_run(with_split(other), tmp_path / "run", features=folder, stop=StopRequest(), given=given)
    in_file = GivenKeys(in_file=frozenset({"data.split.val"}))  # the file may be meant for another stage
    train_temporal(with_split(other), tmp_path / "run2", folder, StopRequest(), given=in_file)


def test_numbers_are_counted_by_task(folder: Path, config: Config, tmp_path: Path) -> None:
    relabel(folder, "v5", phase=-1)
    train_temporal(config, tmp_path / "run", folder, StopRequest())
    (tmp_path / "run/cnn").mkdir()
    (tmp_path / "run/cnn/result.json").write_text('{"left_out": [{"id": "v2", "reason": "v2.mp4: no such file"}]}')
    evaluation = evaluate_run(config, tmp_path / "run", features=folder, stop=StopRequest())
    assert evaluation.scored == {"phases": ["v4"], "tools": ["v4", "v5"]}
    assert evaluation.phases["temporal"]["pooled"].about.videos_without_labels == ["v5"]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["test_videos"], summary["scored_videos"]) == (1, {"phases": 1, "tools": 2})
    assert {"id": "v2", "reason": "train-cnn: v2.mp4: no such file"} in summary["left_out"]
    assert "v5" in summary["videos_without_labels"]["phases"]
    card = (tmp_path / "run/MODEL_CARD.md").read_text()
    assert "Evaluated on the split **test** (phases of 1 video and tools of 2 videos)." in card
    assert (tmp_path / "run/evaluate/test/predictions/v5.csv").exists()


def test_an_evaluation_is_made_again_when_what_it_depends_on_changes(
    folder: Path,
    config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    train_temporal(config, run, folder, StopRequest())

    def thresholds_after(redone: bool) -> float:
        capsys.readouterr()
        evaluation = evaluate_run(config, run, features=folder, stop=StopRequest(), redo=False)
        assert ("unchanged" in capsys.readouterr().err) != redone
        return evaluation.tools.per_tool["t0"].threshold

    first = thresholds_after(redone=True)
    assert thresholds_after(redone=False) == first
    relabel(folder, "v3", phase=0, tool=1)  # a validation video
    assert thresholds_after(redone=True) != first
    result = json.loads((run / "temporal/result.json").read_text())
    (run / "temporal/result.json").write_text(
        json.dumps(result | {"majority_phase": 2 - result["majority_phase"] // 2})
    )
    thresholds_after(redone=True)
    relabel(folder, "v4", source_sha256_ends="1" * 64)
    thresholds_after(redone=True)
    record_fault(folder, "v5", SOURCE, "damaged")
    thresholds_after(redone=True)
    thresholds_after(redone=False)
    monkeypatch.setattr("stage2_temporal.evaluate.plugin_names", lambda: ["own"])  # a plug-in's metric
    thresholds_after(redone=True)
    thresholds_after(redone=False)


def test_features_of_another_recording_are_another_training(folder: Path, config: Config, tmp_path: Path) -> None:
    data = read_training_data(folder)
    train_temporal(config, tmp_path / "run", folder, StopRequest())
    phase = data.bank.phase_of(data.train[0]).numpy().astype(np.int8)
    rewrite_labels(feature_path(folder, "v1"), phase, np.zeros((FRAMES, 2), np.int8), {"source_sha256_ends": "1" * 64})
    with pytest.raises(UserError, match=r"this run exists with other settings \(sources_sha256"):
        train_temporal(config, tmp_path / "run", folder, StopRequest())
    identity = tmp_path / "run/temporal/identity.json"  # as it was before sources were in it
    identity.write_text(
        json.dumps({k: v for k, v in json.loads(identity.read_text()).items() if k != "sources_sha256"})
    )
    train_temporal(config, tmp_path / "run", folder, StopRequest())


def test_features_of_frames_that_earlier_versions_took_otherwise_are_another_training(
    folder: Path, config: Config, tmp_path: Path
) -> None:
    assert not read_training_data(folder).by_time
    rng = np.random.default_rng(0)
    videos = {name: cue_video(rng, split, FRAMES) for name, split in SPLITS.items()}
    made = write_folder(tmp_path / "by_time", videos, frame_step=24.9)
    train_temporal(config, tmp_path / "run", made, StopRequest())
    identity = tmp_path / "run/temporal/identity.json"
    known = json.loads(identity.read_text())
    del known["sampled"], known["sources_sha256"]  # as an earlier version wrote it
    identity.write_text(json.dumps(known))
    (tmp_path / "run/temporal/result.json").unlink()
    with pytest.raises(UserError, match=r"sampled: absent there, by time now"):
        train_temporal(config, tmp_path / "run", made, StopRequest())
