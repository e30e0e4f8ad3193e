"""The registry of encoders: an entry per network, under the name that `cnn.backbone` uses.

Each family of networks has a file that registers its entries here. Plug-ins, which are installed packages or files
outside this project, register theirs in the same way (`configs.registry`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from configs.errors import UserError
from configs.registry import Registry


@dataclass(frozen=True)
class Pretrained:
    """Published ImageNet weights: a state dict at `path`, which is downloaded from `url` on first use.

    If `url` is None, the file is part of a package. `sha256` holds the first digits of the hash that a download must
    have. `input_px`, `mean` and `std` describe the images that the weights were trained on; they do not set how this
    project prepares its frames, which `preprocess` does.
    """

    path: Path
    url: str | None = None
    sha256: str | None = None
    input_px: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def trained_on(self) -> str:
        """A phrase about the size and normalisation of the images that the weights were trained on."""
        return f"trained on images of {self.input_px} px, mean {self.mean}, std {self.std}"


@dataclass(frozen=True)
class EncoderEntry:
    """How to build one network, and where its weights are.

    `build` returns the network with random weights, drawn from torch's global generator. It maps images (N, 3, S, S) to
    embeddings (N, `embedding_dim`). If `embedding_dim` is None, it is a classification network, whose last linear layer
    is removed. `pretrained` is called only when ImageNet weights are requested, and raises UserError if a package is
    missing. `rename` converts the names of tensors in published state dicts to the network's own names.
    """

    build: Callable[[], nn.Module]
    embedding_dim: int | None = None
    pretrained: Callable[[], Pretrained] | None = None
    rename: Callable[[str], str] | None = None


ENCODERS: Registry[EncoderEntry] = Registry("encoder", "surgstage.encoders")


def find_encoder(name: str) -> EncoderEntry:
    """The entry for a value of `cnn.backbone`. If there is none, raises UserError naming the nearest known name."""
    try:
        return ENCODERS.find(name)
    except UserError as error:
        raise UserError(f"cnn.backbone={name}: {error}") from error
