"""The loss of stage two, for the logits of a head's stages and one or several label tracks.

It is cross-entropy on labelled frames and, if the settings say so, the smoothing term of MS-TCN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
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
    of phases that occur. Phases that do not occur have weight 0. With several processes, `over_all` adds up the weights
    of labelled frames over all of them, and each process returns its part of the mean.
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

    def __call__(self, stages: Sequence[Tensor], phase: Tensor) -> Tensor:
        """The loss, a scalar, of logits [(B, T, C), ...] per stage for phases (B, T), -1 = no label."""
        target = phase.flatten()
        labelled = target != NO_LABEL
        total = self.over_all((self.weight[target.clamp(min=0)] * labelled).sum())
        total = total.clamp(min=torch.finfo(self.weight.dtype).tiny)
        summed = [
            F.cross_entropy(
                logits.flatten(0, 1).float(),
                target,
                weight=self.weight,
                ignore_index=NO_LABEL,
                reduction="sum",
                label_smoothing=self.label_smoothing,
            )
            for logits in stages
        ]
        loss = torch.stack(summed).sum() / total
        return loss + self.smoothing_weight * self._smoothing(stages, phase) if self.smoothing_weight else loss

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

    def __call__(self, stages: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss, a scalar, of logits [(B, T, C), ...] per stage for labels (L, B, T), -1 = no label."""
        if len(self.widths) == 1:
            return self.of_tracks[0](stages, labels[0])
        by_track = zip(*(logits.split(self.widths, dim=-1) for logits in stages), strict=True)
        losses = [loss(parts, one) for loss, parts, one in zip(self.of_tracks, by_track, labels, strict=True)]
        return torch.stack(losses).sum()
