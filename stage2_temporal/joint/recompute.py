"""Gradient checkpointing: a backbone's blocks keep their input only, and are computed again in the backward pass.

One checkpoint around the whole backbone would save nothing: its backward pass would first compute everything again and
then hold everything. Block by block it holds the inputs of all blocks and the activations of one
(docs/performance.md has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from stage1_cnn.encoders.backbone import Backbone, batch_norms


@contextmanager
def recomputed_blocks(backbone: Backbone) -> Iterator[None]:
    """Forward passes inside keep the inputs of `blocks` only; without blocks, the input of the whole network.

    The random numbers of dropout and stochastic depth are the same in both computations, and running statistics are
    updated once. Modules and names in the state dict stay as they are.
    """
    found = blocks(backbone.net) or [backbone.net]
    for block in found:
        contexts = partial(_recomputing, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for block in found:
            del block.forward  # the class's is visible again


def blocks(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network: the members of its outermost `Sequential`s and `ModuleList`s that have layers inside.

    For example the residual blocks in `layer1` to `layer4` of a ResNet, the members of `features`, the layers of a
    transformer. A member that is a `Sequential` of blocks counts block by block, one of single layers as a whole.
    """
    return list(_blocks(net, inside=False))


def _blocks(module: nn.Module, inside: bool) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList) and any(_has_layers(member) for member in child):
            yield from _blocks(child, inside=True)
        elif (inside or isinstance(child, nn.Sequential)) and _has_layers(child):
            if next(child.parameters(), None) is not None:
                yield child
        else:
            yield from _blocks(child, inside)


def _has_layers(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _recomputing(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first pass and of the recomputation, which must not update running statistics again."""
    return nullcontext(), _fixed_statistics(block)


@contextmanager
def _fixed_statistics(block: nn.Module) -> Iterator[None]:
    layers = list(batch_norms(block))
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
        layer.num_batches_tracked = layer.num_batches_tracked.clone() if layer.num_batches_tracked is not None else None
    try:
        yield
    finally:
        for layer, (momentum, counted) in zip(layers, before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, counted
