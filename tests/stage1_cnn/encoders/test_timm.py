"""Networks of timm by name: which names are taken, that nothing is downloaded, sizes, poolings, what fits in files."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from configs.encoder_spec import find_description
from configs.errors import UserError
from configs.load import load_config, to_yaml
from configs.schema import CnnConfig, Config
from features.store import read_features
from stage1_cnn.encoders.backbone import build_backbone, require_image_size
from stage1_cnn.encoders.encoder import Encoder
from stage1_cnn.encoders.pretrained import settled_weights
from tests.cli import succeed

TINY = "timm:test_vit"  # timm's networks for tests: 160 pixels, patches of 16


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a connection, or looking up a host, fails the test."""

    def refused(*args: object, **options: object) -> NoReturn:
        raise AssertionError("a connection was opened")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def hub_cache(folder: Path, repository: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, with the folder of one snapshot of a repository."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    place = folder / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:timm/resnet18.a1_in1k",
        "hf_hub:timm/resnet18.a1_in1k",
        "local-dir:/etc",
        "../resnet18",
        "timm/resnet18",
        "resnet18/..",
        "resnet18.a1_in1k/../x",
        "resnet18.nosuchtag",
        "resnet18.",
        "RESNET18",
        "",
        "@mean",
        "resnet18\n",
        "x" * 5000,
    ],
)
def test_other_names_than_timms_own_are_refused_and_never_reach_it(
    name: str, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    def built(*args: object, **options: object) -> NoReturn:
        raise AssertionError("timm was asked to build it")

    monkeypatch.setattr(timm, "create_model", built)
    with pytest.raises(UserError, match=r"timm \S+ has no network ") as error:
        build_backbone(f"timm:{name}", "random", 0)
    assert "\n" not in str(error.value)


def test_an_old_name_leads_to_the_new_one() -> None:
    with pytest.raises(UserError, match=r"calls this network convnext_tiny\.fb_in22k_ft_in1k; use timm:convnext_tiny"):
        build_backbone("timm:convnext_tiny_in22ft1k", "random", 0)


@pytest.mark.parametrize(
    "name", ["timm:resnet10t.c3_in1k", "dinov2_vits14", "dinov3_vits16@both", "dinov3_convnext_tiny"]
)
def test_without_timm_settings_are_read_and_building_says_what_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_description.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    config = load_config(None, [f"cnn.backbone={name}"])
    assert config.cnn.backbone == name
    note = f"# note: timm is not installed, so preprocess.* may not be what {name} documents"
    assert (to_yaml(config).splitlines()[0] == note) == name.startswith("timm:")
    with pytest.raises(UserError, match=r"needs a package; in the checkout: pip install -e '\.\[timm\]'$") as error:
        build_backbone(name, "random", 0)
    assert "\n" not in str(error.value)
    find_description.cache_clear()


def test_every_configuration_of_timm_gives_valid_settings() -> None:
    names = timm.list_models(include_tags=True)
    assert len(names) > 1000
    for name in names:
        assert find_description(f"timm:{name}") is not None
        assert Config.model_validate({"cnn": {"backbone": f"timm:{name}"}}).preprocess.mean != Config().preprocess.mean
    # timm scales the image down and pads it
    assert Config.model_validate({"cnn": {"backbone": "timm:volo_d5_512"}}).preprocess.resize_px == 512


# ---------------------------------------------------------------------------------------------- weights


def test_a_file_of_a_network_that_several_encoders_have_is_not_said_to_be_of_one_of_them(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = timm.create_model("convnext_tiny").state_dict()
    tensors = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in state.items()}  # without memory
    torch.save(tensors, tmp_path / "net.pth")
    with pytest.raises(UserError) as error, torch.device("meta"):
        build_backbone("timm:test_convnext", str(tmp_path / "net.pth"), 0, trusted=True)
    fit = "; they fit dinov3_convnext_tiny, timm:convnext_tiny"
    assert str(error.value).endswith(f"{fit}: choose the encoder whose release the file is, or another file")


@pytest.mark.parametrize("prefix", ["", "model.module.backbone."])
def test_files_with_both_classifiers_of_a_distilled_network(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    source = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5)
    save_file({f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}, tmp_path / "w.safetensors")
    backbone = build_backbone("timm:deit_tiny_distilled_patch16_224", str(tmp_path / "w.safetensors"), 0)
    assert torch.equal(backbone.net.dist_token, source.dist_token)
    assert "4 other tensors not used" in capsys.readouterr().err


def test_weights_come_from_the_local_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    name = f"{TINY}.r160_in1k"
    snapshot = hub_cache(tmp_path, "timm/test_vit.r160_in1k", monkeypatch)
    cached = CnnConfig(backbone=name, weights="cached")
    assert settled_weights(cached) == "random"
    with pytest.raises(UserError, match=r"hf download timm/test_vit.r160_in1k model.safetensors") as error:
        build_backbone(name, "imagenet", 0)
    assert "\n" not in str(error.value)
    torch.manual_seed(3)
    source = timm.create_model("test_vit")
    save_file(source.state_dict(), snapshot / "model.safetensors")
    assert settled_weights(cached) == "published"
    assert torch.equal(build_backbone(name, "imagenet", 0).net.pos_embed, source.pos_embed)


def test_a_cache_that_cannot_be_read_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **options: object) -> NoReturn:
        raise PermissionError(13, "Permission denied", "refs/main")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", denied)
    assert settled_weights(CnnConfig(backbone=TINY, weights="cached")) == "random"
    with pytest.raises(UserError, match=r"the cache of the hub cannot be read \(.*Permission denied"):
        build_backbone(TINY, "imagenet", 0)


def test_without_the_hubs_package_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert settled_weights(CnnConfig(backbone=TINY, weights="cached")) == "random"
    with pytest.raises(UserError, match=r"pip install -e '\.\[timm\]'$"):
        build_backbone(TINY, "imagenet", 0)


# ------------------------------------------------------------------------------------- sizes and poolings


def test_interpolated_position_embeddings_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = build_backbone(TINY, "random", 0)
    require_image_size(backbone, 160)
    assert capsys.readouterr().err == ""
    require_image_size(backbone, (96, 160))
    said = capsys.readouterr().err
    assert said == f"{TINY}: position embeddings are interpolated from images of 160 to 96 x 160 pixels\n"
    with pytest.raises(UserError, match=r"^preprocess.crop_px=150: must be a multiple of 16 .* are 144 and 160$"):
        require_image_size(backbone, 150)
    with pytest.raises(UserError, match=r"crop_px=96 x 150: must be a multiple of 16 .* are 96 x 144 and 96 x 160$"):
        require_image_size(backbone, (96, 150))


def test_rotary_positions_are_not_interpolated(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = build_backbone("dinov3_vits16", "random", 0)
    require_image_size(backbone, 64)
    assert capsys.readouterr().err == ""


def test_a_network_of_one_size_names_it() -> None:
    backbone = build_backbone("timm:mixer_s32_224", "random", 0)
    with pytest.raises(UserError, match=r"crop_px=160 .*doesn't match model \(224\).*; its own size is 224$"):
        require_image_size(backbone, 160)


def test_a_network_made_for_one_size_that_takes_others_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    require_image_size(build_backbone("timm:crossvit_9_240", "random", 0), (96, 128))
    assert capsys.readouterr().err == "timm:crossvit_9_240: made for images of 240, not 96 x 128 pixels\n"


def test_windows_need_multiples_of_their_patches() -> None:
    backbone = build_backbone("timm:swinv2_cr_tiny_ns_224", "random", 0)
    require_image_size(backbone, 128)
    with pytest.raises(UserError, match=r"multiple of 4 pixels"):
        require_image_size(backbone, 130)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:test_resnet@mean", r"timm:test_resnet has no pooling @mean \(it has: none\)"),
        ("timm:vit_base_patch16_siglip_gap_224@token", "needs the class token"),
    ],
)
def test_poolings_need_a_class_token(name: str, message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message) as error:
        build_backbone(name, "random", 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pooling", ["", "@token", "@mean", "@both"])
def test_poolings_of_a_transformer(pooling: str) -> None:
    backbone = build_backbone(f"{TINY}{pooling}", "random", 0).eval()
    net: Any = timm.create_model("test_vit", num_classes=0).eval()
    net.load_state_dict(backbone.net.state_dict())
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        tokens = net.forward_features(images)
        mean = tokens[:, net.num_prefix_tokens :].mean(dim=1)
        both = torch.cat([tokens[:, 0], mean], dim=1)
        expected = {"": net(images), "@token": tokens[:, 0], "@mean": mean, "@both": both}[pooling]
        torch.testing.assert_close(backbone(images), expected)
    assert backbone.embedding_dim == expected.shape[1]


def test_extract_with_a_file_at_another_size(shared_data: Path, tmp_path: Path) -> None:
    for file in ("videos/video05.mp4", "phase_annotations/video05-phase.txt", "tool_annotations/video05-tool.txt"):
        (tmp_path / "clip" / file).parent.mkdir(parents=True)
        shutil.copyfile(shared_data / "clips" / file, tmp_path / "clip" / file)
    source = timm.create_model("test_vit").eval()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    values = {"data.root": "clip", "data.split.rule": "1/0/0", "data.fps": 0.05, "device": "cpu", "extract.workers": 1}
    values |= {"preprocess.crop_px": 96, "extract.precision": "fp32", "extract.storage": "float32"}
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    succeed(["index", *settings], tmp_path)
    said = succeed(["extract", "--encoder", f"{TINY}@mean", "--weights", "model.safetensors", *settings], tmp_path)
    assert f"tensors of {TINY}@mean found without a prefix" in said
    assert said.count(f"{TINY}@mean: position embeddings are interpolated from images of 160 to 96 pixels\n") == 1
    (file,) = (tmp_path / "artifacts/features").glob("*/video05.h5")
    assert read_features(file).features.shape == (2, 64)


# ----------------------------------------------------------------------------------------- many networks

QUICK = "test_convnext test_efficientnet test_byobnet test_nfnet levit_128s efficientvit_b0 deit_tiny_patch16_224@both"
SLOW = """
mobilenetv3_small_050 convnextv2_atto swin_tiny_patch4_window7_224 eva02_tiny_patch14_224@mean cait_xxs24_224@both
xcit_nano_12_p16_224@both crossvit_9_240 pit_ti_224
"""


@pytest.mark.parametrize(
    "name",
    [*QUICK.split(), *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW.split())],
)
def test_networks_of_many_kinds_are_encoders(name: str) -> None:
    """One embedding per frame, of the dimension that is recorded, in both precisions of extraction."""
    embeddings = []
    for precision in ("fp32", "bf16"):
        backbone = build_backbone(f"timm:{name}", "random", 0)
        config = Config.model_validate(
            {"device": "cpu", "cnn": {"backbone": f"timm:{name}"}, "extract": {"precision": precision}}
        )
        size = config.preprocess.crop_px
        encoder = Encoder(config, backbone, None, "0" * 64, 0)
        frames = torch.randint(
            0, 256, (1, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        embeddings.append(torch.from_numpy(encoder(frames)[0]))
        assert embeddings[-1].shape == (1, encoder.spec.embedding_dim)
        assert not any(isinstance(layer, nn.Linear) and layer.out_features == 1000 for layer in backbone.net.modules())
    with torch.no_grad():
        assert backbone.train()(torch.zeros(2, 3, size, size)).shape == (2, backbone.embedding_dim)
    scale = embeddings[0].abs().max()
    assert (embeddings[1] - embeddings[0]).abs().max() < 0.1 * scale
