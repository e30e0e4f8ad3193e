"""Signals that ask a process to stop (SIGTERM, SIGINT, SIGUSR1), and the exit codes that say so.

Long work polls a `StopRequest` and keeps what it has finished: a training writes `last.pt` after the step, `extract`
keeps the finished videos. Any other command is ended by `StoppedAtOnce`, as Ctrl-C ends a Python program.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command resumes. Ctrl-C keeps the shell's 130.
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


class Stopped(Exception):
    """The work was asked to stop and has saved its state; the same command resumes it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.exit_code = exit_code_of(number)


class StoppedAtOnce(KeyboardInterrupt):
    """A signal arrived while nothing polled for it. Like Ctrl-C it passes `except Exception` and ends what runs."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = exit_code_of(number)


def exit_code_of(number: int) -> int:
    """The exit code of a command that this signal has stopped."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


class StopRequest:
    """Remembers the first signal that arrived; loops poll it between steps.

    `ask_others` takes this process's signal, if any, and returns it or that of another rank.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.ask_others: Callable[[int | None], int | None] = lambda own: own

    def poll(self) -> int | None:
        """The first signal that this process or, as `ask_others` reports it, another rank received; otherwise None."""
        found = self.ask_others(self.number)
        if found is not None and self.number is None:  # a signal may have arrived in the meantime
            self.number = found
        return self.number

    def raise_if_set(self) -> None:
        """Poll, and raise Stopped if a signal has arrived."""
        number = self.poll()
        if number is not None:
            raise Stopped(number)


@contextmanager
def watch_signals(leaving: bool = False, at_once: bool = False) -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGUSR1 and SIGINT while the body runs.

    The handlers only set the yielded request: an exception raised in a handler could surface in a library's destructor
    or weak-reference callback, where Python prints and ignores it. A second SIGINT raises KeyboardInterrupt at once.
    With `at_once`, for a body that cannot poll, the first signal raises StoppedAtOnce where the program happens to be;
    further ones are ignored, so that they do not disturb the clean-up. A `watch_signals` inside the body takes over.
    Outside the main thread, where Python allows no handlers, nothing is caught.

    Afterwards the previous handlers are restored. With `leaving`, the process exits after the body. If the body
    succeeded or called `sys.exit`, signals are ignored from then on, so that a process that has written its result does
    not exit as if stopped; if it was stopped, a repeated signal does not change its exit code.
    """
    request = StopRequest()
    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        first, request.number = request.number is None, request.number or number
        if number == signal.SIGINT:
            if interrupted:
                raise KeyboardInterrupt
            interrupted = True
        if first and at_once:
            raise StoppedAtOnce(number)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    ignored: set[int] = set()
    try:
        yield request
        ignored = set(STOP_SIGNALS)
    except SystemExit:
        ignored = set(STOP_SIGNALS)
        raise
    except (Stopped, StoppedAtOnce):
        # schedulers send signals repeatedly; Ctrl-C still ends a process that hangs while it exits
        ignored = {number for number in STOP_SIGNALS if number != signal.SIGINT}
        raise
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:  # otherwise a leaving `watch_signals` in the body ignores it
                signal.signal(number, signal.SIG_IGN if leaving and number in ignored else handler)
