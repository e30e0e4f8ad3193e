"""Transitions between phases: how late they are predicted, how many are missed, and how many predicted ones are false.

Unlike the edit score, which compares the order of segments, these compare the times of events, as someone in the
operating room sees them. There is no common definition in the literature; docs/evaluation.md has this one, with an
example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.conventions import CONVENTIONS, Convention, Videos, numbers_by_video, over_videos, pooled_scores
from evaluation.metrics.counts import FloatArray, IntArray
from evaluation.metrics.results import PhaseAbout, PhaseResults

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
    columns = known[new - 1] + 1, known[new], values[new]
    return [*map(Change, *(column.tolist() for column in columns))]


def find_transitions(truth: NDArray[Any], predicted: NDArray[Any], fps: float) -> Transitions:
    """Compare the transitions of one video: `truth` and `predicted` (T,) are phase ids at `fps` frames per second.

    Negative ids mean no label or no prediction. The first phase of a track is no transition. A change of the truth
    across frames without a label has no known time: it has no delay and cannot be missed, but a prediction of it in the
    gap is not false. Predicted transitions at frames without a label are not counted.
    """
    true, found = changes(truth), [change for change in changes(predicted) if truth[change.last] >= 0]
    window, detection = ((seconds + _ROUNDING_S) * fps for seconds in (WINDOW_S, DETECTION_WINDOW_S))
    ours = _by_phase(true)
    false = len(found) - sum(_matches(ours.get(phase, []), those, window) for phase, those in _by_phase(found).items())
    delays = [delay / fps for delay in _delays(true, predicted, detection)]
    return Transitions(np.array(delays), len(found), false, int((truth >= 0).sum()) / fps / 3600.0)


def false_transitions_per_hour(truth: Sequence[NDArray[Any]], predicted: Sequence[NDArray[Any]], fps: float) -> float:
    """Return the false transitions of all videos (T,) per hour of frames with a label; NaN without such frames."""
    found = [find_transitions(one, other, fps) for one, other in zip(truth, predicted, strict=True)]
    hours = sum(one.hours for one in found)
    return sum(one.false for one in found) / hours if hours else float("nan")


def _by_phase(found: Sequence[Change]) -> dict[int, list[Change]]:
    by_phase: dict[int, list[Change]] = {}
    for change in found:
        by_phase.setdefault(change.phase, []).append(change)
    return by_phase


def _matches(true: Sequence[Change], predicted: Sequence[Change], window: float) -> int:
    """Return the largest number of pairs of a true and a predicted change of one phase, at most `window` frames apart.

    Each belongs to one pair at most. Both are in order of time, so it is best to give each true change the earliest
    predicted one that is left.
    """
    pairs, start = 0, 0
    for change in true:
        while start < len(predicted) and predicted[start].last < change.first - window:
            start += 1
        if start < len(predicted) and predicted[start].last <= change.last + window:
            pairs, start = pairs + 1, start + 1
    return pairs


def _delays(true: Sequence[Change], predicted: NDArray[Any], window: float) -> list[float]:
    """Return the delay in frames of each true change whose time is known, and NaN for those that are missed.

    If the new phase is predicted at the change, the delay is that of the predicted segment's start, which is 0 or
    negative; otherwise that of the next predicted change to this phase. A predicted change is used only once.
    """
    starts = {phase: [one.last for one in those] for phase, those in _by_phase(changes(predicted)).items()}
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


# ---------------------------------------------------------------------------------------------- the convention


_SHARES = {"delay_median": 0.5, "delay_p90": 0.9}
_VALUES_AT_ONCE = 1 << 22  # limits the memory of the percentiles of many draws


@dataclass(frozen=True)
class TransitionTable:
    """The transitions of V videos.

    `delays_s` (N,) are the delays of all detected transitions, rising, and `video` (N,) is the video of each. `single`
    has {score: (V,)}. The others are (V,): `true` and `missed` count true transitions, `predicted` and `false`
    predicted ones, and `hours` is the duration of the frames with a label.
    """

    delays_s: FloatArray
    video: IntArray
    single: dict[str, FloatArray]
    true: IntArray
    missed: IntArray
    predicted: IntArray
    false: IntArray
    hours: FloatArray


class TransitionConvention(Convention[TransitionTable]):
    """A convention that compares the times of transitions; delays are those of the transitions that are detected."""

    def unavailable(self, phases: Sequence[str], fps: float | None) -> str | None:
        """See `Convention.unavailable`."""
        if fps is None:
            return "its times need the rate of the rows, which the files do not state; add --fps"
        return None

    def count(self, videos: Videos, classes: int, fps: float | None, background: Sequence[int]) -> TransitionTable:
        """See `Convention.count`."""
        found = [find_transitions(video.truth, video.predicted, fps or 1.0) for video in videos]
        detected = [one.delays_s[~np.isnan(one.delays_s)] for one in found]
        delays, video = np.concatenate(detected), np.repeat(np.arange(len(videos)), [len(one) for one in detected])
        order = np.argsort(delays, kind="stable")
        columns = ("missed", "predicted", "false", "hours")
        missed, predicted, false, hours = (np.array([getattr(one, name) for one in found]) for name in columns)
        true = np.array([len(one.delays_s) for one in found])
        once = np.eye(len(videos))
        single = _percentiles(delays[order], once[:, video[order]]) | _rates(true, missed, false, hours, once)
        return TransitionTable(delays[order], video[order], single, true, missed, predicted, false, hours)

    def means(self, table: TransitionTable, weights: FloatArray) -> dict[str, FloatArray]:
        """See `Convention.means`; NAME_pooled is computed on the transitions of all videos, NAME averages videos."""
        parts = np.array_split(weights, 1 + weights.shape[0] * len(table.delays_s) // _VALUES_AT_ONCE)
        found = [_percentiles(table.delays_s, part[:, table.video]) for part in parts]
        pooled = {name: np.concatenate([one[name] for one in found]) for name in _SHARES}
        pooled |= _rates(table.true, table.missed, table.false, table.hours, weights)
        means = {name: over_videos(values, weights) for name, values in table.single.items()}
        return means | {f"{name}_pooled": values for name, values in pooled.items()}

    def results(self, table: TransitionTable, videos: Videos, phases: Sequence[str], about: PhaseAbout) -> PhaseResults:
        """See `Convention.results`."""
        counts = {
            "transitions_truth": table.true,
            "transitions_predicted": table.predicted,
            "transitions_missed": table.missed,
            "transitions_false": table.false,
        }
        return PhaseResults(
            scores={
                **pooled_scores(self.means(table, np.ones((1, len(videos)))), table.single),
                **{name: float(values.sum()) for name, values in counts.items()},
            },
            per_video=numbers_by_video(videos, {**table.single, **counts}),
            about=about,
        )


def _percentiles(delays: FloatArray, weights: FloatArray) -> dict[str, FloatArray]:
    """Return median and 90th percentile of rising `delays` (N,), (B,) each.

    Delay n occurs weights[b, n] times. They are interpolated linearly, as NumPy does; NaN without delays.
    """
    before = weights.cumsum(axis=1)  # (B, N)
    total = weights.sum(axis=1)
    found = {}
    for name, share in _SHARES.items():
        place = share * np.maximum(total - 1, 0)
        low, high = (
            np.minimum((before <= at[:, None]).sum(axis=1), len(delays) - 1) for at in (np.floor(place), np.ceil(place))
        )
        part = place - np.floor(place)
        values = delays[low] * (1 - part) + delays[high] * part if len(delays) else np.zeros(len(weights))
        found[name] = np.where(total > 0, values, np.nan)
    return found


def _rates(
    true: IntArray, missed: IntArray, false: IntArray, hours: FloatArray, weights: FloatArray
) -> dict[str, FloatArray]:
    """Return the percentage of missed transitions and the false ones per hour, (B,) each, of weighted videos (B, V)."""
    with np.errstate(invalid="ignore"):
        return {
            "missed": 100.0 * (weights @ missed) / (weights @ true),
            "false_per_hour": (weights @ false) / (weights @ hours),
        }


CONVENTIONS.register(
    "transitions",
    TransitionConvention(
        title="transitions between phases: delay, missed and false ones",
        absent_phase="not applicable: transitions are compared; a skipped phase is a missed transition",
        std="over videos (n - 1)",
        unit="delays in seconds, missed in percent, false per hour",
        titles={
            "delay_median": "Delay (s)",
            "delay_p90": "Delay 90 % (s)",
            "missed": "Missed (%)",
            "false_per_hour": "False/h",
        },
        source="definitions of this project (docs/evaluation.md)",
    ),
)
