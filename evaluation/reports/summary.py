"""Compute a run's main results for `summary.json`, as fractions, and the settings that led to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.load import read_yaml
from configs.schema import CNN_FOLDER, EXTRACT_FOLDER
from engine.files import read_json_object, write_json
from engine.runs import RESULT_FILE
from evaluation.metrics.conventions import MAIN_CONVENTION
from evaluation.metrics.results import ByConvention, Evaluation, ToolResults
from features.dataset.index import SPLITS, Index

# Accuracies and F1 are fractions, computed on the test videos; F1 follows the convention in summary["convention"].
SUMMARY_KEYS = (
    "name",
    "dataset",
    "split",
    "fps",
    "test_videos",
    "convention",
    "tool_map",
    "phase_accuracy_majority",
    "phase_accuracy_frame",
    "phase_accuracy_temporal",
    "phase_f1_frame",
    "phase_f1_temporal",
)


def update_summary(run: Path, values: Mapping[str, Any], seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Merge `values` into `RUN/summary.json`, which sums up a run's results; returns the whole summary."""
    path = run / "summary.json"
    summary: dict[str, Any] = dict.fromkeys(SUMMARY_KEYS) | {"seconds": {}}
    if path.exists():
        summary |= read_json_object(path)
    summary |= values
    summary["seconds"] = summary.get("seconds", {}) | {key: round(value, 2) for key, value in (seconds or {}).items()}
    write_json(path, summary)
    return summary


def summarise(phases: ByConvention | None, tools: ToolResults | None) -> dict[str, float | None]:
    """Return the main results as fractions, with None for a task that was not evaluated.

    `phase_accuracy` is the mean over videos, `phase_f1` is F1 under the convention `phase_mean`, and `tool_map` is the
    mean average precision on pooled frames.
    """
    strict = phases.get(MAIN_CONVENTION) if phases else None
    accuracy, f1 = (strict.score("accuracy"), strict.score("f1")) if strict else (None, None)
    return {
        "phase_accuracy": _fraction(accuracy.mean if accuracy else None),
        "phase_f1": _fraction(f1.mean if f1 else None),
        "tool_map": _fraction(tools.map_pooled if tools else None),
    }


def summarise_tracks(tracks: Mapping[str, Mapping[str, ByConvention]]) -> dict[str, dict[str, float | None]]:
    """Return accuracy and F1 of each head on each additional label track, as fractions, defined as for the phases."""
    found: dict[str, dict[str, float | None]] = {}
    for track, heads in tracks.items():
        scores = {head: summarise(results, None) for head, results in heads.items()}
        found[track] = {f"accuracy_{head}": one["phase_accuracy"] for head, one in scores.items()}
        found[track] |= {f"f1_{head}": one["phase_f1"] for head, one in scores.items() if head != "majority"}
    return found


def settings_behind(run: Path, settings: Mapping[str, Any], encoder: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings of stage two, with those of stage one replaced by what really made the features.

    `encoder` is the record in the features, with its `digest`, or None if it is not known. The settings always name a
    backbone, even if the features were given as a folder. The run's settings of stage one are therefore kept only if
    they made these features.
    """
    if encoder is None:
        return dict(settings)
    found = {key: value for key, value in settings.items() if key not in ("preprocess", "cnn", "extract")}
    found["encoder"] = dict(encoder)
    made = run / EXTRACT_FOLDER / RESULT_FILE
    if made.is_file() and read_json_object(made).get("encoder_digest") == encoder.get("digest"):
        files = {section: run / section / "config.yaml" for section in (CNN_FOLDER, EXTRACT_FOLDER)}
        found |= {section: read_yaml(file)[section] for section, file in files.items() if file.is_file()}
    return found


def used_videos(index: Index, evaluation: Evaluation) -> tuple[dict[str, list[str]], list[str]]:
    """Return the videos of train, val and test that have labels of any task, by split, and those without labels."""
    tasks = ["phases", *(["tools"] if index.dataset.tools else []), *(evaluation.tracks or ())]
    empty = set.intersection(*(set(evaluation.videos_without_labels.get(task, ())) for task in tasks))
    parts = {part: [entry.id for entry in index.by_split(part)] for part in SPLITS if part != "none"}
    used = {str(part): [name for name in ids if name not in empty] for part, ids in parts.items()}
    return used, [name for ids in parts.values() for name in ids if name in empty]


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else percent / 100.0
