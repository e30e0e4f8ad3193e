"""Prediction: whole videos, clips and single frames give the same as the definition written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs import head_settings
from configs.errors import UserError
from configs.head_settings import HeadSettings
from engine.checkpoints import save_checkpoint
from features.store import VideoFeatures
from stage2_temporal.heads.base import Head, HeadOutput, State, build_head
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.model import PhaseModel
from stage2_temporal.predict import BatchSizes, OnlinePredictor, chosen_inference, load_temporal, predict_phases

D, C = 5, 4
HEADS: dict[str, Any] = {
    "lstm": head_settings.LstmHead(hidden=7),
    "gru": head_settings.GruHead(name="gru", hidden=6),
    "tcn": head_settings.TcnHead(name="tcn", stages=2, layers=3, maps=6),
    "ssm": head_settings.SsmHead(name="ssm", width=6, head_width=4, state=3),
    "linear": head_settings.LinearHead(name="linear"),
    "attention": head_settings.AttentionHead(name="attention", width=8, heads=2, window=7),
    "key pooling": head_settings.KeyPoolingHead(name="key_pooling", width=8, heads=2, window=7, keys=3),
    "bidirectional": head_settings.LstmHead(hidden=7, bidirectional=True),
}
LENGTHS = {"b": 23, "a": 60, "c": 1, "e": 4, "d": 60}


def model_of(name: str) -> PhaseModel:
    torch.manual_seed(0)
    return PhaseModel(Standardise(torch.ones(D), torch.ones(D) * 2), build_head(HEADS[name], D, C)).eval()


def videos() -> dict[str, VideoFeatures]:
    rng = np.random.default_rng(0)
    return {name: video(rng.normal(0, 2, (frames, D)).astype(np.float16)) for name, frames in LENGTHS.items()}


def video(features: NDArray[Any]) -> VideoFeatures:
    count = len(features)
    empty: Any = np.zeros((count, 0))
    return VideoFeatures(np.arange(count), np.arange(count) / 1.0, np.zeros(count, np.int8), empty, features, empty)


@torch.no_grad()
def alone(model: PhaseModel, features: NDArray[Any]) -> NDArray[np.float32]:
    return model(torch.from_numpy(features)[None]).logits[0].softmax(1).numpy()


SMALL = BatchSizes(videos=2, chunk_frames=9, clip_frames=20)  # every video is cut


@pytest.mark.parametrize("name", HEADS)
def test_carried_is_the_whole_video_at_once(name: str) -> None:
    model, given = model_of(name), videos()
    predicted = predict_phases(model, given, "carried", 16, "cpu", sizes=SMALL)
    assert list(predicted) == list(given)
    for video_id, probabilities in predicted.items():
        assert probabilities.dtype == np.float32
        assert probabilities.shape == (LENGTHS[video_id], C)
        np.testing.assert_allclose(probabilities, alone(model, given[video_id].features), atol=1e-6)
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 4, 30])
@pytest.mark.parametrize("name", HEADS)
def test_clip_is_zero_state_before_each_frame(name: str, frames: int) -> None:
    model, given = model_of(name), videos()
    predicted = predict_phases(model, given, "clip", frames, "cpu", sizes=SMALL)
    for video_id, item in given.items():
        for t in range(len(item)):
            if t >= frames - 1:
                expected = alone(model, item.features[t - frames + 1 : t + 1])[-1]
            else:  # a position inside the first clip
                expected = alone(model, item.features[:frames])[t]
                if model.causal:
                    np.testing.assert_allclose(expected, alone(model, item.features[: t + 1])[-1], atol=1e-6)
            np.testing.assert_allclose(predicted[video_id][t], expected, atol=1e-6)


@pytest.mark.parametrize(("inference", "frames"), [("carried", 7), ("clip", 7), ("clip", 1)])
@pytest.mark.parametrize("name", [name for name in HEADS if name != "bidirectional"])
def test_online_equals_offline(name: str, inference: Any, frames: int) -> None:
    model, given = model_of(name), videos()
    predicted = predict_phases(model, given, inference, frames, "cpu")
    online = OnlinePredictor(model, inference, frames, "cpu")
    for video_id in ("a", "b"):
        online.reset()
        steps = [online.step(row) for row in given[video_id].features]
        assert steps[0].shape == (C,)
        np.testing.assert_allclose(np.stack(steps), predicted[video_id], atol=1e-6)
    online.reset()
    beside = [online.step(np.stack([given[v].features[t] for v in ("a", "d")])) for t in range(60)]
    np.testing.assert_allclose(np.stack(beside)[:, 1], predicted["d"], atol=1e-6)


def test_online_refuses_a_head_that_looks_ahead() -> None:
    with pytest.raises(UserError, match="offline only"):
        OnlinePredictor(model_of("bidirectional"))


def test_prediction_leaves_the_model_in_its_mode() -> None:
    model = model_of("lstm").train()
    predict_phases(model, videos(), "carried", 1, "cpu")
    assert model.training


def test_an_empty_video_has_no_probabilities() -> None:
    predicted = predict_phases(model_of("lstm"), {"x": video(np.zeros((0, D), np.float16))}, "carried", 1, "cpu")
    assert predicted["x"].shape == (0, C)


def test_features_of_another_width() -> None:
    with pytest.raises(UserError, match="v: features have width 9, the model was trained on 5"):
        predict_phases(model_of("lstm"), {"v": video(np.zeros((3, 9), np.float16))}, "carried", 1, "cpu")


def test_what_is_not_a_checkpoint_of_this_stage(train: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"best\.pt: no such checkpoint"):
        load_temporal(tmp_path)
    save_checkpoint(tmp_path / "best.pt", {"kind": "cnn", "model": {}})
    with pytest.raises(UserError, match=r"best\.pt: not a checkpoint of train-temporal"):
        load_temporal(tmp_path)
    train(temporal={"epochs": 1})
    from engine.checkpoints import load_checkpoint

    content = load_checkpoint(tmp_path / "run/temporal/best.pt")
    save_checkpoint(tmp_path / "best.pt", content | {"head": {"name": "lstm", "hidden": 99}})
    with pytest.raises(UserError, match=r"best\.pt: damaged, or written by another version") as error:
        load_temporal(tmp_path)
    assert "\n" not in str(error.value)


def test_description_in_a_checkpoint(train: Any, tmp_path: Path) -> None:
    result = train(temporal={"sequence": {"mode": "clips", "frames": 6, "inference": "clip"}, "epochs": 1})
    model, about = load_temporal(tmp_path / "run/temporal")
    assert not model.training
    assert about.head.model_dump() == {
        "name": "lstm",
        "hidden": 12,
        "layers": 1,
        "dropout": 0.0,
        "bidirectional": False,
        "relu": False,
        "fc_hidden": None,
    }
    assert (about.inference, about.frames, about.embedding_dim, about.fps) == ("clip", 6, 6, 1.0)
    assert about.phases == ("Early", "Middle", "Late")
    assert (about.dataset, about.backbone) == ("toy", "toy")
    assert about.scores["val_accuracy"] == result["val_accuracy"]
    assert load_temporal(tmp_path / "run/temporal/frame")[1].head == head_settings.LinearHead(name="linear")


@pytest.mark.parametrize("asked", ["clip", "carried"])
def test_inference_is_refused_for_a_net_without_a_state(asked: str) -> None:
    each_frame = PhaseModel(Standardise.identity(3), build_head(HEADS["linear"], 3, 4))
    recurrent = PhaseModel(Standardise.identity(3), build_head(HEADS["lstm"], 3, 4))
    for phase in (each_frame, None):
        assert chosen_inference(None, "carried", phase, Path("net")) == "carried"
        with pytest.raises(UserError, match="--inference: has no effect on net, which recognises each frame by itself"):
            chosen_inference(asked, "carried", phase, Path("net"))
    assert chosen_inference(asked, "carried", recurrent, Path("net")) == asked


class _Outside(Head):
    """A head as a plug-in may have it: its state is the sum of the past, or empty."""

    def __init__(self, carries: bool) -> None:
        super().__init__(HeadSettings(name="outside"), 3, 4)
        self.fc, self.carries = torch.nn.Linear(3, 4), carries

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        return HeadOutput([self.fc(x)], x, (x.sum(dim=1),) if self.carries else ())


def test_inference_is_refused_for_a_plugged_in_head_without_a_state() -> None:
    each_frame, carrying = (PhaseModel(Standardise.identity(3), _Outside(carries)) for carries in (False, True))
    with pytest.raises(UserError, match="--inference: has no effect on net, which recognises each frame by itself"):
        chosen_inference("clip", "carried", each_frame, Path("net"))
    assert chosen_inference("clip", "carried", carrying, Path("net")) == "clip"
    each_frame.head.causal = False  # sees whole videos or clips, for which it needs no state
    assert chosen_inference("clip", "carried", each_frame, Path("net")) == "clip"
