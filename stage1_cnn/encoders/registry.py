"""The registry of encoders: an entry per network, under the name that `cnn.backbone` uses.

Each family of networks has a file in `networks/`. It registers entries by name, or one function that makes the entries
of all descriptions in `configs/encoders` that name this family. Plug-ins, which are installed packages or files outside
this project, register theirs in the same way (`configs.registry`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn

from configs.encoder_spec import (
    TIMM,
    EncoderDescription,
    Pooling,
    described_encoders,
    find_description,
    split_pooling,
)
from configs.errors import UserError, did_you_mean
from configs.registry import Registry
from stage1_cnn.encoders.layout import Layout


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
    embeddings (N, `embedding_dim`), or `forward` does so with the network. If `embedding_dim` is None, it is a
    classification network, whose last linear layer is removed; a function returns the dimension of the built network.
    `pretrained` is called only when ImageNet weights are requested, and raises UserError if a package is missing.
    `rename` converts the names of tensors in published state dicts to the network's own names; `layouts` do so for
    releases that name and shape tensors in another way than the network. `removed` returns the names of the layers that
    published files have and the network has not, such as a classifier. `about_size` returns what to tell the user about
    images of a height and width, if anything, and raises UserError if the network cannot take them.
    """

    build: Callable[[], nn.Module]
    embedding_dim: int | Callable[[nn.Module], int] | None = None
    pretrained: Callable[[], Pretrained] | None = None
    rename: Callable[[str], str] | None = None
    layouts: tuple[Layout, ...] = ()
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None
    removed: Callable[[nn.Module], tuple[str, ...]] | None = None
    about_size: Callable[[nn.Module, int, int], str | None] | None = None


ENCODERS: Registry[EncoderEntry] = Registry("encoder", "surgstage.encoders")
# A function of a description in `configs/encoders` and of a pooling that returns the entry. Every family has one.
Family = Callable[[EncoderDescription, Pooling | None], EncoderEntry]
FAMILIES: Registry[Family] = Registry("family of encoders", "surgstage.encoder_families")


def find_encoder(name: str) -> EncoderEntry:
    """The entry for a value of `cnn.backbone`. If there is none, raises UserError naming the nearest known name."""
    base, pooling = split_pooling(name)
    description = find_description(base)
    if description is not None:
        if pooling is not None and pooling not in description.poolings:
            possible = ", ".join(f"@{one}" for one in description.poolings) or "none"
            raise UserError(f"cnn.backbone={name}: {base} has no pooling @{pooling} (it has: {possible})")
        return FAMILIES.find(description.family)(description, pooling)
    if base.startswith(TIMM):
        _refuse_timm(base)
    try:
        return ENCODERS.find(name)
    except UserError as error:
        near = did_you_mean(name, [*ENCODERS.names(), *described_encoders()])
        reason = f"unknown encoder {name}{near} `encoders list` shows all" if near else error
        raise UserError(f"cnn.backbone={name}: {reason}") from error


def _refuse_timm(name: str) -> NoReturn:
    """Raise the UserError for a network of timm that cannot be built."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"cnn.backbone={name}: needs a package; in the checkout: pip install -e '.[timm]'") from error
    network = name.removeprefix(TIMM)
    if (new := timm.models.get_deprecated_models().get(network)) is not None:
        raise UserError(f"cnn.backbone={name}: timm {timm.__version__} calls this network {new}; use {TIMM}{new}")
    near = did_you_mean(network, [*timm.list_models(), *timm.list_pretrained()])
    raise UserError(f"cnn.backbone={name}: timm {timm.__version__} has no network {network}{near}")
