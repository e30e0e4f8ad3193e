"""Every classification network of torchvision, under its name there, and releases whose encoder is one of them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import nn

from configs.encoder_spec import EncoderDescription, Pooling
from configs.errors import UserError
from stage1_cnn.encoders.registry import ENCODERS, FAMILIES, EncoderEntry, Pretrained

# In training mode these nets return auxiliary outputs beside the main one.
_WITH_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")
# DenseNet's published files have `norm.1` where the module's own name is `norm1`.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]+)\.")


def _build(name: str) -> nn.Module:
    if name in _WITH_AUXILIARY_OUTPUTS:
        raise UserError(f"cnn.backbone={name}: nets with auxiliary outputs do not fit here; resnet50 is the default")
    net: nn.Module = torchvision.models.get_model(name, weights=None)
    return net


def _pretrained(name: str) -> Pretrained:
    """torchvision's first ImageNet weights, which MTRCNet used as well, in torch's download cache."""
    published = torchvision.models.get_model_weights(name)
    first = getattr(published, "IMAGENET1K_V1", None) or published.DEFAULT  # type: ignore[attr-defined]
    file = first.url.rsplit("/", 1)[-1]
    found, images = _HASH_IN_NAME.search(file), first.transforms()
    return Pretrained(
        path=Path(torch.hub.get_dir()) / "checkpoints" / file,
        url=first.url,
        sha256=found.group(1) if found else None,
        input_px=images.crop_size[0],
        mean=tuple(images.mean),
        std=tuple(images.std),
    )


for _name in torchvision.models.list_models(module=torchvision.models):
    ENCODERS.register(
        _name,
        EncoderEntry(
            build=partial(_build, _name),
            pretrained=partial(_pretrained, _name),
            rename=partial(_OLD_DENSENET.sub, r"\1\2") if _name.startswith("densenet") else None,
        ),
    )


def _entry(description: EncoderDescription, pooling: Pooling | None) -> EncoderEntry:
    return EncoderEntry(partial(_build, description.network))


FAMILIES.register("torchvision", _entry)
