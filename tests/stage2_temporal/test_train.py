"""Training learns from earlier frames, is reproducible, and resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.errors import UserError
from configs.schema import SequenceConfig, TemporalConfig
from engine.checkpoints import load_checkpoint
from engine.logs import read_metrics
from engine.stopping import Stopped, StopRequest
from stage2_temporal.data import epoch_batches, read_training_data
from stage2_temporal.predict import load_temporal, predict_phases
from stage2_temporal.train import require_arithmetic
from tests.onednn import cpu_with_bf16
from tests.stage2_temporal.toy import cue_video, write_folder

PROJECT = Path(__file__).resolve().parents[2]
LEARN = {
    "head": {"name": "lstm", "hidden": 16},
    "epochs": 25,
    "optim": {"name": "adamw", "lr": 0.02},
    "sequence": {"mode": "full", "batch": 2},
}
MODES: dict[str, dict[str, Any]] = {
    "full": {"sequence": {"mode": "full", "batch": 2}},
    "chunked": {
        "sequence": {"mode": "chunked", "frames": 16, "batch": 3},
        "head": {"name": "tcn", "layers": 3, "maps": 6},
    },
    "clips": {"sequence": {"mode": "clips", "frames": 6, "stride": 4, "batch": 9, "inference": "clip"}},
}
DROPOUT = {"head": {"name": "lstm", "hidden": 12, "layers": 2, "dropout": 0.4}}


class StopAfter(StopRequest):
    """A SIGTERM that arrives after `times` polls."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def poll(self) -> int | None:
        self.left -= 1
        if self.left < 0:
            self.number = int(signal.SIGTERM)
        return super().poll()


def weights(folder: Path, which: str = "best.pt") -> dict[str, torch.Tensor]:
    content = load_checkpoint(folder / which)["model"]
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def require_same(one: Path, two: Path) -> None:
    """Both heads' chosen and last weights, optimiser and log are equal to the bit."""
    for head in ("temporal", "temporal/frame"):
        for which in ("best.pt", "last.pt"):
            left, right = weights(one / head, which), weights(two / head, which)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left), (head, which)
        left_rows, right_rows = (
            [
                {key: value for key, value in row.items() if key not in ("seconds", "frames_per_s")}
                for row in read_metrics(run / head / "metrics.jsonl")
            ]
            for run in (one, two)
        )
        assert left_rows == right_rows


def test_the_lstm_learns_what_a_frame_does_not_tell(train: Any, tmp_path: Path) -> None:
    result = train(temporal=LEARN)
    assert result["val_accuracy"] > 0.9
    assert result["frame"]["val_accuracy"] < 0.7
    assert result["majority_val_accuracy"] < 0.6
    assert result["frame"]["epochs"] == result["epochs"] == 25
    assert result["sentence"].startswith(f"validation accuracy {result['val_accuracy']:.3f} (per-frame head 0.")
    assert json.loads((tmp_path / "run/temporal/result.json").read_text()) == result


@pytest.mark.parametrize(
    "head",
    [
        {"name": "gru", "hidden": 16},
        {"name": "tcn", "layers": 5, "maps": 16, "dropout": 0.0},
        {"name": "attention", "width": 32, "heads": 2, "window": 24, "dropout": 0.2},
    ],
)
def test_the_other_heads_learn_it_too(train: Any, head: dict[str, Any]) -> None:
    lr = {"optim": {"name": "adamw", "lr": 0.005}} if head["name"] == "attention" else {}
    result = train(temporal=LEARN | lr | {"head": head, "baseline": False, "epochs": 30})
    assert result["val_accuracy"] > 0.75  # a frame alone: about 0.4
    assert result["frame"] is None


@pytest.mark.parametrize("mode", ["chunked", "clips"])
def test_chunks_and_clips_learn_it_too(train: Any, mode: str) -> None:
    result = train(temporal=LEARN | {"sequence": MODES[mode]["sequence"] | {"frames": 16}, "baseline": False})
    assert result["val_accuracy"] > 0.8


def test_the_result_says_what_was_done(train: Any, tmp_path: Path, cue_folder: Path) -> None:
    result = train(temporal={"epochs": 3})
    data = read_training_data(cue_folder)
    labels = np.concatenate([data.bank.phase_of(span).numpy() for span in data.train])
    counts = np.bincount(labels[labels >= 0], minlength=3)
    assert result["majority_phase"] == counts.argmax()
    assert result["majority_name"] == data.phases[counts.argmax()]
    shares = [(t[t >= 0] == counts.argmax()).mean() for t in (data.bank.phase_of(s).numpy() for s in data.val)]
    assert result["majority_val_accuracy"] == pytest.approx(np.mean(shares), abs=1e-12)
    assert result["parameters"] == 4 * 12 * (6 + 12 + 2) + 3 * 13
    assert result["frame"]["parameters"] == 3 * 7
    assert (result["train_videos"], result["val_videos"], result["train_frames"]) == (6, 2, counts.sum())
    assert (result["epochs"], result["steps"]) == (3, 9)
    assert result["best_epoch"] in (0, 1, 2)
    assert result["frames_per_s"] > 0
    rows = read_metrics(tmp_path / "run/temporal/metrics.jsonl", "epoch")
    assert [row["val_accuracy"] for row in rows][result["best_epoch"]] == result["val_accuracy"]
    assert result["val_accuracy"] == max(row["val_accuracy"] for row in rows)


@pytest.mark.parametrize("mode", MODES)
def test_the_score_is_that_of_the_chosen_model(
    train: Any, tmp_path: Path, cue_folder: Path, videos_of: Any, mode: str
) -> None:
    result = train(temporal=MODES[mode] | ({"ema_decay": 0.9} if mode == "clips" else {}))
    for folder, score in (("temporal", result["val_accuracy"]), ("temporal/frame", result["frame"]["val_accuracy"])):
        model, about = load_temporal(tmp_path / "run" / folder)
        videos = videos_of(cue_folder, "val")
        predicted = predict_phases(model, videos, about.inference, about.frames, "cpu")
        shares = [(predicted[name].argmax(1) == video.phase)[video.phase >= 0].mean() for name, video in videos.items()]
        assert score == pytest.approx(np.mean(shares), abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_that_of_the_sequences_promised(train: Any, tmp_path: Path, cue_folder: Path, mode: str) -> None:
    """Whole videos give the logits of full and chunked training (state carried), single clips those of clips."""
    sequence = MODES[mode]["sequence"] | {"frames": 16, "batch": 4}
    train(temporal={"sequence": sequence, "optim": {"name": "sgd", "lr": 1e-30}, "epochs": 1, "baseline": False})
    model, _ = load_temporal(tmp_path / "run/temporal")
    data = read_training_data(cue_folder)
    losses = []
    for batch in epoch_batches(data.train, SequenceConfig.model_validate(sequence), 0, 0):
        logits, phase = [], []
        for first, length in zip(batch.first.tolist(), batch.lengths.tolist(), strict=True):
            start = first
            if mode != "clips":
                start = next(span.first for span in data.train if span.first <= first < span.first + span.frames)
            logits.append(model(data.bank.features[start : first + length][None]).logits[0, first - start :])
            phase.append(data.bank.labels[0, first : first + length])
        losses.append(F.cross_entropy(torch.cat(logits), torch.cat(phase), ignore_index=-1).item())
    row = read_metrics(tmp_path / "run/temporal/metrics.jsonl", "epoch")[0]
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


# ---------------------------------------------------------------------------------------------- resume, runs


def test_twice_is_the_same(train: Any, tmp_path: Path) -> None:
    train("one", DROPOUT)
    train("two", DROPOUT)
    require_same(tmp_path / "one", tmp_path / "two")
    train("three", DROPOUT, seed=1)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(
            weights(tmp_path / "one/temporal").values(), weights(tmp_path / "three/temporal").values(), strict=True
        )
    )


@pytest.mark.parametrize(
    ("mode", "every"),
    [("full", 1), ("full", 5), ("chunked", 3), ("chunked", 7), ("clips", 13)],
)
def test_resumed_equals_uninterrupted(train: Any, tmp_path: Path, mode: str, every: int) -> None:
    settings = MODES[mode] | (DROPOUT if mode != "chunked" or every != 3 else {})
    settings |= {"ema_decay": 0.5, "smoothing_weight": 0.1} if mode == "chunked" else {}
    settings |= {"feature_dropout": 0.2} if every in (5, 7) else {}
    whole = train("whole", settings)
    starts = 0
    while True:
        starts += 1
        try:
            resumed = train("resumed", settings, stop=StopAfter(every))
            break
        except Stopped:
            assert not (tmp_path / "resumed/temporal/result.json").exists()
        assert starts < 100
    assert starts > 2
    require_same(tmp_path / "whole", tmp_path / "resumed")
    for key in ("val_accuracy", "best_epoch", "epochs", "steps"):
        assert whole[key] == resumed[key]
        assert whole["frame"][key] == resumed["frame"][key]


def test_carried_state_matters_for_resume(train: Any, tmp_path: Path) -> None:
    """If the state had no effect, the test above would not notice its loss; the first checkpoint in a video contains
    one.
    """
    with pytest.raises(Stopped):
        train("stopped", MODES["chunked"] | DROPOUT, stop=StopAfter(2))
    carried = load_checkpoint(tmp_path / "stopped/temporal/last.pt")["model"]["_extra_state"]["carried"]
    assert len(carried) == 2
    assert all(bool((part != 0).any()) for part in carried)


@pytest.fixture
def native_bf16() -> Iterator[None]:
    with cpu_with_bf16(True):
        yield


@pytest.mark.usefixtures("native_bf16")
@pytest.mark.parametrize("layers", [1, 2])
def test_resumed_equals_uninterrupted_with_the_bf16_projection(train: Any, tmp_path: Path, layers: int) -> None:
    head = {"name": "lstm", "hidden": 12, "layers": layers, "dropout": 0.4}
    settings = {"head": head, "projection": "bf16"}
    whole = train("whole", settings)
    starts = 0
    while True:
        starts += 1
        try:
            train("resumed", settings, stop=StopAfter(4))
            break
        except Stopped:
            assert starts < 100
    assert starts > 2
    require_same(tmp_path / "whole", tmp_path / "resumed")
    exact = train("exact", settings | {"projection": "fp32"})
    assert whole["steps"] == exact["steps"]
    assert not torch.equal(
        weights(tmp_path / "whole/temporal")["head.rnn.weight_ih_l0"],
        weights(tmp_path / "exact/temporal")["head.rnn.weight_ih_l0"],
    )
    assert torch.equal(  # the baseline has no such projection
        weights(tmp_path / "whole/temporal/frame")["head.fc.weight"],
        weights(tmp_path / "exact/temporal/frame")["head.fc.weight"],
    )


@pytest.mark.usefixtures("native_bf16")
def test_bf16_applies_to_training_only(train: Any, tmp_path: Path, cue_folder: Path, videos_of: Any) -> None:
    """The score that selects the epoch is that of the fp32 model, which is also what is loaded later."""
    result = train(temporal=LEARN | {"projection": "bf16", "epochs": 4, "baseline": False})
    model, about = load_temporal(tmp_path / "run/temporal")
    assert not model.head.bf16_projection
    videos = videos_of(cue_folder, "val")
    predicted = predict_phases(model, videos, about.inference, about.frames, "cpu")
    shares = [(predicted[name].argmax(1) == video.phase)[video.phase >= 0].mean() for name, video in videos.items()]
    assert result["val_accuracy"] == pytest.approx(np.mean(shares), abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"name": "gru"}}, r"projection=bf16 applies to the unidirectional LSTM only; leave it at auto"),
        ({"head": {"name": "lstm", "bidirectional": True}}, r"applies to the unidirectional LSTM only"),
        ({}, r"^temporal\.projection=bf16: this CPU .* set temporal\.projection=fp32 or auto$"),
        ({"precision": "bf16"}, r"^temporal\.precision=bf16: this CPU .* set temporal\.precision=fp32 or auto$"),
        ({"precision": "fp16"}, r"^temporal\.precision=fp16 works on CUDA .* set temporal\.precision=auto or fp32$"),
    ],
)
def test_what_is_not_computed_is_refused_and_binds_the_name_to_nothing(
    train: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with cpu_with_bf16(False), pytest.raises(UserError, match=message):
        train(temporal={"projection": "bf16", **changes})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["auto", "native", "fp32"])
def test_a_cpu_without_bf16_trains_in_fp32(train: Any, precision: str) -> None:
    with cpu_with_bf16(False):
        temporal = {"head": {"name": "linear"}, "precision": precision, "epochs": 1, "baseline": False}
        assert train(temporal=temporal)["precision"] == "fp32"


def test_a_run_trained_in_bf16_elsewhere_is_finished_here_too(train: Any) -> None:
    temporal = {"head": {"name": "lstm"}, "precision": "bf16", "epochs": 1, "baseline": False}
    with cpu_with_bf16(True):
        trained = train(temporal=temporal)
    with cpu_with_bf16(False):
        assert train(temporal=temporal) == trained


def test_bf16_projection_is_refused_on_other_devices() -> None:
    settings = TemporalConfig(projection="bf16")
    with pytest.raises(UserError, match=r"is for CPUs, not cuda; set temporal\.precision=bf16 instead"):
        require_arithmetic(settings, torch.device("cuda"))
    require_arithmetic(TemporalConfig(), torch.device("cuda"))


def test_a_finished_run_is_not_trained_again(train: Any, tmp_path: Path) -> None:
    first = train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train() == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_another_name_leaves_the_first_alone_and_the_same_name_is_refused(train: Any, tmp_path: Path) -> None:
    train("first")
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    train("second", {"head": {"name": "lstm", "hidden": 20}})
    assert load_temporal(tmp_path / "second/temporal")[1].head.hidden == 20
    with pytest.raises(
        UserError, match=r"first/temporal: this run exists with other settings .*hidden: 12 there, 20 now"
    ):
        train("first", {"head": {"name": "lstm", "hidden": 20}})
    with pytest.raises(UserError, match=r"seed: 0 there, 5 now"):
        train("first", seed=5)
    assert before == {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}


def test_edited_labels_are_another_run(train: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    videos = {f"v{i}": cue_video(rng, split, 20) for i, split in enumerate(("train", "val"))}
    train(folder=write_folder(tmp_path / "before", videos))
    videos["v0"][2][3] = (videos["v0"][2][3] + 1) % 3
    with pytest.raises(UserError, match="labels_sha256"):
        train(folder=write_folder(tmp_path / "after", videos))


def test_early_stopping_ends_both_heads_on_their_own(train: Any) -> None:
    result = train(temporal=LEARN | {"epochs": 40, "early_stop_epochs": 2})
    for outcome in (result, result["frame"]):
        assert outcome["epochs"] == min(40, outcome["best_epoch"] + 3)
    assert result["epochs"] < 40


def test_without_validation_the_last_epoch_is_kept(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    folder = write_folder(tmp_path / "set", {"v0": cue_video(rng, "train", 30), "v1": cue_video(rng, "test", 20)})
    result = train(folder=folder)
    assert "no validation videos" in capsys.readouterr().err
    assert (result["val_accuracy"], result["best_epoch"], result["majority_val_accuracy"]) == (None, 1, None)
    best, last = weights(tmp_path / "run/temporal"), weights(tmp_path / "run/temporal", "last.pt")
    assert all(torch.equal(best[name], last[name]) for name in best)


def test_a_loss_that_is_not_finite_names_the_videos(train: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf) in epoch \d+, step \d+ \(video0\d"):
        train(temporal={"optim": {"name": "sgd", "lr": 1e38}, "epochs": 20})
    assert not (tmp_path / "run/temporal/result.json").exists()


# ---------------------------------------------------------------------------------------------- settings


def test_bidirectional_trains_offline_but_not_in_chunks(train: Any, tmp_path: Path) -> None:
    head = {"name": "lstm", "hidden": 12, "bidirectional": True}
    with pytest.raises(UserError, match=r"offline only .* use temporal\.sequence\.mode=full or clips"):
        train(temporal={"head": head, "sequence": {"mode": "chunked", "frames": 8}})
    assert not (tmp_path / "run").exists()
    assert train(temporal=LEARN | {"head": head, "baseline": False, "epochs": 12})["val_accuracy"] > 0.8


def test_bad_features_leave_no_run_behind(train: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no index"):
        train(folder=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("native_bf16")
@pytest.mark.parametrize("mode", ["full", "chunked"])
@pytest.mark.parametrize("name", ["lstm", "gru", "tcn", "linear", "ssm", "attention", "trans_svnet"])
def test_every_head_runs_in_bf16(train: Any, mode: str, name: str) -> None:
    temporal = {"sequence": MODES[mode]["sequence"], "head": {"name": name}, "precision": "bf16", "epochs": 1}
    result = train(temporal=temporal | {"baseline": False})
    assert result["precision"] == "bf16"
    assert 0.0 <= result["val_accuracy"] <= 1.0


def test_features_can_go_in_as_they_are(train: Any, tmp_path: Path) -> None:
    train(temporal={"standardise": False})
    model, _ = load_temporal(tmp_path / "run/temporal")
    assert torch.equal(model.standardise.mean, torch.zeros(6))
    assert torch.equal(model.standardise.scale, torch.ones(6))


def test_no_image_library_and_no_decoder_is_imported(tmp_path: Path, cue_folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from configs.schema import Config; from engine.stopping import StopRequest\n"
        "from stage2_temporal.train import train_temporal\n"
        "head = {'name': 'gru', 'hidden': 4}\n"
        "config = Config.model_validate({'device': 'cpu', 'temporal': {'epochs': 1, 'head': head}})\n"
        f"train_temporal(config, Path({str(tmp_path / 'run')!r}), Path({str(cue_folder)!r}), StopRequest())\n"
        "loaded = {'torchvision', 'timm', 'av', 'decord', 'PIL', 'stage1_cnn', 'cv2'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/temporal/best.pt").is_file()


def test_the_decoding_is_fitted_once_and_changes_no_training(train: Any, tmp_path: Path) -> None:
    first = train(temporal={"epochs": 1, "baseline": False})
    path = tmp_path / "run/temporal/decoding.json"
    fitted = path.read_bytes()
    content = json.loads(fitted)
    assert (len(content["train"]), len(content["val"]), content["fps"]) == (6, 2, 1.0)
    assert content["tracks"]["phases"]["causal"]["accuracy"] > 0
    path.unlink()  # as in a run of an earlier version: the same command writes it, without training again
    decoded = {"epochs": 1, "baseline": False, "decoding": {"mode": "causal", "lag_s": 3}}
    assert train(temporal=decoded)["seconds"] == first["seconds"]
    assert path.read_bytes() == fitted
    for damage in (b"{", json.dumps(content | {"weights_sha256": "0"}).encode()):
        path.write_bytes(damage)
        train(temporal=decoded)
        assert path.read_bytes() == fitted
    assert "decoding" not in (tmp_path / "run/temporal/identity.json").read_text()
