"""Ablations: every setting with every seed, once; what is finished stays finished, whatever was killed."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from configs.ablation import FEATURE_KEYS
from configs.errors import UserError
from configs.load import load_ablation, load_config
from engine.files import exclusive_lock
from engine.pool import work_through
from engine.stopping import Stopped, StopRequest
from evaluation.reports.ablation import Trial, ablation_page, ablation_rows, write_ablation_csv
from features.dataset.index import Index
from features.store_folder import load_feature_set
from stage2_temporal.ablation import run as ablate_module
from stage2_temporal.ablation.run import GpuTurn, ablate, read_ablation
from stage2_temporal.predict import load_temporal, predict_phases
from tests.faults import is_alive
from tests.onednn import cpu_with_bf16
from tests.stage2_temporal.toy import cue_video, small, write_folder

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Features of five short videos, base settings, and a place to run in."""
    rng = np.random.default_rng(0)
    videos = {f"v{i}": cue_video(rng, "train" if i < 3 else "val", 40 + 5 * i) for i in range(5)}
    write_folder(tmp_path / "features", videos)
    base = {"runs": str(tmp_path / "runs"), "temporal": {**small(epochs=3), "baseline": False}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    return tmp_path


def write_ablation(world: Path, **content: Any) -> Path:
    path = world / "wide.yaml"
    path.write_text(yaml.safe_dump({"base": str(world / "base.yaml"), "seeds": [0, 1], **content}))
    return path


def run(world: Path, file: Path, stop: StopRequest | None = None, workers: int = 1) -> list[tuple[str, str]]:
    spec = read_ablation(str(file))
    folder = world / "runs" / file.stem
    return ablate(
        spec, folder, (), world / "features", world, workers=workers, stop=StopRequest() if stop is None else stop
    )


def table(world: Path, name: str = "wide") -> list[dict[str, str]]:
    with (world / "runs" / name / "ablation.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def trained(world: Path, name: str = "wide") -> dict[str, int]:
    """The time at which each training ended."""
    found = (world / "runs" / name / "trials").glob("*/temporal/result.json")
    return {path.parent.parent.name: path.stat().st_mtime_ns for path in found}


def test_a_grid_is_every_combination_with_every_seed(world: Path) -> None:
    space = {"temporal.head.hidden": [6, 12], "temporal.optim.lr": [0.02, 0.002]}
    assert run(world, write_ablation(world, space=space)) == []
    rows = table(world)
    tried = {(row["temporal.head.hidden"], row["temporal.optim.lr"], row["seed"]) for row in rows}
    assert tried == {(h, lr, s) for h in ("6", "12") for lr in ("0.02", "0.002") for s in ("0", "1")}
    assert len(rows) == 8  # the base (12, 0.02) is one of them and not trained twice
    assert sum(int(row["base"]) for row in rows) == 2
    best = load_config(world / "runs/wide/best.yaml")
    means = {row["setting"]: [] for row in rows}
    for row in rows:
        means[row["setting"]].append(float(row["val_accuracy"]))
    winner = max(means, key=lambda setting: np.mean(means[setting]))
    assert f"hidden={best.temporal.head.hidden}, lr={best.temporal.optim.lr}" == winner
    for row in rows:
        folder = world / "runs/wide/trials" / row["folder"] / "temporal"
        assert {"metrics.jsonl", "best.pt", "events"} <= {path.name for path in folder.iterdir()}
        assert json.loads((folder / "result.json").read_text())["val_accuracy"] == float(row["val_accuracy"])
    page = (world / "runs/wide/ablation.html").read_text()
    assert "hidden=6, lr=0.02" in page
    assert "Plotly.newPlot" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)


def test_the_table_is_the_only_progress(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Bars of several trainings at once would overwrite each other, and the table."""
    run(world, write_ablation(world, space={"temporal.head.hidden": [6, 12]}))
    said = capfd.readouterr().err
    assert "epoch/s" not in said
    assert (said.count("(1 training done)"), said.count("trainings done)")) == (1, 3)


def test_the_same_ablation_again_trains_nothing(world: Path) -> None:
    file = write_ablation(world, space={"temporal.head.hidden": [6, 12]})
    run(world, file)
    before, rows = trained(world), table(world)
    run(world, file)
    assert trained(world) == before
    assert table(world) == rows


def test_more_budget_resumes_and_another_ablation_is_refused(world: Path) -> None:
    run(world, write_ablation(world, space={"temporal.head.hidden": [6, 12, 24]}, budget={"trials": 4}))
    assert len(table(world)) == 4
    before = trained(world)
    run(world, write_ablation(world, space={"temporal.head.hidden": [6, 12, 24]}))
    after = trained(world)
    assert len(after) == 6
    assert all(after[name] == moment for name, moment in before.items())
    with pytest.raises(UserError, match="this run exists with other settings"):
        run(world, write_ablation(world, space={"temporal.head.hidden": [6, 48]}))


def test_ranges_are_drawn_as_far_as_the_budget_goes(world: Path) -> None:
    space = {
        "temporal.optim.lr": {"low": 0.001, "high": 0.05, "log": True},
        "temporal.head.hidden": {"low": 4, "high": 9},
    }
    run(world, write_ablation(world, space=space, seeds=[0], budget={"trials": 4}))
    rows = table(world)
    drawn = [row for row in rows if row["setting"] != "base"]
    assert (len(drawn), len(rows)) == (3, 4)  # the base is one of the four
    assert all(0.001 <= float(row["temporal.optim.lr"]) <= 0.05 for row in drawn)
    assert all(row["temporal.head.hidden"] in "456789" for row in drawn)
    run(world, write_ablation(world, space=space, seeds=[0], budget={"trials": 7}))
    rates = [row["temporal.optim.lr"] for row in table(world) if row["setting"] != "base"]
    assert len(set(rates)) == 6  # a second start draws others


def test_a_setting_that_does_not_work_is_named_and_the_others_go_on(world: Path) -> None:
    settings = {
        "both ways": {"temporal.head.bidirectional": True, "temporal.sequence.mode": "chunked"},
        "wide": {"temporal.head.hidden": 24},
    }
    failed = run(world, write_ablation(world, settings=settings))
    assert {label for label, _ in failed} == {"both ways, seed 0", "both ways, seed 1"}
    assert "bidirectional" in failed[0][1]
    assert {row["setting"] for row in table(world)} == {"base", "wide"}
    before = trained(world)
    again = run(world, write_ablation(world, settings=settings))
    assert [label for label, _ in again] == [label for label, _ in failed]  # reported again
    assert trained(world) == before


def test_what_failed_for_a_passing_reason_is_done_the_next_time(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_ablation(world, space={"temporal.head.hidden": [6, 12]})
    original = ablate_module.train_temporal

    def fail_for_six(config: Any, *arguments: Any, **named: Any) -> Any:
        if config.temporal.head.hidden == 6 and config.seed == 1:
            raise UserError("no room left on the disk")
        return original(config, *arguments, **named)

    monkeypatch.setattr(ablate_module, "train_temporal", fail_for_six)
    assert run(world, file) == [("hidden=6, seed 1", "no room left on the disk")]
    assert load_config(world / "runs/wide/best.yaml").temporal.head.hidden == 12  # a single good seed must not win
    monkeypatch.setattr(ablate_module, "train_temporal", original)
    assert run(world, file) == []
    assert len(table(world)) == 4


def test_a_precision_that_is_not_computed_here_is_refused_before_any_training(world: Path) -> None:
    file = write_ablation(world, space={"temporal.precision": ["fp32", "bf16"]})
    with cpu_with_bf16(False), pytest.raises(UserError, match=r"^temporal\.precision=bf16: this CPU"):
        run(world, file)
    assert not (world / "runs").exists()


def test_one_process_at_a_time_conducts(world: Path) -> None:
    file = write_ablation(world, space={"temporal.head.hidden": [6]})
    with exclusive_lock(world / "runs" / "wide", "ablation"), pytest.raises(UserError, match="another process works"):
        run(world, file)
    run(world, file)
    assert not (world / "runs" / "wide" / "in-work").exists()


LR = {"temporal.optim.lr": {"low": 0.001, "high": 0.05, "log": True}}


def test_what_earlier_starts_drew_is_read_from_the_folders(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """There is no other record; a journal that an earlier version left is neither read nor touched."""
    file = write_ablation(world, space=LR, seeds=[0], budget={"trials": 3})
    run(world, file)
    before, rows = trained(world), table(world)
    assert len(rows) == 3
    journal = world / "runs/wide/study.journal"
    assert not journal.exists()
    journal.symlink_to("nowhere")
    run(world, file)
    assert (trained(world), table(world)) == (before, rows)
    journal.unlink()
    journal.write_bytes(b"SQLite format 3\0")
    assert run(world, write_ablation(world, space=LR, seeds=[0], budget={"trials": 5})) == []
    assert journal.read_bytes() == b"SQLite format 3\0"
    after = trained(world)
    assert len(after) == len(table(world)) == 5
    assert all(after[name] == moment for name, moment in before.items())
    assert len({row["temporal.optim.lr"] for row in table(world)}) == 5  # what is drawn next is new
    assert "note: " not in capfd.readouterr().err


def test_drawn_integers_are_known_again_and_each_is_trained_once(world: Path) -> None:
    """Also where the setting is a float, and where the budget is larger than the range."""
    space = {"temporal.optim.weight_decay": {"low": 0, "high": 1}}
    file = write_ablation(world, space=space, seeds=[0], budget={"trials": 20})
    run(world, file)
    before, rows = trained(world), table(world)
    assert {row["temporal.optim.weight_decay"] for row in rows} == {"", "0", "1"}
    run(world, file)
    assert (trained(world), table(world)) == (before, rows)


def test_an_interrupted_training_of_a_drawn_setting_goes_on(world: Path) -> None:
    space = {**LR, "temporal.head.hidden": [6, 12]}
    file = write_ablation(world, space=space, budget={"trials": 6}, settings={"slow": {"temporal.epochs": 4}})
    run(world, file)
    rows, before = table(world), trained(world)
    unfinished = next(row["folder"] for row in rows if row["setting"] != "base" and row["seed"] == "1")
    result = world / "runs/wide/trials" / unfinished / "temporal/result.json"
    then = json.loads(result.read_text())
    result.unlink()
    assert run(world, file) == []
    assert json.loads(result.read_text())["val_accuracy"] == then["val_accuracy"]
    assert {row["folder"] for row in table(world)} == {row["folder"] for row in rows}
    assert sum(trained(world)[name] != moment for name, moment in before.items()) == 1


@pytest.mark.parametrize("name", ["config.yaml", "result.json"])
def test_a_damaged_file_of_a_training_is_named(world: Path, name: str) -> None:
    file = write_ablation(world, space=LR, seeds=[0], budget={"trials": 2})
    run(world, file)
    (folder,) = (row["folder"] for row in table(world) if row["setting"] != "base")
    damaged = world / "runs/wide/trials" / folder / "temporal" / name
    damaged.write_bytes(b"{\0" if name == "config.yaml" else b"{}")
    with pytest.raises(UserError, match=rf"{name}: .*; delete .*/trials/{folder} to train it again"):
        run(world, file)


def test_a_stray_folder_among_the_trainings_is_named(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_ablation(world, space={"temporal.head.hidden": [6]}, seeds=[0])
    run(world, file)
    rows = table(world)
    shutil.copytree(world / "runs/wide/trials/base-seed0", world / "runs/wide/trials/backup-seed0")
    capfd.readouterr()
    run(world, file)
    assert table(world) == rows
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    assert "trials/backup-seed0: not a training of this ablation" in line


def test_stopped_between_trainings_it_resumes(world: Path) -> None:
    class StopAfterTwo(StopRequest):
        def raise_if_set(self) -> None:
            if len(trained(world)) >= 2:
                self.number = int(signal.SIGTERM)
            super().raise_if_set()

    file = write_ablation(world, space={"temporal.head.hidden": [6, 12, 24]})
    with pytest.raises(Stopped):
        run(world, file, StopAfterTwo())
    before = trained(world)
    assert 2 <= len(before) < 6
    run(world, file)
    assert len(table(world)) == 6
    assert all(trained(world)[name] == moment for name, moment in before.items())


def below(pid: int) -> list[int]:
    """Processes that a process started, and theirs (Linux)."""
    found = [pid]
    for member in found:
        tasks = Path(f"/proc/{member}/task")
        found += [int(child) for task in tasks.glob("*/children") for child in task.read_text().split()]
    return found[1:]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again_it_finishes_without_repeating(world: Path, number: int) -> None:
    file = write_ablation(world, space={"temporal.head.hidden": [6, 12, 24]}, seeds=[0, 1, 2])
    order = [sys.executable, str(PROJECT / "pipeline.py"), "ablate", str(file), "--workers", "2"]
    order += ["--features", "features", "--set", "temporal.epochs=12"]
    process = subprocess.Popen(order, cwd=world, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 280
    while len(trained(world)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = below(process.pid)
    process.send_signal(number)
    process.wait(timeout=280)
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))  # no process continues a training that a second start will run
    process.communicate()
    assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    before = trained(world)
    assert 2 <= len(before) < 9
    done = subprocess.run(order, cwd=world, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    after = trained(world)
    assert len(after) == 9
    assert all(after[name] == moment for name, moment in before.items())
    assert "against" in done.stdout


def test_differences_are_paired_by_seed() -> None:
    def trial(label: str, seed: int, score: float) -> Trial:
        result = {"val_accuracy": score, "best_epoch": 0, "seconds": 1.0}
        return Trial(label, {}, seed, label == "base", result, "x")

    scores = {"base": (0.5, 0.7), "<b>wide</b>": (0.6, 0.75)}
    trials = [trial(label, seed, score) for label, values in scores.items() for seed, score in enumerate(values)]
    wide, base = ablation_rows(trials)
    assert (wide.label, round(wide.mean, 6), round(wide.difference or 0, 6)) == ("<b>wide</b>", 67.5, 7.5)
    assert wide.difference_std == pytest.approx(np.std([10.0, 5.0], ddof=1))
    assert (base.difference, base.std) == (None, pytest.approx(np.std([50.0, 70.0], ddof=1)))
    page = ablation_page("<i>t</i>", trials, "score", [])
    assert "<b>wide" not in page
    assert "<i>t" not in page


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "nothing to try"),
        ({"space": {"temporal.head.hidden": []}}, "a list is empty"),
        ({"space": {"temporal.optim.lr": {"low": 1, "high": 0}}}, "must be below"),
        ({"space": {"temporal.optim.lr": {"low": 0.1, "high": 1}}}, "ranges need a limit"),
        ({"space": {"temporal.head.hidden": [1]}, "seeds": [1, 1]}, "seeds repeat"),
        ({"space": {"cnn.epochs": [1, 2]}}, "only settings of stage two"),
        ({"space": {"temporal.decoding.mode": ["none"]}}, "decodings of one run with evaluate --decoding"),
        ({"settings": {"a": {"temporal.decoding.tool_smoothing_s": 3}}}, "scored without decoding"),
        ({"space": {"temporal.head.hidden": [8, 8]}}, "two trials are identical"),
        ({"settings": {"a": {"temporal.epochs": 1}, "b": {"temporal.epochs": 1}}}, "two trials are identical"),
        ({"space": {"temporal.head.hidden": [8]}, "seeds": [-1]}, "greater than or equal to 0"),
        ({"space": {"temporal.head.hidden": [8]}, "seeds": [2**40]}, "less than 4294967296"),
        ({"space": {"temporal.optim.lr": [float("nan")]}}, "finite"),
        ({"space": {"temporal.optim.lr": {"low": 0.1, "high": float("inf")}}}, "finite"),
        ({"space": {"temporal.head.hidden": [1]}, "sedes": [1]}, "did you mean seeds"),
        ({"settings": {"a": {"features": "x", "features_of_run": "y"}}}, "given twice"),
        ({"space": {"features": ["x", "y"]}, "settings": {"a": {"features_of_run": "y"}}}, "given twice"),
        ({"space": {"features": ["x", 3]}}, "expected a name, got 3"),
        ({"space": {"features": {"low": 1, "high": 2}}, "budget": {"trials": 2}}, "expected a name"),
    ],
)
def test_what_is_no_ablation_is_refused(world: Path, content: dict[str, Any], match: str) -> None:
    file = world / "bad.yaml"
    file.write_text(yaml.safe_dump({"base": "cholec80", **content}))
    with pytest.raises(UserError, match=match):
        load_ablation(file)


def test_trials_trained_with_other_settings_than_their_name_says_are_refused(world: Path) -> None:
    """For example trials for which the head's name was applied after its other settings."""
    file = write_ablation(world, space={"temporal.head.hidden": [6, 12]}, seeds=[0])
    run(world, file)
    row = next(row for row in table(world) if row["temporal.head.hidden"] == "6")
    settings = world / "runs/wide/trials" / row["folder"] / "temporal/config.yaml"
    settings.write_text(settings.read_text().replace("hidden: 6", "hidden: 512"))
    with pytest.raises(UserError, match=r"head\.hidden: 512 there, 6 now.*another --name"):
        run(world, file)


def test_an_unknown_key_in_the_space_is_refused_before_any_training(world: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key temporal\.head\.hiden; did you mean temporal\.head\.hidden"):
        run(world, write_ablation(world, space={"temporal.head.hiden": [6, 12]}))


def test_the_head_s_name_and_its_settings_are_trained_as_the_table_says(world: Path) -> None:
    space = {"temporal.head.hidden": [6, 8], "temporal.head.name": ["lstm", "gru"]}
    assert run(world, write_ablation(world, space=space, seeds=[0])) == []
    rows = table(world)
    for row in rows:
        config = yaml.safe_load((world / "runs/wide/trials" / row["folder"] / "temporal/config.yaml").read_text())
        for key in space:
            if row[key]:  # the base names none
                assert row[key] == str(config["temporal"]["head"][key.rpartition(".")[2]])
    assert len({row["folder"] for row in rows}) == 5


@pytest.mark.parametrize(
    ("content", "overrides", "expected"),
    [
        ({"space": {"temporal.head.hidden": [6, 7]}}, ["temporal.head.hidden=7"], "given both as 6 and as 7"),
        ({"space": {"temporal.head.hidden": [6, 7]}}, ["temporal.head.name=tcn"], "tcn has stages, layers"),
        ({"settings": {"a": {"temporal.epochs": 2}}}, ["temporal={epochs: 3}"], "given both as 2 and as 3"),
        ({"space": {"temporal.epochs": [2]}}, ["seed=5"], "seed: given both as 0 and as 5"),
        (
            {"space": {"temporal.optim.lr": ["1e-3", 0.001]}},
            [],
            "optim.lr='1e-3' and temporal.optim.lr=0.001 are",
        ),
        ({"space": {"temporal.epochs": [2, "2"]}}, [], "are the same training"),
        ({"space": {"temporal.optim.momentum": [0.5, 0.9]}}, [], "momentum has no effect with name=adamw"),
        (
            {"space": {"temporal.schedule.gamma": [0.5], "temporal.schedule.name": ["step", "cosine"]}},
            [],
            "gamma has no effect with name=cosine",
        ),
        ({"settings": {"a": {"temporal.sequence.stride": 2}}}, [], "stride has no effect with mode="),
        ({"space": {"temporal.epochs": [2, 2.0]}}, [], "two trials are identical"),
        ({"settings": {"a": {"temporal.epochs": 2}, "b": {"temporal.epochs": 2.0}}}, [], "two trials are identical"),
        ({"settings": {"a": {"temporal.epochs": 2}}, "space": {"temporal.epochs": [3]}}, [], "is also in space"),
        (
            {"space": {"temporal.head.dropout": {"low": 0.1, "high": 1.5}}, "budget": {"trials": 4}},
            [],
            "temporal.head.dropout: Input should be less than 1, got 1.5",
        ),
    ],
)
def test_a_table_that_would_name_what_was_not_trained_is_refused(
    world: Path, content: dict[str, Any], overrides: list[str], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        spec = read_ablation(str(write_ablation(world, **content)))
        ablate(spec, world / "runs/wide", overrides, world / "features", world, workers=1, stop=StopRequest())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (world / "runs").exists()


ABLATIONS = sorted(path.stem for path in (PROJECT / "configs/ablations").glob("*.yaml") if path.stem != "encoders")


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_shipped_ablation_is_one(name: str) -> None:
    spec = load_ablation(name)
    for changes in [
        *spec.settings.values(),
        {key: values[0] for key, values in spec.space.items() if isinstance(values, list)},
    ]:
        settings = {key: value for key, value in changes.items() if key not in FEATURE_KEYS}
        load_config(spec.base, changes=settings)


# ---------------------------------------------------------------------------------------------- other features


@pytest.fixture
def rates(world: Path) -> Path:
    """`features` beside `fast`, the same videos at three times the rate; the frames between have random features."""
    rng = np.random.default_rng(1)
    index = Index.load(world / "features/index.json")
    slow = load_feature_set(world / "features", [entry.id for entry in index.videos])
    videos = {}
    for entry in index.videos:
        video = slow[entry.id]
        features = rng.normal(0, 0.3, (3 * len(video), 6)).astype(np.float32)
        features[::3] = video.features
        videos[entry.id] = (entry.split, features, video.phase.repeat(3))
    write_folder(world / "fast", videos, weights=dict.fromkeys(videos, "1" * 64), frame_step=25 / 3)
    return world


def test_settings_with_other_features_are_scored_at_the_moments_that_all_have(rates: Path) -> None:
    settings = {"slow": {"features": str(rates / "features")}, "fast": {"features": str(rates / "fast")}}
    assert run(rates, write_ablation(rates, settings=settings)) == []
    rows = {(row["setting"], row["seed"]): row for row in table(rates)}
    assert set(rows) == {(name, seed) for name in ("slow", "fast") for seed in "01"}  # slow is the base
    assert {key for key, row in rows.items() if row["base"] == "1"} == {("slow", "0"), ("slow", "1")}
    assert len({row["folder"] for row in rows.values()}) == 4
    folder = rates / "runs/wide/trials" / rows["fast", "0"]["folder"] / "temporal"
    model, about = load_temporal(folder)
    index = Index.load(rates / "fast/index.json")
    videos = load_feature_set(rates / "fast", [entry.id for entry in index.by_split("val")])
    predicted = predict_phases(model, videos, "carried", about.frames, "cpu")
    right = [(predicted[name].argmax(1) == video.phase)[::3].mean() for name, video in videos.items()]
    assert float(rows["fast", "0"]["val_accuracy"]) == pytest.approx(np.mean(right), abs=1e-9)
    before = trained(rates)
    assert run(rates, write_ablation(rates, settings=settings)) == []
    assert trained(rates) == before
    best = (rates / "runs/wide/best.yaml").read_text()
    assert "# Its features: train-temporal --features" in best


@pytest.mark.slow
def test_a_setting_can_take_another_runs_features(rates: Path) -> None:
    settings = {"fast": {"features_of_run": "fast"}}
    with pytest.raises(UserError, match=r"runs/fast: no features of this run; make them with `extract --name fast`"):
        run(rates, write_ablation(rates, settings=settings))
    (rates / "runs/fast/extract").mkdir(parents=True)
    (rates / "runs/fast/extract/result.json").write_text(json.dumps({"folder": str(rates / "fast")}))
    assert run(rates, write_ablation(rates, settings=settings), workers=2) == []
    assert {row["setting"] for row in table(rates)} == {"base", "fast"}


def test_features_that_cannot_be_compared_are_refused(rates: Path) -> None:
    rng = np.random.default_rng(2)
    videos = {f"v{i}": cue_video(rng, "train" if i < 4 else "val", 30) for i in range(5)}
    settings = {"other": {"features": str(write_folder(rates / "other", videos))}}
    with pytest.raises(UserError, match=r"other: its training videos differ from those of .*features \(v3\)"):
        run(rates, write_ablation(rates, settings=settings))
    videos["v3"] = ("val", *videos["v3"][1:])
    settings = {"other": {"features": str(write_folder(rates / "relabelled", videos))}}
    with pytest.raises(UserError, match="relabelled: v0 has another phase at frame"):
        run(rates, write_ablation(rates, settings=settings))
    settings = {"other": {"features": str(rates / "nowhere")}}
    with pytest.raises(UserError, match="nowhere: no such feature folder"):
        run(rates, write_ablation(rates, settings=settings))


@pytest.mark.slow
def test_tool_logits_are_more_input(tmp_path: Path) -> None:
    """Features are noise and logits show the phase, so only a model that reads the logits learns."""
    rng = np.random.default_rng(0)
    videos, logits = {}, {}
    for i in range(5):
        phase = np.sort(rng.integers(0, 3, 40)).astype(np.int8)
        videos[f"v{i}"] = ("train" if i < 3 else "val", rng.normal(0, 1, (40, 6)).astype(np.float32), phase)
        logits[f"v{i}"] = np.eye(3, dtype=np.float32)[phase] * 8 - 4
    write_folder(tmp_path / "features", videos, tool_logits=logits)
    head = {"name": "linear"}
    base = {"runs": str(tmp_path / "runs"), "temporal": {**small(epochs=60, head=head), "baseline": False}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    file = write_ablation(tmp_path, space={"temporal.tool_logits": [False, True]}, seeds=[0])
    assert run(tmp_path, file) == []
    rows = {row["setting"]: row for row in table(tmp_path)}
    accuracy = float(rows["tool_logits=True"]["val_accuracy"])
    assert accuracy > 0.9
    assert float(rows["tool_logits=False"]["val_accuracy"]) < 0.8
    model, about = load_temporal(tmp_path / "runs/wide/trials" / rows["tool_logits=True"]["folder"] / "temporal")
    assert (about.embedding_dim, about.tool_inputs) == (6, ("t0", "t1", "t2"))
    features = load_feature_set(tmp_path / "features", ["v3", "v4"])
    found = predict_phases(model, features, "carried", 1, "cpu", tool_logits=True)
    right = [(found[name].argmax(1) == video.phase).mean() for name, video in features.items()]
    assert np.mean(right) == pytest.approx(accuracy, abs=1e-9)
    with pytest.raises(UserError, match="features have width 6, the model was trained on 9"):
        predict_phases(model, features, "carried", 1, "cpu")


def test_an_encoder_without_tools_has_no_logits_to_read(world: Path) -> None:
    with pytest.raises(UserError, match=r"features: no tool logits, since its encoder has no trained tool head"):
        run(world, write_ablation(world, space={"temporal.tool_logits": [False, True]}))
    assert trained(world) == {}


def test_nothing_in_the_csv_is_a_formula_to_a_spreadsheet(tmp_path: Path) -> None:
    """Labels and values can be any text in an ablation's file; negative numbers remain numbers."""
    keys = ("val_accuracy", "best_epoch", "epochs", "parameters", "seconds", "frames_per_s")
    changes = {"temporal.head.name": "=cmd|' /C calc'!A0", "x": -1.5, "y": "a,b"}
    trial = Trial("@SUM(A1)", changes, 0, False, dict.fromkeys(keys, -0.5), "+1+1")
    write_ablation_csv(tmp_path / "a.csv", [trial])
    with (tmp_path / "a.csv").open(newline="") as stream:
        _, row = csv.reader(stream)
    assert row[:4] == ["'@SUM(A1)", "'=cmd|' /C calc'!A0", "-1.5", "a,b"]
    assert row[-2:] == ["-0.5", "'+1+1"]


# ---------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3,GPU-7a", 2, ["3", "GPU-7a"]), ("2", 1, ["2"]), ("0, 1,-1,5", 2, ["0", "1"])],
)
def test_trainings_share_the_gpus_in_sight(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(ablate_module, "available_cores", lambda: 64)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ablate_module.gpus_in_sight("auto") == expected
    assert ablate_module.trainings_at_once("auto") == 4 * count
    assert ablate_module.gpus_in_sight("cpu") == []
    assert ablate_module.trainings_at_once("cpu") == 64
    monkeypatch.setattr(ablate_module, "available_cores", lambda: 3)
    assert ablate_module.trainings_at_once("auto") == 3


@dataclass(frozen=True)
class Shown:
    """A job that leaves the name of the GPU of its process behind, and waits until all processes have done so."""

    folder: Path
    processes: int
    frames: int = 1


@dataclass
class ShowGpu:
    turn: GpuTurn

    def __call__(self, job: Shown, advance: Any) -> None:
        for _ in range(2):  # a process keeps its own
            self.turn.take()
        (job.folder / f"{os.getpid()}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        while len(list(job.folder.iterdir())) < job.processes:
            advance(0)
            time.sleep(0.02)


@pytest.mark.slow
def test_every_process_has_one_gpu_and_every_gpu_as_many_processes(tmp_path: Path) -> None:
    task, jobs = ShowGpu(GpuTurn(["0", "GPU-7a"])), [Shown(tmp_path, 4) for _ in range(4)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert [reason for _, reason in work_through(task, jobs, 4, "jobs", StopRequest())] == [None] * 4
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["0", "0", "GPU-7a", "GPU-7a"]
    task.turn.take()  # in the process that starts the others
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
