"""Evaluate a joint net from pictures: the same tables and files as the two stages have, and the mapped tools beside."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from configs.load import NO_KEYS, GivenKeys, load_config
from configs.schema import Config, PreprocessConfig
from engine.device import choose_device, choose_precision, lower_precision
from engine.files import read_json_object
from engine.progress import say
from engine.runs import IDENTITY_FILE, RESULT_FILE, update_summary
from engine.stopping import StopRequest
from evaluation.metrics.tools import choose_thresholds, evaluate_tools, sigmoid
from evaluation.reports.model_card import write_model_card
from features.dataset.catalogue import say_left_out
from features.dataset.index import Index
from features.dataset.sampling import frame_times_s
from features.frames.preprocess import require_preprocess_of
from features.frames.source import frames_identity, recorded_faults
from features.store import VideoFeatures
from stage2_temporal.evaluate import METRICS_FILE, Material, print_metrics, score_and_write, summary_of
from stage2_temporal.joint.net import IMPORTED, JointNet, joint_checkpoint, load_joint, require_same_classes
from stage2_temporal.joint.predict import LabelledVideo, Prediction, gap_nats, labelled_videos, predict_videos
from stage2_temporal.predict import Inference, chosen_inference


def evaluate_joint(
    config: Config,
    run: Path,
    index: Index,
    root: Path,
    *,
    split: str = "test",
    inference: Inference | None = None,
    other: bool = False,
    stop: StopRequest,
    given: GivenKeys = NO_KEYS,
) -> dict[str, Any]:
    """Score a run's joint net on one split of the index; returns the metrics (percent) that `metrics.json` holds.

    Writes into `RUN/evaluate/`, and the outcome on the test split into `RUN/summary.json` and `RUN/MODEL_CARD.md`; for
    another index than the run's (`other`, or as `data.index` has it) into a folder with its name in front, and nowhere
    else. Videos that cannot be read are left out and reported. Images are prepared as in training, whatever a preset
    says; crops are `joint.crops`.
    Raises UserError where the user gave another preparation (`given`) and when the net's classes or sampling rate are
    not the data's, Stopped when asked to stop.
    """
    path = joint_checkpoint(run)
    net, about = load_joint(path)
    _require_same_world(path, about, index, config.data.fps)
    preprocess = PreprocessConfig(**about["preprocess"])
    require_preprocess_of(preprocess, config, given, path, backbone=about["backbone"])
    config = config.model_copy(update={"preprocess": preprocess})
    index = index.without(recorded_faults(path.parent, index))
    other = other or _is_another(path.parent, config, index)
    entries = index.entries_of(split, config.data.index)
    way = chosen_inference(inference, about["inference"], net.phase, path)
    predictor = _Predictor(config, net, root, index, way, about["frames"], stop)
    videos = labelled_videos(config, index, root, entries)
    found = predictor(videos)
    thresholds = _thresholds(predictor, labelled_videos(config, index, root, index.by_split("val")), index)
    index = index.without(predictor.faults)
    index.entries_of(split, config.data.index)
    videos = [video for video in videos if video.entry.id in found]
    say_left_out(index)
    features = {video.entry.id: _as_features(video, found, config) for video in videos}
    material = Material(path, index, features, split, root)
    probabilities = {name: one.phase for name, one in found.items() if one.phase is not None}
    imported = (net.imported_from or path.name) if about["step"] == IMPORTED else None
    chosen = {
        "checkpoint": str(path),
        "tasks": net.net_config.tasks,
        "imported": imported,
        "fine_tuned_from": net.imported_from if imported is None else None,
        "inference": predictor.inference,
        "crops": config.joint.crops,
        "precision": predictor.precision,
        "mapped_tools": _mapped_tools(videos, found, index, config, split),
        "gap_nats": gap_nats(found.values()),
    }
    name = _folder_name(split, inference, config)
    out = run / "evaluate" / (f"{config.data.index.stem}-{name}" if other else name)
    metrics = score_and_write(
        out,
        material,
        {"temporal": probabilities} if probabilities else {},
        _majority(path),
        thresholds,
        chosen,
    )
    print_metrics(metrics)
    if metrics["mapped_tools"] is not None:
        say(
            f"tools mapped from the phase branch: mAP {metrics['mapped_tools']['map_pooled']:.1f} %; "
            f"gap to the tool branch {metrics['gap_nats']:.4f} nats a tool and frame"
        )
    if split == "test" and out.name == "test":
        update_summary(run, summary_of(run, material, metrics))
        write_model_card(run, "joint", index, metrics, trained_in=path.parent)
    say(f"written: {out / METRICS_FILE}" + (", predictions/, ribbons.png" if probabilities else ", tool_predictions/"))
    return metrics


def _is_another(trained_in: Path, config: Config, index: Index) -> bool:
    """Whether `data.index` is another file than the net was trained with, and holds other videos to learn from."""
    identity, settings = trained_in / IDENTITY_FILE, trained_in / "config.yaml"
    if not (identity.is_file() and settings.is_file()):
        return False
    known = read_json_object(identity).get("videos_sha256")  # an imported net has seen none of ours
    if known is None or load_config(settings).data.index == config.data.index:
        return False
    return bool(known != frames_identity(config, index)["videos_sha256"])


def _folder_name(split: str, inference: str | None, config: Config) -> str:
    parts = [split, inference, config.joint.crops if config.joint.crops != "centre" else None]
    return "-".join(part for part in parts if part)


class _Predictor:
    """Predicts lists of videos with one net, in one way."""

    def __init__(
        self,
        config: Config,
        net: JointNet,
        root: Path,
        index: Index,
        inference: Inference,
        frames: int,
        stop: StopRequest,
    ) -> None:
        device = choose_device(config.device)
        self.precision = choose_precision("extract.precision", config.extract.precision, device, training=False)
        self.inference, self.frames = inference, frames
        self.faults: list[tuple[str, str]] = []  # videos that could not be read, and why
        self._config, self._root, self._index, self._stop = config, root, index, stop
        self._net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._autocast = partial(lower_precision, device, self.precision)

    def __call__(self, videos: list[LabelledVideo]) -> dict[str, Prediction]:
        return predict_videos(
            self._net,
            self._config,
            videos,
            self._root,
            self._index,
            inference=self.inference,
            frames=self.frames,
            check_stop=self._stop.raise_if_set,
            autocast=self._autocast,
            faults=self.faults,
        )


def _require_same_world(path: Path, about: Mapping[str, Any], index: Index, fps: float) -> None:
    spec = index.dataset
    require_same_classes(path, "phases", about["phases"], spec.phases)
    require_same_classes(path, "tools", about["tools"], spec.tools)
    if float(about["fps"]) != fps:
        raise UserError(f"{path}: trained at {about['fps']:g} frames a second; set data.fps={about['fps']:g}")


def _as_features(video: LabelledVideo, found: Mapping[str, Prediction], config: Config) -> VideoFeatures:
    """Labels and tool logits in the form that evaluation takes them; no embeddings."""
    frames, tools = len(video.frame_index), found[video.entry.id].tools
    return VideoFeatures(
        features=np.zeros((frames, 0), np.float32),
        frame_index=video.frame_index,
        time_s=frame_times_s(video.entry, video.frame_index),
        phase=video.phase,
        tools=video.tools,
        tool_logits=tools if tools is not None else np.full(video.tools.shape, np.nan, np.float32),
        attributes={"fps": config.data.fps},
    )


def _probabilities_by_video(
    videos: list[LabelledVideo], logits: Mapping[str, NDArray[np.float32] | None]
) -> tuple[dict[str, NDArray[np.int8]], dict[str, NDArray[np.float64]]] | None:
    """Truth and probabilities of the videos with tool labels; None where there are none."""
    truth = {video.entry.id: video.tools for video in videos if (video.tools >= 0).any()}
    scores = {name: sigmoid(value) for name, value in logits.items() if name in truth and value is not None}
    return (truth, scores) if truth and scores else None


def _mapped_tools(
    videos: list[LabelledVideo], found: Mapping[str, Prediction], index: Index, config: Config, split: str
) -> dict[str, Any] | None:
    pair = _probabilities_by_video(videos, {name: one.mapped for name, one in found.items()})
    if pair is None:
        return None
    return evaluate_tools(*pair, index.dataset.tools, split=split, fps=config.data.fps)


def _thresholds(predictor: _Predictor, val: list[LabelledVideo], index: Index) -> Mapping[str, float] | None:
    """Chosen on the validation videos; None where there are none with tool labels, or no tool branch."""
    labelled = [video for video in val if (video.tools >= 0).any()]
    if not labelled:
        return None
    found = predictor(labelled)
    labelled = [video for video in labelled if video.entry.id in found]
    pair = _probabilities_by_video(labelled, {name: one.tools for name, one in found.items()})
    return choose_thresholds(*pair, index.dataset.tools) if pair else None


def _majority(checkpoint: Path) -> int | None:
    result = checkpoint.parent / RESULT_FILE
    found = read_json_object(result).get("majority_phase") if result.exists() else None
    return None if found is None else int(found)
