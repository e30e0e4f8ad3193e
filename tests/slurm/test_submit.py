"""`submit` on a real cluster: arrays, refusals, jobs that are requeued and preempted in the middle."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.cli import run, succeed
from tests.slurm.material import (
    assert_equal_trainings,
    epochs_done,
    job,
    job_log,
    slurm,
    submission,
    submit,
    wait_for,
    wait_until_ended,
)

TRAIN = ["--config", "tiny.yaml", "--name"]


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> str:
    """The name of a training that was not interrupted and ran without Slurm."""
    succeed(["train-cnn", *TRAIN, "undisturbed"], place)
    return "undisturbed"


def test_extract_as_an_array_writes_the_bytes_of_one_process(place: Path) -> None:
    options = ["--config", "tiny.yaml", "--name"]
    succeed(["extract", *options, "whole", "--set", "extract.store=whole"], place)
    ids = submit(
        ["extract", "--array", "2", "--time", "10", "--", *options, "sharded", "--set", "extract.store=sharded"], place
    )
    assert [name.partition("_")[2] for name in ids] == ["0", "1"]
    for name in ids:
        assert wait_until_ended(name)["JobState"] == "COMPLETED", job_log(place, "sharded")
    (whole,), (sharded,) = (place / "whole").iterdir(), (place / "sharded").iterdir()
    files = sorted(path.name for path in whole.iterdir())
    assert sum(name.endswith(".h5") for name in files) == 5
    assert files == sorted(path.name for path in sharded.iterdir())
    for name in files:
        assert (whole / name).read_bytes() == (sharded / name).read_bytes(), name
    logs = [(submission(place, "sharded")[0] / f"{name}_0_log.out").read_text() for name in ids]
    assert "3 video(s) extracted" in logs[0]
    assert "2 video(s) extracted" in logs[1]


def test_what_was_submitted_is_kept_with_the_run(place: Path) -> None:
    (name,) = submit(
        ["evaluate", "--time", "7", "--cpus-per-task", "2", "--", "--config", "tiny.yaml", "--name", "kept"], place
    )
    folder, record = submission(place, "kept")
    assert record["job_ids"] == [name]
    assert record["commands"][0][2:] == ["evaluate", "--config", "tiny.yaml", "--name", "kept"]
    assert record["parameters"]["time"] == 7
    assert "--cpus-per-task=2" in (folder / f"{name}_submission.sh").read_text()
    wait_until_ended(name)
    submit(["evaluate", "--time", "7", "--", "--config", "tiny.yaml", "--name", "kept"], place)
    assert len(list((place / "runs/kept/slurm").glob("*/submission.json"))) == 2
    assert json.loads((folder / "submission.json").read_text()) == record


def test_bad_input_fails_with_its_own_code_and_is_not_requeued(place: Path) -> None:
    (name,) = submit(["train-cnn", "--time", "5", "--", *TRAIN, "bad", "--set", "data.root=nowhere"], place)
    ended = wait_until_ended(name)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: nowhere: no such folder" in job_log(place, "bad")


def test_what_sbatch_refuses_is_one_line_and_leaves_nothing(place: Path) -> None:
    done = run(["submit", "extract", "--partition", "nonsense", "--", *TRAIN, "refused"], place)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: sbatch refused: ")
    assert "partition" in line
    assert not (place / "runs/refused").exists()


def test_the_script_of_a_dry_run_is_accepted_by_sbatch(place: Path, tmp_path: Path) -> None:
    before = slurm("squeue", "-h", "-o", "%i")
    for options in (
        ["--array", "2", "--cpus-per-task", "1", "--mem-gb", "1"],
        ["--partition", "scavenge", "--slurm", "nice"],
    ):
        done = run(["submit", "extract", *options, "--dry-run", "--", *TRAIN, "dry"], place)
        assert done.returncode == 0, done.stderr
        assert "extract --config tiny.yaml --name dry" in done.stderr
        script = tmp_path / "job.sh"
        script.write_text(done.stdout)
        tested = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True, check=False)
        assert tested.returncode == 0, tested.stderr
    assert slurm("squeue", "-h", "-o", "%i") == before
    assert not (place / "runs/dry").exists()


@pytest.mark.parametrize("how", ["requeued", "preempted"])
def test_a_preempted_training_equals_an_undisturbed_one(place: Path, undisturbed: str, how: str) -> None:
    partition = {"requeued": "tests", "preempted": "scavenge"}[how]
    (name,) = submit(["train-cnn", "--partition", partition, "--time", "30", "--", *TRAIN, how], place)
    wait_for("two epochs are done", lambda: epochs_done(place, how) >= 2)
    if how == "requeued":
        slurm("scontrol", "requeue", name)
    else:
        slurm("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true", folder=place)
    wait_for("the job is off", lambda: job(name)["JobState"] in ("PENDING", "COMPLETING"), 60)
    assert 2 <= epochs_done(place, how) < epochs_done(place, undisturbed), "not in the middle"
    ended = wait_until_ended(name)
    log = job_log(place, how)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert int(ended["Restarts"]) == 1
    assert "stopped by SIGTERM; progress is saved" in log
    assert_equal_trainings(place, how, undisturbed)
