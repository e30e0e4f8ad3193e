"""ReLU, and the addition of a residual before it, fused with the convolution whose output they take.

oneDNN applies both to sums that are still in registers. PyTorch's separate layers write every output to memory and
read it again; in bf16 they also round it in between.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from engine import onednn

# Fewer roundings change an embedding by less than this fraction of its largest value; more means a wrong fusion.
_TOLERANCE = 1e-3
_LAYOUT_FRAMES = 8
_SUMS = (operator.add, torch.add)  # tracing makes the former of a sum in place, too
_RELUS = (torch.relu, torch.relu_, nn.functional.relu)


class ConvRelu(nn.Module):
    """max(0, convolution + `other`) in one pass; shares the convolution's weights, which must not change."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        padding: Any = conv.padding  # never by name: `_is_conv`
        self.geometry: onednn.Geometry = (padding, conv.stride, conv.dilation, conv.groups)
        self._laid_out: Tensor | None = None
        self._laid_out_for: tuple[torch.dtype, torch.device] | None = None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x (N, C, H, W) and the addend `other` (N, C', H', W')."""
        place = self.weight.dtype, self.weight.device
        if self._laid_out is None or place != self._laid_out_for:  # once, and not for every batch
            self._laid_out_for = place
            # a fixed shape, so that the layout, and with it the order of sums, does not depend on the first batch
            shape = [_LAYOUT_FRAMES, *x.shape[1:]]
            self._laid_out = onednn.pack_convolution(self.weight.detach(), self.geometry, shape)
        return onednn.convolution_relu(x, other, self._laid_out, self.bias, self.geometry)

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed weights, which cannot be pickled; other processes pack their own."""
        return self.__dict__ | {"_laid_out": None}


def fuse_relu(net: nn.Module, size_px: int) -> nn.Module | None:
    """The same net, with the same weights, for inference on a CPU; None if nothing could be fused.

    None, too, for nets that cannot be traced, and if the fused net fails on an image (3, `size_px`, `size_px`) or
    does not give its embedding.
    """
    if not onednn.convolves(torch.float32):
        return None
    try:
        traced = fx.symbolic_trace(net)
    except Exception:  # any error of the net's own code with a symbolic tensor
        return None
    image = torch.randn(1, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
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
    """Remove the identities that folding has put in place of batch norms."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and node.args and isinstance(traced.get_submodule(node.target), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _fused(traced: fx.GraphModule, relu: fx.Node) -> bool:
    """Fuse a ReLU node with the convolution before it; returns whether that was possible."""
    if not relu.args or not _is_relu(traced, relu):  # without positional arguments, its input is passed by name
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
    """Whether `node` is a convolution that is called once, with zero padding."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1:
        return False
    layer = traced.get_submodule(str(node.target))
    calls = [other for other in traced.graph.nodes if other.op == "call_module" and other.target == node.target]
    plain = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and len(calls) == 1


def _conv_and_other(traced: fx.GraphModule, total: Any) -> tuple[Any, Any]:
    """The convolution in a sum of two tensors, and what it is added to; (None, None) if it is no such sum."""
    if not isinstance(total, fx.Node) or total.op != "call_function" or total.target not in _SUMS or total.kwargs:
        return None, None
    parts = list(total.args)
    if not all(isinstance(part, fx.Node) for part in parts) or parts[0] is parts[1]:
        return None, None
    return next(((one, other) for one, other in (parts, parts[::-1]) if _is_conv(traced, one)), (None, None))
