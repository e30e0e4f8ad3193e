"""Training of stage one: tool presence (and, on demand, phases) a frame at a time.

Loss: binary cross-entropy over labelled tool entries + `phase_loss_weight` x cross-entropy over labelled phases. The
best epoch is the one with the highest validation mAP (pooled over frames; see evaluation.metrics.tools).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import CnnConfig, Config
from engine.device import make_accelerator, seed_everything
from engine.launch import is_main_process
from engine.logs import METRICS_FILE, read_metrics
from engine.processes import Processes, join, one_process
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
    share_request,
    training_requests,
    validation_requests,
)
from stage1_cnn.model import (
    CHECKPOINT_STAGE,
    NetOutput,
    ToolNet,
    build_net,
    describe,
    rebuild_from_checkpoint,
    require_image_size,
    settled_weights,
    weights_identity,
    weights_sha256,
)


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
    processes.each(lambda: load_frames(config, index, root))  # before hours of decoding, as the next line
    processes.from_first(stage.check)
    index = cache_readable(config, index, root, processes, stop)
    if processes.first:
        say_left_out(index)
    train, val = processes.each(lambda: load_frames(config, index, root))
    # only now: settings that cannot be trained with leave no folder that binds the name to them
    stage = StageFolder(run, CHECKPOINT_STAGE, config, identity(config, index))
    processes.from_first(stage.open)
    loss = Loss(cnn, train, len(index.dataset.phases), processes.total).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if cnn.sync_batch_norm:
        synchronise_batch_norm(net, processes, device)
    session = TrainingSession(
        stage.path,
        accelerator,
        net,
        parameter_groups(net, cnn),
        cnn,
        describe(net, index.dataset),
        stop,
        cnn.accumulate_steps,
        processes=processes,
    )
    if cnn.weights == "cached" and processes.first:
        say(
            f"initial weights: {settled_weights(cnn)} (cnn.weights=cached takes ImageNet's where this machine has them)"
        )
    session.resume()
    dataset = FrameDataset({"train": train, "val": val}, config.preprocess.crop_px, cnn.augment, config.seed)
    with FrameLoader[FrameBatch](dataset, choose_workers(cnn.workers, device), device, stop) as loader:
        for epoch in session.epochs():
            requests = training_requests(config.seed, epoch, len(train), cnn.batch_frames, cnn.frames_per_epoch)
            shares = [share_request(one, processes.rank, processes.count) for one in requests]
            mine = [request for request, _ in shares]
            for batch in session.batches(loader.batches(mine[session.position.step :]), len(mine)):
                counts = shares[session.position.step][1]
                with session.gradient_sync():
                    with session.autocast():
                        output = session.model(to_input(batch, config, device))
                        value = loss(output, batch if counts else without_labels(batch))
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

    Raises UserError when there are no training videos or no frame of theirs has a label that a head could learn.
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


def parameter_groups(net: ToolNet, cnn: CnnConfig) -> list[dict[str, Any]]:
    """Backbone and heads with their learning-rate factors; a backbone with factor 0 needs no gradients either."""
    if cnn.backbone_lr_factor == 0:
        net.backbone.requires_grad_(False)
    heads = [parameter for head in net.heads() for parameter in head.parameters()]
    return [
        {"name": "backbone", "params": list(net.backbone.parameters()), "lr_factor": cnn.backbone_lr_factor},
        {"name": "head", "params": heads},
    ]


def without_labels(batch: FrameBatch) -> FrameBatch:
    """The batch of a process that has no part in a step."""
    return batch._replace(phase=torch.full_like(batch.phase, -1), tools=torch.full_like(batch.tools, -1))


def synchronise_batch_norm(net: nn.Module, processes: Processes, device: torch.device) -> None:
    """Let batch norm take mean and variance over all processes, in place, under the same names.

    Raises UserError where torch has none: on CPUs.
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


# ---------------------------------------------------------------------------------------------- loss


class Loss(nn.Module):
    """Binary cross-entropy on tools plus weighted cross-entropy on phases, over the labelled entries of a batch.

    With `class_weighting=inverse_frequency`, a tool's positive entries weigh (frames without it) / (frames with it) in
    the training videos, so that presence and absence add up to the same weight; and a phase weighs
    frames / (phases x frames of it), the "balanced" weights of scikit-learn. What never appears weighs 1.
    """

    positive_weight: Tensor | None  # (K,)
    class_weight: Tensor | None  # (C,)

    def __init__(
        self,
        cnn: CnnConfig,
        train: LabelledFrames,
        phases: int = 0,
        over_all: Callable[[Tensor], Tensor] = one_process,
    ) -> None:
        super().__init__()
        self.over_all = over_all
        self.phase_weight = cnn.phase_loss_weight
        weighted = cnn.class_weighting == "inverse_frequency"
        self.register_buffer("positive_weight", positive_weights(train.tools) if weighted else None)
        self.register_buffer("class_weight", phase_weights(train.phase, phases) if weighted else None)

    def forward(self, output: NetOutput, batch: FrameBatch) -> Tensor:
        """Mean loss of a batch, a scalar in float32; on several processes this one's part of it."""
        device = output.tool_logits.device
        tools = batch.tools.to(device, non_blocking=True)
        loss = tool_loss(output.tool_logits, tools, self.positive_weight, self.over_all)
        if output.phase_logits is not None:
            phase = batch.phase.to(device, non_blocking=True)
            summed = F.cross_entropy(
                output.phase_logits.float(), phase, weight=self.class_weight, ignore_index=-1, reduction="sum"
            )
            loss = loss + self.phase_weight * summed / self._phase_total(phase)
        return loss

    def _phase_total(self, phase: Tensor) -> Tensor:
        """What the labelled frames weigh together."""
        labelled = (phase >= 0).float()
        weights = labelled if self.class_weight is None else self.class_weight[phase.clamp(min=0)] * labelled
        return self.over_all(weights.sum()).clamp(min=torch.finfo(torch.float32).tiny)


def tool_loss(
    logits: Tensor,
    tools: Tensor,
    positive_weight: Tensor | None = None,
    over_all: Callable[[Tensor], Tensor] = one_process,
) -> Tensor:
    """Binary cross-entropy of logits (..., K) on labels (..., K), -1 = no label: mean over labelled entries, float32.

    0 where nothing is labelled. `positive_weight` (K,) scales the entries of tools that are there. `over_all` adds the
    count over processes, so that each gets its part of the mean.
    """
    labelled = tools >= 0
    entries = F.binary_cross_entropy_with_logits(
        logits.float(), tools.clamp(min=0), pos_weight=positive_weight, reduction="none"
    )
    return (entries * labelled).sum() / over_all(labelled.sum()).clamp(min=1)


def positive_weights(tools: NDArray[np.int8]) -> Tensor:
    """Weights (K,) of positive tool entries from labels (R, K), -1 = no label."""
    present, absent = (tools == 1).sum(axis=0), (tools == 0).sum(axis=0)
    usable = (present > 0) & (absent > 0)
    return torch.from_numpy(np.where(usable, absent / np.maximum(present, 1), 1.0).astype(np.float32))


def phase_weights(phase: NDArray[np.int8], phases: int) -> Tensor:
    """Weights (C,) of phases from labels (R,), -1 = no label."""
    counts = np.bincount(phase[phase >= 0], minlength=phases)
    balanced = counts.sum() / (max(1, (counts > 0).sum()) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, balanced, 1.0).astype(np.float32))


# ---------------------------------------------------------------------------------------------- validation


def validate(
    session: TrainingSession, loader: FrameLoader[FrameBatch], val: LabelledFrames, config: Config, index: Index
) -> dict[str, float | None]:
    """Scores on the validation videos, centre crop: tool mAP (fraction) and, with a phase head, phase accuracy.

    None for what cannot be said: no videos, no labels, or no tool that ever appears.
    """
    scores: dict[str, float | None] = {"val_map": None}
    if session.raw_model.phase_head is not None:
        scores["val_phase_accuracy"] = None
    if not len(val):
        return scores
    predicted = session.validate(lambda: predict(session, loader, val, config))
    tool_logits, phase_logits = (_in_order(parts, session.processes) for parts in zip(*predicted, strict=True))
    if tool_logits is not None and (val.tools >= 0).any():
        results = evaluate_tools(_by_video(val, val.tools), _by_video(val, tool_logits), index.dataset.tools)
        scores["val_map"] = None if results.map_pooled is None else results.map_pooled / 100
    labelled = val.phase >= 0
    if phase_logits is not None and labelled.any():
        scores["val_phase_accuracy"] = float((phase_logits.argmax(axis=1) == val.phase)[labelled].mean())
    return scores


Logits = list[NDArray[np.float32]]


def _in_order(parts: Sequence[Logits], processes: Processes) -> NDArray[np.float32] | None:
    """All frames' logits from the batches that each process has predicted; None where there is no such head."""
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
    """What a finished training says of itself, from its best checkpoint and its log."""
    net, meta = rebuild_from_checkpoint(folder / "best.pt")
    best = meta["scores"]
    epochs = read_metrics(folder / METRICS_FILE, "epoch")
    seconds = sum(row["seconds"] for row in epochs)
    result: dict[str, Any] = {
        "val_map": best["val_map"],
        "val_phase_accuracy": best.get("val_phase_accuracy"),
        "best_epoch": best["epoch"] + 1,
        "epochs": len(epochs),
        "chosen_by": deciding_score(best)[0],
        "seconds": round(seconds, 2),
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
    result["sentence"] = _sentence(result)
    return result


def deciding_score(scores: Mapping[str, Any]) -> tuple[str, float | None]:
    """What the best epoch is chosen by, in words, and its value: mAP, else phase accuracy, else nothing."""
    for key, words in _SCORE_NAMES.items():
        if scores.get(key) is not None:
            return words, scores[key]
    return "no validation score, so the last epoch", None


_SCORE_NAMES = {"val_map": "validation mAP", "val_phase_accuracy": "validation phase accuracy"}


def _sentence(result: Mapping[str, Any]) -> str:
    scores = [f"{words} {result[key]:.3f}" for key, words in _SCORE_NAMES.items() if result[key] is not None]
    return (
        f"{', '.join(scores) or 'no validation score'} at epoch {result['best_epoch']} of {result['epochs']}; "
        f"{result['train_frames']:,} training frames, {result['seconds']:.0f} s; {result['checkpoint']}"
    )
