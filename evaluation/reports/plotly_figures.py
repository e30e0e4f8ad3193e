"""Make the report's figures as Plotly specifications, which are plain dictionaries.

They are drawn by plotly.js inside the page and, for papers, by `static_files`. Ribbons and timelines contain one bar
per run of equal frames, not one point per frame. Times are milliseconds from the start of the video, on a plain axis
with our own ticks, because Plotly's date axes would read the numbers 1000 to 9999 as years.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.conventions import MAIN_CONVENTION, metric_title
from evaluation.metrics.results import Interval
from evaluation.metrics.tools import DEFAULT_THRESHOLD
from evaluation.reports.gather import TRUTH_NAME, Report, RunResults
from evaluation.reports.paper_figures import (
    UNLABELLED,
    confusion_counts,
    row_percent,
    sample_edges_s,
)
from evaluation.reports.plotly_base import (
    RUN_PATTERNS,
    Figure,
    base_layout,
    clock,
    legend,
    plain,
    plain_axis,
    rows_axis,
    run_line,
)
from evaluation.reports.plotly_curves import precision_recall, reliability_diagram
from evaluation.reports.tables import IN_BRACKETS, interval_text
from features.run_lengths import true_spans

MOST_WIDE_ROWS = 20  # a confusion matrix of more classes has lower rows
_TICK_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
_TICKS = 5
_ROW_PX = 26
_NAME_LETTERS = 14
_ROW_LETTERS = 26


def all_figures(report: Report) -> dict[str, Figure]:
    """Return all figures of the report by id.

    The ids are `ribbon-0`, `tools-0` (one per video, in the report's order), `bars-<convention>-<metric>`,
    `confusion-<run>`, `reliability`, `curve-<tool>` and `training-<number>`; `track-<track>-ribbon-0`,
    `track-<track>-confusion-<run>` and `track-<track>-reliability` for additional label tracks.
    """
    found: list[Figure] = []
    for number, video in enumerate(report.videos):
        found += filter(None, [ribbon(report, number, video), tool_timeline(report, number, video)])
    found += [_bars(report, name, metric) for name, metrics in report.phase_metrics.items() for metric in metrics]
    found += filter(None, (confusion(run, number) for number, run in enumerate(report.runs)))
    found += filter(None, [reliability_diagram(report.runs)])
    found += precision_recall(report.runs)
    found += training(report.runs)
    found += [figure for track in report.tracks for figure in _track_figures(report.of_track(track), track)]
    return {figure.id: figure for figure in found}


def _track_figures(report: Report, track: str) -> Iterator[Figure]:
    """Yield the ribbons, confusion matrices and reliability of an additional track, with ids `track-<track>-...`."""
    ribbons = (ribbon(report, number, video) for number, video in enumerate(report.videos))
    matrices = (confusion(run, number) for number, run in enumerate(report.runs))
    for figure in filter(None, (*ribbons, *matrices, reliability_diagram(report.runs))):
        title, alt = f"{figure.title}, {track}", f"{track}: {figure.alt}".replace("Phases of", "classes of")
        file = f"{track}-{figure.file}" if figure.file else ""
        yield replace(figure, id=f"track-{track}-{figure.id}", title=title, alt=alt, file=file)


def _place(number: int, count: int) -> dict[str, float]:
    """Return the position of one of `count` bars within its row."""
    height = 0.8 / count
    return {"offset": number * height - 0.4, "width": 0.92 * height}


def _time_axis(end_ms: int) -> dict[str, Any]:
    wide = end_ms / 1000 / _TICKS
    step_s = next((step for step in _TICK_STEPS_S if step >= wide), _TICK_STEPS_S[-1])
    ticks = range(0, end_ms + 1, step_s * 1000)
    return plain_axis(range=[0, end_ms], tickvals=list(ticks), ticktext=[clock(tick / 1000) for tick in ticks])


# ---------------------------------------------------------------------------------------------- a video


def tracks(report: Report, video: str) -> list[tuple[str, NDArray[Any]]]:
    """Return (name, phases (T,)) of a video: the truth, if it has labels, and then each run's prediction."""
    truth = report.truth.videos[video].phase
    shown = [(TRUTH_NAME, truth)] if (truth >= 0).any() else []
    return shown + [(run.name, run.predictions[video].phase) for run in report.runs if video in run.predictions]


def edges_ms(report: Report, video: str) -> NDArray[np.int64] | None:
    """Return the times in ms at which frames begin, and the end of the last one, (T + 1,).

    Returns None if no run has predictions.
    """
    time_s = report.times_s(video)
    if time_s is None:
        return None
    return np.rint(1000.0 * sample_edges_s(time_s, len(time_s), report.truth.fps)).astype(np.int64)


def ribbon(report: Report, number: int, video: str) -> Figure | None:
    """Draw truth above predictions over time. Each run of a phase is one bar, with the phase's number in it."""
    edges = edges_ms(report, video)
    if edges is None or not any(video in run.predictions for run in report.runs):
        return None
    rows, phases = tracks(report, video), report.truth.spec.phases
    names = [plain(name, _NAME_LETTERS) for name, _ in rows]
    names = [name if names.index(name) == i else f"{i} {name}" for i, name in enumerate(names)]
    data = []
    for phase, (title, colour, text) in enumerate([*legend(phases), ("no label", UNLABELLED["facecolor"], "#000000")]):
        value = phase if phase < len(phases) else -1
        masks = [(name, track == value) for name, (_, track) in zip(names, rows, strict=True)]
        hover = f"%{{y}}: <b>{plain(title)}</b><br>%{{customdata}}<extra></extra>"
        trace = _span_bars(masks, edges, colour, hover) | {"meta": plain(title), "width": 0.86}
        if trace["y"]:
            inside = {"textposition": "inside", "insidetextanchor": "middle", "textangle": 0}
            digits = [str(phase + 1) if value >= 0 else ""] * len(trace["y"])
            data.append(trace | inside | {"text": digits, "insidetextfont": {"color": text, "size": 11}})
    layout = base_layout(
        26,
        xaxis=_time_axis(int(edges[-1])),
        yaxis=plain_axis(type="category", categoryarray=names, range=[len(names) - 0.5, -0.5], showgrid=False),
        uniformtext={"mode": "hide", "minsize": 9},
    )
    duration = clock(edges[-1] / 1000)
    alt = f"Phases of {video} over {duration}: " + ", ".join(name for name, _ in rows) + ". Arrow keys step through it."
    return Figure(f"ribbon-{number}", video, alt, 36 + _ROW_PX * len(rows), {"data": data, "layout": layout})


def _span_bars(
    rows: Iterable[tuple[Any, NDArray[np.bool_]]], edges: NDArray[np.int64], colour: str, hover: str
) -> dict[str, Any]:
    """Return a trace with one bar (in ms) for each run of frames in which a row's mask is true.

    `rows` contains (y, mask (T,)).
    """
    bars = [(y, int(edges[start]), int(edges[stop])) for y, mask in rows for start, stop in true_spans(mask)]
    return {
        "type": "bar",
        "orientation": "h",
        "y": [y for y, _, _ in bars],
        "base": [start for _, start, _ in bars],
        "x": [stop - start for _, start, stop in bars],
        "marker": {"color": colour, "line": {"width": 0}},
        "customdata": [f"{clock(start / 1000)} to {clock(stop / 1000)}" for _, start, stop in bars],
        "hovertemplate": hover,
    }


def tool_timeline(report: Report, number: int, video: str) -> Figure | None:
    """Draw when each tool is present, with the truth above, and each run's predictions (at its thresholds) below."""
    edges, tools = edges_ms(report, video), report.truth.spec.tools
    presence = list(_tool_presence(report, video))
    if edges is None or not presence:
        return None
    data = []
    for row, (name, colour, present) in enumerate(presence):
        hover = "%{fullData.name}: <b>%{text}</b><br>%{customdata}<extra></extra>"
        trace = _span_bars(enumerate(present.T), edges, colour, hover)
        words = {"text": [plain(tools[k]) for k in trace["y"]], "textposition": "none", "name": plain(name, 30)}
        data.append(trace | _place(row, len(presence)) | words)
    layout = base_layout(
        26,
        xaxis=_time_axis(int(edges[-1])),
        yaxis=rows_axis([plain(tool, _ROW_LETTERS) for tool in tools]),
        showlegend=True,
    )
    alt = f"Tools in {video} over time: " + ", ".join(name for name, _, _ in presence)
    height = 80 + 9 * len(tools) * (1 + len(presence))
    return Figure(f"tools-{number}", video, alt, height, {"data": data, "layout": layout}, f"tools-{video}")


def _tool_presence(report: Report, video: str) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Yield (name, colour, present (T, K)) of the labels, if there are any, and of each run's predictions.

    Predictions are scores above the run's thresholds, or above 0.5 if it has none.
    """
    labels = report.truth.videos[video].tools
    if not report.truth.spec.tools or not labels.size:
        return
    if (labels >= 0).any():
        yield TRUTH_NAME, "#222222", labels == 1
    for number, run in enumerate(report.runs):
        if video in run.tool_scores:
            limits = np.array([_threshold(run, tool) for tool in run.truth.spec.tools])
            yield run.name, run_line(number)["color"], run.tool_scores[video] >= limits


def _threshold(run: RunResults, tool: str) -> float:
    tools = run.evaluation.tools
    entry = tools.per_tool.get(tool) if tools else None
    return DEFAULT_THRESHOLD if entry is None or entry.threshold is None else entry.threshold


# ---------------------------------------------------------------------------------------------- all videos


def _bars(report: Report, convention: str, metric: str) -> Figure:
    """Draw one bar with its interval per phase and run, under one convention and metric."""
    phases = report.truth.spec.phases
    known = [(number, run) for number, run in enumerate(report.runs) if run.intervals.per_phase]
    data = [
        _run_bars(run, number, phases, [run.intervals.per_phase[convention][phase][metric] for phase in phases])
        | _place(place, len(known))
        for place, (number, run) in enumerate(known)
    ]
    title = plain(metric_title(metric))
    layout = base_layout(
        40,
        xaxis=plain_axis(range=[0, 104], ticksuffix=" %", title={"text": title, "standoff": 6}),
        yaxis=rows_axis([_numbered(i, phase) for i, phase in enumerate(phases)]),
        showlegend=len(data) > 1,
    )
    alt = f"{title} of each phase with 95 % intervals, {convention}; the numbers are in the table above"
    height = 90 + len(phases) * (18 + 14 * len(data))
    file = f"phases-{metric}" if convention == MAIN_CONVENTION else ""
    return Figure(f"bars-{convention}-{metric}", convention, alt, height, {"data": data, "layout": layout}, file)


def _run_bars(run: RunResults, number: int, phases: Sequence[str], entries: Sequence[Interval]) -> dict[str, Any]:
    def reach(entry: Interval, end: float | None) -> float | None:
        """Return the length of an error bar, or None for none: length 0 would suggest that there is no uncertainty."""
        return None if end is None or entry.mean is None else abs(end - entry.mean)

    words = [
        "-" if one.mean is None else f"{one.mean:.1f} % {interval_text(one, IN_BRACKETS)}".rstrip() for one in entries
    ]
    return {
        "type": "bar",
        "orientation": "h",
        "name": plain(run.name, 30),
        "y": list(range(len(phases))),
        "x": [entry.mean for entry in entries],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [reach(entry, entry.high) for entry in entries],
            "arrayminus": [reach(entry, entry.low) for entry in entries],
            "color": "#222222",
            "thickness": 1.2,
            "width": 4,
        },
        "marker": {
            "color": run_line(number)["color"],
            "pattern": {
                "shape": RUN_PATTERNS[number % len(RUN_PATTERNS)],
                "fillmode": "overlay",
                "fgcolor": "#FFFFFF",
                "solidity": 0.2,
            },
        },
        "customdata": [[_numbered(i, phase), word] for i, (phase, word) in enumerate(zip(phases, words, strict=True))],
        "hovertemplate": "%{fullData.name}<br>%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
    }


def _numbered(phase: int, name: str) -> str:
    return f"{phase + 1} {plain(name, _ROW_LETTERS)}"


def confusion(run: RunResults, number: int) -> Figure | None:
    """Draw the confusion matrix: the percentage of each phase's true frames that are predicted as each phase."""
    truth, predicted = run.labelled
    phases = run.truth.spec.phases
    if not truth:
        return None
    counts = confusion_counts(truth, predicted, len(phases))
    cells = [[None if np.isnan(value) else float(value) for value in row] for row in row_percent(counts)]
    digits = [str(c + 1) for c in range(len(phases))]
    trace = {
        "type": "heatmap",
        "x": list(range(len(phases))),
        "y": list(range(len(phases))),
        "z": cells,
        "text": [["" if not value else f"{value:.0f}" for value in row] for row in cells],
        "texttemplate": "%{text}",
        "customdata": [
            [[_numbered(row, phases[row]), _numbered(column, phases[column]), f"{int(counts[row, column]):,}"]
             for column in range(len(phases))] for row in range(len(phases))
        ],
        "hovertemplate": "truth %{customdata[0]}<br>predicted %{customdata[1]}<br>%{z:.1f} %, "
        "%{customdata[2]} frames<extra></extra>",
        "colorscale": [[0, "#FFFFFF"], [0.5, "#6BAED6"], [1, "#08306B"]],
        "zmin": 0,
        "zmax": 100,
        "showscale": False,
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
    }  # fmt: skip
    ticks = {"tickvals": list(range(len(phases))), "showgrid": False}
    layout = base_layout(
        40,
        xaxis=plain_axis(**ticks, ticktext=digits, side="bottom", title={"text": "predicted", "standoff": 4}),
        yaxis=rows_axis([_numbered(i, name) for i, name in enumerate(phases)], title={"text": "truth"}),
    )
    right = 100.0 * float(np.trace(counts)) / max(int(counts.sum()), 1)
    alt = f"Confusion matrix of {run.name}: {right:.1f} % of {int(counts.sum()):,} frames on the diagonal"
    height, file = 60 + (40 if len(phases) <= MOST_WIDE_ROWS else 18) * len(phases), f"confusion-{number + 1}"
    return Figure(f"confusion-{number}", run.name, alt, height, {"data": [trace], "layout": layout}, file)


def training(runs: Sequence[RunResults]) -> Iterator[Figure]:
    """Yield a figure for each training of any run, with the loss above and validation scores below, over epochs."""
    for number, stage in enumerate(dict.fromkeys(stage for run in runs for stage in run.curves)):
        data = [line for i, run in enumerate(runs) for line in _training_lines(run, i, stage, len(runs) > 1)]
        scores = any(line["yaxis"] == "y2" for line in data)
        layout = base_layout(
            40,
            xaxis=plain_axis(
                title={"text": "epoch", "standoff": 4}, anchor="y2" if scores else "y", rangemode="tozero"
            ),
            yaxis=plain_axis(title={"text": "loss", "standoff": 4}, domain=[0.56, 1] if scores else [0, 1]),
            showlegend=True,
        )
        if scores:
            layout["yaxis2"] = plain_axis(
                title={"text": "validation", "standoff": 4}, domain=[0, 0.46], range=[0, 1.02]
            )
        alt, file = f"Training curves of {stage}", f"training-{stage.replace('/', '-')}"
        yield Figure(f"training-{number}", stage, alt, 360, {"data": data, "layout": layout}, file)


def training_scores(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the validation scores that have a value in at least one epoch."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("val_"))
    return [key for key in keys if any(row.get(key) is not None for row in rows)]


def score_title(key: str) -> str:
    """Return the title of a validation score: `validation mAP` for `val_map`."""
    return key.replace("val_", "validation ").replace("_", " ").replace(" map", " mAP")


def _training_lines(run: RunResults, number: int, stage: str, named: bool) -> Iterator[dict[str, Any]]:
    rows = run.curves.get(stage, [])
    for which, key in enumerate(["loss", *training_scores(rows)] if rows else []):
        title = score_title(key)
        name = f"{plain(run.name, 20)}: {title}" if named else title
        yield {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": [int(row["epoch"]) + 1 for row in rows],
            "y": [row.get(key) for row in rows],
            "yaxis": "y" if key == "loss" else "y2",
            "line": run_line(number if named else which, number + which),
            "hovertemplate": "%{fullData.name}<br>epoch %{x}: %{y:.4g}<extra></extra>",
        }
