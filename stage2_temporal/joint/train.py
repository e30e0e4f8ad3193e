"""Training of the joint net in up to three steps, each of which can be resumed.

`train_step` is the loop; it runs once per step of the schedule (Jin et al. 2020, section 3.3). The step `multitask`
trains both tasks. If the net has a mapping, `mapping` then trains the mapping alone, with everything else frozen, and
`correlation` trains everything with the correlation loss. Each step starts from the best epoch of the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.load import differences
from configs.schema import JOINT_FOLDER, TEMPORAL_FOLDER, Config, JointStepConfig
from engine.checkpoints import load_checkpoint
from engine.device import choose_device, choose_precision, make_accelerator, say_few_cores, seed_everything, start_stage
from engine.files import sha256_file
from engine.memory import needs_gpu_memory
from engine.processes import Processes, join
from engine.progress import say
from engine.runs import ABSENT, BEST_FILE, StageFolder, StageIdentity, settings_without
from engine.session import TrainingSession
from engine.stopping import StopRequest
from engine.training_result import Choices, TrainingResult, deciding_score, result_on_frames
from evaluation.metrics.phases import majority_phase
from evaluation.metrics.tools import pooled_map
from features.dataset.catalogue import say_left_out
from features.dataset.index import Dataset, Index
from features.dataset.labels import sampled_labels, unlabelled_note
from features.dataset.trained_on import inherited_from, record_training
from features.frames.settings_match import say_frames_note
from features.frames.training_cache import cache_readable, frames_identity, recorded_faults
from features.video_labels import VideoLabels
from stage1_cnn.data import (
    ClipDataset,
    FrameLoader,
    LabelledFrames,
    choose_workers,
    labelled_frames,
    require_training_videos,
)
from stage1_cnn.encoders.backbone import (
    Backbone,
    build_backbone,
    freeze_batch_norm,
    freeze_until,
    initial_backbone,
    require_image_size,
)
from stage1_cnn.encoders.pretrained import best_checkpoint, weights_folders, weights_identity
from stage1_cnn.model import parameter_groups, synchronise_batch_norm, weights_sha256
from stage2_temporal.heads.base import detach_state, first_rows
from stage2_temporal.joint.data import clip_requests, spans_of
from stage2_temporal.joint.loss import JointLoss
from stage2_temporal.joint.net import (
    STEPS,
    JointAbout,
    JointNet,
    attach_cnn,
    attach_joint,
    attach_temporal,
    build_joint,
    joint_checkpoint,
)
from stage2_temporal.joint.predict import Prediction, gap_nats, phase_accuracy, predict_videos

SCORES = {
    "val_accuracy": "validation accuracy",
    "val_map": "validation mAP",
    "val_map_mapped": "validation mAP of the mapped tools",
    "val_gap_nats": "gap in nats",
}


@dataclass(frozen=True)
class Start:
    """The runs from which initial weights are taken: those of the two stages, or that of a joint net.

    Parts without such a run start from `cnn.weights` and random weights.
    """

    cnn: Path | None = None
    temporal: Path | None = None
    joint: Path | None = None

    def __post_init__(self) -> None:
        if self.joint and (self.cnn or self.temporal):
            raise UserError("--from-joint sets every branch and cannot be combined with --from-cnn or --from-temporal")

    def files(self) -> dict[str, Path]:
        """The checkpoint of each run. Raises UserError naming one that does not exist."""
        found = {
            "cnn": self.cnn and best_checkpoint(self.cnn),
            "temporal": self.temporal and self.temporal / TEMPORAL_FOLDER / BEST_FILE,
            "joint": self.joint and joint_checkpoint(self.joint),
        }
        files = {name: path for name, path in found.items() if path is not None}
        for path in files.values():
            if not path.is_file():
                raise UserError(f"{path}: no such checkpoint; name a finished run")
        return files


@dataclass(frozen=True)
class JointData:
    """The training frames, and the validation videos that decide which epoch is the best."""

    train: LabelledFrames
    val: dict[str, VideoLabels]
    dataset: Dataset


def train_joint(
    config: Config, run: Path, dataset: Dataset, stop: StopRequest, start: Start, *, trusted: bool = False
) -> TrainingResult:
    """Train every step of the schedule, write `RUN/joint/<step>/`, and return the result of the last step.

    Finished steps are not repeated, and an unfinished one resumes where it stopped. Videos that cannot be read are left
    out, reported, and listed in the result as `left_out`. Raises UserError for settings, labels or checkpoints that do
    not fit. When asked to stop, saves everything and raises Stopped.
    """
    if len(config.data.tracks) > 1:
        asked = ", ".join(config.data.tracks)
        raise UserError(f"data.tracks={asked}: the joint net recognises the phases only; set data.tracks=[phases]")
    processes = join(config.device, stop)
    files = start.files()
    _require_effect(config)
    dataset = dataset.without(recorded_faults(run / JOINT_FOLDER / STEPS[0], dataset.index))
    dataset.index.require_videos("train", "val")
    seed_everything(config.seed)
    net = processes.each(lambda: initial_net(config, dataset.index, start, trusted=trusted))
    require_image_size(net.backbone, config.preprocess.crop_px)
    data = processes.each(lambda: _load(config, dataset))
    starts = [path.parent for path in files.values()]
    if not (start.cnn or start.joint):
        starts += weights_folders(config.cnn, config.runs)
    inherited = processes.each(lambda: inherited_from(starts, dataset.index, config.data.allow_overlap))
    stages = _stages(config, run, dataset.index, files)
    processes.from_first(lambda: require_precisions(config, stages))
    waiting = processes.from_first(lambda: [stage for stage in stages.values() if stage.result is None])
    if waiting:
        say_frames_note(config)
        say_few_cores(choose_device(config.device))
        processes.from_first(waiting[0].check)
        readable = cache_readable(config, dataset, processes)
        if readable != dataset:
            stages = _stages(config, run, readable.index, files)
            data = processes.each(lambda: _load(config, readable))
    say_left_out(data.dataset.index)
    for step, settings in schedule(config).items():
        stage = stages[step]
        finished = processes.from_first(stage.begin)
        if finished is None:
            processes.from_first(partial(record_training, stage.path, inherited, data.dataset.index))
            say(f"== {step}: {settings.epochs} epochs")
            train_step(stage.path, step, net, config, data, processes)
            result = processes.from_first(partial(_finish, stage, step, config, data, net))
        else:
            say(f"{stage.path}: finished before with these settings, nothing to do")
            result = TrainingResult.from_json(finished)
        net.load_state_dict(load_checkpoint(stage.path / BEST_FILE)["model"])
    return replace(result, left_out=data.dataset.index.left_out_records())


def require_precisions(config: Config, stages: Mapping[str, StageFolder] | None = None) -> None:
    """Raise UserError if the device does not support a step's precision; called before the first step is trained.

    Steps that are finished in `stages` are not checked.
    """
    device = choose_device(config.device)
    for step, settings in schedule(config).items():
        if stages is None or stages[step].result is None:
            choose_precision(f"joint.{step}.precision", settings.precision, device, training=True)


def schedule(config: Config) -> dict[str, JointStepConfig]:
    """The training steps in the settings, in order."""
    joint = config.joint
    steps = zip(STEPS, (joint.multitask, joint.mapping, joint.correlation), strict=True)
    return {name: settings for name, settings in steps if settings is not None}


def initial_net(config: Config, index: Index, start: Start, *, trusted: bool = False) -> JointNet:
    """The net before the first update: with `cnn.weights`, new branches, and then the weights that `start` names."""
    spec, head = index.dataset, config.temporal.head
    if config.joint.net.tasks != "phase" and not spec.tools:
        raise UserError(f"joint.net.tasks={config.joint.net.tasks}: the data set has no tools; set tasks to phase")
    backbone = first_backbone(config, start, trusted=trusted)
    net = build_joint(backbone, config.joint.net, head, len(spec.tools), len(spec.phases))
    if start.joint:
        path = joint_checkpoint(start.joint)
        about = attach_joint(net, path, spec.tools, spec.phases, head)
        changed = differences(about.preprocess.model_dump(mode="json"), config.preprocess.model_dump(mode="json"))
        if changed:
            say(f"note: {path} was trained on frames preprocessed differently (preprocess: {'; '.join(changed)})")
    encoder_sha256 = attach_cnn(net, start.cnn, spec.tools) if start.cnn else weights_sha256(net.backbone)
    if start.temporal:
        attach_temporal(net, start.temporal, spec.phases, head, encoder_sha256)
    net.gradient_checkpointing = config.joint.gradient_checkpointing
    if config.joint.freeze_batch_norm:
        freeze_batch_norm(net.backbone)
    if config.cnn.freeze_until is not None:
        freeze_until(net.backbone, config.cnn.freeze_until)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def first_backbone(config: Config, start: Start, *, trusted: bool = False) -> Backbone:
    """The backbone with `cnn.weights`, or with random weights (which need no file) if `start` replaces them anyway."""
    if start.cnn or start.joint:
        return build_backbone(config.cnn.backbone, "random", config.seed)
    return initial_backbone(config, trusted=trusted)


def _require_effect(config: Config) -> None:
    mode = config.joint.sequence.mode
    if config.joint.clips_per_epoch is not None and mode != "clips":
        raise UserError(
            f"joint.clips_per_epoch={config.joint.clips_per_epoch}: has no effect with joint.sequence.mode={mode}, "
            "which takes every frame; set it to null, or joint.sequence.mode=clips"
        )


def _load(config: Config, dataset: Dataset) -> JointData:
    index = dataset.index
    require_training_videos(config, index)
    train = labelled_frames(config, dataset, index.by_split("train"), with_phases=True, every_frame=True)
    tasks = config.joint.net.tasks
    for task, labels in (("tool", train.tools), ("phase", train.phase)):
        if tasks in (task, "both") and not (labels >= 0).any():
            raise UserError(f"{config.data.index}: no training frame has a {task} label; set joint.net.tasks")
    phases = {name: train.phase[train.video == number] for number, name in enumerate(train.videos)}
    if tasks != "tool":
        for note in unlabelled_note(phases, "do not count in train"):
            say(note)
    val = {entry.id: sampled_labels(dataset, entry, config.data) for entry in index.by_split("val")}
    if not val:
        say("no validation videos: every epoch is trained, and the last one counts as the best")
    return JointData(train, val, dataset)


def leaves_unused(config: Config, step: str) -> bool:
    """Whether a step trains parameters on which its loss does not depend; these can only be those of the mapping.

    DistributedDataParallel must then search the graph after every forward pass, which costs time.
    """
    joint, settings = config.joint, schedule(config)[step]
    if not joint.net.mapping or settings.freeze_mapping or step == "mapping":
        return False
    return step == "multitask" or joint.loss.detach == "mapped" or joint.loss.alpha == 0


# ---------------------------------------------------------------------------------------------- the loop


@needs_gpu_memory(
    "joint.sequence.batch and raise joint.accumulate_steps as much, or set joint.gradient_checkpointing=true"
)
def train_step(
    folder: Path,
    step: str,
    net: JointNet,
    config: Config,
    data: JointData,
    processes: Processes,
) -> None:
    """The training loop of one step (`multitask`, `mapping` or `correlation`).

    It writes `best.pt`, `last.pt` and `metrics.jsonl` into `folder`.
    """
    joint, settings, spans = config.joint, schedule(config)[step], spans_of(data.train)
    seed_everything(config.seed)
    name = f"joint.{step}.precision"
    accelerator, precision = make_accelerator(config.device, settings.precision, name, leaves_unused(config, step))
    device = accelerator.device
    loaders = choose_workers(joint.workers, device)
    start_stage(f"train-joint, {step}", config, device, precision, f"{loaders} loader process(es)")
    if joint.sync_batch_norm:
        synchronise_batch_norm(net, processes, device)
    net.train_only("mapping" if step == "mapping" else "all", freeze_mapping=settings.freeze_mapping)
    about = JointAbout.of(net, config.temporal.head, config, data.dataset.spec, step)
    groups = parameter_groups(net, settings.backbone_lr_factor, "branches", config.cnn.layer_lr_decay)
    session = TrainingSession(
        folder, accelerator, net, groups, settings, about.to_json(), processes, joint.accumulate_steps
    )
    session.resume()
    criterion, phase = JointLoss(joint.loss, step, processes.total), net.phase
    dataset = ClipDataset({"train": data.train}, config.preprocess.crop_px, joint.augment, config.seed)
    with FrameLoader(dataset, joint.workers, device, processes.stop) as loader:
        for epoch in session.epochs():
            whole = clip_requests(spans, joint.sequence, config.seed, epoch, joint.clips_per_epoch)
            requests = [request.share(processes.rank, processes.count) for request in whole]
            for batch in session.batches(loader.batches(requests[session.position.step :]), len(requests)):
                labels = batch.labels(device)  # (B, T), (B, T, K)
                state = None if batch.fresh or phase is None else first_rows(phase.carried, len(batch.first))
                with session.gradient_sync():
                    with session.autocast():
                        images = batch.inputs(config.preprocess, device).unflatten(0, batch.phase.shape)
                        output = session.model(images, state, batch.lengths)
                        loss = criterion(output, *labels, batch.lengths * batch.counts)
                    if phase is not None:
                        keeps_state = joint.sequence.mode == "chunked" and batch.counts
                        phase.carried = detach_state(output.state) if keeps_state else ()
                    session.update(loss, data.train.start_of(batch))
            if phase is not None:
                phase.carried = ()
            scores = validate(session.evaluated, config, data, session)
            session.finish_epoch(scores, score=deciding_score(scores, choices(step))[1])


# ---------------------------------------------------------------------------------------------- validation


def validate(net: JointNet, config: Config, data: JointData, session: TrainingSession) -> dict[str, float | None]:
    """Scores on whole validation videos, with the inference that `joint.sequence.inference` names."""
    if not data.val:
        return {}
    sequence = config.joint.sequence
    mine = session.processes.share([data.dataset.index.entry(name) for name in data.val])
    parts = session.validate(
        lambda: predict_videos(
            net,
            config,
            data.dataset,
            mine,
            inference=sequence.inference,
            frames=sequence.frames,
            check_stop=session.stop_if_asked,
            autocast=session.autocast,
        )
    )
    together = {name: one for part in parts for name, one in part.items()}
    found = {name: together[name] for name in data.val}
    return score_videos(net, data.val, found, data.dataset.spec.tools)


def score_videos(
    net: JointNet, videos: Mapping[str, VideoLabels], found: Mapping[str, Prediction], tools: Sequence[str]
) -> dict[str, float | None]:
    """The validation scores, those for which the net has the branches.

    The scores are phase accuracy, pooled tool mAP and pooled mAP of the mapped tools, as fractions, and `gap_nats`
    between tool branch and mapped tools.
    """
    truth = {name: video.tools for name, video in videos.items()}
    scores: dict[str, float | None] = {}
    if net.phase is not None:
        scores["val_accuracy"] = phase_accuracy(videos, found)
    if net.tool_head is not None:
        scores["val_map"] = pooled_map(truth, {name: one.tools for name, one in found.items()}, tools)
    if net.mapping is not None:
        scores["val_map_mapped"] = pooled_map(truth, {name: one.mapped for name, one in found.items()}, tools)
        scores["val_gap_nats"] = gap_nats(found.values())
    return scores


def choices(step: str) -> Choices:
    """The scores that choose a step's best epoch (see `engine.training_result.deciding_score`).

    In the mapping step this is the mAP of the mapped tools, otherwise phase accuracy or tool mAP, or the mean of the
    two if the net has both.
    """
    return (("val_map_mapped",) if step == "mapping" else ("val_accuracy", "val_map"),)


# ---------------------------------------------------------------------------------------------- identity, result


def _stages(config: Config, run: Path, index: Index, files: Mapping[str, Path]) -> dict[str, StageFolder]:
    """The folder of each step.

    A step's identity includes the settings of the steps before it, and those of the correlation loss if it is used.
    """
    joint = config.joint
    common = {
        **frames_identity(config, index),
        "backbone": config.cnn.backbone,
        "weights": weights_identity(config.cnn, config.runs),
        "zero_init_residual": config.cnn.zero_init_residual,
        "freeze_until": config.cnn.freeze_until or ABSENT,
        "layer_lr_decay": config.cnn.layer_lr_decay if config.cnn.layer_lr_decay != 1 else ABSENT,
        "head": config.temporal.head.model_dump(mode="json"),
        "joint": settings_without(joint, "workers", *STEPS, "loss"),
        # the first release rounded `clips_per_epoch` up to whole batches
        "clips_counted": "exactly" if (joint.clips_per_epoch or 0) % joint.sequence.batch else ABSENT,
        "tool_weight": joint.loss.tool_weight,
        "phase_frames": joint.loss.phase_frames,
        "start": {name: sha256_file(path) for name, path in files.items()},
    }
    found: dict[str, StageFolder] = {}
    steps: dict[str, Any] = {}
    for step, settings in schedule(config).items():
        steps[step] = settings_without(settings, "checkpoint_minutes")
        loss = settings_without(joint.loss) if step == "correlation" else None
        identity = StageIdentity({**common, "steps": dict(steps), "correlation": loss})
        found[step] = StageFolder(run, f"{JOINT_FOLDER}/{step}", config, identity)
    return found


def _finish(stage: StageFolder, step: str, config: Config, data: JointData, net: JointNet) -> TrainingResult:
    """Write the result of a step, which is taken from its best checkpoint and its log."""
    checkpoint = stage.path / BEST_FILE
    has_phases = net.phases and (data.train.phase >= 0).any()
    facts = {
        "train_frames": len(data.train),
        "train_videos": len(data.train.videos),
        "val_videos": len(data.val),
        "majority_phase": majority_phase([data.train.phase]) if has_phases else None,
        "backbone": config.cnn.backbone,
        "weights_sha256": weights_sha256(net),
        "checkpoint": str(checkpoint),
    }
    best = load_checkpoint(checkpoint)["scores"]
    return result_on_frames(stage.path, best, SCORES, choices(step), facts, step=step).write(stage)
