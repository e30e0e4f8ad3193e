"""Stage one's net: heads, digests, checkpoints that are built again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import CnnConfig, Config
from engine.checkpoints import save_checkpoint
from stage1_cnn.encoders.backbone import (
    build_backbone,
)
from stage1_cnn.encoders.pretrained import best_checkpoint
from stage1_cnn.model import CnnAbout, ToolNet, build_net, rebuild_from_checkpoint, weights_sha256

SMALL = "mobilenet_v3_small"


def test_digest_sees_names_types_shapes_and_bytes() -> None:
    layer = nn.Linear(2, 3)
    before = weights_sha256(layer)
    assert weights_sha256(layer.to(memory_format=torch.contiguous_format)) == before
    with torch.no_grad():
        layer.bias[1] += 1e-6
    assert weights_sha256(layer) != before
    zeros = nn.ParameterDict({"a": nn.Parameter(torch.zeros(4))})
    assert weights_sha256(zeros) != weights_sha256(nn.ParameterDict({"b": nn.Parameter(torch.zeros(4))}))
    assert weights_sha256(zeros) != weights_sha256(nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, 2))}))


def test_heads() -> None:
    backbone = build_backbone(SMALL, "random", 0)
    images = torch.zeros(2, 3, 32, 32)
    both = ToolNet(backbone, 3, 5)(images)
    assert (both.embedding.shape, both.tool_logits.shape, both.phase_logits.shape) == ((2, 1024), (2, 3), (2, 5))
    only_phases = ToolNet(backbone, 0, 5)(images)
    assert (only_phases.tool_logits.shape, only_phases.phase_logits.shape) == ((2, 0), (2, 5))
    assert ToolNet(backbone, 3)(images).phase_logits is None


def test_heads_start_as_xavier_uniform() -> None:
    torch.manual_seed(0)
    head = ToolNet(build_backbone(SMALL, "random", 0), 7).tool_head
    bound = (6 / (1024 + 7)) ** 0.5
    assert bound * 0.98 < head.weight.abs().max() <= bound
    assert not head.bias.any()


def test_checkpoint_round_trip_and_reuse_as_weights(tmp_path: Path) -> None:
    spec = load_dataset("cholec80")
    config = Config(runs=tmp_path, cnn=CnnConfig(backbone=SMALL, weights="random", phase_head=True))
    net = build_net(config, spec)
    path = tmp_path / "first" / "cnn" / "best.pt"
    save_checkpoint(path, {"model": net.state_dict(), **CnnAbout.of(net, spec).to_json()})
    again, meta = rebuild_from_checkpoint(path)
    assert weights_sha256(again) == weights_sha256(net)
    assert (meta.backbone, meta.tools, meta.phases) == (SMALL, spec.tools, spec.phases)
    assert not again.training
    reused = build_backbone(SMALL, "run:first", 9, runs=tmp_path)
    assert weights_sha256(reused) == weights_sha256(net.backbone)
    assert best_checkpoint(tmp_path / "first") == path
    with pytest.raises(UserError, match=r"best.pt: does not hold weights of resnet18"):
        build_backbone("resnet18", "run:first", 0, runs=tmp_path)


def test_checkpoint_of_another_stage_or_with_other_tensors(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"stage": "temporal", "model": {}})
    with pytest.raises(UserError, match=r"best.pt: not a checkpoint of train-cnn"):
        rebuild_from_checkpoint(path)
    net = ToolNet(build_backbone(SMALL, "random", 0), 7)
    save_checkpoint(path, {"model": {}, **CnnAbout.of(net, load_dataset("cholec80")).to_json()})
    with pytest.raises(UserError, match=r"best.pt: its tensors do not match its description"):
        rebuild_from_checkpoint(path)
