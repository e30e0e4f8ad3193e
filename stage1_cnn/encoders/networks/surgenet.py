"""SurgeNet's networks: CAFormer-S18, ConvNeXtV2-Tiny and PVTv2-B2, which are timm's under other names of tensors."""

from __future__ import annotations

from typing import Any

from torch import nn

from configs.encoder_spec import EncoderDescription, Pooling
from stage1_cnn.encoders.layout import Layout
from stage1_cnn.encoders.networks.timm_nets import timm_entry
from stage1_cnn.encoders.registry import FAMILIES, EncoderEntry

_LAYOUTS = {
    "caformer_s18": Layout(
        "SurgeNet's CAFormer",
        (
            (r"^stem\.conv\.", "downsample_layers.0.conv."),
            (r"^stem\.norm\.", "downsample_layers.0.post_norm."),
            (r"^stages\.(\d)\.downsample\.conv\.", r"downsample_layers.\1.conv."),
            (r"^stages\.(\d)\.downsample\.norm\.", r"downsample_layers.\1.pre_norm."),
            (r"^(stages\.\d)\.blocks\.", r"\1."),
            (r"^head\.norm\.", "norm."),
        ),
    ),
    "convnextv2_tiny": Layout(
        "SurgeNet's ConvNeXtV2",
        (
            (r"^stem\.", "downsample_layers.0."),
            (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
            (r"^(stages\.\d)\.blocks\.", r"\1."),
            (r"\.conv_dw\.", ".dwconv."),
            (r"\.mlp\.fc([12])\.", r".pwconv\1."),
            (r"\.mlp\.grn\.weight$", ".grn.gamma"),
            (r"\.mlp\.grn\.bias$", ".grn.beta"),
            (r"^head\.norm\.", "norm."),
        ),
    ),
    "pvt_v2_b2": Layout(
        "SurgeNet's PVTv2",
        # the release counts stages from 1
        (
            (r"^patch_embed\.", "patch_embed1."),
            *((rf"^stages\.{stage - 1}\.downsample\.", f"patch_embed{stage}.") for stage in (2, 3, 4)),
            *((rf"^stages\.{stage - 1}\.blocks\.", f"block{stage}.") for stage in (1, 2, 3, 4)),
            *((rf"^stages\.{stage - 1}\.norm\.", f"norm{stage}.") for stage in (1, 2, 3, 4)),
            (r"\.dwconv\.", ".dwconv.dwconv."),
        ),
    ),
}
# timm's CAFormer has StarReLU, which learns a scale and a bias; the release's pretrained one has ReLU
_OPTIONS: dict[str, dict[str, Any]] = {"caformer_s18": {"mlp_act": nn.ReLU, "act1_layer": nn.ReLU}}


def _entry(description: EncoderDescription, pooling: Pooling | None) -> EncoderEntry:
    network = description.network
    return timm_entry(network, pooling, layouts=(_LAYOUTS[network],), **_OPTIONS.get(network, {}))


FAMILIES.register("surgenet", _entry)
