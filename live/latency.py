"""Percentiles of many durations in constant memory."""

from __future__ import annotations

import math

import numpy as np

_SHORTEST_S, _LONGEST_S = 1e-6, 1e4
_STEP = math.log(1.005)  # bins of half a percent
_BINS = math.ceil(math.log(_LONGEST_S / _SHORTEST_S) / _STEP) + 1
PERCENTILES = (50, 95, 99)


class Durations:
    """Durations of one kind, of which percentiles are exact to half a percent (from 1 µs to 2.8 hours)."""

    def __init__(self) -> None:
        self._bins = np.zeros(_BINS, dtype=np.int64)
        self.count, self._sum_s, self._longest_s = 0, 0.0, 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        at = math.log(max(seconds, _SHORTEST_S) / _SHORTEST_S) / _STEP
        self._bins[min(int(at), _BINS - 1)] += 1
        self.count, self._sum_s = self.count + 1, self._sum_s + seconds
        self._longest_s = max(self._longest_s, seconds)

    def to_json(self) -> dict[str, float]:
        """Number, mean, percentiles and maximum, in milliseconds."""
        if not self.count:
            return {"count": 0}
        found = {"count": self.count, "mean_ms": round(1000 * self._sum_s / self.count, 3)}
        sums = self._bins.cumsum()
        for percent in PERCENTILES:
            at = int(np.searchsorted(sums, math.ceil(percent / 100 * self.count)))
            middle_s = _SHORTEST_S * math.exp((at + 0.5) * _STEP)
            found[f"p{percent}_ms"] = round(1000 * min(middle_s, self._longest_s), 3)
        return {**found, "max_ms": round(1000 * self._longest_s, 3)}


class Latencies:
    """The durations of each part of a computation."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self._parts = {part: Durations() for part in parts}

    def add(self, part: str, seconds: float) -> None:
        """Count the duration of a part."""
        self._parts[part].add(seconds)

    def to_json(self) -> dict[str, dict[str, float]]:
        """The figures of each part that occurred."""
        return {part: found.to_json() for part, found in self._parts.items() if found.count}

    def lines(self) -> list[str]:
        """The figures as a table."""
        rows = [f"{'latency, ms':<12}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}"]
        for part, one in self.to_json().items():
            rows.append(
                f"{part:<12}" + "".join(f"{one[key]:>9.1f}" for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))
            )
        return rows
