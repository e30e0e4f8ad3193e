"""A training step queues its work on the GPU and waits for nothing: shown with fake CUDA tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs import head_settings, schema
from configs.schema import JointLossConfig, JointNetConfig, OptimConfig, PreprocessConfig
from engine.optim import build_optimizer
from features.frames.preprocess import normalise
from stage1_cnn.data import ClipBatch
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.loss import phase_loss, tool_loss
from stage1_cnn.model import ToolNet
from stage2_temporal.data import Batch, FeatureBank, Span
from stage2_temporal.heads.base import build_head
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.joint.loss import JointLoss
from stage2_temporal.joint.net import JointOutput, build_joint
from stage2_temporal.loss import PhaseLoss, TracksLoss
from stage2_temporal.model import PhaseModel
from tests.waits import GPU, Waits, faked, noted_waits

TOOLS, PHASES, SIZE = 3, 4, 32
PREPROCESS = PreprocessConfig(resize_px=40, crop_px=SIZE)


def clips(count: int, frames: int, lengths: list[int], colours: bool) -> ClipBatch:
    return ClipBatch(
        images=torch.zeros(count, frames, SIZE, SIZE, 3, dtype=torch.uint8),
        phase=torch.zeros(count, frames, dtype=torch.int64),
        tools=torch.zeros(count, frames, TOOLS),
        lengths=torch.tensor(lengths),
        first=torch.arange(count),
        flip=torch.ones(count, dtype=torch.bool),
        colour=torch.ones(count if colours else 0, 3),
        fresh=True,
        counts=True,
    )


def test_what_waits_is_noted() -> None:
    """The means of the tests below."""
    with noted_waits() as waits:
        x = torch.ones(3, device=GPU)
        torch.ones(3).to(GPU)
        torch.tensor([1.0], device=GPU)
        x.cpu()
        for wait in (lambda: x[x > 0], lambda: float(x.sum()), lambda: x.nonzero()):
            with pytest.raises(RuntimeError):
                wait()
        torch.ones(3).pin_memory().to(GPU, non_blocking=True)
        torch.ones(3)[torch.tensor([True, False, True])].tolist()
    assert waits == ["_to_copy"] * 3 + ["index by a mask", "_local_scalar_dense", "nonzero"]


@pytest.mark.parametrize("colours", [False, True])
def test_images_are_prepared_without_waiting(colours: bool) -> None:
    batch = clips(2, 1, [1, 1], colours)
    with noted_waits() as waits:
        images = batch.inputs(PREPROCESS, GPU)
        normalise(torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8, device=GPU), PREPROCESS, GPU)
    assert images.device == GPU
    assert waits == []


@pytest.mark.parametrize(("class_weighting", "name"), [("none", "sgd"), ("inverse_frequency", "adamw")])
def test_a_step_of_stage_one_does_not_wait(class_weighting: str, name: Any) -> None:
    batch = clips(4, 1, [1] * 4, colours=True)
    net = ToolNet(build_backbone("resnet18", "random", 0), TOOLS, PHASES)
    with noted_waits() as waits:
        faked(net)
        weight = torch.ones(PHASES, device=GPU) if class_weighting != "none" else None
        optimizer = build_optimizer([{"params": net.parameters()}], OptimConfig(name=name))
        waits.clear()
        for _ in range(2):
            phase, tools = batch.labels(GPU)
            output = net(batch.inputs(PREPROCESS, GPU))
            assert output.phase_logits is not None
            tool_loss(output.tool_logits, tools.squeeze(1))
            phase_loss(output.phase_logits, phase.squeeze(1), weight)
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert waits == []


HEADS: dict[str, Any] = {
    "lstm": head_settings.LstmHead(hidden=7),
    "tcn": head_settings.TcnHead(name="tcn", stages=2, layers=2, maps=6),
    "ssm": head_settings.SsmHead(name="ssm", width=6, head_width=4, state=3),
    "linear": head_settings.LinearHead(name="linear"),
    "attention": head_settings.AttentionHead(name="attention", width=8, heads=2, window=4),
    "key pooling": head_settings.KeyPoolingHead(name="key_pooling", width=8, heads=2, window=4),
}


@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 5, 2], [5, 9, 2]])
@pytest.mark.parametrize("name", HEADS)
def test_a_step_of_stage_two_does_not_wait(name: str, lengths: list[int]) -> None:
    width, frames = 5, 40
    batch = Batch(torch.tensor([0, 9, 20]), torch.tensor(lengths))
    model = PhaseModel(Standardise.identity(width), build_head(HEADS[name], width, PHASES, PHASES))
    with noted_waits() as waits:
        faked(model)
        bank = FeatureBank(
            torch.zeros(frames, width, dtype=torch.float16, device=GPU),
            torch.zeros(2, frames, dtype=torch.int64, device=GPU),
            (Span(0, frames),),
            ("video01",),
        )
        criterion = TracksLoss(schema.TemporalConfig(smoothing_weight=0.1), [torch.ones(PHASES, device=GPU)] * 2)
        waits.clear()
        x, labels = bank.gather(batch)
        output = model(x, None, batch.lengths)
        criterion(output.logits_per_stage, labels)
    assert waits == []


@pytest.mark.parametrize("frames", ["all", "last"])
@pytest.mark.parametrize("step", ["multitask", "mapping", "correlation"])
def test_a_step_of_the_joint_net_does_not_wait(step: str, frames: Any) -> None:
    batch = clips(2, 3, [2, 3], colours=False)
    backbone = build_backbone("resnet18", "random", 0)
    net = build_joint(backbone, JointNetConfig(mapping=True), HEADS["lstm"], TOOLS, PHASES)
    with noted_waits() as waits:
        faked(net)
        criterion = JointLoss(JointLossConfig(phase_frames=frames), step)
        waits.clear()
        images: Tensor = batch.inputs(PREPROCESS, GPU).unflatten(0, batch.phase.shape)
        output = net(images, None, batch.lengths)
        criterion(output, *batch.labels(GPU), batch.lengths * batch.counts)
    assert waits == []


def backward_waits(loss: Tensor) -> list[str]:
    with Waits("cpu") as waits:
        loss.backward()
    return waits.found


def test_backward_passes_do_not_wait() -> None:
    """Those of the losses, and of the head that leaves padding out, here on the CPU."""
    tools, mapped = (torch.randn(2, 3, TOOLS, requires_grad=True) for _ in range(2))
    phases = torch.randn(2, 3, PHASES, requires_grad=True)
    labels = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, TOOLS)
    loss = JointLoss(JointLossConfig(phase_frames="last"), "correlation")
    assert backward_waits(loss(JointOutput(tools, [phases], mapped, ()), *labels, torch.tensor([2, 3]))) == []
    model = PhaseModel(Standardise.identity(5), build_head(HEADS["linear"], 5, PHASES))
    logits = model(torch.zeros(2, 3, 5, dtype=torch.float16), None, torch.tensor([2, 3])).logits_per_stage
    assert backward_waits(PhaseLoss(schema.TemporalConfig(), torch.ones(PHASES))(logits, labels[0])) == []
    mask = torch.tensor([True, False])
    assert backward_waits(torch.zeros(2).masked_scatter(mask, torch.ones(1, requires_grad=True)).sum())
