"""Signals become a request between steps, or an exception at once."""

from __future__ import annotations

import os
import signal

import pytest

from engine.stopping import Stopped, watch_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_is_remembered_until_the_loop_looks(number: int, code: int) -> None:
    with watch_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        with pytest.raises(Stopped) as caught:
            stop.raise_if_set()
    assert caught.value.exit_code == code


def test_immediate_raises_where_the_program_stands() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), watch_signals(immediate=True):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_ctrl_c_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), watch_signals():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watch_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
