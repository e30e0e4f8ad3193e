"""Published weights of described encoders: files that the user has put somewhere, or one line that says where from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from configs import encoder_spec
from configs.errors import UserError
from configs.schema import CnnConfig
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.pretrained import file_hash, settled_weights, weights_identity
from stage1_cnn.encoders.registry import FAMILIES, EncoderEntry

NAME, FILE = "release_of_a_test", "release-1.pth"
DESCRIPTION = """
title: A network of this test
family: {family}
network: shufflenet_v2_x0_5
weights: {{file: {file}, url: 'https://example.org/it', licence: CC BY-NC-SA 4.0, sha256: '{digits}'}}
"""


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return torchvision.models.shufflenet_v2_x0_5().state_dict()


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, torch.Tensor]) -> Iterator[Path]:
    """The path of a release that is not on this machine yet; its hash is in the description of the encoder NAME."""
    torch.save({"teacher": state}, tmp_path / "made.pth")
    digits = hashlib.sha256((tmp_path / "made.pth").read_bytes()).hexdigest()[:16]
    if "family_of_this_test" not in FAMILIES.names():
        entry = EncoderEntry(torchvision.models.shufflenet_v2_x0_5)
        FAMILIES.register("family_of_this_test", lambda description, pooling: entry)
    (tmp_path / "encoders").mkdir()
    text = DESCRIPTION.format(family="family_of_this_test", file=FILE, digits=digits)
    (tmp_path / "encoders" / f"{NAME}.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(encoder_spec, "DESCRIPTIONS", tmp_path / "encoders")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SURGSTAGE_WEIGHTS", raising=False)
    encoder_spec.find_description.cache_clear()
    yield tmp_path / "made.pth"
    encoder_spec.find_description.cache_clear()


@pytest.mark.parametrize("word", ["published", "imagenet"])
def test_absent_weights_are_named_with_their_source_licence_and_place(release: Path, tmp_path: Path, word: str) -> None:
    with pytest.raises(UserError) as error:
        build_backbone(NAME, word, 0)
    for words in (FILE, "https://example.org/it", "CC BY-NC-SA 4.0", "--weights FILE", "SURGSTAGE_WEIGHTS"):
        assert words in str(error.value)
    assert str(tmp_path / "home" / "hub" / "checkpoints") in str(error.value)
    assert "ImageNet" not in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not on this machine"):
        weights_identity(CnnConfig(backbone=NAME, weights=word), tmp_path)
    assert settled_weights(CnnConfig(backbone=NAME, weights="cached")) == "random"


@pytest.mark.parametrize("by_variable", [True, False])
def test_a_release_is_found_by_its_name(
    release: Path,
    tmp_path: Path,
    by_variable: bool,
    state: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "own" if by_variable else tmp_path / "home" / "hub" / "checkpoints"
    if by_variable:
        monkeypatch.setenv("SURGSTAGE_WEIGHTS", str(folder))
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(release.read_bytes())
    backbone = build_backbone(NAME, "published", 0, trusted=True)
    assert torch.equal(backbone.net.conv1[0].weight, state["conv1.0.weight"])
    said = capsys.readouterr().err
    assert f"all 336 tensors of {NAME} found under `teacher.`; 2 other tensors not used (teacher.fc)" in said
    assert "the file of the release (SHA-256 " in said
    cnn = CnnConfig(backbone=NAME, weights="cached")
    assert settled_weights(cnn) == "published"
    as_file = CnnConfig(backbone=NAME, weights=str(release))
    assert weights_identity(cnn, tmp_path) == weights_identity(as_file, tmp_path) == f"sha256:{file_hash(release)}"


def test_a_file_that_is_not_the_release_is_used_with_a_note(
    release: Path, tmp_path: Path, state: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, tmp_path / "tuned.ckpt")
    build_backbone(NAME, str(tmp_path / "tuned.ckpt"), 0, trusted=True)
    assert "; note: not the file of the release (SHA-256 " in capsys.readouterr().err


def test_a_file_is_hashed_again_once_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = file_hash(path)
    assert file_hash(path) == first == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"other")
    assert file_hash(path) == hashlib.sha256(b"other").hexdigest()


def test_weights_of_another_known_encoder_are_called_that(release: Path, tmp_path: Path) -> None:
    torch.save({"model": torchvision.models.resnet18().state_dict()}, tmp_path / "net.pth")
    with pytest.raises(UserError) as error:
        build_backbone(NAME, str(tmp_path / "net.pth"), 0, trusted=True)
    assert f"does not hold weights of {NAME} (" in str(error.value)
    assert "336 tensors expected; the file has model.conv1.weight" in str(error.value)
    assert str(error.value).endswith("; they fit resnet18: choose that as the encoder, or another file")
    torch.save({"fc.weight": torch.zeros(7, 2048), "fc.bias": torch.zeros(7)}, tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"318 tensors expected; the file has fc\.weight, fc\.bias\)$"):
        build_backbone("resnet50", str(tmp_path / "net.pth"), 0, trusted=True)


FAMILIES_OF_ENCODERS = {
    description.family: name
    for name in sorted(encoder_spec.described_encoders(), reverse=True)
    if (description := encoder_spec.find_description(name)) is not None
}


@pytest.mark.parametrize("name", FAMILIES_OF_ENCODERS.values())
def test_a_wrong_file_for_each_family_is_one_line_that_says_what_was_expected_and_what_it_fits(
    name: str, tmp_path: Path
) -> None:
    """A network of another kind, and a classifier alone. Shapes are all that counts, so nothing is computed."""
    wrong = {f"model.encoder.{key}": value for key, value in torchvision.models.resnet18().state_dict().items()}
    torch.save({"state_dict": wrong}, tmp_path / "wrong.ckpt")
    torch.save({"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}, tmp_path / "head.pth")
    for file, words in (
        ("wrong.ckpt", "; they fit resnet18: choose that as the encoder, or another file"),
        ("head.pth", "tensors expected; the file has fc.weight, fc.bias)"),
    ):
        with pytest.raises(UserError) as error, torch.device("meta"):
            build_backbone(name, str(tmp_path / file), 0, trusted=True)
        assert f"does not hold weights of {name} (" in str(error.value)
        assert str(error.value).endswith(words)
        assert "\n" not in str(error.value)


def test_of_a_lightning_checkpoint_the_trained_weights_are_taken_and_not_their_running_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    trained, average = (torchvision.models.shufflenet_v2_x0_5() for _ in range(2))
    state = {f"model.encoder.{name}": value for name, value in trained.state_dict().items()}
    state |= {f"ema_model.module.encoder.{name}": value for name, value in average.state_dict().items()}
    moments = {0: {"exp_avg": torch.zeros(24, 3, 3, 3)}}
    content = {"state_dict": state, "epoch": 3, "loops": {}, "optimizer_states": [{"state": moments}]}
    torch.save(content, tmp_path / "last.ckpt")
    backbone = build_backbone("shufflenet_v2_x0_5", str(tmp_path / "last.ckpt"), 0, trusted=True)
    assert torch.equal(backbone.net.conv1[0].weight, trained.conv1[0].weight)
    said = capsys.readouterr().err
    assert "all 336 tensors of shufflenet_v2_x0_5 found under `state_dict.model.encoder.`" in said
    assert "`state_dict.ema_model.module.encoder.` would fit too and was not taken" in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_in_few_bits_are_read_and_mentioned(
    tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torchvision.models.shufflenet_v2_x0_5().state_dict()
    few = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    save_file(few, tmp_path / "net.safetensors")
    backbone = build_backbone("shufflenet_v2_x0_5", str(tmp_path / "net.safetensors"), 0)
    assert torch.equal(backbone.net.conv1[0].weight, few["conv1.0.weight"].float())
    assert f"stored as {str(dtype).removeprefix('torch.')}" in capsys.readouterr().err
