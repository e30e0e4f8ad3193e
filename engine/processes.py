"""One training on several processes (ranks): what they exchange, in step and out of step.

With a single process everything here costs nothing: torch.distributed is imported only as far as torch itself does.

Whatever can go wrong on one rank alone (a video that it cannot read, a signal that only it received, a loss that is not
finite) is exchanged before any rank continues, so that all ranks end at the same step with the same message.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from configs.errors import UserError, one_line
from engine.launch import AGENT_STORE, Launch, launch, launcher_died, set_torchrun_variables

if TYPE_CHECKING:
    import torch

    from engine.stopping import StopRequest


Value = TypeVar("Value")

# How long a rank waits for another that is alive: at most for its share of the videos. A rank that has died is noticed
# at once, by its closed connections.
EXCHANGE_TIMEOUT = timedelta(days=1)
JOIN_TIMEOUT_S = 600.0  # for all ranks to start
ERROR_STORE_TIMEOUT_S = 5.0  # the process that hosts it may have ended
POLL_INTERVAL_S = 1.0
_CONNECTION_LOST = re.compile(r"remote process exit|connection (closed|reset)|broken pipe", re.IGNORECASE)


def one_process(tensor: torch.Tensor) -> torch.Tensor:
    """`Processes.total` of a single process."""
    return tensor


class Failed(UserError):
    """An error that every rank raises with the same message."""


class Processes:
    """The ranks of one training. With a single one, every method is the identity.

    Exchanges use a gloo group of their own, on the CPU, so that they never wait for a GPU's queue; only `total` reduces
    on the device of its tensor.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None, stop: StopRequest | None = None) -> None:
        self.rank, self.count, self._group, self._stop = rank, count, group, stop

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes."""
        return self.rank == 0

    def share(self, items: list[Value]) -> list[Value]:
        """This rank's share of the items: every `count`-th one."""
        return items[self.rank :: self.count]

    def merged(self, shares: list[list[Value]]) -> list[Value]:
        """All items in their original order, from the shares of all ranks (the inverse of `share`)."""
        return [shares[place % self.count][place // self.count] for place in range(sum(map(len, shares)))]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over ranks, without gradient."""
        if self.count == 1:
            return tensor
        import torch.distributed as dist

        summed = tensor.detach().clone()
        dist.all_reduce(summed)
        return summed

    def sums(self, *values: float) -> list[float]:
        """Sums of plain numbers over ranks, in float64."""
        if self.count == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self._group)
        found: list[float] = summed.tolist()
        return found

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in rank order, on every rank."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def from_first(self, work: Callable[[], Value]) -> Value:
        """The result of `work`, which runs on rank 0 only. Raises its UserError on every rank."""
        if self.count == 1:
            return work()
        import torch.distributed as dist

        outcome: list[Any] = [None, None]  # the result, the error
        if self.first:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise Failed(outcome[1])
        result: Value = outcome[0]
        return result

    def each(self, work: Callable[[], Value]) -> Value:
        """This rank's result of `work`, once every rank has finished it; failures as in `together`."""
        mine: list[Value] = []
        self.together(lambda: mine.append(work()))
        return mine[0]

    def together(self, work: Callable[[], Value]) -> list[Value]:
        """The results of `work` on every rank, in rank order; a UserError or Stopped on one rank ends it on all."""
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
                self._stop.ask_others(signal.SIGTERM)  # the others stop working, and get the reason below
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
        """Wait in Python, where signals are handled and passed on to ranks that are still working."""
        import torch
        import torch.distributed as dist

        waiting = dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)
        pause_s = 0.001
        while not waiting.is_completed():
            if self._stop is not None:
                self._stop.poll()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)
        waiting.wait()

    def send_buffers(self, model: torch.nn.Module) -> None:
        """Broadcast running statistics from rank 0, so that what is validated is what checkpoints contain."""
        if self.count == 1:
            return
        import torch.distributed as dist

        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def join(device: str, stop: StopRequest | None = None) -> Processes:
    """Join the other ranks that the launcher started; returns at once if there are none.

    From then on `stop` also reports signals that only another rank received, even between exchanges. Raises UserError
    if not all ranks join, with the error of the rank that failed if there is one, and if two ranks have the same GPU.
    """
    here = launch()
    if here.count == 1:
        return Processes()
    set_torchrun_variables()
    import torch.distributed as dist
    from accelerate import PartialState

    from engine.device import choose_device, old_driver_of_rtx_40

    chosen = choose_device(device)
    try:
        store = error_store(JOIN_TIMEOUT_S)
        if stop is not None:
            stop.ask_others = _signal_exchange(store)
        _wait_for_ranks(store, here, stop)
        if chosen.type == "cuda":
            # By default Accelerate tells torch that a rank's GPU has its number on this machine; where a job sees only
            # its own, that is number 0.
            os.environ.setdefault("ACCELERATE_BYPASS_DEVICE_MAP", "true")
        with old_driver_of_rtx_40():
            PartialState(cpu=chosen.type == "cpu")
        group = dist.new_group(backend="gloo", timeout=EXCHANGE_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {here.rank} of {here.count} could not join the others at {where}: {one_line(error)}"
        ) from error
    processes = Processes(here.rank, here.count, group, stop)
    if chosen.type == "cuda":
        _require_own_gpu(processes)
    return processes


def _require_own_gpu(processes: Processes) -> None:
    """Raise Failed if two ranks have the same GPU, which NCCL would refuse at the first exchange.

    Numbers do not tell: with one GPU bound to each task, every rank's is number 0.
    """
    import torch

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    own = (str(getattr(gpu, "uuid", processes.rank)), f"{gpu.name} of {socket.gethostname()}")
    shared = [name for (_, name), count in Counter(processes.gather(own)).items() if count > 1]
    if shared:
        raise Failed(
            f"two processes would compute on one GPU ({shared[0]}); start one process per GPU (--devices, "
            "--nproc-per-node or --ntasks-per-node), or set device=cpu"
        )


def leave() -> None:
    """Leave the other ranks, if this process has joined any.

    Otherwise the threads of an exchange would still run when the interpreter exits, which can abort the process.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError):  # the others may have ended already
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- out of step


@cache
def error_store(timeout_s: float) -> Any:
    """The key-value store for ranks that are not in step or have not joined: stop signals, and the first error.

    torchrun and `--devices` host it; under srun rank 0 does. Raises RuntimeError if it cannot be reached.
    """
    import torch.distributed as dist

    hosted = os.environ.get(AGENT_STORE) == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not hosted and launch().rank == 0,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,  # the server that torch will ask for, too
    )
    return dist.PrefixStore(f"surgstage/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_ranks(store: Any, here: Launch, stop: StopRequest | None) -> None:
    """Wait for every rank in Python: torch's own rendezvous would wait in vain for one that has failed."""
    store.add("here", 1)
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while (found := store.add("here", 0)) < here.count:
        if stop is not None:
            stop.raise_if_set()
        if store.check(["error"]) and not store.check(["stop"]):
            raise Failed(store.get("error").decode())
        if time.monotonic() > deadline:
            raise RuntimeError(f"{found} of {here.count} started within {JOIN_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def _signal_exchange(store: Any) -> Callable[[int | None], int | None]:
    """For `StopRequest.ask_others`: publishes this rank's signal once, otherwise polls for others' every second."""
    polled_at = 0.0
    published = False

    def exchange(own: int | None) -> int | None:
        nonlocal polled_at, published
        if published or (own is None and time.monotonic() - polled_at < POLL_INTERVAL_S):
            return own
        polled_at = time.monotonic()
        with suppress(RuntimeError):  # the host of the store has ended, which the next exchange will report
            if own is not None:
                store.set("stop", str(own))
                published = True
            elif store.check(["stop"]):
                return int(store.get("stop"))
        return signal.SIGTERM if own is None and launcher_died() else own

    return exchange


def is_reporting_rank(problem: BaseException) -> bool:
    """Whether this rank prints why the training ends: the first one that asks, which records its error for the others.

    If the store's host has ended, every rank prints errors of its own, and rank 0 those that all share.
    """
    from engine.stopping import Stopped

    try:
        here = launch()
    except UserError:
        return True
    if here.count == 1:
        return True
    try:
        set_torchrun_variables()
        store = error_store(ERROR_STORE_TIMEOUT_S)
        first: bool = store.add("reported", 1) == 1
        if first:
            store.set("error", str(problem))
        if here.rank == 0:
            _linger(store, here.count)
    except (RuntimeError, ValueError):
        return here.rank == 0 or not isinstance(problem, (Failed, Stopped))
    return first


def _linger(store: Any, count: int) -> None:
    """Keep rank 0, which may host the store, alive for up to a second until every rank has read the reported error."""
    deadline = time.monotonic() + POLL_INTERVAL_S
    while store.add("reported", 0) < count and time.monotonic() < deadline:
        time.sleep(0.05)


def peer_died(error: BaseException) -> bool:
    """Whether an error of an exchange means that another rank has ended.

    torch has types for errors of NCCL, many of which have other causes, and of stores; gloo's are plain RuntimeErrors
    whose text begins with the place in its source.
    """
    if not isinstance(error, RuntimeError) or launch().count == 1:
        return False
    import torch.distributed as dist

    if isinstance(error, dist.DistBackendError):
        return _CONNECTION_LOST.search(str(error)) is not None
    return isinstance(error, dist.DistError) or "gloo/transport/" in str(error)


def nccl_failure(error: BaseException) -> str | None:
    """One line about an error of NCCL itself (a GPU or a network that it cannot use); None for other errors."""
    if not isinstance(error, RuntimeError) or launch().count == 1:
        return None
    import torch.distributed as dist

    if not isinstance(error, dist.DistBackendError):
        return None
    reason = str(error).rpartition("Last error:")[2]  # what comes before names a place in its source
    return f"the processes cannot exchange on GPUs: {one_line(reason, most=300)}; NCCL_DEBUG=INFO prints details"
