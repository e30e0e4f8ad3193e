"""Write a run's model card: training data, training, results with their conventions, and what the model is not for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from configs.dataset_spec import DataSetSpec
from configs.load import read_yaml
from engine.files import read_json_object, write_text
from evaluation.metrics.conventions import metric_title
from evaluation.metrics.results import HEAD, UNDECODED, Evaluation, Score
from evaluation.reports.summary import settings_behind, used_videos
from evaluation.reports.tables import mean_std_text, metrics_of, number_text
from evaluation.reports.templates import template_environment
from features.dataset.index import Index
from features.dataset.overlaps import pretraining_phrases

CARD_FILE = "MODEL_CARD.md"
_KINDS = {
    "temporal": "Two stages (frame embeddings by a CNN, then a model over time)",
    "joint": "A CNN and a model over time in one net",
    "tool": "A CNN, frame by frame,",
}
_TASKS = {"both": "phases and tools", "phase": "phases", "tool": "tools"}
# The settings shown on the card: those on which the results depend, without folders and paths of a machine.
_SECTIONS = {
    "temporal": ("seed", "preprocess", "encoder", "cnn", "extract", "temporal"),
    "joint": ("seed", "preprocess", "joint"),
}
_PARTS = {  # settings of the joint net's parts
    "temporal": (),
    "joint": (("cnn", "backbone"), ("cnn", "freeze_until"), ("cnn", "layer_lr_decay"), ("temporal", "head")),
}
_BASELINES = {
    UNDECODED: "the same head without decoding",
    "frame": "per-frame head on the same features",
    "majority": "always the longest phase of training",
}


def write_model_card(
    run: Path, stage: str, index: Index, evaluation: Evaluation, *, trained_in: Path | None = None
) -> Path:
    """Write `RUN/MODEL_CARD.md` for the net of `stage` (`temporal` or `joint`), with the results of its evaluation.

    Settings and versions are read from the folder `trained_in`, by default `RUN/<stage>`. For a net of another program,
    it is not known which videos it was trained on, and the card says so.
    """
    folder = trained_in or run / stage
    environment = folder / "environment.json"
    settings = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    settings = settings_behind(run, settings, evaluation.encoder)
    chosen = {key: settings[key] for key in _SECTIONS[stage] if key in settings}
    for section, key in _PARTS[stage]:
        if key in settings.get(section, {}):
            chosen.setdefault(section, {})[key] = settings[section][key]
    if evaluation.imported is not None:  # keep its input and its parts, since its training is not known
        chosen = {key: chosen[key] for key in ("preprocess", "cnn", "temporal") if key in chosen}
    text = render_model_card(
        {
            "name": run.name,
            "kind": _kind(stage, index.dataset, settings, evaluation),
            "dataset": index.dataset.model_dump(mode="json"),
            "split": used_videos(index, evaluation)[0],
            "pretrained": _pretrained(settings, index),
            "left_out": index.left_out_records(),
            "settings": yaml.safe_dump(chosen, sort_keys=False, width=1 << 20) if chosen else "",
            "environment": _made_with(read_json_object(environment) if environment.exists() else {}),
            "metrics": evaluation,
        }
    )
    write_text(run / CARD_FILE, text)
    return run / CARD_FILE


def render_model_card(facts: Mapping[str, Any]) -> str:
    """Return the card as Markdown.

    `facts` must contain name, kind, dataset, split ({train, val, test: ids used}), pretrained (sentences on what the
    encoder was pretrained on), left_out (each with id and reason), settings (YAML), environment (a phrase) and metrics
    (an `Evaluation`). A missing fact is an error.
    """
    environment = template_environment(html=False)
    environment.filters["number"] = lambda value: (
        mean_std_text(value) if isinstance(value, Score) else number_text(value)
    )
    environment.filters["title_of"] = metric_title
    evaluation: Evaluation = facts["metrics"]
    baselines = {title: evaluation.phases[head] for head, title in _BASELINES.items() if head in evaluation.phases}
    template = environment.get_template("model_card.md.j2")
    results = evaluation.phases.get(HEAD)
    columns = metrics_of(result for result in (results or {}).values() if result.of_frames)
    tracks = {name: heads for name, heads in (evaluation.tracks or {}).items() if HEAD in heads}
    return template.render(**facts, results=results, columns=columns, baselines=baselines, tracks=tracks, head=HEAD)


def _kind(stage: str, spec: DataSetSpec, settings: Mapping[str, Any], evaluation: Evaluation) -> str:
    """Describe what the net is and what it recognises. Tools are not mentioned if the data set or the net has none."""
    tasks = evaluation.tasks
    untrained = stage == "temporal" and settings.get("extract", {}).get("encoder") == "initial"
    if not spec.tools or (untrained and not evaluation.tool_probe):
        tasks = "phase"
    names = [*_TASKS[tasks].split(" and "), *(evaluation.tracks or ())]
    return f"{_KINDS['tool' if tasks == 'tool' else stage]} for {', '.join([*names[:-2], ' and '.join(names[-2:])])}"


def _pretrained(settings: Mapping[str, Any], index: Index) -> list[str]:
    """What the release of the encoder was pretrained on, if that is operations of this data set."""
    cnn = settings.get("cnn") or {}
    backbone = (settings.get("encoder") or {}).get("backbone") or cnn.get("backbone")
    if backbone is None or cnn.get("weights") == "random":
        return []
    return [f"The release of {backbone} was {seen}." for seen in pretraining_phrases(backbone, index.dataset.name)]


def _made_with(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages") or {}
    parts = [f"{name} {packages[name]}" for name in ("surgstage", "torch", "torchvision") if packages.get(name)]
    if environment.get("python"):
        parts.append(f"Python {environment['python']}")
    if environment.get("git_revision"):
        parts.append(f"revision {environment['git_revision'][:12]}")
    return ", ".join(parts) or "versions that were not recorded"
