"""The registry of encoders: what a family of networks says about each of them, by its name in `cnn.backbone`.

One file per family registers its networks here; packages and files from outside do the same (`configs.registry`).
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
    """Published ImageNet weights: a state dict at `path`, downloaded from `url` on first use.

    Without `url` the file comes with a package. `sha256` holds the first digits of the hash that a download must have.
    `input_px`, `mean` and `std` say how the images were prepared that the weights were trained on; what this project
    feeds is set by `preprocess`.
    """

    path: Path
    url: str | None = None
    sha256: str | None = None
    input_px: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def trained_on(self) -> str:
        """The preparation of the images in words."""
        return f"trained on images of {self.input_px} px, mean {self.mean}, std {self.std}"


@dataclass(frozen=True)
class EncoderEntry:
    """One network.

    `build` returns it with random weights, drawn from torch's global generator: images (N, 3, S, S) to embeddings
    (N, `embedding_dim`). With `embedding_dim` None it is a classification network, which is cut before its last linear
    layer. `pretrained` is called only when its weights are asked for, and raises UserError if a package is missing.
    `rename` maps names in published state dicts to those of the module's tensors.
    """

    build: Callable[[], nn.Module]
    embedding_dim: int | None = None
    pretrained: Callable[[], Pretrained] | None = None
    rename: Callable[[str], str] | None = None


ENCODERS: Registry[EncoderEntry] = Registry("encoder", "surgstage.encoders")


def find_encoder(name: str) -> EncoderEntry:
    """The entry that `cnn.backbone` names. Raises UserError naming the nearest known name."""
    try:
        return ENCODERS.find(name)
    except UserError as error:
        raise UserError(f"cnn.backbone={name}: {error}") from error
