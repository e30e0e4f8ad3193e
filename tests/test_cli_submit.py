"""`submit` as a user types it, without a cluster: what is refused before submission, and the dry run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline import cli

PROJECT = Path(__file__).resolve().parent.parent


def submit(*words: str) -> Result:
    return CliRunner().invoke(cli, ["submit", *words])


def test_a_dry_run_prints_the_script_and_the_command_to_separate_streams(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"runs: {tmp_path / 'runs'}\n")
    done = submit("train-temporal", "--time", "30", "--dry-run", "--", "--config", str(tmp_path / "own.yaml"))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("#!/bin/bash\n")
    assert f"{tmp_path}/runs/own/slurm/" in done.stdout
    assert done.stderr.startswith("command: ")
    assert "pipeline.py train-temporal --config" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_only_the_job_starts_the_processes_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr("engine.launch.run_copies", lambda *words: started.append(words))
    done = submit("train-cnn", "--dry-run", "--", "--devices", "2")
    assert done.exit_code == 0, done.output
    assert "pipeline.py train-cnn --devices 2\n" in done.stderr
    assert not started


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["train-cnn", "--", "--set", "cnn.epoch=3"], "unknown key cnn.epoch; did you mean cnn.epochs?"),
        (["train-cnn", "--", "--nonsense"], "No such option '--nonsense'"),
        (["train-cnn", "--", "--name", "../x"], "run name '../x'"),
        (["train-cnn", "--config", "demo"], "No such option '--config'"),
        (["extract", "--", "--shard", "2/2"], "--shard 2/2"),
        (["extract", "--array", "2", "--", "--shard", "0/2"], "--shard: --array sets it for each job"),
        (["ablate", "--", "nothing"], "no such ablation"),
        (["ablate", "--", "hidden", "--set", "temporal.epoch=3"], "unknown key temporal.epoch"),
        (["evaluate", "--", "--predictions", "x"], "call it without submit"),
        (
            ["train-cnn", "--gpus-per-node", "2", "--", "--devices", "2"],
            "--devices: --nodes and --gpus-per-node already start",
        ),
        (["simulate", "--", "x"], "is not one of"),
        (["extract", "--time", "soon"], "--time soon"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(words: list[str], reason: str) -> None:
    done = submit(*words)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert "Traceback" not in done.output


def test_help_needs_neither_torch_nor_submitit() -> None:
    code = (
        "import sys; sys.argv = ['pipeline.py', 'submit', '--help']; import pipeline\n"
        "try: pipeline.cli()\n"
        "except SystemExit: assert not {'torch', 'submitit', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "submit train-cnn --partition gpu" in " ".join(done.stdout.split())
