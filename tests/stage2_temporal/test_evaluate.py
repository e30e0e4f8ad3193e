"""A run is evaluated on features of its own encoder, in whatever precision this machine computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import Config, DecodingConfig
from engine.stopping import StopRequest
from evaluation.comparison import Place, load_model
from evaluation.files.predictions import read_prediction_csv
from evaluation.reports.gather import gather
from evaluation.reports.html_tables import all_tables
from stage2_temporal.decoding.chosen import ChosenDecoding
from stage2_temporal.decoding.decoder import decode
from stage2_temporal.decoding.fitted import load_decoding
from stage2_temporal.evaluate import evaluate_run
from tests.stage2_temporal.toy import cue_video, spec, write_folder


def test_features_made_in_another_precision_are_evaluated_with_a_note(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    videos = {f"video{i}": cue_video(rng, split, 30) for i, split in enumerate(("train", "val", "test"))}
    made_there = write_folder(tmp_path / "bf16", videos, precision="bf16", arithmetic="folded, fused")
    made_here = write_folder(tmp_path / "fp32", videos)
    another = write_folder(tmp_path / "another", videos, weights=dict.fromkeys(videos, "1" * 64))
    train(folder=made_there, temporal={"epochs": 1, "baseline": False})
    config = Config.model_validate({"device": "cpu", "runs": tmp_path})

    def evaluate(features: Path) -> str:
        evaluate_run(config, tmp_path / "run", features=features, stop=StopRequest())
        return "".join(capsys.readouterr())

    assert "features were computed in" not in evaluate(made_there)
    assert (
        "note: the training's features were computed in bf16 (folded, fused), these are computed in fp32 (plain)"
        in evaluate(made_here)
    )
    metrics = json.loads((tmp_path / "run/evaluate/test/metrics.json").read_text())
    assert (metrics["encoder"]["precision"], metrics["encoder"]["arithmetic"]) == ("fp32", "plain")
    with pytest.raises(UserError, match=r"features of encoder .*weights_sha256: 000.*name the right folder"):
        evaluate(another)


def test_features_of_two_encoders_are_named_by_their_files(train: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    splits = {"video0": "train", "video1": "val", "video2": "test", "case:1": "test"}
    videos = {name: cue_video(rng, split, 30) for name, split in splits.items()}
    train(folder=write_folder(tmp_path / "one", videos), temporal={"epochs": 1, "baseline": False})
    mixed = write_folder(tmp_path / "two", videos, weights={"case:1": "1" * 64})
    config = Config.model_validate({"device": "cpu", "runs": tmp_path})
    with pytest.raises(UserError, match=r"case%3A1\.h5: made by encoder"):
        evaluate_run(config, tmp_path / "run", features=mixed, stop=StopRequest())


def test_decoding_shows_both_heads_and_is_part_of_the_identity(
    train: Any, tmp_path: Path, cue_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(temporal={"baseline": False})
    temporal = tmp_path / "run/temporal"

    def evaluate(*folders: str, redo: bool = False, **decoding: Any) -> tuple[dict, str]:
        settings = {"device": "cpu", "runs": tmp_path, "temporal": {"decoding": decoding}}
        named = decoding.get("mode") if folders else None
        common: dict[str, Any] = {"features": cue_folder, "stop": StopRequest(), "redo": redo, "decoding": named}
        evaluate_run(Config.model_validate(settings), tmp_path / "run", **common)
        metrics = json.loads((tmp_path / "run/evaluate" / (folders or ("test",))[0] / "metrics.json").read_text())
        return metrics, "".join(capsys.readouterr())

    plain, printed = evaluate()
    assert "decoding" not in plain
    assert "undecoded" not in printed
    csv = tmp_path / "run/evaluate/test/predictions/video08.csv"
    raw = read_prediction_csv(csv, spec())
    causal, printed = evaluate(mode="causal", min_duration_s=20)
    assert "undecoded" in printed
    assert "decoded causally, without a lag" in printed
    assert list(causal["phases"]) == ["temporal", "undecoded", "majority"]
    assert causal["phases"]["undecoded"] == plain["phases"]["temporal"]
    assert causal["decoding"]["tracks"]["phases"]["min_duration_s"] == 20
    assert causal["identity_sha256"] != plain["identity_sha256"]
    found = read_prediction_csv(csv, spec())
    fitted = load_decoding(temporal, {"phases": spec().phases}).tracks["phases"]
    labels, values = decode(fitted, DecodingConfig(mode="causal", min_duration_s=20), 1.0, raw.probabilities)
    np.testing.assert_array_equal(found.phase, labels)
    np.testing.assert_array_equal(found.probabilities, values)
    assert "temporal (causal)" in printed
    assert {one["about"]["decoding"] for one in causal["phases"]["temporal"].values()} == {"causal"}
    assert "unchanged" in evaluate(mode="causal", min_duration_s=20)[1]
    offline, _ = evaluate("test-offline", mode="offline")
    assert offline["decoding"]["offline"] is True
    assert "phases are decoded" in "".join((tmp_path / "run/MODEL_CARD.md").read_text().lower().split("\n"))
    calibrated, _ = evaluate("test-calibrated", mode="calibrated")
    found_by = {name: one | {"about": None} for name, one in calibrated["phases"]["temporal"].items()}
    changed = {n for n, one in plain["phases"]["temporal"].items() if found_by[n] != one | {"about": None}}
    assert changed == {"calibration", "phakir"}  # AUROC compares probabilities across frames
    assert "decoded causally, with a lag of 2 s" in evaluate(mode="causal", lag_s=2.4)[1]
    place, name = Place(tmp_path, "test", spec()), "run (causal, lag 2 s)"
    assert load_model("run", place, "video_macro").name == name
    shown = all_tables(gather([tmp_path / "run"]))
    assert shown.conventions["video_macro"].tables[0].columns[0] == "Temporal head (causal, lag 2 s)"
    seeds = f"run,{tmp_path / 'run/evaluate/test-calibrated'}"
    with pytest.raises(UserError, match=r"decoded in different ways \(causal, lag 2 s; calibrated\); evaluate all"):
        load_model(seeds, place, "video_macro")
    (temporal / "decoding.json").unlink()
    with pytest.raises(UserError, match=r"decoding.json: no such file, .*run train-temporal again"):
        evaluate(mode="causal")
    assert "identity_sha256" in evaluate()[0]


@pytest.fixture
def chosen(train: Any, tmp_path: Path) -> Any:
    """`chosen(trained, asked, **settings)`: the decoding of a run of one epoch."""
    train(temporal={"epochs": 1, "baseline": False})
    classes = {"phases": spec().phases}

    def of(trained: Any = "carried", asked: Any = None, **settings: Any) -> ChosenDecoding:
        folder, settings_of = tmp_path / "run/temporal", DecodingConfig(**settings)
        found = ChosenDecoding.of_run(folder, settings_of, classes, trained, asked)
        assert found
        return found

    return of


def test_a_decoding_is_used_with_the_inference_to_which_it_was_fitted(chosen: Any, tmp_path: Path) -> None:
    path = tmp_path / "run/temporal/decoding.json"
    assert json.loads(path.read_text())["inference"] == "carried"
    assert chosen(asked="carried", mode="filter")
    with pytest.raises(UserError, match=r"--inference clip: .*decoding.json was fitted to --inference carried; leave"):
        chosen(asked="clip", mode="filter")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "inference"}))
    assert chosen(trained="clip", asked="clip", mode="filter")  # of an earlier version: fitted as in training
    with pytest.raises(UserError, match="fitted to --inference clip"):
        chosen(trained="clip", asked="carried", mode="filter")


def test_settings_without_an_effect_are_noted_if_there_is_no_decoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ChosenDecoding.of_run(tmp_path, DecodingConfig(lag_s=2), {}, "carried") is None
    assert "note: temporal.decoding.lag_s has no effect with mode=none" in capsys.readouterr().err


def test_a_decoding_says_how_far_it_really_looks_ahead_and_in_which_video_it_fails(chosen: Any) -> None:
    looks = {fps: chosen(mode="causal", lag_s=3).to_json(fps)["lag_s"] for fps in (0.25, 0.5, 1.0, 2.5)}
    assert looks == {0.25: 0, 0.5: 2, 1.0: 3, 2.5: 2.8}
    damaged = {"video08": np.full((3, len(spec().phases)), np.nan, np.float32)}
    with pytest.raises(UserError, match=r"^video08, sampled frame 0: "):
        chosen(mode="filter").of_heads("phases", 1.0, {"temporal": damaged})
