"""Files of the original programs as runs: what is written, printed and refused, and the export back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.head_settings import LstmHead
from configs.load import GivenKeys, load_config, load_dataset
from configs.schema import Config
from engine.checkpoints import load_checkpoint, load_external_state, save_checkpoint
from engine.files import sha256_file
from features.dataset.phase_order import ids_of_order
from interop.mtrcnet_runs import ImportRequest, export_original, import_original
from live.nets import joint_net
from stage1_cnn.encoders.backbone import build_backbone
from stage2_temporal.joint.net import JointAbout, attach_joint, build_joint, joint_checkpoint, load_joint
from tests.interop.originals import LINEAR, original_state, restated

REST = "_opt_1_mulopt_1_flip_0_crop_1_batch_400_train1_9991_train2_9958_val1_9725_val2_8864"
CL = f"cnn_lstm1_p2t_epoch_25_length_4{REST}.pth"
TWO_LAYER = f"cnn_lstm_1_epoch_25_length_4{REST}.pth"
SPEC = load_dataset("cholec80")


def settings(folder: Path, **blocks: Any) -> Config:
    return Config.model_validate({"device": "cpu", "runs": folder / "runs", **blocks})


def write(folder: Path, name: str, variant: str = "cl", **more: Any) -> Path:
    torch.save(original_state(variant, **more), folder / name)
    return folder / name


def bring_in(folder: Path, file: Path, name: str = "old", order: str | None = "mtrcnet", **more: Any) -> Path:
    config = settings(folder)
    import_original(config, config.runs / name, ImportRequest(file, phase_order=order, **more))
    return config.runs / name


def clip() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def test_a_file_becomes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, CL)
    run = bring_in(tmp_path, file, order="tf-cholec80")
    said = capsys.readouterr().err
    for words in (
        "MTRCNet-CL: phases, tools and the mapping (resnet18, LSTM 16, 7 phases, 7 tools; keys with `module.`)",
        "file name: epoch 25, clips of 4 frames, Adam",
        "validation phases 88.64 %",
        "4 GallbladderRetraction, 5 CleaningCoagulation, 6 GallbladderPackaging",
        "0 Grasper",
        "normalisation main: mean (0.3456, 0.2281, 0.2233)",
        "joint/imported/config.yaml",
    ):
        assert words in said, words
    net, about = load_joint(joint_checkpoint(run))
    assert about.original == {
        "file": CL,
        "sha256": sha256_file(file),
        "variant": "cl",
        "phase_order": list(SPEC.phase_orders["tf-cholec80"]),
        "prefixed": True,
        "normalisation": "main",
    }
    assert (about.kind, about.step, about.inference, about.frames) == ("joint", "imported", "clip", 4)
    expected = restated("cl", load_external_state(file), clip())
    with torch.no_grad():
        found = net(clip()[None])
    ids = torch.from_numpy(ids_of_order(SPEC.phase_orders["tf-cholec80"], SPEC.phases))
    torch.testing.assert_close(found.phase_stages[-1][0][:, ids], expected.phases, rtol=1e-5, atol=1e-5)
    fitting = load_config(run / "joint/imported/config.yaml")
    assert (fitting.cnn.backbone, fitting.joint.sequence.frames, fitting.joint.net.mapping) == ("resnet18", 4, True)
    assert fitting.temporal.head == about.head


def test_files_of_the_other_release_use_its_normalisation(tmp_path: Path) -> None:
    file = write(tmp_path, "latest_model_3.pth", "pytorch1.2.0", prefix=False)
    about = load_checkpoint(joint_checkpoint(bring_in(tmp_path, file)))
    assert about["preprocess"]["mean"] == pytest.approx((0.44893518, 0.3226702, 0.34424525))
    assert about["preprocess"]["std"] == pytest.approx((0.22357443, 0.18503027, 0.1900281))
    main = bring_in(tmp_path, file, "main", normalisation="main")
    assert load_checkpoint(joint_checkpoint(main))["preprocess"]["mean"] == pytest.approx((0.3456, 0.2281, 0.2233))


def test_importing_the_same_file_again_does_nothing_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bring_in(tmp_path, write(tmp_path, CL))
    before = joint_checkpoint(run).read_bytes()
    bring_in(tmp_path, tmp_path / CL)
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match="other settings"):
        bring_in(tmp_path, tmp_path / CL, order="tf-cholec80")
    with pytest.raises(UserError, match="other settings"):
        bring_in(tmp_path, write(tmp_path, "other.pth", seed=1))
    assert joint_checkpoint(run).read_bytes() == before


def test_a_run_with_a_trained_net_is_not_changed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "runs/old/joint/multitask/best.pt", {"kind": "joint"})
    with pytest.raises(UserError, match="has a trained joint net; choose another --name"):
        bring_in(tmp_path, write(tmp_path, CL))


@pytest.mark.parametrize("variant", ["cl", "phase"])
def test_a_phase_order_is_required(tmp_path: Path, variant: str) -> None:
    file = write(tmp_path, "net.pth", variant)
    with pytest.raises(UserError, match=r"net\.pth: contains phase numbers.* --phase-order"):
        bring_in(tmp_path, file, order=None)
    assert not (tmp_path / "runs").exists()


def test_a_net_for_tools_needs_no_order(tmp_path: Path) -> None:
    run = bring_in(tmp_path, write(tmp_path, "net.pth", "tool"), order=None)
    net, about = load_joint(joint_checkpoint(run))
    assert (net.phase, about.head, about.original["phase_order"]) == (None, None, None)
    export_original(settings(tmp_path), run, tmp_path / "out", None)
    assert load_external_state(tmp_path / "out/net.pth").keys() == load_external_state(tmp_path / "net.pth").keys()


def test_a_mapping_is_added_to_the_net_of_another_run(tmp_path: Path) -> None:
    whole = original_state("cl")
    torch.save({k: v for k, v in whole.items() if "p2t" not in k}, tmp_path / TWO_LAYER)
    alone = {name: whole[f"module.fc_p2t.{name}"] for name in ("weight", "bias")}
    file = tmp_path / f"fc_epoch_25_length_4{REST}_p2t.pth"
    torch.save(alone, file)
    with pytest.raises(UserError, match=r"only the mapping; .* --into RUN"):
        bring_in(tmp_path, file)
    with pytest.raises(UserError, match=r"--phase-order: .* only the mapping"):
        bring_in(tmp_path, file, into=tmp_path)
    first = bring_in(tmp_path, tmp_path / TWO_LAYER, "first")
    run = bring_in(tmp_path, file, "both", order=None, into=first)
    assert load_joint(joint_checkpoint(first))[0].mapping is None
    net, about = load_joint(joint_checkpoint(run))
    assert about.original["mapping"]["sha256"] == sha256_file(file)
    with torch.no_grad():
        found = net(clip()[None]).mapped_logits[0]
    torch.testing.assert_close(found, restated("cl", whole, clip()).mapped, rtol=1e-5, atol=1e-5)
    written = export_original(settings(tmp_path), run, tmp_path / "out", "mtrcnet")
    assert written.name.startswith("cnn_lstm1_p2t_epoch_")
    back = load_external_state(written)
    assert all(torch.equal(back[name], tensor) for name, tensor in whole.items())
    with pytest.raises(UserError, match="without a mapping"):
        bring_in(tmp_path, file, "third", order=None, into=run)
    torch.save({"weight": torch.zeros(7, 12), "bias": torch.zeros(7)}, tmp_path / "narrow.pth")
    with pytest.raises(UserError, match=r"narrow\.pth: this mapping does not fit .*weight is 7x12, not 7x16"):
        bring_in(tmp_path, tmp_path / "narrow.pth", "third", order=None, into=first)
    plain = bring_in(tmp_path, write(tmp_path, "plain.pth", "multitask"), "plain")
    with pytest.raises(UserError, match="needs a ReLU"):
        bring_in(tmp_path, file, "third", order=None, into=plain)
    with pytest.raises(UserError, match="--into is for files with the mapping only"):
        bring_in(tmp_path, tmp_path / TWO_LAYER, "third", order=None, into=first)


def test_unused_layers_of_a_net_for_tools_are_exported_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original tool program has them, and its strict load asks for them."""
    state = original_state("multitask")
    file = tmp_path / "net.pth"
    torch.save(state, file)
    with pytest.raises(UserError, match="phase-order"):
        bring_in(tmp_path, file, order=None)  # by its layers, it could be the net for both tasks
    run = bring_in(tmp_path, file, order=None, variant="tool")
    assert "kept only for export, since a net for tools does not use them: fc, lstm" in capsys.readouterr().err
    net, _ = load_joint(joint_checkpoint(run))
    assert net.phase is None
    written = export_original(settings(tmp_path), run, tmp_path / "out", None)
    back = load_external_state(written)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    assert "strict=False" not in capsys.readouterr().err
    tuned = build_joint(build_backbone("resnet18", "random", 0), net.net_config, None, 7, 7)
    attach_joint(tuned, joint_checkpoint(run), SPEC.tools, SPEC.phases, LstmHead())
    content = {"model": tuned.state_dict(), "scores": {}}
    content |= JointAbout.of(tuned, None, settings(tmp_path), SPEC, "multitask").to_json()
    save_checkpoint(tmp_path / "runs/tuned/joint/multitask/best.pt", content)
    back = load_external_state(export_original(settings(tmp_path), tmp_path / "runs/tuned", tmp_path / "tuned", None))
    assert back.keys() == state.keys()


@pytest.mark.parametrize(
    ("wrap", "prefixed"),
    [
        (lambda state: {"state_dict": state, "epoch": 3, "optimizer": {0: torch.zeros(2)}}, True),
        (lambda state: {"net": {"model": state}}, True),
        (lambda state: {f"_orig_mod.{name.removeprefix('module.')}": value for name, value in state.items()}, False),
    ],
)
def test_wrappers_around_an_original_net_do_not_matter(tmp_path: Path, wrap: Any, prefixed: bool) -> None:
    torch.save(wrap(original_state("cl")), tmp_path / CL)
    run = bring_in(tmp_path, tmp_path / CL)
    assert load_joint(joint_checkpoint(run))[1].original["prefixed"] == prefixed
    write(tmp_path, "plain.pth")
    plain = bring_in(tmp_path, tmp_path / "plain.pth", "plain")
    one, two = (load_checkpoint(joint_checkpoint(name))["model"] for name in (run, plain))
    assert all(torch.equal(value, two[name]) for name, value in one.items() if isinstance(value, Tensor))


MINE = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.24, 0.23)}


def given(*keys: str, in_file: bool = False) -> GivenKeys:
    return GivenKeys(in_file=frozenset(keys)) if in_file else GivenKeys(frozenset(keys))


def import_with(folder: Path, file: Path, said: GivenKeys, name: str = "old", **more: Any) -> dict[str, Any]:
    blocks = more.pop("blocks", {"preprocess": MINE})
    config = settings(folder, **blocks)
    import_original(config, config.runs / name, ImportRequest(file, phase_order="mtrcnet", given=said, **more))
    return load_checkpoint(joint_checkpoint(config.runs / name))


BOTH = ("preprocess.mean", "preprocess.std")


@pytest.mark.parametrize("in_file", [True, False])
def test_the_users_normalisation_has_precedence_over_that_of_the_file(
    tmp_path: Path, in_file: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "net.pth", "pytorch1.2.0", prefix=False)
    about = import_with(tmp_path, file, given(*BOTH, in_file=in_file))
    assert (about["preprocess"]["mean"], about["preprocess"]["std"]) == (list(MINE["mean"]), list(MINE["std"]))
    assert about["original"]["normalisation"] == "given"
    said = capsys.readouterr().err
    assert "normalisation given: mean (0.5, 0.4, 0.3)" in said
    assert "otherwise it would be pytorch1.2.0: only files of" in said
    by_preset = import_with(tmp_path, file, GivenKeys(), "preset")  # a preset's value is not the user's
    assert by_preset["original"]["normalisation"] == "pytorch1.2.0"


def test_contradictory_normalisations_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "net.pth", "cl")
    with pytest.raises(UserError, match=r"preprocess\.std is given alone; give both preprocess\.mean"):
        import_with(tmp_path, file, given("preprocess.std"))
    with pytest.raises(UserError, match=r"--normalisation main and --set preprocess\.mean differ; give only one"):
        import_with(tmp_path, file, given(*BOTH), normalisation="main")
    about = import_with(tmp_path, file, given(*BOTH, in_file=True), normalisation="main")
    assert about["original"]["normalisation"] == "main"  # an option takes precedence over a file
    assert not (tmp_path / "runs/old/joint/multitask").exists()


def test_settings_of_the_user_are_used_at_import_or_refused(tmp_path: Path) -> None:
    """By its name the file has clips of 4 frames, by its layers 16 units."""
    file = write(tmp_path, CL)
    blocks = {"joint": {"sequence": {"mode": "clips", "frames": 6, "batch": 2}}, "temporal": {"head": {"hidden": 32}}}
    with pytest.raises(UserError, match=r"temporal\.head\.hidden=32 is given, but the file has 16; omit this setting"):
        import_with(tmp_path, file, given("joint.sequence.frames", "temporal.head.hidden"), blocks=blocks)
    assert import_with(tmp_path, file, given("joint.sequence.frames"), blocks=blocks)["frames"] == 6
    assert import_with(tmp_path, file, GivenKeys(), "plain", blocks=blocks)["frames"] == 4


def test_a_given_normalisation_is_never_overruled_when_a_net_is_used(tmp_path: Path) -> None:
    run = bring_in(tmp_path, write(tmp_path, CL))
    config = settings(tmp_path, preprocess=MINE)
    for use in (
        lambda said: joint_net(config, run, given=said),
        lambda said: import_original(
            config, tmp_path / "runs/new", ImportRequest(mapping_alone(tmp_path), into=run, given=said)
        ),
    ):
        with pytest.raises(UserError) as error:
            use(given(*BOTH))
        assert "preprocess.mean=[0.5, 0.4, 0.3], preprocess.std=[0.25, 0.24, 0.23] given, but this net takes" in str(
            error.value
        )
        assert str(error.value).endswith("leave it out, or import or train the net with it under another --name")
    assert joint_net(config, run).config.preprocess.mean == (0.3456, 0.2281, 0.2233)  # a preset's values are overridden


def mapping_alone(folder: Path) -> Path:
    torch.save({"weight": torch.zeros(7, 16), "bias": torch.zeros(7)}, folder / "mapping.pth")
    return folder / "mapping.pth"


@pytest.mark.parametrize(
    "variant", [name if name in ("cl", "phase") else pytest.param(name, marks=pytest.mark.slow) for name in LINEAR]
)
def test_export_and_import_are_inverse(tmp_path: Path, variant: str) -> None:
    file = write(tmp_path, "net.pth", variant, prefix=variant not in ("tool", "pytorch1.2.0"))
    order = None if variant == "tool" else "tf-cholec80"
    run = bring_in(tmp_path, file, order=order)
    written = export_original(settings(tmp_path), run, tmp_path / "out", order)
    assert written == tmp_path / "out/net.pth"
    state, back = load_external_state(file), load_external_state(written)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    with pytest.raises(UserError, match=r"net\.pth: exists; choose another folder"):
        export_original(settings(tmp_path), run, tmp_path / "out", order)
    again = bring_in(tmp_path, written, "again", order=order)
    one, two = (load_checkpoint(joint_checkpoint(path)) for path in (run, again))
    assert one["preprocess"] == two["preprocess"]
    tensors = {name: value for name, value in one["model"].items() if isinstance(value, Tensor)}
    assert all(torch.equal(value, two["model"][name]) for name, value in tensors.items())


def test_export_in_another_phase_order_only_permutes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = bring_in(tmp_path, write(tmp_path, CL))
    with pytest.raises(UserError, match="--phase-order"):
        export_original(settings(tmp_path), run, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    file = export_original(settings(tmp_path), run, tmp_path / "out", "tf-cholec80", prefix=False)
    assert "6 GallbladderPackaging" in capsys.readouterr().err
    old, new = load_external_state(tmp_path / CL), load_external_state(file)
    moved = {name for name, value in new.items() if not torch.equal(value, old[f"module.{name}"])}
    assert moved == {"fc.weight", "fc.bias"}
    assert torch.equal(new["fc.bias"], old["module.fc.bias"][[0, 1, 2, 3, 6, 5, 4]])
