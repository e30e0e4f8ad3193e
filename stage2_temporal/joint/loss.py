"""Losses of the joint net: the multi-task loss, and the correlation loss of MTRCNet-CL (a KL divergence).

    multitask:    phase cross-entropy + tool_weight x tool cross-entropy
    mapping:      cross-entropy on the tools that the mapping predicts from the phase branch
    correlation:  multitask + alpha x KL divergence between the tool branch's and the mapped predictions

Jin et al., "Multi-task recurrent convolutional network with correlation loss for surgical video analysis", Medical
Image Analysis 2020, section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import JointLossConfig
from engine.device import sent_to
from engine.processes import one_process
from features.video_labels import NO_LABEL
from stage1_cnn.loss import Total, phase_loss, tool_loss
from stage2_temporal.heads.base import real_frames
from stage2_temporal.joint.net import JointOutput


class JointLoss(nn.Module):
    """The loss of one training step: `multitask`, `mapping` or `correlation` (see the module).

    Phase and tool terms are means over the labelled frames or entries of a batch. The correlation term is the mean over
    all frames, labelled or not. `over_all` adds up the counts over all processes, so that each returns its part of the
    means.
    """

    def __init__(self, config: JointLossConfig, step: str, over_all: Total = one_process) -> None:
        super().__init__()
        self.config, self.step, self.over_all = config, step, over_all

    def forward(self, output: JointOutput, phase: Tensor, tools: Tensor, lengths: Tensor) -> Tensor:
        """The loss, a scalar, of the logits of B clips, for phases (B, T), tools (B, T, K) and lengths (B,).

        -1 means no label, or padding.
        """
        if self.step == "mapping":
            assert output.mapped_logits is not None
            return tool_loss(output.mapped_logits, tools, over_all=self.over_all)
        terms = []
        if output.phase_stages is not None:
            labels = phase if self.config.phase_frames == "all" else _last_frame_only(phase, lengths)
            terms += [phase_loss(logits, labels, over_all=self.over_all) for logits in output.phase_stages]
        if output.tool_logits is not None:
            terms.append(self.config.tool_weight * tool_loss(output.tool_logits, tools, over_all=self.over_all))
        if self.step == "correlation" and self.config.alpha > 0:
            assert output.tool_logits is not None
            assert output.mapped_logits is not None
            real = real_frames(lengths, phase.shape[1], phase.device)
            divergence = self.correlation(output.tool_logits, output.mapped_logits).flatten().index_select(0, real)
            count = torch.full((), len(real), device=phase.device)
            terms.append(self.config.alpha * divergence.sum() / self.over_all(count).clamp(min=1))
        return torch.stack(terms).sum()

    def correlation(self, branch: Tensor, mapped: Tensor) -> Tensor:
        """The KL divergence (...) between the tool branch's and the mapped predictions, averaged over tools.

        Both are given as logits (..., K); `joint.loss.direction` says which of the two is the first argument.
        """
        branch = branch.detach() if self.config.detach == "branch" else branch
        mapped = mapped.detach() if self.config.detach == "mapped" else mapped
        pair = (mapped, branch) if self.config.direction == "mapped_branch" else (branch, mapped)
        return bernoulli_kl(*pair).mean(dim=-1)


def bernoulli_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q), in nats, of Bernoulli distributions given by logits, element by element; never negative or NaN.

    With a = logit p and b = logit q it is sigma(a) (a - b) + softplus(b) - softplus(a). This form avoids the logarithm
    of a probability, which may have been rounded to 0.
    """
    a, b = p_logits.float(), q_logits.float()
    return (torch.sigmoid(a) * (a - b) + F.softplus(b) - F.softplus(a)).clamp(min=0)


def _last_frame_only(phase: Tensor, lengths: Tensor) -> Tensor:
    position = torch.arange(phase.shape[1], device=phase.device)
    return phase.masked_fill(position != sent_to(phase.device, lengths)[:, None] - 1, NO_LABEL)
