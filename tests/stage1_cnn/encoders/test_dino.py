"""DINOv2 and DINOv3: what their files may hold beside the release's own tensors, and how tokens are pooled."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.encoder_spec import described_encoders, find_description
from configs.errors import UserError
from engine.checkpoints import load_external_state
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.networks.timm_nets import build_timm
from stage1_cnn.encoders.registry import find_encoder
from stage1_cnn.encoders.weights import find_weights

SMALL = {"dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2", "dinov3_vits16": "vit_small_patch16_dinov3_qkvb"}
PX = 112  # a multiple of both sizes of patches


def small(network: str) -> nn.Module:
    """The network with two blocks, so that it is quick; biases are not zero, as after training."""
    options = {"global_pool": "token", "depth": 2} if "vit" in network else {"depths": (1, 1, 1, 1)}
    torch.manual_seed(0)
    net = build_timm(network, **options).eval()
    for name, parameter in net.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.1)
    return net


def load(encoder: str, path: Path, network: str | None = None) -> nn.Module:
    """The small network with the weights in a file of that encoder."""
    net = small(network or SMALL[encoder])
    tensors = load_external_state(path, trusted=True)
    found = find_weights(net, (), tensors, encoder, path, find_encoder(encoder).layouts)
    net.load_state_dict(found.state)
    return net


def embed(net: nn.Module, px: int = PX) -> Tensor:
    with torch.inference_mode():
        return net(torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(1)))  # type: ignore[no-any-return]


def released(net: nn.Module) -> dict[str, Tensor]:
    """The state of timm's DINOv3 under the release's names, with a key bias of zero."""
    state = {}
    for name, tensor in net.state_dict().items():
        name = (
            name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        )
        if name.endswith("q_bias"):
            value = net.state_dict()[name.replace("q_bias", "v_bias")]
            state[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros_like(tensor), value])
        elif not name.endswith("v_bias"):
            state[name] = tensor
    return state


@pytest.mark.parametrize("encoder", SMALL)
def test_files_of_timm_are_read_too(encoder: str, tmp_path: Path) -> None:
    source = small(SMALL[encoder])
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    torch.testing.assert_close(embed(load(encoder, tmp_path / "model.safetensors")), embed(source))


def test_timms_dinov3_without_biases_is_read_too(tmp_path: Path) -> None:
    """timm publishes DINOv3 without the biases of queries and values, which are zero in the release."""
    source = small("vit_small_patch16_dinov3")
    assert not any(name.endswith("_bias") for name in source.state_dict())
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    found = load("dinov3_vits16", tmp_path / "model.safetensors")
    torch.testing.assert_close(embed(found, 64), embed(source, 64))


def test_registers_are_not_left_over(tmp_path: Path) -> None:
    """The network without registers has all other tensors of a file with registers, and their shapes."""
    net = small("vit_small_patch14_dinov2")
    torch.save({**net.state_dict(), "register_tokens": torch.zeros(1, 4, 384)}, tmp_path / "reg.pth")
    with pytest.raises(UserError, match=r"does not hold weights of dinov2_vits14 \(register_tokens is unknown"):
        load("dinov2_vits14", tmp_path / "reg.pth", "vit_small_patch14_dinov2")


@pytest.mark.parametrize("masked", ["", "a mask of zeros", "a mask that keeps it"])
def test_a_bias_of_the_keys_is_not_dropped(masked: str, tmp_path: Path) -> None:
    source = small(SMALL["dinov3_vits16"])
    state = released(source)
    biases = [name for name in state if name.endswith("qkv.bias")]
    state[biases[0]].view(3, -1)[1] = 0.5
    if masked:
        mask = torch.ones(3, len(state[biases[0]]) // 3)
        mask[1] = masked == "a mask that keeps it"
        state |= {f"{name}_mask": mask.flatten() for name in biases}
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}}, tmp_path / "tuned.pth")
    if masked == "a mask of zeros":
        torch.testing.assert_close(embed(load("dinov3_vits16", tmp_path / "tuned.pth"), 64), embed(source, 64))
    else:
        message = (
            r"under `teacher.backbone.`: blocks.0.attn.qkv.bias has a bias of the keys, which this network has not"
        )
        with pytest.raises(UserError, match=message):
            load("dinov3_vits16", tmp_path / "tuned.pth")


def test_a_bias_of_the_keys_matters_under_rotary_embeddings() -> None:
    """A constant that is added to all keys cancels in the softmax, but not if each key is rotated afterwards."""
    net = small(SMALL["dinov3_vits16"])
    before = net.forward_features(torch.zeros(1, 3, 64, 64))
    net.get_buffer("blocks.0.attn.k_bias").fill_(3.0)
    assert (net.forward_features(torch.zeros(1, 3, 64, 64)) - before).abs().max() > 1e-3
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, dynamic_img_size=True).eval()
    before = embed(plain, 64)
    plain.blocks[0].attn.qkv.bias.data.view(3, -1)[1] = 3.0
    torch.testing.assert_close(embed(plain, 64), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["", "@token", "@mean", "@both"])
def test_tokens_of_dinov3s_convnext(pooling: str) -> None:
    net = small("convnext_tiny")
    entry = find_encoder(f"dinov3_convnext_tiny{pooling}")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        maps = net.forward_features(images).permute(0, 2, 3, 1)
        norm = nn.functional.layer_norm(maps.mean((1, 2)), (768,), net.head.norm.weight, net.head.norm.bias, 1e-6)
        patches = nn.functional.layer_norm(maps, (768,), net.head.norm.weight, net.head.norm.bias, 1e-6).mean((1, 2))
        expected = {"@mean": patches, "@both": torch.cat([norm, patches], dim=1)}.get(pooling, norm)
        found = net(images) if entry.forward is None else entry.forward(net, images)
    torch.testing.assert_close(found, expected)
    assert callable(entry.embedding_dim)
    assert entry.embedding_dim(net) == found.shape[1]


@pytest.mark.parametrize("encoder", ["dinov2_vits14_reg", "dinov3_vits16", "dinov3_convnext_tiny", "timm:test_vit"])
def test_a_file_of_another_network_is_one_line(encoder: str, tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "other.pth")
    with torch.device("meta"), pytest.raises(UserError) as error:
        build_backbone(encoder, str(tmp_path / "other.pth"), 0, trusted=True)
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/other.pth: does not hold weights of {encoder} (")
    assert "tensors expected; the file has conv1.weight" in said
    assert "they fit resnet18" in said
    assert "\n" not in said


def test_descriptions_state_the_dimension() -> None:
    names = [name for name in described_encoders() if name.startswith("dino")]
    assert len(names) == 13
    for name in names:
        with torch.device("meta"):
            found = build_backbone(name, "random", 0).embedding_dim
        description = find_description(name)
        assert description is not None
        assert found == description.embedding_dim
