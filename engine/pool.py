"""Process many videos, one after the other or in several worker processes.

The work can be stopped at any time, and a worker process that dies does not end it. On a CPU, one single-threaded
process per core, each with its own video (or part of a video), is faster than several threads that share a video, and
faster than one process that decodes for the others.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from multiprocessing import connection, get_context, parent_process, reduction
from typing import Any, Generic, Protocol, TypeVar

from configs.errors import UserError, one_line, type_and_line
from engine.files import NoRoomError
from engine.launch import available_cores
from engine.memory import is_gpu_error
from engine.progress import progress_bar
from engine.stopping import StopRequest

POLL_S = 0.3
GRACE_S = 20
# With fewer frames than this, one process finishes before a second one would have imported torch.
WORTH_A_PROCESS_FRAMES = 300
# Exceptions that a damaged video can cause in the libraries that read it, including undocumented ones.
VIDEO_ERRORS = (UserError, OSError, RuntimeError, MemoryError)
_NOT_STARTED = -1


class VideoFault(str):
    """The reason why a video cannot be used, if its files are the cause.

    Reasons with another cause are plain strings: they may have disappeared at the next start.
    """


class Job(Protocol):
    """A video to work on. `frames` is its number of frames, from which progress is computed."""

    @property
    def frames(self) -> int: ...


Value = TypeVar("Value")
AnyJob = TypeVar("AnyJob", bound=Job)
Advance = Callable[[int], None]  # takes the number of frames finished since the last call; raises to stop the work
# Works on one job. If the job fails, it raises one of `VIDEO_ERRORS` or returns the reason; otherwise it returns None.
Task = Callable[[AnyJob, Advance], str | None]


def choose_processes(wanted: int, jobs: Sequence[Job]) -> int:
    """Return the number of worker processes for `jobs`, at most one per video.

    It is `wanted`, or with -1 the number of cores (1 if there are few frames).
    """
    return max(1, min(processes_for(wanted, sum(job.frames for job in jobs)), len(jobs)))


def processes_for(wanted: int, frames: int) -> int:
    """Return the number of processes for work that can be divided between any number of processes.

    It is `wanted`, or with -1 the number of cores (1 if there are few frames).
    """
    if wanted == -1:
        wanted = available_cores() if frames > WORTH_A_PROCESS_FRAMES else 1
    return max(1, wanted)


def work_through(
    task: Task[AnyJob], jobs: Sequence[AnyJob], processes: int, title: str, stop: StopRequest, **bar_options: Any
) -> Generator[tuple[AnyJob, str | None], None, None]:
    """Call `task(job, advance)` for every job, and yield each finished job with None, or with the reason if it failed.

    A progress bar is shown meanwhile. If a job fails because of its video, or its process dies, the other jobs
    continue. With `processes` > 1, the task is pickled once for each process, so it can keep there what it loads;
    tensors in shared memory stay shared. Raises Stopped when asked to stop, and NoRoomError if the disk is full; in
    both cases the task has cleaned up before.
    """
    unit = bar_options.pop("unit", "frame")
    with progress_bar(sum(job.frames for job in jobs), title, unit, **bar_options) as bar:
        if processes > 1:
            yield from _in_processes(task, jobs, processes, stop, bar)
        else:
            yield from _one_by_one(task, jobs, stop, bar)


def _one_by_one(
    task: Task[AnyJob], jobs: Sequence[AnyJob], stop: StopRequest, bar: Any
) -> Iterator[tuple[AnyJob, str | None]]:
    def advance(frames: int) -> None:
        bar.update(frames)
        stop.raise_if_set()

    for job in jobs:
        stop.raise_if_set()
        before = bar.n
        reason = attempt(task, job, advance)
        bar.total -= job.frames - (bar.n - before)  # the remaining frames of a failed video take no more time
        yield job, reason


def attempt(work: Callable[..., str | None], *arguments: Any) -> str | None:
    """Return what `work` returns, or the reason in one line if it raises an error that a damaged video can cause.

    `work` returns None, or a reason if it has handled the error itself. NoRoomError and errors of a GPU are raised
    instead, since every other video would fail as well.
    """
    try:
        return work(*arguments)
    except NoRoomError:
        raise
    except VIDEO_ERRORS as error:
        if is_gpu_error(error):
            raise
        return failure_reason(error)


def failure_reason(error: BaseException) -> str:
    """Describe one of `VIDEO_ERRORS` in one line for the user; a UserError becomes a `VideoFault`."""
    return VideoFault(one_line(error, most=None)) if isinstance(error, UserError) else type_and_line(error, most=300)


def require_one_usable(failed: Sequence[tuple[str, str]], usable: int) -> None:
    """Raise UserError with the first reason if videos (id, reason) have failed and none is usable."""
    if failed and not usable:
        others = f" (and {len(failed) - 1} more videos)" if len(failed) > 1 else ""
        raise UserError(f"{failed[0][1]}{others}")


# ---------------------------------------------------------------------------------------------- processes


def _in_processes(
    task: Task[AnyJob], jobs: Sequence[AnyJob], processes: int, stop: StopRequest, bar: Any
) -> Iterator[tuple[AnyJob, str | None]]:
    """Run the jobs in worker processes, and yield them as `work_through` does.

    If a process dies, Python's pool does not say which one, so every video that was in progress is tried again alone.
    """
    waiting = list(jobs)
    while waiting:
        pool = _Pool(task, waiting, processes)
        for job, reason in pool.outcomes(stop, bar):
            waiting.remove(job)
            yield job, reason
        if not pool.broken:
            return
        for job in pool.in_progress() or waiting[:1]:
            alone = list(_Pool(task, [job], 1).outcomes(stop, bar))
            waiting.remove(job)
            yield alone[0] if alone else (job, "the process that worked on it died (out of memory, or killed)")


class _Packed:
    """A pickled task that a worker process unpickles later, once it has begun to watch its parent.

    Unpickling imports what the task needs (torch), which takes seconds in which the parent may die. The task is pickled
    separately for each process: tensors in shared memory are sent as file descriptors, which only one process can use.
    """

    def __init__(self, task: Task[Any]) -> None:
        self._task = task

    def __getstate__(self) -> bytes:
        pickler = getattr(reduction, "ForkingPickler", pickle)  # plain pickle would copy the tensors
        return bytes(pickler.dumps(self._task))

    def __setstate__(self, content: bytes) -> None:
        self._content = content

    def unpack(self) -> Task[Any]:
        """Unpickle and return the task. It can be called only once per process."""
        task: Task[Any] = pickle.loads(self._content)  # noqa: S301, made by the parent
        del self._content
        return task


class Shared(Generic[Value]):
    """A value that is passed in shared memory to new processes that import torch.

    Passed through the pipe to a new process, a value larger than the pipe's 64 KiB would arrive only after that process
    has imported torch, and the next process would start only then. With 15 processes, a minute would pass before the
    first batch.
    """

    def __init__(self, value: Value) -> None:
        import torch

        self._pickled = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).share_memory_()

    @cached_property
    def value(self) -> Value:
        """The value, which is unpickled when it is first used in a process."""
        found: Value = pickle.loads(self._pickled.numpy())  # noqa: S301, made by the parent
        return found


class _Pool(Generic[AnyJob]):
    """A pool of worker processes. Shared memory contains the request to stop, and one progress counter per job."""

    def __init__(self, task: Task[AnyJob], jobs: Sequence[AnyJob], processes: int) -> None:
        context = get_context("spawn")  # a fork would copy threads and open decoders
        self.jobs = list(jobs)
        self.broken = False
        self._left: dict[Future[str | None], int] = {}
        self._frames = context.Array("q", [_NOT_STARTED] * len(jobs), lock=False)
        self._stopped = context.Value("b", 0, lock=False)
        initargs = (_Packed(task), self._frames, self._stopped)
        self._executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=initargs)

    def outcomes(self, stop: StopRequest, bar: Any) -> Iterator[tuple[AnyJob, str | None]]:
        """Yield each job when it ends, with the reason if it failed. If a process dies, set `broken` and return."""
        before = bar.n
        try:
            for slot, job in enumerate(self.jobs):
                self._left[self._executor.submit(_work_on, slot, job)] = slot
            while self._left:
                finished, _ = wait(self._left, timeout=POLL_S, return_when=FIRST_COMPLETED)
                stop.raise_if_set()
                bar.update(before + self._frames_done(range(len(self.jobs))) - bar.n)
                for future in finished:
                    reason = future.result()
                    slot = self._left.pop(future)
                    job = self.jobs[slot]
                    bar.total -= job.frames - self._frames_done([slot])
                    yield job, reason
        except BrokenProcessPool:
            self.broken = True
            ended = set(range(len(self.jobs))) - set(self._left.values())
            bar.update(before + self._frames_done(ended) - bar.n)
        finally:
            self._stopped.value = 1
            self._executor.shutdown(wait=True, cancel_futures=True)

    def in_progress(self) -> list[AnyJob]:
        """Return the jobs that have started but not ended."""
        return [self.jobs[slot] for slot in self._left.values() if self._frames[slot] != _NOT_STARTED]

    def _frames_done(self, slots: Any) -> int:
        return sum(max(0, self._frames[slot]) for slot in slots)


class _StoppedByParent(Exception):
    """Raised inside a job to end it, after the parent process has asked its workers to stop."""


class _Worker:
    """The state of a worker process. It is kept in a global variable, the only place where executor calls find it."""

    task: Task[Any]

    def __init__(self, frames: Any, stopped: Any) -> None:
        self._frames, self._stopped = frames, stopped
        self._busy = threading.Lock()  # held while a job runs

    def may_end(self) -> bool:
        """Whether the pool is stopped and no job is in progress. If true, no job can begin any more."""
        return bool(self._stopped.value) and self._busy.acquire(blocking=False)

    def work_on(self, slot: int, job: Any) -> str | None:
        """Run one job; returns None, or the reason if it failed."""
        self._frames[slot] = 0

        def advance(frames: int) -> None:
            self._frames[slot] += frames
            if self._stopped.value:
                raise _StoppedByParent

        with self._busy:
            try:
                return attempt(self.task, job, advance)
            except _StoppedByParent:
                return "stopped"


_worker: _Worker | None = None  # set once in each process of a pool


def _begin(packed: _Packed, frames: Any, stopped: Any) -> None:
    """Initialise a new worker process."""
    global _worker
    _worker = _Worker(frames, stopped)
    serve_parent(may_end=_worker.may_end)
    _worker.task = packed.unpack()


def _work_on(slot: int, job: Any) -> str | None:
    assert _worker is not None  # `_begin` has set it
    return _worker.work_on(slot, job)


def serve_parent(worker: int = 0, may_end: Callable[[], bool] = lambda: False) -> None:
    """Make this worker process leave signals to its parent, and exit when the parent exits or `may_end()` is true.

    Ctrl-C and a scheduler's signals reach the whole process group, but only the parent decides what to do. This process
    ignores them, except that SIGTERM ends it after `GRACE_S` seconds: the parent needs that time to save its work, and
    Python ends remaining worker processes with SIGTERM. `worker` is not used; torch's DataLoader passes it.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))
    threading.Thread(target=_end_with_parent, args=(may_end,), daemon=True).start()


def _end_with_parent(may_end: Callable[[], bool]) -> None:
    """Exit when the parent has died, since it can no longer end its workers, or when `may_end()` is true.

    `may_end` returns True only while no job is in progress.
    """
    parent = parent_process()
    if parent is None:
        return
    while not connection.wait([parent.sentinel], POLL_S):
        if may_end():
            break
    os._exit(1)
