"""Standardisation of features with constants from the training videos."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# A standard deviation below this fraction of the channels' median is raised to it. Otherwise a channel that hardly
# varies in the training videos could be thousands of standard deviations from its mean in another video.
LEAST_STD = 0.01


class Standardise(nn.Module):
    """A layer that computes (x - mean) / std in fp32; the constants (D,) are saved in the checkpoint."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        std = std.double()
        least = LEAST_STD * float(std.median())
        std = torch.where(std > least, std, torch.full_like(std, least or 1.0))
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", std.reciprocal().float())

    @classmethod
    def identity(cls, embedding_dim: int) -> Standardise:
        """A layer that changes nothing, until a state dict with other constants is loaded."""
        return cls(torch.zeros(embedding_dim), torch.ones(embedding_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) in any float type -> (..., D) fp32."""
        return torch.sub(x, self.mean).mul_(self.scale)
