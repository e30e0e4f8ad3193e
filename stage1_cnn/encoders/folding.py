"""Folding batch norm into the convolution before it, for inference: same result, fewer passes over memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from configs.schema import Size, height_width
from stage1_cnn.encoders.backbone import replace_layer

# Folding changes only roundings. If an embedding changes by more than this fraction, the net was folded wrongly.
_TOLERANCE = 1e-3


def fold_batch_norm(net: nn.Module, size_px: Size) -> nn.Module | None:
    """A copy of `net`, in evaluation mode, in which each batch norm after a convolution is folded into it.

    The pairs of layers are found by running one image of `size_px` through the net, which also works for
    nets that cannot be traced. None if there are no such pairs, or if the copy computes another embedding of the image.
    """
    folded = copy.deepcopy(net).eval()
    image = torch.randn(1, 3, *height_width(size_px), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pairs = list(_pairs(folded, image))
    for convolution, norm in pairs:
        conv: Any = folded.get_submodule(convolution)
        after: Any = folded.get_submodule(norm)
        replace_layer(folded, convolution, fuse_conv_bn_eval(conv, after))
        # what follows the norm in the same module: dropout and activation in timm's
        replace_layer(folded, norm, nn.Sequential(*after.children()) if list(after.children()) else nn.Identity())
    if not pairs:
        return None
    with torch.inference_mode():
        expected, found = net.eval()(image), folded(image)
    scale = expected.abs().max()
    return folded if bool((found - expected).abs().max() <= _TOLERANCE * scale) else None


def _pairs(net: nn.Module, image: Tensor) -> Iterator[tuple[str, str]]:
    """Pairs of names: a convolution, and the batch norm whose input is the convolution's output.

    Only pairs are returned whose layers are called once per image and in which no other batch norm has this input.
    """
    calls: Counter[str] = Counter()
    made_by: dict[int, str] = {}
    fed_by: dict[str, str] = {}
    alive: list[Tensor] = []  # keeps the tensors, since the id of a deleted one may be used again

    def watch(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[name] += 1
            if isinstance(module, nn.Conv2d):
                made_by[id(output)] = name
                alive.append(output)
            elif id(inputs[0]) in made_by:
                fed_by[name] = made_by[id(inputs[0])]

        return module.register_forward_hook(hook)

    layers = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    handles = [watch(name, module) for name, module in layers]
    try:
        net(image)
    finally:
        for handle in handles:
            handle.remove()
    taken = Counter(fed_by.values())
    for norm, convolution in fed_by.items():
        if calls[norm] == calls[convolution] == taken[convolution] == 1:
            yield convolution, norm
