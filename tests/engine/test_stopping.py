"""Signals become a request between steps, or an exception at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from engine.stopping import Stopped, watch_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_is_remembered_until_the_loop_polls(number: int, code: int) -> None:
    with watch_signals() as stop:
        assert stop.poll() is None
        os.kill(os.getpid(), number)
        assert stop.poll() == number
        with pytest.raises(Stopped) as caught:
            stop.raise_if_set()
    assert caught.value.exit_code == code


def test_a_signal_inside_a_destructor_is_neither_lost_nor_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closing:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(Stopped, match="SIGTERM"), watch_signals() as stop:
        opened = Closing()
        del opened
        stop.raise_if_set()
    assert ignored == []


def test_a_second_ctrl_c_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), watch_signals():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_comes_while_other_ranks_are_asked_is_kept() -> None:
    def ask(own: int | None) -> int | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return own

    with watch_signals() as stop:
        stop.ask_others = ask
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.raise_if_set()


@pytest.mark.parametrize("first", ["its own", "another's"])
def test_the_first_ctrl_c_waits_whatever_came_before(first: str) -> None:
    with watch_signals() as stop:
        if first == "its own":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stop.ask_others = lambda own: signal.SIGTERM
        assert stop.poll() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.raise_if_set()


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watch_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("error", "number"), [(Stopped(signal.SIGTERM), signal.SIGINT), (ValueError("a bug"), signal.SIGTERM)]
)
def test_handlers_are_put_back_where_the_end_was_no_result(error: Exception, number: int) -> None:
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with pytest.raises(type(error)), watch_signals(leaving=True):
        raise error
    found = signal.getsignal(number)
    for name, handler in before.items():
        signal.signal(name, handler)
    assert found == before[number]


LEAVING = """
import os, signal
from engine.stopping import watch_signals
with watch_signals(leaving=True):
    pass
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    os.kill(os.getpid(), number)
print("the result")
"""


def test_a_process_that_is_leaving_is_not_ended_by_a_signal() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the result\n", "")


STOPPED_TWICE = """
import os, signal, sys
from engine.stopping import Stopped, watch_signals
try:
    with watch_signals(leaving=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.raise_if_set()
except Stopped as stopped:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    sys.exit(stopped.exit_code)
"""


def test_a_signal_that_comes_again_does_not_change_the_exit_code() -> None:
    assert subprocess.run([sys.executable, "-c", STOPPED_TWICE]).returncode == 75
