"""Work on many videos: one after the other, or several at once in processes that can be stopped and may die.

One process per core, each with a video (or a part of one) of its own and one thread, is faster than several threads on
one video and than one process that decodes for the others.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process, reduction
from typing import Any, Generic, Protocol, TypeVar

from configs.errors import UserError, one_line, type_and_line
from engine.files import NoRoomError
from engine.launch import available_cores
from engine.progress import progress_bar
from engine.stopping import StopRequest

POLL_S = 0.3
GRACE_S = 20
# Fewer frames than this are done before a second process has imported torch.
WORTH_A_PROCESS_FRAMES = 300
# What a video can make the programs that read it raise, besides the errors that they foresee.
VIDEO_ERRORS = (UserError, OSError, RuntimeError, MemoryError)
_NOT_STARTED = -1


class VideoFault(str):
    """Why a video cannot be used, where the cause lies in its files; any other cause may be gone at the next start."""


class Job(Protocol):
    """A video to work on; `frames` is its number of frames, for progress."""

    @property
    def frames(self) -> int: ...


AnyJob = TypeVar("AnyJob", bound=Job)
Advance = Callable[[int], None]  # reports how many more frames are done; raises to stop the work
Task = Callable[[AnyJob, Advance], None]


def choose_processes(wanted: int, jobs: Sequence[Job]) -> int:
    """Processes for whole videos: `wanted`, or for -1 one per core, fewer for few frames; at most one per video."""
    return max(1, min(processes_for(wanted, sum(job.frames for job in jobs)), len(jobs)))


def processes_for(wanted: int, frames: int) -> int:
    """Processes for work that can be divided at will: `wanted`, or for -1 one per core, a single one for few frames."""
    if wanted == -1:
        wanted = available_cores() if frames > WORTH_A_PROCESS_FRAMES else 1
    return max(1, wanted)


def work_through(
    task: Task[AnyJob], jobs: Sequence[AnyJob], processes: int, title: str, stop: StopRequest, **bar_options: Any
) -> Generator[tuple[AnyJob, str | None], None, None]:
    """Do `task(job, advance)` for every job, with progress; yields each job as it ends, and why where it failed.

    A failure that a video can cause does not end the other jobs. With `processes` > 1 the task goes to each process
    once, pickled (tensors in shared memory stay shared), and keeps what it loads there; a process that dies takes only
    its own video with it. Raises Stopped when asked to stop, and NoRoomError when the disk is full, after the task has
    cleaned up.
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
        reason = _attempt(task, job, advance)
        bar.total -= job.frames - (bar.n - before)  # a failed video's rest does not count for the time left
        yield job, reason


def _attempt(task: Task[AnyJob], job: AnyJob, advance: Advance) -> str | None:
    """Do one job; the reason in one line where that fails."""
    try:
        task(job, advance)
    except NoRoomError:
        raise
    except VIDEO_ERRORS as error:
        return failure_reason(error)
    return None


def failure_reason(error: BaseException) -> str:
    """One of `VIDEO_ERRORS` in one line, as a user reads it; a UserError is the video's fault."""
    return VideoFault(one_line(error, most=None)) if isinstance(error, UserError) else type_and_line(error, most=300)


# ---------------------------------------------------------------------------------------------- processes


def _in_processes(
    task: Task[AnyJob], jobs: Sequence[AnyJob], processes: int, stop: StopRequest, bar: Any
) -> Iterator[tuple[AnyJob, str | None]]:
    """A broken pool does not report whose process died: the videos in progress are tried again, each alone."""
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
    """A task on its way into a process, which watches its parent before it imports what the task needs (torch, for
    seconds).

    Pickled anew for each process: tensors in shared memory travel as file descriptors, which only that process has.
    """

    def __init__(self, task: Task[Any]) -> None:
        self._task = task

    def __getstate__(self) -> bytes:
        pickler = getattr(reduction, "ForkingPickler", pickle)  # pickle would copy the tensors
        return bytes(pickler.dumps(self._task))

    def __setstate__(self, content: bytes) -> None:
        self._content = content

    def unpack(self) -> Task[Any]:
        """The task; once per process."""
        task: Task[Any] = pickle.loads(self._content)  # noqa: S301, the parent has made it
        del self._content
        return task


class _Pool(Generic[AnyJob]):
    """Processes that do jobs, asked to stop through shared memory, and watched through one counter per job."""

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
        """Jobs as they end. Ends early, `broken`, when a process died."""
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
        """Jobs that were started and have not ended."""
        return [self.jobs[slot] for slot in self._left.values() if self._frames[slot] != _NOT_STARTED]

    def _frames_done(self, slots: Any) -> int:
        return sum(max(0, self._frames[slot]) for slot in slots)


class _StoppedByParent(Exception):
    """Unwinds a job in a process whose parent has asked it to stop."""


class _Worker:
    """What a process of the pool needs for its jobs; the executor hands its calls no other state."""

    task: Task[Any]

    def __init__(self, frames: Any, stopped: Any) -> None:
        self._frames, self._stopped = frames, stopped
        self._busy = threading.Lock()  # held while a job runs

    def may_end(self) -> bool:
        """Whether the pool is stopped and no job is in progress; none begins afterwards."""
        return bool(self._stopped.value) and self._busy.acquire(blocking=False)

    def work_on(self, slot: int, job: Any) -> str | None:
        """Do one job; the reason where that fails."""
        self._frames[slot] = 0

        def advance(frames: int) -> None:
            self._frames[slot] += frames
            if self._stopped.value:
                raise _StoppedByParent

        with self._busy:
            try:
                return _attempt(self.task, job, advance)
            except _StoppedByParent:
                return "stopped"


_worker: _Worker | None = None  # set once in each process of a pool


def _begin(packed: _Packed, frames: Any, stopped: Any) -> None:
    """First thing in a new process."""
    global _worker
    _worker = _Worker(frames, stopped)
    serve_parent(may_end=_worker.may_end)
    _worker.task = packed.unpack()


def _work_on(slot: int, job: Any) -> str | None:
    assert _worker is not None  # `_begin` has set it
    return _worker.work_on(slot, job)


def serve_parent(worker: int = 0, may_end: Callable[[], bool] = lambda: False) -> None:
    """Make this process depend on the one that started it: it leaves signals to its parent, and ends when the parent
    ends, for whatever reason, or once `may_end()` is true.

    Ctrl-C and a scheduler's signals reach the whole process group; the parent decides what becomes of the work. SIGTERM
    ends this process only after `GRACE_S` seconds, in which the parent saves what it has: it is also how Python itself
    ends processes that are left over. `worker` is the number that torch's DataLoader passes.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))
    threading.Thread(target=_end_with_parent, args=(may_end,), daemon=True).start()


def _end_with_parent(may_end: Callable[[], bool]) -> None:
    """A killed parent cannot call its processes back; one that stops waits only for those with a job in progress."""
    parent = parent_process()
    if parent is None:
        return
    while not connection.wait([parent.sentinel], POLL_S):
        if may_end():
            break
    os._exit(1)
