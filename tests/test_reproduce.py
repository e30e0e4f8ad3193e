"""The reproduction on the whole of Cholec80, rehearsed on a few simulated operations, by the program itself."""

from __future__ import annotations

import importlib
import itertools
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from configs.load import load_config
from engine.stopping import StopRequest, watch_signals
from evaluation.metrics.conventions import CONVENTIONS
from tests.cli import PROJECT, run, shared_forks, succeed

SIMULATE = ["--videos", "6", "--seed", "1", "--fps", "2", "--width", "64", "--height", "64", "--speed-up", "100"]
BEST = ("best_joint", "best_two_stages")
SPLIT = "3/1/2"


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """benchmarks/reproduce_cholec80.py, imported as it imports its neighbours."""
    sys.path.insert(0, str(PROJECT / "benchmarks"))
    yield importlib.import_module("reproduce_cholec80")
    sys.path.remove(str(PROJECT / "benchmarks"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six simulated operations of a few seconds."""
    folder = tmp_path_factory.mktemp("reproduce")
    succeed(["simulate", "data", *SIMULATE], folder)
    return folder


def start(program: ModuleType, place: Path, *more: str, faults: dict[str, Any] | None = None) -> tuple[int, list[str]]:
    """Start the program; its exit code and the commands it ran. `faults` are those of the first command of each kind.

    The commands run in forks, as everywhere in these tests.
    """
    ran: list[str] = []
    waiting = dict(faults or {})

    def stage(arguments: list[str], stop: StopRequest) -> int:
        ran.append(arguments[0])
        fault = waiting.pop(arguments[0], None)
        if fault is None:
            return run(arguments, place).returncode
        return shared_forks().run(arguments, place, stop_at=fault).code

    tiny = ["--settings", str(PROJECT / "benchmarks/rehearsal_cholec80.yaml")]
    places = ["--root", str(place / "data"), "--runs", str(place / "runs"), "--out", str(place / "out")]
    return program.main([*places, "--splits", SPLIT, "--seeds", "2", *tiny, *more], stage), ran


def files(runs: Path) -> dict[str, int]:
    """When each file of the runs was written; without reports, which every start of `run` writes again."""
    found = {str(path.relative_to(runs)): path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    return {
        name: time
        for name, time in found.items()
        if not name.endswith(("summary.json", "MODEL_CARD.md", "extract/result.json"))
    }


def test_a_rehearsal_that_is_killed_resumes_and_is_started_again(program: ModuleType, place: Path) -> None:
    """A killed training resumes, the table has all that it should, and then nothing is left to do."""
    best = ("--recipes", ",".join(BEST))
    killed = {"train-joint": ("joint/multitask/last.pt", signal.SIGKILL)}
    assert start(program, place, *best, faults=killed) == (137, ["index", "index", "train-joint"])
    code, ran = start(program, place, *best)
    assert code == 0
    assert ran == ["index", "index", *["train-joint", "evaluate"] * 2, "run", "train-temporal", "evaluate"]
    check_table(place / "out")
    before = files(place / "runs")
    (place / "out/table.md").unlink()
    assert start(program, place, *best, "--table") == (0, [])
    assert (place / "out/table.md").exists()
    code, ran = start(program, place, *best)
    assert (code, ran) == (0, ["index", "index", *["train-joint"] * 2, "run", "train-temporal"])
    assert files(place / "runs") == before
    check_seeds_that_differ(program, place)


def check_seeds_that_differ(program: ModuleType, place: Path) -> None:
    """They have no mean, and the next start evaluates every seed again with the settings of the call."""
    name, two_stages = BEST[1], ("--recipes", BEST[1], "--set", "temporal.decoding.mode=filter")
    metrics = place / f"runs/reproduce-{name}-3-1-2-seed1/evaluate/test/metrics.json"
    changed = json.loads(metrics.read_text()) | {"decoding": {"mode": "offline"}}
    metrics.write_text(json.dumps(changed))
    assert start(program, place, *two_stages, "--table") == (2, [])
    code, ran = start(program, place, *two_stages)
    assert (code, ran) == (0, ["index", "index", "run", "train-temporal", "evaluate"])
    (row,) = json.loads((place / "out/table.json").read_text())["rows"]
    assert row["title"].endswith(", decoded by a forward filter")
    assert len(row["other_heads"]["undecoded"]["phase_mean"]["accuracy"]["values"]) == 2
    assert start(program, place, *two_stages, "--stage-one-per-seed", "--table") == (0, [])
    assert "| once per split |" in (place / "out/table.md").read_text()


def check_table(out: Path) -> None:
    table = json.loads((out / "table.json").read_text())
    assert [(row["recipe"], row["split"], row["seeds"]) for row in table["rows"]] == [(name, SPLIT, 2) for name in BEST]
    for row in table["rows"]:
        assert row["simulated"]
        assert {"phase_mean", "relaxed_matlab", "segmental"} <= set(row["conventions"]) <= set(CONVENTIONS.names())
        of_frames = [scores for scores in row["conventions"].values() if "precision" in scores]
        assert len(of_frames) >= 5
        for scores in [*of_frames, row["tools"]]:
            for score in scores.values():
                assert len(score["values"]) == 2
                assert 0 <= min(score["values"]) <= score["mean"] <= max(score["values"]) <= 100
                assert score["std"] >= 0
    assert [row["stage_one"] for row in table["rows"]] == ["with every seed", "once per split"]
    one = json.loads((out.parent / f"runs/reproduce-{BEST[0]}-3-1-2-seed1/evaluate/test/metrics.json").read_text())
    accuracy = table["rows"][0]["conventions"]["relaxed_matlab"]["accuracy"]
    assert one["phases"]["temporal"]["relaxed_matlab"]["accuracy"]["mean"] == accuracy["values"][1]
    assert len(table["published"]) > 10
    assert all(row["read_in"] and row["compare_with"] == [] for row in table["published"])  # no 40 test videos
    text = (out / "table.md").read_text()
    assert text.startswith("**SIMULATED operations")
    assert f"| best_joint | {SPLIT} | relaxed_matlab | " in text
    assert "| DACAT |" in text
    assert "### Phases: segmental (percent)\n\n| recipe | split | convention | Accuracy | Edit score | F1@10 | " in text
    assert "### Phases: transitions (delays in seconds, missed in percent, false per hour)\n\n" in text


def test_a_cell_says_if_it_is_not_of_all_seeds(program: ModuleType) -> None:
    table = importlib.import_module("cholec80_table")
    scores = table._over_seeds([{"accuracy": 50.0, "delay_p90": None}, {"accuracy": 60.0, "delay_p90": 3.0}])
    assert table._cells(scores, ("accuracy", "delay_p90", "edit"), 2) == ["55.0 ± 7.1", "3.0 (1 of 2)", ""]


def test_published_rows_name_their_source_and_what_they_can_be_compared_with(program: ModuleType) -> None:
    table = importlib.import_module("cholec80_table")
    published = yaml.safe_load(table.PUBLISHED.read_text())
    for row in published:
        assert row["read_in"]
        assert row["convention"] is None or row["convention"] in CONVENTIONS.names()
        figures = [row.get(name) for name in (*table.OF_FRAMES, "tool_map")]
        assert any(figures)
        assert all(value is None or 50 < value < 100 for value in figures)
    ours = [
        {"recipe": "best_joint", "split": split, "conventions": {"relaxed_matlab": {}}}
        for split in ("32/8/40", "40/40", "40/8/32")
    ]
    found = {row["method"]: table._beside(row, ours)["compare_with"] for row in published}
    assert [(row["split"], row["same_split"]) for row in found["DACAT"]] == [("32/8/40", False), ("40/40", True)]
    assert found["SurgicalMamba"] == []


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--recipes", "best_tow_stages"], "--recipes: 'best_tow_stages' is not one of "),
        (["--conventions", "relaxed"], "--conventions: 'relaxed' is not one of "),
        (["--splits", "4/2,4/2"], "--splits: 4/2,4/2: a name occurs twice"),
        (["--seeds", "0"], "--seeds: 0 is not a number of seeds"),
        (["--seeds", "999999999999"], "--seeds: 999999999999 is not a number of seeds"),
        (["--settings", "nowhere.yaml"], "nowhere.yaml: "),
        (["--part", "2/2"], "--part 2/2: expected I/N"),
        (["--set", "seed=3"], "--set seed=3: seed is set for each run"),
        (["--set", "best:cnn.epochs=3"], "--set best:cnn.epochs=3: expected KEY=VALUE"),
        (["--root", "nowhere"], "--root: nowhere is not a folder"),
        (["--root", ""], "--root: name the folder of Cholec80's videos"),
    ],
)
def test_bad_options_end_in_one_line(
    program: ModuleType,
    more: list[str],
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SURGSTAGE_DATA", raising=False)
    assert program.main(["--root", str(tmp_path), "--out", str(tmp_path / "out"), *more], never) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"error: {line}")


def never(arguments: list[str], stop: StopRequest) -> int:
    raise AssertionError(arguments)


def test_missing_videos_are_named(program: ModuleType, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, ran = start(program, place, "--set", "data.dataset=cholec80", "--out", str(place / "other"))
    assert (code, ran) == (2, ["index"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "Cholec80 has 80 videos, but 74 are missing here" in line
    assert "video07, video08, " in line


def test_a_dry_run_prints_commands_that_the_presets_accept(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the presets as they are: every setting exists, and parts are a partition of the work."""
    options = ["--root", "/data", "--out", str(tmp_path / "out"), "--dry-run"]
    assert program.main(options, never) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert "16 parts, 24 runs" in last
    commands = [shlex.split(line)[2:] for line in lines]
    assert not list(tmp_path.iterdir())
    for arguments in commands:
        sets = [value for word, value in itertools.pairwise(arguments) if word == "--set"]
        config = load_config(arguments[arguments.index("--config") + 1], sets)
        assert str(config.data.root) == "/data"
    names = {tuple(one[one.index("--name") + 1 :][:1]) for one in commands if one[0] != "index"}
    assert len(names) == 24
    assert program.main([*options, "--stage-one-per-seed"], never) == 0
    assert "24 parts, 24 runs" in capsys.readouterr().out
    parts: list[str] = []
    for part in range(5):
        assert program.main([*options, "--part", f"{part}/5"], never) == 0
        parts += [line for line in capsys.readouterr().out.splitlines() if " index " not in line and line[0] != "#"]
    assert sorted(parts) == sorted(line for line in lines if " index " not in line)


@pytest.fixture
def sleeper(tmp_path: Path, program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[StopRequest], int]:
    """A command that saves and exits with 75 when it gets SIGTERM; it signals this process when it is ready."""
    script = tmp_path / "pipeline.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    command = importlib.import_module("command")
    monkeypatch.setattr(command, "PIPELINE", script)
    return lambda stop: command.stage_to_end(["train-cnn"], stop)


def test_a_signal_is_passed_on_and_the_code_of_the_command_returned(sleeper: Callable[[StopRequest], int]) -> None:
    with watch_signals() as stop:
        assert sleeper(stop) == 75
        assert stop.number == signal.SIGTERM
