"""Whether an exported model gives what the nets give in torch, frame by frame with carried state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.schema import height_width
from engine.progress import progress_bar
from engine.stopping import StopRequest
from evaluation.metrics.tools import sigmoid
from features.frames.preprocess import crop_frames, normalise
from live.export.description import EMBEDDING, TOOLS, classes_of, track_output
from live.export.frame_net import FrameNet
from live.export.onnx_model import OnnxSession
from live.nets import Nets
from stage2_temporal.predict import OnlinePredictor

TOLERANCE = 1e-4
CHECK_FRAMES = 16
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Agreement:
    """The largest differences of each output over `frames` frames of one video.

    `largest` compares the two halves of the model with torch: the embedding, relative to its largest value, and all
    probabilities that follow from the same embedding, with carried state. `end_to_end` are the probabilities of the
    label tracks from image to class. These differ more for a net that magnifies its input: embeddings are rounded to
    float16, and their last bit before, which differs between two machines too, may decide the rounding.
    """

    frames: int
    largest: dict[str, float]
    end_to_end: dict[str, float]

    @property
    def agrees(self) -> bool:
        """Whether no difference of a half exceeds the tolerance, and none is NaN."""
        return all(value <= TOLERANCE for value in self.largest.values())

    def to_json(self) -> dict[str, Any]:
        """For the file beside the model."""
        return {
            "agrees": self.agrees,
            "frames": self.frames,
            "tolerance": TOLERANCE,
            "largest_difference": self.largest,
            "end_to_end": self.end_to_end,
        }


@torch.no_grad()
def compare(nets: Nets, net: FrameNet, session: OnnxSession, stop: StopRequest, count: int = CHECK_FRAMES) -> Agreement:
    """Recognise `count` frames of coloured noise in torch, as `predict` does, and with the exported model."""
    whole, second_half = (OnlinePredictor(nets.phase, nets.inference, nets.clip_frames, "cpu") for _ in range(2))
    largest: dict[str, float] = {}
    end_to_end: dict[str, float] = {}
    session.reset()
    with progress_bar(count, "check", "frame") as bar:
        for frame in noise_frames(height_width(nets.config.preprocess.resize_px), count):
            stop.raise_if_set()
            image = as_input(nets, frame)
            found = session.step(image)
            stored, logits = nets.encode(torch.from_numpy(frame)[None])
            _note(end_to_end, found, _by_output(nets, whole.step(stored[0])))
            embedding = net.backbone(torch.from_numpy(image))[0].numpy()
            scale = max(1.0, float(np.abs(embedding).max()))
            _note(largest, {EMBEDDING: found[EMBEDDING] / scale}, {EMBEDDING: embedding / scale})
            x, tools = net.read_out(torch.from_numpy(found[EMBEDDING])[None])
            _note(largest, found, _by_output(nets, second_half.step(x[0])))
            if logits is not None and tools is not None:
                expected = sigmoid(logits[0]) if nets.parts and nets.parts.tool_head else tools[0].numpy()
                _note(largest, found, {TOOLS: expected})
            bar.update()
    return Agreement(count, largest, end_to_end)


def _by_output(nets: Nets, probabilities: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """The probabilities (C,) of stage two, by the name of the output of each label track."""
    parts = nets.by_track(probabilities[None])
    return {track_output(track): part[0] for track, part in zip(classes_of(nets), parts, strict=True)}


def _note(largest: dict[str, float], found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    """Enter the difference of each expected output into `largest`, if it is larger or NaN."""
    for name, values in expected.items():
        difference = float(np.abs(found[name] - values).max())
        if not difference <= largest.get(name, 0.0):
            largest[name] = difference
        largest.setdefault(name, 0.0)


def as_input(nets: Nets, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A resized frame (R, R, 3) -> the model's input (1, 3, S, S)."""
    crop = crop_frames(torch.from_numpy(frame)[None], nets.config.preprocess.crop_px)[:, 0]
    image: NDArray[np.float32] = normalise(crop, nets.config.preprocess, _CPU).contiguous().numpy()
    return image


def noise_frames(size: tuple[int, int], count: int) -> Iterator[NDArray[np.uint8]]:
    """Frames (R, R, 3) of random patches that change from frame to frame, always the same ones."""
    generator = np.random.default_rng(0)
    height, width = size
    for _ in range(count):
        patches = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
        yield np.ascontiguousarray(patches[rows][:, columns])
