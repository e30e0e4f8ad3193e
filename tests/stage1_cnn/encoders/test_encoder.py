"""The encoder on a simulated GPU: what its features' digest names, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from features.store import EncoderSpec
from stage1_cnn.encoders import encoder
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.encoder import Encoder
from tests.gpu import Gpu

CHOSEN = ["cnn.backbone=resnet18", "preprocess.resize_px=40", "preprocess.crop_px=32"]


def spec_on(device: str, monkeypatch: pytest.MonkeyPatch, *changes: str) -> EncoderSpec:
    """The specification of an encoder on a simulated GPU, or on the CPU."""
    config = load_config("cholec80", [*CHOSEN, f"device={device}", *changes])
    net = build_backbone("resnet18", "random", 0)
    with monkeypatch.context() as patch:
        Gpu(patch, (8, 0))
        patch.setattr(encoder, "require_kernels", lambda device: None)
        patch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
        return Encoder(config, net, None, "0" * 64, 7).spec


def test_tf32_is_in_the_digest_of_features_that_a_gpu_makes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32 = "extract.precision=fp32"
    without, other = (spec_on("cuda", monkeypatch, fp32, f"cuda.tf32={tf32}") for tf32 in ("false", "true"))
    assert (without.arithmetic, other.arithmetic) == ("plain", "plain, tf32")
    cpu, unchanged = (spec_on("cpu", monkeypatch, fp32, f"cuda.tf32={tf32}") for tf32 in ("false", "true"))
    assert cpu.digest == unchanged.digest == without.digest != other.digest


def test_a_gpu_without_code_is_refused_before_the_net_is_moved_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    Gpu(monkeypatch, (6, 0))
    net = build_backbone("resnet18", "random", 0)
    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(UserError, match="has no code for sm_60"):
        Encoder(load_config("cholec80", [*CHOSEN, "device=cuda"]), net, None, "0" * 64, 7)
