"""Training on features that stay in their files gives the same bits as training on features in memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from engine.stopping import Stopped
from features.store import feature_path
from stage2_temporal import data as stage2_data
from stage2_temporal.data import Batch, read_training_data
from tests.stage2_temporal.conftest import Train
from tests.stage2_temporal.test_train import DROPOUT, MODES, StopAfter, require_same
from tests.stage2_temporal.toy import cue_video, write_folder

HEADS = ("temporal", "temporal/frame")


@pytest.fixture
def tools_folder(tmp_path: Path) -> Path:
    """Features with tool logits; one training video is longer than a chunk of the file."""
    rng = np.random.default_rng(1)
    lengths = {"train": (300, 41, 55), "val": (80,)}
    named = [(split, length) for split, group in lengths.items() for length in group]
    videos = {f"video{i:02d}": cue_video(rng, split, length) for i, (split, length) in enumerate(named)}
    logits = {name: rng.normal(size=(len(phase), 2)).astype(np.float32) for name, (_, _, phase) in videos.items()}
    return write_folder(tmp_path / "tools", videos, tool_logits=logits)


@pytest.mark.parametrize("mode", MODES)
def test_streamed_training_has_the_same_bits(train: Train, tmp_path: Path, mode: str) -> None:
    for where in ("memory", "stream"):
        train(where, {**MODES[mode], "features": where, "feature_dropout": 0.2 if mode == "chunked" else 0.0})
    require_same(tmp_path / "memory", tmp_path / "stream")
    for head in HEADS:
        one, two = (
            torch.load(tmp_path / where / head / "last.pt", weights_only=True) for where in ("memory", "stream")
        )
        assert str(one["optimizer"]) == str(two["optimizer"])


def test_streamed_training_with_tool_logits(train: Train, tmp_path: Path, tools_folder: Path) -> None:
    for where in ("memory", "stream"):
        train(where, {"features": where, "tool_logits": True}, folder=tools_folder)
    require_same(tmp_path / "memory", tmp_path / "stream")


def test_batches_are_equal_and_laid_out_alike(tools_folder: Path) -> None:
    """Padding included: arithmetic must not depend on where a batch came from."""
    batches = [
        Batch(torch.tensor([0, 341, 120]), torch.tensor([300, 55, 1])),
        Batch(torch.tensor([255]), torch.tensor([2])),
    ]
    both = [read_training_data(tools_folder, where).with_tool_logits() for where in ("memory", "stream")]
    for batch in batches:
        (x, phase), (y, other) = (data.bank.gather(batch) for data in both)
        assert torch.equal(x, y)
        assert torch.equal(phase, other)
        assert (x.dtype, x.stride()) == (y.dtype, y.stride())
    one, two = (data.bank.statistics(data.train) for data in both)
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("where", [("memory", "stream"), ("stream", "memory"), ("stream", "stream")])
def test_an_interrupted_training_resumes_with_either(train: Train, tmp_path: Path, where: tuple[str, str]) -> None:
    """Where features are is no part of a run's identity."""
    settings = {**MODES["chunked"], **DROPOUT}
    train("whole", settings)
    with pytest.raises(Stopped):
        train("parts", {**settings, "features": where[0]}, stop=StopAfter(5))
    train("parts", {**settings, "features": where[1]})
    require_same(tmp_path / "whole", tmp_path / "parts")


def _damage(path: Path) -> None:
    """Flip a bit of a feature and keep the time of change, as a failing disk does."""
    state, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_file_that_is_damaged_later_is_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    video = ("train", rng.normal(size=(600, 64)).astype(np.float32), np.zeros(600, np.int8))
    folder = write_folder(tmp_path / "features", {"video01": video})
    data = read_training_data(folder, "stream")
    batch = Batch(torch.tensor([0]), torch.tensor([600]))
    data.bank.gather(batch)
    path = feature_path(folder, "video01")
    _damage(path)
    with pytest.raises(UserError, match="damaged") as error:
        data.bank.gather(batch)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_replaced_during_training_is_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    videos = {"video01": cue_video(rng, "train", 20)}
    folder = write_folder(tmp_path / "features", videos)
    data = read_training_data(folder, "stream")
    write_folder(folder, {"video01": cue_video(rng, "train", 20)})
    with pytest.raises(UserError, match=r"video01\.h5: replaced since this command opened it"):
        data.bank.gather(Batch(torch.tensor([0]), torch.tensor([20])))


def test_auto_streams_what_does_not_fit(
    cue_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(path.stat().st_size for path in cue_folder.glob("*.h5"))
    for room, streamed in ((4 * size, False), (size, True)):
        monkeypatch.setattr(stage2_data, "available_bytes", lambda room=room: room)
        bank = read_training_data(cue_folder, "auto").bank
        assert isinstance(bank.features, torch.Tensor) is not streamed
        assert ("every epoch reads them from their files" in capsys.readouterr().err) is streamed
