"""The table of benchmarks/reproduce_cholec80.py: results of finished runs with published figures beside them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError
from configs.load import load_config
from engine.files import read_json_object, write_json, write_text
from evaluation.metrics.conventions import metric_title
from evaluation.metrics.results import (
    HEAD,
    METRICS_FILE,
    ByConvention,
    Evaluation,
    PhaseResults,
    PooledScore,
    read_evaluation,
)

PUBLISHED = Path(__file__).with_name("published_cholec80.yaml")
OF_FRAMES = ("accuracy", "precision", "recall", "jaccard", "f1")
BASELINES = ("frame", "majority")  # heads of every evaluation that the table leaves out
TOOLS = ("map_pooled", "map_video")
_TITLES = {"map_pooled": "mAP, frames pooled", "map_video": "mAP, mean over videos"}


@dataclass(frozen=True)
class Runs:
    """The runs of every recipe and split, one per seed, and what is shown of them."""

    folders: Mapping[tuple[str, str], Sequence[Path]]
    titles: Mapping[str, str]
    conventions: Sequence[str]


def write_table(out: Path, runs: Runs) -> str:
    """Write `table.json` and `table.md` to the folder `out`, and return the text of the latter.

    Runs that are not evaluated yet are counted, not waited for.
    """
    rows = [_row(runs, recipe, split) for recipe, split in runs.folders]
    published = [_beside(one, rows) for one in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "table.json", {"made": date.today().isoformat(), "rows": rows, "published": published})
    text = "\n".join(_lines(rows, published)) + "\n"
    write_text(out / "table.md", text)
    return text


# ---------------------------------------------------------------------------------------------- our rows


def _row(runs: Runs, recipe: str, split: str) -> dict[str, Any]:
    """The results of one recipe on one split: {convention: {metric: mean, std and values over seeds}}.

    Raises UserError if the seeds were not evaluated in the same way.
    """
    wanted = runs.folders[recipe, split]
    done = [run for run in wanted if (run / "evaluate" / "test" / METRICS_FILE).exists()]
    found = [read_evaluation(run / "evaluate" / "test" / METRICS_FILE) for run in done]
    _require_alike(done, found)
    heads = dict.fromkeys(head for one in found for head in one.phases if head not in BASELINES)
    tools = [{name: getattr(one.tools, name) for name in TOOLS} for one in found if one.tools]
    return {
        "recipe": recipe,
        "title": _title(runs.titles[recipe], found) + (" (offline)" if any(map(_is_offline, done)) else ""),
        "split": split,
        "seeds": len(done),
        "seeds_wanted": len(wanted),
        "stage_one": _stage_one(found),
        "simulated": any(bool(one.simulated) for one in found),
        "test_videos": len(found[0].videos) if found else None,
        "conventions": _by_convention([one.phases.get(HEAD, {}) for one in found], runs.conventions),
        "units": {name: results.about.unit for one in found for name, results in one.phases.get(HEAD, {}).items()},
        "other_heads": {
            head: _by_convention([one.phases.get(head, {}) for one in found], runs.conventions)
            for head in heads
            if head != HEAD
        },
        "tools": _over_seeds(tools),
        "training_hours": [_training_hours(run) for run in done],
        "machines": sorted({machine for run in done for machine in _machines(run)}),
        "runs": [str(run) for run in done],
    }


def _require_alike(runs: Sequence[Path], found: Sequence[Evaluation]) -> None:
    """Raise UserError unless all seeds were evaluated on the same frames, with the same decoding."""
    for run, one in zip(runs, found, strict=True):
        for name, value in _compared(one).items():
            if value != (other := _compared(found[0])[name]):
                shown = f" ({value} and {other})" if len(f"{value}{other}") < 80 else ""
                raise UserError(
                    f"{run}: was evaluated with other {name} than {runs[0]}{shown}, so they have no common mean; start "
                    "again without --table, which evaluates what is out of date"
                )


def _compared(one: Evaluation) -> dict[str, Any]:
    phases = one.phases.get(HEAD, {}).get(one.convention)
    return {
        "decoding of phases": one.decoding_words,
        "smoothing of tools": one.tool_smoothing_s,
        "crops": one.joint and (one.joint.crops, one.joint.inference),
        "frame rate": one.fps,
        "videos": list(one.videos),
        "labels": phases and phases.about.truth_sha256,
    }


def _stage_one(found: Sequence[Evaluation]) -> str:
    """How often stage one was trained, according to the encoders of the features that were evaluated."""
    encoders = {str(one.encoder["digest"]) for one in found if one.encoder}
    if len(encoders) == 1:
        return "once per split"
    return "with every seed" if len(encoders) in (0, len(found)) else f"{len(encoders)} times"


def _title(recipe: str, found: Sequence[Evaluation]) -> str:
    """The recipe, and how its phases were decoded, if they were."""
    decoded = dict.fromkeys(words for one in found if (words := one.decoding_words))
    return ", ".join([recipe, *decoded])


def _by_convention(phases: Sequence[ByConvention], conventions: Sequence[str]) -> dict[str, Any]:
    """{convention: {metric: mean, std and values over seeds}} of the results of one head with each seed."""
    table = {
        name: _over_seeds([_values(results[name]) for results in phases if name in results]) for name in conventions
    }
    return {name: scores for name, scores in table.items() if scores}


def _values(results: PhaseResults) -> dict[str, float | None]:
    """The mean of each metric and, if it has one, the value of all videos pooled, as METRIC_pooled."""
    values = {}
    for metric in results.metrics:
        score = results.score(metric)
        values[metric] = score.mean if score else None
        if isinstance(score, PooledScore):
            values[f"{metric}_pooled"] = score.pooled
    return values


def _over_seeds(of_seeds: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1; null for one seed) of each metric over the seeds that have a value."""
    table = {}
    for metric in dict.fromkeys(name for one in of_seeds for name in one):
        values = [value for one in of_seeds if (value := one.get(metric)) is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            table[metric] = {"mean": statistics.fmean(values), "std": spread, "values": values}
    return table


def _is_offline(run: Path) -> bool:
    """Whether the head of stage two needs frames of the future."""
    settings = run / "temporal" / "config.yaml"
    return settings.exists() and not load_config(settings).temporal.head.causal


def _training_hours(run: Path) -> float:
    results = [*run.glob("*/result.json"), *run.glob("joint/*/result.json")]
    return round(sum(float(read_json_object(path).get("seconds") or 0) for path in results) / 3600, 3)


def _machines(run: Path) -> list[str]:
    found = [read_json_object(path) for path in run.glob("**/environment.json")]
    return [", ".join(one.get("gpus") or [str(one.get("processor"))]) for one in found]


# ---------------------------------------------------------------------------------------------- published rows


def _beside(published: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A published row, and which of our rows it can be compared with: those of its convention.

    All of our splits are tested on the same videos if their last number is the same, so a row of another split is
    named together with the difference.
    """
    convention, split = published["convention"], published["split"]
    if convention is None or split is None:
        return {**published, "compare_with": []}
    candidates = [row for row in rows if convention in row["conventions"] and _tested(row["split"]) == _tested(split)]
    return {
        **published,
        "compare_with": [
            {"recipe": row["recipe"], "split": row["split"], "same_split": row["split"] == split} for row in candidates
        ],
    }


def _tested(split: str) -> str:
    return split.rpartition("/")[2]


# ---------------------------------------------------------------------------------------------- text


def _lines(rows: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]]) -> list[str]:
    simulated = any(row["simulated"] for row in rows)
    lines = [
        *(["**SIMULATED operations: these figures say nothing about Cholec80.**", ""] if simulated else []),
        "Mean ± standard deviation (n - 1) over seeds, in percent unless the heading says otherwise; in brackets the",
        "number of seeds that have a value, if not all do. Where stage one is trained once per split, the seeds vary",
        "stage two alone, so the deviation is too small for the whole recipe.",
        "",
        "| recipe | trained as | split | seeds | stage one | training hours per seed | machine |",
        "|---|---|---|---|---|---|---|",
        *(_line(*_about(row)) for row in rows),
    ]
    if any(row["split"].count("/") == 1 for row in rows):
        lines += ["", "A split of two numbers has no validation videos: the last epoch is tested, none is chosen."]
    results = [(row, label, scores) for row in rows for label, scores in _labelled(row)]
    names = dict.fromkeys(name for _, _, scores in results for name in scores)
    of_frames = [name for name in names if any("precision" in scores.get(name, {}) for _, _, scores in results)]
    lines += _phases("Phases", results, of_frames, OF_FRAMES)
    for name in names:
        if name not in of_frames:
            metrics = dict.fromkeys(metric for _, _, scores in results for metric in scores.get(name, {}))
            unit = next((row["units"][name] for row, _, _ in results if name in row["units"]), "percent")
            lines += _phases(f"Phases: {name} ({unit})", results, [name], tuple(metrics))
    lines += ["", "### Tools", "", _line("recipe", "split", *(_TITLES[name] for name in TOOLS)), _rule(2 + len(TOOLS))]
    lines += [
        _line(row["recipe"], row["split"], *_cells(row["tools"], TOOLS, row["seeds"])) for row in rows if row["tools"]
    ]
    return [*lines, *_published(published)]


def _about(row: Mapping[str, Any]) -> list[str]:
    hours = row["training_hours"]
    return [
        row["recipe"],
        row["title"],
        row["split"],
        f"{row['seeds']} of {row['seeds_wanted']}" if row["seeds"] < row["seeds_wanted"] else str(row["seeds"]),
        row["stage_one"],
        ", ".join(f"{one:.1f}" for one in hours) or "not run",
        "; ".join(row["machines"]),
    ]


def _labelled(row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The results of a row: of its own head, and of others beside it, such as the same head without decoding."""
    others = [(f"{row['recipe']}, {head}", scores) for head, scores in row["other_heads"].items()]
    return [(row["recipe"], row["conventions"]), *others]


def _phases(heading: str, results: Sequence[Any], conventions: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """The table of some conventions with the same metrics; empty without results."""
    lines = [
        _line(label, row["split"], name, *_cells(scores[name], metrics, row["seeds"]))
        for row, label, scores in results
        for name in conventions
        if name in scores
    ]
    titles = [_metric(metric) for metric in metrics]
    head = ["", f"### {heading}", "", _line("recipe", "split", "convention", *titles), _rule(3 + len(metrics))]
    return [*head, *lines] if lines else []


def _published(published: Sequence[Mapping[str, Any]]) -> list[str]:
    metrics = (*OF_FRAMES, "tool_map")
    columns = ("method", "paper", "split", "convention", *metrics, "read in", "comparable with our")
    lines = [
        "",
        "### Published",
        "",
        "Not computed here. Comparable are rows of the same convention on the same test videos; `≈` marks another",
        "number of training videos. Several methods chose their best epoch on test videos, which ours never do.",
        "",
        _line(*columns),
        _rule(len(columns)),
    ]
    for one in published:
        note = f" ({one['note']})" if one.get("note") else ""
        ours = [f"{'' if row['same_split'] else '≈ '}{row['recipe']} {row['split']}" for row in one["compare_with"]]
        lines.append(
            _line(
                one["method"],
                one["paper"],
                one["split"] or "not stated",
                (one["convention"] or "not clear") + note,
                *("" if one.get(metric) is None else f"{one[metric]:.2f}".removesuffix("0") for metric in metrics),
                one["read_in"],
                ", ".join(ours) or "none",
            )
        )
    return lines


def _metric(name: str) -> str:
    pooled = name.endswith("_pooled")
    return metric_title(name.removesuffix("_pooled")) + ", pooled" * pooled


def _cells(scores: Mapping[str, Any], metrics: Sequence[str], seeds: int) -> list[str]:
    return [_number(scores.get(metric), seeds) for metric in metrics]


def _number(score: Mapping[str, Any] | None, seeds: int) -> str:
    if score is None:
        return ""
    count = len(score["values"])
    deviation = "" if score["std"] is None else f" ± {score['std']:.1f}"
    return f"{score['mean']:.1f}{deviation}" + (f" ({count} of {seeds})" if count < seeds else "")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"
