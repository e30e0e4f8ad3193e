"""Which known encoder a file of weights belongs to, for the message that it does not fit the one that was asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from configs.encoder_spec import TIMM, described_encoders, find_description
from configs.errors import listed
from stage1_cnn.encoders.registry import find_encoder
from stage1_cnn.encoders.weights import SeveralMatchesError, find_weights

# Only networks whose number of parameters is near that of a part of the file are built and compared. A published number
# may include a classifier that the file has not; a file may have a decoder or another head.
_LEAST, _MOST = 0.9, 1.4
# Those of torchvision's networks that files usually belong to.
_USUAL = re.compile(r"resnet\d+|convnext_\w+|vit_[bl]_\d+")
Build = Callable[[str], tuple[nn.Module, Sequence[str]]]


def suggestion(tensors: Mapping[str, Tensor], path: Path, build: Build) -> str:
    """The end of a message about weights that do not fit: which encoders they fit; empty if none is known.

    `build` returns the network of an encoder without its classifier, and the names of the layers that were removed.
    """
    fitting = [name for name in _near(tensors) if _fits(name, tensors, path, build)]
    fitting += [name for name in _plain_networks(fitting) if _fits(name, tensors, path, build)]
    if not fitting:
        return ""
    todo = "that as the encoder" if len(fitting) == 1 else "the encoder whose release the file is"
    return f"; they fit {listed(fitting, 4)}: choose {todo}, or another file"


def _plain_networks(names: Sequence[str]) -> list[str]:
    """timm's own names of the networks of described encoders, since a file may be another release of such a network."""
    described = [description for name in names if (description := find_description(name)) is not None]
    networks = dict.fromkeys(one.network.partition(".")[0] for one in described if one.family != "torchvision")
    return [f"{TIMM}{network}" for network in networks]


def _near(tensors: Mapping[str, Tensor]) -> list[str]:
    """The known networks with as many parameters as the tensors under some prefix have, or a little more."""
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        cuts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        sizes.update({name[:cut]: tensor.numel() for cut in cuts})
    totals = set(sizes.values())
    return [name for name, count in _known() if any(_LEAST * count <= total <= _MOST * count for total in totals)]


def _known() -> Iterator[tuple[str, int]]:
    """The names of known networks with their published numbers of parameters; nothing is built."""
    for name in filter(_USUAL.fullmatch, torchvision.models.list_models(module=torchvision.models)):
        yield name, int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])  # type: ignore[attr-defined]
    for name in described_encoders():
        description = find_description(name)
        if description is not None and description.parameters is not None:
            yield name, description.parameters


def _fits(name: str, tensors: Mapping[str, Tensor], path: Path, build: Build) -> bool:
    try:
        entry = find_encoder(name)
        with torch.device("meta"):  # shapes without memory
            net, removed = build(name)
        named = tensors if entry.rename is None else {entry.rename(key): tensor for key, tensor in tensors.items()}
        find_weights(net, removed, named, name, path, entry.layouts)
    except SeveralMatchesError:
        return True
    except Exception:  # they do not fit, a package is missing, or the network cannot be built without memory
        return False
    return True
