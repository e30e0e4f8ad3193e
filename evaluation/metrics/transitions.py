"""Transitions between phases: how late they are predicted, how many are missed, and how many predicted ones are false.

Unlike the edit score, which counts segments in order, these count events in time, as someone in the operating room sees
them. Delays with a sign and the fraction of detected transitions follow Dergachyova et al., "Automatic data-driven
real-time segmentation and recognition of surgical workflow" (IJCARS 2016). docs/evaluation.md has examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.counts import FloatArray

WINDOW_S = 10.0  # a predicted transition without a true one to the same phase within this time is false
DETECTION_WINDOW_S = 60.0  # a true transition that is predicted neither this early nor this late is missed
_ROUNDING_S = 1e-6  # times are multiples of 1 / fps, which is not exact


class Change(NamedTuple):
    """A change to `phase` between two frames with a label; `first` is the frame after the last one of the old phase.

    `last` is the first frame of the new phase. They differ if frames without a label lie between the two.
    """

    first: int
    last: int
    phase: int


@dataclass(frozen=True)
class Transitions:
    """The transitions of one video.

    `delays_s` (N,) has the delay of each true transition in seconds, negative if it is predicted early, and NaN if it
    is missed. `predicted` is the number of predicted transitions, and `false` the number of those that are false.
    `hours` is the duration of the frames with a label.
    """

    delays_s: FloatArray
    predicted: int
    false: int
    hours: float

    @property
    def missed(self) -> int:
        """The number of true transitions that are missed."""
        return int(np.isnan(self.delays_s).sum())

    @property
    def false_per_hour(self) -> float:
        """The number of false transitions per hour; NaN if no frame has a label."""
        return self.false / self.hours if self.hours else float("nan")


def changes(labels: NDArray[Any]) -> list[Change]:
    """Return the changes of a track (T,) in order; negative labels, which mean none, are passed over."""
    known = np.flatnonzero(labels >= 0)
    values = labels[known]
    new = np.flatnonzero(values[1:] != values[:-1]) + 1  # among the frames with a label
    return [
        Change(first + 1, last, phase)
        for first, last, phase in zip(known[new - 1].tolist(), known[new].tolist(), values[new].tolist(), strict=True)
    ]


def find_transitions(truth: NDArray[Any], predicted: NDArray[Any], fps: float) -> Transitions:
    """Compare the transitions of one video: `truth` and `predicted` (T,) are phase ids at `fps` frames per second.

    Negative ids mean no label or no prediction. The first phase of a track is no transition. A change of the truth
    across frames without a label has no known time: it has no delay and cannot be missed, but a prediction of it in the
    gap is not false. Predicted transitions at frames without a label are not counted.
    """
    true, found = changes(truth), [change for change in changes(predicted) if truth[change.last] >= 0]
    window, detection = ((seconds + _ROUNDING_S) * fps for seconds in (WINDOW_S, DETECTION_WINDOW_S))
    false = sum(
        len(ours) - _matches([one for one in true if one.phase == phase], ours, window)
        for phase in {one.phase for one in found}
        for ours in [[one.last for one in found if one.phase == phase]]
    )
    delays = [delay / fps for delay in _delays(true, predicted, detection)]
    return Transitions(np.array(delays), len(found), false, int((truth >= 0).sum()) / fps / 3600.0)


def false_transitions_per_hour(truth: Sequence[NDArray[Any]], predicted: Sequence[NDArray[Any]], fps: float) -> float:
    """Return the false transitions of all videos (T,) per hour of frames with a label; NaN without such frames."""
    found = [find_transitions(one, other, fps) for one, other in zip(truth, predicted, strict=True)]
    hours = sum(one.hours for one in found)
    return sum(one.false for one in found) / hours if hours else float("nan")


def _matches(true: Sequence[Change], predicted: Sequence[int], window: float) -> int:
    """Return the largest number of pairs of a true and a predicted change of one phase, at most `window` frames apart.

    Each belongs to one pair at most. Both are in order of time, so it is best to give each true change the earliest
    predicted one that is left.
    """
    pairs, start = 0, 0
    for change in true:
        while start < len(predicted) and predicted[start] < change.first - window:
            start += 1
        if start < len(predicted) and predicted[start] <= change.last + window:
            pairs, start = pairs + 1, start + 1
    return pairs


def _delays(true: Sequence[Change], predicted: NDArray[Any], window: float) -> list[float]:
    """Return the delay in frames of each true change whose time is known, and NaN for those that are missed.

    If the new phase is predicted at the change, the delay is that of the predicted segment's start, which is 0 or
    negative; otherwise that of the next predicted change to this phase. A predicted change is used only once.
    """
    starts: dict[int, list[int]] = {}
    for change in changes(predicted):
        starts.setdefault(change.phase, []).append(change.last)
    shown = _filled(predicted)
    delays: list[float] = []
    used: set[tuple[int, int]] = set()
    for change in (one for one in true if one.first == one.last):
        ours = np.array(starts.get(change.phase, []), dtype=np.int64)
        after = int(np.searchsorted(ours, change.last, side="right"))  # how many are not after the change
        k = after - 1 if shown[change.last] == change.phase else after
        delay = float(ours[k] - change.last) if 0 <= k < len(ours) else float("nan")
        taken = abs(delay) <= window and (change.phase, k) not in used
        used |= {(change.phase, k)} if taken else set()
        delays.append(delay if taken else float("nan"))
    return delays


def _filled(labels: NDArray[Any]) -> NDArray[Any]:
    """Return a track (T,) in which frames without a label have that of the last frame before them that has one."""
    last = np.maximum.accumulate(np.where(labels >= 0, np.arange(len(labels)), 0))
    return np.asarray(labels[last])
