"""Linear probes of frozen features: logistic regression of each frame's tools or phases on its embedding alone.

    probe = fit_tools(train, val, tools)      # videos as from `load_feature_set`: {id: VideoFeatures}
    logits = probe.logits(features)           # (T, D) in any float type -> (T, K) fp32
    probe = fit_phases(train, val, classes)   # also of another track: fit_phases(..., track="steps")
    probabilities = np.exp(probe.log_probabilities(features))  # (T, C) fp32
    probe.c, probe.score                      # the chosen C, and its score on the validation videos (0 to 1)

Features are standardised with the mean and standard deviation of the labelled training frames. scikit-learn's
`LogisticRegression` (L2, lbfgs) is trained on them with every C of `GRID`, and the C with the best score on the
validation videos is kept, the smallest on a tie: of tools the mAP on pooled frames, of phases the frame accuracy, mean
over videos. Validation videos are never trained on. Without labelled ones, C is `DEFAULT_C`, and a line says so.

The result depends on the videos and their labels alone: neither on their order nor on the number of threads. There is
no random state.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import MAIN_TRACK
from engine.progress import BAR_AFTER_S, progress_bar, say
from engine.stopping import StopRequest
from evaluation.metrics.tools import pooled_map
from features.ids import natural_key
from features.store import VideoFeatures
from stage2_temporal.heads.standardise import LEAST_STD

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

GRID = (0.0001, 0.001, 0.01, 0.1, 1.0)  # C of scikit-learn: the inverse of the regularisation's strength
DEFAULT_C = 1.0
MAX_ITERATIONS = 1000
NEVER = -100.0  # the logit of a phase that no training frame has

Videos = Mapping[str, VideoFeatures]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear function of standardised features, with the C that was chosen and its score (None: not chosen)."""

    mean: Floats  # (D,)
    scale: Floats  # (D,), 1 / standard deviation
    weights: Floats  # (D, K)
    bias: Floats  # (K,)
    c: float
    score: float | None

    def logits(self, features: Any) -> Floats:
        """Features (T, D), an array of any float type or `StoredFeatures` -> logits (T, K)."""
        with _one_thread():
            return _standardised(np.asarray(features), self.mean, self.scale) @ self.weights + self.bias

    def log_probabilities(self, features: Any) -> Floats:
        """Features (T, D) -> the log-probabilities (T, C) of classes of which each frame has one."""
        logits = self.logits(features)
        logits -= logits.max(axis=1, keepdims=True)
        normalised: Floats = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return normalised


def fit_tools(train: Videos, val: Videos, tools: Sequence[str], stop: StopRequest | None = None) -> Probe:
    """One logistic regression per tool, with one C for all tools.

    A frame counts for a tool if it has a label of it. A tool that is never or always present in the training frames
    gets a constant logit, and a line names it. Raises UserError if no training frame has a tool label, and Stopped when
    asked to stop.
    """
    table, labels, mean, scale = _training_frames(train, lambda video: video.tools, "tool labels")
    known, present = labels >= 0, labels == 1  # (N, K)
    absent = known & ~present
    varying = [k for k in range(len(tools)) if present[:, k].any() and absent[:, k].any()]
    _say_constant(tools, present, absent)
    labelled = {name: video for name, video in _in_order(val) if (video.tools >= 0).any()}
    cs = _grid(any((video.tools == 1).any() for video in labelled.values()), "tools")
    paths = _fit_all(table, [(present[:, k], known[:, k]) for k in varying], cs, "tools", stop)
    constant = np.log((present.sum(axis=0) + 0.5) / (absent.sum(axis=0) + 0.5)).astype(np.float32)
    probes = []
    for i, c in enumerate(cs):
        weights, bias = np.zeros((table.shape[1], len(tools)), np.float32), constant.copy()
        for k, path in zip(varying, paths, strict=True):
            weights[:, k], bias[k] = path[i].coef_[0], path[i].intercept_[0]
        probes.append(Probe(mean, scale, weights, bias, c, None))

    def score(probe: Probe) -> float | None:
        truth = {name: video.tools for name, video in labelled.items()}
        return pooled_map(truth, {name: probe.logits(video.features) for name, video in labelled.items()}, tools)

    return _best(probes, score)


def fit_phases(
    train: Videos, val: Videos, classes: Sequence[str], track: str = MAIN_TRACK, stop: StopRequest | None = None
) -> Probe:
    """Multinomial logistic regression of the labelled frames' phases, or of another track's classes.

    A class that no training frame has gets a logit so low that it is never predicted. Raises UserError if no training
    frame has a label, and Stopped when asked to stop.
    """
    what = "phase labels" if track == MAIN_TRACK else f"{track} labels"
    table, labels, mean, scale = _training_frames(train, lambda video: video.of_track(track), what)
    labelled = {name: video for name, video in _in_order(val) if (video.of_track(track) >= 0).any()}
    cs = _grid(bool(labelled), what.removesuffix(" labels"))
    seen = np.unique(labels)
    targets = [(labels, np.ones(len(labels), bool))] if len(seen) > 1 else []
    paths = _fit_all(table, targets, cs, track, stop)
    probes = []
    for i, c in enumerate(cs):
        weights = np.zeros((table.shape[1], len(classes)), np.float32)
        bias = np.full(len(classes), NEVER, np.float32)
        bias[seen] = 0.0
        for path in paths:  # at most one; of two classes it has the second one's logit alone
            columns = seen if len(seen) > 2 else seen[1:]
            weights[:, columns], bias[columns] = path[i].coef_.T, path[i].intercept_
        probes.append(Probe(mean, scale, weights, bias, c, None))

    def accuracy(probe: Probe, video: VideoFeatures) -> float:
        truth = video.of_track(track)
        return float((probe.logits(video.features).argmax(axis=1) == truth)[truth >= 0].mean())

    def score(probe: Probe) -> float | None:
        return statistics.fmean([accuracy(probe, video) for video in labelled.values()]) if labelled else None

    return _best(probes, score)


def _in_order(videos: Videos) -> list[tuple[str, VideoFeatures]]:
    return sorted(videos.items(), key=lambda item: natural_key(item[0]))


def _training_frames(
    videos: Videos, labels_of: Callable[[VideoFeatures], NDArray[np.int8]], what: str
) -> tuple[Floats, NDArray[np.int8], Floats, Floats]:
    """The labelled frames of all videos, standardised (N, D), their labels (N,) or (N, K), and the constants (D,).

    Videos are read twice, one at a time, so that only the table needs memory.
    """
    kept = [
        (video, labels, rows) for _, video in _in_order(videos) if (rows := _rows(labels := labels_of(video))).any()
    ]
    if not kept:
        raise UserError(f"no training video has {what}; add annotations, then index and extract")
    frames = sum(int(rows.sum()) for _, _, rows in kept)
    width = kept[0][0].features.shape[1]
    total, squares = np.zeros(width), np.zeros(width)
    for video, _, rows in kept:
        wide = np.asarray(video.features)[rows].astype(np.float64)
        total += wide.sum(axis=0)
        squares += np.einsum("td,td->d", wide, wide)
    mean = total / frames
    std = np.sqrt(np.maximum(squares / frames - mean**2, 0))
    least = LEAST_STD * float(np.median(std))  # as `Standardise` does before a head
    std = np.where(std > least, std, least or 1.0)
    centre, scale = mean.astype(np.float32), (1 / std).astype(np.float32)
    table, first = np.empty((frames, width), np.float32), 0
    for video, _, rows in kept:
        part = _standardised(np.asarray(video.features)[rows], centre, scale)
        table[first : first + len(part)] = part
        first += len(part)
    return table, np.concatenate([labels[rows] for _, labels, rows in kept]), centre, scale


def _rows(labels: NDArray[np.int8]) -> NDArray[np.bool_]:
    """The frames (T,) with any label, given labels (T,) or (T, K)."""
    return np.asarray((labels >= 0).reshape(len(labels), -1).any(axis=1))


def _standardised(features: NDArray[Any], mean: Floats, scale: Floats) -> Floats:
    values: Floats = np.subtract(features, mean, dtype=np.float32)
    values *= scale
    return values


def _say_constant(tools: Sequence[str], present: NDArray[np.bool_], absent: NDArray[np.bool_]) -> None:
    """Name the tools that the labels (N, K) of the training frames show never or always."""
    never = [name for k, name in enumerate(tools) if not present[:, k].any()]
    always = [name for k, name in enumerate(tools) if present[:, k].any() and not absent[:, k].any()]
    parts = [f"{', '.join(names)} {when}" for names, when in ((never, "never"), (always, "always")) if names]
    if parts:
        say(f"note: present in the training frames: {'; '.join(parts)}; a probe can only give these a constant score")


def _grid(chosen: bool, what: str) -> tuple[float, ...]:
    if not chosen:
        say(f"note: no validation video shows {what}, so the probe's regularisation is C={DEFAULT_C:g}, not chosen")
    return GRID if chosen else (DEFAULT_C,)


def _fit_all(
    table: Floats,
    targets: Sequence[tuple[NDArray[Any], NDArray[np.bool_]]],
    cs: Sequence[float],
    what: str,
    stop: StopRequest | None,
) -> list[list[LogisticRegression]]:
    """For each target, classes (N,) and the frames that count (N,), the regressions with each C.

    Each is computed on one thread, so that its sums do not depend on the number of threads. As many are computed at
    once as torch may use threads, which is this process's share of the cores if several train at the same time.
    """
    from sklearn.linear_model import LogisticRegression

    def fit(c: float, classes: NDArray[Any], counts: NDArray[np.bool_]) -> LogisticRegression:
        if stop is not None:
            stop.raise_if_set()
        model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
        model.fit(table, classes, sample_weight=counts.astype(np.float32))
        bar.update(1)
        return model

    with (
        progress_bar(len(targets) * len(cs), f"probe of {what}", "fit", delay=BAR_AFTER_S) as bar,
        _one_thread(),
        warnings.catch_warnings(),
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
    ):
        warnings.simplefilter("ignore")  # what was reached after the last iteration is good enough
        jobs = {(k, c): pool.submit(fit, c, *targets[k]) for c in reversed(cs) for k in range(len(targets))}
        return [[jobs[k, c].result() for c in cs] for k in range(len(targets))]


def _one_thread() -> Any:
    """A context in which matrix products use one thread, so that sums do not depend on the number of threads."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def _best(probes: Sequence[Probe], score: Callable[[Probe], float | None]) -> Probe:
    """The probe with the highest score, the first on a tie; the only one if there is no score."""
    scored = [replace(probe, score=score(probe)) for probe in probes]
    return max(scored, key=lambda probe: -math.inf if probe.score is None else probe.score)
