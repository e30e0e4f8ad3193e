"""Signals: what ends a command that does not poll for them, and what no longer ends one that has its result."""

from __future__ import annotations

import configparser
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.cli import PROJECT, Forks
from tests.sameness import left_half_done

SIMULATE = ["simulate", "data", "--videos", "1", "--fps", "5", "--width", "96", "--height", "96", "--speed-up", "200"]
# Ways in, each given the signal, the place, and the command's words.
INSTALLED = """
import sys
from importlib.metadata import EntryPoint
from tests.faults import stop_when_done
stop_when_done(int(sys.argv.pop(1)))
place = sys.argv.pop(1)
sys.exit(EntryPoint("surgstage", place, "console_scripts").load()())
"""
AS_A_FILE = """
import runpy, sys
from tests.faults import stop_when_done
stop_when_done(int(sys.argv.pop(1)))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FORKED = """
import sys
from pathlib import Path
from tests.cli import start_forked
from tests.faults import stop_when_done
number, log = int(sys.argv[1]), Path(sys.argv[2])
command = start_forked(sys.argv[3:], Path.cwd(), log, lambda: stop_when_done(number))
code = command.wait(200)
print(log.read_text())
sys.exit(code)
"""


def installed_as() -> str:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(PROJECT / "setup.cfg")
    name, _, way_in = settings["options.entry_points"]["console_scripts"].strip().partition(" = ")
    assert name == "surgstage"
    return way_in


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("program", "place"),
    [(INSTALLED, installed_as()), (AS_A_FILE, str(PROJECT / "pipeline.py")), (FORKED, "command.log")],
    ids=["installed", "as a file", "forked by tests"],
)
def test_a_finished_command_is_not_ended_by_a_late_signal(
    tmp_path: Path, program: str, place: str, number: signal.Signals
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, str(int(number)), place, *SIMULATE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (done.returncode, "data: 1 simulated videos made" in done.stdout) == (0, True), done.stdout + done.stderr


def test_signal_handlers_are_restored_in_a_process_that_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline

    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    assert CliRunner().invoke(pipeline.cli, SIMULATE).exit_code == 0
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_that_only_takes_a_moment(
    tmp_path: Path, forks: Forks, number: signal.Signals, code: int
) -> None:
    (tmp_path / "work").mkdir()
    assert forks.run(SIMULATE, tmp_path / "work").code == 0
    ended = forks.run(["index", "--root", "data"], tmp_path / "work", stop_at=("index.json", int(number)))
    assert (ended.code, ended.last_line) == (
        code,
        f"stopped by {number.name}; no file is left incomplete; start the same command again",
    )
    assert "Traceback" not in ended.output
    assert not list((tmp_path / "work").rglob("index.json"))
    assert left_half_done(tmp_path / "work") == []


def test_a_signal_during_a_command_is_one_line_in_a_process_that_continues() -> None:
    import pipeline

    @click.command()
    def waiting() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came too late")

    before = signal.getsignal(signal.SIGTERM)
    done = CliRunner().invoke(pipeline.Group("cli", commands={"waiting": waiting}), ["waiting"])
    assert (done.exit_code, done.output.count("\n")) == (75, 1), done.output
    assert signal.getsignal(signal.SIGTERM) == before
