"""The joint net and its loss, against the paper's formulas written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError
from configs.head_settings import (
    AttentionHead,
    GruHead,
    KeyPoolingHead,
    LinearHead,
    LstmHead,
    SsmHead,
    TcnHead,
    TransSvnetHead,
)
from configs.schema import Config, JointNetConfig
from stage1_cnn.encoders.backbone import build_backbone
from stage2_temporal.joint.net import (
    JointNet,
    build_joint,
    joint_checkpoint,
    load_joint,
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
        SsmHead(name="ssm", width=6, head_width=4, state=3),
        LinearHead(name="linear"),
        AttentionHead(name="attention", width=8, heads=2, window=3),
        KeyPoolingHead(name="key_pooling", width=8, heads=2, window=3),
        TransSvnetHead(name="trans_svnet", layers=2, maps=4, window=3, width=8),
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


def test_a_head_without_hidden_features_cannot_feed_the_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of(mapping=True)
    assert net.phase is not None
    whole = net.phase.with_hidden
    monkeypatch.setattr(net.phase, "with_hidden", lambda *given: whole(*given)._replace(hidden=None))
    with pytest.raises(UserError, match=r"joint.net.mapping reads the head's hidden features"):
        net(clips())


def test_the_mapping_step_changes_only_the_mapping() -> None:
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
    with pytest.raises(UserError, match="damaged, or written by another version"):
        load_joint(tmp_path / "best.pt")
