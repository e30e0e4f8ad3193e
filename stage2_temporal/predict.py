"""Phase probabilities from a trained model: for whole videos, for clips as in training, or frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from configs.errors import UserError, one_line
from configs.head_settings import HeadConfig
from configs.load import differences
from configs.schema import MAIN_TRACK, Config, Inference, PreprocessConfig
from engine.checkpoints import load_checkpoint
from engine.device import choose_device
from engine.progress import say
from engine.records import Record
from engine.runs import BEST_FILE
from engine.stopping import StopRequest
from features.store import VideoFeatures
from stage2_temporal.data import Batch, FeatureBank, Span, chunk_batches, clip_batches, group_by_length, take
from stage2_temporal.decoding.chosen import ChosenDecoding
from stage2_temporal.decoding.decoder import Decision
from stage2_temporal.heads.base import HeadOutput, State, build_head, first_rows, require_causal, softmax_by_track
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.model import PhaseModel
from stage2_temporal.streaming import StreamedFeatures, ahead

KIND = "temporal"
FRAME_FOLDER = "frame"  # of the per-frame baseline, in the folder of stage two


class BatchSizes(NamedTuple):
    """The maximum size of a batch, which limits the memory needed, however long the videos are."""

    videos: int = 8  # number of videos that advance together
    chunk_frames: int = 1024  # frames of each video in one chunk
    clip_frames: int = 8192  # frames of all clips in a batch together


USUAL_SIZES = BatchSizes()


@dataclass(frozen=True, kw_only=True)
class TemporalAbout(Record):
    """The description in a checkpoint of stage two: its fields are the checkpoint's keys, in this order."""

    kind: str = KIND
    head: HeadConfig
    embedding_dim: int
    tool_inputs: tuple[str, ...] = ()  # the tools whose logits are the last columns of the input
    phases: tuple[str, ...]
    tracks: dict[str, tuple[str, ...]] | None = None  # the classes of additional label tracks, by name
    dataset: str
    encoder_digest: str
    encoder: dict[str, Any] | None  # the encoder that made the features; None in files of earlier versions
    backbone: str
    fps: float
    inference: Inference
    frames: int
    seed: int
    scores: dict[str, Any] | None = None  # validation scores of the epoch; None before the first epoch has ended

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """The classes of each label track, in the order of the model's logits, phases first."""
        return {MAIN_TRACK: self.phases, **(self.tracks or {})}

    @property
    def further_tracks(self) -> tuple[str, ...]:
        """The names of the label tracks besides the phases."""
        return tuple(self.tracks or ())

    def by_track(self, probabilities: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The model's probabilities (T, C), divided into those of each label track."""
        widths = [len(classes) for classes in self.classes.values()]
        parts = np.split(probabilities, np.cumsum(widths)[:-1], axis=1)
        return dict(zip(self.classes, parts, strict=True))


def load_temporal(folder: Path) -> tuple[PhaseModel, TemporalAbout]:
    """The best model (`best.pt`) of a stage folder, on the CPU in evaluation mode, and its description.

    Raises UserError if the checkpoint is missing, damaged or of another stage, or if its head is not registered (which
    may be because a plug-in is missing).
    """
    path = folder / BEST_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; run train-temporal under that name first, or give another --name")
    content = load_checkpoint(path)
    if content.get("kind") != KIND:
        raise UserError(f"{path}: not a checkpoint of train-temporal")
    try:
        about = TemporalAbout.from_json(content)
        width = about.embedding_dim + len(about.tool_inputs)
        model = PhaseModel(
            Standardise.identity(width), build_head(about.head, width, *map(len, about.classes.values()))
        )
        model.load_state_dict(content["model"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or written by another version ({one_line(error)})") from error
    return model.eval(), about


def chosen_inference(asked: Inference | None, trained: Inference, phase: PhaseModel | None, where: Path) -> Inference:
    """The inference mode that the user asked for or, if none, the one of training.

    Raises UserError if the user asked for one and the model recognises each frame by itself.
    """
    if asked is not None and (phase is None or phase.stateless):
        raise UserError(f"--inference: has no effect on {where}, which recognises each frame by itself; leave it out")
    return asked or trained


def other_encoder(trained: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """The first difference between the encoder of a training (`TemporalAbout.encoder`) and another one, both as JSON.

    None if there is no difference. Also None, with a printed note, if only precision or arithmetic differ, since this
    machine may not support those of the training.
    """
    changed = differences({**found, **trained}, dict(found))
    if different := [line for line in changed if not line.startswith(("precision", "arithmetic"))]:
        return different[0]
    if changed:
        then, now = (f"{spec['precision']} ({spec['arithmetic']})" for spec in (trained, found))
        say(f"note: the training's features were computed in {then}, these are computed in {now}")
    return None


def as_trained(
    config: Config, preprocess: PreprocessConfig, fps: float, backbone: str, storage: str | None = None
) -> Config:
    """The settings, with the training's preprocessing, sampling rate, backbone and type of stored features.

    `storage` None keeps the type of stored features that `config` has.
    """
    extract = config.extract.model_copy(update={"storage": storage or config.extract.storage})
    return config.model_copy(
        update={
            "preprocess": preprocess,
            "data": config.data.model_copy(update={"fps": float(fps)}),
            "cnn": config.cnn.model_copy(update={"backbone": backbone}),
            "extract": extract,
        }
    )


def predict_phases(
    model: PhaseModel,
    videos: Mapping[str, VideoFeatures],
    inference: Inference,
    frames: int,
    device: str = "auto",
    stop: StopRequest | None = None,
    tool_logits: bool = False,
    sizes: BatchSizes = USUAL_SIZES,
) -> dict[str, NDArray[np.float32]]:
    """Class probabilities (T, C) fp32 of every video; `run_spans` explains `inference` and `frames`.

    If the model recognises several label tracks, the classes of all are side by side (`TemporalAbout.by_track`).
    With `tool_logits` they are part of the model's input. Raises UserError if features have another width than in
    training or lack tool logits, and Stopped when `stop` is set.
    """
    width = len(model.standardise.mean)
    for video_id, video in videos.items():
        found = video.features.shape[1] + tool_logits * video.tool_logits.shape[1]
        if found != width:
            raise UserError(
                f"{video_id}: features have width {found}, the model was trained on {width}; "
                "use the features of the encoder that it was trained with"
            )
    place = choose_device(device)
    model = model.to(place)
    predicted: dict[str, NDArray[np.float32]] = {}
    filled = sorted((name for name, video in videos.items() if len(video)), key=lambda name: -len(videos[name]))
    for start in range(0, len(filled), sizes.videos):  # one table of all videos would need twice their memory
        if stop is not None:
            stop.raise_if_set()
        ids = filled[start : start + sizes.videos]
        bank = FeatureBank.of({video_id: videos[video_id] for video_id in ids}, tool_logits).to(place)
        found = predict_spans(model, bank.features, bank.spans, inference, frames, sizes)
        predicted |= {video_id: values.numpy() for video_id, values in zip(ids, found, strict=True)}
    none = np.zeros((0, model.classes), np.float32)
    return {video_id: predicted.get(video_id, none) for video_id in videos}


@torch.no_grad()
def predict_spans(
    model: PhaseModel,
    features: Tensor | StreamedFeatures,
    spans: Sequence[Span],
    inference: Inference,
    frames: int,
    sizes: BatchSizes = USUAL_SIZES,
) -> list[Tensor]:
    """Class probabilities (T, C) of each video, fp32, on the CPU; the arguments are those of `run_spans`."""
    logits = run_spans(model, model, model.classes, features, spans, inference, frames, sizes)
    return [softmax_by_track(values, model.head.widths, dim=1) for values in logits]


@torch.no_grad()
def run_spans(
    model: PhaseModel,
    forward: Callable[[Tensor, State | None, Tensor], HeadOutput],
    width: int,
    features: Tensor | StreamedFeatures,
    spans: Sequence[Span],
    inference: Inference,
    frames: int,
    sizes: BatchSizes = USUAL_SIZES,
) -> list[Tensor]:
    """Logits (T, width) that `forward` (embeddings, state, lengths) computes for each video, on the CPU.

    `spans` are the videos' rows in `features` (N, D), which have the stored type.

    With `inference=carried` the state is carried through the whole video from its first frame. With `clip` the output
    for a frame is the last output of the clip of `frames` frames that ends with it, computed from zero state; the first
    `frames` - 1 outputs are those of the first clip, which have a shorter past. A head that is not causal sees the
    whole video (`carried`) or the whole clip (`clip`).
    """
    training = model.training
    model.eval()
    device = features.device
    found = torch.empty(len(features), width, device=device)
    state: State = ()
    batches = _batches(model, spans, inference, frames, sizes)
    for (batch, wanted), x in ahead(features, batches, lambda item: take(features, item[0].rows.to(device))):
        output = forward(x, None if batch.fresh else first_rows(state, len(batch)), batch.lengths)
        state = output.state
        rows = batch.rows[wanted].to(device)
        found[rows] = output.logits[wanted.to(device)].float()
    model.train(training)
    return [found[span.rows].cpu() for span in spans]


def _batches(
    model: PhaseModel, spans: Sequence[Span], inference: Inference, frames: int, sizes: BatchSizes
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches, each with a mask (B, T) of the outputs to keep, which has every frame of every video exactly once."""
    if inference == "clip":
        starts = torch.tensor([span.first for span in spans])
        for batch in clip_batches(spans, frames, 1, max(1, sizes.clip_frames // frames), None):
            position = torch.arange(int(batch.lengths.max()))
            last = position == batch.lengths[:, None] - 1
            yield batch, (batch.rows >= 0) & (last | torch.isin(batch.first, starts)[:, None])
        return
    at_once, length = sizes[:2] if model.causal else (1, max(span.frames for span in spans))
    for group in group_by_length(spans, at_once, None):
        for batch in chunk_batches(group, length):
            yield batch, batch.rows >= 0


class OnlinePredictor:
    """Recognition frame by frame, in real time: takes the embedding of a frame and returns its class probabilities.

    The output for frame t equals that of `predict_phases` on the whole video, apart from rounding; the classes of
    several label tracks are side by side as there. Raises UserError for a head that looks into the future.
    """

    def __init__(
        self, model: PhaseModel, inference: Inference = "carried", frames: int = 1, device: str = "auto"
    ) -> None:
        require_causal(model.head)
        self._device = choose_device(device)
        self._model = model.to(self._device).eval()
        self._clip_frames = frames if inference == "clip" else None
        self.reset()

    def reset(self) -> None:
        """Start a new video: forget the frames so far."""
        self._state: State | None = None
        self._clip: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """What is remembered of the frames so far: tensors on the CPU."""
        carried, clip = self._state, self._clip
        return {
            "carried": None if carried is None else tuple(tensor.cpu().clone() for tensor in carried),
            "clip": None if clip is None else clip.cpu().clone(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, which a predictor of the same model and inference mode returned."""
        carried, clip = state["carried"], state["clip"]
        self._state = None if carried is None else tuple(tensor.to(self._device) for tensor in carried)
        self._clip = None if clip is None else clip.to(self._device)

    @torch.no_grad()
    def step(self, x: Tensor | ArrayLike) -> NDArray[np.float32]:
        """The probabilities (C,) for the next frame's embedding (D,), or (B, C) for (B, D), B videos in parallel."""
        given = torch.as_tensor(x).to(self._device)
        frame = given.reshape(-1, given.shape[-1])  # (B, D)
        if self._clip_frames is None:
            logits, self._state = self._model.step(frame, self._state)
        else:
            past = [] if self._clip is None else [self._clip]
            self._clip = torch.cat([*past, frame.unsqueeze(1)], dim=1)[:, -self._clip_frames :]  # (B, <= S, D)
            logits = self._model(self._clip).logits[:, -1]
        probabilities: NDArray[np.float32] = softmax_by_track(logits.float(), self._model.head.widths, 1).cpu().numpy()
        return probabilities[0] if given.ndim == 1 else probabilities


class OnlineDecoder:
    """Recognition frame by frame with decoding: takes embeddings of one video, and returns decisions.

    `model` gives the probabilities of the frames at `fps`. `step` returns the decisions that are now final: of the
    frame itself or, with a lag of L frames, of the frame L before it, so that there are none for the first L frames.
    `finish` returns the rest. A decision has one entry per label track. The decisions of a video are those of
    `predict`. Raises UserError for `mode=offline`, which needs whole videos.
    """

    def __init__(self, model: OnlinePredictor, about: TemporalAbout, decoding: ChosenDecoding, fps: float) -> None:
        if decoding.settings.mode == "offline":
            raise UserError(
                "temporal.decoding.mode=offline needs whole videos; frame by frame, use causal, with lag_s if it may "
                "look ahead"
            )
        self._model, self._about, self._decoding, self._fps = model, about, decoding, fps
        self.reset()

    def reset(self) -> None:
        """Start a new video: forget the frames so far."""
        self._model.reset()
        self._decoders = {track: self._decoding.decoder(track, self._fps) for track in self._about.classes}

    def step(self, x: Tensor | ArrayLike) -> list[dict[str, Decision]]:
        """The decisions {track: ...} that are final with the next frame's embedding (D,)."""
        parts = self._about.by_track(self._model.step(x)[None])
        return self._together({track: one.step(parts[track][0]) for track, one in self._decoders.items()})

    def finish(self) -> list[dict[str, Decision]]:
        """The decisions of the remaining frames, at the end of the video."""
        return self._together({track: one.finish() for track, one in self._decoders.items()})

    def _together(self, found: Mapping[str, Sequence[Decision]]) -> list[dict[str, Decision]]:
        return [dict(zip(found, decisions, strict=True)) for decisions in zip(*found.values(), strict=True)]
