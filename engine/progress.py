"""Progress on long work: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from configs.errors import printable

LOG_INTERVAL_S = 15.0


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
        **options,
    )


def say(text: str) -> None:
    """A line for the user, above any bar; what file names put into it is made printable."""
    tqdm.write(printable(text), file=sys.stderr)
