"""EndoViT: a ViT-B/16 that is the encoder of a masked autoencoder."""

from __future__ import annotations

from configs.encoder_spec import EncoderDescription, Pooling
from stage1_cnn.encoders.networks.timm_nets import timm_entry
from stage1_cnn.encoders.registry import FAMILIES, EncoderEntry


def _entry(description: EncoderDescription, pooling: Pooling | None) -> EncoderEntry:
    return timm_entry(description.network, pooling or description.poolings[0])


FAMILIES.register("endovit", _entry)
