"""Progress of long tasks: a bar on a terminal, a line every 15 s in a log file."""

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
_bars_hidden = ContextVar("_bars_hidden", default=False)


def progress_bar(total: int | None, description: str, unit: str, **options: Any) -> tqdm:
    """A tqdm bar on standard error with `unit`/s and the time left. In a log file, at most one line in 15 s.

    `options` are those of tqdm.
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
    """Hide the bars of the body, whose progress the caller shows."""
    token = _bars_hidden.set(True)
    try:
        yield
    finally:
        _bars_hidden.reset(token)


def bars_are_hidden() -> bool:
    """Whether a caller shows the progress (`no_bars`)."""
    return _bars_hidden.get()


def say(text: str, *, every_rank: bool = False) -> None:
    """Print a line for the user on standard error, above any bar, with unprintable characters escaped.

    Of several ranks only rank 0 prints, unless the line is about each rank's own work (`every_rank`).
    """
    if every_rank or is_main_process():
        tqdm.write(printable(text), file=sys.stderr)
