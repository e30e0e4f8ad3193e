"""Recognition frame by frame decides as the decoding of a whole video does, on every label track."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import DecodingConfig
from stage2_temporal.decoding.chosen import ChosenDecoding
from stage2_temporal.predict import OnlineDecoder, OnlinePredictor, load_temporal, predict_phases


def test_frame_by_frame_equals_the_whole_video(train: Any, tmp_path: Path, cue_folder: Path, videos_of: Any) -> None:
    train(temporal={"epochs": 1, "baseline": False})
    folder, videos = tmp_path / "run/temporal", videos_of(cue_folder, "test")
    model, about = load_temporal(folder)
    whole = predict_phases(model, videos, about.inference, about.frames, "cpu")["video08"]

    def chosen(**settings: Any) -> ChosenDecoding:
        found = ChosenDecoding.of_run(folder, DecodingConfig.model_validate(settings), about.classes, about.inference)
        assert found
        return found

    decoding = chosen(mode="causal", lag_s=3)
    labels, values = decoding.decode("phases", 1.0, whole)
    online = OnlineDecoder(OnlinePredictor(model, about.inference, about.frames, "cpu"), about, decoding, 1.0)
    for _ in range(2):  # the second time after `reset`
        steps = [online.step(frame) for frame in videos["video08"].features.astype(np.float32)]
        assert [len(one) for one in steps[:4]] == [0, 0, 0, 1]
        found = [decision["phases"] for one in (*steps, online.finish()) for decision in one]
        assert [one.label for one in found] == labels.tolist()
        np.testing.assert_allclose([one.probabilities for one in found], values, atol=1e-5)
        online.reset()
    with pytest.raises(UserError, match="needs whole videos; frame by frame, use causal"):
        OnlineDecoder(OnlinePredictor(model, device="cpu"), about, chosen(mode="offline"), 1.0)
