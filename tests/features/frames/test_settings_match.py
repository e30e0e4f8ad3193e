"""How frames are prepared, in words, and the note on settings that are not those of the encoder."""

from __future__ import annotations

import pytest

from configs.load import load_config
from configs.schema import PreprocessConfig
from features.frames.settings_match import frames_note, preprocess_words, say_frames_note


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"resize_px": 224, "crop_px": 224}, "resized to 224 x 224 (bilinear); mean 0.3456, 0.2281, 0.2233, standard "),
        (
            {"resize_px": [360, 640], "crop_px": 224},
            "resized to height 360 and width 640 (bilinear), cropped to 224 ",
        ),
        (
            {"short_side_px": 256, "resize_px": 224, "crop_px": 224, "interpolation": "bicubic"},
            "resized to 256 on the shorter side, of which the centre 224 x 224 is kept (bicubic); mean",
        ),
    ],
)
def test_preprocessing_in_words(values: dict[str, object], words: str) -> None:
    assert preprocess_words(PreprocessConfig.model_validate(values)).startswith(words)


def test_frames_of_a_described_encoder_are_mentioned_and_differences_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = load_config(None, ["cnn.backbone=efficientnet_lite1"])
    assert frames_note(own) == (
        "frames for efficientnet_lite1: resized to 268 x 268 (bilinear), cropped to 240 x 240; mean 0.485, 0.456, "
        "0.406, standard deviation 0.229, 0.224, 0.225, as its description states"
    )
    other = load_config(None, ["cnn.backbone=efficientnet_lite1", "preprocess.crop_px=224", "preprocess.std=[1,1,1]"])
    assert frames_note(other) == (
        "note: frames are prepared with preprocess.crop_px=224, preprocess.std=[1.0, 1.0, 1.0]; efficientnet_lite1 was "
        "trained with 240, [0.229, 0.224, 0.225]"
    )
    margin = load_config(None, ["cnn.backbone=efficientnet_lite1", "preprocess.cut_margin=true"])
    assert frames_note(margin) == frames_note(own)
    assert frames_note(load_config()) is None  # torchvision's networks state no preparation
    say_frames_note(own, other, own, load_config())
    assert capsys.readouterr().err.splitlines() == [frames_note(own), frames_note(other)]
