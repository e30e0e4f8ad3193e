"""LemonFM: torchvision's ConvNeXt-Large, whose embedding is the last layer norm's output. The release has its names."""

from __future__ import annotations

from functools import partial

import torchvision

from configs.encoder_spec import EncoderDescription, Pooling
from stage1_cnn.encoders.registry import FAMILIES, EncoderEntry


def _entry(description: EncoderDescription, pooling: Pooling | None) -> EncoderEntry:
    return EncoderEntry(partial(torchvision.models.get_model, description.network, weights=None))


FAMILIES.register("lemonfm", _entry)
