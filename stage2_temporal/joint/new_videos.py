"""The joint net as a `Recogniser`, with which `stage2_temporal.new_videos` predicts unlabelled videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError
from configs.load import NO_KEYS, GivenKeys, load_dataset
from configs.schema import Config, Inference
from engine.device import choose_device, choose_precision, lower_precision, start_stage
from engine.files import sha256_file
from engine.runs import require_same_classes
from features.frames.preprocess import crop_frames, normalise
from features.frames.settings_match import require_preprocess_of
from stage2_temporal.decoding.chosen import require_none
from stage2_temporal.joint.net import joint_checkpoint, load_joint
from stage2_temporal.new_videos import Recogniser
from stage2_temporal.predict import as_trained, chosen_inference


def joint_net(config: Config, run: Path, inference: Inference | None = None, given: GivenKeys = NO_KEYS) -> Recogniser:
    """The joint net of `run`.

    Raises UserError if it has no phase branch or other classes, or if the user gave (`given`) other image settings.
    """
    require_none(config, run)
    path = joint_checkpoint(run)
    net, about = load_joint(path)
    if net.phase is None:
        raise UserError(f"{path}: a net for tools only; predict needs a phase branch, `extract --from-joint` does not")
    inference = chosen_inference(inference, about.inference, net.phase, path)
    require_preprocess_of(about.preprocess, config, given, path, about.fps, about.backbone)
    config = as_trained(config, about.preprocess, about.fps, about.backbone)
    spec = load_dataset(config.data.dataset)
    require_same_classes(path, "phases", about.phases, spec.phases)
    if net.tool_head is not None:
        require_same_classes(path, "tools", about.tools, spec.tools)
    device = choose_device(config.device)
    precision = choose_precision("extract.precision", config.extract.torch_precision, device, training=False)
    start_stage("predict", config, device, precision)
    net = net.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def encode(frames: Tensor) -> tuple[Tensor, NDArray[np.float32] | None]:
        crops = crop_frames(frames.to(device, non_blocking=True), config.preprocess.crop_px)[:, 0]  # (N, S, S, 3)
        with lower_precision(device, precision):
            embedding = net.embed(normalise(crops, config.preprocess, device)).float()  # (N, D)
        return embedding, net.tool_head(embedding).cpu().numpy() if net.tool_head is not None else None

    weights = {"joint": sha256_file(path)}
    return Recogniser(encode, net.phase, inference, about.frames, config, spec, weights)
