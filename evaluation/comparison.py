"""Compare models video by video: paired differences with bootstrap intervals, permutation tests and Holm's correction.

A model is a run, a folder of predictions or a file of results; several training seeds of one model are joined by commas
and averaged a video at a time. Videos and seeds are kept apart: intervals and tests are over videos (other patients),
the deviation beside a mean is over seeds (trained again).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.schema import DataSetSpec
from engine.files import read_json, require_replaceable_json, write_json
from engine.progress import say
from evaluation.external import Reading, score_folder
from evaluation.metrics.phases import CONVENTIONS, mean_and_std
from evaluation.metrics.statistics import compare, holm, paired_interval
from evaluation.reports.tables import difference_table

# The one convention in which a model's number is the mean of its videos' numbers, so that the mean difference a video
# is the difference of the models.
DEFAULT_CONVENTION = "video_macro"
METRICS_FILE = "metrics.json"
_HEAD = "temporal"
_COUNTS = ("frames", "segments_truth", "segments_predicted")


@dataclass(frozen=True)
class Place:
    """Where models are looked for: runs below `runs`, evaluated on `split`; prediction folders as `reading` says."""

    runs: Path
    split: str
    spec: DataSetSpec
    reading: Reading | None = None


@dataclass(frozen=True)
class Model:
    """A model with the results (of one convention) of each of its seeds."""

    name: str
    members: Sequence[str]
    results: Sequence[Mapping[str, Any]]


def compare_models(
    names: Sequence[str],
    place: Place,
    *,
    convention: str = DEFAULT_CONVENTION,
    metrics: Sequence[str] | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Compare the first of `names` with each other one, print tables and write the result as JSON to `out` if given.

    Returns {about, models, comparisons}; `metrics` of a comparison holds {metric: {first, second: {mean, std},
    difference, low, high, p_value, p_holm, videos, exact, per_video}}, differences first - second in percent points.
    `metrics` None takes all that the convention has a video. Raises UserError when models were not evaluated on the
    same frames.
    """
    if len(names) < 2:
        raise UserError("compare: needs two models or more, for example compare RUN_A RUN_B")
    if convention not in CONVENTIONS:
        raise UserError(f"unknown convention {convention!r}; choose from {', '.join(CONVENTIONS)}")
    models = [load_model(name, place, convention) for name in names]
    first = models[0]
    for model in models:
        _require_same_frames(first, model)
    chosen = _chosen_metrics(first, convention, metrics)
    comparisons = [_compare_two(first, other, convention, chosen) for other in models[1:]]
    tests = _correct_all(comparisons)
    result = {
        "about": _about(models, convention, tests),
        "models": [
            {"name": model.name, "members": list(model.members), "seeds": len(model.members)} for model in models
        ],
        "comparisons": comparisons,
    }
    print_comparisons(result)
    if out is not None:
        require_replaceable_json(out)
        write_json(out, result)
        say(f"written: {out}")
    return result


def print_comparisons(result: Mapping[str, Any]) -> None:
    """A table a comparison."""
    from rich.console import Console

    console = Console()
    for comparison in result["comparisons"]:
        console.print(difference_table(comparison, result["about"]))


# ---------------------------------------------------------------------------------------------- models


def load_model(text: str, place: Place, convention: str) -> Model:
    """The model that `text` names: one source, or several seeds joined by commas."""
    parts = _parts(text)
    if len(set(parts)) != len(parts) or not parts:
        raise UserError(f"compare {text}: name each seed's run once")
    name = parts[0] if len(parts) == 1 else f"{parts[0]} ({len(parts)} seeds)"
    model = Model(name, parts, [_load_results(part, place, convention) for part in parts])
    for result in model.results[1:]:
        _require_same_frames(model, Model(name, parts, [result]))
    return model


def _parts(text: str) -> list[str]:
    return [text] if Path(text).exists() else [part.strip() for part in text.split(",") if part.strip()]


def require_use(names: Sequence[str], runs: Path, *, reading: bool, split: bool) -> None:
    """Raise UserError where a way of reading is given and no model is read, or a split and no model is a run."""
    found = [runs / part if (runs / part).is_dir() else Path(part) for name in names for part in _parts(name)]
    if reading and all(p.is_file() or (p / "evaluate").is_dir() or (p / METRICS_FILE).is_file() for p in found):
        raise UserError("--ground-truth: every model here is evaluated already; leave it out")
    if split and not any((path / "evaluate").is_dir() for path in found):
        raise UserError("--split: no model here is a run; leave it out")


def _load_results(text: str, place: Place, convention: str) -> Mapping[str, Any]:
    """One source's results under `convention`: a JSON file, a run or its evaluation folder, or a prediction folder."""
    path = place.runs / text if (place.runs / text / "evaluate").is_dir() or not Path(text).exists() else Path(text)
    files = (path, path / "evaluate" / place.split / METRICS_FILE, path / METRICS_FILE)
    file = next((file for file in files if file.is_file()), None)
    if file is None and path.is_dir() and not (path / "evaluate").is_dir() and place.reading is not None:
        results, notes = score_folder(path, place.reading, place.spec, [convention], split=None)
        for note in notes:
            say(f"{path}: {note}")
        return results[convention]
    if file is None:
        evaluated = f"run evaluate first (there is no {files[1]})"
        raise UserError(
            f"{path}: {evaluated if path.is_dir() else 'no such run or folder'}; for a folder of predictions give "
            "--ground-truth"
        )
    tree = read_json(file)
    results = tree.get("phases", tree) if isinstance(tree, dict) else {}
    results = results.get(_HEAD, results) if isinstance(results, dict) else {}
    found = results.get(convention)
    if not isinstance(found, dict) or "per_video" not in found or "about" not in found:
        raise UserError(f"{file}: holds no phase results under the convention {convention}; evaluate with it first")
    if without := found["about"].get("videos_without_labels"):
        say(f"{path}: not counted, for their ground truth holds no label: {', '.join(without)}")
    return found


def _require_same_frames(first: Model, other: Model) -> None:
    """Paired tests need the same videos, frame for frame."""
    ours, theirs = first.results[0], other.results[0]
    if odd := sorted(set(ours["per_video"]) ^ set(theirs["per_video"])):
        has = first.name if odd[0] in ours["per_video"] else other.name
        raise UserError(
            f"{first.name} and {other.name}: only {has} was evaluated on {odd[0]}; evaluate both on the same"
        )
    for key, what in (
        ("frames", "frames"),
        ("fps", "fps"),
        ("truth_sha256", "labels"),
        ("background", "as background"),
    ):
        if key == "fps" and None in (ours["about"].get(key), theirs["about"].get(key)):
            continue  # folders whose rows have an unknown rate; the labels are compared row by row
        if ours["about"].get(key) != theirs["about"].get(key):
            pair = f"{ours['about'].get(key)} and {theirs['about'].get(key)} {what}"
            shown = "other labels of the same videos" if what == "labels" else pair
            raise UserError(f"{first.name} and {other.name}: {shown}; evaluate both on the same frames")


def _chosen_metrics(model: Model, convention: str, metrics: Sequence[str] | None) -> list[str]:
    row = next(iter(model.results[0]["per_video"].values()))
    known = [metric for metric in row if metric not in _COUNTS]
    for metric in metrics or ():
        if metric not in known:
            raise UserError(f"--metric {metric}: {convention} has {', '.join(known)} a video")
    return list(dict.fromkeys(metrics or known))


# ---------------------------------------------------------------------------------------------- numbers


def _compare_two(first: Model, second: Model, convention: str, metrics: Sequence[str]) -> dict[str, Any]:
    merged = [{convention: {"per_video": _seed_means(model, metrics)}} for model in (first, second)]
    found = compare(merged[0], merged[1], convention, metrics)
    for metric, entry in found.items():
        shared = [video for video, value in entry["per_video"].items() if value is not None]
        interval = paired_interval([entry["per_video"][video] for video in shared])
        entry |= {"low": interval["low"], "high": interval["high"]}
        entry |= {"first": _over_seeds(first, metric, shared), "second": _over_seeds(second, metric, shared)}
    return {"first": first.name, "second": second.name, "metrics": found}


def _seed_means(model: Model, metrics: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """{video: {metric: mean over seeds}}; None where a seed has no number."""

    def mean(video: str, metric: str) -> float | None:
        values = [result["per_video"][video][metric] for result in model.results]
        return None if None in values else float(np.mean(values))

    return {video: {metric: mean(video, metric) for metric in metrics} for video in model.results[0]["per_video"]}


def _over_seeds(model: Model, metric: str, videos: Sequence[str]) -> dict[str, float | None]:
    """Mean over `videos` of each seed; then mean and deviation (n - 1) over seeds."""
    values = np.array([np.mean([result["per_video"][video][metric] for video in videos]) for result in model.results])
    return mean_and_std(float(values.mean()), values)


def _correct_all(comparisons: Sequence[Mapping[str, Any]]) -> int:
    """Holm's correction over every test made, metrics and models alike; returns how many there are."""
    entries = {f"{i} {m}": entry for i, pair in enumerate(comparisons) for m, entry in pair["metrics"].items()}
    for key, p_value in holm({key: entry["p_value"] for key, entry in entries.items()}).items():
        entries[key]["p_holm"] = p_value
    return len(entries)


def _about(models: Sequence[Model], convention: str, tests: int) -> dict[str, Any]:
    about = models[0].results[0]["about"]
    return {
        "convention": convention,
        "title": CONVENTIONS[convention].title,
        "unit": "percent points",
        "split": about.get("split"),
        "fps": about.get("fps"),
        "absent_phase": CONVENTIONS[convention].absent_phase,
        "mean": "over videos, of each video's own number averaged over seeds",
        "std": "over seeds (n - 1)",
        "interval": "95 %, percentile bootstrap of the paired difference, over videos",
        "test": "two-sided paired permutation test over videos",
        "correction": f"Holm over {tests} tests",
        "videos": len(models[0].results[0]["per_video"]),
        "frames": about.get("frames"),
        "videos_without_labels": about.get("videos_without_labels", []),
        "seeds": [len(model.members) for model in models],
    }
