"""One training on several processes: who is who, what they must agree on, and how a machine's own copies are started.

A launcher (torchrun, srun, `--devices`) says in the environment how many processes there are. Everything here costs
nothing where there is one: no more of torch.distributed is imported then than torch itself does.

Whatever can go wrong on one process alone (a video it cannot read, a signal that only it got, a loss that is not a
number) is exchanged before anybody goes on, so that all processes end at the same step with the same words.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from configs.errors import UserError

if TYPE_CHECKING:
    import torch

    from engine.stopping import StopRequest


Value = TypeVar("Value")

# How long a process waits for another one that is alive, for the longest thing that can be waited for: its part of the
# videos. One that has died is noticed at once, by its closed connections.
WAIT = timedelta(days=1)
MEETING_S = 600.0  # for all to have started
ANSWER_S = 5.0  # for a word about an error, where perhaps nobody keeps them
LOOK_EVERY_S = 1.0
FIRST_PORT, PORTS = 15000, 20000
COPY_OF = "SURGSTAGE_COPY_OF"  # number of the process that started this one with --devices
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # set by torchrun, and by --devices


@dataclass(frozen=True)
class Launch:
    """What a launcher says: this process's number among all, their count, its number on this machine."""

    rank: int
    count: int
    local_rank: int


def launch(environment: Mapping[str, str] | None = None) -> Launch:
    """What torchrun (or `--devices`) or srun says; one process alone where neither does.

    `SLURM_STEP_NUM_TASKS` is set by srun only: a batch script that runs beside its steps is one process, whatever it
    asked for. Raises UserError for numbers that make no sense.
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
    """Cores that this process may run on, with others or alone."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cores(environment: Mapping[str, str] | None = None) -> int:
    """Cores for this process: those it may run on, divided among the processes that a launcher started beside it.

    torchrun and `--devices` bind none to a core. A task of srun is bound to cores of its own.
    """
    found = os.environ if environment is None else environment
    beside = found.get("LOCAL_WORLD_SIZE", "1") if AGENT_STORE in found else "1"
    return max(1, permitted_cores() // max(1, int(beside) if beside.isdecimal() else 1))


def speak_torchrun(environment: MutableMapping[str, str] | None = None) -> None:
    """Add to a srun task's environment what torchrun would have set, so that libraries find it.

    Every task comes to the same address and port: the step's first machine, and a port that two jobs on one machine
    are unlikely to share. Variables that are set already stay (MASTER_ADDR, for a second network).
    """
    found = os.environ if environment is None else environment
    here = launch(found)
    if here.count == 1 or "RANK" in found:
        return
    job, step = (int(found.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    machines = int(found.get("SLURM_STEP_NUM_NODES", "1"))
    said = {
        "MASTER_ADDR": first_host(found.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(FIRST_PORT + (job * 31 + step) % PORTS),
        "RANK": str(here.rank),
        "WORLD_SIZE": str(here.count),
        "LOCAL_RANK": str(here.local_rank),
        "LOCAL_WORLD_SIZE": str(-(-here.count // machines)),
        "OMP_NUM_THREADS": found.get("SLURM_CPUS_PER_TASK", "1"),
    }
    for name, value in said.items():
        found.setdefault(name, value)


def first_host(hosts: str) -> str:
    """The first machine of a Slurm list: `gpu[03-05,09],big1` gives gpu03."""
    first = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", hosts.strip())
    assert first is not None  # every part may be empty
    return first.group(1) + (first.group(2) or "") + first.group(3)


# ---------------------------------------------------------------------------------------------- together


def one_process(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return tensor


class Failed(UserError):
    """An error that every process raises in the same words."""


class Processes:
    """The processes of one training. With one, every method is the identity.

    Exchanges go through a gloo group of their own, on the CPU, so that they never wait for a GPU's queue; only `total`
    works where its tensor is.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None, stop: StopRequest | None = None) -> None:
        self.rank, self.count, self._group, self._stop = rank, count, group, stop

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, items: list[Value]) -> list[Value]:
        """This process's part of what is divided: every `count`-th item."""
        return items[self.rank :: self.count]

    def merged(self, shares: list[list[Value]]) -> list[Value]:
        """Items in order again, from what `share` gave each process."""
        return [shares[place % self.count][place // self.count] for place in range(sum(map(len, shares)))]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor (no gradient) over processes."""
        if self.count == 1:
            return tensor
        import torch.distributed as dist

        summed = tensor.detach().clone()
        dist.all_reduce(summed)
        return summed

    def sums(self, *values: float) -> list[float]:
        """Sums of plain numbers over processes, in float64."""
        if self.count == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self._group)
        found: list[float] = summed.tolist()
        return found

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in order, on every process."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def from_first(self, work: Callable[[], Value]) -> Value:
        """What `work` gives on the first process, which alone does it; its UserError is everybody's."""
        if self.count == 1:
            return work()
        import torch.distributed as dist

        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = work()
            except UserError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said, src=0, group=self._group)
        if said[1] is not None:
            raise Failed(said[1])
        result: Value = said[0]
        return result

    def each(self, work: Callable[[], Value]) -> Value:
        """What `work` gives here, once it is done on every process; failures as in `together`."""
        mine: list[Value] = []
        self.together(lambda: mine.append(work()))
        return mine[0]

    def together(self, work: Callable[[], Value]) -> list[Value]:
        """What `work` gives on each process, in order; a UserError or a stop of one ends the others' work, too."""
        if self.count == 1:
            return [work()]
        from engine.stopping import Stopped

        value: Any = None
        error: str | None = None
        stopped = 0
        try:
            value = work()
        except UserError as problem:
            error = str(problem)
            if self._stop is not None:
                self._stop.ask_others(signal.SIGTERM)  # the others leave their parts, and hear why below
        except Stopped as stop:
            stopped = stop.number
        self._wait_for_all()
        found = self.gather((value, error, stopped))
        for _, problem_of_one, _ in found:
            if problem_of_one is not None:
                raise Failed(problem_of_one)
        number = max(stop_of_one for _, _, stop_of_one in found)
        if number:
            raise Stopped(number)
        return [value for value, _, _ in found]

    def _wait_for_all(self) -> None:
        """Wait in Python, where a signal is noticed and told to those who still work on their parts."""
        import torch
        import torch.distributed as dist

        waiting = dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)
        pause_s = 0.001
        while not waiting.is_completed():
            bool(self._stop)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)
        waiting.wait()

    def send_buffers(self, model: torch.nn.Module) -> None:
        """Running statistics of the first process to all: what checkpoints hold is what is validated."""
        if self.count == 1:
            return
        import torch.distributed as dist

        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def join(device: str, stop: StopRequest | None = None) -> Processes:
    """Meet the other processes that the launcher started; at once where there are none.

    From then on `stop` hears of signals that only another process got, also while each works on its own part. Raises
    UserError where they do not come together, with the words of the one that cannot come where there is one.
    """
    here = launch()
    if here.count == 1:
        return Processes()
    speak_torchrun()
    import torch.distributed as dist
    from accelerate import PartialState

    from engine.device import choose_device

    chosen = choose_device(device)
    try:
        board = _board(MEETING_S)
        if stop is not None:
            stop.ask_others = _exchange_of_signals(board)
        _meet(board, here, stop)
        PartialState(cpu=chosen.type == "cpu")
        group = dist.new_group(backend="gloo", timeout=WAIT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"process {here.rank} of {here.count} did not meet the others at {where}: {_line(error)}"
        ) from error
    return Processes(here.rank, here.count, group, stop)


# ---------------------------------------------------------------------------------------------- out of step


@cache
def _board(patience_s: float) -> Any:
    """The launcher's key-value store: words for processes that are not in step, or have not met.

    torchrun and `--devices` keep it; where srun started them, the first process does. Raises RuntimeError where there
    is none.
    """
    import torch.distributed as dist

    kept = os.environ.get(AGENT_STORE) == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not kept and launch().rank == 0,
        timeout=timedelta(seconds=patience_s),
        wait_for_workers=False,
        multi_tenant=True,  # the same server that torch will ask for
    )
    return dist.PrefixStore(f"surgstage/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _meet(board: Any, here: Launch, stop: StopRequest | None) -> None:
    """Wait for all to be here, so that one that never comes need not be waited for inside torch."""
    board.add("here", 1)
    deadline = time.monotonic() + MEETING_S
    while (found := board.add("here", 0)) < here.count:
        if stop is not None:
            stop.raise_if_set()
        if board.check(["error"]) and not board.check(["stop"]):
            raise Failed(board.get("error").decode())
        if time.monotonic() > deadline:
            raise RuntimeError(f"{found} of {here.count} came within {MEETING_S:.0f} s")
        time.sleep(0.1)


def _exchange_of_signals(board: Any) -> Callable[[int | None], int | None]:
    """A function that tells the others of this process's signal, or asks for theirs, now and then."""
    looked_at = 0.0
    told = False

    def exchange(own: int | None) -> int | None:
        nonlocal looked_at, told
        if told or (own is None and time.monotonic() - looked_at < LOOK_EVERY_S):
            return own
        looked_at = time.monotonic()
        with suppress(RuntimeError):  # whoever kept the board is gone, which the next exchange will tell
            if own is not None:
                board.set("stop", str(own))
                told = True
            elif board.check(["stop"]):
                return int(board.get("stop"))
        return signal.SIGTERM if own is None and parent_is_gone() else own

    return exchange


def speaks() -> bool:
    """Whether this process says what all have done: the first one, or the only one."""
    try:
        return launch().rank == 0
    except UserError:
        return True


def may_tell(problem: BaseException) -> bool:
    """Whether this process is to say why it ends: of several, the first that asks, which the others hear of.

    Where nobody keeps the board any more, each says its own; the first one what all say in the same words.
    """
    from engine.stopping import Stopped

    try:
        here = launch()
    except UserError:
        return True
    if here.count == 1:
        return True
    try:
        speak_torchrun()
        board = _board(ANSWER_S)
        mine = board.add("told", 1) == 1
        if mine:
            board.set("error", str(problem))
        if here.rank == 0:
            _stay_for(board, here.count)
    except (RuntimeError, ValueError):
        return here.rank == 0 or not isinstance(problem, (Failed, Stopped))
    return bool(mine)


def _stay_for(board: Any, count: int) -> None:
    """The first process may be the one that keeps the board: stay until all have asked, if they do soon."""
    deadline = time.monotonic() + LOOK_EVERY_S
    while board.add("told", 0) < count and time.monotonic() < deadline:
        time.sleep(0.05)


def lost_another(error: BaseException) -> bool:
    """Whether an error of the exchange means that another process has ended.

    torch has a type for what NCCL and its stores raise; gloo's errors are plain RuntimeErrors that begin with the place
    in its source.
    """
    if not isinstance(error, RuntimeError) or launch().count == 1:
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/transport/" in str(error)


def parent_is_gone() -> bool:
    """Whether the process that started this copy with `--devices` has died without telling."""
    return COPY_OF in os.environ and os.getppid() != int(os.environ[COPY_OF])


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------------------------------------- copies of this program


def run_copies(command: list[str], count: int) -> int:
    """Run `command` as `count` processes that find one another, and return the exit code that says most.

    torch's elastic machinery starts and ends them; signals that come here go to each of them. Where one fails, the
    others get SIGTERM and, if they do not end, SIGKILL. Of the codes of those that had failed when that was noticed,
    that of one that was killed (128 and the signal's number) says most, then the smallest.
    """
    import tempfile

    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    from engine.stopping import STOP_SIGNALS

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # any free port
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, permitted_cores() // count))
    said = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        AGENT_STORE: "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": threads,
        COPY_OF: str(os.getpid()),
    }
    numbers = range(count)
    waiting: list[int] = []
    taken = [getattr(signal, name) for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, *taken)}

    def catch() -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda got, _: waiting.append(got))

    catch()
    try:
        with tempfile.TemporaryDirectory() as logs:
            running = start_processes(
                name="surgstage",
                entrypoint=command[0],
                args={rank: tuple(command[1:]) for rank in numbers},
                envs={rank: {**os.environ, **said, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in numbers},
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            catch()  # again: the machinery puts handlers of its own in their place, which end in a traceback
            for number in taken:
                signal.signal(number, before[number])
            try:
                return _attend(running, waiting)
            finally:
                running.close(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _attend(running: Any, waiting: list[int]) -> int:
    """Hand on signals until the processes have ended; their exit code."""
    while True:
        while waiting:
            number = waiting.pop(0)
            for pid in running.pids().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        ended = _look(running)
        if ended is not None:
            return ended


def _look(running: Any) -> int | None:
    """Wait a moment: the exit code once all have ended or one has failed, otherwise None."""
    time.sleep(0.1)
    handlers = running.subprocess_handlers
    codes = {rank: handler.proc.poll() for rank, handler in handlers.items()}
    if all(code == 0 for code in codes.values()):
        return 0
    failed = [code for code in codes.values() if code]
    if not failed:
        return None
    # the others know by now, or will soon: they end by themselves with the code that says why
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(handler.proc.poll() is None for handler in handlers.values()):
        time.sleep(0.05)
    own = min(failed, key=lambda code: (code > 0, code))  # a process that was killed says more than those it took along
    return 128 - own if own < 0 else own


GRACE_S = 30.0
