"""Two tasks of an srun step find each other and train like two processes of `--devices`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import PROJECT, succeed
from tests.slurm.material import assert_equal_trainings


@pytest.mark.timeout(240)
def test_two_tasks_of_srun_train_as_two_devices(place: Path) -> None:
    words = ["train-cnn", "--config", "tiny.yaml", "--set", "cnn.epochs=2", "--name"]
    succeed([*words, "copies", "--devices", "2"], place)
    step = ["srun", "--ntasks=2", sys.executable, str(PROJECT / "pipeline.py"), *words, "tasks"]
    done = subprocess.run(step, cwd=place, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert_equal_trainings(place, "copies", "tasks")
