"""Gradient checkpointing: each block of a backbone keeps only its input, and is computed again in the backward pass.

One checkpoint around the whole backbone would save nothing, since its backward pass would compute all activations again
and then hold all of them. With a checkpoint per block, it holds the inputs of all blocks and the activations of one
(docs/performance.md has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from stage1_cnn.encoders.backbone import Backbone, batch_norms
from stage1_cnn.encoders.layers import has_blocks, is_sequence, layers


@contextmanager
def recomputed_blocks(backbone: Backbone) -> Iterator[None]:
    """A context in which forward passes keep only the inputs of `blocks`, or of the whole network if it has no blocks.

    The random numbers of dropout and stochastic depth are the same in both computations, and running statistics are
    updated only once. Modules, and names in the state dict, do not change.
    """
    found = blocks(backbone.net) or [backbone.net]
    for block in found:
        contexts = partial(_recomputing, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for block in found:
            del block.forward  # the method of the class is visible again


def blocks(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network: those of its `layers` that consist of layers themselves.

    Examples are the residual blocks in `layer1` to `layer4` of a ResNet, the members of `features`, the blocks in
    ConvNeXt's stages, and the layers of a transformer. A sequence of single layers is one block.
    """
    found: list[nn.Module] = []
    sequence = ""
    for layer in layers(net):
        if sequence and layer.path.startswith(sequence):
            continue
        whole = is_sequence(layer.module) and not has_blocks(layer.module)
        sequence = f"{layer.path}." if whole and layer.path else ""
        if (whole or not layer.divided) and _has_layers(layer.module):
            found.append(layer.module)
    return [block for block in found if next(block.parameters(), None) is not None]


def _has_layers(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _recomputing(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the first pass and of the recomputation; the latter does not update running statistics."""
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
