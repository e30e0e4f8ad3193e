"""Predictions of a joint net for whole videos: the backbone over every frame once, then stage two's inference.

The backbone sees single frames, so its embeddings do not depend on how frames are cut into clips; `clip` and `carried`
inference are those of stage two on these embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError
from configs.schema import AugmentConfig, Config, PreprocessConfig
from engine.files import below_root
from engine.progress import progress_bar
from features.dataset.index import Index, VideoEntry
from features.dataset.sampling import sampled_frames
from features.frames.preprocess import CropCount, augment, augment_generator, crop_frames, normalise
from features.frames.source import frame_batches, open_frames
from features.video_labels import VideoLabels
from stage1_cnn.encoders.encoder import encoded_at_once
from stage2_temporal.data import Span
from stage2_temporal.heads.base import HeadOutput, State
from stage2_temporal.joint.loss import bernoulli_kl
from stage2_temporal.joint.net import JointNet
from stage2_temporal.predict import Inference, predict_spans, run_spans

_CROP_COUNTS: dict[str, CropCount] = {"centre": 1, "five": 5, "ten": 10}
_RANDOM = AugmentConfig(crop="random", flip=False)


@dataclass(frozen=True)
class Prediction:
    """A joint net's outputs for one video of T frames, averaged over crops; None without the branch."""

    phase: NDArray[np.float32] | None  # (T, C) probabilities
    tools: NDArray[np.float32] | None  # (T, K) logits
    mapped: NDArray[np.float32] | None  # (T, K) logits, from the phase branch


def predict_videos(
    net: JointNet,
    config: Config,
    entries: Sequence[VideoEntry],
    root: Path,
    index: Index,
    *,
    inference: Inference,
    frames: int,
    check_stop: Callable[[], None],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    faults: list[tuple[str, str]] | None = None,
) -> dict[str, Prediction]:
    """Predictions of every video, by id; frames come from the cache if it holds them, otherwise from the source.

    `frames` is the length of a clip for `inference` clip. The net is put into evaluation mode and back. Raises
    UserError naming the video or cache file that cannot be read (with `faults`, its id and the reason are added there
    and the other videos are predicted), and whatever `check_stop` raises, before each batch.
    """
    training = net.training
    net.eval()
    found = {}
    sampled = [sampled_frames(entry, config.data.fps) for entry in entries]
    try:
        with progress_bar(sum(map(len, sampled)), "frames", "frame") as bar:
            for entry, frame_index in zip(entries, sampled, strict=True):
                try:
                    with open_frames(config, entry, root, index, frame_index) as opened:
                        batches = _watched(frame_batches(opened.frames, encoded_at_once(config)), bar, check_stop)
                        embedded = embed_crops(
                            net, batches, config.preprocess, config.joint.crops, config.seed, autocast
                        )
                except UserError as error:
                    if faults is None:
                        raise
                    faults.append((entry.id, below_root(str(error), root)))
                    continue
                found[entry.id] = _over_crops(net, embedded, inference, frames)
    finally:
        net.train(training)
    return found


def _watched(batches: Iterable[Any], bar: Any, check_stop: Callable[[], None]) -> Iterator[Any]:
    for batch in batches:
        check_stop()
        yield batch
        bar.update(len(batch))


@torch.no_grad()
def embed_crops(
    net: JointNet,
    batches: Iterable[NDArray[np.uint8]],
    preprocess: PreprocessConfig,
    crops: str,
    seed: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[Tensor]:
    """Embeddings (T, D) fp32, on the net's device, of each crop of a video's resized frames (N, R, R, 3).

    `centre`, `five` and `ten` are the crops of `crop_frames`; `random` is one crop, drawn once for the video.
    """
    device = next(net.parameters()).device
    parts = []
    for batch in batches:
        with autocast():
            cuts = _crops(batch, crops, preprocess.crop_px, seed)
            parts.append([net.embed(normalise(cut, preprocess, device)).float() for cut in cuts])  # (N, D) each
    return [torch.cat(crop) for crop in zip(*parts, strict=True)]


def _crops(batch: NDArray[np.uint8], crops: str, crop_px: int, seed: int) -> list[NDArray[np.uint8]]:
    if crops == "random":
        return [augment(batch, augment_generator(seed, 0, 0), _RANDOM, crop_px)]
    cut = crop_frames(batch, crop_px, _CROP_COUNTS[crops])  # (N, crops, S, S, 3)
    return [np.ascontiguousarray(cut[:, number]) for number in range(cut.shape[1])]


def _over_crops(net: JointNet, embedded: Sequence[Tensor], inference: Inference, frames: int) -> Prediction:
    """Probabilities averaged over crops, as the reference does; those of tools are returned as logits."""
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
    """The branches on one video's embeddings (T, D)."""
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
    """Fraction of correct frames among the labelled ones, mean over videos; None if nothing is labelled."""
    accuracies = []
    for name, video in videos.items():
        predicted, labelled = found[name].phase, video.phase >= 0
        if predicted is not None and labelled.any():
            accuracies.append(float((predicted.argmax(axis=1) == video.phase)[labelled].mean()))
    return float(np.mean(accuracies)) if accuracies else None


def gap_nats(found: Iterable[Prediction]) -> float | None:
    """Mean KL divergence (nats per tool and frame) of the tool branch from the mapped prediction; None without both."""
    gaps = [
        bernoulli_kl(torch.from_numpy(one.mapped), torch.from_numpy(one.tools))
        for one in found
        if one.mapped is not None and one.tools is not None
    ]
    return float(torch.cat(gaps).mean()) if gaps else None
