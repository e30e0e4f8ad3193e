"""Read what launchers of several ranks (torchrun, srun, `--devices`) set, and start the ranks for `--devices`."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass

from configs.errors import UserError

GRACE_S = 30.0  # how long the other ranks may take to exit after one has failed, and again after SIGTERM
LAST_WORDS_S = 2.0  # how long ranks may take to remove temporary files after a second Ctrl-C
FIRST_PORT, PORTS = 15000, 20000
LAUNCHER_PID = "SURGSTAGE_LAUNCHER_PID"  # variable with the PID of the process that started this rank (--devices)
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # variable that torchrun and --devices set


@dataclass(frozen=True)
class Launch:
    """This process's rank, the number of ranks (world size), and its rank among those on this machine."""

    rank: int
    count: int
    local_rank: int


def launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read rank and world size as set by torchrun, `--devices` or srun; without these, this is a single process.

    A batch script of Slurm is a single process too, however many tasks it requested: only srun sets
    `SLURM_STEP_NUM_TASKS`. Raises UserError if the variables are not numbers or the rank is not below the world size.
    """
    found = os.environ if environment is None else environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in found for name in names):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if not all(name in found for name in names):
        return Launch(0, 1, 0)
    try:
        rank, count, local = (int(found[name]) for name in names)
    except ValueError:
        rank, count, local = -1, 0, 0
    if not 0 <= rank < count:
        raise UserError(", ".join(f"{name}={found[name]}" for name in names) + ": not what a launcher sets; unset them")
    return Launch(rank, count, local)


def permitted_cores() -> int:
    """Return the number of cores that this process may run on, even if other processes share them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cores(environment: Mapping[str, str] | None = None) -> int:
    """Return this process's share of the cores: those it may run on, divided by the ranks that share them.

    Ranks of torchrun and `--devices` share all cores of the machine; srun gives each task its own.
    """
    found = os.environ if environment is None else environment
    return max(1, permitted_cores() // (ranks_here(found) if AGENT_STORE in found else 1))


def ranks_here(environment: Mapping[str, str] | None = None) -> int:
    """Number of ranks on this machine."""
    found = (os.environ if environment is None else environment).get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(found) if found.isdecimal() else 1)


def set_torchrun_variables(environment: MutableMapping[str, str] | None = None) -> None:
    """Set torchrun's environment variables in an srun task, since torch and Accelerate read them.

    Every task computes the same address and port: the address is that of the step's first machine, and the port depends
    on the job, so that two jobs on one machine are unlikely to collide. Variables that are already set are kept, for
    example MASTER_ADDR to select another network.
    """
    found = os.environ if environment is None else environment
    here = launch(found)
    if here.count == 1 or "RANK" in found:
        return
    job, step = (int(found.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    machines = int(found.get("SLURM_STEP_NUM_NODES", "1"))
    variables = {
        "MASTER_ADDR": first_host(found.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(FIRST_PORT + (job * 31 + step) % PORTS),
        "RANK": str(here.rank),
        "WORLD_SIZE": str(here.count),
        "LOCAL_RANK": str(here.local_rank),
        "LOCAL_WORLD_SIZE": str(-(-here.count // machines)),
        "OMP_NUM_THREADS": found.get("SLURM_CPUS_PER_TASK", "1"),
    }
    for name, value in variables.items():
        found.setdefault(name, value)


def first_host(hosts: str) -> str:
    """Return the first machine of a Slurm node list: gpu03 for `gpu[03-05,09],big1`."""
    first = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", hosts.strip())
    assert first is not None  # every part may be empty
    return first.group(1) + (first.group(2) or "") + first.group(3)


def is_main_process() -> bool:
    """Whether this process is rank 0 (or the only process), which prints on behalf of all ranks."""
    try:
        return launch().rank == 0
    except UserError:
        return True


def launcher_died() -> bool:
    """Whether the parent process that started this rank with `--devices` has died."""
    return LAUNCHER_PID in os.environ and os.getppid() != int(os.environ[LAUNCHER_PID])


def run_copies(command: list[str], count: int) -> int:
    """Run `command` as `count` ranks on this machine and return the most informative exit code.

    Signals that this process receives are passed on to every rank. When a rank fails, the others have `GRACE_S` seconds
    to exit by themselves; then they get SIGTERM, and later SIGKILL. After a second Ctrl-C they have `LAST_WORDS_S`.

    The exit code is 0 if no rank failed, and 130 after a second Ctrl-C. If a rank was killed by a signal, it is 128 +
    the signal's number. Otherwise it is the smallest exit code among the ranks that had failed when the first failure
    was noticed.
    """
    import torch.distributed as dist

    from engine.stopping import EXIT_INTERRUPTED, STOP_SIGNALS

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # any free port
    shared = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        AGENT_STORE: "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, permitted_cores() // count)),
        LAUNCHER_PID: str(os.getpid()),
    }
    ranks = _Ranks()
    before = {number: signal.signal(number, ranks.on_signal) for number in STOP_SIGNALS}
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.start(command, {**os.environ, **shared, **own})
        failed = [code for code in ranks.wait(lambda codes: any(codes) or None not in codes) if code]
        codes = ranks.wait(_all_ended, GRACE_S)  # the other ranks notice the failure and exit with the same code
        if ranks.interrupted_twice and any(code != 0 for code in codes):
            return EXIT_INTERRUPTED
        # a killed rank is the cause of the others' failures
        code = min(failed, key=lambda one: (one > 0, one), default=0)
        return 128 - code if code < 0 else code
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            ranks.end(number)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


Codes = list[int | None]  # exit codes of the ranks, None for a rank that is still running


def _all_ended(codes: Codes) -> bool:
    return None not in codes


class _Ranks:
    """The ranks that `run_copies` has started, and the received signals that are still to be passed on to them."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._arrived: list[int] = []
        self._interrupts = 0
        self._leave_by = math.inf

    @property
    def interrupted_twice(self) -> bool:
        """Whether a second Ctrl-C has arrived. Then the launcher no longer waits for ranks to save their work."""
        return self._interrupts > 1

    def start(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Start a rank in a session of its own, so that it receives Ctrl-C only once, from this process."""
        self._running.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def on_signal(self, number: int, frame: object) -> None:
        """Record a received signal (the signal handler); `wait` passes it on to the ranks."""
        self._arrived.append(number)
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts == 2:
            self._leave_by = time.monotonic() + LAST_WORDS_S

    def wait(self, done: Callable[[Codes], bool], timeout_s: float = math.inf) -> Codes:
        """Pass signals on until `done` is true of the exit codes, and return the exit codes.

        Returns early after `timeout_s` seconds, or `LAST_WORDS_S` seconds after a second Ctrl-C.
        """
        deadline = time.monotonic() + timeout_s
        while not done(codes := [rank.poll() for rank in self._running]):
            if time.monotonic() > min(deadline, self._leave_by):
                break
            while self._arrived:
                number = self._arrived.pop(0)
                for rank in self._running:
                    rank.send_signal(number)
            time.sleep(0.1)
        return codes

    def end(self, number: int) -> None:
        """Send a signal to the ranks that are still running and to their children, and wait until they end."""
        for rank in self._running:
            if rank.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(rank.pid, number)
        if number == signal.SIGKILL:
            self._leave_by = math.inf  # no time limit is needed: a killed process ends at once
        self.wait(_all_ended, GRACE_S)
