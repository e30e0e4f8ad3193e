"""Relaxed boundaries: errors within ten seconds of a phase boundary are forgiven, as the field's official script does.

The evaluation program of the M2CAI 2016 workflow challenge in its Cholec80 variant has rules for Cholec80's seven
phases in this order alone; for other phases there is no such convention. A convention with rules of its own, for
another data set, is a `FrameConvention` whose `right` calls `relaxed_right` with other `Rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from configs.dataset_spec import folded_name
from evaluation.metrics.conventions import CONVENTIONS, DROPPED, OVER_PHASES, FrameConvention, mean_known
from evaluation.metrics.counts import BoolArray, FloatArray, IntArray, PhasePair, PhaseTable, strict_right
from evaluation.metrics.results import Score
from features.run_lengths import runs

WINDOW_S = 10.0


@dataclass(frozen=True)
class Rules:
    """Phases in the order of their ids, and the differences prediction - truth that count as right at the start
    (`late`) and at the end (`early`) of a run of each of them."""

    phases: tuple[str, ...]
    late: tuple[tuple[int, ...], ...]
    early: tuple[tuple[int, ...], ...]


# The wider differences are the script's, since packaging, cleaning and retraction come in any order.
CHOLEC80 = Rules(
    phases=(
        "Preparation",
        "CalotTriangleDissection",
        "ClippingCutting",
        "GallbladderDissection",
        "GallbladderPackaging",
        "CleaningCoagulation",
        "GallbladderRetraction",
    ),
    late=((-1,),) * 5 + ((-1, -2),) * 2,
    early=((1,),) * 3 + ((1, 2),) * 4,
)


def phase_runs(truth: IntArray) -> list[tuple[int, int, int]]:
    """Runs of one phase as (start, stop, phase), positions on the whole timeline.

    Unlabelled frames are skipped: they are part of a run if the phase is the same on both sides, and of none if it
    differs. So windows are measured in time even if only some frames have a label.
    """
    labelled = np.flatnonzero(truth >= 0)
    return [(int(labelled[r.start]), int(labelled[r.end - 1]) + 1, r.value) for r in runs(truth[labelled])]


def relaxed_window_frames(fps: float) -> int:
    """How many samples at `fps` lie within the ten seconds; below 0.1 fps none do."""
    return int(WINDOW_S * fps + 1e-9)


def relaxed_right(video: PhasePair, fps: float | None, mask_fault: bool, rules: Rules = CHOLEC80) -> BoolArray:
    """(T,) whether a labelled frame is right once ten seconds around phase boundaries are forgiven.

    With t = min(10 s, length of the run), in each run of a phase in the truth: among the first t samples the previous
    phase is right (late transition), among the last t the next one (early transition); `rules` say how far.
    `mask_fault` restates the official script (M2CAI 2016, Cholec80 variant): it finds early transitions among the last
    t samples and then marks the *first* t, in MATLAB `curDiff(curDiff(end-t+1:end)==1) = 0`.
    """
    right, labelled = strict_right(video), video.labelled & (video.predicted >= 0)
    difference = video.predicted - video.truth
    window = relaxed_window_frames(fps or 0.0)
    for start, stop, phase in phase_runs(video.truth):
        t = min(window, stop - start)
        first, last = slice(start, start + t), slice(stop - t, stop)
        late = labelled[first] & np.isin(difference[first], rules.late[phase])
        early = labelled[last] & np.isin(difference[last], rules.early[phase])
        right[first] |= late
        right[first if mask_fault else last] |= early
    return right & labelled


def refuses(phases: Sequence[str], fps: float | None, rules: Rules = CHOLEC80) -> str | None:
    """Why the rules do not apply to these phases at this rate, and what to do."""
    if tuple(map(folded_name, phases)) != tuple(map(folded_name, rules.phases)):
        return (
            "the official script has rules for Cholec80's seven phases in their usual order only; leave it out for "
            "this data set"
        )
    if fps is None:
        return f"its window of {WINDOW_S:g} s needs the rate of the rows, which the files leave open; add --fps"
    return None


def surgformer_cells(table: PhaseTable) -> FloatArray:
    """(V, C) F1 in percent as in Surgformer's copy of the official script, NaN where it drops a cell.

    2PR / (P + R) of precision and recall *before* they are cut, then cut to 100. A phase absent from the truth, never
    predicted, or without a right frame (0/0) is dropped.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = 100.0 * table.hits / table.predicted, 100.0 * table.hits / table.truth
        f1 = np.minimum(2.0 * precision * recall / (precision + recall), 100.0)
    return np.where((table.truth == 0) | ~np.isfinite(precision), np.nan, f1)


def _f1_surgformer(table: PhaseTable) -> dict[str, Score]:
    """Mean over phases of their means over videos; the standard deviation is over videos, unlike that of `f1`."""
    cells = surgformer_cells(table)
    mean = mean_known(mean_known(cells, axis=0), axis=0)
    return {"f1_surgformer": Score.of(mean, mean_known(cells, axis=1))}


_SCRIPT = "Evaluate.m and Main.m of the M2CAI 2016 workflow challenge"
for _name, _fault, _title, _source in (
    ("relaxed_matlab", True, "with its mask fault", "Cholec80 variant"),
    ("relaxed_fixed", False, "with its mask fault fixed", "early transitions applied to the last samples"),
):
    _convention = FrameConvention(
        title=f"10 s relaxed boundaries, the official script {_title}",
        order="phases",
        absent_phase=DROPPED,
        std=OVER_PHASES,
        source=f"{_SCRIPT}, {_source}",
        window_s=WINDOW_S,
        right=partial(relaxed_right, mask_fault=_fault),
        refuses=refuses,
        extra=_f1_surgformer if _fault else None,
    )
    CONVENTIONS.register(_name, _convention)
