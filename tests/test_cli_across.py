"""Across data sets: runs trained on one data set are evaluated on another, with a mapping of classes, and compared."""

from __future__ import annotations

import csv
import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import yaml

from features.dataset.index import Index
from tests.cli import run, succeed
from tests.stage2_temporal.toy import cue_video, small, write_folder

MAPPING = """
phases: [Early, Late]
datasets:
  first: {Middle: Late}           # two phases become one
  second: {Opening: Early, Closing: Late, Pause: null}
"""


def make_data_set(folder: Path, name: str, ids: list[str], phases: tuple[str, ...], seed: int) -> None:
    """A simulated data set as features of one encoder: 2 training, 1 validation and 3 test videos."""
    rng = np.random.default_rng(seed)
    splits = ["train", "train", "val", "test", "test", "test"]
    videos = {one: cue_video(rng, split, 60) for one, split in zip(ids, splits, strict=True)}
    write_folder(folder, videos, phases)
    index = Index.load(folder / "index.json")
    entries = (
        entry.model_copy(update={"sha256_ends": sha256(f"{name} {entry.id}".encode()).hexdigest()})
        for entry in index.videos
    )
    spec = index.dataset.model_copy(update={"name": name, "title": f"SIMULATED {name}"})
    index.model_copy(update={"dataset": spec, "videos": tuple(entries)}).save(folder / "index.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets with other phases, and a run trained on each."""
    folder = tmp_path_factory.mktemp("across")
    make_data_set(folder / "first", "first", [f"a{k}" for k in range(1, 7)], ("Early", "Middle", "Late"), 1)
    make_data_set(folder / "second", "second", [f"b{k}" for k in range(1, 7)], ("Opening", "Closing", "Pause"), 2)
    (folder / "own.yaml").write_text(yaml.safe_dump({"temporal": small(), "device": "cpu"}))
    (folder / "common.yaml").write_text(MAPPING)
    for name in ("first", "second"):
        succeed(["train-temporal", "--config", "own.yaml", "--name", f"on-{name}", "--features", name], folder)
    return folder


def shown_cell(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.1f} [{interval['low']:.1f}, {interval['high']:.1f}]"


def evaluate(place: Path, trained: str, tested: str, *more: str) -> str:
    words = ["evaluate", "--config", "own.yaml", "--name", f"on-{trained}", "--features", tested]
    index = [] if trained == tested else ["--index", f"{tested}/index.json"]
    return succeed([*words, *index, *more], place)


def test_the_matrix_of_two_data_sets(place: Path) -> None:
    done = run(["evaluate", "--config", "own.yaml", "--name", "on-first", "--features", "second",
                "--index", "second/index.json"], place)  # fmt: skip
    assert done.returncode == 2
    assert "its phases are Early, Middle, Late; " in done.stderr
    assert done.stderr.endswith("name a --mapping\n")
    for trained in ("first", "second"):
        for tested in ("first", "second"):
            evaluate(place, trained, tested, "--mapping", "common.yaml")
    metrics = json.loads((place / "runs/on-first/evaluate/index-test-common/metrics.json").read_text())
    assert metrics["mapping"] == {
        "name": "common", "phases": ["Early", "Late"], "background": [], "trained": [0, 1, 1], "tested": [0, 1, -1]
    }  # fmt: skip
    assert metrics["phases"]["temporal"]["phase_mean"]["per_phase"].keys() == {"Early", "Late"}
    outputs = ["--json", "m.json", "--csv", "m.csv", "--html", "m.html"]
    shown = succeed(["compare", "--matrix", "on-first", "on-second", "--mapping", "common", *outputs], place)
    assert "first: on-first" in shown
    found = json.loads((place / "m.json").read_text())
    assert found["tested_on"] == ["first", "second"]
    assert [row["trained_on"] for row in found["rows"]] == [["first"], ["second"]]
    for row in found["rows"]:
        for name, cell in row["cells"].items():
            assert (cell["own"], cell["overlap"], cell["videos"]) == (row["trained_on"] == [name], False, 3)
            interval = cell["metrics"]["accuracy"]
            assert interval["low"] <= interval["mean"] <= interval["high"]
    per_video = metrics["phases"]["temporal"]["video_macro"]["per_video"]
    mean = np.mean([row["accuracy"] for row in per_video.values()])
    assert found["rows"][0]["cells"]["second"]["metrics"]["accuracy"]["mean"] == pytest.approx(mean)
    table = list(csv.DictReader((place / "m.csv").open()))
    assert [(row["metric"], row["trained_on"], row["tested_on"]) for row in table[:4]] == [
        ("accuracy", trained, tested) for trained in ("first", "second") for tested in ("first", "second")
    ]
    page = (place / "m.html").read_text()
    assert page.count('class="own"') == 4
    assert "first: on-first" in page
    succeed(["report", "on-first", "--split", "test-common", "--no-thumbnails"], place)
    report = (place / "runs/on-first/report.html").read_text()
    assert '<section id="across">' in report
    assert "<td>" + shown_cell(found["rows"][0]["cells"]["second"]["metrics"]["f1"]) in report
    for mapping in ([], ["--mapping", "cataract"]):
        done = run(["compare", "--matrix", "on-first", *mapping], place)
        assert done.returncode == 2
        assert "has no evaluation of split test with" in done.stderr


def test_labels_and_predictions_are_mapped(place: Path) -> None:
    """The prediction is the most probable common phase; frames of a phase that is left out are not scored."""
    evaluate(place, "first", "first")
    evaluate(place, "first", "first", "--mapping", "common.yaml")
    evaluate(place, "second", "second", "--mapping", "common.yaml")
    own, common = (place / f"runs/on-first/evaluate/{name}/predictions/a4.csv" for name in ("test", "test-common"))
    before, after = (list(csv.DictReader(path.open())) for path in (own, common))
    for one, other in zip(before, after, strict=True):
        late = float(one["p_Middle"]) + float(one["p_Late"])
        assert float(other["p_Late"]) == pytest.approx(late, abs=1e-6)
        assert other["phase_name"] == ("Late" if late > float(one["p_Early"]) else "Early")
    truth = json.loads((place / "runs/on-second/evaluate/test-common/truth.json").read_text())
    values = {value for video in truth["videos"].values() for _, value in video["phase"]}
    assert values == {-1, 0, 1}
    assert truth["dataset"]["phases"] == ["Early", "Late"]
    assert truth["dataset"]["name"] == "second"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("phases: [Early, Late]", "phase 'Middle' of first is none of the common phases"),
        ("phases: [Early, Late]\ndatasets: {first: {Midle: Late}}", "datasets.first: 'Midle' is not one of Early, "),
        ("phases: [Early, Late]\ndatasets: {first: {Middle: Lat}}", "first: 'Lat' is not one of phases; did you mean"),
        ("phases: [Early, early]", "two names cannot be told apart"),
        ("phases: [A, B]\ndatasets: {first: {Early: null, Middle: null, Late: null}}", "leaves out every phase"),
        ("[1", "not a YAML file"),
    ],
)
def test_a_mapping_that_does_not_fit_is_one_line(place: Path, tmp_path: Path, mapping: str, message: str) -> None:
    (tmp_path / "m.yaml").write_text(mapping)
    words = ["evaluate", "--config", "own.yaml", "--name", "on-first", "--features", "first"]
    done = run([*words, "--mapping", str(tmp_path / "m.yaml")], place)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_operations_of_the_training_are_not_tested_in_another_data_set(tmp_path: Path) -> None:
    phases = ("Early", "Middle", "Late")
    make_data_set(tmp_path / "one", "cholec80", [f"video{k:02d}" for k in (1, 2, 4, 5, 6, 8)], phases, 1)
    make_data_set(tmp_path / "two", "cholect50", [f"VID{k:02d}" for k in (92, 96, 103, 1, 110, 111)], phases, 2)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"temporal": small(), "device": "cpu"}))
    words = ["--config", "own.yaml", "--name", "net"]
    succeed(["train-temporal", *words, "--features", "one"], tmp_path)
    record = json.loads((tmp_path / "runs/net/temporal/trained_on.json").read_text())
    assert [(one["dataset"], list(one["videos"])) for one in record["data"]] == [
        ("cholec80", ["video01", "video02", "video04"])
    ]
    other = ["evaluate", *words, "--features", "two", "--index", "two/index.json"]
    done = run(other, tmp_path)
    assert done.returncode == 2
    assert "trained on video01 of cholec80, which is the same operation as VID01 of cholect50;" in done.stderr
    assert not (tmp_path / "runs/net/evaluate").exists()
    allowed = succeed([*other, "--set", "data.allow_overlap=true"], tmp_path)
    assert "results on cholect50 are too good" in allowed
    done = run(["compare", "--matrix", "net"], tmp_path)
    assert done.returncode == 2
    shown = succeed(["compare", "--matrix", "net", "--set", "data.allow_overlap=true", "--json", "m.json"], tmp_path)
    assert "*: trained on some of the test videos" in " ".join(shown.split())
    assert json.loads((tmp_path / "m.json").read_text())["rows"][0]["cells"]["cholect50"]["overlap"] is True


def test_features_with_another_split_are_another_index(tmp_path: Path) -> None:
    """They are refused with the training's videos, and otherwise leave the results of the run's own test alone."""
    ids = [f"a{k}" for k in range(1, 7)]
    make_data_set(tmp_path / "one", "first", ids, ("Early", "Middle", "Late"), 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"temporal": small(), "device": "cpu"}))
    words = ["--config", "own.yaml", "--name", "net"]
    succeed(["train-temporal", *words, "--features", "one"], tmp_path)
    succeed(["evaluate", *words, "--features", "one"], tmp_path)
    kept = {path: path.read_bytes() for path in (tmp_path / "runs/net").rglob("*") if path.is_file()}
    index = Index.load(tmp_path / "two/index.json")
    for splits, code in ((["test", "test", "train", "train", "val", "none"], 2), (["none"] * 3 + ["test"] * 3, 0)):
        entries = (one.model_copy(update={"split": part}) for one, part in zip(index.videos, splits, strict=True))
        index.model_copy(update={"videos": tuple(entries)}).save(tmp_path / "two/index.json")
        done = run(["evaluate", *words, "--features", "two"], tmp_path)
        assert done.returncode == code, done.stderr
        assert ("trained on a1 of first" if code else "two: other videos or splits than in the training") in done.stderr
        assert {path: path.read_bytes() for path in kept} == kept
    assert sorted(path.name for path in (tmp_path / "runs/net/evaluate").iterdir()) == ["test", "two-test"]
    truth = json.loads((tmp_path / "runs/net/evaluate/test/truth.json").read_text())
    truth["videos"]["a1"] = truth["videos"].pop("a4")  # as an evaluation of an earlier version may have written it
    (tmp_path / "runs/net/evaluate/test/truth.json").write_text(json.dumps(truth))
    shutil.rmtree(tmp_path / "runs/net/evaluate/two-test")
    done = run(["compare", "--matrix", "net"], tmp_path)
    assert done.returncode == 2
    assert "trained on a1 of first; test on other videos" in done.stderr
