"""Losses of single frames, for tool presence and phases, with class weights, in one process or several."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.schema import CnnConfig
from engine.processes import one_process
from stage1_cnn.data import LabelledFrames
from stage1_cnn.model import NetOutput

Total = Callable[[Tensor], Tensor]  # adds up a tensor over all processes


class FrameLoss(nn.Module):
    """Binary cross-entropy on tools plus weighted cross-entropy on phases, over the labelled entries of a batch.

    With `class_weighting=inverse_frequency`, classes are weighted by their frequency in the training videos. A tool's
    positive entries have the weight (frames without the tool) / (frames with it), so that presence and absence have the
    same total weight. A phase has the weight frames / (phases x frames of this phase), as with scikit-learn's
    "balanced". Classes that never appear have weight 1.
    """

    positive_weight: Tensor | None  # (K,)
    class_weight: Tensor | None  # (C,)

    def __init__(self, cnn: CnnConfig, train: LabelledFrames, phases: int = 0, over_all: Total = one_process) -> None:
        super().__init__()
        self.over_all = over_all
        self.phase_weight = cnn.phase_loss_weight
        weighted = cnn.class_weighting == "inverse_frequency"
        self.register_buffer("positive_weight", positive_weights(train.tools) if weighted else None)
        self.register_buffer("class_weight", phase_weights(train.phase, phases) if weighted else None)

    def forward(self, output: NetOutput, phase: Tensor, tools: Tensor) -> Tensor:
        """The mean loss, a float32 scalar, for phases (N,) and tools (N, K).

        With several processes each returns its part: their sum is the mean over all labelled entries of the batch.
        """
        loss = tool_loss(output.tool_logits, tools, self.positive_weight, self.over_all)
        if output.phase_logits is not None:
            loss = loss + self.phase_weight * phase_loss(output.phase_logits, phase, self.class_weight, self.over_all)
        return loss


def tool_loss(
    logits: Tensor, tools: Tensor, positive_weight: Tensor | None = None, over_all: Total = one_process
) -> Tensor:
    """Binary cross-entropy of logits (..., K) and labels (..., K), -1 = no label: mean over labelled entries, float32.

    The loss is 0 if nothing is labelled. `positive_weight` (K,) multiplies the loss of tools that are present.
    `over_all` adds up the number of labelled entries over all processes, so that each returns its part of the mean.
    """
    labelled = tools >= 0
    entries = F.binary_cross_entropy_with_logits(
        logits.float(), tools.clamp(min=0), pos_weight=positive_weight, reduction="none"
    )
    return (entries * labelled).sum() / over_all(labelled.sum()).clamp(min=1)


def phase_loss(
    logits: Tensor, phase: Tensor, class_weight: Tensor | None = None, over_all: Total = one_process
) -> Tensor:
    """Cross-entropy of logits (..., C) and labels (...), -1 = no label: mean over labelled frames, float32.

    The loss is 0 if nothing is labelled. With `class_weight` (C,) the mean is weighted. `over_all` is the same as in
    `tool_loss`.
    """
    labelled = (phase >= 0).float()
    weights = labelled if class_weight is None else class_weight[phase.clamp(min=0)] * labelled
    summed = F.cross_entropy(
        logits.flatten(0, -2).float(), phase.flatten(), weight=class_weight, ignore_index=-1, reduction="sum"
    )
    return summed / over_all(weights.sum()).clamp(min=torch.finfo(torch.float32).tiny)


def positive_weights(tools: NDArray[np.int8]) -> Tensor:
    """The weights (K,) of positive tool entries, from the labels (R, K), -1 = no label."""
    present, absent = (tools == 1).sum(axis=0), (tools == 0).sum(axis=0)
    usable = (present > 0) & (absent > 0)
    return torch.from_numpy(np.where(usable, absent / np.maximum(present, 1), 1.0).astype(np.float32))


def phase_weights(phase: NDArray[np.int8], phases: int) -> Tensor:
    """The weights (C,) of phases, from the labels (R,), -1 = no label."""
    counts = np.bincount(phase[phase >= 0], minlength=phases)
    balanced = counts.sum() / (max(1, (counts > 0).sum()) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, balanced, 1.0).astype(np.float32))
