"""Comparisons of encoders from frames to the page: what is finished stays finished, what is missing is made."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from configs.errors import UserError
from configs.load import load_encoder_comparison, to_yaml
from engine.stopping import Stopped, StopRequest
from evaluation.encoders import EncoderFacts
from evaluation.files.predictions import read_prediction_csv
from features.dataset.index import Index
from features.store import read_features
from stage2_temporal.ablation import encoders as encoders_module
from stage2_temporal.ablation.encoder_features import Plan, make_folds, overlap_note, with_notes
from stage2_temporal.ablation.encoders import compare
from tests.cli import run, succeed
from tests.stage1_cnn.material import FRAMES, SPEC, paint, write_labels
from tests.videos import VideoSpec, write_video

ENCODERS = {
    "frozen": {"backbone": "shufflenet_v2_x0_5", "weights": "random"},
    "tuned": {"backbone": "shufflenet_v2_x0_5", "weights": "random", "finetune": True, "settings": {"cnn.epochs": 1}},
}
FILE: dict[str, Any] = {
    "base": "base.yaml",
    "encoders": ENCODERS,
    "heads": {"lstm": {"name": "lstm", "hidden": 6}},
    "seeds": [0, 1],
    "folds": 2,
}


def _paint(video: int, number: int, width_px: int, height_px: int) -> np.ndarray:
    return np.roll(paint(number, width_px, height_px), 9 * video, axis=1)


def write_world(folder: Path) -> None:
    """Four videos of 13 samples, base settings, and a file of two encoders, a head, two seeds and two folds."""
    for number in range(1, 5):  # of unequal looks, so that the folds train unequal encoders
        look = VideoSpec(count=FRAMES, width_px=64, height_px=48, paint=partial(_paint, number))
        (folder / "data").mkdir(exist_ok=True)
        write_video(folder / f"data/video{number:02d}.mp4", look)
        write_labels(folder / "data", number)
    (folder / "tiny.yaml").write_text(to_yaml(SPEC))
    base = {
        "device": "cpu",
        "data": {"dataset": "tiny.yaml", "root": "data", "index": "index.json", "fps": 5, "split": {"rule": "2/1/1"}},
        "preprocess": {"resize_px": 40, "crop_px": 32},
        "cnn": {"epochs": 2, "batch_frames": 4, "precision": "fp32", "workers": 0, "backbone_lr_factor": 1.0},
        "extract": {"precision": "fp32", "batch_frames": 4, "workers": 1},
        "temporal": {"head": {"name": "gru", "hidden": 5}, "epochs": 2, "precision": "fp32"},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    write_file(folder)


def write_file(folder: Path, **changes: Any) -> None:
    (folder / "both.yaml").write_text(yaml.safe_dump({**FILE, **changes}, sort_keys=False))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the command has finished once; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("encoders")
    write_world(folder)
    output = succeed(["compare-encoders", "both.yaml", "--workers", "1"], folder)
    assert "tuned, lstm, fold 1, seed 1: validation accuracy" in output
    assert "(6 of 6 done)" in output
    assert "Kendall's tau" in " ".join(output.split())
    return folder


@pytest.fixture
def place(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished folder, as the current one."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def again(place: Path, *overrides: str, stop: StopRequest | None = None, name: str = "both") -> list[tuple[str, str]]:
    plan = Plan(load_encoder_comparison("both.yaml"), overrides, Path("runs") / name)
    return compare(plan, workers=1, stop=stop or StopRequest())


def times(place: Path) -> dict[str, int]:
    """When what is expensive was made: features, stage one, and trainings."""
    files = [*place.rglob("*.h5"), *place.rglob("best.pt"), *place.rglob("done.json")]
    return {str(path.relative_to(place)): path.stat().st_mtime_ns for path in files}


def result(place: Path, name: str = "both") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "runs" / name / "encoders.json").read_text())
    return found


def test_every_encoder_head_fold_and_seed_once(finished: Path) -> None:
    with (finished / "runs/both/encoders.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    tried = {(row["encoder"], row["head"], row["fold"], row["seed"]) for row in rows}
    heads = {("probe", ""), ("lstm", "0"), ("lstm", "1")}
    expected = {(encoder, head, fold, seed) for encoder in ENCODERS for head, seed in heads for fold in "01"}
    assert (tried, len(rows)) == (expected, 12)
    assert {(row["fold"], row["test_videos"]) for row in rows} == {("0", "video01 video02"), ("1", "video03 video04")}
    for row in rows:
        assert 0 <= float(row["val_accuracy"]) <= 1
        folder = finished / row["folder"]
        scored = []
        for video in row["test_videos"].split():
            phase = read_prediction_csv(folder / f"predictions/{video}.csv", SPEC).phase
            truth = read_features(next((finished / "artifacts/features").glob(f"*/{video}.h5"))).phase
            scored.append(100 * np.mean(phase == truth))
        assert float(row["test_accuracy"]) == pytest.approx(np.mean(scored))


def test_the_table_is_that_of_the_predictions(finished: Path) -> None:
    found = result(finished)
    with (finished / "runs/both/encoders.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in found["encoders"]:
        of_seeds = [
            np.mean([float(one["test_accuracy"]) for one in rows if (one["encoder"], one["seed"]) == (row["name"], s)])
            for s in "01"
        ]
        score = row["scores"]["lstm"]["accuracy"]
        assert (score["mean"], score["std"]) == pytest.approx((np.mean(of_seeds), np.std(of_seeds, ddof=1)))
        assert row["tool_map"]["probe"] > 0
        assert (row["tool_map"]["head"] is None) == (row["name"] == "frozen")
        facts = row["facts"]
        assert (facts["embedding_dim"], facts["crop_px"]) == (1024, 32)
        assert facts["parameters"] == 341792
        assert facts["encoded_per_s"] > facts["frames_per_s"] > 0
    assert found["about"]["videos"] == ["video01", "video02", "video03", "video04"]


def test_a_frozen_encoder_is_extracted_once_and_a_tuned_one_in_each_fold(finished: Path) -> None:
    assert len(list((finished / "artifacts/features").iterdir())) == 3
    splits = {}
    for fold in (0, 1):
        index = Index.load(finished / f"runs/both/folds/{fold}.json")
        splits[fold] = {part: [one.id for one in index.by_split(part)] for part in ("train", "val", "test")}
    assert splits[0] == {"train": ["video04"], "val": ["video03"], "test": ["video01", "video02"]}
    for fold, split in splits.items():
        trained = json.loads((finished / f"runs/both/encoders/tuned/fold{fold}/cnn/trained_on.json").read_text())
        assert set(trained["data"][0]["videos"]) == {*split["train"], *split["val"]}
        config = finished / f"runs/both/trainings/frozen/lstm/fold{fold}-seed1/temporal/config.yaml"
        settings = yaml.safe_load(config.read_text())
        assert (settings["seed"], settings["temporal"]["head"]["hidden"]) == (1, 6)
        assert settings["temporal"]["baseline"] is False


def test_the_same_command_again_makes_nothing(place: Path) -> None:
    before, page = times(place), result(place)
    assert again(place) == []
    assert (times(place), result(place)) == (before, page)


def test_what_is_missing_is_made_again_and_gives_the_same(place: Path) -> None:
    before, table = times(place), result(place)
    lost = place / "runs/both/trainings/tuned/lstm/fold0-seed1"
    shutil.rmtree(lost)
    (place / "runs/both/trainings/frozen/probe/fold1/done.json").unlink()
    assert again(place) == []
    after = times(place)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {name for name in before if "tuned/lstm/fold0-seed1" in name or "frozen/probe/fold1" in name}
    assert result(place) == table


def test_stopped_between_trainings_it_resumes(place: Path) -> None:
    table, own = result(place), place / "runs/both/trainings/tuned"
    shutil.rmtree(own)

    class StopAfterThree(StopRequest):
        def raise_if_set(self) -> None:
            if len(list(own.rglob("done.json"))) >= 3:
                self.number = int(signal.SIGTERM)
            super().raise_if_set()

    with pytest.raises(Stopped):
        again(place, stop=StopAfterThree())
    before = times(place)
    assert sum(name.endswith("done.json") for name in before) == 6 + 3
    assert again(place) == []
    assert all(times(place)[name] == moment for name, moment in before.items())
    assert result(place) == table


def test_a_training_that_fails_is_reported_and_tried_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, original = result(place), encoders_module.train_temporal
    shutil.rmtree(place / "runs/both/trainings/frozen/lstm/fold0-seed0")

    def fail(*arguments: Any, **named: Any) -> Any:
        raise UserError("no room left on the disk")

    monkeypatch.setattr(encoders_module, "train_temporal", fail)
    assert again(place) == [("frozen, lstm, fold 0, seed 0", "no room left on the disk")]
    found = {row["name"]: row["scores"]["lstm"]["seeds"] for row in result(place)["encoders"]}
    assert found == {"frozen": 1, "tuned": 2}  # seed 0 lacks a fold
    monkeypatch.setattr(encoders_module, "train_temporal", original)
    assert again(place) == []
    assert result(place) == table


def test_another_comparison_of_the_same_name_is_refused(place: Path) -> None:
    before = times(place)
    with pytest.raises(UserError, match=r"this run exists with other settings \(temporal.epochs: 2 there, 3 now"):
        again(place, "temporal.epochs=3")
    write_file(place, seeds=[0, 1, 2], title="New")
    with pytest.raises(UserError, match=r"this run exists with other settings \(comparison.seeds"):
        again(place)
    write_file(place, title="New", reference="frozen")  # changes no number
    assert again(place) == []
    assert times(place) == before
    assert result(place)["about"]["title"] == "New"
    assert result(place)["comparisons"]["lstm"][0]["first"] == "frozen"


@pytest.mark.parametrize(("name", "content"), [("predictions/video01.csv", "frame\n"), ("done.json", "[1]")])
def test_a_damaged_training_is_named(place: Path, name: str, content: str) -> None:
    damaged = place / "runs/both/trainings/tuned/lstm/fold0-seed0"
    (damaged / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: .*; delete .*fold0-seed0 to train it again"):
        again(place)


def test_without_folds_the_split_of_the_base_is_used(place: Path) -> None:
    write_file(place, encoders={"frozen": ENCODERS["frozen"]}, folds=None, seeds=[3])
    assert again(place, name="single") == []
    assert result(place, "single")["about"]["videos"] == ["video04"]
    assert result(place, "single")["encoders"][0]["facts"].get("frames_per_s") is None  # the features were there


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", "0"], "--workers 0: give a number of trainings"),
        (["--trusted"], "--trusted: cannot be combined with these encoders: no third-party file is loaded"),
        (["--name", "../x"], "run name '../x'"),
        (["--base", "nowhere.yaml"], "nowhere.yaml: no such settings file or preset"),
    ],
)
def test_wrong_options_are_one_line(finished: Path, arguments: list[str], expected: str) -> None:
    done = run(["compare-encoders", "both.yaml", *arguments], finished)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line


FROZEN: dict[str, Any] = ENCODERS["frozen"]


@pytest.mark.parametrize(
    ("changes", "overrides", "expected"),
    [
        ({}, ["temporal.head.hidden=7"], "given both as 6 and as 7"),
        ({}, ["extract.encoder=finetuned"], "the settings of encoder frozen: extract.encoder: given both as"),
        ({"folds": 9}, [], "9 folds need 9 videos, but there are 4"),
        ({"folds": None}, ["data.index=all.json", "data.split.rule=3/1/0"], "all.json: no video is for testing"),
        (
            {"encoders": {"a": FROZEN, "b": {**FROZEN, "settings": {"extract.compile": False}}}},
            [],
            "encoders a and b have the same weights and settings; leave one out",
        ),
        ({"encoders": {"a": {"backbone": "resnet81"}}}, [], "encoder a: .*resnet81"),
        ({"encoders": {"a": {**FROZEN, "weights": "w.pt"}}}, [], "encoder a: cnn.weights=w.pt: no such file"),
        (
            {"encoders": {"a": {**ENCODERS["tuned"], "settings": {"cnn.freeze_until": "stage9"}}}},
            [],
            r"encoder a: cnn\.freeze_until=stage9: not a layer that can be named",
        ),
        ({}, ["extract.checkpoint=best.pt"], r"^extract\.checkpoint=best\.pt: would replace the encoders"),
        (
            {"encoders": {"a": {**FROZEN, "settings": {"preprocess.crop_px": 99}}}},
            [],
            "the settings of encoder a: preprocess: crop_px 99 is larger than resize_px 40",
        ),
        (
            {"encoders": {"a": {**FROZEN, "settings": {"preprocess.mean": [1, "x", 2]}}}},
            [],
            r"the settings of encoder a: preprocess\.mean\.1: ",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    place: Path, changes: dict[str, Any], overrides: list[str], expected: str
) -> None:
    write_file(place, **changes)
    before = times(place)
    with pytest.raises(UserError, match=expected) as caught:
        again(place, *overrides, name="x")
    assert "\n" not in str(caught.value)
    assert times(place) == before
    assert not (place / "runs/x/config.yaml").exists()  # so that the corrected file can have the same name


TRAINED = {"backbone": "shufflenet_v2_x0_5", "weights": "runs/both/encoders/tuned/fold0/cnn/best.pt"}


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({}, []),
        ({"folds": None}, []),
        ({"encoders": {"a": {**TRAINED, "finetune": True}}}, []),
        ({"encoders": {"a": FROZEN}}, [f"temporal.start_from={TRAINED['weights']}"]),
    ],
)
def test_weights_that_were_trained_on_test_videos_are_refused_before_any_work(
    place: Path, changes: dict[str, Any], overrides: list[str]
) -> None:
    write_file(place, **{"encoders": {"a": TRAINED}, **changes})
    before = times(place)
    expected = (
        r"^encoder a: \S*fold0.cnn: trained on video0[34] of tiny.*; test on other videos .* data\.allow_overlap=true"
    )
    with pytest.raises(UserError, match=expected):
        again(place, *overrides, name="x")
    assert times(place) == before
    assert not (place / "runs/x").exists()


def test_tools_that_do_not_exist_cannot_be_trained(place: Path) -> None:
    index = Index.load(place / "index.json")
    bare = index.dataset.model_copy(update={"tools": ()})
    (place / "tiny.yaml").write_text(to_yaml(bare))
    index.model_copy(update={"dataset": bare}).save(place / "index.json")
    with pytest.raises(UserError, match=r"^encoder tuned: data set tiny has no tools; set cnn\.phase_head=true"):
        again(place, name="x")
    assert not (place / "runs/x").exists()


def notes(place: Path, *overrides: str, **encoder: Any) -> str | None:
    write_file(place, encoders={"a": {**TRAINED, **encoder}})
    plan, index = (
        Plan(load_encoder_comparison("both.yaml"), overrides, Path("runs/x")),
        Index.load(place / "index.json"),
    )
    facts = EncoderFacts(
        backbone=TRAINED["backbone"],
        weights=plan.spec.encoders["a"].weights,
        finetuned=plan.spec.encoders["a"].finetune,
        crop_px=32,
        embedding_dim=1024,
        parameters=1,
    )
    return with_notes(plan, facts, "a", index, make_folds(plan, index)).note


def test_the_result_says_that_an_encoder_has_seen_test_videos(place: Path) -> None:
    allowed = "data.allow_overlap=true"
    expected = "starts from weights that were trained on test videos, so its scores are too good"
    assert notes(place, allowed) == notes(place, allowed, finetune=True) == expected
    assert notes(place, weights="random") is None
    int8 = {"weights": "random", "settings": {"extract.engine": "openvino", "extract.precision": "int8"}}
    assert "its int8 net was calibrated on frames (without labels) of videos that are tested" in (
        notes(place, **int8) or ""
    )
    assert notes(place, **int8, finetune=True) is None  # calibrated on each fold's own training videos


def test_an_encoder_that_has_seen_the_data_set_is_noted() -> None:
    def note(backbone: str, dataset: str, weights: str = "file.pth") -> str | None:
        facts = EncoderFacts(
            backbone=backbone, weights=weights, finetuned=False, crop_px=224, embedding_dim=1, parameters=1
        )
        return overlap_note(facts, dataset)

    assert (note("surgenet_pvt_v2_b2", "cholec80") or "").startswith("its release was pretrained on cholec80 (76 of")
    assert "which may share operations with cholect45" in (note("surgenet_pvt_v2_b2@mean", "cholect45") or "")
    assert note("surgenet_pvt_v2_b2", "cataracts") is None
    assert note("surgenet_pvt_v2_b2", "cholec80", "random") is None
    assert note("efficientnet_lite0", "cholec80", "imagenet") is None


def test_an_index_and_a_seed_of_the_command_line_are_those_of_all_folds(place: Path) -> None:
    plan = Plan(load_encoder_comparison("both.yaml"), ("data.index=all.json", "seed=7"), Path("runs/x"))
    encoder, head = next(iter(plan.spec.encoders)), next(iter(plan.spec.heads))
    assert (plan.base().data.index, plan.config(encoder).seed) == (Path("all.json"), 7)
    training = plan.config(encoder, 1, head, 2)
    assert (training.data.index, training.seed, training.temporal.baseline) == (plan.index_file(1), 2, False)


def test_the_shipped_comparison_prepares_frames_as_each_encoder_was_trained() -> None:
    plan = Plan(load_encoder_comparison("encoders"), (), Path("runs/x"))
    sizes = {name: plan.config(name).preprocess.crop_px for name in plan.spec.encoders}
    assert sizes == {"lite0": 224, "lite1": 240, "lite2": 260, "lite0-finetuned": 224}
