"""MS-TCN++ (Li et al., TPAMI 2020): dual dilated convolutions, then refinement stages. Offline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import head_settings
from engine.device import sent_to
from stage2_temporal.heads.base import Head, HeadOutput, State, register_head, require_causal, softmax_by_track


class CentredLayer(nn.Module):
    """A residual layer of convolutions of kernel size 3, centred on each frame and side by side, one for each dilation.

    With two dilations it is a dual dilated layer, with one that of a refinement stage.
    """

    def __init__(self, maps: int, dilations: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(nn.Conv1d(maps, maps, 3, padding=one, dilation=one) for one in dilations)
        self.mix = nn.Conv1d(len(dilations) * maps, maps, 1)
        self.dual, self.dropout = len(dilations) > 1, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, M, T) -> (B, M, T), where frames beyond both ends count as zero."""
        found = torch.cat([convolve(x) for convolve in self.dilated], dim=1)
        return x + self.dropout(F.relu(self.mix(found)) if self.dual else self.mix(F.relu(found)))


@register_head("mstcn++", head_settings.MstcnPlusPlusHead)
class MstcnPlusPlusHead(Head):
    """A stage of dual dilated layers, whose softmax, of each label track by itself, further stages refine.

    Each layer of the first stage has dilations that grow (1, 2, 4, ...) beside dilations that fall to 1, so that every
    layer sees near and far frames. The loss is summed over stages. It needs whole videos or clips and has no state.
    """

    def __init__(self, config: head_settings.MstcnPlusPlusHead, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases)
        dilations: list[list[tuple[int, ...]]] = [
            [(2 ** (config.layers - 1 - level), 2**level) for level in range(config.layers)]
        ]
        dilations += [[(2**level,) for level in range(config.refinement_layers)]] * config.refinements
        widths = [embedding_dim] + [phases] * config.refinements
        self.enter = nn.ModuleList(nn.Conv1d(width, config.maps, 1) for width in widths)
        self.layers = nn.ModuleList(
            nn.ModuleList(CentredLayer(config.maps, one, config.dropout) for one in stage) for stage in dilations
        )
        self.leave = nn.ModuleList(nn.Conv1d(config.maps, phases, 1) for _ in widths)
        self.hidden_dim = config.maps

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """See `Head`. Padding is set to zero after each layer, as if the video ended there."""
        if state is not None:
            require_causal(self)
        padding = _padding(x, lengths)
        y = _cleared(x.transpose(1, 2), padding)  # (B, D, T)
        stages: list[Tensor] = []
        for enter, layers, leave in zip(self.enter, self.layers, self.leave, strict=True):
            hidden = _cleared(enter(softmax_by_track(y, self.widths, 1) if stages else y), padding)  # (B, M, T)
            for layer in layers:  # type: ignore[attr-defined]
                hidden = _cleared(layer(hidden), padding)
            y = leave(hidden)  # (B, C, T)
            stages.append(y.transpose(1, 2))
        return HeadOutput(stages, hidden.transpose(1, 2), ())


def _padding(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Which frames of x (B, T, D) are padding, as a mask (B, 1, T) on its device; None if there is none."""
    if lengths is None:
        return None
    lengths = lengths.cpu()  # DistributedDataParallel moves it to the GPU
    if int(lengths.min()) == x.shape[1]:
        return None
    return sent_to(x.device, (torch.arange(x.shape[1]) >= lengths[:, None]).unsqueeze(1))


def _cleared(y: Tensor, padding: Tensor | None) -> Tensor:
    return y if padding is None else y.masked_fill(padding, 0.0)
