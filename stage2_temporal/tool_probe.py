"""`train-tools`: recognise tools by a linear probe of features whose encoder has no trained tool head.

The probe (`stage2_temporal.probe.fit_tools`) is written to `RUN/tools`. `evaluate` and `predict` take tools from there
where the features have no tool logits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError, one_line
from configs.load import NO_KEYS, GivenKeys
from configs.schema import TOOLS_FOLDER, Config
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.files import sha256_file, sha256_json
from engine.progress import say
from engine.records import Record
from engine.runs import BEST_FILE, RESULT_FILE, StageFolder, StageIdentity
from engine.stopping import StopRequest
from evaluation.metrics.results import counted
from features.dataset.catalogue import say_left_out
from features.dataset.index import Index
from features.dataset.labels import unlabelled_note
from features.dataset.trained_on import inherited_from, record_training
from features.frames.settings_match import require_features_of
from features.store import VideoFeatures, recorded_encoder
from features.store_folder import INDEX_FILE, load_feature_set, usable_index
from stage2_temporal.predict import other_encoder
from stage2_temporal.probe import GRID, Probe, fit_tools

KIND = "tool probe"
_ARRAYS = ("mean", "scale", "weights", "bias")
_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ToolProbeAbout(Record):
    """The description in the checkpoint of a probe: its fields are the checkpoint's keys, in this order."""

    kind: str = KIND
    tools: tuple[str, ...]
    dataset: str
    encoder_digest: str
    encoder: dict[str, Any]  # the encoder that made the features
    c: float
    val_map: float | None  # a fraction; None if no validation video shows a tool


@dataclass(frozen=True, kw_only=True)
class ToolProbeResult(Record):
    """What `RUN/tools/result.json` records: the fields are its keys."""

    val_map: float | None  # a fraction, on the pooled frames of the validation videos
    c: float
    constant: Sequence[str]  # tools that the training frames never or always show
    train_videos: int
    train_frames: int
    val_videos: int
    features: str
    seconds: float
    left_out: Sequence[dict[str, Any]]
    sentence: str


@dataclass(frozen=True)
class ToolProbe:
    """A trained probe, its description and its checkpoint."""

    probe: Probe
    about: ToolProbeAbout
    path: Path

    def to_json(self) -> dict[str, Any]:
        """What an evaluation records about the probe that recognised its tools."""
        return {"c": self.about.c, "val_map": self.about.val_map, "weights_sha256": sha256_file(self.path)}

    def logits(self, features: Any) -> NDArray[np.float32]:
        """Features (T, D) -> tool logits (T, K). Raises UserError if the checkpoint is of another dimension."""
        if features.shape[1] != len(self.probe.mean):
            raise UserError(
                f"{self.path}: for {len(self.probe.mean)} features a frame, but there are {features.shape[1]}"
            )
        return self.probe.logits(features)


# ---------------------------------------------------------------------------------------------- training


def train_tools(
    config: Config, run: Path, folder: Path, stop: StopRequest, given: GivenKeys = NO_KEYS
) -> ToolProbeResult:
    """Train a probe of the tools on the features in `folder`, and write `RUN/tools`.

    A finished probe of the same features and labels is not trained again. Raises UserError if there is nothing to train
    on, if the run has a probe of other features or labels, or if settings that the user gave (`given`) contradict the
    features. Raises Stopped, without a result, when asked to stop.
    """
    started = time.monotonic()
    index = usable_index(folder)
    if not index.dataset.tools:
        raise UserError(f"{folder / INDEX_FILE}: the data set {index.dataset.name} has no tools to recognise")
    index.require_excluded(config.data.exclude, folder)
    index.require_split(config.data.split, given, folder)
    videos = {part: labelled_videos(folder, index, part) for part in ("train", "val")}
    if not videos["train"]:
        raise UserError(f"{folder / INDEX_FILE}: no training video has tool labels; add them, then index and extract")
    attributes = next(iter(videos["train"].values())).attributes
    encoder, digest = recorded_encoder(attributes), str(attributes.get("encoder_digest"))
    require_features_of(encoder, config, given, folder)
    inherited = inherited_from([folder], index, config.data.allow_overlap)
    say_left_out(index)
    stage = StageFolder(run, TOOLS_FOLDER, config, _identity(index, videos, digest))
    if (finished := stage.begin()) is not None:
        return replace(ToolProbeResult.from_json(finished), left_out=index.left_out_records())
    record_training(stage.path, inherited, index)
    for part, found in videos.items():
        labels = {name: video.tools.max(axis=1) for name, video in found.items()}
        for note in unlabelled_note(labels, f"do not count in {part}", "tool label"):
            say(note)
    probe = fit_tools(videos["train"], videos["val"], index.dataset.tools, stop)
    about = ToolProbeAbout(
        tools=index.dataset.tools,
        dataset=index.dataset.name,
        encoder_digest=digest,
        encoder=encoder,
        c=probe.c,
        val_map=probe.score,
    )
    arrays = {name: torch.from_numpy(getattr(probe, name)) for name in _ARRAYS}
    save_checkpoint(stage.path / BEST_FILE, {**about.to_json(), "model": arrays})
    result = _result(probe, about.tools, index, videos, folder, time.monotonic() - started)
    stage.finish(result.to_json())
    return result


def labelled_videos(folder: Path, index: Index, part: str) -> dict[str, VideoFeatures]:
    """The videos of a part of the index that have tool labels; their features stay in their files.

    Raises UserError if features are missing or damaged, or have other tools than the index.
    """
    videos = load_feature_set(folder, [entry.id for entry in index.by_split(part)], in_memory=False)
    for name, video in videos.items():
        if video.tools.shape[1] != len(index.dataset.tools):
            raise UserError(f"{folder}: the features of {name} have other tools than {INDEX_FILE}; run extract again")
    return {name: video for name, video in videos.items() if (video.tools >= 0).any()}


def wants_probe(folder: Path) -> bool:
    """Whether tools of the features in `folder` can be recognised by a probe only, and a probe can be trained."""
    index = usable_index(folder)
    videos = labelled_videos(folder, index, "train") if index.dataset.tools else {}
    return bool(videos) and not tool_logits_of(videos)


def tool_logits_of(
    videos: Mapping[str, VideoFeatures], probe: ToolProbe | None = None
) -> dict[str, NDArray[np.float32]]:
    """The tool logits of the videos whose encoder had a trained tool head, or of all videos by a probe."""
    if probe is not None:
        return {name: probe.logits(video.features) for name, video in videos.items()}
    found = {name: video.tool_logits for name, video in videos.items()}
    return {name: logits for name, logits in found.items() if logits.size and np.isfinite(logits).all()}


def _identity(index: Index, videos: Mapping[str, Mapping[str, VideoFeatures]], digest: str) -> StageIdentity:
    labels, sources = sha256(), {}
    for part in videos.values():
        for name, video in part.items():
            labels.update(f"{name} {len(video)} ".encode() + video.tools.tobytes())
            sources[name] = video.attributes.get("source_sha256_ends")
    return StageIdentity(
        {
            "c": list(GRID),
            "encoder_digest": digest,
            "dataset": index.dataset.name,
            "tools": list(index.dataset.tools),
            "split": {part: list(found) for part, found in videos.items()},
            "labels_sha256": labels.hexdigest(),
            "sources_sha256": sha256_json(sources),
        }
    )


def _result(
    probe: Probe,
    tools: Sequence[str],
    index: Index,
    videos: Mapping[str, Mapping[str, VideoFeatures]],
    folder: Path,
    seconds: float,
) -> ToolProbeResult:
    train = videos["train"].values()
    score = "no validation video shows a tool" if probe.score is None else f"validation mAP {probe.score:.3f}"
    frames = sum(int((video.tools >= 0).any(axis=1).sum()) for video in train)
    return ToolProbeResult(
        val_map=probe.score,
        c=probe.c,
        constant=[tool for k, tool in enumerate(tools) if not probe.weights[:, k].any()],
        train_videos=len(train),
        train_frames=frames,
        val_videos=len(videos["val"]),
        features=str(folder),
        seconds=round(seconds, 2),
        left_out=index.left_out_records(),
        sentence=f"{score}, C={probe.c:g}; {frames:,} frames of {counted(len(train), 'video')}, {seconds:.0f} s",
    )


# ---------------------------------------------------------------------------------------------- reading


def load_tool_probe(run: Path) -> ToolProbe | None:
    """The finished probe of a run; None if there is none. Raises UserError if its files are damaged."""
    path = run / TOOLS_FOLDER / BEST_FILE
    if not (path.parent / RESULT_FILE).is_file():
        return None
    content = load_checkpoint(path)
    if content.get("kind") != KIND:
        raise UserError(f"{path}: not a checkpoint of train-tools")
    try:
        about = ToolProbeAbout.from_json(content)
        mean, scale, weights, bias = arrays = [content["model"][name].numpy() for name in _ARRAYS]
        shapes = [mean.shape, scale.shape, weights.shape, bias.shape]
        width, tools = len(mean), len(about.tools)
        if shapes != [(width,), (width,), (width, tools), (tools,)] or {one.dtype for one in arrays} != {_FLOAT}:
            raise ValueError(f"its arrays have shapes {shapes}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or written by another version ({one_line(error)})") from error
    return ToolProbe(Probe(mean, scale, weights, bias, about.c, about.val_map), about, path)


def fitting_tool_probe(run: Path, encoder: Mapping[str, Any], digest: str, tools: Sequence[str]) -> ToolProbe | None:
    """The run's probe, if it recognises `tools` in features of this encoder (its record and digest).

    None if there is no probe or, with a note, if it has other tools. Raises UserError if it was trained on features of
    another encoder, which would give meaningless scores.
    """
    found = load_tool_probe(run) if tools else None
    if found is None:
        return None
    if found.about.tools != tuple(tools):
        say(f"note: {found.path.parent}: a probe of other tools ({', '.join(found.about.tools)}), so it is not used")
        return None
    if digest != found.about.encoder_digest and (difference := other_encoder(found.about.encoder, encoder)):
        raise UserError(
            f"{found.path}: trained on features of another encoder ({difference}); delete {found.path.parent} and run "
            "train-tools on these features"
        )
    score = "not scored" if found.about.val_map is None else f"validation mAP {found.about.val_map:.3f}"
    say(f"note: tools are recognised by the linear probe in {found.path.parent} (C={found.about.c:g}, {score})")
    return found
