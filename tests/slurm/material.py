"""Simulated operations, tiny settings, and how to talk to `pipeline.py` and to Slurm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.logs import read_metrics
from tests.cli import PROJECT, succeed

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "data": {"root": "data", "fps": 1.0, "index": "index.json", "split": {"rule": "3/1/1"}},
    "preprocess": {"resize_px": 72, "crop_px": 64},
    "cache": {"dir": "frames"},
    "cnn": {
        "backbone": "mobilenet_v3_small",
        "weights": "random",
        "precision": "fp32",
        "epochs": 6,
        "batch_frames": 16,
        "workers": 0,
        "optim": {"name": "adamw", "lr": 0.002},
        "backbone_lr_factor": 1.0,
    },
    "extract": {"encoder": "initial", "precision": "fp32", "workers": 1},
}
WALL_TIMES = ("seconds", "frames_per_s")
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def make_place(folder: Path) -> Path:
    """Simulate, write the settings, and index."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    options = ["--videos", "5", "--seed", "1", "--fps", "5", "--width", "96", "--height", "96", "--speed-up", "40"]
    succeed(["simulate", "data", *options], folder)
    succeed(["index", "--config", "tiny.yaml"], folder)
    return folder


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """The same without waiting."""
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "pipeline.py"), *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def submit(arguments: Sequence[str], folder: Path) -> list[str]:
    """`pipeline.py submit ...`; the ids of the jobs, as it prints them."""
    printed = succeed(["submit", *arguments], folder)
    found = re.search(r"submitted: job ([\d_, ]+);", printed)
    assert found, printed
    return found.group(1).split(", ")


def slurm(*words: str, folder: Path | None = None, check: bool = True) -> str:
    """A command of Slurm's; what it prints."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 or not check, (words, done.stdout, done.stderr)
    return done.stdout


def job(job_id: str) -> dict[str, str]:
    """What Slurm says about a job: `scontrol show job` as keys and values."""
    shown = slurm("scontrol", "show", "job", "--oneliner", job_id)
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def wait_for(what: str, condition: Callable[[], object], limit_s: float = 240.0) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit, f"waited {limit_s:.0f} s until {what}"
        time.sleep(0.2)


def wait_until_ended(job_id: str, limit_s: float = 240.0) -> dict[str, str]:
    """The job's final state."""
    wait_for(f"job {job_id} has ended", lambda: job(job_id)["JobState"] in ENDED, limit_s)
    return job(job_id)


def submission(folder: Path, run: str) -> tuple[Path, dict[str, Any]]:
    """The only submission of a run: its folder and its record."""
    (record,) = (folder / "runs" / run / "slurm").glob("*/submission.json")
    return record.parent, json.loads(record.read_text())


def job_log(folder: Path, run: str) -> str:
    """Everything that the jobs of a run wrote."""
    return "\n".join(path.read_text() for path in sorted((folder / "runs" / run / "slurm").glob("*/*_log.*")))


def epochs_done(folder: Path, run: str) -> int:
    """Epochs in a training's log so far."""
    path = folder / "runs" / run / "cnn/metrics.jsonl"
    return sum(row["kind"] == "epoch" for row in read_metrics(path)) if path.exists() else 0


def outcome(folder: Path, run: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    """The outcome of a training: the best epoch's tensors, its metrics and its result, without wall times."""
    stage = folder / "runs" / run / "cnn"
    best = torch.load(stage / "best.pt", weights_only=True)["model"]
    rows = [
        {key: value for key, value in row.items() if key not in WALL_TIMES}
        for row in read_metrics(stage / "metrics.jsonl")
    ]
    result = json.loads((stage / "result.json").read_text())
    apart = (*WALL_TIMES, "sentence", "checkpoint", "identity_sha256")  # seconds in words, and the run's own name
    return best, rows, {key: value for key, value in result.items() if key not in apart}


def assert_equal_trainings(folder: Path, one: str, other: str) -> None:
    """Bit-identical weights, equal metrics and result."""
    (best, rows, result), (other_best, other_rows, other_result) = outcome(folder, one), outcome(folder, other)
    assert best.keys() == other_best.keys()
    assert all(torch.equal(best[name], other_best[name]) for name in best)
    assert rows == other_rows
    assert result == other_result
