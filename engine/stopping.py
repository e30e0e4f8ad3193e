"""Signals that ask for the machine back: finish the step in hand, write `last.pt`, leave with a code that says why."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# EX_TEMPFAIL of sysexits.h: nothing is wrong, start again and it goes on. Ctrl-C keeps the shell's 130.
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


class Stopped(Exception):
    """The work was asked to stop and has saved what it had; start the same command again to go on."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


class StopRequest:
    """Remembers the first signal that came; loops look at it between steps.

    `ask_others` is given this process's signal, if any, and returns it or that of another process of the same work.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.ask_others: Callable[[int | None], int | None] = lambda own: own

    def __bool__(self) -> bool:
        return self._look() is not None

    def raise_if_set(self) -> None:
        """Raise Stopped when a signal has come."""
        number = self._look()
        if number is not None:
            raise Stopped(number)

    def _look(self) -> int | None:
        found = self.ask_others(self.number)
        if found is not None and self.number is None:  # a signal may have come meanwhile
            self.number = found
        return self.number


@contextmanager
def watch_signals(leaving: bool = False) -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGUSR1 and SIGINT while the body runs.

    They only set the yielded request: an exception raised by a handler can land in a library's destructor or weak
    reference callback, where Python prints it and goes on. A second SIGINT raises KeyboardInterrupt all the same, for
    those who cannot wait. Outside the main thread, where Python allows no handlers, nothing is caught.

    Afterwards signals do what they did before. With `leaving`, nothing but the process's end comes after the body, and
    where that went well they are ignored: a process that has written its result must not end by a signal as if it had
    not. One that was stopped keeps its exit code, too, when the same signal comes again.
    """
    request = StopRequest()
    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        request.number = request.number or number
        if number == signal.SIGINT:
            if interrupted:
                raise KeyboardInterrupt
            interrupted = True

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    afterwards: dict[int, Any] = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield request
        if leaving:
            afterwards = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)
    except Stopped:
        if leaving:  # schedulers repeat themselves; Ctrl-C still ends a process that hangs at its end
            afterwards |= {number: signal.SIG_IGN for number in STOP_SIGNALS if number != signal.SIGINT}
        raise
    finally:
        for number, handler in afterwards.items():
            signal.signal(number, handler)
