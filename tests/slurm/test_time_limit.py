"""A job's time limit, which Slurm counts in whole minutes: through `submit`, and through the script in the documents.

Slurm looks at limits every 30 s, and sends a signal asked for D seconds before the limit up to 30 s earlier than that:
with 20 s of a minute, between 10 and 40 s after the start. The training is as long as that takes on this machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.logs import read_metrics
from tests.cli import PROJECT, succeed
from tests.slurm.material import (
    assert_equal_trainings,
    epochs_done,
    job_log,
    slurm,
    start,
    submit,
    wait_until_ended,
)

TRAINING_S = 50.0  # more than a job of a minute has before the signal
DELAY_S = 20


@pytest.fixture(scope="module")
def options(place: Path) -> list[str]:
    """A training that takes at least `TRAINING_S`, estimated from this machine's fastest epoch."""
    succeed(["train-cnn", "--config", "tiny.yaml", "--name", "measured", "--set", "cnn.epochs=4"], place)
    rows = read_metrics(place / "runs/measured/cnn/metrics.jsonl", "epoch")
    epochs = math.ceil(TRAINING_S / min(row["seconds"] for row in rows))
    return ["--config", "tiny.yaml", "--set", f"cnn.epochs={epochs}", "--name"]


@pytest.fixture(scope="module")
def script(place: Path, options: list[str]) -> Path:
    """The first script of docs/clusters.md with this cluster's limits and this training's command."""
    text = (PROJECT / "docs/clusters.md").read_text(encoding="utf-8")
    found = re.search(r"```bash\n(#!/bin/bash\n.*?)```", text, re.DOTALL)
    assert found
    changed = found.group(1)
    for before, after in {
        r"--time=\S+": "--time=1",
        r"--signal=B:USR1@\d+": f"--signal=B:USR1@{DELAY_S}",
        r"--cpus-per-task=8": "--cpus-per-task=1",
        r"#SBATCH --(partition|gpus-per-node|mem)=.*\n": "",
        r"source .*\n": "",
        r"python pipeline.py train-cnn .*?(?= &)": f"{PROJECT}/.venv/bin/python {PROJECT}/pipeline.py train-cnn "
        + " ".join([*options, "scripted"]),
    }.items():
        changed, count = re.subn(before, after, changed)
        assert count, before
    path = place / "job.sh"
    path.write_text(changed)
    return path


@pytest.fixture(scope="module")
def ended(place: Path, options: list[str], script: Path) -> Iterator[dict[str, dict[str, str]]]:
    """At the same time one left alone, one submitted, one by the script; what Slurm says of the jobs at the end."""
    alone = start(["train-cnn", *options, "alone"], place)
    try:
        limit = ["--time", "1", "--slurm", f"signal_delay_s={DELAY_S}"]
        (submitted,) = submit(["train-cnn", *limit, "--", *options, "submitted"], place)
        scripted = slurm("sbatch", "--parsable", str(script), folder=place).strip()
        jobs = {"submitted": wait_until_ended(submitted, 600), "scripted": wait_until_ended(scripted, 600)}
        assert alone.wait(timeout=600) == 0  # the jobs may end first if other work uses the cores
        yield jobs
    finally:
        if alone.poll() is None:
            alone.kill()
            alone.wait()


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("how", ["submitted", "scripted"])
def test_a_training_longer_than_its_time_limit_resumes_by_itself(
    place: Path, ended: dict[str, dict[str, str]], how: str
) -> None:
    log = (
        job_log(place, how)
        if how == "submitted"
        else "".join(path.read_text() for path in place.glob("surgstage-*.log"))
    )
    assert (ended[how]["JobState"], ended[how]["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert int(ended[how]["Restarts"]) >= 1
    signal_name = {"submitted": "SIGTERM", "scripted": "SIGUSR1"}[how]
    assert f"stopped by {signal_name}; progress is saved" in log
    assert epochs_done(place, how) > 4


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["submitted", "scripted"])
def test_and_equals_an_undisturbed_one(place: Path, ended: dict[str, dict[str, str]], how: str) -> None:
    assert_equal_trainings(place, how, "alone")
