"""Trans-SVNet against its equations written out, a frame, a head and a pair of frames at a time."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from configs.head_settings import TransSvnetHead as Settings
from configs.head_settings import read_head
from stage2_temporal.heads.base import build_head
from stage2_temporal.heads.tcn import TcnHead
from stage2_temporal.heads.trans_svnet import TransSvnetHead

WINDOW, WIDTH, HEADS = 4, 6, 3
SETTINGS = Settings(name="trans_svnet", layers=2, maps=3, dropout=0.0, window=WINDOW, width=WIDTH, heads=HEADS)


def head_of(*classes: int) -> TransSvnetHead:
    torch.manual_seed(0)
    head = build_head(SETTINGS, 5, *classes).double()
    assert isinstance(head, TransSvnetHead)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "attended" in name or name.endswith(("out.weight", "out.bias")) or "bias" in name:
                parameter.normal_(1.0, 0.3)  # new biases are 0 and new scales 1, which would hide a mistake
    return head


def normalised(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    scaled = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attended(query: Tensor, memory: list[Tensor], weights: dict[str, Tensor], layer: str) -> Tensor:
    """One query (M,) and the memory, W vectors (M,) -> (M,)."""
    matrices = weights[f"{layer}.attention.in_proj_weight"].split(WIDTH)
    biases = weights[f"{layer}.attention.in_proj_bias"].split(WIDTH)
    q, size = matrices[0] @ query + biases[0], WIDTH // HEADS
    keys = [matrices[1] @ one + biases[1] for one in memory]
    values = [matrices[2] @ one + biases[2] for one in memory]
    found = torch.zeros(WIDTH, dtype=torch.float64)
    for part in (slice(i * size, (i + 1) * size) for i in range(HEADS)):
        scores = [math.exp(float(q[part] @ key[part]) / math.sqrt(size)) for key in keys]
        for score, value in zip(scores, values, strict=True):
            found[part] += score / sum(scores) * value[part]
    mixed = weights[f"{layer}.attention.out_proj.weight"] @ found + weights[f"{layer}.attention.out_proj.bias"]
    x = normalised(query + mixed, weights, f"{layer}.attended")
    inner = (weights[f"{layer}.feedforward.0.weight"] @ x + weights[f"{layer}.feedforward.0.bias"]).clamp(min=0)
    outer = weights[f"{layer}.feedforward.2.weight"] @ inner + weights[f"{layer}.feedforward.2.bias"]
    return normalised(x + outer, weights, f"{layer}.out")


@pytest.mark.parametrize("classes", [(4,), (2, 5)])
def test_it_is_the_published_one_written_out(classes: tuple[int, ...]) -> None:
    head = head_of(*classes)
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    with torch.no_grad():
        output, tcn = head(x), TcnHead.forward(head, x).logits_per_stage
    assert len(output.logits_per_stage) == 3
    weights = {name: value.detach() for name, value in head.named_parameters()}
    for found, wanted in zip(output.logits_per_stage, tcn, strict=False):
        torch.testing.assert_close(found, wanted)
    before = [torch.zeros(sum(classes), dtype=torch.float64)] * (WINDOW - 1)
    for row in range(2):
        logits = [*before, *tcn[-1][row]]
        for t in range(9):
            window = [weights["temporal.weight"] @ one for one in logits[t : t + WINDOW]]
            encoded = [attended(one, window, weights, "encoder") for one in window]
            hidden = attended(torch.tanh(weights["spatial.weight"] @ x[row, t]), encoded, weights, "decoder")
            torch.testing.assert_close(output.hidden[row, t], hidden)
            torch.testing.assert_close(output.logits[row, t], weights["fc.weight"] @ hidden + weights["fc.bias"])


def test_gradients_are_those_of_finite_differences() -> None:
    head = head_of(2)
    x = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    *before, ring = (torch.randn_like(one) for one in head(x).state)
    assert torch.autograd.gradcheck(lambda x, ring: head(x, (*before, ring)).logits, (x, ring.requires_grad_()))


def test_frames_in_blocks_are_the_frames_at_once() -> None:
    head = head_of(4)
    x = torch.randn(2, 11, 5, dtype=torch.float64)
    found = []
    for block in (1024, 6):  # all frames, or 3 frames of both sequences at a time
        head.block_windows = block
        logits = head(x).logits
        found.append([logits, *torch.autograd.grad(logits.pow(2).sum(), list(head.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_frames_outside_the_tcn_and_the_window_change_nothing() -> None:
    """Two stages of two layers reach back 12 frames, the window 3 more."""
    head = head_of(4)
    x = torch.randn(1, 20, 5, dtype=torch.float64)
    for back, changes in ((15, True), (16, False)):
        changed = x.clone()
        changed[:, 19 - back] += 10
        assert torch.equal(head(x).logits[:, 19], head(changed).logits[:, 19]) != changes


def test_the_width_is_divided_among_the_heads() -> None:
    with pytest.raises((ValidationError, ValueError), match="width 10 is not a multiple of heads 4"):
        read_head({"name": "trans_svnet", "width": 10})
