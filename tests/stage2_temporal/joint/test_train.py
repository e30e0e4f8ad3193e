"""Joint training: initialisation from two stages, the schedule, resuming, and extraction of features."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from configs.errors import UserError
from configs.head_settings import LstmHead
from configs.schema import CnnConfig, Config
from engine.checkpoints import load_checkpoint
from engine.logs import read_metrics
from engine.stopping import Stopped, StopRequest
from features.store_folder import load_feature_set
from live.nets import pair_of_stages
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.extract import extract
from stage1_cnn.train import train_cnn
from stage2_temporal.joint import train as joint_train
from stage2_temporal.joint.evaluate import evaluate_joint
from stage2_temporal.joint.loss import JointLoss
from stage2_temporal.joint.net import JointNet, build_joint, joint_checkpoint, load_joint
from stage2_temporal.joint.predict import embed_crops, predict_videos
from stage2_temporal.joint.start import start_weights
from stage2_temporal.joint.train import Start, initial_net, leaves_unused, train_joint
from stage2_temporal.model import PhaseModel
from stage2_temporal.predict import load_temporal, predict_phases
from stage2_temporal.train import train_temporal
from tests.onednn import cpu_with_bf16
from tests.stage1_cnn.material import SPEC, StopAfter, World, make_world, write_dataset

STEP = {"epochs": 1, "optim": {"name": "sgd", "lr": 0.01}, "backbone_lr_factor": 0.1, "precision": "fp32"}
JOINT: dict[str, Any] = {
    "sequence": {"mode": "clips", "frames": 4, "stride": 3, "batch": 2, "inference": "clip"},
    "multitask": STEP,
    "workers": 0,
}
CL = JOINT | {"net": {"tool_hidden": 8, "mapping": True}, "mapping": STEP | {"epochs": 2}, "correlation": STEP}
HEAD = {"name": "lstm", "hidden": 8}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As extraction computes: sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(world: World, joint: dict[str, Any], **more: Any) -> Config:
    tree = world.config.model_dump()
    tree["joint"] = joint
    tree["temporal"] |= {"head": HEAD, "epochs": 2, "precision": "fp32"}
    for block, values in more.items():
        tree[block] |= values
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Both stages trained under the name `first`, four tiny videos."""
    base = tmp_path_factory.mktemp("stages")
    world = make_world(base, write_dataset(base / "data"))
    config, index = settings(world, JOINT, cnn={"epochs": 1}), world.index()
    train_cnn(config, world.run, world.dataset(index), StopRequest())
    report = extract(config, world.run, world.dataset(index), stop=StopRequest())
    train_temporal(config, world.run, report.folder, StopRequest())
    return replace(world, config=config)


def joint(world: World, config: Config, name: str, stop: StopRequest | None = None, **start: Path) -> Path:
    run = world.config.runs / name
    train_joint(config, run, world.dataset(), StopRequest() if stop is None else stop, Start(**start))
    return run


def tensors(path: Path) -> dict[str, torch.Tensor]:
    model = load_checkpoint(path)["model"]
    return {name: value for name, value in model.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("inference", ["carried", "clip"])
def test_before_the_first_update_it_is_stage_one_followed_by_stage_two(
    stages: World, inference: Any, one_thread: None
) -> None:
    index, config = stages.index(), stages.config
    net = initial_net(config, index, Start(cnn=stages.run, temporal=stages.run)).eval()
    found = predict_videos(
        net, config, stages.dataset(index), index.videos, inference=inference, frames=4, check_stop=lambda: None
    )
    folder = extract(config, stages.run, stages.dataset(index), stop=StopRequest()).folder  # float32 features
    features = load_feature_set(folder, [entry.id for entry in index.videos])
    model, _ = load_temporal(stages.run / "temporal")
    phases = predict_phases(model, features, inference, 4)
    for name, video in features.items():
        assert np.abs(found[name].tools - video.tool_logits).max() < 1e-5  # type: ignore[operator]
        assert np.abs(found[name].phase - phases[name]).max() < 1e-5  # type: ignore[operator]


@pytest.mark.slow
def test_frames_that_other_processes_decode_give_the_same_numbers(
    stages: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; with ten crops, an unreadable video, and a request to stop."""
    index = stages.index()
    broken = index.videos[1].model_copy(update={"source": "videos/missing.mp4"})
    index = index.model_copy(update={"videos": (index.videos[0], broken, *index.videos[2:])})
    net = initial_net(stages.config, index, Start(cnn=stages.run, temporal=stages.run))

    def predicted(choice: str, check_stop: Any = lambda: None) -> tuple[Any, list[tuple[str, str]]]:
        more = {"extract": {"decode_ahead": choice, "workers": 2}, "cache": {"use_for_extract": False}}
        config, faults = settings(stages, JOINT | {"crops": "ten"}, **more), list[tuple[str, str]]()
        way = {"inference": "carried", "frames": 4, "check_stop": check_stop, "faults": faults}
        return predict_videos(net, config, stages.dataset(index), index.videos, **way), faults

    here, faults = predicted("off")
    ahead, faults_ahead = predicted("on")
    assert faults_ahead == faults
    assert [name for name, _ in faults] == [broken.id]
    assert list(ahead) == list(here) == [entry.id for entry in index.videos if entry is not broken]
    for name, one in here.items():
        assert np.array_equal(one.phase, ahead[name].phase)
        assert np.array_equal(one.tools, ahead[name].tools)
    assert net.training
    with pytest.raises(Stopped):
        predicted("on", StopAfter(3).raise_if_set)
    assert not multiprocessing.active_children()


def test_the_schedule_finishes_and_the_mapping_step_trains_only_the_mapping(stages: World) -> None:
    run = joint(stages, settings(stages, CL), "cl")
    before, mapped, after = (
        tensors(run / "joint" / step / "best.pt") for step in ("multitask", "mapping", "correlation")
    )
    moved = {name for name in before if not torch.equal(before[name], mapped[name])}
    assert moved == {"mapping.weight", "mapping.bias"}
    last_before, last_mapped = (tensors(run / "joint" / step / "last.pt") for step in ("multitask", "mapping"))
    assert {n for n in last_before if not torch.equal(last_before[n], last_mapped[n])} == moved
    assert any(not torch.equal(mapped[name], after[name]) for name in mapped if name.startswith("backbone."))
    assert joint_checkpoint(run) == run / "joint" / "correlation" / "best.pt"
    net, about = load_joint(joint_checkpoint(run))
    assert about.step == "correlation"
    assert net.mapping is not None


def test_too_little_memory_on_a_gpu_names_the_settings(stages: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(JointNet, "forward", out_of_memory)
    with pytest.raises(UserError, match=r"lower joint\.sequence\.batch .*or set joint\.gradient_checkpointing=true"):
        joint(stages, settings(stages, JOINT), "full")
    monkeypatch.setattr(PhaseModel, "forward", out_of_memory)
    folder = extract(stages.config, stages.run, stages.dataset(), stop=StopRequest()).folder
    with pytest.raises(UserError, match=r"lower temporal\.sequence\.batch, or set temporal\.sequence\.mode=chunked"):
        train_temporal(stages.config, stages.config.runs / "full", folder, StopRequest())


@pytest.mark.slow
def test_every_step_computes_in_its_own_precision(stages: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later step trains the net that an earlier one has trained."""
    found: dict[str, set[torch.dtype]] = {"multitask": set(), "correlation": set()}
    branches, train_step = JointNet.branches, joint_train.train_step
    step = ""

    def noted(net: JointNet, x: torch.Tensor, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and step in found:
            found[step].add(x.dtype)
        return branches(net, x, *arguments)

    def named(folder: Path, name: str, *arguments: Any) -> None:
        nonlocal step
        step = name
        train_step(folder, name, *arguments)

    monkeypatch.setattr(JointNet, "branches", noted)
    monkeypatch.setattr(joint_train, "train_step", named)
    tcn = {"name": "tcn", "stages": 1, "layers": 1, "maps": 4}  # a CPU without bf16 has no LSTM in it
    schedule = CL | {"multitask": STEP | {"precision": "bf16"}}
    with cpu_with_bf16(True):
        joint(stages, settings(stages, schedule, temporal={"head": tcn}), "two precisions")
    assert found == {"multitask": {torch.bfloat16}, "correlation": {torch.float32}}


@pytest.mark.parametrize("step", ["multitask", "mapping", "correlation"])
def test_a_step_in_a_precision_that_is_not_computed_is_refused_before_the_first(stages: World, step: str) -> None:
    config = settings(stages, CL | {step: STEP | {"precision": "bf16"}})
    message = rf"^joint\.{step}\.precision=bf16: this CPU .* set joint\.{step}\.precision=fp32 or auto$"
    with cpu_with_bf16(False), pytest.raises(UserError, match=message):
        joint(stages, config, f"refused-{step}")
    assert not (stages.config.runs / f"refused-{step}").exists()


def test_frozen_layers_stay_through_all_steps(stages: World) -> None:
    """With gradient checkpointing, and with a learning rate per block."""
    frozen = {"freeze_until": "stage3", "layer_lr_decay": 0.5, "weights": "random"}
    joint_settings = CL | {"gradient_checkpointing": True}
    run = joint(stages, settings(stages, joint_settings, cnn=frozen), "partly", cnn=stages.run)
    before, after = tensors(stages.run / "cnn/best.pt"), tensors(run / "joint/correlation/last.pt")
    changed = {
        name.split(".")[2]
        for name in before
        if name.startswith("backbone.") and not torch.equal(before[name], after[name])
    }
    assert changed == {"stage4", "conv5"}
    rates = next(iter(read_metrics(run / "joint/multitask/metrics.jsonl", "epoch")))
    assert rates["lr_backbone.stage4.3"] == pytest.approx(0.5 * rates["lr_backbone.conv5.0"])
    with pytest.raises(UserError, match=r"freeze_until"):
        joint(
            stages, settings(stages, joint_settings, cnn=frozen | {"freeze_until": "stage2"}), "partly", cnn=stages.run
        )


def test_a_frozen_mapping_stays_through_the_correlation_step(stages: World) -> None:
    config = settings(stages, CL | {"correlation": STEP | {"freeze_mapping": True}})
    run = joint(stages, config, "kept")
    mapped, after = (tensors(run / "joint" / step / "best.pt") for step in ("mapping", "correlation"))
    assert torch.equal(mapped["mapping.weight"], after["mapping.weight"])
    assert not torch.equal(mapped["phase.head.fc.weight"], after["phase.head.fc.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["clips", "chunked"])
def test_stopped_anywhere_and_started_again_it_ends_the_same(stages: World, mode: str) -> None:
    # 13 frames per video: chunks of 4 would end in batches of two frames, on which batch norm may diverge by chance
    sequence = JOINT["sequence"] | {"mode": mode, "inference": "carried", "frames": 5}
    average = {"multitask": CL["multitask"] | {"ema_decay": 0.9}} if mode == "chunked" else {}
    config = settings(stages, CL | {"sequence": sequence} | average)
    whole = joint(stages, config, f"whole-{mode}")
    run = stages.config.runs / f"pieces-{mode}"
    starts = 0
    while True:
        starts += 1
        try:
            joint(stages, config, run.name, StopAfter(12))  # more often than validation polls
            break
        except Stopped:
            assert starts < 60
    assert starts > 3
    for step in ("multitask", "mapping", "correlation"):
        one, two = (tensors(path / "joint" / step / "last.pt") for path in (whole, run))
        assert all(torch.equal(one[name], two[name]) for name in one), step


@pytest.mark.parametrize("tasks", ["tool", "phase"])
def test_single_task_nets_train_and_evaluate(stages: World, tasks: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(stages, JOINT | {"net": {"tasks": tasks}, "crops": "five"})
    run = joint(stages, config, tasks)
    evaluation = evaluate_joint(config, run, stages.dataset(), stop=StopRequest())
    assert (evaluation.tools is not None) == (tasks == "tool")
    assert bool(evaluation.phases.get("temporal")) == (tasks == "phase")
    assert (run / "evaluate" / "test-five" / "metrics.json").exists()
    assert not (run / "summary.json").exists()  # not the usual way of evaluating


def test_training_lowers_the_loss_and_carried_state_and_checkpointing_work(stages: World) -> None:
    from engine.logs import read_metrics

    step = STEP | {"epochs": 10, "optim": {"name": "adamw", "lr": 0.003}, "backbone_lr_factor": 1.0}
    sequence = {"mode": "chunked", "frames": 5, "batch": 2, "inference": "carried"}
    config = settings(stages, JOINT | {"sequence": sequence, "multitask": step, "gradient_checkpointing": True})
    run = joint(stages, config, "learns")
    losses = [row["loss"] for row in read_metrics(run / "joint/multitask/metrics.jsonl", "epoch")]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]  # of several epochs, since sums differ from machine to machine


def test_features_of_the_joint_backbone_and_a_head_that_starts_from_its_lstm(stages: World) -> None:
    config, index = settings(stages, JOINT), stages.index()
    run = joint(stages, config, "back", cnn=stages.run, temporal=stages.run)
    path = joint_checkpoint(run)
    tree = config.model_dump()
    tree["extract"]["checkpoint"] = tree["temporal"]["start_from"] = path
    again = Config.model_validate(tree)
    folder = extract(again, run, stages.dataset(index), stop=StopRequest()).folder
    assert folder != extract(config, stages.run, stages.dataset(index), stop=StopRequest()).folder
    net, _ = load_joint(path)
    entry = index.videos[0]
    from features.dataset.sampling import sampled_frames
    from features.frames.source import open_frames

    with open_frames(config, stages.dataset(index), entry, sampled_frames(entry, config.data.fps)) as sampled:
        pixels = np.stack(list(sampled.frames))
    expected = embed_crops(net, pixels, config.preprocess, "centre", 0, torch.no_grad)[0].numpy()
    found = load_feature_set(folder, [entry.id])[entry.id]
    assert np.abs(found.features - expected).max() < 1e-4 * np.abs(expected).max()
    result = train_temporal(again, run, folder, StopRequest(), start=start_weights(again))
    assert result.epochs == 2
    (stages.run.parent / "tiny-set.yaml").write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    tree["data"]["dataset"] = str(stages.run.parent / "tiny-set.yaml")
    pair_of_stages(Config.model_validate(tree), run)  # what `predict --from-joint back` asks for
    tree["extract"]["checkpoint"] = None
    with pytest.raises(UserError, match=r"run train-cnn .* add --model joint to .* --from-joint back$"):
        pair_of_stages(Config.model_validate(tree), run)
    with pytest.raises(UserError, match="its head differs"):
        other = settings(stages, JOINT, temporal={"head": HEAD | {"hidden": 9}, "start_from": path})
        train_temporal(other, stages.config.runs / "other", folder, StopRequest(), start=start_weights(other))


def test_an_evaluation_records_its_inference(stages: World) -> None:
    config = settings(stages, CL)
    run = joint(stages, config, "cl")  # finished above, or trained now
    evaluation = evaluate_joint(config, run, stages.dataset(), stop=StopRequest())
    carried = evaluate_joint(config, run, stages.dataset(), inference="carried", stop=StopRequest())
    assert (evaluation.joint.inference, carried.joint.inference) == ("clip", "carried")
    assert evaluation.joint.mapped_tools.map_pooled is not None
    assert evaluation.joint.gap_nats > 0
    assert (run / "evaluate/test/predictions/video04.csv").exists()
    assert (run / "evaluate/test-carried/metrics.json").exists()
    with pytest.raises(UserError, match=r"set data\.fps=5"):
        slower = settings(stages, CL, data={"fps": 1.0})
        evaluate_joint(slower, run, stages.dataset(), stop=StopRequest())


def test_another_index_in_the_settings_leaves_the_run_s_own_evaluation_alone(stages: World) -> None:
    run = joint(stages, settings(stages, JOINT), "own")
    index, turned = stages.index(), {"train": "val", "val": "train"}
    videos = tuple(v.model_copy(update={"split": turned.get(v.split, v.split)}) for v in index.videos)
    other = settings(stages, JOINT, data={"index": Path("b.json"), "allow_overlap": True})  # two files are equal
    evaluate_joint(other, run, stages.dataset(index.model_copy(update={"videos": videos})), stop=StopRequest())
    assert [path.name for path in (run / "evaluate").iterdir()] == ["b-test"]
    assert not (run / "summary.json").exists()
    evaluate_joint(other, run, stages.dataset(index), stop=StopRequest())  # the same videos in another file
    assert (run / "summary.json").exists()


def test_runs_that_do_not_fit_are_refused(stages: World) -> None:
    index = stages.index()
    config = settings(stages, JOINT)
    with pytest.raises(UserError, match="its head differs"):
        other = settings(stages, JOINT, temporal={"head": HEAD | {"hidden": 9}})
        initial_net(other, index, Start(temporal=stages.run))
    with pytest.raises(UserError, match="holds shufflenet_v2_x0_5, but"):
        other = settings(stages, JOINT, cnn={"backbone": "mobilenet_v3_small"})
        initial_net(other, index, Start(cnn=stages.run))
    with pytest.raises(UserError, match="no such checkpoint"):
        Start(temporal=stages.config.runs / "nowhere").files()
    with pytest.raises(UserError, match="cannot be combined with --from-cnn"):
        Start(cnn=stages.run, joint=stages.run)
    with pytest.raises(UserError, match="other settings"):
        joint(stages, config, "named")
        joint(stages, settings(stages, JOINT | {"multitask": STEP | {"epochs": 2}}), "named")


def test_a_number_of_clips_where_there_are_no_clips_is_refused(stages: World) -> None:
    chunks = {"sequence": {"mode": "chunked", "frames": 4, "batch": 2}, "clips_per_epoch": 3}
    with pytest.raises(UserError, match=r"clips_per_epoch=3: has no effect with .*mode=chunked, .*mode=clips$"):
        joint(stages, settings(stages, JOINT | chunks), "counted")
    assert not (stages.config.runs / "counted").exists()


def test_a_net_that_comes_from_a_run_needs_no_downloaded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise AssertionError("asked for weights that the run replaces")

    monkeypatch.setattr(joint_train, "initial_backbone", no_network)
    config = Config(cnn=CnnConfig(backbone="resnet18", weights="imagenet"))
    for start in (Start(cnn=Path("one")), Start(joint=Path("other"))):
        assert joint_train.first_backbone(config, start).name == "resnet18"


@pytest.mark.parametrize("step", ["multitask", "mapping", "correlation"])
@pytest.mark.parametrize("detach", ["none", "mapped", "branch"])
@pytest.mark.parametrize(
    ("mapping", "freeze", "alpha"), [(False, False, 1), (True, False, 1), (True, True, 1), (True, False, 0)]
)
def test_parameters_without_a_gradient_are_known_before(
    step: str, detach: str, mapping: bool, freeze: bool, alpha: float
) -> None:
    """Several processes search for them where there are some, and nowhere else."""
    if not mapping and step != "multitask":
        return
    settings = {"epochs": 1, "freeze_mapping": freeze and step != "mapping"}
    steps = {name: settings for name in ("multitask", "mapping", "correlation") if mapping or name == "multitask"}
    loss = {"detach": detach, "alpha": alpha}
    config = Config.model_validate({"joint": {"net": {"mapping": mapping}, "loss": loss, **steps}})
    net = build_joint(build_backbone("shufflenet_v2_x0_5", "random", 0), config.joint.net, LstmHead(hidden=6), 3, 4)
    net.train_only("mapping" if step == "mapping" else "all", freeze_mapping=settings["freeze_mapping"])
    output = net(torch.randn(2, 3, 3, 32, 32))
    lengths = torch.tensor([3, 3])
    labels = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 3)
    JointLoss(config.joint.loss, step)(output, *labels, lengths).backward()
    without = [name for name, one in net.named_parameters() if one.requires_grad and one.grad is None]
    assert bool(without) == leaves_unused(config, step), without
