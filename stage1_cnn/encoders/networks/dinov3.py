"""DINOv3's vision transformers and ConvNeXts (Siméoni et al., arXiv 2508.10104), which timm has as well.

The transformers have rotary position embeddings, and take images of every size that the patches of 16 pixels divide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from configs.encoder_spec import EncoderDescription, Pooling
from stage1_cnn.encoders.layout import Layout
from stage1_cnn.encoders.networks.timm_nets import join_poolings, timm_entry
from stage1_cnn.encoders.registry import FAMILIES, EncoderEntry

_BIASES = ("q_bias", "v_bias")  # timm's network has no bias of the keys


@dataclass(frozen=True)
class Transformer(Layout):
    """The release's transformers: one bias of queries, keys and values (3 D), `masked` if a mask multiplies it.

    The release's own mask sets the bias of the keys to zero, which is why timm's network has none. A constant added to
    all keys would cancel in the softmax, but rotary embeddings turn the bias of each key by an angle of its own. So a
    bias of the keys that is not zero is refused.
    """

    masked: bool = True

    def expected(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the release, with one bias of three times the length instead of two."""
        named = super().expected({name: tensor for name, tensor in own.items() if not name.endswith(_BIASES)})
        for name, tensor in own.items():
            if name.endswith("q_bias"):
                bias = f"{name.removesuffix('q_bias')}qkv.bias"
                named[bias] = tensor.repeat(3)
                if self.masked:
                    named[f"{bias}_mask"] = named[bias]
        return named

    def converted(self, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of timm's network. Raises ValueError if the bias of the keys is not zero."""
        state = super().converted(found, own)
        for name in own:
            if name.endswith("q_bias"):
                attention = name.removesuffix("q_bias")
                bias = found[f"{attention}qkv.bias"]
                bias = bias * found[f"{attention}qkv.bias_mask"] if self.masked else bias
                query, key, value = bias.chunk(3)
                if key.any():
                    raise ValueError(f"{attention}qkv.bias has a bias of the keys, which this network has not")
                state |= {f"{attention}q_bias": query, f"{attention}v_bias": value}
        return state


class NoBias(Layout):
    """timm's networks without these biases, as which it publishes DINOv3: all of the release's are zero."""

    def expected(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors but the biases."""
        return {name: tensor for name, tensor in own.items() if not name.endswith(_BIASES)}

    def converted(self, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        biases = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.endswith(_BIASES)}
        return {**super().converted(found, own), **biases}


_RENAMED = ((r"^reg_token$", "storage_tokens"), (r"\.gamma_([12])$", r".ls\1.gamma"))
_TRANSFORMERS = (
    Transformer("DINOv3", _RENAMED),
    Transformer("DINOv3 without masks of biases", _RENAMED, masked=False),
    NoBias("timm's DINOv3 without biases"),
)
_CONVNEXT = Layout(
    "DINOv3's ConvNeXt",
    rules=(
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc([12])\.", r".pwconv\1."),
        (r"^head\.norm\.", "norm."),
    ),
)


def pool_maps(net: nn.Module, images: Tensor, pooling: Pooling) -> Tensor:
    """Embeddings of images (N, 3, S, S) from the last feature maps of a ConvNeXt, pooled as DINOv3 does.

    Its class token is the norm of the mean over all positions, its patch tokens are the norms of the positions.
    """
    maps = net.forward_features(images)  # type: ignore[operator]  # (N, D, s, s)
    norm: nn.Module = net.get_submodule("head.norm")
    token = norm(maps.mean(dim=(2, 3), keepdim=True)).flatten(1)  # (N, D)
    return join_poolings(token, norm(maps).mean(dim=(2, 3)), pooling)


def _entry(description: EncoderDescription, pooling: Pooling | None) -> EncoderEntry:
    if "convnext" in description.network:
        embed = None if pooling is None else partial(pool_maps, pooling=pooling)
        return timm_entry(description.network, pooling, embed=embed, layouts=(_CONVNEXT,))
    return timm_entry(description.network, pooling or "token", layouts=_TRANSFORMERS)


FAMILIES.register("dinov3", _entry)
