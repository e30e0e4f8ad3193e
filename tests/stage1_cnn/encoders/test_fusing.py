"""ReLU and residual sums fused with their convolution: the same function, and only if no other layer reads them."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import CnnConfig, Config, ExtractConfig, PreprocessConfig
from engine import onednn
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.encoder import Encoder
from stage1_cnn.encoders.folding import fold_batch_norm
from stage1_cnn.encoders.fusing import ConvRelu, fuse_relu
from tests.onednn import broken_operations, cpu_with_bf16, other_operations, public_operations

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def images(count: int = 3, size_px: int = 64) -> Tensor:
    return torch.randn(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(2))


def folded(name: str) -> nn.Module:
    net = fold_batch_norm(build_backbone(name, "random", 0), 64)
    assert net is not None
    return net


def fused_layers(net: nn.Module) -> int:
    return sum(isinstance(layer, ConvRelu) for layer in net.modules())


# every ReLU of these follows a convolution or a sum with one's output
@pytest.mark.parametrize(("name", "relus"), [("resnet18", 17), ("resnet50", 49)])
def test_fused_net_is_the_same_function(name: str, relus: int) -> None:
    net = folded(name)
    fused = fuse_relu(net, 64)
    assert fused is not None
    assert fused_layers(fused) == relus
    assert not fused_layers(net)
    with torch.inference_mode():
        expected, found = net(images()), fused(images())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("missing", ["_reorder_convolution_weight", "_convolution_pointwise"])
def test_without_a_private_operation_the_net_is_left_unfused(missing: str) -> None:
    with other_operations(**{missing: None}):
        assert fuse_relu(folded("resnet18"), 64) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_sent_to_other_processes_and_does_not_depend_on_its_first_batch(dtype: torch.dtype) -> None:
    # if oneDNN does not compute this type, the same code uses public operations
    with nullcontext() if onednn.convolves(dtype) else other_operations(**public_operations()):
        one = fuse_relu(folded("resnet18"), 64)
        assert one is not None
        one = one.to(memory_format=torch.channels_last).to(dtype)  # type: ignore[call-overload]
        pixels = images(8).to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            one(pixels[:3])
            other = pickle.loads(pickle.dumps(one))  # noqa: S301, made here
            assert torch.equal(one(pixels), other(pixels))


class Small(nn.Module):
    """Two convolutions and a function of their outputs."""

    def __init__(self, then: Callable[[Small, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.same = nn.Conv2d(3, 4, 3, padding="same")
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, x).mean((2, 3))


FUSED: dict[str, Callable[[Small, Tensor], Tensor]] = {
    "module": lambda net, x: net.relu(net.first(x)),
    "function": lambda net, x: torch.relu(net.first(x)),
    "sum": lambda net, x: net.relu(net.first(x) + x[:, :1]),
    "sum, the other way round": lambda net, x: net.relu(x[:, :1] + net.first(x)),
    "sum in place": lambda net, x: net.relu(operator.iadd(net.first(x), net.second(x))),
    "the other part is used again": lambda net, x: net.relu(net.first(x) + x[:, :1]) + x[:, :1],
}
NOT_FUSED: dict[str, Callable[[Small, Tensor], Tensor]] = {
    "no ReLU": lambda net, x: net.first(x) + net.second(x),
    "convolution read twice": lambda net, x: net.relu(made := net.first(x)) + made,
    "sum read twice": lambda net, x: net.relu(made := net.first(x) + net.second(x)) + made,
    "layer used twice": lambda net, x: net.relu(net.first(x)) + net.relu(net.first(x + 1)),
    "doubled": lambda net, x: net.relu((made := net.first(x)) + made),
    "weighted": lambda net, x: net.relu(torch.add(net.first(x), net.second(x), alpha=2)),
    "a number added": lambda net, x: net.relu(net.first(x) + 1),
    "padding by name": lambda net, x: net.relu(net.same(x)),
    "no picture": lambda net, x: net.relu(net.first(x).mean((2, 3)))[..., None, None],
    "named input": lambda net, x: net.relu(input=net.first(x)),
    "named input of a function": lambda net, x: torch.relu(input=net.first(x)),
    "a wider type": lambda net, x: net.relu(net.first(x) + x[:, :1].double()).float(),
    "one dimension more": lambda net, x: net.relu(net.first(x) + x[:, None, :1])[0],
    "cannot be traced": lambda net, x: net.relu(net.first(x)) if x.sum() > 0 else x,
}


@pytest.mark.parametrize("case", FUSED)
def test_fuses(case: str) -> None:
    net = Small(FUSED[case]).eval()
    fused = fuse_relu(net, 16)
    assert fused is not None
    assert fused_layers(fused) == 1
    with torch.inference_mode():
        torch.testing.assert_close(fused(images(2, 16)), net(images(2, 16)))


def test_an_identity_with_a_named_input_stays() -> None:
    net = Small(lambda net, x: net.relu(net.first(net.nothing(input=x)))).eval()
    net.nothing = nn.Identity()
    fused = fuse_relu(net, 16)
    assert fused is not None
    with torch.inference_mode():
        torch.testing.assert_close(fused(images(2, 16)), net(images(2, 16)))


def encoder(precision: Any) -> Encoder:
    config = Config(
        device="cpu",
        cnn=CnnConfig(backbone="resnet18"),
        preprocess=PreprocessConfig(resize_px=40, crop_px=32),
        extract=ExtractConfig(precision=precision),
    )
    return Encoder(config, build_backbone("resnet18", "random", 0), None, "0" * 64, 7)


CROPS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("precision", ["bf16", "auto", "native"])
def test_an_encoder_in_bf16_is_fused_where_the_cpu_lays_bf16_out_and_works_where_it_does_not(precision: str) -> None:
    with cpu_with_bf16(True):
        with other_operations(**public_operations()):
            fused = encoder(precision)
            found = fused(CROPS)[0]
        with other_operations(**broken_operations()["_reorder_convolution_weight raises"]):
            plain = encoder(precision)
            expected = plain(CROPS)[0]
    assert (fused.spec.arithmetic, plain.spec.arithmetic) == ("folded, fused", "folded")
    assert fused.spec.precision == plain.spec.precision == "bf16"
    np.testing.assert_allclose(found, expected, atol=0.05 * float(np.abs(expected).max()))


def test_a_cpu_without_bf16_encodes_in_fp32_or_refuses() -> None:
    with cpu_with_bf16(False):
        for precision in ("auto", "native", "fp32"):
            spec = encoder(precision).spec
            assert (spec.precision, spec.arithmetic) == ("fp32", "plain")
        with pytest.raises(UserError, match=r"extract\.precision=bf16: .* set extract\.precision=fp32 or auto$"):
            encoder("bf16")


@pytest.mark.parametrize("case", NOT_FUSED)
def test_leaves_alone(case: str) -> None:
    assert fuse_relu(Small(NOT_FUSED[case]).eval(), 16) is None


def test_a_net_that_would_change_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConvRelu, "forward", lambda self, x, other=None: torch.zeros(1, 4, 16, 16))
    assert fuse_relu(Small(FUSED["module"]).eval(), 16) is None
