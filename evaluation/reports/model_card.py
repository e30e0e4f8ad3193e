"""A run's model card: what it was trained on, how, what it reaches under which convention, and what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from configs.load import read_yaml
from configs.schema import DataSetSpec
from engine.files import read_json_object, write_text
from evaluation.reports.summary import NONE_UNLABELLED, scored_words, settings_behind, used_videos
from evaluation.reports.templates import template_environment
from features.dataset.index import Index

CARD_FILE = "MODEL_CARD.md"
_KINDS = {
    "temporal": "Two stages (frame embeddings by a CNN, then a model over time)",
    "joint": "A CNN and a model over time in one net",
    "tool": "A CNN, frame by frame,",
}
_TASKS = {"both": "phases and tools", "phase": "phases", "tool": "tools"}
# What the numbers depend on. Folders and paths of one machine are not among it.
_SECTIONS = {
    "temporal": ("seed", "preprocess", "encoder", "cnn", "extract", "temporal"),
    "joint": ("seed", "preprocess", "joint"),
}
_PARTS = {"temporal": (), "joint": (("cnn", "backbone"), ("temporal", "head"))}  # of a net trained as one
_BASELINES = {"frame": "per-frame head on the same features", "majority": "always the longest phase of training"}


def write_model_card(
    run: Path,
    stage: str,
    index: Index,
    metrics: Mapping[str, Any],
    *,
    trained_in: Path | None = None,
) -> Path:
    """Write `RUN/MODEL_CARD.md` for the net of `stage` (`temporal` or `joint`) from what evaluation found.

    Settings and versions are those in `trained_in`, by default `RUN/<stage>`. `metrics` is what `metrics.json` holds:
    whether the data is `simulated`, the `tasks` of a joint net, and the file that a net was `imported` or
    `fine_tuned_from`. On which videos that one was trained is then not known, and the card says so.
    """
    imported = metrics.get("imported")
    folder = trained_in or run / stage
    environment = folder / "environment.json"
    settings = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    settings = settings_behind(run, settings, metrics.get("encoder"))
    chosen = {key: settings[key] for key in _SECTIONS[stage] if key in settings}
    for section, key in _PARTS[stage]:
        if key in settings.get(section, {}):
            chosen[section] = {key: settings[section][key]}
    if imported is not None:  # what it was fed with and what it is; how it was trained is another program's
        chosen = {key: chosen[key] for key in ("preprocess", "cnn", "temporal") if key in chosen}
    text = render_model_card(
        {
            "name": run.name,
            "kind": _kind(stage, index.dataset, settings, metrics),
            "simulated": metrics["simulated"],
            "dataset": index.dataset.model_dump(mode="json"),
            "fps": metrics["fps"],
            "split": used_videos(index, metrics)[0],
            "left_out": index.left_out_records(),
            "without_labels": metrics.get("videos_without_labels", NONE_UNLABELLED),
            "settings": yaml.safe_dump(chosen, sort_keys=False, width=1 << 20) if chosen else "",
            "environment": _made_with(read_json_object(environment) if environment.exists() else {}),
            "imported": imported,
            "fine_tuned_from": metrics.get("fine_tuned_from"),
            "metrics": metrics,
        }
    )
    write_text(run / CARD_FILE, text)
    return run / CARD_FILE


def render_model_card(facts: Mapping[str, Any]) -> str:
    """The card as Markdown, from plain values: name, kind, simulated, dataset, fps, split ({train, val, test: ids
    used}), left_out (id and reason each), without_labels ({phases, tools: ids}), settings (YAML), environment (a
    phrase), imported and fine_tuned_from (a file or None) and metrics. A missing fact is an error, never an empty
    place."""
    environment = template_environment(html=False)
    environment.filters["number"] = _number
    phases = facts["metrics"]["phases"]
    baselines = {title: phases[head] for head, title in _BASELINES.items() if head in phases}
    template = environment.get_template("model_card.md.j2")
    scored = scored_words(facts["metrics"])
    return template.render(**facts, results=phases.get("temporal"), baselines=baselines, scored=scored)


def _kind(stage: str, spec: DataSetSpec, settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """What the net is and what it tells: not tools where the data set or the net has none."""
    tasks = metrics.get("tasks", "both")
    untrained = stage == "temporal" and settings.get("extract", {}).get("encoder") == "initial"
    if not spec.tools or untrained:
        tasks = "phase"
    return f"{_KINDS['tool' if tasks == 'tool' else stage]} for {_TASKS[tasks]}"


def _made_with(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages") or {}
    parts = [f"{name} {packages[name]}" for name in ("surgstage", "torch", "torchvision") if packages.get(name)]
    if environment.get("python"):
        parts.append(f"Python {environment['python']}")
    if environment.get("git_revision"):
        parts.append(f"revision {environment['git_revision'][:12]}")
    return ", ".join(parts) or "versions that were not recorded"


def _number(value: Any) -> str:
    """One number or {mean, std} in percent with one digit."""
    if isinstance(value, Mapping):
        spread = "" if value.get("std") is None else f" ± {value['std']:.1f}"
        return _number(value["mean"]) + spread
    return "-" if value is None else f"{value:.1f}"
