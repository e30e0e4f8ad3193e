"""Find runs of equal values in label tracks. This module needs only NumPy, so that every package can use it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Run(NamedTuple):
    """A run of equal values in a track: positions `start` to `end` (exclusive) all contain `value`."""

    start: int
    end: int
    value: Any  # int or bool, depending on the track's data type


def runs(values: NDArray[Any]) -> list[Run]:
    """Return the maximal runs of equal values in a track (T,), in order. Together they cover the whole track."""
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]][: len(values)])
    ends = [*starts[1:].tolist(), len(values)]
    return [Run(*run) for run in zip(starts.tolist(), ends, values[starts].tolist(), strict=False)]


def true_spans(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (start, end) of each maximal run of True in `mask` (T,), with the end exclusive."""
    return [(run.start, run.end) for run in runs(mask) if run.value]
