"""Submit stages as Slurm jobs with submitit, and run them inside the job.

Slurm sends SIGUSR2 to a job before its time limit (and before preemption, on clusters that are configured so). Inside
the job, submitit handles this signal and requeues the job. The stage itself runs as a child process with its usual
signal handlers, so that it stops between steps and writes `last.pt`. The requeued job starts the same command, which
resumes there. Nothing here imports torch.
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

SIGNAL_DELAY_S = 90  # time from Slurm's signal to the time limit; submitit's default
# The part of that time that is reserved for requeueing, after the stage has saved.
_REQUEUE_S = 10
# How long a job waits after SIGTERM for Slurm to end or requeue it when the grace time is over. If a job exits by
# itself during the grace time of a preemption, Slurm counts it as failed and never requeues it.
HOLD_S = 300.0
# Exit codes of a stage that can resume: it has saved its state, or was stopped before it installed signal handlers.
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
# There is no default for --cpus-per-task: it could exceed what the cluster allows per GPU, and sbatch would refuse.
_FEW_CORES = (
    "note: without --cpus-per-task, most clusters give each process one core, which decodes frames too slowly for a "
    "GPU; --cpus-per-task 8 or more is usual"
)
# For each key of `--slurm KEY=VALUE` that is refused, the reason.
_REFUSED = dict.fromkeys(_SET_BY_SUBMIT, "is set by submit itself; leave it out") | {
    key: f"has an option of its own, {option}" for option, keys in _AS_OPTIONS.items() for key in keys
}


# ---------------------------------------------------------------------------------------------- inside the job


@dataclass
class StageCommand:
    """The function that a job runs: a stage as a child process, in the folder from which the job was submitted.

    submitit calls the object in every process of the job, and calls `checkpoint` from a signal handler in the first
    one. `patience_s` is how long the stage may take to save. submitit pickles the object when it submits or requeues.
    """

    arguments: tuple[str, ...]
    folder: Path
    max_requeues: int
    patience_s: float
    hold_s: float = HOLD_S
    requeues: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self) -> None:
        """Run the stage to its end, and exit with its code (SystemExit): a job that exits with 2 is not requeued."""
        from submitit.core.utils import UncompletedJobError

        self._start()
        try:
            self._wait()
            if self._exit_code() in _CAN_RESUME:
                _say(f"the stage was stopped and can resume; waiting up to {self.hold_s:.0f} s for Slurm")
                time.sleep(self.hold_s)
                _say("Slurm neither ended nor requeued the job, so it ends here; submit it again to resume")
        except UncompletedJobError:  # raised by submitit's signal handler if `checkpoint` returned None
            if self._exit_code() is None:
                raise
        self._leave()

    def checkpoint(self) -> Any:
        """Stop the stage, wait until it has saved, and return what the requeued job will run.

        Returns None if the job is not to be requeued. If the stage has not saved within `patience_s`, it will resume
        from its previous checkpoint.
        """
        from submitit.helpers import DelayedSubmission

        code = self._stop()
        if code is not None and code not in _CAN_RESUME:
            return None  # it has finished or failed: there is nothing to resume
        if self.requeues >= self.max_requeues:
            _say(f"requeued {self.requeues} times, which is the limit (--max-requeues); submit it again to resume")
            return None
        again = replace(self, requeues=self.requeues + 1)
        _say(f"the stage has {'not ended yet' if code is None else 'saved'}; requeue {again.requeues}")
        return DelayedSubmission(again)

    def _start(self) -> None:
        """Start the child with SIGUSR2 blocked, since Slurm sends it to all processes and it would end the child."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        try:
            self._process = subprocess.Popen(self.arguments, cwd=self.folder)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _wait(self) -> None:
        """Wait for the child without reaping it, so that a signal handler that interrupts this can wait for it too."""
        assert self._process is not None
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)

    def _exit_code(self) -> int | None:
        """Return the child's exit code, or minus the number of the signal that ended it.

        Returns None if the child is still running or has not been started.
        """
        if self._process is None:
            return None
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def _stop(self) -> int | None:
        """Ask the child to stop, and return its exit code, or None if it is still running after `patience_s`."""
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
    """The options of `submit`. `more` contains further options of sbatch as KEY=VALUE, or KEY for a flag."""

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
    """A submission: the folder of its files, the command of each job (or array task), and the job ids once known.

    After a dry run, `script` is the script that sbatch would get. Otherwise it is empty, and the script is in `folder`.
    """

    folder: Path
    script: str
    commands: tuple[tuple[str, ...], ...]
    parameters: dict[str, Any]
    job_ids: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """Return lines for the user: after a dry run the commands, otherwise how to follow and stop the jobs."""
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
    """Submit a stage as a Slurm job, or as an array of N jobs that each extract every N-th video.

    Each submission has its own folder `<run>/slurm/<time>-<stage>/`, with the script, the pickled command,
    `submission.json` (command, parameters, job ids) and, later, the logs. With `dry_run`, nothing is written and no
    cluster is needed. Raises UserError if options contradict each other, if submitit is not installed, or if this is
    not a cluster. If sbatch refuses the job, the UserError contains its message.
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
    record = _record(request, submission)  # this may fail, so it comes before the job is submitted
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
            f"sbatch reported no job id ({_message(error)}); if `squeue --me` lists the job, `scancel` it; "
            f"the script is in {folder}"
        ) from error
    write_json(folder / "submission.json", {"job_ids": list(job_ids), **record})
    return replace(submission, job_ids=job_ids)


def _why_nothing_was_submitted(error: Exception) -> str | None:
    """Explain in one line why sbatch submitted nothing; None if there may be a job in spite of the error."""
    refused = isinstance(error.__cause__, subprocess.CalledProcessError)
    if type(error).__name__ == "FailedJobError" and refused:
        return f"sbatch refused: {_message(error)}"
    if isinstance(error, OSError) and error.filename == "sbatch":
        return f"sbatch cannot be run: {error.strerror}"
    return None


def _message(error: Exception) -> str:
    return one_line(str(error).replace("sbatch: error:", ""), most=None)


def _remove_unused(folder: Path, run: Path) -> None:
    """Delete the folder of a failed submission, and the run's folder if it is empty then."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not empty
        folder.parent.rmdir()
        run.rmdir()


def parse_time_limit(text: str) -> int:
    """Return the minutes, rounded up, of a time limit in one of Slurm's formats.

    The formats are `90` (minutes), `30:00` (minutes:seconds), `4:00:00`, `2-12` (days-hours) and `2-12:00:00`. Raises
    UserError for anything else, and for zero.
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
    """Return submitit's parameters for a request. Raises UserError if options contradict each other."""
    tasks = request.gpus_per_node or 1
    if tasks * request.nodes > 1:
        if request.stage not in SHARED_STAGES:
            raise UserError(f"{request.stage} runs in one process: leave out --nodes, and --gpus-per-node above 1")
        if request.array:
            raise UserError("--array: each task runs in one process: leave out --nodes, and --gpus-per-node above 1")
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
    parameters["wckey"] = None  # clusters whose accounting does not have submitit's default key would refuse the job
    if request.cpus_per_task:  # since Slurm 22.05, srun does not inherit this option from sbatch
        parameters["srun_args"] = [f"--cpus-per-task={request.cpus_per_task}"]
    parameters |= _more(request.more)
    delay_s = parameters["signal_delay_s"]
    if not isinstance(delay_s, int) or not 0 < delay_s < 60 * request.time_min:
        raise UserError(
            f"--time: {request.time_min} min are too short, since the signal to stop is sent {delay_s} s before the "
            "limit; set a longer limit, or fewer seconds with --slurm signal_delay_s=N"
        )
    return parameters


def _more(options: Sequence[str]) -> dict[str, Any]:
    """Return the options `--slurm KEY=VALUE` as parameters of submitit where it has them, otherwise of sbatch."""
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
    """Return an executor of submitit for one submission, which also works on a machine without Slurm (dry run)."""

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
        @classmethod
        def affinity(cls) -> int:
            return 2

    # the job unpickles StageCommand, so this checkout must be on its path, from whichever folder it is submitted
    home = shlex.quote(str(Path(__file__).resolve().parent.parent))
    executor = Executor(folder=folder, max_num_timeout=request.max_requeues)
    executor.update_parameters(**parameters, setup=[f'export PYTHONPATH={home}"${{PYTHONPATH:+:$PYTHONPATH}}"'])
    return executor


def _script(executor: Any, array: int | None) -> str:
    """Return the script that submitit would give to sbatch.

    Raises UserError if the installed release of submitit does not offer that.
    """
    try:
        executor.parameters |= {"map_count": array} if array else {}
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"--dry-run: this release of submitit does not show its script ({one_line(error)}); submit without "
            "--dry-run and find the script in RUN/slurm"
        ) from error


def _send(executor: Any, jobs: Sequence[StageCommand]) -> tuple[str, ...]:
    """Submit one job, or several as one array, and return the job ids."""
    if len(jobs) == 1:
        return (str(executor.submit(jobs[0]).job_id),)
    with executor.batch():
        sent = [executor.submit(job) for job in jobs]
    return tuple(str(job.job_id) for job in sent)


def _new_folder(parent: Path, stage: str, *, make: bool) -> Path:
    """Return a new folder for a submission, named by time and stage, and by a number if that name is taken.

    With `make`, the folder is created.
    """
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
    """Return the user's name, or the user's number if there is no name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _record(request: Request, submission: Submission) -> dict[str, Any]:
    """Return the content of `submission.json`, except for the job ids."""
    return {
        "submitted": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "user": _user(),
        "git_revision": git_revision(),
        "folder": str(Path.cwd()),
        "commands": [list(command) for command in submission.commands],
        "request": asdict(request),
        "parameters": submission.parameters,
    }
