"""A signal that arrives after the result was written, while the process exits, for each way to start a command."""

from __future__ import annotations

import configparser
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.cli import PROJECT

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
