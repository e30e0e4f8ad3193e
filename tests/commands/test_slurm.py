"""The content of a Slurm job, and the program inside it, without a cluster; tests/slurm uses a real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from commands.slurm import HOLD_S, Request, StageCommand, parse_time_limit, submit
from configs.errors import UserError

PROGRAM = Path("pipeline.py")


def request(**changes: object) -> Request:
    given: dict[str, Any] = {"stage": "extract", "arguments": ("--name", "x"), "time_min": 240, **changes}
    return Request(**given)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("4:00:00", 240), ("30:00", 30), ("0:00:30", 1), ("2-12", 3600), ("1-00:00:01", 1441), ("59:59", 60)],
)
def test_time_limits_as_slurm_writes_them(text: str, minutes: int) -> None:
    assert parse_time_limit(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "0:00:00", "-5", "4h", "1:2:3:4", "1.5", "4:00:00\n#SBATCH"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        parse_time_limit(text)


def test_a_dry_run_gives_script_and_commands_and_touches_nothing(tmp_path: Path) -> None:
    made = submit(
        request(array=2, partition="gpu", gpus_per_node=1, cpus_per_task=4, mem_gb=1.5, more=("qos=high", "nice")),
        tmp_path / "run",
        PROGRAM,
        dry_run=True,
    )
    lines = made.script.splitlines()
    for wanted in ("array=0-1%2", "partition=gpu", "gpus-per-node=1", "ntasks-per-node=1", "cpus-per-task=4", "nice"):
        assert f"#SBATCH --{wanted}" in lines
    for wanted in ("mem=1536M", "qos=high", "requeue", "time=240", "signal=USR2@90", "open-mode=append"):
        assert f"#SBATCH --{wanted}" in lines
    assert any(line.startswith("srun ") and "--cpus-per-task=4" in line for line in lines)
    assert "wckey" not in made.script
    assert [command[2:] for command in made.commands] == [
        ("extract", "--name", "x", "--shard", "0/2"),
        ("extract", "--name", "x", "--shard", "1/2"),
    ]
    assert not (tmp_path / "run").exists()


def test_several_gpus_are_a_process_each(tmp_path: Path) -> None:
    made = submit(request(stage="train-cnn", gpus_per_node=2, nodes=3), tmp_path, PROGRAM, dry_run=True)
    assert "#SBATCH --ntasks-per-node=2" in made.script
    assert "#SBATCH --nodes=3" in made.script


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus_per_node": 1}, True),
        ({"more": ("gres=gpu:1",)}, True),
        ({"gpus_per_node": 1, "cpus_per_task": 8}, False),
        ({"gpus_per_node": 1, "more": ("cpus-per-gpu=8",)}, False),
        ({"gpus_per_node": 1, "more": ("exclusive",)}, False),
        ({}, False),
    ],
)
def test_gpus_without_a_number_of_cores_are_pointed_out(tmp_path: Path, changes: dict[str, object], said: bool) -> None:
    made = submit(request(**changes), tmp_path, PROGRAM, dry_run=True)
    assert any("--cpus-per-task" in line for line in made.sentences()) == said


def test_a_submitit_that_does_not_show_its_script_refuses_the_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("submitit.SlurmExecutor._submitit_command_str")
    monkeypatch.delattr("submitit.core.core.PicklingExecutor._submitit_command_str")
    with pytest.raises(UserError, match="--dry-run: this release of submitit does not show its script"):
        submit(request(), tmp_path, PROGRAM, dry_run=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stage": "train-cnn", "array": 2}, "only extract"),
        ({"array": 2, "gpus_per_node": 2}, "each task runs in one process"),
        ({"stage": "evaluate", "nodes": 2}, "runs in one process"),
        ({"more": ("output=x",)}, "is set by submit itself"),
        ({"more": ("mem=4G",)}, "--mem-gb"),
        ({"more": ("comment=a\n#SBATCH --wrap=x",)}, "expected KEY=VALUE"),
        ({"more": ("qos=",)}, "expected KEY=VALUE"),
        ({"time_min": 1}, "the signal to stop is sent 90 s before"),
        ({"more": ("signal_delay_s=x",)}, "are too short"),
    ],
)
def test_requests_that_make_no_sense(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        submit(request(**changes), tmp_path, PROGRAM, dry_run=True)


def test_without_submitit_or_cluster_a_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch"):
        submit(request(), tmp_path / "run", PROGRAM)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[slurm\]'"):
        submit(request(), tmp_path / "run", PROGRAM)
    assert not (tmp_path / "run").exists()


def sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A machine whose only command is this one."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "sbatch"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 4711"), OSError("No username set")])
def test_a_user_without_a_name_is_recorded_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def nameless() -> str:
        raise error

    sbatch(tmp_path, monkeypatch, "echo Submitted batch job 7")
    monkeypatch.setattr("getpass.getuser", nameless)
    done = submit(request(), tmp_path / "run", PROGRAM)
    assert done.job_ids == ("7",)
    record = json.loads((done.folder / "submission.json").read_text())
    assert (record["user"], record["job_ids"]) == (str(os.getuid()), ["7"])


def test_a_failed_submission_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch(tmp_path, monkeypatch, "echo 'sbatch: error: no such partition' >&2; exit 1")
    with pytest.raises(UserError, match=r"^sbatch refused: no such partition$"):
        submit(request(), tmp_path / "run", PROGRAM)
    assert not (tmp_path / "run").exists()
    (tmp_path / "bin" / "sbatch").write_text("#!/gone\n")
    with pytest.raises(UserError, match=r"^sbatch cannot be run: No such file"):
        submit(request(), tmp_path / "run", PROGRAM)
    assert not (tmp_path / "run").exists()


def test_files_are_kept_if_a_job_may_have_been_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch(tmp_path, monkeypatch, "echo Welcome to the cluster")
    with pytest.raises(UserError, match=r"reported no job id .*squeue --me"):
        submit(request(), tmp_path / "said", PROGRAM)
    assert list(tmp_path.glob("said/slurm/*-extract/*.pkl"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
    monkeypatch.setattr("submitit.core.utils.JobPaths.move_temporary_file", full)
    with pytest.raises(OSError, match="No space left"):
        submit(request(), tmp_path / "run", PROGRAM)
    assert list(tmp_path.glob("run/slurm/*-extract/*.pkl"))


# A job's process as submitit starts it: with submitit's signal handler, and with a fake cluster.
JOB = """
import os, sys, threading, signal
from pathlib import Path
from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import DelayedSubmission, JobPaths
from commands.slurm import StageCommand

class Environment(JobEnvironment):
    _env = {}
    def __new__(cls): return object.__new__(cls)
    raw_job_id = job_id = "7"
    global_rank = 0
    def _requeue(self, countdown): print("requeued", flush=True)

folder = Path(sys.argv[1])
command = StageCommand((sys.executable, "-c", sys.argv[2]), folder, int(sys.argv[3]), 20.0, hold_s=float(sys.argv[4]))
delayed = DelayedSubmission(command)
delayed.set_timeout(60, 5)
Environment()._handle_signals(JobPaths(folder, "7", 0), delayed)
delayed.result()
print("succeeded", flush=True)
"""
STAGE = """
import os, signal, sys, time
from pathlib import Path
from engine.stopping import Stopped, watch_signals
try:
    with watch_signals() as stop:
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
            stop.raise_if_set()
except Stopped as stopped:
    Path("saved").write_text(str(stopped))
    sys.exit(stopped.exit_code)
"""


def start_job(folder: Path, stage: str, requeues: int = 3, hold_s: float = 60.0) -> subprocess.Popen[str]:
    """The job in a process group of its own, as Slurm's signals reach all of a job's processes."""
    project = Path(__file__).resolve().parent.parent.parent
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(folder), textwrap.dedent(stage), str(requeues), str(hold_s)],
        env={**os.environ, "PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def send_when_ready(job: subprocess.Popen[str], number: int) -> tuple[int, str, str]:
    try:
        return _send_when_ready(job, number)
    finally:  # a stage must not outlive its test
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def _send_when_ready(job: subprocess.Popen[str], number: int) -> tuple[int, str, str]:
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    os.killpg(job.pid, number)
    out, errors = job.communicate(timeout=280)
    said = [line for line in out.splitlines() if not line.startswith("submitit ")]
    return job.returncode, " ".join(said), errors


def test_at_the_time_limit_the_stage_saves_and_the_job_is_requeued(tmp_path: Path) -> None:
    from submitit.core.utils import DelayedSubmission

    code, out, errors = send_when_ready(start_job(tmp_path, STAGE), signal.SIGUSR2)
    assert (code, out) == (255, "requeued"), errors
    assert (tmp_path / "saved").read_text() == "stopped by SIGTERM"
    again = DelayedSubmission.load(tmp_path / "7_submitted.pkl").function
    assert isinstance(again, StageCommand)
    assert (again.requeues, again.max_requeues, again.folder) == (1, 3, tmp_path)


def test_the_limit_of_requeues_ends_the_job_with_the_stage_s_code(tmp_path: Path) -> None:
    code, out, errors = send_when_ready(start_job(tmp_path, STAGE, requeues=0), signal.SIGUSR2)
    assert (code, out) == (75, ""), errors
    assert "requeued 0 times, which is the limit" in errors
    assert (tmp_path / "saved").exists()


def test_a_stage_stopped_from_outside_waits_for_slurm_and_is_not_requeued(tmp_path: Path) -> None:
    code, out, errors = send_when_ready(start_job(tmp_path, STAGE, hold_s=0.2), signal.SIGTERM)
    assert (code, out) == (75, ""), errors
    assert "Slurm neither ended nor requeued" in errors
    assert (tmp_path / "saved").exists()
    assert HOLD_S > 60


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)])
def test_a_stage_that_fails_gives_the_job_its_code(tmp_path: Path, ends: str, code: int) -> None:
    job = start_job(tmp_path, f"import os, sys; {ends}")
    _, errors = job.communicate(timeout=280)
    assert job.returncode == code, errors


def test_a_stage_that_succeeds_while_being_stopped_has_succeeded(tmp_path: Path) -> None:
    stage = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    print("ready", flush=True)
    time.sleep(60)
    """
    code, out, errors = send_when_ready(start_job(tmp_path, stage), signal.SIGUSR2)
    assert (code, out) == (0, "succeeded"), errors
