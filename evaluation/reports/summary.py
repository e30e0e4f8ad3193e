"""What a run is known by: its few numbers, as fractions, for `summary.json`, and the settings that led to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.load import read_yaml
from engine.files import read_json_object
from engine.runs import RESULT_FILE
from features.dataset.index import SPLITS, Index

NONE_UNLABELLED: Mapping[str, list[str]] = {"phases": [], "tools": []}


def summarise(
    phase_results: Mapping[str, Any] | None, tool_results: Mapping[str, Any] | None
) -> dict[str, float | None]:
    """Fractions from what `evaluate_phases` and `evaluate_tools` return; None where a task was not evaluated.

    `phase_accuracy` is the mean over videos, `phase_f1` the F1 of the convention `phase_mean`, `tool_map` the mean
    average precision pooled over frames.
    """
    strict = (phase_results or {}).get("phase_mean")
    return {
        "phase_accuracy": _fraction(strict["accuracy"]["mean"] if strict else None),
        "phase_f1": _fraction(strict["f1"]["mean"] if strict else None),
        "tool_map": _fraction(tool_results["map_pooled"] if tool_results else None),
    }


def settings_behind(run: Path, settings: Mapping[str, Any], encoder: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of stage two, with what made its features in place of what they say of stage one.

    `encoder` is what the features say of it, with its `digest`; None where that is not known. Settings name a backbone
    also where features were named by their folder; those of a run's own stage one count where they made these features.
    """
    if encoder is None:
        return dict(settings)
    found = {key: value for key, value in settings.items() if key not in ("preprocess", "cnn", "extract")}
    found["encoder"] = dict(encoder)
    made = run / "extract" / RESULT_FILE
    if made.is_file() and read_json_object(made).get("encoder_digest") == encoder.get("digest"):
        files = {section: run / section / "config.yaml" for section in ("cnn", "extract")}
        found |= {section: read_yaml(file)[section] for section, file in files.items() if file.is_file()}
    return found


def used_videos(index: Index, metrics: Mapping[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """The videos of train, val and test that have labels of some task, by split, and those that have none."""
    without = metrics.get("videos_without_labels", NONE_UNLABELLED)
    empty = set(without["phases"]) & set(without["tools"] if index.dataset.tools else without["phases"])
    parts = {part: [entry.id for entry in index.by_split(part)] for part in SPLITS if part != "none"}
    used = {str(part): [name for name in ids if name not in empty] for part, ids in parts.items()}
    return used, [name for ids in parts.values() for name in ids if name in empty]


def scored_words(metrics: Mapping[str, Any]) -> str:
    """How many videos numbers are over: `2 videos`, or by task where the tasks differ. Of `metrics.json`."""
    counts = {task: len(ids) for task, ids in metrics.get("scored", {}).items() if metrics[task]}
    if len(set(counts.values())) < 2:
        return _counted(next(iter(counts.values()), len(metrics["videos"])))
    return " and ".join(f"{task} of {_counted(count)}" for task, count in counts.items())


def left_out_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What `metrics.json` says of videos that no number is over, one line each, those without labels by task."""
    lines = [f"{video['id']}: {video['reason']}" for video in metrics.get("left_out", ())]
    without = metrics.get("videos_without_labels", NONE_UNLABELLED)
    return lines + [f"{', '.join(ids)}: no labels of {task}" for task, ids in without.items() if ids]


def _counted(videos: int) -> str:
    return f"{videos} video{'s' * (videos != 1)}"


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else percent / 100.0
