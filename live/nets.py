"""The trained nets of a run, two-stage or joint, with all that recognition in new videos needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import NO_KEYS, GivenKeys, load_dataset
from configs.schema import CNN_FOLDER, JOINT_FOLDER, TEMPORAL_FOLDER, Config, Inference
from engine.device import choose_device, choose_precision, lower_precision, start_stage
from engine.files import sha256_file
from engine.runs import BEST_FILE, require_same_classes
from features.frames.preprocess import crop_frames, normalise, preprocess_from_json
from features.frames.settings_match import require_preprocess_of
from stage1_cnn.encoders.calibration import FromStore
from stage1_cnn.encoders.encoder import Encoder, load_encoder
from stage2_temporal.data import with_tool_logits
from stage2_temporal.decoding.chosen import ChosenDecoding, require_none
from stage2_temporal.heads.base import require_causal
from stage2_temporal.joint.net import joint_checkpoint, load_joint
from stage2_temporal.model import PhaseModel
from stage2_temporal.predict import TemporalAbout, as_trained, chosen_inference, load_temporal, other_encoder
from stage2_temporal.tool_probe import ToolProbe, fitting_tool_probe

Encode = Callable[[Tensor], tuple[Tensor, NDArray[np.float32] | None]]


@dataclass(frozen=True)
class EncoderParts:
    """What `Nets.encode` consists of, from which a form of it for other programs is made (`live.export`).

    `backbone` maps normalised images (N, 3, S, S) to embeddings (N, D), which are rounded to the float type `storage`
    before stage two and `probe` read them. Tool logits (N, K) are those of `tool_head`, before rounding, or of `probe`;
    with `tool_inputs` stage two reads those of `tool_head` too.
    """

    backbone: nn.Module
    tool_head: nn.Module | None
    storage: str = "float32"
    tool_inputs: bool = False
    probe: ToolProbe | None = None


@dataclass(frozen=True)
class Nets:
    """The trained nets of a run, which recognise phases and tools in frames.

    `encode` maps resized frames (N, R, R, 3) uint8 to the input of `phase`, which is (N, D) or (N, D + K) fp32, and to
    tool logits (N, K), or None without a tool branch. `weights` holds the SHA-256 of each checkpoint or encoder.
    """

    encode: Encode
    phase: PhaseModel
    inference: Inference
    clip_frames: int
    config: Config  # with the preprocessing and data.fps of the training
    spec: DataSetSpec
    weights: dict[str, str]
    tracks: tuple[str, ...] = ()  # additional label tracks, in the order of `phase`'s output after the phases
    decoding: ChosenDecoding | None = None
    tools: bool = True  # whether tools are recognised
    parts: EncoderParts | None = None  # None if OpenVINO computes

    def by_track(self, probabilities: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """The output of `phase` (T, C), divided into the probabilities of the phases and of each of `tracks`."""
        return np.split(probabilities, np.cumsum(self.phase.head.widths)[:-1], axis=1)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that a prediction depends on, apart from the video."""
        clip_frames = self.clip_frames if self.inference == "clip" else None
        found = {**self.weights, "inference": self.inference, "clip_frames": clip_frames, "fps": self.config.data.fps}
        smoothing_s = self.tool_smoothing_s
        found |= {"tool_smoothing_s": smoothing_s} if smoothing_s else {}
        return found | ({"decoding": self.decoding.to_json(self.config.data.fps)} if self.decoding else {})

    @property
    def tool_smoothing_s(self) -> float:
        """The time over which the probabilities of tools are smoothed; 0 for single frames."""
        return self.config.temporal.decoding.tool_smoothing_s


def pair_of_stages(
    config: Config,
    run: Path,
    cnn_run: Path | None = None,
    inference: Inference | None = None,
    *,
    trusted: bool = False,
    given: GivenKeys = NO_KEYS,
    command: str = "predict",
) -> Nets:
    """Stage two of `run`, preceded by the encoder that computed the features of its training.

    The encoder is stage one of `cnn_run` (by default of the same run), unless `extract.checkpoint` or `extract.encoder`
    name another one. If it has no tool head, tools are recognised by the probe of `run`, if there is one. Raises
    UserError if stage two or the probe was trained on features of another encoder, if the head needs whole videos, or
    if the user gave (`given`) another preprocessing, sampling rate or backbone. `command` is what prints device and
    precision.
    """
    folder = run / TEMPORAL_FOLDER
    model, about = load_temporal(folder)
    require_causal(model.head)
    inference = chosen_inference(inference, about.inference, model, folder)
    decoding = ChosenDecoding.of_run(folder, config.temporal.decoding, about.classes, about.inference, inference)
    recorded = about.encoder
    if not recorded:
        raise UserError(f"{folder / 'best.pt'}: does not record the encoder of its features; train it again")
    preprocess = preprocess_from_json(recorded["preprocess"], str(folder / BEST_FILE))
    require_preprocess_of(preprocess, config, given, folder / BEST_FILE, recorded["fps"], recorded["backbone"])
    config = as_trained(config, preprocess, recorded["fps"], recorded["backbone"], recorded.get("storage"))
    spec = load_dataset(config.data.dataset)
    require_same_classes(folder / BEST_FILE, "phases", about.phases, spec.phases)
    for track, classes in (about.tracks or {}).items():
        known = spec.tracks.get(track)
        require_same_classes(folder / BEST_FILE, track, classes, known.classes if known else (), spec.name)
    encoder = _encoder_of(about, config, run, cnn_run, spec, trusted)
    if about.tool_inputs:
        require_same_classes(folder / BEST_FILE, "tools", about.tool_inputs, spec.tools, spec.name)
    made_now = encoder.spec
    has_head = encoder.tool_head is not None
    probe = None if has_head else fitting_tool_probe(run, made_now.to_json(), made_now.digest, spec.tools)
    start_stage(command, config, encoder.device, made_now.precision)
    weights = {"temporal": sha256_file(folder / BEST_FILE), "encoder": made_now.digest}
    if probe is not None:
        weights["tools"] = sha256_file(probe.path)
    encode = encode_as_stored(encoder, bool(about.tool_inputs), probe, str(folder))
    tools = has_head or probe is not None
    parts, backbone = None, encoder.backbone
    if backbone is not None:
        parts = EncoderParts(backbone, encoder.tool_head, made_now.storage, bool(about.tool_inputs), probe)
    further = (about.further_tracks, decoding, tools, parts)
    return Nets(encode, model, inference, about.frames, config, spec, weights, *further)


def _encoder_of(
    about: TemporalAbout, config: Config, run: Path, cnn_run: Path | None, spec: DataSetSpec, trusted: bool
) -> Encoder:
    """The encoder that made the features on which stage two of `run` was trained."""
    recorded = about.encoder or {}
    try:
        encoder = load_encoder(config, cnn_run or run, spec.tools, trusted, FromStore(config.extract.store, recorded))
    except UserError as error:
        raise _with_other_ways(error, run, cnn_run) from error
    if difference := other_encoder(recorded, encoder.spec.to_json()):
        as_it_is = config.extract.checkpoint is None and config.extract.encoder == "initial"
        run_of_net = "name the run whose net made the features: --from-cnn or --from-joint"
        todo = "give the weights that its encoder had: cnn.weights" if as_it_is else run_of_net
        path = run / TEMPORAL_FOLDER / BEST_FILE
        raise UserError(f"{path}: trained on features of another encoder ({difference}); {todo}")
    return encoder


def encode_as_stored(encoder: Encoder, tool_inputs: bool, probe: ToolProbe | None, where: str) -> Encode:
    """`Nets.encode` for features that are rounded as in the training of stage two; `where` is its folder.

    With `tool_inputs`, stage two reads tool logits too. Tools are those of `probe` if the encoder has no tool head.
    """

    def encode(frames: Tensor) -> tuple[Tensor, NDArray[np.float32] | None]:
        embedding, logits = encoder(frames)
        rounded = embedding.astype(encoder.spec.storage)
        stored = torch.from_numpy(rounded)
        if tool_inputs:
            stored = with_tool_logits(stored, torch.from_numpy(logits), where)
        if encoder.tool_head is None:
            return stored.float(), None if probe is None else probe.logits(rounded)
        return stored.float(), logits

    return encode


def _with_other_ways(error: UserError, run: Path, cnn_run: Path | None) -> UserError:
    """The error with a hint about what to do instead, if the run has stage two but not stage one."""
    if cnn_run is not None or (run / CNN_FOLDER).is_dir():
        return error
    if not (run / JOINT_FOLDER).is_dir():
        return UserError(f"{error}; or use --from-cnn to name the run whose stage one made the features")
    return UserError(
        f"{error}; this run also has a joint net: add --model joint to predict with it or, if the features came from "
        f"its backbone, --from-joint {run.name}"
    )


def joint_net(
    config: Config,
    run: Path,
    inference: Inference | None = None,
    given: GivenKeys = NO_KEYS,
    command: str = "predict",
) -> Nets:
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
    start_stage(command, config, device, precision)
    net = net.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def encode(frames: Tensor) -> tuple[Tensor, NDArray[np.float32] | None]:
        crops = crop_frames(frames.to(device, non_blocking=True), config.preprocess.crop_px)[:, 0]  # (N, S, S, 3)
        with lower_precision(device, precision):
            embedding = net.embed(normalise(crops, config.preprocess, device)).float()  # (N, D)
        return embedding, net.tool_head(embedding).cpu().numpy() if net.tool_head is not None else None

    weights = {"joint": sha256_file(path)}
    parts = EncoderParts(net.backbone, net.tool_head)
    tools = net.tool_head is not None
    return Nets(encode, net.phase, inference, about.frames, config, spec, weights, tools=tools, parts=parts)
