"""Runs in the form that `evaluate` writes, with made-up predictions, for tests of the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.load import load_config, load_dataset, to_yaml
from engine.files import write_json, write_text
from engine.runs import environment
from evaluation.metrics.results import JointDetails
from evaluation.reports.summary import update_summary
from features.dataset.index import Index, VideoEntry
from features.video_labels import VideoLabels
from stage2_temporal.scoring import GroundTruth, Predicted, score_and_write, summary_of

SPEC = load_dataset("cholec80")
JOINT: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(JointDetails)) | {"tasks": "both"}


def write_run(
    folder: Path,
    videos: Sequence[str] = ("video01", "video02", "video03"),
    *,
    frames: int = 300,
    seed: int = 0,
    spec: DataSetSpec = SPEC,
    labelled: bool = True,
    curves: bool = True,
    tools_alone: bool = False,
    more: Mapping[str, str] | None = None,
    root: Path | None = None,
) -> Path:
    """A run folder with an evaluation on the test videos. Labels depend on the videos alone, predictions on `seed`;
    the first video's are the best. Without `labelled` no video has labels, without `curves` nothing was trained.
    `tools_alone` leaves out the phase branch, `more` is recorded of a joint net, `root` is the data root."""
    labels = np.random.default_rng(1)
    random = np.random.default_rng(seed + 2)
    found, probabilities, tool_logits = {}, {}, {}
    for number, name in enumerate(videos):
        phase = np.sort(labels.integers(0, len(spec.phases), frames)).astype(np.int8)
        tools = (_wander(labels, frames, len(spec.tools)) > 0.6).astype(np.int8)
        believed = np.where(_wander(random, frames, 1)[:, 0] < 1.5 - 0.3 * number, phase, np.roll(phase, 40))
        probabilities[name] = _soft(np.eye(len(spec.phases))[believed] + random.random((frames, len(spec.phases))))
        logits = (2.0 * tools - 1.0 + 1.5 * _wander(random, frames, len(spec.tools))).astype(np.float32)
        if not labelled:
            phase, tools = np.full_like(phase, -1), np.full_like(tools, -1)
        frame_index, time_s = np.arange(frames, dtype=np.int64) * 25, np.arange(frames, dtype=np.float64)
        found[name], tool_logits[name] = VideoLabels(frame_index, time_s, phase, tools), logits
    truth = GroundTruth(_index(videos, frames, spec), "test", 1.0, found, root)
    tasks = {"tasks": "tool"} if tools_alone else {}
    evaluation = score_and_write(
        folder / "evaluate/test",
        truth,
        Predicted(
            probabilities={} if tools_alone else {"temporal": probabilities, "frame": probabilities},
            tool_logits=tool_logits if spec.tools else {},
            majority=None if tools_alone else 3,
            thresholds=dict.fromkeys(spec.tools, 0.5),
        ),
        identity_sha256="0" * 64,
        joint=JointDetails(**{**JOINT, **tasks, **(more or {})}) if tools_alone or more else None,
    )
    update_summary(folder, summary_of(folder, truth, evaluation), {"train-temporal": 12.0})
    if curves:
        _write_training(folder / "temporal", seed, random)
    return folder


def _write_training(folder: Path, seed: int, random: np.random.Generator) -> None:
    rows = [
        {"kind": "epoch", "global_step": e, "epoch": e, "loss": 1 / (e + 1), "val_accuracy": random.random()}
        for e in range(12)
    ]
    write_text(folder / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    write_text(folder / "config.yaml", to_yaml(load_config("cholec80", [f"seed={seed}"])))
    write_json(folder / "environment.json", environment())


def _wander(random: np.random.Generator, frames: int, columns: int) -> NDArray[np.float64]:
    """Slow noise of about unit size, (frames, columns), so that runs are as long as real ones."""
    steps = np.repeat(random.normal(size=(frames // 20 + 1, columns)), 20, axis=0)[:frames]
    return steps + 0.1 * random.normal(size=(frames, columns))


def _soft(scores: NDArray[np.float64]) -> NDArray[np.float32]:
    values = np.exp(3.0 * scores)
    return (values / values.sum(axis=1, keepdims=True)).astype(np.float32)


def _index(videos: Sequence[str], frames: int, spec: DataSetSpec) -> Index:
    entries = tuple(
        VideoEntry(
            id=name,
            kind="video",
            source=f"videos/{number}.mp4",
            size_bytes=1,
            modified_ns=0,
            sha256_ends="0" * 64,
            fps=25.0,
            frame_count=frames * 25,
            split="test",
        )
        for number, name in enumerate(videos)
    )
    return Index(dataset=spec, videos=entries)
