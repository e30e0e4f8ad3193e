"""`encoders list` and `encoders info`: what is known about encoders, without the time that importing torch takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from commands.encoder_lines import WIDTH, encoder_lines, other_encoders
from configs.encoder_spec import described_encoders
from configs.errors import UserError
from stage1_cnn.encoders.backbone import bare_backbone
from tests.cli import run_fresh, succeed


def test_list_names_every_described_encoder_with_its_weights(tmp_path: Path) -> None:
    said = succeed(["encoders", "list"], tmp_path).splitlines()
    assert [line.split()[0] for line in said[1 : said.index("")]] == described_encoders()
    assert said[0].split()[:4] == ["name", "dim", "image", "parameters"]
    lite = next(line for line in said if line.startswith("efficientnet_lite2"))
    assert lite.split()[1:5] == ["1280", "260", "4.8", "M"]
    assert "torchvision" in said[-3]
    assert "timm:NAME" in said[-2]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1"])
def test_networks_of_torchvision_that_cannot_be_used_are_named(name: str) -> None:
    assert name in other_encoders()[0]
    with pytest.raises(UserError), torch.device("meta"):
        bare_backbone(name)


def test_list_as_json_imports_no_torch(tmp_path: Path) -> None:
    folder = tmp_path / "torch"  # a module of this name in the path is imported instead of torch, and fails
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('torch was imported')", encoding="utf-8")
    done = run_fresh(["encoders", "list", "--json"], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert list(found) == described_encoders()
    assert found["efficientnet_lite0"]["weights"]["licence"] == "Apache-2.0"
    assert found["efficientnet_lite0"]["preprocess"]["crop_px"] == 224


def test_info_of_a_described_encoder() -> None:
    lines = encoder_lines("efficientnet_lite1")
    text = "\n".join(lines)
    assert lines[0] == "efficientnet_lite1: EfficientNet-Lite1, trained on ImageNet"
    assert "embeddings of dimension 1280; 4.14 million parameters" in text
    assert "resized to 268 x 268 (bilinear), cropped to 240 x 240; mean 0.485" in text
    assert "efficientnet-lite1-77cc7160.pth, licence: Apache-2.0" in text
    assert max(map(len, lines)) <= WIDTH or "site-packages" in text  # paths are not broken


def test_info_of_other_networks() -> None:
    resnet = "\n".join(encoder_lines("resnet18"))
    assert "embeddings of dimension 512; 11.18 million parameters" in resnet
    assert "resnet18-f37072fd.pth" in resnet
    assert "the encoder states no preparation of its own" in resnet
    pytest.importorskip("timm")
    vit = "\n".join(encoder_lines("timm:vit_small_patch14_dinov2"))
    assert "the centre 518 x 518 is kept (bicubic)" in vit
    assert "this program does not download them" in vit
    assert "timm:vit_small_patch14_dinov2: timm's own pooling (default)" in vit
    assert "vit_small_patch14_dinov2@token: the class token\n" in vit
    assert "interpolated to other sizes" in vit


def test_info_of_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"unknown encoder \S+; did you mean efficientnet_lite2\? `encoders list` shows all$"
    ):
        encoder_lines("efficientnet_lite22")
