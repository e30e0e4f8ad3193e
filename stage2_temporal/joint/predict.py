"""Predictions of a joint net for whole videos: the backbone processes every frame once, then stage two's code follows.

The embedding of a frame depends on this frame alone, not on how frames are divided into clips. The inference modes
`clip` and `carried` are therefore those of stage two, applied to the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError
from configs.schema import AugmentConfig, Config, Inference, PreprocessConfig, Size
from engine.files import below_root
from engine.pool import VideoFault
from engine.progress import progress_bar
from features.dataset.index import Dataset, VideoEntry
from features.dataset.sampling import sampled_frames
from features.frames.preprocess import CropCount, augment, augment_generator, crop_frames, normalise
from features.frames.source import open_frames
from features.video_labels import VideoLabels
from stage1_cnn.decode_ahead import frames_of_videos
from stage2_temporal.data import Span
from stage2_temporal.heads.base import HeadOutput, State
from stage2_temporal.joint.loss import bernoulli_kl
from stage2_temporal.joint.net import JointNet
from stage2_temporal.predict import predict_spans, run_spans

_CROP_COUNTS: dict[str, CropCount] = {"centre": 1, "five": 5, "ten": 10}
_RANDOM = AugmentConfig(crop="random", flip=False)


@dataclass(frozen=True)
class Prediction:
    """A joint net's outputs for one video of T frames, averaged over crops; None for a branch that it does not have."""

    phase: NDArray[np.float32] | None  # (T, C) probabilities
    tools: NDArray[np.float32] | None  # (T, K) logits
    mapped: NDArray[np.float32] | None  # (T, K) logits of the tools, mapped from the phase branch


def predict_videos(
    net: JointNet,
    config: Config,
    dataset: Dataset,
    entries: Sequence[VideoEntry],
    *,
    inference: Inference,
    frames: int,
    check_stop: Callable[[], None],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    faults: list[tuple[str, str]] | None = None,
) -> dict[str, Prediction]:
    """The predictions for every video, by id; frames come from the cache if it has them, otherwise from the source.

    `frames` is the length of a clip for `inference=clip`. The net is in evaluation mode while it predicts. Raises
    UserError naming a video or cache file that cannot be read; with `faults`, its id and the reason are added to this
    list instead, and the other videos are predicted. `check_stop` is called before each batch, and its exceptions are
    passed on.
    """
    training = net.training
    net.eval()
    sampled = [sampled_frames(entry, config.data.fps) for entry in entries]
    total = sum(map(len, sampled))
    videos = [
        partial(open_frames, config, dataset, entry, frame_index)
        for entry, frame_index in zip(entries, sampled, strict=True)
    ]
    embedded: dict[int, list[list[Tensor]]] = {}  # video -> batches -> crops -> embeddings (N, D)
    found, unread = {}, {}
    messages = frames_of_videos(videos, config, total)
    try:
        with progress_bar(total, "frames", "frame") as bar, closing(messages):
            for number, message in messages:
                check_stop()
                entry = entries[number]
                if isinstance(message, dict):
                    embedded[number] = []
                elif isinstance(message, torch.Tensor):
                    crops = embed_crops(net, message, config.preprocess, config.joint.crops, config.seed, autocast)
                    embedded[number].append(crops)
                    bar.update(len(message))
                elif message is None:
                    whole = [torch.cat(crop) for crop in zip(*embedded.pop(number), strict=True)]  # (T, D) each
                    found[entry.id] = _over_crops(net, whole, inference, frames)
                elif faults is not None and isinstance(message, VideoFault):
                    unread[entry.id] = below_root(message, dataset.root)
                else:
                    raise UserError(message if isinstance(message, VideoFault) else f"{entry.id}: {message}")
    finally:
        net.train(training)
    if faults is not None:
        faults += [(entry.id, unread[entry.id]) for entry in entries if entry.id in unread]
    return {entry.id: found[entry.id] for entry in entries if entry.id in found}


@torch.no_grad()
def embed_crops(
    net: JointNet,
    frames: NDArray[np.uint8] | Tensor,
    preprocess: PreprocessConfig,
    crops: str,
    seed: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[Tensor]:
    """Embeddings (N, D) fp32 of resized frames (N, R, R, 3), for each kind of crop, on the net's device.

    `crops` is `centre`, `five` or `ten` (see `crop_frames`), or `random`, which is one random position for all videos.
    """
    device = next(net.parameters()).device
    pixels = torch.as_tensor(frames).to(device, non_blocking=True)
    with autocast():
        cuts = _crops(pixels, crops, preprocess.crop_px, seed)
        return [net.embed(normalise(cut, preprocess, device)).float() for cut in cuts]


def _crops(pixels: Tensor, crops: str, crop_px: Size, seed: int) -> Sequence[Tensor]:
    """The crops, (N, S, S, 3) each."""
    if crops == "random":
        return [augment(pixels, augment_generator(seed, 0, 0), _RANDOM, crop_px)]
    return crop_frames(pixels, crop_px, _CROP_COUNTS[crops]).unbind(1)


def _over_crops(net: JointNet, embedded: Sequence[Tensor], inference: Inference, frames: int) -> Prediction:
    """Probabilities averaged over crops, as in MTRCNet; those of tools are converted back to logits."""
    each = [predict_embeddings(net, crop, inference, frames) for crop in embedded]
    if len(each) == 1:
        return each[0]
    phase = [one.phase for one in each if one.phase is not None]
    return Prediction(
        phase=np.stack(phase).mean(axis=0, dtype=np.float64).astype(np.float32) if phase else None,
        tools=_mean_logits([one.tools for one in each if one.tools is not None]),
        mapped=_mean_logits([one.mapped for one in each if one.mapped is not None]),
    )


def _mean_logits(logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    if not logits:
        return None
    mean = torch.stack([torch.from_numpy(value).double().sigmoid() for value in logits]).mean(dim=0)
    result: NDArray[np.float32] = torch.logit(mean, eps=1e-12).float().numpy()
    return result


@torch.no_grad()
def predict_embeddings(net: JointNet, embedding: Tensor, inference: Inference, frames: int) -> Prediction:
    """The outputs of all branches for one video's embeddings (T, D)."""
    tools = net.tool_head(embedding).float().cpu().numpy() if net.tool_head is not None else None
    if net.phase is None:
        return Prediction(None, tools, None)
    video = [Span(0, len(embedding))]
    phase = predict_spans(net.phase, embedding, video, inference, frames)[0].numpy()
    if net.mapping is None:
        return Prediction(phase, tools, None)
    mapped = run_spans(net.phase, _mapped(net), net.tools, embedding, video, inference, frames)[0].numpy()
    return Prediction(phase, tools, mapped)


def _mapped(net: JointNet) -> Callable[[Tensor, State | None, Tensor], HeadOutput]:
    def forward(x: Tensor, state: State | None, lengths: Tensor) -> HeadOutput:
        assert net.phase is not None
        assert net.mapping is not None
        output = net.phase.with_hidden(x, state, lengths)
        return output._replace(logits_per_stage=[net.mapping(output.hidden)])

    return forward


def phase_accuracy(videos: Mapping[str, VideoLabels], found: Mapping[str, Prediction]) -> float | None:
    """The fraction of labelled frames that are predicted correctly, averaged over videos; None if none is labelled."""
    accuracies = []
    for name, video in videos.items():
        predicted, labelled = found[name].phase, video.phase >= 0
        if predicted is not None and labelled.any():
            accuracies.append(float((predicted.argmax(axis=1) == video.phase)[labelled].mean()))
    return float(np.mean(accuracies)) if accuracies else None


def gap_nats(found: Iterable[Prediction]) -> float | None:
    """The mean KL divergence between tool branch and mapped prediction, in nats per tool and frame.

    None if the net lacks one of the two.
    """
    gaps = [
        bernoulli_kl(torch.from_numpy(one.mapped), torch.from_numpy(one.tools))
        for one in found
        if one.mapped is not None and one.tools is not None
    ]
    return float(torch.cat(gaps).mean()) if gaps else None
