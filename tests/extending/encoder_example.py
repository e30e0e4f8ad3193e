"""An encoder of your own: `SURGSTAGE_PLUGINS=encoder_example.py ... --set cnn.backbone=colour_histogram`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stage1_cnn.encoders.registry import ENCODERS, EncoderEntry

BINS = 8


class ColourHistogram(nn.Module):
    """Images (N, 3, S, S) to embeddings (N, 3 * BINS): how often each colour channel falls into each soft bin."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.linspace(-2, 2, BINS))  # learns with everything else
        self.scale = nn.Parameter(torch.full((BINS,), 4.0))

    def forward(self, images: Tensor) -> Tensor:
        distance = images.flatten(2).unsqueeze(-1) - self.centre  # (N, 3, S * S, BINS)
        return torch.exp(-self.scale * distance**2).mean(dim=2).flatten(1)  # (N, 3 * BINS)


# A classification network needs no `embedding_dim`: it is cut before its last linear layer. With published weights,
# `pretrained` is a function that returns a `Pretrained`: the file, or its URL, and how the images were prepared.
ENCODERS.register("colour_histogram", EncoderEntry(build=ColourHistogram, embedding_dim=3 * BINS))
