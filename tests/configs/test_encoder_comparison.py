"""Files of `compare-encoders`: what they say, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import UserError
from configs.load import load_ablation, load_encoder_comparison

VALID: dict[str, Any] = {
    "base": "mini",
    "encoders": {"frozen": {"backbone": "resnet18"}, "tuned": {"backbone": "resnet18", "finetune": True}},
    "heads": {"lstm": {"name": "lstm", "hidden": 8}, "tcn": {"name": "tcn"}},
}


def write(folder: Path, tree: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_the_shipped_comparison_is_one() -> None:
    spec = load_encoder_comparison("encoders")
    assert [name for name, encoder in spec.encoders.items() if encoder.finetune] == ["lite0-finetuned"]
    assert (list(spec.heads), spec.seeds) == (["lstm", "tcn"], (0, 1, 2))
    assert spec.split_changes == {"data.split.rule": "leave_one_out"}
    with pytest.raises(UserError, match=r"encoders\.yaml: compares encoders; run it with compare-encoders"):
        load_ablation("encoders")


def test_what_a_file_leaves_out_has_a_default(tmp_path: Path) -> None:
    spec = load_encoder_comparison(write(tmp_path, VALID))
    assert (spec.seeds, spec.folds, spec.reference, spec.split_changes) == ((0, 1, 2), None, None, {})
    assert (spec.encoders["frozen"].weights, spec.encoders["frozen"].finetune) == ("imagenet", False)
    folds = load_encoder_comparison(write(tmp_path, {**VALID, "folds": 4})).split_changes
    assert folds == {"data.split.rule": "kfold", "data.split.folds": 4}


def encoder(**content: Any) -> dict[str, Any]:
    return {"encoders": {"one": {"backbone": "resnet18", **content}}}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"sedes": [1]}, "unknown key sedes; did you mean seeds"),
        ({"encoders": {}}, "encoders: .*at least 1 item"),
        ({"encoders": {"../x": {"backbone": "resnet18"}}}, r"encoders\.\.\./x"),
        ({"encoders": {"a" * 65: {"backbone": "resnet18"}}}, "at most 64 characters"),
        ({"encoders": {"one": {"backbone": ""}}}, "backbone: .*at least 1 character"),
        ({"encoders": {"one": {"wieghts": "random"}}}, "encoders.one.backbone: Field required"),
        ({"encoders": {"one": "resnet18"}}, "encoders.one: must hold settings"),
        ({"encoders": ["resnet18"]}, "encoders: .*valid dictionary"),
        (encoder(finetune=1), "finetune: .*valid boolean"),
        (encoder(weights=3), "weights: .*valid string"),
        (encoder(settings={"cnn.backbone": "x"}), "cnn.backbone is given by backbone"),
        (encoder(settings={"extract.encoder": "initial"}), "extract.encoder is given by finetune"),
        (encoder(settings={"extract.store": "x"}), "extract.store cannot differ between encoders"),
        (
            encoder(settings={"data.fps": 1}),
            "data.fps cannot differ between encoders; only preprocess, cnn, and extract",
        ),
        (encoder(settings={"cnn.epochs": 1}), "cnn.epochs has no effect on a frozen encoder"),
        (encoder(settings={"extract.workers": 1}), "extract.workers cannot differ between encoders"),
        (encoder(settings={"extract.calibration_frames": float("nan")}), "settings.extract.calibration_frames"),
        ({"encoders": {"a": {"backbone": "x"}, "b": {"backbone": "x"}}}, "encoders: a and b are identical"),
        ({"encoders": {"a": {"backbone": "x"}, "A": {"backbone": "y"}}}, "a and A differ in case only"),
        ({"heads": {"probe": {"name": "tcn"}}}, "probe is the name of the frame probe"),
        ({"heads": {"one": {"name": "tnc"}}}, "unknown head tnc; did you mean tcn"),
        ({"heads": {"one": {"name": "lstm", "hidden": 0}}}, "hidden"),
        ({"heads": {"a": {"name": "tcn"}, "b": {"name": "tcn"}}}, "heads: a and b are identical"),
        ({"heads": {}}, "heads: .*at least 1 item"),
        ({"seeds": []}, "seeds: .*at least 1 item"),
        ({"seeds": [1, 1]}, "seeds repeat"),
        ({"seeds": [-1]}, "seeds.0: .*greater than or equal to 0"),
        *(
            ({"folds": folds}, "folds: must be leave_one_out, a number of folds from 2, or null")
            for folds in (1, 10**12, "all", True, 2.0, [2])
        ),
        ({"reference": "other"}, "reference: other is none of the encoders frozen, tuned"),
        ({"base": ""}, "base: .*at least 1 character"),
    ],
)
def test_what_is_no_comparison_is_one_line(tmp_path: Path, content: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=rf"mine\.yaml: .*{match}") as caught:
        load_encoder_comparison(write(tmp_path, {**VALID, **content}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tree", [{"base": "mini", "space": {"temporal.epochs": [1]}}, {}, {"seed": 1}])
def test_another_kind_of_file_is_named(tmp_path: Path, tree: Any) -> None:
    with pytest.raises(UserError, match="names no encoders; compare-encoders needs base, encoders and heads"):
        load_encoder_comparison(write(tmp_path, tree))
