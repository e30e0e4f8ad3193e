"""Fusing a convolution with the ReLU after it, and with the addition of a residual between the two.

oneDNN applies both while the convolution's sums are still in registers. PyTorch's separate layers write every output to
memory and read it again; in bf16 they also round it each time.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from configs.schema import Size, height_width
from engine import onednn

# Fusing changes only roundings, which change an embedding by less than this fraction of its largest value. A larger
# change means that the net was fused wrongly.
_TOLERANCE = 1e-3
_LAYOUT_FRAMES = 8
_SUMS = (operator.add, torch.add)  # tracing turns `a += b` into operator.add as well
_RELUS = (torch.relu, torch.relu_, nn.functional.relu)


class ConvRelu(nn.Module):
    """Computes max(0, convolution + `other`) in one pass.

    The module uses the weights of the given convolution, which must not change afterwards.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        padding: Any = conv.padding  # never a name such as "same": `_is_conv` excludes these
        self.geometry: onednn.Geometry = (padding, conv.stride, conv.dilation, conv.groups)
        self._laid_out: Tensor | None = None
        self._laid_out_for: tuple[torch.dtype, torch.device] | None = None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x (N, C, H, W) and the residual `other` (N, C', H', W'), if any, -> output (N, C', H', W')."""
        place = self.weight.dtype, self.weight.device
        if self._laid_out is None or place != self._laid_out_for:  # the weights are packed once, not for every batch
            self._laid_out_for = place
            # a fixed shape, so that the layout and the order of additions do not depend on the first batch's size
            shape = [_LAYOUT_FRAMES, *x.shape[1:]]
            self._laid_out = onednn.pack_convolution(self.weight.detach(), self.geometry, shape)
        return onednn.convolution_relu(x, other, self._laid_out, self.bias, self.geometry)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the packed weights, which cannot be pickled; another process packs them again."""
        return self.__dict__ | {"_laid_out": None}


def fuse_relu(net: nn.Module, size_px: Size) -> nn.Module | None:
    """The same net, with the same weights but fused layers, for inference on a CPU; None if nothing could be fused.

    Also None if the net cannot be traced, or if the fused net fails on an image of `size_px` or computes
    another embedding of it.
    """
    if not onednn.convolves(torch.float32):
        return None
    try:
        traced = fx.symbolic_trace(net)
    except Exception:  # the net's own code may raise any error for a symbolic tensor
        return None
    image = torch.randn(1, 3, *height_width(size_px), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = net(image)
    _drop_identities(traced)
    if not sum(_fused(traced, node) for node in list(traced.graph.nodes)):
        return None
    traced.graph.lint()
    traced.recompile()
    try:
        with torch.inference_mode():
            moved = (traced(image) - expected).abs().max()
    except Exception:  # sums that oneDNN does not support: other types, other shapes
        return None
    return traced if bool(moved <= _TOLERANCE * expected.abs().max()) else None


def _drop_identities(traced: fx.GraphModule) -> None:
    """Remove the identity layers that replaced batch norms when they were folded."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and node.args and isinstance(traced.get_submodule(node.target), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _fused(traced: fx.GraphModule, relu: fx.Node) -> bool:
    """Fuse a ReLU node with the convolution before it; returns whether this was possible."""
    if not relu.args or not _is_relu(traced, relu):  # no args: the input is passed as a keyword argument
        return False
    before: Any = relu.args[0]
    conv, other = (before, None) if _is_conv(traced, before) else _conv_and_other(traced, before)
    if conv is None or len(before.users) > 1 or len(conv.users) > 1:
        return False
    parent, _, name = conv.target.rpartition(".")
    layer: Any = traced.get_submodule(conv.target)
    setattr(traced.get_submodule(parent), name, ConvRelu(layer))
    with traced.graph.inserting_before(relu):
        args = conv.args if other is None else (*conv.args, other)
        relu.replace_all_uses_with(traced.graph.call_module(conv.target, args))
    for node in dict.fromkeys((relu, before, conv)):
        traced.graph.erase_node(node)
    return True


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), nn.ReLU)
    return node.op == "call_function" and node.target in _RELUS


def _is_conv(traced: fx.GraphModule, node: Any) -> bool:
    """Whether `node` is a convolution that pads with zeros and is called only once."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1:
        return False
    layer = traced.get_submodule(str(node.target))
    calls = [other for other in traced.graph.nodes if other.op == "call_module" and other.target == node.target]
    plain = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and len(calls) == 1


def _conv_and_other(traced: fx.GraphModule, total: Any) -> tuple[Any, Any]:
    """The convolution and the other addend of the sum `total`; (None, None) if it is no sum of a convolution."""
    if not isinstance(total, fx.Node) or total.op != "call_function" or total.target not in _SUMS or total.kwargs:
        return None, None
    parts = list(total.args)
    if not all(isinstance(part, fx.Node) for part in parts) or parts[0] is parts[1]:
        return None, None
    return next(((one, other) for one, other in (parts, parts[::-1]) if _is_conv(traced, one)), (None, None))
