"""Exchange values, errors and stop signals between the processes (ranks) of one training.

Some problems occur on one rank alone: it cannot read a video, receives a signal, or computes a loss that is not finite.
Ranks tell each other about these before any of them continues, so that all end at the same step with the same message.

With a single process, all of this costs nothing: torch.distributed is imported only where torch itself imports it.
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
from engine.stopping import Stopped, StopRequest

if TYPE_CHECKING:
    import torch


Value = TypeVar("Value")

# How long a rank waits for another in an exchange. Processing a whole share of the videos can take that long; a rank
# that has died is noticed at once, because its connections close.
EXCHANGE_TIMEOUT = timedelta(days=1)
JOIN_TIMEOUT_S = 600.0  # how long to wait until all ranks have started
ERROR_STORE_TIMEOUT_S = 5.0  # how long to wait for the store, whose host process may have ended
POLL_INTERVAL_S = 1.0
_CONNECTION_LOST = re.compile(r"remote process exit|connection (closed|reset)|broken pipe", re.IGNORECASE)


def one_process(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor unchanged: the counterpart of `Processes.total` for a single process."""
    return tensor


class Failed(UserError):
    """An error that every rank raises with the same message."""


class Processes:
    """The ranks of one training, seen from one of them. With a single rank, no method exchanges anything.

    Values are exchanged through a separate gloo group on the CPU, so that an exchange never waits for work queued on a
    GPU. Only `total` and `send_buffers` work on the device of their tensors.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None, stop: StopRequest | None = None) -> None:
        self.rank, self.count, self._group = rank, count, group
        self.stop = StopRequest() if stop is None else stop

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only rank that writes files."""
        return self.rank == 0

    def share(self, items: list[Value]) -> list[Value]:
        """Return this rank's share of the items: every `count`-th item, starting from the rank's number."""
        return items[self.rank :: self.count]

    def merged(self, shares: list[list[Value]]) -> list[Value]:
        """Return all items in their original order, given the shares of all ranks (the inverse of `share`)."""
        return [shares[place % self.count][place // self.count] for place in range(sum(map(len, shares)))]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks, without gradient."""
        if self.count == 1:
            return tensor
        import torch.distributed as dist

        summed = tensor.detach().clone()
        dist.all_reduce(summed)
        return summed

    def sums(self, *values: float) -> list[float]:
        """Return the sum of each number over all ranks, computed in float64."""
        if self.count == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self._group)
        found: list[float] = summed.tolist()
        return found

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in rank order; every rank gets the whole list."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def from_first(self, work: Callable[[], Value]) -> Value:
        """Run `work` on rank 0 only, and return its result on every rank. A UserError is raised on every rank."""
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
        """Run `work` on every rank, wait for all of them, and return this rank's result.

        If it fails on one rank, every rank raises the same error, as in `together`.
        """
        mine: list[Value] = []
        self.together(lambda: mine.append(work()))
        return mine[0]

    def together(self, work: Callable[[], Value]) -> list[Value]:
        """Run `work` on every rank, and return all results in rank order.

        If `work` raises UserError or Stopped on one rank, every rank raises it.
        """
        if self.count == 1:
            return [work()]
        value: Any = None
        error: str | None = None
        stopped = 0
        try:
            value = work()
        except UserError as problem:
            error = str(problem)
            self.stop.ask_others(signal.SIGTERM)  # makes the other ranks stop; they get the reason below
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
        """Wait until every rank has arrived here.

        It waits in a Python loop, in which signals are handled and passed on to ranks that are still working.
        """
        import torch
        import torch.distributed as dist

        waiting = dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)
        pause_s = 0.001
        while not waiting.is_completed():
            self.stop.poll()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)
        waiting.wait()

    def send_buffers(self, model: torch.nn.Module) -> None:
        """Broadcast running statistics from rank 0, so that every rank validates the model that checkpoints contain."""
        if self.count == 1:
            return
        import torch.distributed as dist

        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def join(device: str, stop: StopRequest | None = None) -> Processes:
    """Connect to the other ranks that the launcher started; returns at once if there are none.

    Afterwards `stop` also reports signals that only another rank received, even between exchanges. Raises UserError if
    two ranks have the same GPU, or if not all ranks join; if a rank failed, the message is that rank's error.
    """
    here = launch()
    stop = StopRequest() if stop is None else stop
    if here.count == 1:
        return Processes(stop=stop)
    set_torchrun_variables()
    import torch.distributed as dist
    from accelerate import PartialState

    from engine.device import choose_device, old_driver_of_rtx_40

    chosen = choose_device(device)
    try:
        store = error_store(JOIN_TIMEOUT_S)
        stop.ask_others = _signal_exchange(store)
        _wait_for_ranks(store, here, stop)
        if chosen.type == "cuda":
            # By default Accelerate tells torch that the number of a rank's GPU is the rank's number on this machine.
            # That is wrong where each task sees only its own GPU, as number 0.
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
    """Raise Failed if two ranks use the same GPU, which NCCL would refuse at the first exchange.

    GPUs are compared by their UUID. Their numbers would not do: if each task sees only its own GPU, all have number 0.
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
    """Disconnect from the other ranks, if this process has joined any.

    Otherwise threads for the exchange would still run when the interpreter exits, which can abort the process.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError):  # the others may have ended already
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- out of step


@cache
def error_store(timeout_s: float) -> Any:
    """Connect to the key-value store in which ranks publish a stop signal or the first error.

    Ranks use it when they cannot exchange: before they have joined, or while they are at different steps. It is hosted
    by torchrun or `--devices`, and under srun by rank 0. Raises RuntimeError if it cannot be reached.
    """
    import torch.distributed as dist

    hosted = os.environ.get(AGENT_STORE) == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not hosted and launch().rank == 0,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,  # torch will use the same server
    )
    return dist.PrefixStore(f"surgstage/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_ranks(store: Any, here: Launch, stop: StopRequest) -> None:
    """Wait until every rank has started, or raise the error of a rank that has failed.

    torch's own rendezvous would wait for the failed rank until its timeout.
    """
    store.add("here", 1)
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while (found := store.add("here", 0)) < here.count:
        stop.raise_if_set()
        if store.check(["error"]) and not store.check(["stop"]):
            raise Failed(store.get("error").decode())
        if time.monotonic() > deadline:
            raise RuntimeError(f"{found} of {here.count} started within {JOIN_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def _signal_exchange(store: Any) -> Callable[[int | None], int | None]:
    """Return the function for `StopRequest.ask_others`.

    It publishes this rank's signal once. As long as this rank has none, it checks once per second whether another rank
    has published one.
    """
    polled_at = 0.0
    published = False

    def exchange(own: int | None) -> int | None:
        nonlocal polled_at, published
        if published or (own is None and time.monotonic() - polled_at < POLL_INTERVAL_S):
            return own
        polled_at = time.monotonic()
        with suppress(RuntimeError):  # raised if the store's host has ended; the next exchange will report that
            if own is not None:
                store.set("stop", str(own))
                published = True
            elif store.check(["stop"]):
                return int(store.get("stop"))
        return signal.SIGTERM if own is None and launcher_died() else own

    return exchange


def is_reporting_rank(problem: BaseException) -> bool:
    """Whether this rank is the one that prints why the training ends.

    It is the first rank that calls this function; its error is stored for the others. If the store's host has ended,
    rank 0 prints, and so does every rank whose error is its own rather than one that all ranks raise.
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
    """Wait on rank 0, which may host the store, until all ranks have called `is_reporting_rank`, for at most 1 s."""
    deadline = time.monotonic() + POLL_INTERVAL_S
    while store.add("reported", 0) < count and time.monotonic() < deadline:
        time.sleep(0.05)


def peer_died(error: BaseException) -> bool:
    """Whether an error in an exchange means that another rank has ended.

    An error of the store always means that. NCCL's errors have their own type but many causes, so their text is
    searched. gloo raises a plain RuntimeError, which is recognised by the source file named in its text.
    """
    if not isinstance(error, RuntimeError) or launch().count == 1:
        return False
    import torch.distributed as dist

    if isinstance(error, dist.DistBackendError):
        return _CONNECTION_LOST.search(str(error)) is not None
    return isinstance(error, dist.DistError) or "gloo/transport/" in str(error)


def nccl_failure(error: BaseException) -> str | None:
    """Describe in one line an error of NCCL (for example a GPU or a network that it cannot use).

    Returns None for any other error.
    """
    if not isinstance(error, RuntimeError) or launch().count == 1:
        return None
    import torch.distributed as dist

    if not isinstance(error, dist.DistBackendError):
        return None
    reason = str(error).rpartition("Last error:")[2]  # the text before that only names a line of NCCL's source
    return f"the processes cannot exchange on GPUs: {one_line(reason, most=300)}; NCCL_DEBUG=INFO prints details"
