"""Dropout of whole features in training sequences (`temporal.feature_dropout`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.device import sent_to
from stage2_temporal.heads.standardise import Standardise


class FeatureDropout:
    """Leaves out features of whole training sequences, which depend on (seed, epoch, sequence) alone.

    So a resumed training computes the same. It changes the stored features so that their standardisation gives what is
    stated here: heads standardise them by themselves, some of them block by block.
    """

    def __init__(self, fraction: float, standardise: Standardise, seed: int) -> None:
        self.fraction, self.standardise, self.seed = fraction, standardise, seed

    def __call__(self, x: Tensor, epoch: int, sequences: Sequence[int]) -> Tensor:
        """Features x (B, T, D) as stored -> (B, T, D) fp32, or x itself if nothing is to be left out.

        Of the standardised features, this fraction is 0 in all frames of a sequence and the others are scaled up by as
        much. `sequences` (B,) are numbers that stay the same from chunk to chunk of a sequence.
        """
        if not self.fraction:
            return x
        drawn = np.stack([np.random.default_rng([self.seed, epoch, n]).random(x.shape[2]) for n in sequences])
        factor = torch.from_numpy((drawn >= self.fraction) / (1 - self.fraction)).float()
        return (x.float() - self.standardise.mean) * sent_to(x.device, factor)[:, None] + self.standardise.mean
