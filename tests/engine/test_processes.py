"""Exchanges between ranks: work is divided and merged, and all ranks end with one message."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoints import load_checkpoint
from engine.processes import Processes, nccl_failure, peer_died
from pipeline import Group
from tests.engine.test_launch import TASK
from tests.engine.test_session import log_without_times

# The form of NCCL's errors in torch: name and meaning of the code, then what it says last.
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, NCCL version 2.27.5\n{}\nLast error:\n{}"
PROJECT = Path(__file__).resolve().parents[2]


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
    """A single process must not start more slowly: torch's elastic launcher is not imported."""
    program = "import sys, engine.processes; print([n for n in sys.modules if n.startswith('torch')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_errors_of_the_exchange_mean_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer")
    nccl = torch.distributed.DistBackendError(
        NCCL.format("ncclRemoteError: a remote process exited", "Connection closed")
    )
    assert not peer_died(gloo)  # there is no other
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    assert peer_died(gloo)
    assert peer_died(nccl)
    assert not peer_died(RuntimeError("mat1 and mat2 shapes cannot be multiplied (NCCL or gloo or not)"))
    assert not peer_died(ValueError("gloo/transport/"))


def test_other_errors_of_nccl_have_their_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    last = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50"
    error = torch.distributed.DistBackendError(NCCL.format("ncclInvalidUsage: invalid usage of NCCL library.", last))
    assert nccl_failure(error) is None  # there is no other
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    assert not peer_died(error)
    assert (nccl_failure(error) or "").startswith(f"the processes cannot exchange on GPUs: {last}; ")
    assert nccl_failure(RuntimeError("NCCL")) is None
    monkeypatch.setattr("engine.processes.is_reporting_rank", lambda problem: True)  # no store to ask

    @click.command()
    def failing() -> None:
        raise error

    group = Group()
    group.add_command(failing)
    ended = CliRunner().invoke(group, ["failing"])
    assert (ended.exit_code, ended.output.count("\n")) == (2, 1)
    assert last in ended.output


# ---------------------------------------------------------------------------------------------- two of them


def start_pair(what: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Two processes that find each other like the tasks of an srun step."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SURGSTAGE_"))}
    step = plain | TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
    step |= {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(Path(__file__).with_name("pair.py")), what, str(folder)]
    return [
        subprocess.Popen(
            words,
            env=step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def ends_of(pair: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Exit codes and output of both. The main point is that they end at all."""
    try:
        output = "".join("".join(one.communicate(timeout=280)) for one in pair)
    finally:
        for one in pair:
            one.kill()
    assert "STILL JOINED" not in output
    return [one.returncode for one in pair], output


@pytest.mark.slow
def test_the_processes_of_a_command_that_succeeds_have_left_the_group_at_their_exit(tmp_path: Path) -> None:
    """As those of every other command here."""
    assert ends_of(start_pair("sound", tmp_path)) == ([0, 0], "")


@pytest.mark.slow
def test_each_task_may_see_one_gpu(tmp_path: Path) -> None:
    """As `srun --gpus-per-task=1` binds them: number 0 in every rank, by which torch is not told where to compute."""
    codes, output = ends_of(start_pair("own-gpu", tmp_path))
    assert (codes, output) == ([0, 0], ""), output


@pytest.mark.slow
def test_two_processes_on_one_gpu_are_refused_in_one_line(tmp_path: Path) -> None:
    codes, output = ends_of(start_pair("same-gpu", tmp_path))
    assert codes == [2, 2], output
    assert output.count("error:") == output.count("\n") == 1, output
    assert "error: two processes would compute on one GPU (a GPU of " in output


@pytest.mark.slow
def test_ranks_on_gpus_exchange_once_a_step_and_log_the_same(tmp_path: Path) -> None:
    """Losses are exchanged where they are read; that a checkpoint is due is exchanged with the requests to stop."""
    codes, output = ends_of(start_pair("steps", tmp_path))
    assert codes == [0, 0], output
    # a logged step and the last one read losses; a checkpoint gathers states and checks the weights
    assert output.splitlines() == ["exact [2, 2, 2, 2, 2]", "late [1, 1, 2, 1, 2]", "saved [4, 4, 4, 4, 4]"]
    logs = [log_without_times(tmp_path / name) for name in ("exact", "late", "saved")]
    assert len(logs[0]) == 2
    assert logs[0] == logs[1] == logs[2]
    saved = [load_checkpoint(tmp_path / name / "last.pt")["model"]["weight"] for name in ("exact", "late", "saved")]
    assert torch.equal(saved[0], saved[1])
    assert torch.equal(saved[0], saved[2])


@pytest.mark.slow
def test_ranks_train_a_net_again_in_another_precision(tmp_path: Path) -> None:
    codes, output = ends_of(start_pair("twice", tmp_path))
    assert codes == [0, 0], output
    assert output.split() == ["torch.bfloat16"] * 2 + ["torch.float32"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nan", "nan-late"])
def test_a_loss_of_one_process_that_is_no_number_stops_all_with_the_batch_named(tmp_path: Path, what: str) -> None:
    codes, output = ends_of(start_pair(what, tmp_path))
    assert codes == [2, 2], output
    assert output.count("error:") == 1, output
    assert "the loss is nan in epoch 1, step 3 (batch 2 of 1)" in output


@pytest.mark.slow
@pytest.mark.parametrize(("what", "signalled"), [("apart", 0), ("apart", 1), ("cache", 0)])
def test_a_signal_to_one_rank_stops_the_separate_work_of_another(tmp_path: Path, what: str, signalled: int) -> None:
    """Minutes of validation or decoding remain, on the rank that received the signal or on the other."""
    pair = start_pair(what, tmp_path)
    deadline = time.monotonic() + 280
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline, ends_of(pair)
        time.sleep(0.05)
    pair[signalled].send_signal(signal.SIGINT)
    codes, output = ends_of(pair)
    assert codes == [130, 130], output
    assert output.count("stopped by SIGINT") == 1, output
    if what == "apart":
        assert len(load_checkpoint(tmp_path / "last.pt")["others"]) == 1


@pytest.mark.slow
def test_an_error_on_one_rank_stops_the_separate_work_of_another(tmp_path: Path) -> None:
    """The other rank has minutes of work left; both end with the error, not as stopped."""
    codes, output = ends_of(start_pair("mistake", tmp_path))
    assert codes == [2, 2], output
    assert output.count("error:") == 1, output
    assert "error: video07.mp4: damaged, frame 3" in output
    assert "stopped" not in output
    assert not (tmp_path / "all done").exists()


@pytest.mark.slow
def test_an_error_on_one_process_ends_all_and_is_printed_once(tmp_path: Path) -> None:
    for what, codes in (("late", [2, 2]), ("outside", [70, 2])):
        found, output = ends_of(start_pair(what, tmp_path))
        assert found == codes, output
        assert output.count("error:") == 1, output
        assert "error: weights.pth: not on this machine" in output
