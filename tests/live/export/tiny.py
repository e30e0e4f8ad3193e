"""Nets with a tiny encoder and any head, with random weights, which are exported in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.head_settings import HeadSettings, LinearHead
from configs.load import load_dataset
from configs.schema import DecodingConfig, Inference
from live.nets import EncoderParts, Nets
from stage1_cnn.encoders.backbone import Backbone
from stage1_cnn.encoders.encoder import Encoder
from stage2_temporal.decoding.chosen import ChosenDecoding
from stage2_temporal.decoding.fitted import FittedDecoding, TrackDecoding
from stage2_temporal.decoding.graph import learn_graph
from stage2_temporal.heads.base import Head, build_head
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.model import PhaseModel
from tests.live.material import TINY, settings

D = 6
LINEAR = LinearHead(name="linear")


def nets_of(
    head: HeadSettings | Head, inference: Inference = "carried", clip_frames: int = 1, dataset: str = "cholec80"
) -> Nets:
    """Nets of the classes of a data set, with all its label tracks."""
    torch.manual_seed(0)
    config, spec = settings(Path("unused"), data={"dataset": dataset, "fps": 2.0}), load_dataset(dataset)
    layers = nn.Conv2d(3, D, 8, stride=8), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    backbone, tools = Backbone(TINY, nn.Sequential(*layers), D), len(spec.tools)
    encoder = Encoder(config, backbone, nn.Linear(D, tools) if tools else None, "0" * 64, tools)
    widths = [len(spec.phases), *(len(track.classes) for track in spec.tracks.values())]
    built = head if isinstance(head, Head) else build_head(head, D, *widths)
    phase = PhaseModel(Standardise(torch.zeros(D), torch.full((D,), 0.1)), built).eval()

    def encode(frames: Tensor) -> tuple[Tensor, NDArray[np.float32] | None]:
        embedding, logits = encoder(frames)
        return torch.from_numpy(embedding.astype(np.float16)).float(), logits if tools else None

    parts = EncoderParts(backbone.eval(), encoder.tool_head, "float16")
    weights = {"temporal": "1" * 64, "encoder": "2" * 64}
    return Nets(encode, phase, inference, clip_frames, config, spec, weights, tuple(spec.tracks), parts=parts)


def decoded(nets: Nets, **settings: Any) -> Nets:
    """The same nets with a fitted decoding."""
    classes = nets.spec.phases
    labels = np.repeat(np.arange(len(classes)), [9, 20, 5, 30, 12, 7, 25])
    fitted = TrackDecoding(
        classes=classes,
        temperature=1.6,
        filter_kappa=0.3,
        viterbi_kappa=0.4,
        min_duration_s=4.0,
        filter_temperature=0.8,
        graph=learn_graph([labels, labels[::-1]], len(classes), 2.0),
    )
    whole = FittedDecoding(weights_sha256="1" * 64, fps=2.0, train=("a",), val=(), tracks={"phases": fitted})
    return replace(nets, decoding=ChosenDecoding(whole, DecodingConfig(**settings), "3" * 64))
