"""How releases name and shape the tensors of a network, if not as the network itself does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The names of a network's tensors in a release, given by renaming the network's own names.

    `rules` are pairs of a regular expression and its replacement, all of which are applied in order to each own name.
    Names in the file that fully match `ignored` have no counterpart in the network. Shapes may differ by dimensions of
    size 1 (a 1 x 1 convolution stored as a linear layer). Layouts that rename is not enough for override `expected` and
    `converted`.
    """

    title: str  # in messages
    rules: tuple[tuple[str, str], ...] = ()
    ignored: str = ""

    def release_name(self, name: str) -> str:
        """The release's name of the network's tensor `name`."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the release, with its name below the prefix, has no counterpart in the network."""
        return bool(self.ignored) and re.fullmatch(self.ignored, name) is not None

    def expected(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a file of the release holds for a network with the state dict `own` (shapes and types)."""
        return {self.release_name(name): tensor for name, tensor in own.items()}

    def converted(self, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's state dict, under its own names, from the tensors of the release that `expected` names.

        May raise ValueError saying why the network cannot compute what these tensors do.
        """
        return {name: found[there] for name in own if (there := self.release_name(name)) in found}


OWN = Layout("the network's own names")


def fit_shape(tensor: Tensor, wanted: Tensor) -> Tensor:
    """`tensor` in the shape of `wanted` if the two differ only in dimensions of size 1, otherwise unchanged."""
    squeezed = [tuple(size for size in one.shape if size != 1) for one in (tensor, wanted)]
    same = squeezed[0] == squeezed[1] and tensor.layout == torch.strided
    return tensor.reshape(wanted.shape) if same and tensor.shape != wanted.shape else tensor
