"""The loss of stage two, for the logits of a head's stages and one or several label tracks.

It is cross-entropy on labelled frames. If the settings say so, frames near transitions count more, and the smoothing
term of MS-TCN is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from configs import schema
from engine.processes import one_process
from features.video_labels import NO_LABEL

# Differences of log-probabilities beyond this (tau in the paper) count as this much and get no gradient.
_LARGEST_STEP = 4.0


class PhaseLoss:
    """Cross-entropy over labelled frames, summed over a head's stages; 0 if no frame has a label.

    It is the mean over the batch's labelled frames, weighted by class. With `inverse_frequency`, phase c has the weight
    N / (P n_c), where n_c is the number of labelled training frames of phase c, N that of all phases, and P the number
    of phases that occur. Phases that do not occur have weight 0. Frames may have weights too. With several processes,
    `over_all` adds up the weights of labelled frames over all of them, and each process returns its part of the mean.
    """

    def __init__(
        self, settings: schema.TemporalConfig, counts: Tensor, over_all: Callable[[Tensor], Tensor] = one_process
    ) -> None:
        """`counts` (C,) holds the number of labelled training frames of each phase."""
        self.over_all = over_all
        self.label_smoothing, self.smoothing_weight = settings.label_smoothing, settings.smoothing_weight
        self.weight = torch.ones(len(counts), device=counts.device)
        if settings.class_weighting == "inverse_frequency":
            counts = counts.to(self.weight)
            self.weight = counts.sum() / (counts > 0).sum() / counts
            self.weight[counts == 0] = 0.0

    def __call__(self, stages: Sequence[Tensor], phase: Tensor, of_frames: Tensor | None = None) -> Tensor:
        """The loss, a scalar, of logits [(B, T, C), ...] per stage for phases (B, T), -1 = no label.

        `of_frames` (B, T) holds weights of frames, by which those of their classes are multiplied.
        """
        target = phase.flatten()
        labelled = target != NO_LABEL
        weights = self.weight[target.clamp(min=0)] * labelled
        if of_frames is not None:
            weights = weights * of_frames.flatten()
        total = self.over_all(weights.sum()).clamp(min=torch.finfo(self.weight.dtype).tiny)
        summed = [self._cross_entropy(logits.flatten(0, 1).float(), target, of_frames) for logits in stages]
        loss = torch.stack(summed).sum() / total
        return loss + self.smoothing_weight * self._smoothing(stages, phase) if self.smoothing_weight else loss

    def _cross_entropy(self, logits: Tensor, target: Tensor, of_frames: Tensor | None) -> Tensor:
        """The weighted sum over the frames of logits (N, C)."""
        losses = F.cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=NO_LABEL,
            reduction="sum" if of_frames is None else "none",
            label_smoothing=self.label_smoothing,
        )
        return losses if of_frames is None else (losses * of_frames.flatten()).sum()

    def _smoothing(self, stages: Sequence[Tensor], phase: Tensor) -> Tensor:
        """The truncated mean squared error of MS-TCN (Farha and Gall, CVPR 2019), summed over stages.

        It is the mean of min(tau, |log p_t - log p_(t-1)|)^2 over classes and over pairs of neighbouring frames that
        both have a label. The earlier frame gets no gradient. The pair across the border of two chunks is left out.
        """
        labelled = phase != NO_LABEL
        pairs = labelled[:, 1:] & labelled[:, :-1]  # (B, T - 1)
        total = self.over_all(pairs.sum()).clamp(min=1)
        summed = []
        for logits in stages:
            log_p = logits.float().log_softmax(dim=-1)
            squared = (log_p[:, 1:] - log_p[:, :-1].detach()).square().clamp(max=_LARGEST_STEP**2)
            summed.append((squared.mean(dim=-1) * pairs).sum())
        return torch.stack(summed).sum() / total


class TracksLoss:
    """The sum over label tracks of each track's `PhaseLoss`, with its own class weights and labelled frames."""

    def __init__(
        self,
        settings: schema.TemporalConfig,
        counts: Sequence[Tensor],
        over_all: Callable[[Tensor], Tensor] = one_process,
    ) -> None:
        """`counts` holds the number of labelled training frames of each class, (C,) for each track."""
        self.of_tracks = [PhaseLoss(settings, one, over_all) for one in counts]
        self.widths = [len(one) for one in counts]

    def __call__(self, stages: Sequence[Tensor], labels: Tensor, of_frames: Tensor | None = None) -> Tensor:
        """The loss, a scalar, of logits [(B, T, C), ...] per stage for labels (L, B, T), -1 = no label.

        `of_frames` (L, B, T) holds weights of frames.
        """
        weights = [None] * len(labels) if of_frames is None else list(of_frames)
        if len(self.widths) == 1:
            return self.of_tracks[0](stages, labels[0], weights[0])
        by_track = zip(*(logits.split(self.widths, dim=-1) for logits in stages), strict=True)
        losses = [loss(*args) for loss, *args in zip(self.of_tracks, by_track, labels, weights, strict=True)]
        return torch.stack(losses).sum()


def transition_map(labels: NDArray[np.integer], before: float, after: float) -> NDArray[np.float32]:
    """How near each frame of a video with labels (T,) is to a transition, (T,): 1 at the first frame of a new label.

    It is LoViT's map (Liu et al., arXiv 2305.08989), the maximum over transitions of a Gaussian with the standard
    deviation `before` (in frames) to the left and `after` to the right, here not cut off at three of these. It is wide
    to the right, since a causal model sees a transition only afterwards. The first label of a video is no transition,
    and frames without a label (-1) are passed over.
    """
    time = np.arange(len(labels))
    known = np.flatnonzero(labels >= 0)
    changes = known[1:][labels[known[1:]] != labels[known[:-1]]]
    if not len(changes):
        return np.zeros(len(labels), dtype=np.float32)
    passed = np.searchsorted(changes, time, side="right")  # (T,) number of transitions up to each frame
    since = np.where(passed > 0, time - changes[np.maximum(passed - 1, 0)], np.inf)
    until = np.where(passed < len(changes), changes[np.minimum(passed, len(changes) - 1)] - time, np.inf)
    gaussians = [np.exp(-((distance / sigma) ** 2) / 2) for distance, sigma in ((since, after), (until, before))]
    return np.maximum(*gaussians).astype(np.float32)
