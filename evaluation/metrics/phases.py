"""Compute phase metrics under named conventions, and find out which conventions a data set and a rate allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import class_ids, folded_name
from configs.errors import UserError
from evaluation.metrics.conventions import CONVENTIONS
from evaluation.metrics.counts import PhasePair, label_pairs
from evaluation.metrics.results import PhaseAbout, PhaseResults

NO_SCORES = "it needs a probability of each phase in each frame, which the predictions do not have"


def evaluate_phases(
    truth: Mapping[str, NDArray[Any]],
    predicted: Mapping[str, NDArray[Any]],
    phases: Sequence[str],
    fps: float | None,
    conventions: Sequence[str] | None = None,
    *,
    split: str | None = None,
    background: Sequence[str] = (),
    offline: bool = False,
    decoding: str | None = None,
    scores: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, PhaseResults]:
    """Score predicted phases against the truth, and return one result per convention.

    `truth` and `predicted` map video ids to phase ids (T,) at `fps` frames per second (None: not known). In the truth,
    -1 means no label; such frames are not counted. In the prediction, NO_PREDICTION (-2) means that there is none,
    which counts as wrong. `phases` are the C names in the order of ids. Segmental metrics ignore the phases in
    `background`. `scores` are the probabilities (T, C) of the predictions, from which calibration is computed; the
    predicted phase need not be the most probable one. With `conventions=None`, all conventions are computed that
    phases, rate and scores allow (see `unavailable_conventions`). `split`, `offline` (whether predictions depend on
    later frames) and `decoding` (its mode and lag) are only recorded.

    Videos without any label are left out and named in `about`. Raises UserError for an unknown or unavailable
    convention, and if truth and prediction do not match.
    """
    if fps is not None and not 1e-3 <= fps <= 1e4:  # NaN fails too
        raise UserError(f"fps {fps}: the rate of the labels must be between 0.001 and 10000 frames per second")
    names = chosen_conventions(conventions, phases, fps, scores is not None)
    ids = background_ids(background, phases)
    videos, without = label_pairs(truth, predicted, len(phases), scores)
    frames, digest = int(sum(video.labelled.sum() for video in videos)), _truth_sha256(videos)
    results = {}
    for name in names:
        convention = CONVENTIONS.find(name)
        about = PhaseAbout(
            convention=name,
            title=convention.title,
            source=convention.source,
            unit=convention.unit,
            split=split,
            fps=None if fps is None else float(fps),
            window_s=convention.window_s,
            absent_phase=convention.absent_phase,
            std=convention.std,
            videos=len(videos),
            frames=frames,
            truth_sha256=digest,
            videos_without_labels=without,
            background=list(background) if ids and convention.has_background else None,
            offline=offline or None,
            decoding=decoding,
        )
        table = convention.count(videos, len(phases), fps, ids)
        results[name] = convention.results(table, videos, phases, about)
    return results


def background_ids(background: Sequence[str], phases: Sequence[str]) -> list[int]:
    """Return the ids of the phases named in `background`. Raises UserError for a name that is not in `phases`."""
    known = class_ids(phases, {})
    for name in background:
        if folded_name(name) not in known:
            raise UserError(f"background {name!r}: no such phase; choose from {', '.join(phases)}")
    return [known[folded_name(name)] for name in background]


def unavailable_conventions(phases: Sequence[str], fps: float | None = 1.0, scores: bool = True) -> dict[str, str]:
    """Return the conventions that these phases at this rate do not allow, each with the reason and advice.

    `scores` says whether the predictions have probabilities.
    """
    found = {name: CONVENTIONS.find(name) for name in CONVENTIONS.names()}
    reasons = {
        name: NO_SCORES if one.needs_scores and not scores else one.unavailable(phases, fps)
        for name, one in found.items()
    }
    return {name: reason for name, reason in reasons.items() if reason}


def majority_phase(tracks: Sequence[NDArray[Any]]) -> int:
    """Return the phase with the most labelled frames in `tracks` ((T,) ids, -1 = no label); the lowest id on a tie.

    Raises UserError if no frame has a label.
    """
    labels = np.concatenate([np.empty(0, np.int64), *tracks])
    labels = labels[labels >= 0]
    if not labels.size:
        raise UserError("no training video has phase labels, so there is no majority phase; check the split")
    return int(np.bincount(labels).argmax())


def chosen_conventions(
    conventions: Sequence[str] | None, phases: Sequence[str], fps: float | None, scores: bool = True
) -> list[str]:
    """Check the conventions asked for, and return them; None stands for all that can be computed."""
    unavailable = unavailable_conventions(phases, fps, scores)
    if conventions is None:
        return [name for name in CONVENTIONS.names() if name not in unavailable]
    for name in map(require_convention, conventions):
        if name in unavailable:
            raise UserError(f"convention {name}: {unavailable[name]}")
    return list(dict.fromkeys(conventions))


def require_convention(name: str) -> str:
    """Return the name of a convention unchanged. Raises UserError listing all names if it is unknown."""
    if name not in CONVENTIONS.names():
        raise UserError(f"unknown convention {name!r}; choose from {', '.join(CONVENTIONS.names())}")
    return name


def _truth_sha256(videos: Sequence[PhasePair]) -> str:
    """Return a hash of the truth of all videos; results can be compared only if it is the same."""
    digest = sha256()
    for video in videos:
        digest.update(f"{video.id} {len(video.truth)} ".encode() + np.asarray(video.truth, np.int8).tobytes())
    return digest.hexdigest()
