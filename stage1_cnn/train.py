"""Training of stage one: tool presence (and, on request, phases) of single frames.

The loss is `stage1_cnn.loss.FrameLoss`. The best epoch is the one with the highest validation mAP (pooled over frames;
see evaluation.metrics.tools).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Config
from engine.device import make_accelerator, seed_everything
from engine.launch import is_main_process
from engine.logs import METRICS_LOG, read_metrics
from engine.processes import Processes, join
from engine.progress import progress_bar, say
from engine.runs import StageFolder, StageIdentity, settings_without
from engine.session import TrainingSession
from engine.stopping import StopRequest
from evaluation.metrics.tools import evaluate_tools
from features.dataset.catalogue import say_left_out
from features.dataset.index import Index
from features.dataset.sampling import sampled_frames
from features.frames.preprocess import changed_images
from features.frames.source import cache_readable, frames_identity, recorded_faults
from stage1_cnn.data import (
    FrameBatch,
    FrameDataset,
    FrameLoader,
    LabelledFrames,
    choose_workers,
    labelled_frames,
    training_requests,
    validation_requests,
)
from stage1_cnn.encoders.backbone import require_image_size
from stage1_cnn.encoders.pretrained import CHECKPOINT_STAGE, settled_weights, weights_identity
from stage1_cnn.loss import FrameLoss
from stage1_cnn.model import build_net, describe, rebuild_from_checkpoint, weights_sha256


def train_cnn(
    config: Config, run: Path, index: Index, root: Path, stop: StopRequest, *, trusted: bool = False
) -> dict[str, Any]:
    """Train stage one into `RUN/cnn/` (`best.pt`, `last.pt`, `metrics.jsonl`, `result.json`); returns the result.

    A finished run with the same settings returns its result and does no work; an unfinished one resumes where it
    stopped and ends with the same numbers. Videos that cannot be read are left out, reported and listed in the result
    as `left_out`. Raises UserError for settings, labels or frames that do not allow training, and Stopped, with
    everything saved, when asked to stop.
    """
    cnn = config.cnn
    processes = join(config.device, stop)
    index = index.without(recorded_faults(run / CHECKPOINT_STAGE, index))
    index.require_videos("train", "val")
    stage = StageFolder(run, CHECKPOINT_STAGE, config, identity(config, index))
    finished = processes.from_first(lambda: stage.result)
    if finished is not None:
        if processes.first:
            say(f"{stage.path}: finished before with these settings, nothing to do")
            say_left_out(index)
        return finished | {"left_out": index.left_out_records()}

    seed_everything(config.seed)
    accelerator, precision = make_accelerator(config.device, cnn.precision, "cnn.precision")
    device = accelerator.device
    net = processes.each(lambda: build_net(config, index.dataset, trusted=trusted))
    require_image_size(net.backbone, config.preprocess.crop_px)
    processes.each(lambda: load_frames(config, index, root))  # checked before hours of decoding, as in the next line
    processes.from_first(stage.check)
    index = cache_readable(config, index, root, processes, stop)
    if processes.first:
        say_left_out(index)
    train, val = processes.each(lambda: load_frames(config, index, root))
    # only now, so that settings that cannot be trained with do not occupy the run's name
    stage = StageFolder(run, CHECKPOINT_STAGE, config, identity(config, index))
    processes.from_first(stage.open)
    loss = FrameLoss(cnn, train, len(index.dataset.phases), processes.total).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if cnn.sync_batch_norm:
        synchronise_batch_norm(net, processes, device)
    groups, about = parameter_groups(net, cnn.backbone_lr_factor), describe(net, index.dataset)
    session = TrainingSession(
        stage.path, accelerator, net, groups, cnn, about, stop, cnn.accumulate_steps, processes=processes
    )
    if cnn.weights == "cached" and processes.first:
        say(f"initial weights: {settled_weights(cnn)} (cnn.weights=cached: ImageNet's where this machine has them)")
    session.resume()
    dataset = FrameDataset({"train": train, "val": val}, config.preprocess.crop_px, cnn.augment, config.seed)
    with FrameLoader[FrameBatch](dataset, choose_workers(cnn.workers, device), device, stop) as loader:
        for epoch in session.epochs():
            whole = training_requests(config.seed, epoch, len(train), cnn.batch_frames, cnn.frames_per_epoch)
            requests = [request.share(processes.rank, processes.count) for request in whole]
            for batch in session.batches(loader.batches(requests[session.position.step :]), len(requests)):
                with session.gradient_sync():
                    with session.autocast():
                        output = session.model(to_input(batch, config, device))
                        value = loss(output, batch)
                    session.update(value, partial(_name_batch, train, batch))
            scores = validate(session, loader, val, config, index)
            session.finish_epoch(scores, score=deciding_score(scores)[1])
    return processes.from_first(lambda: stage.finish(summarise(stage.path, config, index, precision, train, val)))


def identity(config: Config, index: Index) -> StageIdentity:
    """What the numbers depend on: frames and labels (see `frames_identity`), settings, initial weights."""
    return StageIdentity(
        {
            **frames_identity(config, index),
            "cnn": settings_without(config.cnn, "weights", "workers", "checkpoint_minutes"),
            "weights": weights_identity(config.cnn, config.runs),
        }
    )


def load_frames(config: Config, index: Index, root: Path) -> tuple[LabelledFrames, LabelledFrames]:
    """Labelled training and validation frames; nothing is decoded yet.

    Raises UserError if there are no training videos or no frame of theirs has a label that a head could learn.
    """
    cnn = config.cnn
    if not index.by_split("train"):
        raise UserError(f"{config.data.index}: no training videos; set data.split.rule and run index again")
    if not index.dataset.tools and not cnn.phase_head:
        raise UserError(f"data set {index.dataset.name} has no tools; set cnn.phase_head=true to train on phases")
    train, val = (
        labelled_frames(config, index, root, index.by_split(split), cnn.phase_head) for split in ("train", "val")
    )
    if not len(train):
        wanted = "tool or phase" if cnn.phase_head else "tool"
        hint = "" if cnn.phase_head else ", or set cnn.phase_head=true to train on phases"
        raise UserError(f"{config.data.index}: no training frame has a {wanted} label; add annotations{hint}")
    if not len(val) and is_main_process():
        say("no labelled validation frames: every epoch is trained, and the last one counts as the best")
    sampled = sum(len(sampled_frames(entry, config.data.fps)) for entry in index.by_split("train"))
    if len(train) < sampled and is_main_process():
        say(f"note: {sampled - len(train):,} of {sampled:,} training frames have no label and are left out")
    return train, val


def parameter_groups(net: nn.Module, backbone_lr_factor: float, others: str = "head") -> list[dict[str, Any]]:
    """The net's `backbone`, with its learning-rate factor, and all `others`; a factor of 0 also needs no gradients."""
    backbone = net.get_submodule("backbone")
    if backbone_lr_factor == 0:
        backbone.requires_grad_(False)
    inside = {id(parameter) for parameter in backbone.parameters()}
    return [
        {"name": "backbone", "params": list(backbone.parameters()), "lr_factor": backbone_lr_factor},
        {"name": others, "params": [one for one in net.parameters() if id(one) not in inside]},
    ]


def synchronise_batch_norm(net: nn.Module, processes: Processes, device: torch.device) -> None:
    """Compute batch norm's mean and variance over all processes; in place, under the same names.

    Raises UserError on CPUs, for which torch has no synchronised batch norm.
    """
    if processes.count == 1:
        return
    if device.type != "cuda":
        raise UserError(f"sync_batch_norm=true: torch synchronises batch norm on CUDA only, not on {device.type}")
    nn.SyncBatchNorm.convert_sync_batchnorm(net)


def _name_batch(train: LabelledFrames, batch: FrameBatch) -> str:
    return f"first frame: {train.name(int(batch.rows[0]))}"


def to_input(batch: FrameBatch, config: Config, device: torch.device) -> Tensor:
    """A batch's images on the device, mirrored, coloured, normalised: (N, 3, S, S) float32, channels last."""
    return changed_images(batch.images, batch.flip, batch.colour, config.preprocess, device)


# ---------------------------------------------------------------------------------------------- validation


def validate(
    session: TrainingSession, loader: FrameLoader[FrameBatch], val: LabelledFrames, config: Config, index: Index
) -> dict[str, float | None]:
    """Scores on the validation videos, centre crop: tool mAP (fraction) and, with a phase head, phase accuracy.

    None if there are no videos, no labels, or no tool that ever appears.
    """
    scores: dict[str, float | None] = {"val_map": None}
    if session.raw_model.phase_head is not None:
        scores["val_phase_accuracy"] = None
    if not len(val):
        return scores
    predicted = session.validate(lambda: predict(session, loader, val, config))
    tool_logits, phase_logits = (_in_order(parts, session.processes) for parts in zip(*predicted, strict=True))
    if tool_logits is not None:
        scores["val_map"] = pooled_map(_by_video(val, val.tools), _by_video(val, tool_logits), index.dataset.tools)
    labelled = val.phase >= 0
    if phase_logits is not None and labelled.any():
        scores["val_phase_accuracy"] = float((phase_logits.argmax(axis=1) == val.phase)[labelled].mean())
    return scores


def pooled_map(
    truth: Mapping[str, NDArray[np.int8]], logits: Mapping[str, NDArray[np.float32] | None], tools: Sequence[str]
) -> float | None:
    """Tool mAP as a fraction, pooled over the frames of all videos with tool labels, by id.

    None without labels or logits, and where no tool ever appears.
    """
    labelled = {name: labels for name, labels in truth.items() if (labels >= 0).any()}
    scores = {name: one for name in labelled if (one := logits[name]) is not None}
    percent = evaluate_tools(labelled, scores, tools).map_pooled if scores else None
    return None if percent is None else percent / 100


Logits = list[NDArray[np.float32]]


def _in_order(parts: Sequence[Logits], processes: Processes) -> NDArray[np.float32] | None:
    """All frames' logits from the batches that each process has predicted; None if there is no such head."""
    batches = processes.merged(list(parts))
    return np.concatenate(batches) if batches else None


def predict(
    session: TrainingSession, loader: FrameLoader[FrameBatch], val: LabelledFrames, config: Config
) -> tuple[Logits, Logits]:
    """Tool logits (N, K) and phase logits (N, C), the latter none without a head, of this process's batches."""
    requests = session.processes.share(validation_requests(len(val), config.cnn.batch_frames))
    tools, phases = [], []
    session.model.eval()
    net = session.raw_model
    hidden = not session.processes.first
    with progress_bar(len(requests), "validation", "step", disable=hidden) as bar, torch.inference_mode():
        for batch in loader.batches(requests):
            session.stop_if_asked()  # the epoch's steps are saved then, and resuming begins with validation
            with session.autocast():
                output = net(to_input(batch, config, session.accelerator.device))
            tools.append(output.tool_logits.float().cpu().numpy())
            if output.phase_logits is not None:
                phases.append(output.phase_logits.float().cpu().numpy())
            bar.update(1)
    return tools, phases


def _by_video(frames: LabelledFrames, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {name: values[frames.video == number] for number, name in enumerate(frames.videos)}


# ---------------------------------------------------------------------------------------------- result


def summarise(
    folder: Path, config: Config, index: Index, precision: str, train: LabelledFrames, val: LabelledFrames
) -> dict[str, Any]:
    """The content of `result.json`, from the best checkpoint and the log."""
    net, meta = rebuild_from_checkpoint(folder / "best.pt")
    result: dict[str, Any] = {
        **training_outcome(folder, meta["scores"], _SCORE_NAMES, deciding_score(meta["scores"])[0]),
        "train_frames": len(train),
        "val_frames": len(val),
        "train_videos": len(train.videos),
        "val_videos": len(val.videos),
        "backbone": config.cnn.backbone,
        "embedding_dim": net.backbone.embedding_dim,
        "weights_sha256": weights_sha256(net),
        "precision": precision,
        "dataset": index.dataset.name,
        "checkpoint": str(folder / "best.pt"),
        "left_out": index.left_out_records(),
    }
    result["sentence"] = outcome_sentence(result, _SCORE_NAMES)
    return result


def training_outcome(
    folder: Path, best: Mapping[str, Any], score_names: Mapping[str, str], chosen_by: str
) -> dict[str, Any]:
    """The scores of the best epoch (counted from 1) and the length of a training, from its log in `folder`."""
    epochs = read_metrics(folder / METRICS_LOG, "epoch")
    return {
        **{key: best.get(key) for key in score_names},
        "best_epoch": best["epoch"] + 1,
        "epochs": len(epochs),
        "chosen_by": chosen_by,
        "seconds": round(sum(row["seconds"] for row in epochs), 2),
    }


def outcome_sentence(result: Mapping[str, Any], score_names: Mapping[str, str]) -> str:
    """The result of a training in one line."""
    scores = [f"{words} {result[key]:.3f}" for key, words in score_names.items() if result[key] is not None]
    return (
        f"{', '.join(scores) or 'no validation score'} at epoch {result['best_epoch']} of {result['epochs']}; "
        f"{result['train_frames']:,} training frames, {result['seconds']:.0f} s; {result['checkpoint']}"
    )


def deciding_score(scores: Mapping[str, Any]) -> tuple[str, float | None]:
    """The name and value of the score that chooses the best epoch: tool mAP, else phase accuracy, else none."""
    for key, words in _SCORE_NAMES.items():
        if scores.get(key) is not None:
            return words, scores[key]
    return "no validation score, so the last epoch", None


_SCORE_NAMES = {"val_map": "validation mAP", "val_phase_accuracy": "validation phase accuracy"}
