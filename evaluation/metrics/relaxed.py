"""Relaxed boundaries: certain errors within ten seconds of a phase boundary count as right, as in the official script.

The script is the evaluation program of the M2CAI 2016 workflow challenge, in its variant for Cholec80. It has rules
only for Cholec80's seven phases in this order, so these conventions do not exist for other phases. For another data set
with rules of its own, make a `FrameConvention` whose `right` calls `relaxed_right` with other `Rules`.
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
    """Which wrong predictions count as right near the boundaries of each phase.

    `phases` are in the order of their ids. For each phase, `late` and `early` contain the differences prediction -
    truth that count as right at the start and at the end of a run of the phase.
    """

    phases: tuple[str, ...]
    late: tuple[tuple[int, ...], ...]
    early: tuple[tuple[int, ...], ...]


# As in the script, more differences are accepted for packaging, cleaning and retraction, which occur in any order.
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
    """Return the runs of equal phases as (start, stop, phase), where start and stop count all frames.

    Frames without a label belong to a run if the phase is the same on both sides of them, and to no run otherwise.
    Windows are therefore measured in time even if only some frames have a label.
    """
    labelled = np.flatnonzero(truth >= 0)
    return [(int(labelled[r.start]), int(labelled[r.end - 1]) + 1, r.value) for r in runs(truth[labelled])]


def relaxed_window_frames(fps: float) -> int:
    """Return how many samples at `fps` are within the ten seconds (none below 0.1 fps)."""
    return int(WINDOW_S * fps + 1e-9)


def relaxed_right(video: PhasePair, fps: float | None, mask_fault: bool, rules: Rules = CHOLEC80) -> BoolArray:
    """Return whether each labelled frame is right, (T,), if errors within ten seconds of phase boundaries are accepted.

    In each run of a phase in the truth, let t be the number of samples in ten seconds, or in the whole run if it is
    shorter. Among the first t samples, the previous phase is accepted (late transition), and among the last t samples,
    the next phase (early transition); `rules` contain the exact differences. `mask_fault` reproduces a fault of the
    official script (M2CAI 2016, Cholec80 variant): it finds early transitions among the last t samples, but then
    accepts the corresponding samples among the *first* t (in MATLAB, `curDiff(curDiff(end-t+1:end)==1) = 0`).
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
    """Return why the rules do not apply to these phases at this rate, and what to do, or None if they apply."""
    if tuple(map(folded_name, phases)) != tuple(map(folded_name, rules.phases)):
        return (
            "the official script has rules for Cholec80's seven phases in their usual order only; leave it out for "
            "this data set"
        )
    if fps is None:
        return f"its window of {WINDOW_S:g} s needs the rate of the rows, which the files do not state; add --fps"
    return None


def surgformer_cells(table: PhaseTable) -> FloatArray:
    """Return F1 (V, C) in percent as Surgformer's copy of the official script computes it, with NaN for omitted cells.

    F1 is 2PR / (P + R) of precision and recall *before* these are limited to 100, and is then itself limited to 100. A
    cell is omitted if the phase is absent from the truth, is never predicted, or has no right frame (0/0).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = 100.0 * table.hits / table.predicted, 100.0 * table.hits / table.truth
        f1 = np.minimum(2.0 * precision * recall / (precision + recall), 100.0)
    return np.where((table.truth == 0) | ~np.isfinite(precision), np.nan, f1)


def _f1_surgformer(table: PhaseTable) -> dict[str, Score]:
    """Average over videos, then over phases. Unlike that of `f1`, the standard deviation is over videos."""
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
        titles={"f1_surgformer": f"F1 as Surgformer's copy of {_name} has it"} if _fault else {},
    )
    CONVENTIONS.register(_name, _convention)
