"""Published files of named encoders: they load as they are, and give the embeddings that the release defines.

`releases/NAME.txt` lists the names and shapes of a release's tensors, taken from the release's own classes. A file of
random values is made from the list, inside what the release's program saves around them. The expected embedding is
restated here with timm or torchvision alone: the network built there, its tensors renamed by rules written out again,
and the frame prepared by torchvision's transforms as the release documents.

To add a release: its list, and one `Release` in `RELEASES`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from configs.encoder_spec import find_description
from configs.errors import UserError
from configs.schema import Config
from features.frames.preprocess import Geometry
from features.store import read_features
from features.video.open import open_video
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.encoder import load_encoder
from tests.cli import succeed

LISTS = Path(__file__).parent / "releases"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
State = dict[str, Tensor]


@dataclass(frozen=True)
class Release:
    """One published file, and its embedding in other words.

    `content` puts the listed tensors into what the release saves; `found` is the place in that file from which they
    must be taken. `renamed` turns listed names into those of `reference`, which builds timm's or torchvision's network,
    after `prepared` has done what renaming cannot; shapes are those of the reference (linear layers for 1 x 1
    convolutions). `transform` prepares an image, `embed` gives the embedding of a batch of one. `variant` tells the
    files of one encoder apart.
    `check` says whether the embedding is compared too, and whether by the command `extract`: one of each family.
    """

    encoder: str
    content: Callable[[State], Any]
    found: str
    reference: Callable[[], nn.Module]
    renamed: tuple[tuple[str, str], ...]
    transform: Callable[[Image.Image], Tensor]
    embed: Callable[[nn.Module, Tensor], Tensor] = lambda net, images: net(images)
    prepared: Callable[[State], State] = lambda state: state
    variant: str = "file"
    check: Literal["names", "embedding", "extract"] = "embedding"
    slow: bool = False  # too large for the embedding to be a quick test
    shared_list: str = ""  # the name of a list that several encoders have in common

    @property
    def list(self) -> Path:
        return LISTS / f"{self.shared_list or self.encoder.partition('@')[0]}.txt"


# ------------------------------------------------------------------------------- files of the lists

_STRIDES = (1, 13, 101, 997)
_NOISE = 0.02 * torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
_NEAR_ONE = 1 + _NOISE


def random_tensor(name: str, shape: Sequence[int]) -> Tensor:
    """A random tensor of small values; vectors of weights and variances are near 1.

    It is a view of a small buffer, which overlaps others, so that a file of any network is small. The name gives the
    place where it begins, so that tensors of one shape differ.
    """
    steps = iter(_STRIDES)
    strides = [next(steps) if size > 1 else 1 for size in shape]
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    vector = sum(size > 1 for size in shape) == 1
    buffer = _NEAR_ONE if vector and name.endswith(("weight", "gamma", "scale", "running_var")) else _NOISE
    return buffer.as_strided(shape, strides, zlib.crc32(name.encode()) % (len(buffer) - reach))


def random_tensors(listed: Path) -> State:
    """Random tensors with the names, shapes and types of a list; counters are 0."""
    state = {}
    for line in listed.read_text().splitlines():
        if not line.startswith("#"):
            name, sizes, kind = re.fullmatch(r"(\S+) \(([\d, ]*)\) (\w+)", line).groups()  # type: ignore[union-attr]
            shape = [int(size) for size in re.findall(r"\d+", sizes)]
            counter = torch.zeros(shape, dtype=getattr(torch, kind))
            state[name] = random_tensor(name, shape) if kind == "float32" else counter
    return state


# ------------------------------------------------------------------------------- what releases save


def squashed(size_px: int, filter_: str = "bicubic") -> Callable[[Image.Image], Tensor]:
    """The whole frame in a square, with ImageNet's mean and standard deviation."""
    resize = transforms.Resize((size_px, size_px), transforms.InterpolationMode(filter_))
    return transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(*IMAGENET)])


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def of_dino(teacher: State) -> dict[str, Any]:
    """A checkpoint of DINO's program: the teacher, its student in DistributedDataParallel, and the optimiser."""
    moments = {n: {"step": 1, "exp_avg": one, "exp_avg_sq": one} for n, one in enumerate(teacher.values())}
    return {
        "student": {f"module.{name}": random_tensor(f"student.{name}", one.shape) for name, one in teacher.items()},
        "teacher": teacher,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]},
        "epoch": 51,
        "args": argparse.Namespace(arch="network", lr=1e-4),
        "loss": {"center": torch.zeros(1, 8)},
    }


def dino_checkpoint(state: State) -> dict[str, Any]:
    """The same for the list of a backbone, with a part of DINO's head."""
    return of_dino(prefixed("backbone.", state) | {"head.mlp.0.weight": random_tensor("head.mlp.0.weight", (64, 32))})


def short_side(resize_px: int, crop_px: int) -> Callable[[Image.Image], Tensor]:
    """The short side at `resize_px`, bicubic, and the centre, with ImageNet's mean and standard deviation."""
    resize = transforms.Resize(resize_px, transforms.InterpolationMode.BICUBIC)
    return transforms.Compose(
        [resize, transforms.CenterCrop(crop_px), transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    )


def token_and_mean(prefix_tokens: int, net: nn.Module, images: Tensor) -> Tensor:
    """The class token and the mean of the patch tokens, in one vector."""
    tokens = net.forward_features(images)  # type: ignore[operator]
    return torch.cat([tokens[:, 0], tokens[:, prefix_tokens:].mean(dim=1)], dim=1)


def with_its_position(state: State) -> State:
    """DINOv2 with registers: the class token has the first position embedding, which timm adds to it."""
    token, positions = state["cls_token"] + state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    return {**state, "cls_token": token, "pos_embed": positions}


def key_biases_masked(state: State) -> State:
    """A fine-tuned file of DINOv3: biases of queries and values, and a mask that sets those of the keys to zero."""
    masks = {name: torch.ones(3, len(t) // 3) for name, t in state.items() if name.endswith("bias_mask")}
    for mask in masks.values():
        mask[1] = 0
    return state | {name: mask.flatten() for name, mask in masks.items()}


def biases_split(state: State) -> State:
    """timm has one bias of the queries and one of the values."""
    split = dict(state)
    for name, tensor in state.items():
        if name.endswith("qkv.bias"):
            split[name.replace("qkv.bias", "q_bias")], _, split[name.replace("qkv.bias", "v_bias")] = tensor.chunk(3)
    return split


def of_mae(state: State) -> dict[str, Any]:
    """A checkpoint of the program of masked autoencoders."""
    return {
        "model": state,
        "optimizer": {"state": {0: {"step": 1, "exp_avg": state["cls_token"], "exp_avg_sq": state["cls_token"]}}},
        "epoch": 14,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(model="mae_vit_base_patch16", batch_size=256),
    }


class AttrDict(dict[str, Any]):
    """VISSL's class of settings, under another name, since a file may contain it."""


def of_vissl(state: State, second: str, heads: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A checkpoint of VISSL, whose loss has a second encoder under the prefix `second`, if it is not empty."""
    other = {
        f"{second}trunk.{name}": random_tensor(f"second.{name}", one.shape) if one.is_floating_point() else one
        for name, one in state.items()
    }
    model = {"trunk": state, "heads": {name: random_tensor(name, shape) for name, shape in heads.items()}}
    return {
        "phase_idx": 299,
        "iteration": 1000,
        "loss": {"queue": torch.zeros(8, 16), **(other if second else {})},
        "iteration_num": 0,
        "train_phase_idx": 299,
        "classy_state_dict": {
            "base_model": {"model": model, "meta": {"settings": AttrDict(width=1)}},
            "optimizer": {"optim": {"state": {0: {"momentum_buffer": state["_feature_blocks.conv1.weight"]}}}},
        },
    }


def of_surgvlp(state: State) -> State:
    """The image encoder beside a part of its text encoder, which has layers too."""
    text = {
        "embeddings.position_ids": torch.zeros(1, 512, dtype=torch.int64),
        "embeddings.word_embeddings.weight": random_tensor("word", (64, 768)),
        "encoder.layer.0.attention.self.query.weight": random_tensor("query", (768, 768)),
        "pooler.dense.bias": random_tensor("dense.bias", (768,)),
    }
    return state | prefixed("backbone_text.model.", text)


# -------------------------------------------------------------------------------------- the releases

CAFORMER = Release(
    "surgenetxl_caformer_s18",
    content=lambda state: state,
    found="without a prefix",
    reference=partial(timm.create_model, "caformer_s18", num_classes=0, mlp_act=nn.ReLU, act1_layer=nn.ReLU),
    renamed=(
        (r"^downsample_layers\.0\.conv", "stem.conv"),
        (r"^downsample_layers\.0\.post_norm", "stem.norm"),
        (r"^downsample_layers\.(\d)\.conv", r"stages.\1.downsample.conv"),
        (r"^downsample_layers\.(\d)\.pre_norm", r"stages.\1.downsample.norm"),
        (r"^stages\.(\d)\.(\d)\.", r"stages.\1.blocks.\2."),
        (r"^norm\.", "head.norm."),
    ),
    transform=squashed(224),
    check="extract",
)
CONVNEXTV2 = Release(
    "surgenet_convnextv2_tiny",
    content=lambda state: state,
    found="without a prefix",
    reference=partial(timm.create_model, "convnextv2_tiny", num_classes=0),
    renamed=(
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d)\.(\d)\.", r"stages.\1.blocks.\2."),
        ("dwconv", "conv_dw"),
        (r"pwconv1", "mlp.fc1"),
        (r"pwconv2", "mlp.fc2"),
        (r"grn\.gamma", "mlp.grn.weight"),
        (r"grn\.beta", "mlp.grn.bias"),
        (r"^norm\.", "head.norm."),
    ),
    transform=squashed(224),
)
PVT = Release(
    "surgenet_pvt_v2_b2",
    content=lambda state: state,
    found="without a prefix",
    reference=partial(timm.create_model, "pvt_v2_b2", num_classes=0),
    renamed=(
        (r"^patch_embed1", "patch_embed"),
        (r"^patch_embed2", "stages.1.downsample"),
        (r"^patch_embed3", "stages.2.downsample"),
        (r"^patch_embed4", "stages.3.downsample"),
        (r"^(block|norm)1", r"stages.0.\1"),
        (r"^(block|norm)2", r"stages.1.\1"),
        (r"^(block|norm)3", r"stages.2.\1"),
        (r"^(block|norm)4", r"stages.3.\1"),
        (r"^(stages\.\d)\.block\.", r"\1.blocks."),
        (r"dwconv\.dwconv", "dwconv"),
    ),
    transform=squashed(224),
)


def convnext_large() -> nn.Module:
    with torch.device("meta"):  # all its values are replaced
        net = torchvision.models.convnext_large(weights=None)
    net.classifier[2] = nn.Identity()
    return net


LEMONFM = Release(
    "lemonfm",
    content=of_dino,
    found="under `teacher.backbone.`",
    reference=convnext_large,
    renamed=((r"^backbone\.", ""),),
    transform=squashed(224),
    check="extract",
    slow=True,
)
DINOV2 = [
    Release(
        f"dinov2_vit{size[0]}14{registers}{pooling}",
        content=lambda state: state,
        found="without a prefix",
        reference=partial(
            timm.create_model,
            f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2",
            num_classes=0,
            dynamic_img_size=True,
        ),
        renamed=((r"^register_tokens$", "reg_token"),),
        prepared=with_its_position if registers else lambda state: state,
        transform=short_side(256, 224),
        embed=partial(token_and_mean, 5 if registers else 1) if pooling else lambda net, images: net(images),
        check="extract" if pooling else "embedding" if size == "small" else "names",
    )
    for size in ("small", "base", "large")
    for registers in ("", "_reg")
    for pooling in (("", "@both") if (size, registers) == ("small", "_reg") else ("",))
]
DINOV3 = [
    Release(
        f"dinov3_vit{size[0]}16",
        content=lambda state: {"model": prefixed("module.", key_biases_masked(state)), "iteration": 3},
        found="under `model.module.`, named as DINOv3",
        reference=partial(
            timm.create_model,
            f"vit_{size}_patch16_dinov3_qkvb",
            num_classes=0,
            global_pool="token",
            dynamic_img_size=True,
        ),
        renamed=((r"^storage_tokens$", "reg_token"), (r"ls([12])\.gamma", r"gamma_\1")),
        prepared=biases_split,
        transform=squashed(256, "bilinear"),
        check="embedding" if size == "small" else "names",
    )
    for size in ("small", "base", "large")
]
DINOV3_CONVNEXT = [
    Release(
        f"dinov3_convnext_{size}",
        content=lambda state: state,
        found="without a prefix, named as DINOv3's ConvNeXt",
        reference=partial(timm.create_model, f"convnext_{size}", num_classes=0),
        renamed=(
            (r"^downsample_layers\.0\.", "stem."),
            (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
            (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"dwconv", "conv_dw"),
            (r"pwconv([12])", r"mlp.fc\1"),
            (r"^norm\.", "head.norm."),
        ),
        transform=squashed(256, "bilinear"),
        check="extract" if size == "tiny" else "names",
    )
    for size in ("tiny", "small", "base", "large")
]


def patch_mean(net: Any, images: Tensor) -> Tensor:
    return net.forward_features(images)[:, 1:].mean(dim=1)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The network without values, all of which are replaced."""
    with torch.device("meta"):
        return build()


def resnet50() -> nn.Module:
    net = torchvision.models.resnet50(weights=None)
    net.fc = nn.Identity()
    return net


def resized(height_px: int, width_px: int, *more: Any, normal: Any = IMAGENET) -> Callable[[Image.Image], Tensor]:
    """The whole frame in this size, bilinear, and what the release does then."""
    resize = transforms.Resize((height_px, width_px))
    return transforms.Compose([resize, *more, transforms.ToTensor(), transforms.Normalize(*normal)])


ENDOVIT = Release(
    "endovit",
    content=of_mae,
    found="under `model.`",
    reference=partial(on_meta, partial(timm.create_model, "vit_base_patch16_224", num_classes=0)),
    renamed=(),
    transform=resized(224, 224, normal=((0.3464, 0.2280, 0.2228), (0.2520, 0.2128, 0.2093))),
    embed=patch_mean,
    check="extract",
)
TRUNK = "classy_state_dict.base_model.model.trunk._feature_blocks."
MLP = {"0.clf.0.weight": (64, 64), "0.clf.1.running_mean": (64,), "1.clf.0.weight": (256, 64)}
MOCO = Release(
    "selfsupsurg_moco_v2",
    content=partial(of_vissl, second="moco_encoder.", heads=MLP),
    found=f"under `{TRUNK}`; `loss.moco_encoder.trunk._feature_blocks.` would fit too and was not taken",
    reference=partial(on_meta, resnet50),
    renamed=((r"^_feature_blocks\.", ""),),
    transform=resized(224, 399),
    shared_list="selfsupsurg",
    check="extract",
)
SWAV = replace(
    MOCO,
    encoder="selfsupsurg_swav",
    content=partial(of_vissl, second="", heads={"0.projection_head.0.weight": (64, 64)}),
    found=f"under `{TRUNK}`",
    check="names",
)
PESKAVLP = replace(
    MOCO,
    encoder="peskavlp",
    content=of_surgvlp,
    found="under `backbone_img.model.`",
    renamed=((r"^backbone_img\.model\.", ""),),
    transform=resized(360, 640, transforms.CenterCrop(224)),
    shared_list="peskavlp",
)
RELEASES = [
    CAFORMER,
    replace(CAFORMER, variant="dino", content=dino_checkpoint, found="under `teacher.backbone.`", check="names"),
    CONVNEXTV2,
    replace(
        CONVNEXTV2, variant="prefixed", content=partial(prefixed, "backbone."), found="under `backbone.`", check="names"
    ),
    PVT,
    LEMONFM,
    *DINOV2,
    *DINOV3,
    *DINOV3_CONVNEXT,
    ENDOVIT,
    replace(ENDOVIT, encoder="endovit@token", embed=lambda net, images: net(images), check="names"),
    replace(
        ENDOVIT,
        encoder="endovit@both",
        embed=partial(token_and_mean, 1),
        content=lambda state: prefixed("module.", state),  # the average of weights over epochs
        found="under `module.`",
        check="embedding",
    ),
    MOCO,
    replace(
        SWAV,
        encoder="selfsupsurg_dino",
        content=partial(of_vissl, second="momentum_teacher.module.", heads={"0.prototypes0.weight_g": (4096, 1)}),
        found=f"under `{TRUNK}`; `loss.momentum_teacher.module.trunk._feature_blocks.` would fit too and was not taken",
    ),
    SWAV,
    replace(SWAV, encoder="selfsupsurg_simclr", content=partial(of_vissl, second="", heads=MLP)),
    PESKAVLP,
    replace(PESKAVLP, encoder="surgvlp", check="names"),
    replace(PESKAVLP, encoder="hecvl", check="names"),
]


def name_of(release: Release) -> str:
    return f"{release.encoder}-{release.variant}"


def releases(check: str) -> list[Any]:
    """The releases with this check, as parameters of a test."""
    chosen = [release for release in RELEASES if release.check == check]
    return [pytest.param(one, id=name_of(one), marks=[pytest.mark.slow] if one.slow else []) for one in chosen]


# ------------------------------------------------------------------- the file, and what must come out of it


def write(release: Release, path: Path) -> State:
    """Write the release's file; returns the listed tensors."""
    state = random_tensors(release.list)
    torch.save(release.content(state), path)
    return state


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def require_described_size(release: Release, net: nn.Module) -> None:
    description = find_description(release.encoder)
    assert description is not None
    assert sum(parameter.numel() for parameter in net.parameters()) == description.parameters


def expected_embedding(release: Release, state: State, image: Image.Image) -> Tensor:
    """The embedding (D,) by timm or torchvision alone."""
    net = release.reference().eval()
    require_described_size(release, net)
    own, given = net.state_dict(), {}
    for listed, tensor in release.prepared(state).items():
        if (name := renamed(listed, release.renamed)) in own:
            given[name] = tensor.reshape(own[name].shape)
    assert given.keys() == own.keys()
    net.load_state_dict(given, assign=True)
    with torch.inference_mode():
        return release.embed(net, release.transform(image)[None])[0]


@pytest.fixture(scope="module")
def clip(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of one real video, 854 x 480, with its labels."""
    root = tmp_path_factory.mktemp("clip")
    for file in ("videos/video05.mp4", "phase_annotations/video05-phase.txt", "tool_annotations/video05-tool.txt"):
        (root / file).parent.mkdir()
        shutil.copyfile(shared_data / "clips" / file, root / file)
    return root


@pytest.fixture(scope="module")
def image(clip: Path) -> Image.Image:
    """The first frame of the video."""
    with open_video(clip / "videos/video05.mp4") as reader:
        return Image.fromarray(next(iter(reader.read([0]))))


# --------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("release", releases("names"))
@pytest.mark.filterwarnings("ignore:.*no-op:UserWarning")
def test_every_tensor_is_found_in_the_published_file(
    release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the device `meta`, which stores no values."""
    write(release, tmp_path / "published.pth")
    with torch.device("meta"):
        backbone = build_backbone(release.encoder, str(tmp_path / "published.pth"), 0)
    assert f"tensors of {release.encoder} found {release.found}" in capsys.readouterr().err
    require_described_size(release, backbone)


@pytest.mark.parametrize("release", releases("embedding"))
def test_embedding_is_that_of_the_release(
    release: Release, tmp_path: Path, image: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    state = write(release, tmp_path / "published.pth")
    config = Config.model_validate(
        {
            "device": "cpu",
            "cnn": {"backbone": release.encoder, "weights": str(tmp_path / "published.pth")},
            "extract": {"encoder": "initial", "precision": "fp32"},
        }
    )
    own = config.preprocess
    geometry = Geometry(own.resize_px, None, own.interpolation, own.short_side_px, own.crop_px)
    found, _ = load_encoder(config, None, ["Grasper"])(geometry.resize_frame(np.asarray(image))[None])
    assert f"tensors of {release.encoder} found {release.found}" in capsys.readouterr().err
    np.testing.assert_allclose(found[0], expected_embedding(release, state, image), atol=1e-4)


FAST = {"precision": "auto"}  # bf16 on CPUs that have it
OPENVINO = {"precision": "fp32", "engine": "openvino"}


@pytest.mark.parametrize(
    ("encoder", "faster"),
    [
        ("surgenetxl_caformer_s18", [FAST]),
        ("timm:convnextv2_atto", [FAST]),  # the layers of ConvNeXtV2-Tiny
        ("timm:pvt_v2_b0", [FAST, OPENVINO]),  # those of PVTv2-B2
    ],
)
def test_faster_arithmetic_gives_the_same_features(encoder: str, faster: list[dict[str, str]]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)

    def features(extract: dict[str, str]) -> np.ndarray:
        config = Config.model_validate(
            {
                "device": "cpu",
                "preprocess": {"resize_px": 64, "crop_px": 64},
                "cnn": {"backbone": encoder, "weights": "random"},
                "extract": {"encoder": "initial", **extract},
            }
        )
        return load_encoder(config, None, ["Grasper"])(frames)[0]

    expected = features({"precision": "fp32"})
    for extract in faster:
        tolerance = 1e-4 if extract["precision"] == "fp32" else 0.03
        np.testing.assert_allclose(features(extract), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("release", releases("extract"))
def test_extract_takes_the_published_file(release: Release, tmp_path: Path, clip: Path, image: Image.Image) -> None:
    state = write(release, tmp_path / "published.pth")
    values = {"data.root": clip, "data.split.rule": "1/0/0", "data.fps": 0.05, "device": "cpu", "extract.workers": 1}
    values |= {"extract.precision": "fp32", "extract.storage": "float32"}
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    succeed(["index", *settings], tmp_path)
    extract = ["extract", "--encoder", release.encoder, "--weights", "published.pth", "--trusted"]
    assert f"tensors of {release.encoder} found {release.found}" in succeed([*extract, *settings], tmp_path)
    (file,) = (tmp_path / "artifacts/features").glob("*/video05.h5")
    found = np.asarray(read_features(file).features)
    assert len(found) == 2
    np.testing.assert_allclose(found[0], expected_embedding(release, state, image), atol=1e-4)


def tensors_of(build: Callable[[], nn.Module]) -> State:
    """Random tensors with the names and shapes of a network."""
    with torch.device("meta"):
        own = build().state_dict()
    return {
        name: random_tensor(name, one.shape) if one.dtype.is_floating_point else torch.zeros((), dtype=one.dtype)
        for name, one in own.items()
    }


def timm_file(network: str) -> State:
    return tensors_of(partial(timm.create_model, network))


def with_star_relu() -> State:
    """As the release's network trained on ImageNet, which has StarReLU."""
    name = "stages.0.0.token_mixer.act1.scale"
    return random_tensors(CAFORMER.list) | {name: random_tensor(name, (1,))}


XL = "surgenetxl_caformer_s18"
LOOKALIKES = {
    "timm's StarReLU": (XL, lambda: timm_file("caformer_s18"), r"act1\.scale is unknown and"),
    "the release's StarReLU": (XL, with_star_relu, r"act1\.scale is unknown;"),
    "the release's ReLU": ("timm:caformer_s18", lambda: random_tensors(CAFORMER.list), rf"missing.*they fit {XL}:"),
    "version 1": ("surgenet_convnextv2_tiny", lambda: timm_file("convnext_tiny"), r"grn\.weight is missing and"),
    "ConvNeXt-Tiny": (
        "lemonfm",
        lambda: prefixed("teacher.backbone.", tensors_of(torchvision.models.convnext_tiny)),
        r"under `teacher\.backbone\.`: features\.0\.0\.weight is 96x3x4x4, not 192x3x4x4 and .*they fit convnext_tiny:",
    ),
    "ViT-S": (
        "endovit",
        lambda: prefixed("model.", timm_file("vit_small_patch16_224")),
        r"under `model\.`: cls_token is 1x1x384, not 1x1x768",
    ),
    "ResNet34": (
        "selfsupsurg_dino",
        lambda: prefixed("trunk.", tensors_of(torchvision.models.resnet34)),
        r"under `trunk\.`: layer1\.0\.conv1\.weight is 64x64x3x3, not 64x64x1x1 and",
    ),
    "a wide ResNet50": (
        "peskavlp",
        lambda: tensors_of(torchvision.models.wide_resnet50_2),
        r"layer1\.0\.conv1\.weight is 128x64x1x1, not 64x64x1x1 and",
    ),
}


@pytest.mark.parametrize("other", LOOKALIKES)
def test_a_file_of_another_network_is_refused_in_one_line(other: str, tmp_path: Path) -> None:
    encoder, content, problem = LOOKALIKES[other]
    torch.save(content(), tmp_path / "other.pth")
    with torch.device("meta"), pytest.raises(UserError) as error:
        build_backbone(encoder, str(tmp_path / "other.pth"), 0)
    assert str(error.value).startswith(f"{tmp_path}/other.pth: does not hold weights of {encoder} (")
    assert re.search(problem, str(error.value)), error.value
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*no-op:UserWarning")
def test_a_classifier_of_several_layers_is_left_out(tmp_path: Path) -> None:
    torch.save(timm_file("caformer_s18"), tmp_path / "whole.pth")
    with torch.device("meta"):
        build_backbone("timm:caformer_s18", str(tmp_path / "whole.pth"), 0)
