"""What launchers say, and how work is divided and put together again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from engine.processes import Launch, Processes, first_host, launch, speak_torchrun

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}


def test_who_is_who() -> None:
    assert launch({}) == Launch(0, 1, 0)
    assert launch({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Launch(3, 4, 1)
    assert launch(TASK) == Launch(5, 8, 1)
    # a batch script's own environment: no step, so one process
    assert launch({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}) == Launch(0, 1, 0)


@pytest.mark.parametrize("rank", ["4", "-1", "first"])
def test_numbers_that_make_no_sense_are_one_line(rank: str) -> None:
    with pytest.raises(UserError, match=f"RANK={rank}, WORLD_SIZE=4"):
        launch({"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": "0"})


def test_a_task_of_srun_hears_what_torchrun_would_say() -> None:
    found = dict(TASK)
    speak_torchrun(found)
    assert found["MASTER_ADDR"] == "gpu07"
    assert 15000 <= int(found["MASTER_PORT"]) < 35000
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("5", "8", "1", "4")
    other = {**TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "10.0.0.1"}
    speak_torchrun(other)
    assert other["MASTER_PORT"] == found["MASTER_PORT"]
    assert other["MASTER_ADDR"] == "10.0.0.1"
    alone: dict[str, str] = {}
    speak_torchrun(alone)
    assert not alone


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,09],big1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("rack2-gpu[001,004].cluster", "rack2-gpu001.cluster"),
        ("a-1.b.org,c", "a-1.b.org"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@given(items=st.lists(st.integers()), count=st.integers(1, 5))
def test_what_is_divided_comes_back_in_order(items: list[int], count: int) -> None:
    shares = [Processes(rank, count).share(items) for rank in range(count)]
    assert Processes(0, count).merged(shares) == items


def test_one_process_changes_nothing() -> None:
    alone = Processes()
    tensor = torch.ones(2)
    assert alone.total(tensor) is tensor
    assert alone.sums(1.5, 2.0) == [1.5, 2.0]
    assert alone.gather("a") == ["a"]
    assert alone.together(lambda: 3) == [3]
    assert alone.from_first(lambda: 4) == 4


def test_one_process_imports_no_launcher() -> None:
    """Starting up is to cost what it did: torch's elastic launcher is not read."""
    program = "import sys, engine.processes; print([n for n in sys.modules if n.startswith('torch')])"
    folder = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
