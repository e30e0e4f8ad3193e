"""int8 nets, each calibrated once and stored as `<extract.store>/int8/<backbone>-<key>-<sha256>.pt`.

Shards, resumed runs and predictions for new videos must all use the same net, but calibrations on two machines may
differ in the last bits. The net is therefore stored beside the features, and its hash is part of their digest. The key
is a hash of everything that a calibration depends on: weights, preprocessing, sampling rate, number of frames, and the
training videos from which the frames were taken.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import Config
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.files import exclusive_lock, sha256_json
from engine.progress import progress_bar, say
from features.dataset.index import Dataset, VideoEntry
from features.dataset.sampling import sampled_frames
from features.frames.preprocess import crop_frames, preprocess_json
from features.frames.source import open_frames
from features.video.base import spread_evenly
from stage1_cnn.encoders.backbone import Backbone
from stage1_cnn.encoders.openvino_net import OpenVinoNet, calibrate, openvino

FOLDER = "int8"
DIGITS = 12
# `arithmetic` of int8 features in an `EncoderSpec`; the hash of the net that computed them follows.
_ARITHMETIC = "openvino, int8 net "

# A function of a backbone and its weights' SHA-256 that returns the int8 net. Raises UserError if there is none.
Int8Source = Callable[[Backbone, str], OpenVinoNet]


@dataclass(frozen=True)
class FromTrainingFrames:
    """The `Int8Source` of `extract`: the net in the store or, if there is none, a new one.

    A new one is calibrated on frames of the index's training videos.
    """

    config: Config
    dataset: Dataset

    def __call__(self, backbone: Backbone, weights_sha256: str) -> OpenVinoNet:
        videos = self.dataset.index.by_split("train")
        if not videos:
            raise UserError(
                "extract.precision=int8 is calibrated on frames of training videos, and the index has none; set "
                "extract.precision=auto, or give the index training videos"
            )
        for module in ("openvino", "nncf"):  # a missing package is reported before frames are read
            openvino(module)
        folder = self.config.extract.store / FOLDER
        with exclusive_lock(folder, "calibration", wait=True):
            name = f"{backbone.name}-{self._key(weights_sha256)}"
            if found := sorted(folder.glob(f"{name}-*.pt")):
                return _load(found[0])
            net = calibrate(backbone, self.config.preprocess, self._crops(videos))
            weights = torch.frombuffer(bytearray(net.weights), dtype=torch.uint8)
            path = folder / f"{name}-{_sha256(net)}.pt"
            save_checkpoint(path, {"graph": net.graph.decode(), "weights": weights})
            return net

    def _key(self, weights_sha256: str) -> str:
        depends_on = {
            "weights": weights_sha256,
            "preprocess": preprocess_json(self.config.preprocess),
            "fps": self.config.data.fps,
            "frames": self.config.extract.calibration_frames,
            "videos": [[video.id, video.sha256_ends] for video in self.dataset.index.by_split("train")],
        }
        return sha256_json(depends_on)[:DIGITS]

    def _crops(self, videos: tuple[VideoEntry, ...]) -> list[NDArray[np.uint8]]:
        """Centre crops (S, S, 3) of frames that are spread evenly over the training videos and within each video."""
        wanted = self.config.extract.calibration_frames
        chosen = [videos[number] for number in spread_evenly(range(len(videos)), wanted)]
        crops: list[NDArray[np.uint8]] = []
        with progress_bar(len(chosen), "calibrate int8", "video") as bar:
            for entry in chosen:
                try:
                    crops += self._crops_of(entry, -(-wanted // len(chosen)))
                except UserError as error:  # extraction then leaves this video out, and reports the reason
                    say(f"{entry.id}: not used for calibration: {error}")
                bar.update(1)
        if not crops:
            raise UserError("extract.precision=int8: none of the training videos can be read for its calibration")
        return crops

    def _crops_of(self, entry: VideoEntry, count: int) -> list[NDArray[np.uint8]]:
        frame_index = sampled_frames(entry, self.config.data.fps)
        step = max(1, len(frame_index) // count)
        spread = slice((step - 1) // 2, None, step)
        with open_frames(self.config, self.dataset, entry, frame_index, spread) as opened:
            frames = np.stack(list(itertools.islice(opened.frames, count)))
        return list(crop_frames(frames, self.config.preprocess.crop_px)[:, 0])


@dataclass(frozen=True)
class FromStore:
    """The `Int8Source` of `predict`: the net that computed the features used in training."""

    store: Path
    encoder: Mapping[str, Any]  # the specification, as JSON, of the encoder of those features

    def __call__(self, backbone: Backbone, weights_sha256: str) -> OpenVinoNet:
        arithmetic = str(self.encoder.get("arithmetic"))
        if not arithmetic.startswith(_ARITHMETIC):
            raise UserError("extract.precision=int8: the net was trained on other features; set extract.precision=auto")
        sha256 = arithmetic.removeprefix(_ARITHMETIC)
        for path in (self.store / FOLDER).glob(f"{backbone.name}-*-{sha256}.pt"):
            return _load(path)
        raise UserError(
            f"{self.store / FOLDER}: does not hold the int8 net {sha256}, which computed the features; set "
            "extract.store to the folder that has it, or extract.engine=torch"
        )


def int8_arithmetic(net: OpenVinoNet) -> str:
    """The value of `EncoderSpec.arithmetic` for features that this int8 net computes."""
    return f"{_ARITHMETIC}{_sha256(net)}"


def _sha256(net: OpenVinoNet) -> str:
    """The hash of the net's constants only.

    The graph cannot be hashed: the names of its layers contain numbers that differ from process to process.
    """
    return hashlib.sha256(net.weights).hexdigest()[:DIGITS]


def _load(path: Path) -> OpenVinoNet:
    content = load_checkpoint(path)
    net = OpenVinoNet(content["graph"].encode(), content["weights"].numpy().tobytes(), "int8")
    if not path.stem.endswith(_sha256(net)):
        raise UserError(f"{path}: does not hold the net that its name says; delete it, and extract makes a new one")
    return net
