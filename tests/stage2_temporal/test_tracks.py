"""Several label tracks side by side: phases and steps are learned, scored and resumed together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.errors import UserError
from configs.head_settings import HEAD_SETTINGS
from configs.schema import Config, TemporalConfig
from engine.logs import read_metrics
from engine.stopping import Stopped, StopRequest
from features.sealed_hdf5 import seal
from features.store import read_features
from stage2_temporal.data import read_training_data
from stage2_temporal.evaluate import evaluate_run
from stage2_temporal.loss import PhaseLoss, TracksLoss
from stage2_temporal.predict import OnlinePredictor, load_temporal, predict_phases
from tests.stage2_temporal.test_train import DROPOUT, LEARN, StopAfter, require_same, weights
from tests.stage2_temporal.toy import cue_video, write_folder

BOTH = {"tracks": ["phases", "steps"]}
TCN = {"name": "tcn", "stages": 2, "layers": 4, "maps": 12, "dropout": 0.0}
ATTENTION = {"name": "attention", "width": 8, "heads": 2, "window": 12}
KEY_POOLING = {"name": "key_pooling", "width": 32, "heads": 2, "window": 24, "dropout": 0.2}
CHUNKED = {"sequence": {"mode": "chunked", "frames": 16, "batch": 3}}
# Small settings of every head, by name.
HEADS: dict[str, dict[str, Any]] = {
    "lstm": LEARN["head"],
    "gru": {"name": "gru", "hidden": 8},
    "tcn": TCN,
    "ssm": {"name": "ssm", "width": 8, "layers": 1, "head_width": 4, "state": 3},
    "trans_svnet": {"name": "trans_svnet", "layers": 3, "maps": 6, "window": 7, "width": 8},
    "mstcn++": {"name": "mstcn++", "layers": 3, "refinements": 1, "refinement_layers": 2, "maps": 6},
    "attention": ATTENTION,
    "key_pooling": KEY_POOLING,
    "linear": {"name": "linear"},
}


@pytest.fixture(scope="module")
def two_tracks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos whose step says whether the phase is the last one; some frames lack one label or both."""
    rng = np.random.default_rng(0)
    lengths = {"train": (70, 41, 55, 90, 33), "val": (80, 45), "test": (50,)}
    videos = {
        f"video{i:02d}": cue_video(rng, split, frames)
        for i, (split, frames) in enumerate((s, n) for s, group in lengths.items() for n in group)
    }
    steps = {name: (phase == 2).astype(np.int8) for name, (_, _, phase) in videos.items()}
    for name, (_, _, phase) in videos.items():
        phase[10:13] = -1
        steps[name][12:15] = -1
    videos["video00"][2][:] = -1  # a video with labels of one track only
    steps["video06"][:] = -1
    return write_folder(tmp_path_factory.mktemp("two") / "toy-features", videos, steps=steps)


@pytest.mark.parametrize("head", [LEARN["head"], TCN, KEY_POOLING])
def test_both_tracks_are_learned(train: Any, two_tracks: Path, tmp_path: Path, head: dict[str, Any]) -> None:
    lr = {"optim": {"name": "adamw", "lr": 0.005}} if head is KEY_POOLING else {}
    result = train(temporal=LEARN | lr | {"head": head}, folder=two_tracks, data=BOTH)
    each = result["val_accuracy_phases"], result["val_accuracy_steps"]
    assert min(each) > 0.75  # a frame alone: about 0.4 and 0.6
    assert result["val_accuracy"] == pytest.approx(sum(each) / 2)
    assert result["frame"]["val_accuracy"] < result["val_accuracy"]
    assert result["score"] == "frame accuracy, mean over the validation videos, then over phases and steps"
    assert f"steps {each[1]:.3f}" in result["sentence"]
    assert result["majority_tracks"] == {"steps": 0}
    rows = read_metrics(tmp_path / "run/temporal/metrics.jsonl", "epoch")
    assert result["best_epoch"] == int(np.argmax([row["val_accuracy"] for row in rows]))


@pytest.mark.parametrize(("settings", "every"), [(DROPOUT | CHUNKED, 7), ({"head": TCN}, 1)])
def test_resumed_and_streamed_equal_uninterrupted(
    train: Any, two_tracks: Path, tmp_path: Path, settings: dict[str, Any], every: int
) -> None:
    train("whole", settings, two_tracks, data=BOTH)
    train("streamed", settings | {"features": "stream"}, two_tracks, data=BOTH)
    starts = 0
    while starts < 100:
        starts += 1
        try:
            train("resumed", settings, two_tracks, stop=StopAfter(every), data=BOTH)
            break
        except Stopped:
            continue
    assert 2 < starts < 100
    for other in ("streamed", "resumed"):
        require_same(tmp_path / "whole", tmp_path / other)


@pytest.mark.parametrize("weighting", ["none", "inverse_frequency"])
def test_the_loss_is_the_sum_over_tracks_of_masked_cross_entropies(weighting: Any) -> None:
    settings = TemporalConfig(class_weighting=weighting)
    counts = [torch.tensor([3, 1, 2]), torch.tensor([5, 1])]
    stages = [torch.randn(2, 4, 5, requires_grad=True) for _ in range(2)]
    labels = torch.tensor([[[0, 1, -1, -1], [2, -1, 1, 0]], [[-1, -1, 0, 1], [0, 0, -1, -1]]])
    loss = TracksLoss(settings, counts)(stages, labels)
    expected = sum(
        PhaseLoss(settings, counts[track])([logits[..., part] for logits in stages], labels[track])
        for track, part in enumerate((slice(0, 3), slice(3, 5)))
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradient = stages[0].grad
    assert gradient is not None
    assert not gradient[0, 0, 3:].any()  # a frame without a step teaches nothing about steps
    assert gradient[0, 0, :3].all()
    plain = F.cross_entropy(stages[0][..., :3].flatten(0, 1), labels[0].flatten(), ignore_index=-1)
    if weighting == "none":
        torch.testing.assert_close(PhaseLoss(settings, counts[0])([stages[0][..., :3]], labels[0]), plain)


def test_the_table_of_heads_is_whole() -> None:
    assert set(HEADS) == set(HEAD_SETTINGS.names())


@pytest.mark.parametrize("name", HEADS)
def test_every_head_learns_two_tracks_and_gives_the_same_frame_by_frame(
    train: Any, two_tracks: Path, tmp_path: Path, videos_of: Any, name: str
) -> None:
    train(temporal={"head": HEADS[name], "baseline": False, "epochs": 1}, folder=two_tracks, data=BOTH)
    model, about = load_temporal(tmp_path / "run/temporal")
    assert about.classes == {"phases": ("Early", "Middle", "Late"), "steps": ("cut", "clip")}
    videos = videos_of(two_tracks, "test")
    (whole,) = predict_phases(model, videos, "carried", 1, "cpu").values()
    parts = about.by_track(whole)
    assert {name: part.shape[1] for name, part in parts.items()} == {"phases": 3, "steps": 2}
    assert all(np.allclose(part.sum(axis=1), 1, atol=1e-6) for part in parts.values())
    if not model.causal:
        return
    online = OnlinePredictor(model, device="cpu")
    (video,) = videos.values()
    np.testing.assert_allclose([online.step(x) for x in np.asarray(video.features)], whole, atol=1e-5)


def test_one_track_of_a_data_set_with_two_is_trained_as_if_there_were_one(
    train: Any, two_tracks: Path, tmp_path: Path
) -> None:
    videos = {}
    for path in sorted(two_tracks.glob("*.h5")):
        found = read_features(path)
        split = {5: "val", 6: "val", 7: "test"}.get(int(path.stem[-2:]), "train")
        videos[path.stem] = split, np.asarray(found.features).astype(np.float32), found.phase
    plain = write_folder(tmp_path / "plain", videos)
    one, two = train("one", folder=plain), train("two", folder=two_tracks)
    require_same(tmp_path / "one", tmp_path / "two")
    assert "val_accuracy_phases" not in two
    identities = [(tmp_path / name / "temporal/identity.json").read_bytes() for name in ("one", "two")]
    assert identities[0] == identities[1]
    assert one["identity_sha256"] == two["identity_sha256"]
    assert load_temporal(tmp_path / "two/temporal")[1].tracks is None
    evaluate(tmp_path, "one", plain)
    evaluate(tmp_path, "two", two_tracks)
    for name in ("predictions/video07.csv", "metrics.json"):
        contents = [(tmp_path / run / "evaluate/test" / name).read_text() for run in ("one", "two")]
        if name == "metrics.json":
            contents = [json.dumps(json.loads(text) | {"identity_sha256": ""}) for text in contents]
        assert contents[0] == contents[1]
    assert "tracks" not in json.loads((tmp_path / "two/evaluate/test/truth.json").read_text())["videos"]["video07"]


def evaluate(runs: Path, name: str, features: Path) -> Any:
    config = Config.model_validate({"device": "cpu", "runs": runs})
    return evaluate_run(config, runs / name, features=features, stop=StopRequest(), redo=False)


def test_scores_and_files_of_each_track(
    train: Any, two_tracks: Path, tmp_path: Path, videos_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train(temporal=LEARN | {"epochs": 5}, folder=two_tracks, data=BOTH)
    found = evaluate(tmp_path, "run", two_tracks)
    assert "Steps, models on the same videos" in capsys.readouterr().out
    out = tmp_path / "run/evaluate/test"
    metrics = json.loads((out / "metrics.json").read_text())
    assert found.to_json() == metrics
    assert metrics["scored"] == {"phases": ["video07"], "tools": [], "steps": ["video07"]}
    steps = metrics["tracks"]["steps"]
    assert steps.keys() == metrics["phases"].keys() == {"temporal", "frame", "majority"}
    assert steps["temporal"].keys() == metrics["phases"]["temporal"].keys()
    assert list(steps["temporal"]["video_macro"]["per_phase"]) == ["cut", "clip"]
    header, *rows = (out / "predictions/steps/video07.csv").read_text().splitlines()
    assert header == "frame,time_s,steps,steps_name,p_cut,p_clip"
    predicted = np.array([int(row.split(",")[2]) for row in rows])
    (video,) = videos_of(two_tracks, "test").values()
    labelled = video.tracks["steps"] >= 0
    accuracy = 100 * (predicted == video.tracks["steps"])[labelled].mean()
    assert steps["temporal"]["video_macro"]["accuracy"]["mean"] == pytest.approx(accuracy)
    always = steps["majority"]["video_macro"]["accuracy"]["mean"]
    assert always == pytest.approx(100 * (video.tracks["steps"] == 0)[labelled].mean())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["tracks"]["steps"]["accuracy_temporal"] == pytest.approx(accuracy / 100)
    assert (out / "ribbons-steps.png").stat().st_size > 5000
    assert "| steps | cut, clip |" in (tmp_path / "run/MODEL_CARD.md").read_text()
    evaluate(tmp_path, "run", two_tracks)
    assert "unchanged" in capsys.readouterr().err


def spoiled(folder: Path, out: Path, change: Any, name: str = "video01") -> Path:
    """A copy of a feature folder in which one file was changed and sealed again."""
    shutil.copytree(folder, out)
    with h5py.File(out / f"{name}.h5", "r+") as file:
        change(file)
    seal(out / f"{name}.h5")
    return out


def test_what_cannot_be_learned_is_one_line(train: Any, two_tracks: Path, cue_folder: Path, tmp_path: Path) -> None:
    def refusal(folder: Path = two_tracks, **more: Any) -> str:
        with pytest.raises(UserError) as raised:
            train("refused", folder=folder, **{"data": BOTH, **more})
        return str(raised.value)

    assert "data.tracks: toy has no track 'steps'; choose from phases" in refusal(cue_folder)
    assert "has no track 'stages'; choose from phases, steps" in refusal(data={"tracks": ["phases", "stages"]})
    assert "cannot be combined with temporal.start_from" in refusal(temporal={"start_from": "joint.pt"})
    unlabelled = tmp_path / "unlabelled"
    shutil.copytree(two_tracks, unlabelled)
    for path in unlabelled.glob("*.h5"):
        spoil_all(path)
    assert "no training video has labels of steps; leave steps out of data.tracks" in refusal(unlabelled)
    without = spoiled(two_tracks, tmp_path / "without", lambda file: file.pop("tracks"))
    assert "video01.h5: has no labels of the track steps; run extract again" in refusal(without)
    beyond = spoiled(two_tracks, tmp_path / "beyond", lambda file: file["tracks/steps"].write_direct(np.full(41, 7)))
    assert "video01.h5: steps has labels outside -1 to 1; run extract again" in refusal(beyond)
    other = spoiled(two_tracks, tmp_path / "other", lambda file: file.attrs.update(tracks='{"steps": ["clip", "cut"]}'))
    assert "video01.h5: its steps are clip, cut" in refusal(other)
    for names, message in ((["steps"], "add phases to the list"), (["phases", "phases"], "occurs twice")):
        with pytest.raises(ValueError, match=message):
            Config.model_validate({"data": {"tracks": names}})
    assert not (tmp_path / "refused").exists()


def spoil_all(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["tracks/steps"][...] = -1
    seal(path)


def test_a_track_without_validation_labels_does_not_choose_the_epoch(
    train: Any, two_tracks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(two_tracks, tmp_path / "features")
    spoil_all(tmp_path / "features/video05.h5")
    result = train(folder=tmp_path / "features", data=BOTH)
    assert "note: no validation video has labels of steps, so the best epoch is chosen by" in capsys.readouterr().err
    assert result["val_accuracy_steps"] is None
    assert result["val_accuracy"] == result["val_accuracy_phases"] > 0


def test_other_labels_or_tracks_are_another_run(train: Any, two_tracks: Path, tmp_path: Path) -> None:
    train(folder=two_tracks, data=BOTH)
    with pytest.raises(UserError, match=r"this run exists with other settings \(.*tracks"):
        train(folder=two_tracks)
    changed = spoiled(two_tracks, tmp_path / "changed", lambda file: file["tracks/steps"].write_direct(np.zeros(41)))
    with pytest.raises(UserError, match="labels_sha256"):
        train(folder=changed, data=BOTH)
    train("phases", folder=two_tracks)
    before = weights(tmp_path / "phases/temporal")
    train("phases", folder=changed)  # the phases are the same, so this training is finished
    after = weights(tmp_path / "phases/temporal")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_both_are_read_in_the_order_of_the_description(two_tracks: Path) -> None:
    data = read_training_data(two_tracks, tracks=("steps", "phases"))
    assert data.tracks == ("phases", "steps")
    assert data.bank.labels.shape == (2, len(data.bank.features))
