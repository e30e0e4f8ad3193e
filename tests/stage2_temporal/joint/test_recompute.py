"""Gradient checkpointing: the same gradients, statistics and random numbers, in less memory."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from configs.schema import JointNetConfig
from stage1_cnn.encoders.backbone import Backbone, build_backbone, freeze_batch_norm
from stage2_temporal.joint.net import JointNet, build_joint
from stage2_temporal.joint.recompute import blocks, recomputed_blocks

WIDTH = 8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.bn(self.conv(x))))


class Staged(nn.Module):
    """Residual blocks in two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.layer1, self.layer2 = (nn.Sequential(*(Residual() for _ in range(6))) for _ in range(2))
        self.fc = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Unstaged(nn.Module):
    """A net without any `Sequential`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, WIDTH, 1), Residual(), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def net_of(backbone: str) -> JointNet:
    own = {"staged": Staged, "unstaged": Unstaged}
    torch.manual_seed(0)
    if backbone.startswith("timm:"):
        options = {"dynamic_img_size": True} if "vit" in backbone else {}
        own_net = timm.create_model(backbone.removeprefix("timm:"), num_classes=0, drop_path_rate=0.3, **options)
        net = Backbone(backbone, own_net, own_net.num_features)
    else:
        net = Backbone(backbone, own[backbone]()) if backbone in own else build_backbone(backbone, "random", 0)
    return build_joint(net, JointNetConfig(tasks="tool"), None, 3, 0).train()


def images(frames: int = 4, size: int = 32) -> Tensor:
    return torch.randn(1, frames, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("backbone", "frozen"),
    [
        ("staged", False),
        ("staged", True),
        ("unstaged", False),
        ("shufflenet_v2_x0_5", False),
        ("resnet18", True),
        ("efficientnet_b0", False),  # dropout and stochastic depth
        ("swin_t", False),
        ("timm:efficientnet_lite0", False),
        ("timm:convnext_atto", False),
        ("timm:vit_tiny_patch16_224", False),
    ],
)
def test_gradients_statistics_and_random_numbers_are_those_without_it(backbone: str, frozen: bool) -> None:
    found = []
    for again in (False, True):
        net = net_of(backbone)
        net.gradient_checkpointing = again
        if frozen:
            freeze_batch_norm(net.backbone)
        torch.manual_seed(2)
        tools = net(images()).tool_logits
        drawn = torch.get_rng_state()
        tools.square().sum().backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        tensors = {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}
        found.append((gradients, tensors, {"drawn before": drawn, "drawn after": torch.get_rng_state()}))
    for without, with_it in zip(*found, strict=True):
        assert without.keys() == with_it.keys()
        for name, value in without.items():
            torch.testing.assert_close(with_it[name], value)


@pytest.mark.parametrize(
    ("backbone", "count", "first", "last"),
    [
        ("staged", 12, "layer1.0", "layer2.5"),
        ("unstaged", 1, "block", "block"),
        ("resnet50", 16, "layer1.0", "layer4.2"),
        ("efficientnet_b0", 18, "features.0", "features.8"),
        ("swin_t", 16, "features.0", "features.7.1"),
        ("timm:convnext_atto", 17, "stem", "head"),
        ("timm:vit_tiny_patch16_224", 13, "patch_embed", "blocks.11"),
        ("timm:efficientnet_lite0", 18, "bn1", "bn2"),
        ("vit_b_16", 12, "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11"),
    ],
)
def test_what_the_blocks_of_a_network_are(backbone: str, count: int, first: str, last: str) -> None:
    net = net_of(backbone).backbone.net
    names = {block: name for name, block in net.named_modules()}
    found = [names[block] for block in blocks(net)]
    assert len(found) == count
    assert (found[:1] + found[-1:] or ["", ""]) == [first, last]


def test_the_network_is_as_it_was_after_a_pass_and_after_an_error() -> None:
    net = net_of("staged")
    before = [set(vars(module)) for module in net.modules()]
    with recomputed_blocks(net.backbone):
        net.backbone(images()[0])
    with pytest.raises(RuntimeError), recomputed_blocks(net.backbone):
        net.backbone(torch.zeros(1, 5, 32, 32))
    assert [set(vars(module)) for module in net.modules()] == before


def test_the_peak_of_a_step_is_less_than_half() -> None:
    peaks = []
    for again in (False, True):
        net = net_of("staged")
        net.gradient_checkpointing = again
        tracker = MemTracker()
        tracker.track_external(net)
        with tracker:
            net(images()).tool_logits.square().sum().backward()
        peaks.append(sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values()))
    assert peaks[1] < 0.5 * peaks[0]
