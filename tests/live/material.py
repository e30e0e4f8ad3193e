"""Runs with random nets over one small encoder, as `train-cnn`, `train-temporal` and `train-joint` would write them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.head_settings import HeadSettings, LstmHead
from configs.load import load_dataset
from configs.schema import Config, JointNetConfig
from engine.checkpoints import save_checkpoint
from engine.files import sha256_file
from engine.runs import BEST_FILE
from live.nets import Nets, joint_net, pair_of_stages
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.encoder import load_encoder
from stage1_cnn.model import CnnAbout, ToolNet
from stage2_temporal.decoding.fitted import FittedDecoding, TrackDecoding
from stage2_temporal.decoding.graph import learn_graph
from stage2_temporal.heads.base import build_head
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.joint.net import JointAbout, build_joint
from stage2_temporal.model import PhaseModel
from stage2_temporal.predict import TemporalAbout

TINY = "shufflenet_v2_x0_5"
SPEC = load_dataset("cholec80")
SMALL = LstmHead(hidden=6)


def settings(folder: Path, fps: float = 1.0, **blocks: Any) -> Config:
    """Settings of a tiny encoder in fp32 that computes on the CPU."""
    base: dict[str, Any] = {
        "device": "cpu",
        "runs": folder / "runs",
        "data": {"dataset": "cholec80", "fps": fps},
        "preprocess": {"resize_px": 36, "crop_px": 32},
        "cnn": {"backbone": TINY, "weights": "random"},
        "extract": {"precision": "fp32", "store": folder / "features"},
    }
    return Config.model_validate({**base, **blocks})


def write_stages(
    folder: Path, head: HeadSettings = SMALL, spec: DataSetSpec = SPEC, **more: Any
) -> tuple[Config, Path]:
    """A run of two stages with random weights, with a fitted decoding; its settings and folder."""
    config, run = settings(folder, **more), folder / "runs/two"
    torch.manual_seed(3)
    tool_net = ToolNet(build_backbone(TINY, "random", 0), len(spec.tools), None)
    save_checkpoint(run / "cnn" / BEST_FILE, {"model": tool_net.state_dict(), **CnnAbout.of(tool_net, spec).to_json()})
    (run / "cnn/result.json").write_text("{}")
    encoder = load_encoder(config, run, spec.tools).spec
    tracks = {name: spec.tracks[name].classes for name in spec.tracks}
    widths = [len(spec.phases), *map(len, tracks.values())]
    width = encoder.embedding_dim
    standardise = Standardise(torch.full((width,), 0.4), torch.full((width,), 0.2))
    model = PhaseModel(standardise, build_head(head, width, *widths))
    about = TemporalAbout(
        head=head, embedding_dim=width, phases=spec.phases, tracks=tracks or None, dataset=spec.name,
        encoder_digest=encoder.digest, encoder=encoder.to_json(), backbone=TINY, fps=config.data.fps,
        inference="carried", frames=4, seed=0,
    )  # fmt: skip
    save_checkpoint(run / "temporal" / BEST_FILE, {"model": model.state_dict(), **about.to_json()})
    _write_decoding(run / "temporal", about)
    return config, run


def _write_decoding(folder: Path, about: TemporalAbout) -> None:
    tracks = {}
    for name, classes in about.classes.items():
        labels = np.repeat(np.arange(len(classes)), 20)
        tracks[name] = TrackDecoding(
            classes=classes, temperature=1.3, filter_kappa=0.4, viterbi_kappa=0.5, min_duration_s=3.0,
            graph=learn_graph([labels, labels[::-1]], len(classes), 1.0),
        )  # fmt: skip
    sha256 = sha256_file(folder / BEST_FILE)
    FittedDecoding(weights_sha256=sha256, fps=1.0, train=("a",), val=(), tracks=tracks).write(folder)


def write_joint(folder: Path, head: HeadSettings = SMALL, **more: Any) -> tuple[Config, Path]:
    """A run of a joint net with random weights; its settings and folder."""
    config, run = settings(folder, **more), folder / "runs/joint"
    torch.manual_seed(3)
    net_config = JointNetConfig()
    net = build_joint(build_backbone(TINY, "random", 0), net_config, head, len(SPEC.tools), len(SPEC.phases))
    about = JointAbout.of(net, head, config, SPEC, "multitask")
    save_checkpoint(run / "joint/multitask" / BEST_FILE, {"model": net.state_dict(), **about.to_json()})
    return config, run


def two_stage(folder: Path, head: HeadSettings = SMALL, spec: DataSetSpec = SPEC, **more: Any) -> Nets:
    """The nets of such a run."""
    return pair_of_stages(*write_stages(folder, head, spec, **more))


def joint(folder: Path, head: HeadSettings = SMALL, **more: Any) -> Nets:
    """The same for a joint net."""
    return joint_net(*write_joint(folder, head, **more))


def with_memory(nets: Nets, known: dict[bytes, Any]) -> Nets:
    """The same nets, which encode no frame twice: results are kept in `known`, for nets with the same encoder."""

    def encode(frames: torch.Tensor) -> tuple[torch.Tensor, NDArray[np.float32] | None]:
        found = []
        for frame in frames:
            key = frame.numpy().tobytes()
            if key not in known:
                known[key] = nets.encode(frame[None])
            found.append(known[key])
        tools = [one[1] for one in found]
        return torch.cat([one[0] for one in found]), None if tools[0] is None else np.concatenate(tools)

    return replace(nets, encode=encode)
