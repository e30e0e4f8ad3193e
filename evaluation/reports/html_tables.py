"""Make the report's tables, with one column or group of columns per run. Each states the rules its numbers follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.schema import MAIN_TRACK
from evaluation.metrics.conventions import metric_title
from evaluation.metrics.results import (
    HEAD,
    UNDECODED,
    Interval,
    PhaseAbout,
    PooledScore,
    Score,
    ToolAbout,
    counted,
    marked,
)
from evaluation.reports.gather import Report, RunResults, differing_settings, settings_of
from evaluation.reports.tables import (
    IN_BRACKETS,
    MEAN_AP,
    THRESHOLD_TITLES,
    ResultTable,
    interval_text,
    mean_std_text,
    metrics_of,
    number_text,
    shared_tool_metrics,
    tool_cells,
    tool_metric_columns,
    track_title,
)

HEAD_TITLES = {
    HEAD: "Temporal head",
    UNDECODED: "Temporal head, not decoded",
    "frame": "Per-frame head",
    "majority": "Most frequent phase",
}
PACKAGES = ("surgstage", "torch", "accelerate")


@dataclass(frozen=True)
class ConventionSection:
    """The results under one convention: what a reader must know about the numbers, and their tables."""

    title: str
    about: list[str]
    tables: list[ResultTable]


@dataclass(frozen=True)
class Tables:
    """All tables of a report: of each convention, of tools, of where the numbers come from, and of settings.

    `tracks` has those of each convention for each additional label track.
    """

    conventions: dict[str, ConventionSection]
    tracks: dict[str, dict[str, ConventionSection]]
    tools: ResultTable | None
    provenance: ResultTable
    settings: ResultTable | None


def all_tables(report: Report) -> Tables:
    """Return all tables of a report."""
    return Tables(
        conventions=_sections(report, MAIN_TRACK),
        tracks={track: _sections(report.of_track(track), track) for track in report.tracks},
        tools=_tools(report.runs) if any(run.evaluation.tools for run in report.runs) else None,
        provenance=_provenance(report.runs),
        settings=_settings(report.runs),
    )


def _sections(report: Report, track: str) -> dict[str, ConventionSection]:
    """Return the section of each convention under which all runs have results of at least one head."""
    runs = [run.phases.values() for run in report.runs if run.phases]
    found = dict.fromkeys(name for heads in runs for head in heads for name in head)
    shared = [name for name in found if all(any(name in head for head in heads) for heads in runs)]
    return {name: _section(report, name, track) for name in shared}


def _section(report: Report, name: str, track: str) -> ConventionSection:
    known = next(head[name] for run in report.runs for head in run.phases.values() if name in head)
    title, corner = f"{track_title(track)} over all", "Metric" if known.of_frames else "Score"
    titles = HEAD_TITLES if track == MAIN_TRACK else {**HEAD_TITLES, "majority": "Most frequent class"}
    tables = [_overall(report, name, title, corner, titles)]
    if known.of_frames and any(HEAD in run.phases for run in report.runs):
        tables.append(_per_phase(report, name, "Phase" if track == MAIN_TRACK else f"Class of {track}"))
    return ConventionSection(known.about.title, _about(known.about), tables)


def _about(about: PhaseAbout) -> list[str]:
    """Return lines with what a reader must know about the numbers."""
    window = f", boundaries relaxed by {about.window_s:g} s" if about.window_s else ""
    lines = [
        f"Convention {about.convention}: {about.title}{window}. After {about.source}.",
        f"Absent phases: {about.absent_phase}.",
        f"±: standard deviation, {about.std}. In brackets: 95 % interval, bootstrap over videos.",
        _counts(about, f", {about.frames:,} labelled frames"),
    ]
    left_out = about.videos_without_labels
    return lines + ([f"Without labels and left out: {', '.join(left_out)}."] if left_out else [])


def _counts(about: PhaseAbout | ToolAbout, frames: str = "") -> str:
    rate = "at an unknown rate" if about.fps is None else f"at {about.fps:g} fps"
    videos, seeds = counted(about.videos, "video"), counted(about.seeds, "seed")
    return f"{videos} of split {about.split}{frames} {rate}; {seeds} per run. {about.unit.capitalize()}."


def _overall(report: Report, convention: str, title: str, corner: str, head_titles: Mapping[str, str]) -> ResultTable:
    """Return a table with one column per head, grouped by run."""
    heads = [(run, head) for run in report.runs for head in run.phases or [HEAD]]
    results = [run.phases.get(head, {}).get(convention) for run, head in heads]
    # Only the predictions of the temporal head are in files, so only these have intervals.
    known = [run.intervals.overall.get(convention, {}) if head == HEAD else {} for run, head in heads]
    rows = []
    for metric in metrics_of(one for one in results if one):
        scores, name = [one.score(metric) if one else None for one in results], metric_title(metric)
        if any(isinstance(score, PooledScore) for score in scores):
            pooled = [Score(one.pooled, None) if isinstance(one, PooledScore) else None for one in scores]
            rows.append((f"{name}, pooled", _cells(pooled, [one.get(f"{metric}_pooled") for one in known])))
            name += ", over videos"
        rows.append((name, _cells(scores, [one.get(metric) for one in known])))
    columns = [
        marked(head_titles.get(head, head), result.about.mark if result else None)
        for (_, head), result in zip(heads, results, strict=True)
    ]
    groups = [(run.name, len(run.phases) or 1) for run in report.runs]
    return ResultTable(f"{title}, {convention}", corner, columns, rows, groups=groups)


def _per_phase(report: Report, convention: str, corner: str) -> ResultTable:
    results = [run.phases.get(HEAD, {}).get(convention) for run in report.runs]
    metrics = [metric for metric in metrics_of(one for one in results if one) if metric != "accuracy"]
    rows = []
    for phase in report.truth.spec.phases:
        cells = []
        for run, result in zip(report.runs, results, strict=True):
            entry = result.per_phase.get(phase) if result and result.per_phase else None
            known = run.intervals.per_phase.get(convention, {}).get(phase, {})
            cells += _cells(
                [entry.scores.get(metric) if entry else None for metric in metrics], map(known.get, metrics)
            )
            cells.append(str(entry.videos) if entry else "-")
        rows.append((phase, cells))
    columns = [*map(metric_title, metrics), "Videos"] * len(report.runs)
    groups = [(run.name, len(metrics) + 1) for run in report.runs]
    caption = f"Each {corner.lower()}, {HEAD_TITLES[HEAD].lower()}, {convention}"
    word = "phase" if corner == "Phase" else "class"
    notes = [f"Videos: how many have the {word} in their truth. ± here: over the videos that count."]
    return ResultTable(caption, corner, columns, rows, notes, groups)


def _cells(scores: Iterable[Score | None], intervals: Iterable[Interval | None]) -> list[str]:
    """Return cells with mean and standard deviation, and below them the interval, if there is one."""
    pairs = zip(scores, intervals, strict=True)
    return [
        f"{mean_std_text(one)}\n{interval_text(found if one else None, IN_BRACKETS)}".rstrip() for one, found in pairs
    ]


def _tools(runs: Sequence[RunResults]) -> ResultTable:
    found = [run.evaluation.tools for run in runs]
    about = next(tools.about for tools in found if tools)
    extra = THRESHOLD_TITLES if all(tools.at_threshold for tools in found if tools) else ()
    metrics = shared_tool_metrics([tools for tools in found if tools])
    columns = ["AP pooled", "AP over videos", *tool_metric_columns(metrics), *extra]
    cells = [tool_cells(tools, metrics) if tools else {} for tools in found]
    rows = []
    for name in (*runs[0].truth.spec.tools, MEAN_AP):
        texts = [text for one in cells for text in one.get(name, ["-"] * len(columns))[: len(columns)]]
        rows.append((name[:1].upper() + name[1:] if name == MEAN_AP else name, texts))
    notes = [
        f"AP pooled: {about.map_pooled}. AP over videos: {about.map_video}; ± {about.std}.",
        f"Absent tools: {about.absent_tool}.",
        *(["Precision, recall and F1 at thresholds chosen on the validation videos."] if extra else []),
        _counts(about),
        *_mapped(runs),
    ]
    groups = [(run.name, len(columns)) for run in runs]
    return ResultTable("Average precision", "Tool", columns * len(runs), rows, notes, groups)


def _mapped(runs: Sequence[RunResults]) -> list[str]:
    """Return lines with the mAP of tools mapped from the phase branch, for joint nets that have a mapping."""
    found = [(run.name, run.evaluation.joint and run.evaluation.joint.mapped_tools) for run in runs]
    return [
        f"{name}: tools mapped from the phase branch, mAP {number_text(tools.map_pooled)}."
        for name, tools in found
        if tools
    ]


def _provenance(runs: Sequence[RunResults]) -> ResultTable:
    rows = [(title, [_text(value(run)) for run in runs]) for title, value in _PROVENANCE.items()]
    shown = [(title, cells) for title, cells in rows if any(cell != "-" for cell in cells)]
    return ResultTable("Where the numbers come from", "", [run.name for run in runs], shown)


def _text(value: Any) -> str:
    return "-" if value in (None, "", {}, []) else str(value)


def _versions(run: RunResults) -> str:
    packages = run.environment.get("packages") or {}
    names = ("Python " + str(run.environment.get("python")),) if run.environment.get("python") else ()
    return ", ".join([*names, *(f"{name} {packages[name]}" for name in PACKAGES if packages.get(name))])


def _machine(run: RunResults) -> str:
    environment = run.environment
    cores = f"{environment['cores']} cores" if environment.get("cores") else ""
    parts = (environment.get("processor"), cores, *environment.get("gpus", ()), environment.get("platform"))
    return ", ".join(str(part) for part in parts if part)


def _model(run: RunResults) -> str:
    head = settings_of(run, "temporal", "head")
    backbone = settings_of(run, "encoder", "backbone") or settings_of(run, "cnn", "backbone")
    if run.tools_alone:
        return f"{backbone or 'a CNN'}, tools only"
    name = f"{head.get('name')}, hidden {head['hidden']}" if head and head.get("hidden") else (head or {}).get("name")
    return "; ".join(str(part) for part in (backbone, name and marked(name, run.evaluation.mark)) if part)


def _seconds(run: RunResults) -> str:
    seconds = run.summary.get("seconds") or {}
    return ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())


_PROVENANCE = {
    "Data set": lambda run: (run.truth.spec.title or run.truth.spec.name) + (" (SIMULATED)" if run.simulated else ""),
    "Videos (train/val/test)": lambda run: run.summary.get("split"),
    "Evaluated on": lambda run: f"{run.evaluation.scored_words}, split {run.truth.split}",
    "Frames per second": lambda run: f"{run.truth.fps:g}",
    "Model": _model,
    "Imported from": lambda run: run.evaluation.imported,
    "Fine-tuned from": lambda run: run.evaluation.fine_tuned_from,
    "Seed": lambda run: settings_of(run, "seed"),
    "Revision": lambda run: run.environment.get("git_revision"),
    "Versions": _versions,
    "Machine": _machine,
    "Cost": _seconds,
    "Evaluation": lambda run: (run.evaluation.identity_sha256 or "")[:16],
}


def _settings(runs: Sequence[RunResults]) -> ResultTable | None:
    """Return the table of settings in which runs differ, or None if there are none (as for a single run)."""
    rows, names = differing_settings(runs), [run.name for run in runs]
    return ResultTable("Settings in which the runs differ", "Setting", names, rows) if rows else None
