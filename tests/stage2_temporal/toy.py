"""Feature folders made for the tests: an index, and one feature file per video, written by the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.label_source import LabelSource, TrackSpec
from configs.load import load_dataset
from features.dataset.index import Index, VideoEntry
from features.store import EncoderSpec, SourceIdentity, feature_path, write_features

Video = tuple[str, NDArray[np.float32], NDArray[np.int8]]  # split, features (T, D), phases (T,)
PHASES = ("Early", "Middle", "Late")
STEPS = ("cut", "clip")


def spec(phases: tuple[str, ...] = PHASES, tools: tuple[str, ...] = ()) -> DataSetSpec:
    """A data set with three phases and, unless given, no tools."""
    return load_dataset("cholec80").model_copy(
        update={
            "name": "toy",
            "phases": phases,
            "tools": tools,
            "phase_aliases": {},
            "phase_orders": {},
            "tool_aliases": {},
        }
    )


def write_folder(
    folder: Path,
    videos: Mapping[str, Video],
    phases: tuple[str, ...] = PHASES,
    storage: str = "float16",
    weights: Mapping[str, str] | None = None,
    frame_step: float = 25.0,
    tool_logits: Mapping[str, NDArray[np.float32]] | None = None,
    precision: str = "fp32",
    arithmetic: str = "plain",
    steps: Mapping[str, NDArray[np.int8]] | None = None,
    tools: Mapping[str, NDArray[np.int8]] | None = None,
) -> Path:
    """A feature folder as `extract` writes it, with a sample every `frame_step` frames of the source.

    `weights` gives single videos another encoder, `tool_logits` (T, K), by default NaN, or labels `tools` (T, K) the
    data set tools `t0`, `t1`, ..., `steps` (T,) the additional label track `steps`.
    """
    entries = []
    of_tools = next(iter((tool_logits or tools or {}).values()), np.zeros((0, 0)))
    tool_names = tuple(f"t{k}" for k in range(of_tools.shape[1]))
    for name, (split, features, phase) in videos.items():
        sha256, width = (weights or {}).get(name, "0" * 64), features.shape[1]
        encoder = EncoderSpec("toy", sha256, {}, 1.0, precision, storage, width, arithmetic)
        source = SourceIdentity(name, "0" * 64, 1, 25.0)
        index = np.rint(np.arange(len(features)) * frame_step).astype(np.int64)
        present = tools[name] if tools else np.full((len(features), len(tool_names)), -1, np.int8)
        attributes = {"phases": json.dumps(phases)} | ({"tracks": json.dumps({"steps": STEPS})} if steps else {})
        tracks = {"steps": steps[name]} if steps else {}
        with write_features(
            feature_path(folder, name), encoder, source, index, phase, present, attributes, tracks=tracks
        ) as writer:
            writer.append(features, tool_logits[name] if tool_logits else np.full(present.shape, np.nan, np.float32))
        entries.append(
            VideoEntry(
                id=name,
                kind="video",
                source=f"videos/{name}.mp4",
                size_bytes=1,
                modified_ns=0,
                sha256_ends="0" * 64,
                fps=25.0,
                frame_count=round(len(features) * frame_step),
                split=split,  # type: ignore[arg-type]
            )
        )
    described = spec(phases, tool_names)
    if steps:
        of_steps = {"steps": LabelSource(files=r"(?P<id>\w+)-steps\.txt")}
        described = described.model_copy(update={"tracks": {"steps": TrackSpec(classes=STEPS)}, "labels": of_steps})
    Index(dataset=described, videos=tuple(entries)).save(folder / "index.json")
    return folder


def cue_video(rng: np.random.Generator, split: str, frames: int, width: int = 6) -> Video:
    """Noise with occasional cues: the phase is that of the last cue, so a single frame rarely determines it."""
    features = rng.normal(0, 0.3, (frames, width)).astype(np.float32)
    phase = np.zeros(frames, np.int8)
    current = 0
    for t in range(frames):
        if t == 0 or rng.random() < 0.08:
            current = int(rng.integers(3))
            features[t, current] += 4.0
        phase[t] = current
    return split, features, phase


def small(**changes: object) -> dict:
    """Settings that train in a moment."""
    return {
        "head": {"name": "lstm", "hidden": 12},
        "epochs": 2,
        "optim": {"name": "adamw", "lr": 0.02},
        "sequence": {"mode": "full", "batch": 2},
        "precision": "fp32",
        **changes,
    }
