"""Nets of the original programs are imported exactly: the same outputs, and the same bytes when exported again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.head_settings import GruHead, LstmHead
from configs.load import load_dataset
from configs.schema import JointNetConfig
from features.dataset.phase_order import ids_of_order
from interop.mtrcnet_checkpoints import (
    VARIANTS,
    choose_normalisation,
    compose_file_name,
    is_mapping,
    parse_file_name,
    recognise,
    to_joint,
    to_original,
    variant_of,
)
from stage1_cnn.encoders.backbone import build_backbone
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.joint.net import JointNet, build_joint
from tests.interop.originals import LINEAR, original_state, restated

SPEC = load_dataset("cholec80")
MTRCNET, SWAPPED = SPEC.phase_orders["mtrcnet"], SPEC.phase_orders["tf-cholec80"]
TURNED = (*SPEC.phases[2:], *SPEC.phases[:2])  # not its own inverse
FILE = Path("some.pth")


def clip(frames: int = 4, size_px: int = 64) -> Tensor:
    return torch.randn(frames, 3, size_px, size_px, generator=torch.Generator().manual_seed(5))


def imported(state: dict[str, Tensor], order: Any = MTRCNET, file: Path = FILE, asked: str | None = None) -> JointNet:
    original = recognise(state, file, asked)
    return to_joint(original, SPEC, order if original.phases else None, file)


def assert_same_outputs(net: JointNet, variant: str, state: dict[str, Tensor], order: Any, backbone: str) -> None:
    expected = restated(variant, state, clip(), backbone)
    with torch.no_grad():
        found = net(clip()[None])
    for mine, theirs in ((found.tool_logits, expected.tools), (found.mapped_logits, expected.mapped)):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine[0], theirs, rtol=1e-5, atol=1e-5)
    assert (found.phase_stages is None) == (expected.phases is None)
    if expected.phases is not None:
        ours = found.phase_stages[-1][0][:, torch.from_numpy(ids_of_order(order, SPEC.phases))]
        torch.testing.assert_close(ours, expected.phases, rtol=1e-5, atol=1e-5)
        assert expected.phases.std() > 0.01


@pytest.mark.parametrize("order", [MTRCNET, TURNED], ids=["mtrcnet", "turned"])
@pytest.mark.parametrize("variant", LINEAR)
def test_every_variant_computes_what_the_original_does(variant: str, order: Any) -> None:
    state = original_state(variant, prefix=order == MTRCNET)
    original = recognise(state, FILE)
    assert (original.variant.name, original.backbone, original.prefixed) == (variant, "resnet18", order == MTRCNET)
    assert_same_outputs(imported(state, order), variant, state, order, "resnet18")


def test_the_published_size() -> None:
    state = original_state("cl", "resnet50", units=512)
    assert state["module.fc2.weight"].shape == (512, 2048)
    assert len(state) == 318 + 4 + 8  # 53 convolutions, 53 batch norms of 5; lstm; four linear layers
    net = imported(state, SWAPPED)
    assert net.backbone.name == "resnet50"
    assert_same_outputs(net, "cl", state, SWAPPED, "resnet50")


@pytest.mark.parametrize("backbone", ["resnet34", "resnet101", "resnet152"])
def test_other_resnets_are_recognised_by_their_blocks(backbone: str) -> None:
    assert recognise(original_state("tool", backbone), FILE).backbone == backbone


@pytest.mark.parametrize("order", [MTRCNET, TURNED], ids=["mtrcnet", "turned"])
@pytest.mark.parametrize("variant", LINEAR)
def test_export_gives_the_same_keys_and_numbers_back(variant: str, order: Any) -> None:
    state = original_state(variant)
    net = imported(state, order)
    head = recognise(state, FILE).head
    back = to_original(net, variant_of(net, head, FILE), SPEC.phases, order if head else None, prefix=True)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert not any(name.startswith("module.") for name in to_original(net, VARIANTS[variant], SPEC.phases, None, False))


def test_files_without_batch_norm_counters() -> None:
    state = {name: value for name, value in original_state("phase").items() if "num_batches" not in name}
    assert_same_outputs(imported(state), "phase", state, MTRCNET, "resnet18")


def test_a_net_for_tools_with_an_unused_lstm() -> None:
    state = original_state("multitask")
    guess = recognise(state, FILE)
    assert (guess.variant.name, guess.guessed) == ("multitask", True)
    for file, asked in (
        (FILE, "tool"),
        (Path("cnn_lstm_tool_epoch_25_length_4.pth"), None),
        (Path("cnn_lstm_epoch_25_length_4_opt_0_train1_9911_val1_9722.pth"), None),
    ):
        found = recognise(state, file, asked)
        assert (found.variant.name, found.guessed) == ("tool", False)
        assert {name.partition(".")[0] for name in found.unused} == {"fc", "lstm"}
        assert_same_outputs(imported(state, file=file, asked=asked), "tool", state, None, "resnet18")
    named = recognise(state, Path("cnn_lstm_epoch_25_length_4_train1_1_train2_1_val1_1_val2_1.pth"))
    assert (named.variant.name, named.guessed) == ("multitask", False)


def test_standardisation_is_folded_into_the_lstm() -> None:
    net = imported(original_state("multitask"))
    generator = torch.Generator().manual_seed(3)
    assert net.phase is not None
    net.phase.standardise = Standardise(
        torch.randn(512, generator=generator), torch.rand(512, generator=generator) + 0.5
    )
    back = to_original(net, VARIANTS["multitask"], SPEC.phases, SWAPPED, prefix=False)
    again = imported(back, SWAPPED)
    with torch.no_grad():
        one, two = net(clip()[None]), again(clip()[None])
    torch.testing.assert_close(two.phase_stages[-1], one.phase_stages[-1], rtol=1e-4, atol=1e-4)
    assert torch.equal(two.tool_logits, one.tool_logits)


# ---------------------------------------------------------------------------------------------- refused


def changed(variant: str = "cl", **entries: Tensor | None) -> dict[str, Tensor]:
    """A state dict with entries replaced, or left out where None; `__` stands for a dot."""
    state = original_state(variant, prefix=False)
    for name, tensor in entries.items():
        key = name.replace("__", ".")
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    return state


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (lambda: original_state("phase", phases=8), "has 8 phases, but cholec80 has 7"),
        (lambda: original_state("cl", tools=6), "has 6 tools, but cholec80 has 7"),
        (lambda: changed(lstm__bias_hh_l0=None), r"lstm\.bias_hh_l0 is missing"),
        (lambda: changed(fc__weight=None), r"fc\.weight is missing"),
        (lambda: changed(fc__bias=torch.zeros(5)), r"fc\.bias is 5, not 7"),
        (lambda: changed(fc__bias=torch.full((7,), torch.nan)), "not finite"),
        (lambda: changed(fc2__weight=torch.zeros(3)), r"fc2\.weight has the impossible shape \(3,\)"),
        (lambda: changed(lstm__weight_ih_l1=torch.zeros(64, 16)), r"lstm\.weight_ih_l1 is unknown"),
        (lambda: changed(share__layer4__1__conv2__weight=None), r"share\.layer4\.1\.conv2\.weight is missing"),
        (lambda: changed(fc9__weight=torch.zeros(2, 2)), "none of them has a layer 'fc9'"),
        (lambda: changed(fc3__weight=None, fc3__bias=None), "no variant has the layers fc, fc2, fc_p2t, lstm"),
        (lambda: {"weight": torch.zeros(7, 16), "bias": torch.zeros(7)}, "only the mapping; .* --into RUN"),
        (lambda: build_backbone("resnet18", "random", 0).net.state_dict(), "only a ResNet.* cnn.weights=FILE"),
        (lambda: {"backbone.net.conv1.weight": torch.zeros(1)}, "a checkpoint of this project"),
        (lambda: {"a": torch.zeros(1)}, "no backbone named `share`"),
        (lambda: original_state("cl") | original_state("cl", prefix=False), "some keys twice"),
    ],
)
def test_anything_else_is_refused_with_the_reason(state: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        imported(state())
    assert "some.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_variant_that_does_not_fit_the_layers_is_refused() -> None:
    with pytest.raises(UserError, match="--variant cl: its layers are those of tool or multitask"):
        recognise(original_state("multitask"), FILE, "cl")


@pytest.mark.parametrize(
    ("head", "net", "backbone", "reason"),
    [
        (LstmHead(), {}, "shufflenet_v2_x0_5", "ResNets only; this net has shufflenet"),
        (GruHead(name="gru"), {}, "resnet18", "use an LSTM; this net has gru"),
        (LstmHead(layers=2), {}, "resnet18", "one layer"),
        (LstmHead(dropout=0.5), {}, "resnet18", "no dropout"),
        (LstmHead(), {"mapping": True}, "resnet18", "no original net has these branches"),
        (LstmHead(relu=True), {}, "resnet18", "no original net has these branches"),
        (LstmHead(relu=True), {"tasks": "phase"}, "resnet18", "no original net has these branches"),
    ],
)
def test_nets_without_an_original_counterpart_are_not_exported(
    head: Any, net: dict[str, Any], backbone: str, reason: str
) -> None:
    built = build_joint(build_backbone(backbone, "random", 0), JointNetConfig(**net), head, 7, 7)
    with pytest.raises(UserError, match=reason):
        variant_of(built, head, FILE)


# ---------------------------------------------------------------------------------------------- names, images

_REST = "_opt_1_mulopt_1_flip_0_crop_1_batch_400_train1_9991_train2_9958_val1_9725_val2_8864"


@pytest.mark.parametrize(
    ("name", "variant", "frames"),
    [
        (f"cnn_lstm_epoch_25_length_10{_REST}.pth", "multitask", 10),
        (f"cnn_lstm_1_epoch_25_length_4{_REST}.pth", "two-layer", 4),
        (f"cnn_lstm1_p2t_epoch_25_length_10{_REST}.pth", "cl", 10),
        (f"cnn_lstm_tool_epoch_25_length_2{_REST}.pth", "tool", 2),
        ("lstm_phase_epoch_3_length_10_opt_0_train_9951_val_8864.pth", "phase", 10),
        ("lstm_epoch_25_length_4_opt_0_train_9951_val_8864.pth", "phase", 4),
        ("cnn_lstm_phase+tool_epoch_7_length_10_opt_0_trainPhase_1_valTool_2.pth", "pytorch1.2.0", 10),
        (f"fc_epoch_25_length_4{_REST}_p2t.pth", None, 4),
    ],
)
def test_file_names_describe_the_run(name: str, variant: str | None, frames: int) -> None:
    found = parse_file_name(name)
    assert found is not None
    assert (found.variant, found.frames) == (variant, frames)


def test_the_sentence_for_a_file_name() -> None:
    found = parse_file_name(f"cnn_lstm_epoch_25_length_10{_REST}.pth")
    assert found is not None
    assert found.sentence() == (
        "epoch 25, clips of 10 frames, Adam, backbone at a tenth of the learning rate, no flips, centre crop, batches "
        "of 400 frames; accuracies: training tools 99.91 %, training phases 99.58 %, validation tools 97.25 %, "
        "validation phases 88.64 %"
    )
    assert compose_file_name(VARIANTS["multitask"], found.values) == f"cnn_lstm_epoch_25_length_10{_REST}.pth"


@pytest.mark.parametrize(
    "name", ["best.pth", "cnn_lstm.pth", "cnn_lstm_epoch_x_length_4.pth", "x_epoch_1_length_0.pth"]
)
def test_other_file_names_are_ignored(name: str) -> None:
    assert parse_file_name(name) is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_composed_file_names_are_parsed_back(variant: str) -> None:
    found = parse_file_name(compose_file_name(VARIANTS[variant], {"epoch": 3, "length": 5}))
    assert found is not None
    assert (found.variant, found.frames) == (variant, 5)


@pytest.mark.parametrize(
    ("variant", "prefix", "asked", "expected"),
    [
        ("cl", True, None, "main"),
        ("multitask", False, None, "main"),
        ("phase", False, None, "main"),
        ("tool", True, None, "main"),
        ("tool", False, None, "pytorch1.2.0"),
        ("pytorch1.2.0", False, None, "pytorch1.2.0"),
        ("pytorch1.2.0", True, None, "pytorch1.2.0"),
        ("pytorch1.2.0", False, "main", "main"),
        ("cl", True, "pytorch1.2.0", "pytorch1.2.0"),
    ],
)
def test_normalisation_follows_the_release(variant: str, prefix: bool, asked: str | None, expected: str) -> None:
    name, reason = choose_normalisation(recognise(original_state(variant, prefix=prefix), FILE), asked)
    assert name == expected
    assert reason


def test_a_mapping_is_recognised_by_its_keys() -> None:
    assert is_mapping({"weight": torch.zeros(7, 512), "bias": torch.zeros(7)})
    assert is_mapping({"module.weight": torch.zeros(7, 512), "module.bias": torch.zeros(7)})
    assert not is_mapping({"weight": torch.zeros(7, 512)})
