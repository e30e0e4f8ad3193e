"""Losses of single frames: what counts, and with which weight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from configs.schema import CnnConfig
from stage1_cnn.data import LabelledFrames
from stage1_cnn.loss import FrameLoss, phase_weights, positive_weights
from stage1_cnn.model import NetOutput


def some_frames(phase: list[int], tools: list[list[int]]) -> LabelledFrames:
    rows = np.arange(len(tools))
    return LabelledFrames(("a",), (), 0 * rows, rows, np.array(phase, np.int8), np.array(tools, np.int8))


def test_loss_counts_labelled_entries_alone() -> None:
    loss = FrameLoss(CnnConfig(), some_frames([0], [[1]]))
    logits = torch.tensor([[2.0, -1.0], [0.5, 9.0]], requires_grad=True)
    value = loss(
        NetOutput(torch.zeros(2, 1), logits, None), torch.tensor([-1, -1]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    )
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5))) / 3
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value.backward()
    assert logits.grad[1, 1] == 0


def test_phase_loss_is_added_with_its_weight() -> None:
    loss = FrameLoss(CnnConfig(phase_head=True, phase_loss_weight=0.5), some_frames([0], [[1]]))
    phases = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    output = NetOutput(torch.zeros(2, 1), torch.zeros(2, 1), phases)
    both = loss(output, torch.tensor([0, -1]), torch.tensor([[1.0], [0.0]]))
    assert both.item() == pytest.approx(math.log(2) + 0.5 * math.log1p(math.exp(-1)), rel=1e-6)
    none = loss(output, torch.tensor([-1, -1]), torch.tensor([[1.0], [0.0]]))
    assert none.item() == pytest.approx(math.log(2), rel=1e-6)


def test_inverse_frequency_weights() -> None:
    tools = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, -1, 1]], np.int8)
    assert positive_weights(tools).tolist() == [3.0, 1.0, 1.0]
    phase = np.array([0, 0, 0, 2, -1], np.int8)
    assert phase_weights(phase, 4).tolist() == pytest.approx([4 / 6, 1.0, 2.0, 1.0])
    loss = FrameLoss(CnnConfig(class_weighting="inverse_frequency"), some_frames([0] * 4, tools.tolist()))
    output = NetOutput(torch.zeros(1, 1), torch.zeros(1, 3), None)
    assert loss(output, torch.tensor([0]), torch.tensor([[1.0, -1.0, -1.0]])).item() == pytest.approx(
        3 * math.log(2), rel=1e-6
    )
