"""Progress on long work: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from configs.errors import printable

LOG_INTERVAL_S = 15.0
_bars_shown = True


def progress_bar(total: int | None, description: str, unit: str, **options: Any) -> tqdm:
    """A tqdm bar on standard error: `unit`/s and time left. Where that is a file, at most a line in 15 s."""
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
        **options | ({} if _bars_shown else {"disable": True}),
    )


@contextmanager
def no_bars() -> Iterator[None]:
    """For work whose progress somebody else shows, several times at once perhaps."""
    global _bars_shown
    before, _bars_shown = _bars_shown, False
    try:
        yield
    finally:
        _bars_shown = before


def say(text: str) -> None:
    """A line for the user, above any bar; what file names put into it is made printable."""
    tqdm.write(printable(text), file=sys.stderr)
