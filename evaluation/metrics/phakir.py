"""The convention of the PhaKIR challenge (EndoVis 2024): balanced accuracy, F1 and AUROC per video, then their mean.

The challenge averages the results of each phase over the phases of a video, and then over the videos; frames between
two phases are not counted. Its evaluation program is not public, so the rules for absent phases are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics.conventions import CONVENTIONS, Convention, Videos, mean_known, numbers_by_video, over_videos
from evaluation.metrics.counts import FloatArray, PhasePair, count, strict_right
from evaluation.metrics.results import PhaseAbout, PhaseResults, Score
from evaluation.metrics.scores import percent


@dataclass(frozen=True)
class PhakirTable:
    """The scores of V videos in percent, (V,) each, with NaN where there are none."""

    balanced_accuracy: FloatArray
    f1: FloatArray
    auroc: FloatArray


def phase_auroc(video: PhasePair, classes: int) -> FloatArray:
    """Return the area under the ROC curve of each phase against the rest, (C,), from 0 to 1.

    It is the probability that a frame of the phase has a higher score than another one, where ties count half (Mann and
    Whitney's U over the number of pairs). A frame without a prediction has the score 0 for all phases. NaN for a phase
    that has no frame or all frames, and without scores.
    """
    from scipy.stats import rankdata

    if video.scores is None:
        return np.full(classes, np.nan)
    rows = np.flatnonzero(video.labelled)
    scores = np.where(video.predicted[rows, None] >= 0, video.scores[rows], 0.0)
    of_phase = np.eye(classes, dtype=bool)[video.truth[rows]]  # (T, C)
    frames = of_phase.sum(axis=0)
    above = np.where(of_phase, rankdata(scores, axis=0), 0.0).sum(axis=0) - frames * (frames + 1) / 2.0
    with np.errstate(invalid="ignore"):
        return np.asarray(above / (frames * (len(rows) - frames)))


class PhakirConvention(Convention[PhakirTable]):
    """The challenge's means over the phases of a video, then over videos. Without scores there is no AUROC."""

    def count(self, videos: Videos, classes: int, fps: float | None, background: Sequence[int]) -> PhakirTable:
        """See `Convention.count`."""
        table = count(videos, classes, strict_right)
        auroc = np.stack([100.0 * phase_auroc(video, classes) for video in videos])
        f1 = percent(2 * table.hits, table.predicted + table.truth)  # 0/0 for a phase in neither truth nor prediction
        recall = percent(table.hits, table.truth)
        return PhakirTable(*(mean_known(cells, axis=1) for cells in (recall, f1, auroc)))

    def means(self, table: PhakirTable, weights: FloatArray) -> dict[str, FloatArray]:
        """See `Convention.means`."""
        return {name: over_videos(values, weights) for name, values in vars(table).items()}

    def results(self, table: PhakirTable, videos: Videos, phases: Sequence[str], about: PhaseAbout) -> PhaseResults:
        """See `Convention.results`."""
        means = self.means(table, np.ones((1, len(videos))))
        return PhaseResults(
            scores={name: Score.of(means[name][0], values) for name, values in vars(table).items()},
            per_video=numbers_by_video(videos, vars(table)),
            about=about,
        )


CONVENTIONS.register(
    "phakir",
    PhakirConvention(
        title="PhaKIR: balanced accuracy, F1 and AUROC, per video over its phases, then over videos",
        absent_phase="balanced accuracy and AUROC: a phase absent from a video's truth is left out there; "
        "F1: one in neither truth nor prediction is left out, and one falsely predicted scores 0",
        std="over videos (n - 1)",
        titles={"balanced_accuracy": "Balanced accuracy", "auroc": "AUROC"},
        source="the description in the submission template of PhaKIR (EndoVis 2024); absent phases as read here",
    ),
)
