"""Layers in order: what partial freezing freezes, and the learning rates of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import JointNetConfig, OptimConfig
from engine.optim import build_optimizer
from stage1_cnn.encoders.backbone import Backbone, freeze_batch_norm, freeze_until
from stage1_cnn.encoders.layers import layers, layers_until, learning_steps
from stage1_cnn.model import ToolNet, parameter_groups
from stage2_temporal.joint.net import build_joint
from stage2_temporal.joint.recompute import recomputed_blocks

WIDTH = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.bn(self.conv(x))))


class Staged(nn.Module):
    """A stem with an offset of its own (as a class token is), dropout, two stages, and a norm at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, WIDTH, 1, 1))
        self.stem, self.bn, self.drop = nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.Dropout(0.5)
        self.layer1, self.layer2 = (nn.Sequential(Block(), Block()) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.bn(self.stem(x))) + self.offset
        return self.norm(self.layer2(self.layer1(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def staged(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone("staged", Staged(), WIDTH)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(backbone: Backbone, recomputed: bool = False, **groups: Any) -> set[str]:
    """The names of the tensors of the backbone that one step of training with weight decay changes."""
    net = ToolNet(backbone, 2).train()
    before = {name: tensor.clone() for name, tensor in backbone.net.state_dict().items()}
    config = OptimConfig(name="sgd", lr=0.1, weight_decay=0.1, momentum=0.9)
    optimizer = build_optimizer(parameter_groups(net, 1.0, **groups), config)
    for _ in range(2):
        if recomputed:
            with recomputed_blocks(backbone):
                loss = net(images()).tool_logits.square().sum()
        else:
            loss = net(images()).tool_logits.square().sum()
        loss.backward()
        optimizer.step()
    return {name for name, tensor in backbone.net.state_dict().items() if not torch.equal(tensor, before[name])}


# ---------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    ("name", "free"),
    [
        ("stem", ("bn.", "layer1.", "layer2.", "norm.")),
        ("bn", ("layer1.", "layer2.", "norm.")),
        ("layer1.0", ("layer1.1.", "layer2.", "norm.")),
        ("layer1", ("layer2.", "norm.")),
        ("layer2", ("norm.",)),
    ],
)
def test_frozen_layers_do_not_change_at_all_and_all_others_learn(
    name: str, free: tuple[str, ...], recomputed: bool
) -> None:
    backbone = staged()
    freeze_until(backbone, name)
    expected = {path for path in backbone.net.state_dict() if path.startswith(free)}
    assert trained(backbone, recomputed, layer_lr_decay=0.5) == expected


def test_dropout_of_frozen_layers_is_off_and_that_of_others_is_on() -> None:
    backbone = staged().train()
    freeze_until(backbone, "layer1")
    assert torch.equal(
        backbone.net.layer1(backbone.net.drop(torch.ones(1, WIDTH, 8, 8))),
        backbone.net.layer1(torch.ones(1, WIDTH, 8, 8)),
    )
    assert not torch.equal(backbone(images()), backbone(images()))
    backbone.eval().train()
    assert {name for name, part in backbone.net.named_children() if part.training} == {"layer1", "layer2", "norm"}
    assert not any(part.training for part in backbone.net.layer1.children())


def test_frozen_layers_store_no_activations() -> None:
    def stored(name: str | None) -> int:
        backbone, total = staged().train(), 0
        if name:
            freeze_until(backbone, name)

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            backbone(images())
        return total

    sizes = [stored(name) for name in (None, "bn", "layer1", "layer2", "norm")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.6 * sizes[0]
    assert sizes[-1] == 0


def test_freezing_stays_through_the_steps_of_a_joint_net() -> None:
    net = build_joint(staged(), JointNetConfig(tasks="tool"), None, 2, 0).train()
    freeze_until(net.backbone, "layer1")
    free = {name for name, one in net.backbone.net.named_parameters() if one.requires_grad}
    assert {name.split(".")[0] for name in free} == {"layer2", "norm"}
    net.train_only("mapping")
    assert not any(one.requires_grad for one in net.backbone.parameters())
    net.train_only("all")
    assert {name for name, one in net.backbone.net.named_parameters() if one.requires_grad} == free
    assert not net.backbone.net.bn.training


def test_freezing_works_with_frozen_batch_norm() -> None:
    backbone = staged()
    freeze_batch_norm(backbone)
    freeze_until(backbone, "layer1")
    norms = ("layer2.0.bn", "layer2.1.bn")
    expected = {name for name in backbone.net.state_dict() if name.startswith(("layer2.", "norm."))}
    assert trained(backbone) == {name for name in expected if not name.startswith(norms)}


def test_freezing_everything_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = staged()
    freeze_until(backbone, "norm")
    assert "cnn.freeze_until=norm: the whole of staged is frozen" in capsys.readouterr().err
    assert trained(backbone) == set()
    freeze_until(staged(), "layer1")
    assert "million parameters of staged are frozen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer3", r"did you mean layer\d\?; possible are stem, bn, layer1, layer1.0 to layer1.1, layer2, .*, norm$"),
        ("layer1.0.conv", r"only the whole of layer1.0; possible are"),
        ("", "not a layer"),
        ("layer", "not a layer"),
        ("../x", "not a layer"),
    ],
)
def test_a_wrong_name_is_refused_with_the_possible_ones(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        freeze_until(staged(), name)


# ---------------------------------------------------------------------------------------------- order, blocks


@pytest.mark.parametrize(
    ("name", "blocks", "first", "last"),
    [
        ("resnet50", 17, "conv1", "layer4.2"),
        ("vgg11_bn", 10, "features.0", "classifier.3"),
        ("swin_t", 16, "features.0", "features.7.1"),
        ("vit_b_16", 13, "conv_proj", "encoder.layers.encoder_layer_11"),
        ("mobilenet_v3_small", 14, "features.0", "classifier.0"),
        ("timm:vit_tiny_patch16_224", 13, "patch_embed", "blocks.11"),
        ("timm:convnext_atto", 16, "stem.0", "stages.3.blocks.1"),
        ("timm:efficientnet_b0", 18, "conv_stem", "conv_head"),
        ("timm:vovnet39a", 9, "stem.0", "stages.3.blocks.1"),
    ],
)
def test_the_blocks_of_networks(name: str, blocks: int, first: str, last: str) -> None:
    with torch.device("meta"):
        known = name.removeprefix("timm:")
        timm_net = known != name
        net = timm.create_model(known, num_classes=0) if timm_net else torchvision.models.get_model(known)
    steps = learning_steps(Backbone(name, net, 1 if timm_net else None).net)
    assert (len(steps), steps[0][0], steps[-1][0]) == (blocks, first, last)
    assert sorted(id(one) for _, own in steps for one in own) == sorted(map(id, net.parameters()))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_lite0"])
def test_the_order_of_layers_is_that_of_computation(name: str) -> None:
    net = timm.create_model(name).eval()
    called: list[str] = []
    for layer in layers(net):
        if not layer.divided:
            layer.module.register_forward_hook(lambda *_, path=layer.path: called.append(path))
    net(torch.zeros(1, 3, 224, 224))
    assert called == [layer.path for layer in layers(net) if layer.path in called]


def test_a_transformers_class_token_and_positions_come_before_its_blocks() -> None:
    net = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    frozen = {id(one) for layer in layers_until(net, "patch_embed") for one in layer.parameters}
    assert {id(net.cls_token), id(net.pos_embed), id(net.patch_embed.proj.weight)} <= frozen
    assert not frozen & {id(one) for one in net.blocks.parameters()}
    assert {id(net.cls_token), id(net.pos_embed)} <= {id(one) for one in learning_steps(net)[0][1]}


def test_every_name_that_is_listed_can_be_given() -> None:
    net = staged().net
    for layer in layers(net):
        if layer.path:
            assert layers_until(net, layer.path)[-1].path.startswith(layer.path)


def _random_net(shape: Any) -> nn.Module:
    """A nested list becomes a sequence, a number a layer with that many outputs; 0 a layer without parameters."""
    if isinstance(shape, int):
        return nn.Linear(2, shape) if shape else nn.ReLU()
    return nn.Sequential(*(_random_net(part) for part in shape))


@given(st.recursive(st.integers(0, 2), lambda part: st.lists(part, max_size=3), max_leaves=8).filter(lambda x: x != 0))
def test_every_parameter_is_in_one_layer_and_in_one_block(shape: Any) -> None:
    net = _random_net(shape)
    expected = sorted(map(id, net.parameters()))
    assert sorted(id(one) for layer in layers(net) for one in layer.parameters) == expected
    assert sorted(id(one) for _, own in learning_steps(net) for one in own) == expected
    found = layers(net)
    for layer in found[1:]:
        frozen = layers_until(net, layer.path)
        assert frozen == found[: len(frozen)]


# ---------------------------------------------------------------------------------------------- learning rates


def test_each_block_learns_at_the_rate_of_the_next_times_the_factor() -> None:
    net = ToolNet(staged(), 2)
    groups = parameter_groups(net, 0.4, layer_lr_decay=0.5)
    found = {group["name"]: group.get("lr_factor", 1.0) for group in groups}
    assert found == {
        "backbone.stem": 0.4 / 16,
        "backbone.layer1.0": 0.4 / 8,
        "backbone.layer1.1": 0.4 / 4,
        "backbone.layer2.0": 0.4 / 2,
        "backbone.layer2.1": 0.4,
        "head": 1.0,
    }
    by_name = {group["name"]: {id(one) for one in group["params"]} for group in groups}
    inner = net.backbone.net
    assert {id(inner.offset), id(inner.bn.weight)} <= by_name["backbone.stem"]
    assert id(inner.norm.weight) in by_name["backbone.layer2.1"]
    assert sorted(id(one) for group in groups for one in group["params"]) == sorted(map(id, net.parameters()))


def test_freezing_does_not_change_the_rates_of_other_blocks() -> None:
    net = ToolNet(staged(), 2)
    freeze_until(net.backbone, "layer1.0")
    optimizer = build_optimizer(parameter_groups(net, 1.0, layer_lr_decay=0.5), OptimConfig(name="adamw", lr=1.0))
    found = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert found == {"backbone.layer1.1": 0.25, "backbone.layer2.0": 0.5, "backbone.layer2.1": 1.0, "head": 1.0}


class Scaled(nn.Module):
    """A net of a plug-in may have parameters of its own and no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) * self.scale


def test_a_net_without_layers_is_one_block_that_cannot_be_named() -> None:
    backbone = Backbone("scaled", Scaled(), 3)
    with pytest.raises(
        UserError, match=r"^cnn\.freeze_until=scale: the network has no layers with names; set it to null$"
    ):
        freeze_until(backbone, "scale")
    groups = parameter_groups(ToolNet(Backbone("scaled", Scaled(), 3), 2), 0.5, layer_lr_decay=0.1)
    assert [(group["name"], group.get("lr_factor")) for group in groups] == [("backbone", 0.5), ("head", None)]
