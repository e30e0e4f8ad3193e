"""End to end through the real command line, on simulated operations: what a user types, sees and finds on the disk."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from configs.load import load_dataset
from engine.checkpoints import load_checkpoint
from engine.logs import read_metrics
from engine.safe_pickle import load_plain
from evaluation.metrics.conventions import CONVENTIONS
from features.store import read_features
from tests.browser import Visit
from tests.cli import PROJECT, run, run_fresh, succeed

SETTINGS = {
    "data": {"fps": 1.0, "index": "artifacts/index.json", "split": {"rule": "3/1/1"}},
    "preprocess": {"resize_px": 72, "crop_px": 64},
    "cnn": {
        "backbone": "mobilenet_v3_small",
        "weights": "random",
        "epochs": 2,
        "batch_frames": 16,
        "workers": 0,
        "optim": {"name": "adamw", "lr": 0.002},
        "backbone_lr_factor": 1.0,
    },
    "extract": {"precision": "fp32", "workers": 1},
    "temporal": {
        "head": {"name": "lstm", "hidden": 16},
        "sequence": {"mode": "chunked", "frames": 16, "batch": 2},
        "epochs": 4,
        "optim": {"lr": 0.01},
    },
}


def refuse(arguments: Sequence[str], folder: Path) -> str:
    """The one line that bad input ends in."""
    done = run(arguments, folder)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def no_temporaries(folder: Path) -> bool:
    return not list(folder.rglob("*.tmp*"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five simulated operations of about a minute each."""
    folder = tmp_path_factory.mktemp("simulated")
    options = ["--videos", "5", "--seed", "1", "--fps", "5", "--width", "96", "--height", "96", "--speed-up", "40"]
    succeed(["simulate", str(folder / "data"), *options], folder)
    return folder / "data"


def settings_file(folder: Path, videos: Path) -> None:
    tree = json.loads(json.dumps(SETTINGS))
    tree["data"]["root"] = str(videos)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """A folder in which `run` has finished once; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("finished")
    settings_file(folder, videos)
    done = run_fresh(["run", "--config", "tiny.yaml"], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def workplace(tmp_path: Path, finished: Path) -> Path:
    """A copy of the finished folder to change."""
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


def feature_folder(folder: Path) -> Path:
    (found,) = (folder / "artifacts" / "features").iterdir()
    return found


@pytest.mark.slow
def test_run_leaves_everything_that_the_contracts_name(finished: Path) -> None:
    summary = json.loads((finished / "runs/tiny/summary.json").read_text())
    for key in (
        "tool_map",
        "phase_accuracy_frame",
        "phase_accuracy_majority",
        "phase_accuracy_temporal",
        "phase_f1_temporal",
    ):
        assert 0.0 <= summary[key] <= 1.0, key
    assert set(summary["seconds"]) == {"index", "train-cnn", "extract", "train-temporal", "evaluate"}
    assert (summary["split"], summary["test_videos"], summary["dataset"]) == ("3/1/1", 1, "cholec80")
    run = finished / "runs/tiny"
    for stage in ("cnn", "temporal", "temporal/frame"):
        assert {"best.pt", "last.pt", "metrics.jsonl", "events"} <= {path.name for path in (run / stage).iterdir()}
    for stage in ("cnn", "temporal"):
        assert {"config.yaml", "environment.json", "identity.json", "result.json"} <= {
            path.name for path in (run / stage).iterdir()
        }
    test = run / "evaluate/test"
    assert (test / "ribbons.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((test / "metrics.json").read_text())
    assert set(metrics["phases"]) == {"temporal", "frame", "majority"}
    assert set(metrics["phases"]["temporal"]) == set(CONVENTIONS.names())
    assert set(metrics["phases"]["majority"]) == set(CONVENTIONS.names()) - {"calibration"}
    (video,) = metrics["videos"]
    rows = (test / "predictions" / f"{video}.csv").read_text().splitlines()
    assert rows[0].startswith("frame,time_s,phase,phase_name,p_Preparation")
    assert rows[0].endswith("p_SpecimenBag")
    features = read_features(feature_folder(finished) / f"{video}.h5")
    assert len(rows) == 1 + len(features)
    assert (feature_folder(finished) / "index.json").exists()
    card = (run / "MODEL_CARD.md").read_text()
    assert "Trained and tested on SIMULATED operations" in card
    assert f"| test | 1 videos: {video} |" in card
    assert no_temporaries(finished)


@pytest.mark.slow
def test_export_writes_the_original_text_files(workplace: Path) -> None:
    succeed(["export", "tiny", "--config", "tiny.yaml"], workplace)
    (phases,) = (workplace / "runs/tiny/export/test").glob("*-phase.txt")
    (tools,) = (workplace / "runs/tiny/export/test").glob("*-tool.txt")
    (rows,) = (workplace / "runs/tiny/evaluate/test/predictions").glob("*.csv")
    written = phases.read_text().splitlines()
    predicted = rows.read_text().splitlines()
    assert [line.split("\t")[1] for line in written[1:]] == [line.split(",")[3] for line in predicted[1:]]
    assert [line.split("\t")[0] for line in written[1:4]] == ["0", "25", "50"]
    assert len(tools.read_text().splitlines()) == len(written)
    assert "run `evaluate` first" in refuse(["export", "tiny", "--config", "tiny.yaml", "--split", "val"], workplace)


@pytest.mark.slow
def test_run_again_repeats_nothing(workplace: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if path.suffix in (".pt", ".h5", ".png")}
    output = succeed(["run", "--config", "tiny.yaml"], workplace)
    assert "unchanged" in output
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert before.keys() == {path for path in workplace.rglob("*") if path.suffix in (".pt", ".h5", ".png")}


@pytest.mark.slow
def test_run_records_the_seconds_of_the_stages_that_worked(workplace: Path, videos: Path) -> None:
    summary = workplace / "runs/tiny/summary.json"
    (video,) = json.loads((workplace / "runs/tiny/evaluate/test/metrics.json").read_text())["videos"]
    shutil.copytree(videos, workplace / "data")
    labels = workplace / "data/phase_annotations" / f"{video}-phase.txt"
    labels.write_text(labels.read_text().replace("Preparation", "GallbladderPackaging"))
    again = ["run", "--config", "tiny.yaml", "--set", "data.root=data"]
    succeed(["index", "--force", *again[1:]], workplace)

    def worked() -> set[str]:
        old = json.loads(summary.read_text())
        summary.write_text(json.dumps(old | {"seconds": dict.fromkeys(old["seconds"], -1.0)}))
        succeed(again, workplace)
        return {stage for stage, seconds in json.loads(summary.read_text())["seconds"].items() if seconds >= 0}

    assert worked() == {"index", "extract", "evaluate"}  # new labels of a test video
    assert worked() == {"index"}


@pytest.mark.slow
def test_the_same_name_with_other_settings_is_refused_and_another_name_is_another_folder(workplace: Path) -> None:
    other = ["train-temporal", "--config", "tiny.yaml", "--set", "temporal.head.hidden=8"]
    first = {path: path.read_bytes() for path in (workplace / "runs/tiny").rglob("*") if path.is_file()}
    assert "temporal.head.hidden: 16 there, 8 now" in refuse(other, workplace)
    succeed([*other, "--name", "hidden8"], workplace)
    assert (workplace / "runs/hidden8/temporal/best.pt").exists()
    assert first == {path: path.read_bytes() for path in first}


@pytest.mark.slow
def test_stage_two_needs_the_feature_folder_alone(workplace: Path, videos: Path, tmp_path: Path) -> None:
    """On another machine with only this folder: no video, no frame cache, no decoder, no torchvision."""
    elsewhere = tmp_path / "laptop"
    shutil.copytree(feature_folder(workplace), elsewhere / "features")
    settings_file(elsewhere, Path("nowhere"))
    blocked = elsewhere / "blocked"
    for module in ("torchvision", "decord", "av"):
        (blocked / module).mkdir(parents=True)
        (blocked / module / "__init__.py").write_text("raise ImportError('stage two must not need this')\n")
    arguments = ["--config", "tiny.yaml", "--features", "features"]
    for step in ("train-temporal", "evaluate"):
        done = run_fresh([step, *arguments], elsewhere, PYTHONPATH=str(blocked))
        assert done.returncode == 0, done.stderr
    here = json.loads((elsewhere / "runs/tiny/temporal/result.json").read_text())
    there = json.loads((workplace / "runs/tiny/temporal/result.json").read_text())
    assert here["val_accuracy"] == there["val_accuracy"]
    # alone it gives the same as after the other stages of `run`, which leave the process unchanged
    one, other = (load_checkpoint(place / "runs/tiny/temporal/last.pt")["model"] for place in (elsewhere, workplace))
    assert [name for name, value in one.items() if name.startswith("head") and not value.equal(other[name])] == []


@pytest.mark.slow
def test_only_the_file_with_the_flipped_byte_is_reported_and_extracted_again(workplace: Path) -> None:
    folder = feature_folder(workplace)
    path = folder / "video03.h5"
    whole, others = read_features(path), {p: p.stat().st_mtime_ns for p in folder.glob("*.h5") if p != path}
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    checked = run(["features", "verify", str(folder)], workplace)
    assert checked.returncode == 1
    assert "video03.h5: damaged" in checked.stderr
    assert "video02.h5: ok" in checked.stdout
    assert "video03.h5: damaged" in refuse(["train-temporal", "--config", "tiny.yaml", "--name", "x"], workplace)
    succeed(["extract", "--config", "tiny.yaml"], workplace)
    assert np.array_equal(read_features(path).features, whole.features)
    assert others == {p: p.stat().st_mtime_ns for p in others}
    assert run(["features", "verify", str(folder)], workplace).returncode == 0
    assert "mobilenet_v3_small" in succeed(["features", "info", str(folder)], workplace)


@pytest.mark.slow
def test_one_damaged_video_is_reported_and_the_others_are_extracted(workplace: Path, videos: Path) -> None:
    data = workplace / "data"
    shutil.copytree(videos, data)
    options = ["--config", "tiny.yaml", "--set", f"data.root={data}", "--set", "cache.use_for_extract=false"]
    shutil.rmtree(workplace / "artifacts/features")
    video = data / "videos/video02.mp4"
    content = bytearray(video.read_bytes())
    middle = content.index(b"mdat") + len(content) // 3
    content[middle : middle + 4000] = bytes(4000)
    video.write_bytes(content)
    done = run(["extract", *options], workplace)
    assert done.returncode == 1, done.stderr
    assert "failed: video02:" in done.stderr
    assert sorted(path.name for path in feature_folder(workplace).glob("*.h5")) == [
        f"video0{number}.h5" for number in (1, 3, 4, 5)
    ]
    assert no_temporaries(workplace)
    shutil.copy(videos / "videos/video02.mp4", video)
    succeed(["extract", *options], workplace)
    assert (feature_folder(workplace) / "video02.h5").exists()


@pytest.mark.slow
def test_edited_labels_are_rewritten_and_features_kept(workplace: Path, videos: Path) -> None:
    data = workplace / "data"
    shutil.copytree(videos, data)
    path = feature_folder(workplace) / "video01.h5"
    before = read_features(path)
    labels = data / "phase_annotations/video01-phase.txt"
    labels.write_text(labels.read_text().replace("ClippingCutting", "CalotTriangleDissection"))
    options = ["--config", "tiny.yaml", "--set", f"data.root={data}"]
    stale = run(["extract", *options], workplace)
    assert stale.returncode == 1
    assert "video01-phase.txt: has changed since it was indexed; run `index --force`" in stale.stderr
    succeed(["index", *options, "--force"], workplace)
    succeed(["extract", *options], workplace)
    after = read_features(path)
    assert np.array_equal(before.features, after.features)
    assert (before.phase == 2).any()
    assert not (after.phase == 2).any()


@pytest.mark.slow
def test_evaluate_on_another_index_extracts_what_is_missing(workplace: Path, videos: Path) -> None:
    options = ["--seed", "2", "--fps", "5", "--width", "96", "--height", "96", "--speed-up", "60", "--first", "11"]
    succeed(["simulate", "other", "--videos", "2", *options], workplace)
    data = ["--set", "data.root=other", "--set", "data.split.rule=0/0/2"]
    succeed(["index", "--config", "tiny.yaml", *data, "--out", "other.json"], workplace)
    output = succeed(["evaluate", "--config", "tiny.yaml", *data, "--index", "other.json"], workplace)
    metrics = json.loads((workplace / "runs/tiny/evaluate/other-test/metrics.json").read_text())
    assert metrics["videos"] == ["video11", "video12"]
    assert "metrics.json" in output
    summary = json.loads((workplace / "runs/tiny/summary.json").read_text())
    assert summary["test_videos"] == 1
    # the same videos, described with the phases in another order and without tools
    spec = load_dataset("simulated").model_dump(mode="json", exclude={"tools", "tool_aliases", "phase_orders"})
    (workplace / "clinic.yaml").write_text(yaml.safe_dump({**spec, "name": "clinic", "phases": spec["phases"][::-1]}))
    data += ["--set", "data.dataset=clinic.yaml"]
    succeed(["index", "--config", "tiny.yaml", *data, "--out", "clinic.json"], workplace)
    mapped = ["--index", "clinic.json", "--mapping", "cholecystectomy"]
    succeed(["evaluate", "--config", "tiny.yaml", *data, *mapped], workplace)
    again = json.loads((workplace / "runs/tiny/evaluate/clinic-test-cholecystectomy/metrics.json").read_text())
    assert again["phases"]["temporal"]["pooled"]["accuracy"] == metrics["phases"]["temporal"]["pooled"]["accuracy"]
    assert again["tools"] is None
    (found,) = (workplace / "runs/tiny/evaluate/clinic-test-cholecystectomy/features").glob("trained_on.json")
    assert list(json.loads(found.read_text())["data"][0]["videos"]) == ["video01", "video02", "video03", "video04"]


def kill_during(arguments: Sequence[str], folder: Path, ready: Path, number: int) -> int:
    """Start a command, wait for `ready` to appear, then send a signal; returns the exit code."""
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "pipeline.py"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 280
    while not list(ready.parent.glob(ready.name)) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=280)
    assert "Traceback" not in errors or number == signal.SIGKILL, errors
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_killed_and_resumed_training_equals_an_undisturbed_one(workplace: Path, number: int, code: int) -> None:
    arguments = ["train-temporal", "--config", "tiny.yaml", "--set", "temporal.epochs=60", "--name"]
    succeed([*arguments, "alone"], workplace)
    ready = workplace / "runs/killed/temporal/last.pt"
    assert kill_during([*arguments, "killed"], workplace, ready, number) == code
    assert not (workplace / "runs/killed/temporal/result.json").exists()
    succeed([*arguments, "killed"], workplace)
    alone, killed = (
        [
            {key: value for key, value in row.items() if key not in ("seconds", "frames_per_s")}
            for row in read_metrics(workplace / f"runs/{name}/temporal/metrics.jsonl")
        ]
        for name in ("alone", "killed")
    )
    assert alone == killed
    import torch

    weights = [
        torch.load(workplace / f"runs/{name}/temporal/last.pt", weights_only=True)["model"]
        for name in ("alone", "killed")
    ]
    tensors = [name for name, value in weights[0].items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_extract_killed_and_started_again_leaves_the_same_files(workplace: Path, number: int) -> None:
    folder = feature_folder(workplace)
    expected = {path.name: read_features(path) for path in folder.glob("*.h5")}
    shutil.rmtree(folder)
    kill_during(["extract", "--config", "tiny.yaml"], workplace, folder / ".*.tmp", number)
    left = {path.name for path in folder.glob("*.h5")}
    assert len(left) < len(expected)
    if number != signal.SIGKILL:
        assert no_temporaries(workplace)
    succeed(["extract", "--config", "tiny.yaml"], workplace)
    assert no_temporaries(workplace)  # a dead writer's file goes as soon as the folder is used again
    for name, video in expected.items():
        found = read_features(folder / name)
        assert np.array_equal(found.features, video.features)
        assert np.array_equal(found.tool_logits, video.tool_logits)


@pytest.mark.slow
def test_the_report_of_a_run_opens_in_chromium(workplace: Path, chromium: Any) -> None:
    output = succeed(["report", "runs/tiny"], workplace)
    assert "report: runs/tiny/report.html" in output
    assert "not available" not in output
    with Visit(chromium, workplace / "runs/tiny/report.html") as visit:
        visit.walk_through()
        assert visit.page.locator("h1").inner_text() == "tiny"
        assert visit.page.locator(".pictures img").count() > 0  # frames of the simulated videos
        assert visit.page.locator(".ribbon .main-svg").count() > 0
    assert visit.complaints == []
    assert visit.requests == []
    assert no_temporaries(workplace)


def test_help_is_complete_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from click.testing import CliRunner; import pipeline\n"
        "result = CliRunner().invoke(pipeline.cli, ['--help'])\n"
        "assert result.exit_code == 0 and 'train-temporal' in result.output, result.output\n"
        "heavy = {'torch', 'torchvision', 'timm', 'decord', 'av', 'numpy', 'h5py', 'pydantic', 'jinja2', 'plotly'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.strip() == "[]"


JOINT_STEP = {"epochs": 1, "optim": {"name": "adamw", "lr": 0.002}, "precision": "fp32"}
JOINT = {
    "net": {"tool_hidden": 8, "mapping": True},
    "sequence": {"mode": "clips", "frames": 4, "stride": 4, "batch": 4, "inference": "clip"},
    "multitask": JOINT_STEP,
    "mapping": JOINT_STEP,
    "correlation": JOINT_STEP,
    "workers": 0,
}


def joint_file(folder: Path, **changes: Any) -> None:
    tree = yaml.safe_load((folder / "tiny.yaml").read_text())
    (folder / "joint.yaml").write_text(yaml.safe_dump({**tree, "joint": {**JOINT, **changes}}))


@pytest.mark.slow
def test_the_joint_mode_from_two_stages_and_back(workplace: Path) -> None:
    joint_file(workplace)
    settings = ["--config", "joint.yaml"]
    start = ["--from-cnn", "tiny", "--from-temporal", "tiny"]
    output = succeed(["train-joint", *settings, "--name", "both", *start], workplace)
    assert "joint net: correlation: validation accuracy" in output
    assert "another encoder" not in output
    assert "nothing to do" in succeed(["train-joint", *settings, "--name", "both", *start], workplace)
    alone = succeed(["train-joint", *settings, "--name", "alone", "--from-temporal", "tiny"], workplace)
    assert "tiny/temporal/best.pt was trained on features of another encoder" in alone
    output = succeed(["evaluate", *settings, "--name", "both"], workplace)
    assert "tools mapped from the phase branch" in output
    assert (workplace / "runs/both/evaluate/test/ribbons.png").stat().st_size > 1000
    card = (workplace / "runs/both/MODEL_CARD.md").read_text()
    assert "# Model card: both" in card
    assert "not recorded" not in card
    assert "multitask:" in card
    summary = json.loads((workplace / "runs/both/summary.json").read_text())
    assert 0 < summary["tool_map"] <= 1
    assert 0 < summary["phase_accuracy_temporal"] <= 1
    succeed(["evaluate", *settings, "--name", "both", "--inference", "carried"], workplace)
    succeed(["evaluate", *settings, "--name", "both", "--mapping", "cholecystectomy"], workplace)
    scored = [
        json.loads((workplace / f"runs/both/evaluate/{name}/metrics.json").read_text())
        for name in ("test", "test-cholecystectomy")
    ]
    assert scored[0]["phases"]["temporal"] == scored[1]["phases"]["temporal"]
    assert scored[1]["tools"] is None
    assert [
        one["dataset"]
        for one in json.loads((workplace / "runs/both/joint/multitask/trained_on.json").read_text())["data"]
    ] == ["cholec80"]
    succeed(["evaluate", "--config", "tiny.yaml", "--name", "tiny", "--inference", "clip"], workplace)
    succeed(["extract", *settings, "--name", "again", "--from-joint", "both"], workplace)
    succeed(["train-temporal", *settings, "--name", "again", "--from-joint", "both"], workplace)
    succeed(["evaluate", *settings, "--name", "again"], workplace)
    assert no_temporaries(workplace)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["tool", "phase", "both"])
def test_every_task_from_scratch(workplace: Path, tasks: str) -> None:
    joint_file(workplace, net={"tasks": tasks}, mapping=None, correlation=None)
    succeed(["train-joint", "--config", "joint.yaml", "--name", tasks], workplace)
    succeed(["evaluate", "--config", "joint.yaml", "--name", tasks, "--set", "joint.crops=ten"], workplace)
    metrics = json.loads((workplace / f"runs/{tasks}/evaluate/test-ten/metrics.json").read_text())
    assert bool(metrics["phases"].get("temporal")) == (tasks != "tool")
    assert (metrics["tools"] is not None) == (tasks != "phase")
    succeed(["export", tasks, "--config", "joint.yaml", "--split", "test-ten"], workplace)
    written = {path.name.split("-")[1] for path in (workplace / f"runs/{tasks}/export/test-ten").iterdir()}
    assert written == {"tool": {"tool.txt"}, "phase": {"phase.txt"}, "both": {"phase.txt", "tool.txt"}}[tasks]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train-joint", "--config", "joint.yaml", "--name", "x", "--from-cnn", "nowhere"], "nowhere"),
        (["train-joint", "--config", "joint.yaml", "--name", "x", "--from-joint", "tiny"], "run train-joint"),
        (["evaluate", "--config", "joint.yaml", "--name", "nowhere", "--model", "joint"], "run train-joint"),
        (["extract", "--config", "joint.yaml", "--name", "x", "--from-joint", "tiny"], "run train-joint"),
        (["train-joint", "--config", "joint.yaml", "--name", "x", "--set", "joint.sequence.mode=full"], "mode=full"),
    ],
)
def test_joint_runs_that_are_not_there(workplace: Path, arguments: list[str], expected: str) -> None:
    joint_file(workplace)
    assert expected in refuse(arguments, workplace)
    assert not (workplace / "runs/x/joint").exists()


@pytest.mark.parametrize(
    "name",
    [
        "index",
        "train-cnn",
        "extract",
        "train-temporal",
        "train-joint",
        "evaluate",
        "predict",
        "export",
        "report",
        "compare",
        "ablate",
        "compare-encoders",
        "run",
        "simulate",
        "import-checkpoint",
        "export-checkpoint",
    ],
)
def test_every_command_has_help(name: str, tmp_path: Path) -> None:
    assert "Usage:" in succeed([name, "--help"], tmp_path)


@pytest.mark.parametrize("name", ["index", "train-cnn", "extract", "run"])
def test_without_a_data_root_one_line_says_how_to_set_it(name: str, tmp_path: Path) -> None:
    line = refuse([name], tmp_path)
    assert "--set data.root=DIR" in line
    assert "SURGSTAGE_DATA" in line
    assert os.listdir(tmp_path) == []


def test_without_features_one_line_says_what_to_do(tmp_path: Path) -> None:
    assert "run extract first" in refuse(["train-temporal"], tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["index", "--root", "nowhere"], "nowhere: no such folder"),
        (["index", "--root", "empty"], "empty"),
        (["config", "show", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["config", "show", "--set", "temporal.head.hiden=3"], "did you mean temporal.head.hidden?"),
        (["features", "verify", "nowhere"], "nowhere: no such feature folder"),
        (["features", "info", "empty"], "no feature files"),
        (["extract", "--shard", "4/4", "--set", "data.root=empty"], "--shard 4/4"),
        (["extract", "--shard", "²/4", "--set", "data.root=empty"], "--shard ²/4"),
        (["train-temporal", "--features", "nowhere"], "nowhere"),
        (["evaluate", "--name", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere: no such run"),
        (["evaluate", "--name", "nowhere"], "run train-temporal under that name first"),
        (["config", "show", "--set", "temporal.head.name=tnc"], "temporal.head: unknown head tnc; did you mean tcn?"),
        (["report", "empty"], "run `python pipeline.py evaluate --name empty --split test`"),
        (["train-temporal", "--name", "../x", "--features", "empty"], "run name"),
        (["simulate", "out", "--videos", "0"], "videos"),
        (["index", "--root", "empty", "--from-pickle", "nowhere.pkl"], "--phase-order"),
        (["index", "--root", "empty", "--from-pickle", "x.pkl", "--phase-order", "mtrcnet"], "x.pkl: no such file"),
        (["export", "nowhere"], "run `evaluate` first"),
        (["config", "show", "--config", "nowhere.yaml"], "no such settings file or preset (known: "),
        (["run", "--name", ""], "run name ''"),
        (["ablate", "hidden", "--name", ""], "run name ''"),
        (["train-temporal", "--features", ""], "--features: expected a path, got an empty value"),
        (["ablate", "hidden", "--run", "nosuch"], "nosuch: no features of this run; make them with `extract --name"),
        (["export", "--from-predictions", "p.pkl"], "--out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert expected in refuse(arguments, tmp_path)
    assert os.listdir(tmp_path) == ["empty"]


@pytest.mark.parametrize("content", [b"", b"not a video", b"\x00" * 100_000], ids=["empty", "text", "zeros"])
def test_files_that_are_no_videos(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/video01.mp4").write_bytes(content)
    assert "video01.mp4" in refuse(["index", "--root", "data"], tmp_path)
    assert os.listdir(tmp_path) == ["data"]


def test_pickles_go_in_and_out_and_predictions_become_text(tmp_path: Path) -> None:
    """The original programs' files, from an index to text; no code in them is run."""
    rows = [[f"/far/away/17/17-{number}.jpg", *[number % 2] * 7, number % 7] for number in range(1, 31)]
    for number in range(1, 31):
        image = tmp_path / f"data/video17/video17-{number}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"image")
    lists = [[], [], [row[0] for row in rows], [], [], [row[1:] for row in rows], [], [], [30]]
    (tmp_path / "in.pkl").write_bytes(pickle.dumps(lists, 0))
    (tmp_path / "predicted.pkl").write_bytes(pickle.dumps([row[-1] for row in rows[3:]], 2))
    order = ["--phase-order", "tf-cholec80", "--set", "data.root=data"]
    output = succeed(["index", *order, "--from-pickle", "in.pkl", "--to-pickle", "out.pkl"], tmp_path)
    assert "4 GallbladderRetraction" in output
    (video,) = load_plain(tmp_path / "out.pkl")
    assert [row[1:] for row in video] == [row[1:] for row in rows]
    assert video[0][0] == "data/video17/video17-1.jpg"
    arguments = ["export", *order, "--from-predictions", "predicted.pkl", "--sequence", "4", "--out", "text"]
    assert "3 in total" in succeed(arguments, tmp_path)
    text = (tmp_path / "text/video17-phase.txt").read_text().splitlines()
    assert text[:2] == ["Frame Phase", "75\tGallbladderRetraction"]
    (tmp_path / "in.pkl").write_bytes(b"cos\nsystem\n(S'touch mark'\ntR.")
    done = run(["index", *order, "--force", "--from-pickle", "in.pkl"], tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "in.pkl: refers to 'os.system'" in line
    assert not (tmp_path / "mark").exists()


def test_config_show_prints_what_the_commands_see(tmp_path: Path) -> None:
    shown = yaml.safe_load(succeed(["config", "show", "--config", "mini", "--set", "seed=7"], tmp_path))
    assert shown["seed"] == 7
    assert shown["cnn"]["backbone"] == "efficientnet_lite0"
