"""Handle the signals that ask a process to stop (SIGTERM, SIGINT, SIGUSR1), and define the exit codes of a stop.

Commands with long work poll a `StopRequest` and save what is finished: a training writes `last.pt` after the current
step, and `extract` keeps the finished videos. Any other command is ended by the exception `StoppedAtOnce`, as Ctrl-C
ends a Python program.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# 75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command resumes. 130 is the shell's code for Ctrl-C.
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
    """Raised when a signal arrives in a command that does not poll for signals.

    Like KeyboardInterrupt, it is not caught by `except Exception`, so it ends the command.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = exit_code_of(number)


def exit_code_of(number: int) -> int:
    """Return the exit code of a command that was stopped by signal `number`."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


class StopRequest:
    """The first stop signal that has arrived, if any. Loops poll it between steps.

    `ask_others` is called with this process's signal, or None. It returns that signal or one that another rank
    received.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.ask_others: Callable[[int | None], int | None] = lambda own: own

    def poll(self) -> int | None:
        """Return the first signal that this process received, or one that another rank received, or None."""
        found = self.ask_others(self.number)
        if found is not None and self.number is None:  # the handler may have set `number` during `ask_others`
            self.number = found
        return self.number

    def raise_if_set(self) -> None:
        """Poll, and raise Stopped if a signal has arrived."""
        number = self.poll()
        if number is not None:
            raise Stopped(number)


@contextmanager
def watch_signals(leaving: bool = False, at_once: bool = False) -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGUSR1 and SIGINT while the body runs, and yield the `StopRequest` that reports them.

    By default a handler only records the signal: an exception raised by a handler could occur inside a library's
    destructor or weak-reference callback, where Python prints and ignores it. A second SIGINT raises KeyboardInterrupt
    at once. `at_once` is for a body that cannot poll: the first signal raises StoppedAtOnce wherever the program is.
    Further signals, other than a second SIGINT, are then ignored, so that they do not disturb the clean-up. A
    `watch_signals` inside the body replaces these handlers until it ends. Outside the main thread Python allows no
    handlers, so nothing is caught.

    After the body, the previous handlers are restored. `leaving` says that the process will exit after the body. Then
    signals are ignored once the body has succeeded or called `sys.exit`, so that a process that has written its result
    does not exit as if it had been stopped. If the body was stopped, a repeated signal does not change the exit code.
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
        # schedulers send signals repeatedly, so ignore those; Ctrl-C still ends a process that hangs while it exits
        ignored = {number for number in STOP_SIGNALS if number != signal.SIGINT}
        raise
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:  # otherwise an inner `watch_signals` with `leaving` now ignores it
                signal.signal(number, signal.SIG_IGN if leaving and number in ignored else handler)
