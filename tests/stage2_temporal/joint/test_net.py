"""The joint net and its loss, against the paper's formulas written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Config, GruHead, JointLossConfig, JointNetConfig, LinearHead, LstmHead, TcnHead
from stage1_cnn.model import build_backbone, freeze_batch_norm
from stage2_temporal.joint.net import (
    JointLoss,
    JointNet,
    JointOutput,
    bernoulli_kl,
    build_joint,
    joint_checkpoint,
    load_joint,
    phase_loss,
    tool_loss,
)

TINY = "shufflenet_v2_x0_5"
TOOLS, PHASES = 3, 4
CL = {"tool_hidden": 8, "mapping": True}


def net_of(head: Any = None, seed: int = 0, **net: Any) -> JointNet:
    torch.manual_seed(seed)
    head = head or LstmHead(hidden=6)
    return build_joint(build_backbone(TINY, "random", seed), JointNetConfig(**net), head, TOOLS, PHASES).eval()


def clips(batch: int = 2, frames: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- the net


def test_cl_is_the_published_net_written_out() -> None:
    net = net_of(LstmHead(hidden=6, relu=True), **CL)
    images = clips()
    with torch.no_grad():
        embedding = net.backbone(images.flatten(0, 1)).view(2, 3, -1)
        assert isinstance(net.tool_head, nn.Sequential)
        tools = net.tool_head[2](F.relu(net.tool_head[0](embedding)))
        out, _ = net.phase.head.rnn(embedding)  # type: ignore[union-attr, operator]
        phase = net.phase.head.fc(F.relu(out))  # type: ignore[union-attr, operator]
        mapped = net.mapping(F.relu(out))  # type: ignore[misc]
        found = net(images)
    torch.testing.assert_close(found.tool_logits, tools)
    torch.testing.assert_close(found.phase_stages[-1], phase)
    torch.testing.assert_close(found.mapped_logits, mapped)


@pytest.mark.parametrize(
    "head",
    [
        LstmHead(hidden=6, fc_hidden=5),
        GruHead(name="gru", hidden=6),
        TcnHead(name="tcn", layers=2, maps=4),
        LinearHead(name="linear"),
    ],
)
def test_any_causal_head_carries_state_from_clip_to_clip(head: Any) -> None:
    net = net_of(head, mapping=True)
    images = clips(batch=2, frames=6)
    with torch.no_grad():
        whole = net(images)
        first = net(images[:, :4])
        second = net(images[:, 4:], first.state)
    for name in ("tool_logits", "mapped_logits"):
        both = torch.cat([getattr(first, name), getattr(second, name)], dim=1)
        torch.testing.assert_close(both, getattr(whole, name), rtol=1e-4, atol=1e-5)
    both = torch.cat([first.phase_stages[-1], second.phase_stages[-1]], dim=1)
    torch.testing.assert_close(both, whole.phase_stages[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tasks", "has"), [("tool", (True, False)), ("phase", (False, True)), ("both", (True, True))])
def test_tasks_choose_branches(tasks: str, has: tuple[bool, bool]) -> None:
    net = net_of(tasks=tasks)
    with torch.no_grad():
        found = net(clips(frames=1))
    assert (found.tool_logits is not None, found.phase_stages is not None) == has
    assert (net.tool_head is not None, net.phase is not None) == has


def test_a_head_that_looks_ahead_is_refused() -> None:
    with pytest.raises(UserError, match="bidirectional"):
        net_of(LstmHead(bidirectional=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(frozen: bool) -> None:
    states, gradients = [], []
    for again in (False, True):
        net = net_of()
        net.gradient_checkpointing = again
        if frozen:
            freeze_batch_norm(net.backbone)
        net.train()
        net(clips()).tool_logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        states.append(net.state_dict())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    tensors = [name for name, value in states[0].items() if isinstance(value, Tensor)]
    for name in tensors:
        torch.testing.assert_close(states[1][name], states[0][name])


def test_the_mapping_step_leaves_all_else_alone() -> None:
    net = net_of(**CL)
    net.train_only("mapping")
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items() if isinstance(value, Tensor)}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(clips()).mapped_logits.sum().backward()
    optimizer.step()
    moved = {name for name, value in before.items() if not torch.equal(value, net.state_dict()[name])}
    assert moved == {"mapping.weight", "mapping.bias"}
    net.train_only("all", freeze_mapping=True)
    assert not net.mapping.weight.requires_grad  # type: ignore[union-attr]
    assert net.backbone.training
    assert all(p.requires_grad for name, p in net.named_parameters() if not name.startswith("mapping."))


# ---------------------------------------------------------------------------------------------- the loss


def test_divergence_is_the_textbooks_and_stays_finite() -> None:
    a, b = torch.tensor([0.3, -2.0, 5.0, 0.0]), torch.tensor([1.0, -2.0, -3.0, 80.0])
    p, q = a.double().sigmoid(), b.double().sigmoid()
    book = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(bernoulli_kl(a, b)[:3].double(), book[:3], rtol=1e-4, atol=1e-6)
    assert float(bernoulli_kl(a, b)[1]) == 0
    assert bernoulli_kl(torch.tensor(200.0), torch.tensor(-200.0)) == pytest.approx(200)
    assert bernoulli_kl(a, b)[3] == pytest.approx(40 - math.log(2), rel=1e-4)


@given(a=st.floats(-60, 60), b=st.floats(-60, 60))
@settings(deadline=None)
def test_divergence_is_never_negative_and_its_gradient_pulls_together(a: float, b: float) -> None:
    q = torch.tensor(b, requires_grad=True)
    value = bernoulli_kl(torch.tensor(a), q)
    assert float(value.detach()) >= 0
    assert math.isfinite(float(value.detach()))
    value.backward()
    expected = torch.sigmoid(torch.tensor(b)) - torch.sigmoid(torch.tensor(a))
    assert q.grad is not None
    assert float(q.grad) == pytest.approx(float(expected), abs=1e-4) or float(value.detach()) == 0


def output_of(seed: int = 0) -> tuple[JointOutput, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tools, mapped = (torch.randn(2, 3, TOOLS, generator=generator).requires_grad_() for _ in range(2))
    phases = torch.randn(2, 3, PHASES, generator=generator).requires_grad_()
    phase = torch.tensor([[0, 1, -1], [2, 3, -1]])
    labels = torch.tensor([[[1, 0, 1], [-1, -1, -1], [0, 0, 0]], [[1, 1, 1], [0, 0, 1], [-1, -1, -1]]]).float()
    return JointOutput(tools, [phases], mapped, ()), phase, labels, torch.tensor([3, 2])


def test_loss_is_the_sum_of_its_terms_over_labelled_entries() -> None:
    output, phase, tools, lengths = output_of()
    config = JointLossConfig(tool_weight=0.5, alpha=2.0, detach="none")
    assert output.phase_stages is not None
    ce = F.cross_entropy(output.phase_stages[0][phase >= 0], phase[phase >= 0])
    bce = F.binary_cross_entropy_with_logits(output.tool_logits[tools >= 0], tools[tools >= 0])  # type: ignore[index]
    inside = torch.tensor([[True, True, True], [True, True, False]])
    kl = bernoulli_kl(output.mapped_logits, output.tool_logits)[inside].mean()  # type: ignore[arg-type]
    found = {step: JointLoss(config, step)(output, phase, tools, lengths) for step in ("multitask", "correlation")}
    torch.testing.assert_close(found["multitask"], ce + 0.5 * bce)
    torch.testing.assert_close(found["correlation"], ce + 0.5 * bce + 2 * kl)
    mapping = JointLoss(config, "mapping")(output, phase, tools, lengths)
    torch.testing.assert_close(
        mapping,
        F.binary_cross_entropy_with_logits(output.mapped_logits[tools >= 0], tools[tools >= 0]),  # type: ignore[index]
    )


def test_loss_on_the_last_frame_of_each_clip() -> None:
    output, phase, tools, lengths = output_of()
    phase = torch.tensor([[0, 1, 2], [2, 3, -1]])
    found = JointLoss(JointLossConfig(phase_frames="last", tool_weight=0), "multitask")(output, phase, tools, lengths)
    assert output.phase_stages is not None
    last = torch.stack([output.phase_stages[0][0, 2], output.phase_stages[0][1, 1]])
    torch.testing.assert_close(found, F.cross_entropy(last, torch.tensor([2, 3])))


@pytest.mark.parametrize(
    ("detach", "gets"), [("none", (True, True)), ("mapped", (True, False)), ("branch", (False, True))]
)
@pytest.mark.parametrize("direction", ["mapped_branch", "branch_mapped"])
def test_correlation_direction_and_detaching(detach: Any, gets: tuple[bool, bool], direction: Any) -> None:
    output, *_ = output_of()
    assert output.tool_logits is not None
    assert output.mapped_logits is not None
    loss = JointLoss(JointLossConfig(detach=detach, direction=direction), "correlation")
    value = loss.correlation(output.tool_logits, output.mapped_logits)
    value.sum().backward()
    assert (output.tool_logits.grad is not None, output.mapped_logits.grad is not None) == gets
    pair = (output.mapped_logits, output.tool_logits)
    expected = bernoulli_kl(*(pair if direction == "mapped_branch" else pair[::-1])).mean(dim=-1)
    torch.testing.assert_close(value, expected)


def test_no_labels_cost_nothing() -> None:
    nothing = torch.full((1, 2), -1)
    assert float(phase_loss(torch.randn(1, 2, PHASES), nothing)) == 0
    assert float(tool_loss(torch.randn(1, 2, TOOLS), torch.full((1, 2, TOOLS), -1.0))) == 0


# ---------------------------------------------------------------------------------------------- settings, files


@pytest.mark.parametrize(
    ("joint", "message"),
    [
        ({"sequence": {"mode": "full"}}, "sequence.mode=full"),
        ({"mapping": {"epochs": 1}}, "need net.mapping=true"),
        ({"net": {"mapping": True}, "correlation": {"epochs": 1}}, "needs step mapping before it"),
        ({"net": {"mapping": True, "tasks": "tool"}}, "needs tasks=both"),
    ],
)
def test_settings_that_do_not_fit_are_refused(joint: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"joint": joint})


def test_what_is_no_joint_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run train-joint"):
        joint_checkpoint(tmp_path)
    from engine.checkpoints import save_checkpoint

    save_checkpoint(tmp_path / "best.pt", {"kind": "temporal", "model": {}})
    with pytest.raises(UserError, match="not a checkpoint of train-joint"):
        load_joint(tmp_path / "best.pt")
    save_checkpoint(tmp_path / "best.pt", {"kind": "joint", "model": {}})
    with pytest.raises(UserError, match="damaged, or of another version"):
        load_joint(tmp_path / "best.pt")
