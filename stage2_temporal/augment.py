"""Random changes of training sequences (`temporal.augment`): speed, start, and noise in the features.

Speed, start and the features that are left out depend on (seed, epoch, video) alone; noise is drawn from torch's
generator, as dropout is, whose state is part of `last.pt`. So a resumed training computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from configs.schema import SequenceAugmentConfig
from engine.device import sent_to
from stage2_temporal.data import Span
from stage2_temporal.heads.standardise import Standardise


def resampled(spans: Sequence[Span], settings: SequenceAugmentConfig, seed: int, epoch: int) -> list[Span]:
    """The training sequences of an epoch: videos that begin later or run at another speed, as the settings say.

    Speeds are log-uniform. At speed v, frame k of a sequence is row k v of the video, rounded down.
    """
    found, draws = [], np.random.default_rng([seed, epoch]).random((len(spans), 3))
    for span, (late, where, speed) in zip(spans, draws, strict=True):
        skipped = int(where * span.frames / 2) if late < settings.start else 0
        first, frames = span.first + skipped, span.frames - skipped
        if settings.speed is None:
            found.append(Span(first, frames))
            continue
        low, high = settings.speed
        rate = float(low * (high / low) ** speed)
        found.append(Span(first, int((frames - 1) / rate) + 1, rate))
    return found


class FeatureNoise:
    """Leaves out features of whole sequences and adds noise, in training only.

    It changes the stored features so that their standardisation gives what is stated here: heads standardise them by
    themselves, some of them block by block.
    """

    def __init__(self, settings: SequenceAugmentConfig, standardise: Standardise, seed: int) -> None:
        self.settings, self.standardise, self.seed = settings, standardise, seed

    def __call__(self, x: Tensor, epoch: int, sequences: Sequence[int]) -> Tensor:
        """Features x (B, T, D) as stored -> (B, T, D) fp32, or x itself if nothing is to be changed.

        Of the standardised features, a fraction `feature_dropout` is 0 in all frames of a sequence and the others are
        scaled up by as much, and then noise is added. `sequences` (B,) are numbers that stay the same from chunk to
        chunk of a sequence.
        """
        dropout, noise = self.settings.feature_dropout, self.settings.feature_noise
        if not dropout and not noise:
            return x
        x = x.float() - self.standardise.mean
        if dropout:
            drawn = np.stack([np.random.default_rng([self.seed, epoch, n]).random(x.shape[2]) for n in sequences])
            factor = torch.from_numpy((drawn >= dropout) / (1 - dropout)).float()
            x = x * sent_to(x.device, factor)[:, None]
        if noise:
            x = x + torch.randn_like(x) * (noise / self.standardise.scale)
        return x + self.standardise.mean
