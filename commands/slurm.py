"""Stages as Slurm jobs through submitit: what is submitted, and what runs inside the job.

Inside a job submitit handles SIGUSR2, which Slurm sends before the time limit (and before preemption on clusters that
are configured so), and requeues the job. The stage runs as a child process under its usual signal handlers, so that it
stops between steps and writes `last.pt` as everywhere else; a requeued job starts the same command, which resumes
there. Nothing here imports torch.
"""

from __future__ import annotations

import getpass
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from io import StringIO
from pathlib import Path
from typing import Any

from commands.options import SHARED_STAGES
from configs.errors import UserError, one_line
from engine.files import make_folder, write_json
from engine.runs import git_revision
from engine.stopping import EXIT_PREEMPTED

SIGNAL_DELAY_S = 90  # between Slurm's signal and the time limit; submitit's default
# The part of the delay that is kept for requeueing after the stage has saved.
_REQUEUE_S = 10
# How long a job stays after SIGTERM for Slurm, which ends or requeues it when its grace time is over. A job that exits
# by itself during the grace time of a preemption counts as failed and is never requeued.
HOLD_S = 300.0
# Exit codes of a stage that can resume: it has saved, or was stopped before its signal handlers were installed.
_CAN_RESUME = (EXIT_PREEMPTED, -signal.SIGTERM)
_SET_BY_SUBMIT = {"error", "job_id", "map_count", "no_requeue", "open_mode", "output", "requeue", "setup", "signal"}
_SET_BY_SUBMIT |= {"srun_args", "teardown", "use_srun"}
_SUBMITIT_KNOWS = {"account", "array_parallelism", "comment", "constraint", "cpus_per_gpu", "dependency", "exclude"}
_SUBMITIT_KNOWS |= {"exclusive", "gres", "job_name", "mem_per_cpu", "mem_per_gpu", "nodelist", "qos", "signal_delay_s"}
_SUBMITIT_KNOWS |= {"wckey"}
_AS_OPTIONS = {
    "--partition": ("partition",),
    "--gpus-per-node": ("gpus_per_node", "ntasks_per_node", "tasks_per_node"),
    "--nodes": ("nodes",),
    "--cpus-per-task": ("cpus_per_task",),
    "--mem-gb": ("mem", "mem_gb"),
    "--time": ("time", "timeout_min"),
    "--array": ("array",),
}
# A default number could exceed what the cluster allows per GPU, and sbatch would then refuse the job.
_FEW_CORES = (
    "note: no --cpus-per-task: most clusters then give each process one core, and frames then come too slowly for "
    "a GPU; --cpus-per-task 8 or more is usual"
)
# Why `--slurm KEY=VALUE` is refused, by key.
_REFUSED = dict.fromkeys(_SET_BY_SUBMIT, "is set by submit itself; leave it out") | {
    key: f"has an option of its own, {option}" for option, keys in _AS_OPTIONS.items() for key in keys
}


# ---------------------------------------------------------------------------------------------- inside the job


@dataclass
class StageCommand:
    """What a job runs: a stage as a child process, in the folder from which it was submitted.

    submitit calls it in every process of the job, and `checkpoint` in a signal handler of the first. `patience_s` is
    how long the stage may take to save. submitit pickles instances at submission and when it requeues.
    """

    arguments: tuple[str, ...]
    folder: Path
    max_requeues: int
    patience_s: float
    hold_s: float = HOLD_S
    requeues: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self) -> None:
        """Run the stage to its end and exit with its code (SystemExit), so that 2 does not requeue the job."""
        from submitit.core.utils import UncompletedJobError

        self._start()
        try:
            self._wait()
            if self._exit_code() in _CAN_RESUME:
                _say(f"the stage was stopped and can resume; waiting up to {self.hold_s:.0f} s for Slurm")
                time.sleep(self.hold_s)
                _say("Slurm did nothing, so the job ends here; submit it again to resume")
        except UncompletedJobError:  # raised by submitit's handler where `checkpoint` returned None
            if self._exit_code() is None:
                raise
        self._leave()

    def checkpoint(self) -> Any:
        """Stop the stage, wait until it has saved, and return what the requeued job runs; None not to requeue.

        A stage that is still in a long step after `patience_s` resumes from its previous checkpoint.
        """
        from submitit.helpers import DelayedSubmission

        code = self._stop()
        if code is not None and code not in _CAN_RESUME:
            return None  # it has finished or failed: there is nothing to resume
        if self.requeues >= self.max_requeues:
            _say(f"requeued {self.requeues} times, which is the limit; submit again to resume, or raise --max-requeues")
            return None
        again = replace(self, requeues=self.requeues + 1)
        _say(f"the stage has {'not ended yet' if code is None else 'saved'}; requeue {again.requeues}")
        return DelayedSubmission(again)

    def _start(self) -> None:
        """Start the child with SIGUSR2 blocked, which Slurm sends to every process of a job and which would end it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        try:
            self._process = subprocess.Popen(self.arguments, cwd=self.folder)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _wait(self) -> None:
        """Wait for the child without reaping it, so that the handler, which may interrupt this, can wait as well."""
        assert self._process is not None
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)

    def _exit_code(self) -> int | None:
        """The child's exit code, or minus the number of the signal that ended it; None while it runs or before."""
        if self._process is None:
            return None
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def _stop(self) -> int | None:
        """Ask the child to stop and wait for it: its exit code, or None if it still runs after `patience_s`."""
        if self._process is None:
            return EXIT_PREEMPTED
        code = self._exit_code()
        if code is None:
            os.kill(self._process.pid, signal.SIGTERM)
        limit = time.monotonic() + self.patience_s
        while code is None and time.monotonic() < limit:
            time.sleep(0.1)
            code = self._exit_code()
        return code

    def _leave(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        if code:
            raise SystemExit(code if code > 0 else 128 - code)


def _say(text: str) -> None:
    print(f"surgstage: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- submitting


@dataclass(frozen=True)
class Request:
    """What `submit` was given. `more` holds further options of sbatch as KEY=VALUE, or KEY for a flag."""

    stage: str
    arguments: tuple[str, ...]
    time_min: int
    partition: str | None = None
    gpus_per_node: int | None = None
    nodes: int = 1
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    array: int | None = None
    more: tuple[str, ...] = ()
    max_requeues: int = 30


@dataclass(frozen=True)
class Submission:
    """A submission: the folder of its files, the command of each job (or task of an array), and job ids once known.

    `script` is what sbatch would be given, for a dry run alone; otherwise it is empty, and a file in `folder`.
    """

    folder: Path
    script: str
    commands: tuple[tuple[str, ...], ...]
    parameters: dict[str, Any]
    job_ids: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """What a user needs to know: before submission the commands, afterwards how to follow and stop the jobs."""
        notes = [_FEW_CORES] if self._leaves_cores_to_slurm() else []
        if not self.job_ids:
            return [*notes, *(f"command: {shlex.join(command)}" for command in self.commands)]
        jobs = self.job_ids[0].partition("_")[0]
        return [
            *notes,
            f"submitted: job {', '.join(self.job_ids)}; script, command and parameters in {self.folder}",
            f"follow:    squeue --jobs={jobs}; tail -F {shlex.quote(str(self.folder))}/*_log.*",
            f"stop:      scancel {jobs}",
        ]

    def _leaves_cores_to_slurm(self) -> bool:
        given = self.parameters.keys() | self.parameters["additional_parameters"].keys()
        wants_gpus = any(key.startswith("gpus") or key == "gres" for key in given)
        return wants_gpus and given.isdisjoint({"cpus_per_task", "cpus_per_gpu", "exclusive"})


def submit(request: Request, run: Path, program: Path, *, dry_run: bool = False) -> Submission:
    """Submit a stage as a Slurm job, or an array of N that extract every N-th video each.

    Each submission has its own folder `<run>/slurm/<time>-<stage>/` with the script, the pickled command,
    `submission.json` (command, parameters, job ids) and, later, the logs. With `dry_run` nothing is written, and no
    cluster is needed. Raises UserError for contradictory options, without submitit, outside a cluster, and with
    sbatch's message if it refuses.
    """
    parameters = _parameters(request)
    delay_s = parameters["signal_delay_s"]
    base = (sys.executable, str(program), request.stage, *request.arguments)
    shards = [("--shard", f"{number}/{request.array}") for number in range(request.array)] if request.array else [()]
    commands = tuple((*base, *shard) for shard in shards)
    submitit = _submitit()
    if not dry_run and shutil.which("sbatch") is None:
        raise UserError("submit: this machine has no sbatch; submit from a login node of the cluster (or --dry-run)")
    folder = _new_folder(run / "slurm", request.stage, make=not dry_run)
    executor = _executor(submitit, folder, request, parameters)
    submission = Submission(folder, _script(executor, request.array) if dry_run else "", commands, parameters)
    if dry_run:
        return submission
    patience_s = float(max(1, delay_s - _REQUEUE_S))
    jobs = [StageCommand(command, Path.cwd(), request.max_requeues, patience_s) for command in commands]
    record = _record(request, submission)  # before there is a job, since it may fail
    try:
        with redirect_stderr(StringIO()):  # submitit also prints what it raises
            job_ids = _send(executor, jobs)
    except Exception as error:
        problem = _why_nothing_was_submitted(error)
        if problem is not None:
            _remove_unused(folder, run)
            raise UserError(problem) from error
        if type(error).__name__ not in ("FailedJobError", "FailedSubmissionError"):
            raise
        raise UserError(
            f"sbatch named no job ({_message(error)}); check with `squeue --me` whether there is one and `scancel` it; "
            f"the script is in {folder}"
        ) from error
    write_json(folder / "submission.json", {"job_ids": list(job_ids), **record})
    return replace(submission, job_ids=job_ids)


def _why_nothing_was_submitted(error: Exception) -> str | None:
    """Why sbatch submitted nothing, in one line; None for an error after which there may be a job."""
    refused = isinstance(error.__cause__, subprocess.CalledProcessError)
    if type(error).__name__ == "FailedJobError" and refused:
        return f"sbatch refused: {_message(error)}"
    if isinstance(error, OSError) and error.filename == "sbatch":
        return f"sbatch cannot be run: {error.strerror}"
    return None


def _message(error: Exception) -> str:
    return one_line(str(error).replace("sbatch: error:", ""), most=None)


def _remove_unused(folder: Path, run: Path) -> None:
    """Delete the folder of a submission that failed, and the run's folder if that is empty now."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not empty
        folder.parent.rmdir()
        run.rmdir()


def parse_time_limit(text: str) -> int:
    """Minutes, rounded up, of a limit in Slurm's formats: `90`, `4:00:00`, `30:00` (minutes), `2-12:00:00`, `2-12`.

    Raises UserError for anything else, and for zero.
    """
    match = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,6}(?::\d{1,2}){0,2})", text.strip())
    if match is None:
        raise UserError(f"--time {text}: expected minutes, H:MM:SS or D-HH:MM:SS, for example 4:00:00")
    days, clock = match[1], [int(part) for part in match[2].split(":")]
    units_s = (3600, 60, 1) if days or len(clock) == 3 else (60, 1)
    seconds = 86400 * int(days or 0) + sum(part * unit_s for part, unit_s in zip(clock, units_s, strict=False))
    if seconds == 0:
        raise UserError(f"--time {text}: a job needs at least a minute")
    return -(-seconds // 60)


def _parameters(request: Request) -> dict[str, Any]:
    """The request as submitit's parameters. Raises UserError for contradictory options."""
    tasks = request.gpus_per_node or 1
    if tasks * request.nodes > 1:
        if request.stage not in SHARED_STAGES:
            raise UserError(f"{request.stage} runs in one process: leave out --nodes; --gpus-per-node may be 1")
        if request.array:
            raise UserError("--array: each task runs in one process: leave out --nodes; --gpus-per-node may be 1")
    if request.array and request.stage != "extract":
        raise UserError(f"--array: only extract can be split into independent parts, not {request.stage}")
    parameters: dict[str, Any] = {
        "job_name": request.stage,
        "time": request.time_min,
        "nodes": request.nodes,
        "ntasks_per_node": tasks,
        "partition": request.partition,
        "gpus_per_node": request.gpus_per_node,
        "cpus_per_task": request.cpus_per_task,
        "mem": None if request.mem_gb is None else f"{math.ceil(request.mem_gb * 1024)}M",
        "signal_delay_s": SIGNAL_DELAY_S,
    }
    parameters = {key: value for key, value in parameters.items() if value is not None}
    parameters["wckey"] = None  # submitit's default is refused by clusters whose accounting has no such key
    if request.cpus_per_task:  # srun no longer inherits it from sbatch since Slurm 22.05
        parameters["srun_args"] = [f"--cpus-per-task={request.cpus_per_task}"]
    parameters |= _more(request.more)
    delay_s = parameters["signal_delay_s"]
    if not isinstance(delay_s, int) or not 0 < delay_s < 60 * request.time_min:
        raise UserError(
            f"--time: {request.time_min} min leaves no room for the signal {delay_s} s before it; "
            "set a longer limit, or fewer seconds with --slurm signal_delay_s=N"
        )
    return parameters


def _more(options: Sequence[str]) -> dict[str, Any]:
    """`--slurm KEY=VALUE` as a parameter of submitit if it has that one, otherwise of sbatch."""
    found: dict[str, Any] = {}
    rest: dict[str, Any] = {"requeue": True}
    for option in options:
        name, equals, text = option.partition("=")
        key = name.strip().lstrip("-").replace("-", "_")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", key) or not text.isprintable() or (equals and not text):
            raise UserError(f"--slurm {option!r}: expected KEY=VALUE, an option of sbatch, for example qos=high")
        if key in _REFUSED:
            raise UserError(f"--slurm {option}: {_REFUSED[key]}")
        value: Any = True if not equals else int(text) if text.isdecimal() else text
        (found if key in _SUBMITIT_KNOWS else rest)[key] = value
    return found | {"additional_parameters": rest}


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError("submit: needs submitit; in the checkout: pip install -e '.[slurm]'") from error
    return submitit


def _executor(submitit: Any, folder: Path, request: Request, parameters: Mapping[str, Any]) -> Any:
    """submitit's executor for one submission; unlike its base class, it can be created without a cluster."""

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
        @classmethod
        def affinity(cls) -> int:
            return 2

    # the job unpickles StageCommand, so it must import this checkout, wherever it was submitted from
    home = shlex.quote(str(Path(__file__).resolve().parent.parent))
    executor = Executor(folder=folder, max_num_timeout=request.max_requeues)
    executor.update_parameters(**parameters, setup=[f'export PYTHONPATH={home}"${{PYTHONPATH:+:$PYTHONPATH}}"'])
    return executor


def _script(executor: Any, array: int | None) -> str:
    """The script that submitit will give to sbatch. Raises UserError if this release of submitit does not show it."""
    try:
        executor.parameters |= {"map_count": array} if array else {}
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"--dry-run: this release of submitit does not show its script ({one_line(error)}); submit without it, "
            "the script is then in RUN/slurm"
        ) from error


def _send(executor: Any, jobs: Sequence[StageCommand]) -> tuple[str, ...]:
    """Submit; several become one array. Returns job ids."""
    if len(jobs) == 1:
        return (str(executor.submit(jobs[0]).job_id),)
    with executor.batch():
        sent = [executor.submit(job) for job in jobs]
    return tuple(str(job.job_id) for job in sent)


def _new_folder(parent: Path, stage: str, *, make: bool) -> Path:
    """A folder for one submission: time and stage, and a number if several are made in one second."""
    name = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{stage}"
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        if not make:
            return folder.absolute()
        make_folder(parent)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder.absolute()
    raise UserError(f"{parent}: too many submissions in one second; try again")


def _user() -> str:
    """The name of the user, or the number of a user without a name, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _record(request: Request, submission: Submission) -> dict[str, Any]:
    """The contents of `submission.json` without the job ids."""
    return {
        "submitted": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "user": _user(),
        "git_revision": git_revision(),
        "folder": str(Path.cwd()),
        "commands": [list(command) for command in submission.commands],
        "request": asdict(request),
        "parameters": submission.parameters,
    }
