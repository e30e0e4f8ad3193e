"""DINOv2's vision transformers (Oquab et al., TMLR 2024), with and without registers (Darcet et al., ICLR 2024).

timm has the same networks. They take images of every size that the patches of 14 pixels divide, and interpolate their
position embeddings, which are those of 518 pixels, in each forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from configs.encoder_spec import EncoderDescription, Pooling
from stage1_cnn.encoders.layout import Layout
from stage1_cnn.encoders.networks.timm_nets import timm_entry
from stage1_cnn.encoders.registry import FAMILIES, EncoderEntry


class Registers(Layout):
    """The release's networks with registers: the class token has a position embedding, the first one.

    timm adds that embedding to the class token. Both networks add it before the first block, so that it is the same.
    """

    def expected(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The position embedding (1, 1 + patches, D) is longer by the one of the class token."""
        positions = torch.cat([own["cls_token"], own["pos_embed"]], dim=1)
        return super().expected({**own, "pos_embed": positions})

    def converted(self, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = super().converted(found, own)
        first, rest = state["pos_embed"].split([1, own["pos_embed"].shape[1]], dim=1)
        return {**state, "cls_token": state["cls_token"] + first, "pos_embed": rest}


_REGISTERS = Registers("DINOv2 with registers", rules=((r"^reg_token$", "register_tokens"),))


def _entry(description: EncoderDescription, pooling: Pooling | None) -> EncoderEntry:
    layouts = (_REGISTERS,) if "reg4" in description.network else ()  # without registers, the names are timm's
    return timm_entry(description.network, pooling or "token", layouts=layouts)


FAMILIES.register("dinov2", _entry)
