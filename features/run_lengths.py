"""Run-length encoding of label tracks: NumPy only, for every package above."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Run(NamedTuple):
    """Consecutive equal values: the positions `start` to `end` (exclusive) of a track all hold `value`."""

    start: int
    end: int
    value: Any  # int or bool, as the track's data type


def runs(values: NDArray[Any]) -> list[Run]:
    """The maximal runs of equal values in a track (T,), in order; together they cover it. Empty for an empty track."""
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]][: len(values)])
    ends = [*starts[1:].tolist(), len(values)]
    return [Run(*run) for run in zip(starts.tolist(), ends, values[starts].tolist(), strict=False)]


def true_spans(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, end) of each maximal run of True in `mask` (T,), end exclusive."""
    return [(run.start, run.end) for run in runs(mask) if run.value]
