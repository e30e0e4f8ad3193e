"""Stage one: train a net to recognise the tools (and, with `cnn.phase_head`, the phase) in single frames.

`train_net` is the loop. The loss is `stage1_cnn.loss.FrameLoss`. The best epoch is the one with the highest mAP on the
validation videos, computed over all their frames together (`evaluation.metrics.tools.pooled_map`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.schema import CNN_FOLDER, CnnConfig, Config
from engine.device import make_accelerator, say_few_cores, seed_everything, start_stage
from engine.memory import needs_gpu_memory
from engine.processes import Processes, join
from engine.progress import progress_bar, say
from engine.runs import BEST_FILE, StageFolder, StageIdentity, settings_without
from engine.session import TrainingSession
from engine.stopping import StopRequest
from engine.training_result import TrainingResult, deciding_score, result_on_frames
from evaluation.metrics.tools import pooled_map
from features.dataset.catalogue import say_left_out
from features.dataset.index import Dataset, Index
from features.dataset.sampling import sampled_frames
from features.dataset.trained_on import inherited_from, record_training
from features.frames.settings_match import say_frames_note
from features.frames.training_cache import cache_readable, frames_identity, recorded_faults
from stage1_cnn.data import (
    ClipDataset,
    FrameLoader,
    LabelledFrames,
    choose_workers,
    labelled_frames,
    require_training_videos,
    training_requests,
    validation_requests,
)
from stage1_cnn.encoders.backbone import require_image_size
from stage1_cnn.encoders.pretrained import settled_weights, weights_folders, weights_identity
from stage1_cnn.loss import FrameLoss
from stage1_cnn.model import (
    CnnAbout,
    ToolNet,
    build_net,
    parameter_groups,
    rebuild_from_checkpoint,
    synchronise_batch_norm,
    weights_sha256,
)

SCORES = {"val_map": "validation mAP", "val_phase_accuracy": "validation phase accuracy"}
# The best epoch has the highest `val_map`; phase accuracy decides only if there is no `val_map`.
CHOICES = (("val_map",), ("val_phase_accuracy",))


@dataclass(frozen=True)
class FrameData:
    """The labelled training frames, and the labelled validation frames that decide which epoch is the best."""

    train: LabelledFrames
    val: LabelledFrames
    index: Index


def train_cnn(
    config: Config, run: Path, dataset: Dataset, stop: StopRequest, *, trusted: bool = False
) -> TrainingResult:
    """Train stage one, write `RUN/cnn/` (`best.pt`, `last.pt`, `metrics.jsonl`, `result.json`) and return the result.

    If the run is finished and has the same settings, its result is returned without any work. An unfinished run resumes
    where it stopped and ends with the same numbers as an uninterrupted one. Videos that cannot be read are left out,
    reported, and listed in the result as `left_out`. Raises UserError if settings, labels or frames do not allow
    training. When asked to stop, saves everything and raises Stopped.
    """
    cnn = config.cnn
    processes = join(config.device, stop)
    dataset = dataset.without(recorded_faults(run / CNN_FOLDER, dataset.index))
    index = dataset.index
    index.require_videos("train", "val")
    stage = StageFolder(run, CNN_FOLDER, config, identity(config, index))
    finished = processes.from_first(lambda: stage.result)
    if finished is not None:
        say(f"{stage.path}: finished before with these settings, nothing to do")
        say_left_out(index)
        return replace(TrainingResult.from_json(finished), left_out=index.left_out_records())

    seed_everything(config.seed)
    accelerator, precision = make_accelerator(config.device, cnn.precision, "cnn.precision")
    loaders = choose_workers(cnn.workers, accelerator.device)
    start_stage("train-cnn", config, accelerator.device, precision, f"{loaders} loader process(es)")
    say_frames_note(config)
    say_few_cores(accelerator.device)
    net = processes.each(lambda: build_net(config, dataset.spec, trusted=trusted))
    require_image_size(net.backbone, config.preprocess.crop_px)
    starts = weights_folders(cnn, config.runs)
    inherited = processes.each(lambda: inherited_from(starts, index, config.data.allow_overlap))
    # this line and the next find errors before hours of decoding
    data = processes.each(lambda: load_frames(config, dataset))
    processes.from_first(stage.check)
    readable = cache_readable(config, dataset, processes)
    if readable != dataset:
        stage = StageFolder(run, CNN_FOLDER, config, identity(config, readable.index))
        data = processes.each(lambda: load_frames(config, readable))
    say_left_out(readable.index)
    processes.from_first(stage.open)  # not earlier, so that settings that do not allow training leave no folder behind
    processes.from_first(lambda: record_training(stage.path, inherited, readable.index))
    if cnn.weights == "cached":
        say(f"initial weights: {settled_weights(cnn)} (cnn.weights=cached: published ones where this machine has them)")
    train_net(stage.path, net, config, data, accelerator, processes)
    return processes.from_first(lambda: _finish(stage, config, data, precision))


def identity(config: Config, index: Index) -> StageIdentity:
    """Everything that the result depends on: frames and labels (`frames_identity`), settings and initial weights."""
    return StageIdentity(
        {
            **frames_identity(config, index),
            "cnn": settings_without(config.cnn, "weights", "workers", "checkpoint_minutes"),
            "weights": weights_identity(config.cnn, config.runs),
        }
    )


def require_classes(cnn: CnnConfig, spec: DataSetSpec) -> None:
    """Raise UserError if the data set has nothing that the net could be trained on."""
    if not spec.tools and not cnn.phase_head:
        raise UserError(f"data set {spec.name} has no tools; set cnn.phase_head=true to train on phases")


def load_frames(config: Config, dataset: Dataset) -> FrameData:
    """The labelled training and validation frames, without decoding them.

    Raises UserError if there are no training videos, or if none of their frames has a label for one of the heads.
    """
    cnn, index = config.cnn, dataset.index
    require_training_videos(config, index)
    require_classes(cnn, dataset.spec)
    train, val = (labelled_frames(config, dataset, index.by_split(split), cnn.phase_head) for split in ("train", "val"))
    if not len(train):
        wanted = "tool or phase" if cnn.phase_head else "tool"
        hint = "" if cnn.phase_head else ", or set cnn.phase_head=true to train on phases"
        raise UserError(f"{config.data.index}: no training frame has a {wanted} label; add annotations{hint}")
    if not len(val):
        say("no labelled validation frames: every epoch is trained, and the last one counts as the best")
    sampled = sum(len(sampled_frames(entry, config.data.fps)) for entry in index.by_split("train"))
    if len(train) < sampled:
        say(f"note: {sampled - len(train):,} of {sampled:,} training frames have no label and are left out")
    return FrameData(train, val, index)


# ---------------------------------------------------------------------------------------------- the loop


@needs_gpu_memory("cnn.batch_frames and raise cnn.accumulate_steps as much")
def train_net(
    folder: Path,
    net: ToolNet,
    config: Config,
    data: FrameData,
    accelerator: Accelerator,
    processes: Processes,
) -> None:
    """The training loop of stage one; it writes `best.pt`, `last.pt` and `metrics.jsonl` into `folder`."""
    cnn, device, spec = config.cnn, accelerator.device, data.index.dataset
    criterion = FrameLoss(cnn, data.train, len(spec.phases), processes.total).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if cnn.sync_batch_norm:
        synchronise_batch_norm(net, processes, device)
    groups = parameter_groups(net, cnn.backbone_lr_factor, layer_lr_decay=cnn.layer_lr_decay)
    about = CnnAbout.of(net, spec).to_json()
    session = TrainingSession(folder, accelerator, net, groups, cnn, about, processes, cnn.accumulate_steps)
    session.resume()
    dataset = ClipDataset({"train": data.train, "val": data.val}, config.preprocess.crop_px, cnn.augment, config.seed)
    with FrameLoader(dataset, cnn.workers, device, processes.stop) as loader:
        for epoch in session.epochs():
            whole = training_requests(config.seed, epoch, len(data.train), cnn.batch_frames, cnn.frames_per_epoch)
            requests = [request.share(processes.rank, processes.count, smallest=2) for request in whole]
            for batch in session.batches(loader.batches(requests[session.position.step :]), len(requests)):
                phase, tools = batch.labels(device)  # (N, 1), (N, 1, K): a frame is a clip of length 1
                with session.gradient_sync():
                    with session.autocast():
                        output = session.model(batch.inputs(config.preprocess, device))
                        loss = criterion(output, phase.squeeze(1), tools.squeeze(1))
                    session.update(loss, data.train.start_of(batch))
            scores = validate(session, loader, data, config)
            session.finish_epoch(scores, score=deciding_score(scores, CHOICES)[1])


# ---------------------------------------------------------------------------------------------- validation


def validate(session: TrainingSession, loader: FrameLoader, data: FrameData, config: Config) -> dict[str, float | None]:
    """Scores on centre crops of the validation videos: tool mAP and, with a phase head, phase accuracy, as fractions.

    A score is None if there are no validation videos or no labels for it; the mAP also if no tool ever appears.
    """
    val, tools = data.val, data.index.dataset.tools
    scores: dict[str, float | None] = {"val_map": None}
    if session.evaluated.phase_head is not None:
        scores["val_phase_accuracy"] = None
    if not len(val):
        return scores
    shares = session.validate(lambda: predict(session, loader, len(val), config))
    outputs = session.processes.merged(shares)  # the outputs of every batch, in order
    tool_logits = np.concatenate([logits for logits, _ in outputs])
    scores["val_map"] = pooled_map(_by_video(val, val.tools), _by_video(val, tool_logits), tools)
    labelled = val.phase >= 0
    if "val_phase_accuracy" in scores and labelled.any():
        phases = np.concatenate([logits.argmax(axis=1) for _, logits in outputs if logits is not None])
        scores["val_phase_accuracy"] = float((phases == val.phase)[labelled].mean())
    return scores


def predict(
    session: TrainingSession, loader: FrameLoader, frames: int, config: Config
) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    """Tool logits (N, K) and phase logits (N, C) of each validation batch of this process.

    The phase logits are None without a phase head.
    """
    requests = session.processes.share(validation_requests(frames, config.cnn.batch_frames))
    outputs = []
    session.evaluated.eval()
    hidden = not session.processes.first
    with progress_bar(len(requests), "validation", "step", disable=hidden) as bar, torch.inference_mode():
        for batch in loader.batches(requests):
            session.stop_if_asked()  # saves the epoch's training steps, so that resuming begins with validation
            with session.autocast():
                output = session.evaluated(batch.inputs(config.preprocess, session.accelerator.device))
            tools, phases = output.tool_logits.float().cpu().numpy(), output.phase_logits
            outputs.append((tools, None if phases is None else phases.float().cpu().numpy()))
            bar.update(1)
    return outputs


def _by_video(frames: LabelledFrames, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {name: values[frames.video == number] for number, name in enumerate(frames.videos)}


# ---------------------------------------------------------------------------------------------- result


def _finish(stage: StageFolder, config: Config, data: FrameData, precision: str) -> TrainingResult:
    """Write the result, which is taken from the best checkpoint and the log."""
    checkpoint = stage.path / BEST_FILE
    net, about = rebuild_from_checkpoint(checkpoint)
    facts = {
        "train_frames": len(data.train),
        "val_frames": len(data.val),
        "train_videos": len(data.train.videos),
        "val_videos": len(data.val.videos),
        "backbone": config.cnn.backbone,
        "embedding_dim": net.backbone.embedding_dim,
        "weights_sha256": weights_sha256(net),
        "precision": precision,
        "dataset": data.index.dataset.name,
        "checkpoint": str(checkpoint),
    }
    scores, left_out = about.scores or {}, data.index.left_out_records()
    return result_on_frames(stage.path, scores, SCORES, CHOICES, facts, left_out=left_out).write(stage)
