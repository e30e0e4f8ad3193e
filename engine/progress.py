"""Show the progress of long tasks, as a bar on a terminal and as a line every 15 s in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

from configs.errors import printable
from engine.launch import is_main_process

LOG_INTERVAL_S = 15.0
BAR_AFTER_S = 3.0  # `delay` of bars of work that is usually short
_bars_hidden = ContextVar("_bars_hidden", default=False)


def progress_bar(total: int | None, description: str, unit: str, **options: Any) -> tqdm:
    """Return a tqdm bar on standard error that shows `unit`/s and the time left.

    If standard error is not a terminal, it prints at most one line every 15 s. `options` are passed to tqdm.
    """
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        mininterval=0.2 if interactive else LOG_INTERVAL_S,
        maxinterval=10.0 if interactive else 4 * LOG_INTERVAL_S,
        dynamic_ncols=interactive,
        ascii=not interactive,
        leave=options.pop("leave", False),
        **options | ({"disable": True} if bars_are_hidden() else {}),
    )


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide all progress bars in the body. Callers use this if they show the progress themselves."""
    token = _bars_hidden.set(True)
    try:
        yield
    finally:
        _bars_hidden.reset(token)


def bars_are_hidden() -> bool:
    """Whether progress bars are hidden by `no_bars`."""
    return _bars_hidden.get()


def say(text: str, *, every_rank: bool = False) -> None:
    """Print a line for the user on standard error, above any progress bar, with unprintable characters escaped.

    If there are several ranks, only rank 0 prints. Set `every_rank` if the line is about each rank's own work.
    """
    if every_rank or is_main_process():
        tqdm.write(printable(text), file=sys.stderr)
