"""Smooth the probabilities of tools over time: a tool stays in sight for several seconds, single frames err."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.tools import sigmoid

LARGEST_LOGIT = 50.0  # beyond it a probability in float64 is 0 or 1, and has no logit


class ToolSmoother:
    """The exponential moving average of the tools' probabilities in one video, which sees no later frame.

    s_t = a s_(t-1) + (1 - a) p_t with a = exp(-1 / (fps * time_s)), from s_0 = p_0. With `time_s` 0 nothing is changed.
    """

    def __init__(self, time_s: float, fps: float) -> None:
        self._keep = math.exp(-1 / (fps * time_s)) if time_s > 0 else 0.0
        self._last: NDArray[np.float64] | None = None

    def step(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """The smoothed probabilities (N, K) of the next N frames, of which the probabilities are (N, K)."""
        if not self._keep:
            return probabilities
        found = np.empty(probabilities.shape)
        for at, one in enumerate(probabilities):
            self._last = one if self._last is None else self._keep * self._last + (1 - self._keep) * one
            found[at] = self._last
        return found

    def state(self) -> NDArray[np.float64] | None:
        """The average so far (K,); None before the first frame, and without smoothing."""
        return self._last

    def restore(self, state: NDArray[np.float64] | None) -> None:
        """Continue from `state`."""
        self._last = state


def smoothed_tool_logits(
    logits: Mapping[str, NDArray[np.float32]], time_s: float, fps: float
) -> dict[str, NDArray[np.float32]]:
    """The logits (T, K) of each video, of which `ToolSmoother` has smoothed the probabilities."""
    if not time_s:
        return dict(logits)
    found = {}
    for name, values in logits.items():
        smooth = ToolSmoother(time_s, fps).step(sigmoid(values.clip(-LARGEST_LOGIT, LARGEST_LOGIT)))
        with np.errstate(divide="ignore"):  # a probability may round to 1
            odds = np.log(smooth) - np.log1p(-smooth)
        found[name] = odds.clip(-LARGEST_LOGIT, LARGEST_LOGIT).astype(np.float32)
    return found
