"""The report's tables, with one column or group of columns per run; each states the rules that its numbers follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.metrics.results import Interval, PhaseAbout, PhaseResults, PooledScore, Score
from evaluation.metrics.scores import metric_title
from evaluation.reports.gather import HEAD, Report, RunResults, differing_settings, settings_of
from evaluation.reports.tables import (
    IN_BRACKETS,
    MEAN_AP,
    THRESHOLD_TITLES,
    interval_text,
    mean_std_text,
    metrics_of,
    number_text,
    tool_cells,
)

HEAD_TITLES = {HEAD: "With time", "frame": "Frame by frame", "majority": "Longest phase always"}
PACKAGES = ("surgstage", "torch", "accelerate")


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and in smaller letters an interval."""

    text: str
    more: str = ""


@dataclass(frozen=True)
class ReportTable:
    """`groups` are (title, columns below it); `rows` are (name, cells); `notes` are shown below."""

    caption: str
    corner: str
    groups: list[tuple[str, int]]
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    notes: list[str]

    @property
    def group_starts(self) -> set[int]:
        """Columns at which a group begins, which have a line on their left."""
        starts, column = set(), 0
        for _, width in self.groups if len(self.groups) > 1 else ():
            starts.add(column)
            column += width
        return starts


@dataclass(frozen=True)
class ConventionSection:
    """Everything under one convention: what a reader must know about the numbers, and their tables."""

    title: str
    about: list[str]
    tables: list[ReportTable]


@dataclass(frozen=True)
class Tables:
    """All tables: those of each convention, tools, where the numbers come from, settings."""

    conventions: dict[str, ConventionSection]
    tools: ReportTable | None
    provenance: ReportTable
    settings: ReportTable | None


def all_tables(report: Report) -> Tables:
    """The tables of a report."""
    found = dict.fromkeys(name for run in report.runs for head in run.phases.values() for name in head)
    shared = [name for name in found if all(name in head for run in report.runs for head in run.phases.values())]
    return Tables(
        conventions={name: _section(report, name) for name in shared},
        tools=_tools(report.runs) if any(run.evaluation.tools for run in report.runs) else None,
        provenance=_provenance(report.runs),
        settings=_settings(report.runs),
    )


def _section(report: Report, name: str) -> ConventionSection:
    known = next(head[name] for run in report.runs for head in run.phases.values())
    if not known.of_frames:
        tables = [_segments(report, name, known)]
    else:
        tables = [_overall(report, name)]
        tables += [_per_phase(report, name)] if any(HEAD in run.phases for run in report.runs) else []
    return ConventionSection(known.about.title, _about(known.about), tables)


def _about(about: PhaseAbout) -> list[str]:
    """What a reader must know of the numbers."""
    window = f", boundaries relaxed by {about.window_s:g} s" if about.window_s else ""
    rate = "at an unknown rate" if about.fps is None else f"at {about.fps:g} fps"
    lines = [
        f"Convention {about.convention}: {about.title}{window}. After {about.source}.",
        f"Absent phases: {about.absent_phase}.",
        f"±: standard deviation, {about.std}. In brackets: 95 % interval, bootstrap over videos.",
        f"{_count(about.videos, 'video')} of split {about.split}, {about.frames:,} labelled frames {rate}; "
        f"{_count(about.seeds, 'seed')} per run. Percent.",
    ]
    left_out = about.videos_without_labels
    return lines + ([f"Without labels and left out: {', '.join(left_out)}."] if left_out else [])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _heads(run: RunResults) -> list[str]:
    return list(run.phases) or [HEAD]


def _head_columns(report: Report, convention: str) -> list[tuple[str, PhaseResults | None]]:
    """(head, its results) of each run in turn."""
    return [(head, run.phases.get(head, {}).get(convention)) for run in report.runs for head in _heads(run)]


def _head_table(report: Report, title: str, corner: str, rows: list[tuple[str, list[Cell]]]) -> ReportTable:
    """A table with one column per head, grouped by run."""
    columns = [HEAD_TITLES.get(head, head) for run in report.runs for head in _heads(run)]
    groups = _groups(report.runs, (len(_heads(run)) for run in report.runs))
    return ReportTable(title, corner, groups, columns, rows, [])


def _groups(runs: Sequence[RunResults], widths: Iterable[int]) -> list[tuple[str, int]]:
    return [(run.name, width) for run, width in zip(runs, widths, strict=True)]


def _overall(report: Report, convention: str) -> ReportTable:
    results = _head_columns(report, convention)
    # Only the predictions of the head over time are in files, so only they have intervals.
    known = [i.overall.get(convention, {}) if i and head == HEAD else {}
             for run, i in zip(report.runs, report.intervals, strict=True) for head in _heads(run)]  # fmt: skip
    rows = []
    for metric in metrics_of(one for _, one in results if one):
        scores = [one.score(metric) if one else None for _, one in results]
        rows.append((metric_title(metric), [_cell(s, i.get(metric)) for s, i in zip(scores, known, strict=True)]))
    return _head_table(report, f"Phases over all, {convention}", "Metric", rows)


def _per_phase(report: Report, convention: str) -> ReportTable:
    results = [run.phases.get(HEAD, {}).get(convention) for run in report.runs]
    metrics = [metric for metric in metrics_of(one for one in results if one) if metric != "accuracy"]
    rows = []
    for phase in report.truth.spec.phases:
        cells = []
        for result, intervals in zip(results, report.intervals, strict=True):
            entry = result.per_phase.get(phase) if result and result.per_phase else None
            known = intervals.per_phase.get(convention, {}).get(phase, {}) if intervals else {}
            cells += [_cell(entry.scores.get(metric) if entry else None, known.get(metric)) for metric in metrics]
            cells.append(Cell(str(entry.videos) if entry else "-"))
        rows.append((phase, cells))
    columns = [*map(metric_title, metrics), "Videos"] * len(report.runs)
    groups = _groups(report.runs, [len(metrics) + 1] * len(report.runs))
    caption = f"Each phase, {HEAD_TITLES[HEAD].lower()}, {convention}"
    notes = ["Videos: how many have the phase in their truth. ± here: over the videos that count."]
    return ReportTable(caption, "Phase", groups, columns, rows, notes)


def _segments(report: Report, convention: str, known: PhaseResults) -> ReportTable:
    rows = []
    for metric in known.metrics:
        title, results = metric_title(metric), _head_columns(report, convention)
        scores = [one.score(metric) if one else None for _, one in results]
        if isinstance(known.score(metric), PooledScore):
            pooled = [one.pooled if isinstance(one, PooledScore) else None for one in scores]
            rows.append((f"{title}, pooled", [Cell(number_text(value)) for value in pooled]))
            title += ", over videos"
        rows.append((title, [_cell(score) for score in scores]))
    return _head_table(report, f"Segments, {convention}", "Score", rows)


def _cell(score: Score | None, interval: Interval | None = None) -> Cell:
    return Cell(mean_std_text(score), interval_text(interval, IN_BRACKETS) if score else "")


def _tools(runs: Sequence[RunResults]) -> ReportTable:
    found = [run.evaluation.tools for run in runs]
    about = next(tools.about for tools in found if tools)
    extra = THRESHOLD_TITLES if all(tools.at_threshold for tools in found if tools) else ()
    columns = ["AP pooled", "AP over videos", *extra]
    cells = [tool_cells(tools) if tools else {} for tools in found]
    rows = []
    for name in (*runs[0].truth.spec.tools, MEAN_AP):
        texts = [text for one in cells for text in one.get(name, ["-"] * len(columns))[: len(columns)]]
        rows.append((name[:1].upper() + name[1:] if name == MEAN_AP else name, [Cell(text) for text in texts]))
    rate = "at an unknown rate" if about.fps is None else f"at {about.fps:g} fps"
    notes = [
        f"AP pooled: {about.map_pooled}. AP over videos: {about.map_video}; ± {about.std}.",
        f"Absent tools: {about.absent_tool}.",
        *(["Precision, recall and F1 at thresholds chosen on the validation videos."] if extra else []),
        f"{_count(about.videos, 'video')} of split {about.split} {rate}; "
        f"{_count(about.seeds, 'seed')} per run. Percent.",
        *_mapped(runs),
    ]
    groups = _groups(runs, [len(columns)] * len(runs))
    return ReportTable("Average precision", "Tool", groups, columns * len(runs), rows, notes)


def _mapped(runs: Sequence[RunResults]) -> list[str]:
    """mAP of tools mapped from the phase branch, for joint nets that have it."""
    found = [(run.name, run.evaluation.joint and run.evaluation.joint.mapped_tools) for run in runs]
    return [
        f"{name}: tools mapped from the phase branch, mAP {number_text(tools.map_pooled)}."
        for name, tools in found
        if tools
    ]


def _provenance(runs: Sequence[RunResults]) -> ReportTable:
    rows = [(title, [Cell(_text(value(run))) for run in runs]) for title, value in _PROVENANCE.items()]
    shown = [(title, cells) for title, cells in rows if any(cell.text != "-" for cell in cells)]
    return ReportTable("Where the numbers come from", "", [], [run.name for run in runs], shown, [])


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
        return f"{backbone or 'a CNN'}, tools alone"
    name = f"{head.get('name')}, hidden {head['hidden']}" if head and head.get("hidden") else (head or {}).get("name")
    return "; ".join(str(part) for part in (backbone, name) if part)


def _seconds(run: RunResults) -> str:
    seconds = run.summary.get("seconds") or {}
    return ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())


_PROVENANCE = {
    "Data set": lambda run: (run.truth.spec.title or run.truth.spec.name) + (" (SIMULATED)" if run.simulated else ""),
    "Videos (train/val/test)": lambda run: run.summary.get("split"),
    "Evaluated on": lambda run: f"{run.scored}, split {run.truth.split}",
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


def _settings(runs: Sequence[RunResults]) -> ReportTable | None:
    """None if the settings do not differ, as for a single run."""
    rows = [(key, [Cell(value) for value in values]) for key, values in differing_settings(runs)]
    if not rows:
        return None
    return ReportTable("Settings in which the runs differ", "Setting", [], [run.name for run in runs], rows, [])
