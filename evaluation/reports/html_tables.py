"""The report's tables, a column or a group of columns a run; each says which rules its numbers follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.metrics.phases import METRICS
from evaluation.reports.gather import HEAD, Report, RunResults, differing_settings, settings_of
from evaluation.reports.tables import METRIC_TITLES, mean_std_text, number_text

HEAD_TITLES = {HEAD: "With time", "frame": "Frame by frame", "majority": "Longest phase always"}
PACKAGES = ("surgstage", "torch", "accelerate")


@dataclass(frozen=True)
class Cell:
    """What a cell says, and in smaller letters an interval."""

    text: str
    more: str = ""


@dataclass(frozen=True)
class Table:
    """`groups` are (title, columns below it); `rows` are (name, cells); `notes` stand below."""

    caption: str
    corner: str
    groups: list[tuple[str, int]]
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    notes: list[str]

    @property
    def group_starts(self) -> set[int]:
        """Columns where a group begins, for a line in front of it."""
        starts, column = set(), 0
        for _, width in self.groups if len(self.groups) > 1 else ():
            starts.add(column)
            column += width
        return starts


@dataclass(frozen=True)
class Convention:
    """Everything under one convention: what a reader must know of the numbers, and the tables they stand in."""

    title: str
    about: list[str]
    tables: list[Table]


@dataclass(frozen=True)
class Tables:
    """All tables: those of each convention, tools, where the numbers come from, settings."""

    conventions: dict[str, Convention]
    tools: Table | None
    provenance: Table
    settings: Table | None


def all_tables(report: Report) -> Tables:
    """The tables of a report."""
    found = dict.fromkeys(name for run in report.runs for head in run.phases.values() for name in head)
    shared = [name for name in found if all(name in head for run in report.runs for head in run.phases.values())]
    return Tables(
        conventions={name: _convention(report, name) for name in shared},
        tools=_tools(report.runs) if any(run.tools for run in report.runs) else None,
        provenance=_provenance(report.runs),
        settings=_settings(report.runs),
    )


def _convention(report: Report, name: str) -> Convention:
    about = next(head[name]["about"] for run in report.runs for head in run.phases.values())
    tables = [_segments(report)] if name == "segmental" else [_overall(report, name)]
    if name != "segmental" and any(HEAD in run.phases for run in report.runs):
        tables.append(_per_phase(report, name))
    return Convention(str(about["title"]), _about(about), tables)


def _about(about: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the numbers."""
    window = f", boundaries relaxed by {about['window_s']:g} s" if about["window_s"] else ""
    left_out = about["videos_without_labels"]
    lines = [
        f"Convention {about['convention']}: {about['title']}{window}. After {about['source']}.",
        f"Absent phases: {about['absent_phase']}.",
        f"±: standard deviation, {about['std']}. In brackets: 95 % interval, bootstrap over videos.",
        f"{_count(about['videos'], 'video')} of split {about['split']}, {about['frames']:,} labelled frames at "
        f"{about['fps']:g} fps; {_count(about['seeds'], 'seed')} a run. Percent.",
    ]
    return lines + ([f"Without labels and left out: {', '.join(left_out)}."] if left_out else [])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _heads(run: RunResults) -> list[str]:
    return list(run.phases) or [HEAD]


def _groups(runs: Sequence[RunResults], widths: Iterable[int]) -> list[tuple[str, int]]:
    return [(run.name, width) for run, width in zip(runs, widths, strict=True)]


def _overall(report: Report, convention: str) -> Table:
    runs, rows = report.runs, []
    for metric, title in METRIC_TITLES.items():
        cells = []
        for run, intervals in zip(runs, report.intervals, strict=True):
            for head in _heads(run):
                result = run.phases.get(head, {}).get(convention)
                interval = intervals.overall[convention][metric] if intervals and head == HEAD else None
                cells.append(_cell(result[metric] if result else None, interval))
        rows.append((title, cells))
    columns = [HEAD_TITLES.get(head, head) for run in runs for head in _heads(run)]
    groups = _groups(runs, (len(_heads(run)) for run in runs))
    return Table(f"Phases over all, {convention}", "Metric", groups, columns, rows, [])


def _per_phase(report: Report, convention: str) -> Table:
    rows = []
    for phase in report.truth.spec.phases:
        cells = []
        for run, intervals in zip(report.runs, report.intervals, strict=True):
            entry = run.phases.get(HEAD, {}).get(convention, {}).get("per_phase", {}).get(phase)
            for metric in METRICS:
                interval = intervals.per_phase[convention][phase][metric] if intervals else None
                cells.append(_cell(entry[metric] if entry else None, interval))
            cells.append(Cell(str(entry["videos"]) if entry else "-"))
        rows.append((phase, cells))
    columns = [*(METRIC_TITLES[metric] for metric in METRICS), "Videos"] * len(report.runs)
    groups = _groups(report.runs, [len(METRICS) + 1] * len(report.runs))
    caption = f"A phase at a time, {HEAD_TITLES[HEAD].lower()}, {convention}"
    notes = ["Videos: how many have the phase in their truth. ± here: over the videos that count."]
    return Table(caption, "Phase", groups, columns, rows, notes)


def _segments(report: Report) -> Table:
    results = [run.phases.get(head, {}).get("segmental") for run in report.runs for head in _heads(run)]
    known = next(result for result in results if result)
    rows = [("Accuracy", [_cell(result["accuracy"] if result else None) for result in results])]
    rows.append(("Edit score", [_cell(result["edit"] if result else None) for result in results]))
    for key in (key for key in known if key.startswith("f1@")):
        title = key.replace("f1", "F1")
        rows.append((f"{title}, pooled", [Cell(number_text(r[key]["pooled"]) if r else "-") for r in results]))
        rows.append((f"{title}, over videos", [_cell(result[key] if result else None) for result in results]))
    columns = [HEAD_TITLES.get(head, head) for run in report.runs for head in _heads(run)]
    groups = _groups(report.runs, (len(_heads(run)) for run in report.runs))
    return Table("Segments, segmental", "Score", groups, columns, rows, [])


def _cell(entry: Mapping[str, float | None] | None, interval: Mapping[str, float | None] | None = None) -> Cell:
    if entry is None:
        return Cell("-")
    known = interval is not None and interval["low"] is not None and interval["high"] is not None
    more = f"[{interval['low']:.1f}, {interval['high']:.1f}]" if known and interval is not None else ""
    return Cell(mean_std_text(entry), more)


def _tools(runs: Sequence[RunResults]) -> Table:
    about = next(run.tools["about"] for run in runs if run.tools)
    at_threshold = all("at_threshold" in run.tools for run in runs if run.tools)
    extra = ("precision", "recall", "f1") if at_threshold else ()
    rows = []
    for tool in runs[0].truth.spec.tools:
        cells = []
        for run in runs:
            entry = run.tools["per_tool"].get(tool) if run.tools else None
            cells += [_number(entry, "ap_pooled"), _cell(entry["ap_video"] if entry else None)]
            cells += [_number(entry, metric) for metric in extra]
        rows.append((tool, cells))
    means = []
    for run in runs:
        means += [_number(run.tools, "map_pooled"), _number(run.tools, "map_video")]
        means += [_number(run.tools["at_threshold"] if run.tools else None, metric) for metric in extra]
    rows.append(("Mean (mAP)", means))
    notes = [
        f"AP pooled: {about['map_pooled']}. AP over videos: {about['map_video']}; ± {about['std']}.",
        f"Absent tools: {about['absent_tool']}.",
        *(["Precision, recall and F1 at thresholds chosen on the validation videos."] if extra else []),
        f"{_count(about['videos'], 'video')} of split {about['split']} at {about['fps']:g} fps; "
        f"{_count(about['seeds'], 'seed')} a run. Percent.",
    ]
    columns = ["AP pooled", "AP over videos", *(METRIC_TITLES[metric] for metric in extra)]
    return Table(
        "Average precision", "Tool", _groups(runs, [len(columns)] * len(runs)), columns * len(runs), rows,
        notes + _mapped(runs),
    )  # fmt: skip


def _mapped(runs: Sequence[RunResults]) -> list[str]:
    """mAP of tools mapped from the phase branch, for joint nets that have it."""
    found = [(run.name, run.metrics.get("mapped_tools")) for run in runs]
    return [
        f"{name}: tools mapped from the phase branch, mAP {number_text(tools['map_pooled'])}."
        for name, tools in found
        if tools
    ]


def _number(entry: Mapping[str, Any] | None, key: str) -> Cell:
    return Cell(number_text(entry[key]) if entry else "-")


def _provenance(runs: Sequence[RunResults]) -> Table:
    rows = [(title, [Cell(_text(value(run))) for run in runs]) for title, value in _PROVENANCE.items()]
    shown = [(title, cells) for title, cells in rows if any(cell.text != "-" for cell in cells)]
    return Table("Where the numbers come from", "", [], [run.name for run in runs], shown, [])


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
    "Frames a second": lambda run: f"{run.truth.fps:g}",
    "Model": _model,
    "Imported from": lambda run: run.metrics.get("imported"),
    "Fine-tuned from": lambda run: run.metrics.get("fine_tuned_from"),
    "Seed": lambda run: settings_of(run, "seed"),
    "Revision": lambda run: run.environment.get("git_revision"),
    "Versions": _versions,
    "Machine": _machine,
    "Cost": _seconds,
    "Evaluation": lambda run: (run.metrics.get("identity_sha256") or "")[:16],
}


def _settings(runs: Sequence[RunResults]) -> Table | None:
    """None where there is nothing in which they differ, one run alone included."""
    rows = [(key, [Cell(value) for value in values]) for key, values in differing_settings(runs)]
    if not rows:
        return None
    return Table("Settings in which the runs differ", "Setting", [], [run.name for run in runs], rows, [])
