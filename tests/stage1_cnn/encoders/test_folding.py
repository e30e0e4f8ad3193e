from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.folding import fold_batch_norm


def build(name: str) -> nn.Module:
    if not name.startswith("timm:"):
        return build_backbone(name, "random", 0)
    torch.manual_seed(0)
    return timm.create_model(name.removeprefix("timm:"), num_classes=0)  # type: ignore[no-any-return]


def awakened(name: str) -> nn.Module:
    """A backbone with non-trivial batch norms, since fresh ones are nearly the identity."""
    net = build(name)
    generator = torch.Generator().manual_seed(1)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                layer.weight.uniform_(0.5, 1.5, generator=generator)
                layer.bias.normal_(0, 0.1, generator=generator)
    return net.eval()


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "shufflenet_v2_x0_5",
        "mobilenet_v3_small",
        "efficientnet_lite0",
        "timm:resnet10t",
        "timm:mobilenetv3_small_050",  # its batch norms apply the activation too
        "timm:regnety_002",
    ],
)
def test_folded_net_is_the_same_function(name: str) -> None:
    net = awakened(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    folded = fold_batch_norm(net, 64)
    assert folded is not None
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected, found = net(images), folded(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_net_without_batch_norm_stays_as_it_is() -> None:
    assert fold_batch_norm(build_backbone("vgg11", "random", 0), 64) is None


class UsedTwice(nn.Module):
    """A convolution whose output is also used elsewhere, so that folding it would change the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        made = self.conv(images)
        return (self.norm(made) + made).mean((2, 3))


def test_a_fold_that_changes_the_function_is_dropped() -> None:
    net = UsedTwice().eval()
    net.norm.running_mean.fill_(0.5)
    net.norm.running_var.fill_(3.0)
    assert fold_batch_norm(net, 16) is None
