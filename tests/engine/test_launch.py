"""What launchers set in the environment, and the copies that `--devices` starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from engine.launch import (
    GRACE_S,
    Launch,
    available_cores,
    first_host,
    launch,
    permitted_cores,
    run_copies,
    set_torchrun_variables,
)
from tests.faults import is_alive

PROJECT = Path(__file__).resolve().parents[2]

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}


def test_rank_and_world_size() -> None:
    assert launch({}) == Launch(0, 1, 0)
    assert launch({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Launch(3, 4, 1)
    assert launch(TASK) == Launch(5, 8, 1)
    # a batch script's own environment: no step, so one process
    assert launch({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}) == Launch(0, 1, 0)


@pytest.mark.parametrize("rank", ["4", "-1", "first"])
def test_numbers_that_make_no_sense_are_one_line(rank: str) -> None:
    with pytest.raises(UserError, match=f"RANK={rank}, WORLD_SIZE=4"):
        launch({"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": "0"})


def test_a_task_of_srun_gets_the_variables_of_torchrun() -> None:
    found = dict(TASK)
    set_torchrun_variables(found)
    assert found["MASTER_ADDR"] == "gpu07"
    assert 15000 <= int(found["MASTER_PORT"]) < 35000
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("5", "8", "1", "4")
    other = {**TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "10.0.0.1"}
    set_torchrun_variables(other)
    assert other["MASTER_PORT"] == found["MASTER_PORT"]
    assert other["MASTER_ADDR"] == "10.0.0.1"
    alone: dict[str, str] = {}
    set_torchrun_variables(alone)
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


def test_ranks_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert available_cores({}) == permitted_cores() == 8
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "False", "LOCAL_WORLD_SIZE": "4"}
    assert available_cores(torchrun) == 2
    assert available_cores({**torchrun, "LOCAL_WORLD_SIZE": "16"}) == 1
    assert available_cores({**torchrun, "LOCAL_WORLD_SIZE": "none"}) == 8
    task = dict(TASK)
    set_torchrun_variables(task)
    assert available_cores(task) == 8  # of its own


@pytest.mark.slow
def test_ranks_share_the_cores_that_they_may_run_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 100)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    program = (
        "import os, pathlib, sys; os.sched_getaffinity = lambda process: set(range(6))\n"
        "from engine.launch import available_cores\n"
        "found = f\"{available_cores()} {os.environ['OMP_NUM_THREADS']}\"\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(found)"
    )
    assert run_copies([sys.executable, "-c", program, str(tmp_path)], 2) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "3 3", "1": "3 3"}


STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[1])
if rank == "1":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
own = subprocess.Popen(["sleep", "300"])
(folder / f"{rank}.tmp").write_text(f"{os.getpid()} {own.pid}")
(folder / f"{rank}.tmp").rename(folder / rank)
try:
    time.sleep(300)
except KeyboardInterrupt:
    own.kill()
    sys.exit(130)
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_ranks_at_once(tmp_path: Path) -> None:
    """Also while the others have time to end by themselves after one has failed."""
    ranks = [sys.executable, "-c", STUBBORN, str(tmp_path)]
    launcher = f"import sys; from engine.launch import run_copies; sys.exit(run_copies({ranks}, 2))"
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=PROJECT, start_new_session=True)
    deadline = time.monotonic() + 280
    while not {"0", "1"} <= {path.name for path in tmp_path.iterdir()} and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = {rank: [int(pid) for pid in (tmp_path / rank).read_text().split()] for rank in ("0", "1")}
    process.send_signal(signal.SIGINT)
    while is_alive(pids["0"][0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    second = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=280) == 130
    assert time.monotonic() - second < GRACE_S / 2
    assert not any(is_alive(pid) for both in pids.values() for pid in both)
