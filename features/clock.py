"""Read times that are written as on a clock."""

from __future__ import annotations

import math
import re

_CLOCK = re.compile(r"(?:([0-9]{1,6}):)?([0-9]{1,6}):([0-9]{1,2}(?:[.,][0-9]+)?)")


def clock_seconds(text: str) -> float:
    """Return the seconds of `hh:mm:ss.mmm` or `mm:ss`, also with a comma before the fraction; NaN for other texts."""
    match = _CLOCK.fullmatch(text)
    seconds = math.nan if match is None else float(match[3].replace(",", "."))
    if match is None or seconds >= 60:
        return math.nan
    return int(match[1] or 0) * 3600.0 + int(match[2]) * 60.0 + seconds
