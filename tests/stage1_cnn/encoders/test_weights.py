"""Backbones in files of other programs: found under any prefix and wrapper, or one line that says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from configs.errors import UserError
from engine.checkpoints import load_external_state
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.weights import Found, describe_match, find_weights

State = dict[str, Tensor]


def small() -> nn.Module:
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 4, 7), nn.BatchNorm2d(4)
    net.relu, net.maxpool = nn.ReLU(), nn.MaxPool2d(2)
    for number in (1, 2, 3):
        block = nn.Module()
        block.conv1, block.bn1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        net.add_module(f"layer{number}", nn.Sequential(block))
    net.fc = nn.Linear(4, 3)
    return net


def weights(seed: int = 3) -> State:
    """Of that net, with its classifier; running statistics differ from the start too."""
    torch.manual_seed(seed)
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in small().state_dict().items()}


def find(path: Path, content: Any) -> tuple[Found, str]:
    torch.save(content, path)
    tensors = load_external_state(path, trusted=True)
    net = small()
    net.fc = nn.Identity()
    found = find_weights(net, ("fc",), tensors, "small", path)
    return found, describe_match(found, tensors, "small")


def under(prefix: str, state: State, fc: str | None = "fc.") -> State:
    """With a prefix, and the classifier under another name or left out."""
    named = {name: t for name, t in state.items() if fc is not None or not name.startswith("fc.")}
    return {f"{prefix}{name.replace('fc.', fc or '')}": t for name, t in named.items()}


def numbered(state: State, prefix: str) -> State:
    children = [name for name, _ in small().named_children()]
    numbers = {name: str(number) for number, name in enumerate(children)}
    split = {name: name.split(".", 1) for name in state}
    return {f"{prefix}{numbers[child]}.{rest}": state[name] for name, (child, rest) in split.items()}


def compiled_inside(state: State) -> State:
    """Layers compiled, or their activations checkpointed, one by one."""
    return {
        name.replace("layer2.0.", "layer2.0._orig_mod.").replace("layer3.", "layer3._checkpoint_wrapped_module."): t
        for name, t in state.items()
    }


QUEUE = {"module.queue": torch.zeros(2, 4)}
FORMS: dict[str, tuple[Callable[[State, State], Any], str]] = {
    "plain": (lambda w, _: w, "without a prefix"),
    "ddp": (lambda w, _: under("module.", w), "under `module.`"),
    "two models": (lambda w, _: under("model.model.", w), "under `model.model.`"),
    "backbone and head": (lambda w, _: under("backbone.", w, "head.fc."), "under `backbone.`"),
    "encoder": (lambda w, _: {"net": under("encoder.", w)}, "under `net.encoder.`"),
    "resnet": (lambda w, _: {"model_state_dict": under("resnet.", w)}, "under `model_state_dict.resnet.`"),
    "compiled": (lambda w, _: {"model": under("_orig_mod.", w)}, "under `model._orig_mod.`"),
    "ddp and compiled": (lambda w, _: under("module._orig_mod.", w), "under `module._orig_mod.`"),
    "compiled inside": (lambda w, _: {"model": compiled_inside(w)}, "under `model.`"),
    "some in ddp": (
        lambda w, _: {(f"module.{n}" if n.startswith("layer1") else n): t for n, t in w.items()},
        "without a prefix",
    ),
    "lightning": (lambda w, _: {"state_dict": under("net.backbone.", w)}, "under `state_dict.net.backbone.`"),
    "moco": (
        lambda w, o: {"state_dict": {**under("module.encoder_k.", o), **under("module.encoder_q.", w), **QUEUE}},
        "under `state_dict.module.encoder_q.`; `state_dict.module.encoder_k.` would fit too and was not taken",
    ),
    "moco v3": (
        lambda w, o: {"state_dict": {**under("module.base_encoder.", w), **under("module.momentum_encoder.", o)}},
        "`state_dict.module.momentum_encoder.` would fit too",
    ),
    "dino": (
        lambda w, o: {"student": under("module.backbone.", o), "teacher": under("backbone.", w, None)},
        "under `teacher.backbone.`; `student.module.backbone.` would fit too and was not taken",
    ),
    "average beside": (
        lambda w, o: {"state_dict_ema": under("module.", o), "state_dict": under("module.", w)},
        "under `state_dict.module.`; `state_dict_ema.module.` would fit too",
    ),
    "best beside last": (lambda w, o: {"best": o, "model": w}, "`best.` would fit too and was not taken"),
    "vissl": (
        lambda w, _: {
            "classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", w, None), "heads": {}}}}
        },
        "under `classy_state_dict.base_model.model.trunk._feature_blocks.`",
    ),
    "numbered": (
        lambda w, _: {"state_dict": numbered(w, "features.")},
        "`state_dict.features.`, its children numbered",
    ),
    "numbered at the top": (lambda w, _: numbered(w, ""), "without a prefix, its children numbered"),
    "in a list": (lambda w, _: [3, {"weights": w}], "under `1.weights.`"),
    "the same twice": (lambda w, _: {"a": w, "b": {n: t.clone() for n, t in w.items()}}, "under `a.`"),
    "half precision": (
        lambda w, _: {n: t.half() if t.is_floating_point() else t for n, t in w.items()},
        "stored as float16",
    ),
    "with an optimizer": (
        lambda w, _: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.zeros(64)}}}},
        "3 other tensors not used (model.fc, optimizer)",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_and_the_match_is_reported(tmp_path: Path, form: str) -> None:
    make, words = FORMS[form]
    mine = weights()
    found, said = find(tmp_path / "net.pth", make(mine, weights(4)))
    assert found.state.keys() == {name for name in mine if not name.startswith("fc.")}
    for name, tensor in found.state.items():
        assert torch.equal(tensor, mine[name].to(tensor.dtype)), name
    assert said.startswith("all 28 tensors of small found ")
    assert words in said
    assert "\n" not in said


def test_counters_of_batch_norm_may_be_missing(tmp_path: Path) -> None:
    mine = {name: t for name, t in weights().items() if not name.endswith("num_batches_tracked")}
    found, said = find(tmp_path / "net.pth", {"loss": {"momentum": under("trunk.", weights(4))}, "trunk": mine})
    assert found.state.keys() == {name for name in mine if not name.startswith("fc.")}
    assert "under `trunk.`; `loss.momentum.trunk.` would fit too and was not taken" in said


def test_a_backbone_says_where_its_weights_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = torchvision.models.shufflenet_v2_x0_5()
    torch.save({"net": under("encoder.", whole.state_dict())}, tmp_path / "net.pth")
    backbone = build_backbone("shufflenet_v2_x0_5", str(tmp_path / "net.pth"), 0, trusted=True)
    assert torch.equal(backbone.net.conv5[0].weight, whole.conv5[0].weight)
    said = capsys.readouterr().err
    assert said.startswith(
        f"{tmp_path}/net.pth: all 336 tensors of shufflenet_v2_x0_5 found under `net.encoder.`; 2 other"
    )


def test_children_by_number_of_another_net_too(tmp_path: Path) -> None:
    whole = torchvision.models.shufflenet_v2_x0_5()
    torch.save(nn.Sequential(*list(whole.children())[:-1]).state_dict(), tmp_path / "net.pth")
    backbone = build_backbone("shufflenet_v2_x0_5", str(tmp_path / "net.pth"), 0, trusted=True)
    assert torch.equal(backbone.net.conv5[0].weight, whole.conv5[0].weight)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda w, o: {"a": w, "b": o}, "holds small twice, with different values, under `a.` and `b.`; load it where"),
        (
            lambda w, o: {"x": {n: t for n, t in w.items() if n != "bn1.weight"}},
            "does not hold weights of small (under `x.`: bn1.weight is missing; 27 of 28 tensors fit; the file has x.",
        ),
        (
            lambda w, o: {"a": {n: t for n, t in w.items() if n[5] == "1"}, "b": o["conv1.weight"]},
            "does not hold weights of small (",
        ),
        (
            lambda w, o: {**under("net.", w), "net.layer1.0.se.weight": torch.zeros(1)},
            "(under `net.`: layer1.0.se.weight is unknown; 28 of 28 tensors fit; the file has net.conv1.weight",
        ),
        (
            lambda w, o: under("backbone.", {**w, "conv1.weight": torch.zeros(4, 3, 3, 3)}),
            "(under `backbone.`: conv1.weight is 4x3x3x3, not 4x3x7x7; 27 of 28 tensors fit; the file",
        ),
    ],
)
def test_a_partial_or_doubtful_match_is_refused(tmp_path: Path, make: Callable[..., Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        find(tmp_path / "net.pth", make(weights(), weights(4)))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_larger_network_with_more_stages_is_another_one() -> None:
    """Such as a ResNet with a fifth stage; layers with other names are heads."""
    net = torchvision.models.resnet18()
    net.fc = nn.Identity()  # type: ignore[assignment]
    state = {**net.state_dict(), "layer5.0.conv1.weight": torch.zeros(2, 2), "decoder.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"\(layer5\.0\.conv1\.weight is unknown; "):
        find_weights(net, ["fc"], state, "resnet18", Path("net.pth"))
    del state["layer5.0.conv1.weight"]
    assert len(find_weights(net, ["fc"], state, "resnet18", Path("net.pth")).origins) > 100
