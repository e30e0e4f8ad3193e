"""Nets with a tiny encoder and any head, with random weights, which are exported in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from configs.head_settings import HeadSettings, LinearHead
from configs.load import load_dataset
from configs.schema import DecodingConfig, Inference
from live.nets import EncoderParts, Nets, encode_as_stored
from stage1_cnn.encoders.backbone import Backbone
from stage1_cnn.encoders.encoder import Encoder
from stage2_temporal.decoding.chosen import ChosenDecoding
from stage2_temporal.decoding.fitted import FittedDecoding, TrackDecoding
from stage2_temporal.decoding.graph import learn_graph
from stage2_temporal.heads.base import Head, build_head
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.model import PhaseModel
from stage2_temporal.probe import Probe
from stage2_temporal.tool_probe import ToolProbe, ToolProbeAbout
from tests.live.material import TINY, settings

D = 6
LINEAR = LinearHead(name="linear")


Tools = Literal["head", "inputs", "probe"]


def nets_of(
    head: HeadSettings | Head,
    inference: Inference = "carried",
    clip_frames: int = 1,
    dataset: str = "cholec80",
    tools: Tools = "head",
) -> Nets:
    """Nets of the classes of a data set, with all its label tracks.

    Tools are recognised by a tool head of the encoder, whose logits are `inputs` of stage two too, or by a probe.
    """
    torch.manual_seed(0)
    config, spec = settings(Path("unused"), data={"dataset": dataset, "fps": 2.0}), load_dataset(dataset)
    layers = nn.Conv2d(3, D, 8, stride=8), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    backbone, count = Backbone(TINY, nn.Sequential(*layers), D), len(spec.tools)
    tool_head = nn.Linear(D, count) if count and tools != "probe" else None
    encoder = Encoder(config, backbone, tool_head, "0" * 64, count)
    width = D + count * (tools == "inputs")
    widths = [len(spec.phases), *(len(track.classes) for track in spec.tracks.values())]
    built = head if isinstance(head, Head) else build_head(head, width, *widths)
    phase = PhaseModel(Standardise(torch.zeros(width), torch.full((width,), 0.1)), built).eval()
    probe = probe_of(spec.tools) if tools == "probe" else None
    parts = EncoderParts(backbone.eval(), tool_head, "float16", tools == "inputs", probe)
    encode = encode_as_stored(encoder, tools == "inputs", probe, "tiny")
    weights = {"temporal": "1" * 64, "encoder": "2" * 64}
    return Nets(
        encode,
        phase,
        inference,
        clip_frames,
        config,
        spec,
        weights,
        tuple(spec.tracks),
        tools=bool(count),
        parts=parts,
    )


def probe_of(tools: tuple[str, ...]) -> ToolProbe:
    """A linear probe of embeddings of width D with random weights."""
    values = np.random.default_rng(0).normal(size=(D, len(tools) + 2)).astype(np.float32)
    probe = Probe(values[:, 0], values[:, 1], values[:, 2:], values[0, 2:] + 1, 1.0, None)
    about = ToolProbeAbout(tools=tools, dataset="x", encoder_digest="x", encoder={}, c=1.0, val_map=None)
    return ToolProbe(probe, about, Path("unused"))


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
