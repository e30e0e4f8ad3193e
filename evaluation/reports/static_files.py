"""The report's figures for papers: the same numbers as PDF and PNG, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import make_folder
from evaluation.metrics.conventions import MAIN_CONVENTION
from evaluation.metrics.scores import metric_title
from evaluation.reports.gather import TRUTH_NAME, Report, RunResults
from evaluation.reports.paper_figures import (
    confusion_counts,
    confusion_matrix,
    phase_ribbons,
    sample_edges_s,
    save_figure,
    short_name,
)
from evaluation.reports.plotly_figures import (
    RUN_COLOURS,
    RUN_PATTERNS,
    curve_points,
    score_title,
    tool_presence,
    training_scores,
)
from features.runs import true_spans

SUFFIXES = (".pdf", ".png")
_DASHES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (5, 1, 1, 1)))
_SMALL = {"fontsize": 8, "parse_math": False}  # a dollar sign in a name does not start a formula


def write_figures(folder: Path, report: Report) -> list[Path]:
    """Write every figure of the report into `folder`, each as PDF and PNG; returns the files.

    Raises UserError if the folder cannot be written.
    """
    make_folder(folder)
    written = []
    for name, draw in _drawings(report).items():
        for suffix in SUFFIXES:
            written.append(folder / f"{name}{suffix}")
            draw(written[-1])
    return written


def _drawings(report: Report) -> dict[str, Callable[[Path], None]]:
    """Functions that draw the figures of this report, by file name."""
    found: dict[str, Callable[[Path], None]] = {}
    predicted = [video for video in report.videos if any(video in run.predictions for run in report.runs)]
    if predicted:
        found["ribbons"] = partial(_ribbons, report=report, videos=predicted)
    for number, run in enumerate(report.runs, start=1):
        if run.labelled[0]:
            found[f"confusion-{number}"] = partial(_confusion, run=run)
    if known := next(filter(None, report.intervals), None):
        for metric in known.metrics:
            found[f"phases-{metric}"] = partial(phase_bars, report=report, metric=metric)
    if any(curve_points(run, k) for run in report.runs for k in range(len(run.truth.spec.tools))):
        found["precision-recall"] = partial(precision_recall, report=report)
    for stage in dict.fromkeys(stage for run in report.runs for stage in run.curves):
        name = f"training-{stage.replace('/', '-')}"
        found[name] = partial(training_curves, report=report, stage=stage)
    for video in (video for video in report.videos if any(video in run.tool_scores for run in report.runs)):
        if list(tool_presence(report, video)):
            found[f"tools-{video}"] = partial(tool_timeline, report=report, video=video)
    return found


def _confusion(path: Path, run: RunResults) -> None:
    phases = run.truth.spec.phases
    confusion_matrix(path, confusion_counts(*run.labelled, classes=len(phases)), phases, run.name)


def _ribbons(path: Path, report: Report, videos: list[str]) -> None:
    rows = [
        (v, report.truth.videos[v].phase, {r.name: r.predictions[v].phase for r in report.runs if v in r.predictions})
        for v in videos
    ]
    spec = report.truth.spec
    title = f"{spec.title or spec.name}, split {report.truth.split}: truth and predictions"
    times_s = {video: time_s for video in videos if (time_s := report.times_s(video)) is not None}
    phase_ribbons(path, rows, report.truth.fps, spec.phases, title, times_s)


def phase_bars(path: Path, report: Report, metric: str, convention: str = MAIN_CONVENTION) -> None:
    """One metric of each phase and run with its 95 % interval (bootstrap over videos)."""
    phases = report.truth.spec.phases
    runs = [(run, intervals) for run, intervals in zip(report.runs, report.intervals, strict=True) if intervals]
    figure, (axes,) = _figure(6.5, 1.0 + 0.24 * len(phases) * (len(runs) + 0.6))
    height = 0.8 / len(runs)
    for number, (run, intervals) in enumerate(runs):
        entries = [intervals.per_phase[convention][phase][metric] for phase in phases]
        table = np.array([[e.mean, e.low, e.high] for e in entries], dtype=float)  # (C, 3)
        reach = np.abs(table[:, 1:] - table[:, :1]).T  # NaN draws no whisker
        axes.barh(
            np.arange(len(phases)) - 0.4 + (number + 0.5) * height,
            np.nan_to_num(table[:, 0]),
            height * 0.92,
            xerr=reach,
            label=short_name(run.name, 30),
            color=RUN_COLOURS[number % len(RUN_COLOURS)],
            hatch=RUN_PATTERNS[number % len(RUN_PATTERNS)],
            edgecolor="white",
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#222222"},
        )
    axes.set_yticks(range(len(phases)), [short_name(phase, 28) for phase in phases], **_SMALL)
    axes.set(xlim=(0, 104), ylim=(len(phases) - 0.5, -0.5))
    axes.set_xlabel(f"{metric_title(metric)} in percent, {convention}", **_SMALL)
    _finish(figure, path, axes if len(runs) > 1 else None)


def precision_recall(path: Path, report: Report) -> None:
    """Precision against recall of each tool that appears, one curve per run."""
    tools = report.truth.spec.tools
    shown = [k for k in range(len(tools)) if any(curve_points(run, k) for run in report.runs)]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = _figure(2.1 * columns, 2.1 * rows + 0.3, rows, columns)
    for k, axes in zip(shown, panels, strict=False):
        for number, run in enumerate(report.runs):
            points = curve_points(run, k)
            if points is not None:
                axes.plot(*points, label=short_name(run.name, 30), **_line(number))
        axes.set(xlim=(0, 103), ylim=(0, 103), xticks=(0, 50, 100), yticks=(0, 50, 100))
        axes.set_title(short_name(tools[k], 26), **_SMALL)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    panels[0].set_xlabel("Recall in percent", **_SMALL)
    panels[0].set_ylabel("Precision in percent", **_SMALL)
    _finish(figure, path, panels[0] if len(report.runs) > 1 else None)


def training_curves(path: Path, report: Report, stage: str) -> None:
    """Loss and validation scores of one training over its epochs."""
    runs = [(number, run, run.curves[stage]) for number, run in enumerate(report.runs) if stage in run.curves]
    scores = dict.fromkeys(key for _, _, rows in runs for key in training_scores(rows))
    figure, panels = _figure(6.5, 2.2 * (1 + bool(scores)), 1 + bool(scores))
    for number, run, rows in runs:
        epochs = [int(row["epoch"]) + 1 for row in rows]
        panels[0].plot(epochs, [row.get("loss") for row in rows], label=short_name(run.name, 30), **_line(number))
        for which, key in enumerate(scores):
            style = {**_line(number), "linestyle": _DASHES[(number + which) % len(_DASHES)]}
            values = np.array([row.get(key) for row in rows], dtype=float)
            panels[1].plot(epochs, values, label=f"{short_name(run.name, 20)}: {score_title(key)}", **style)
    panels[0].set_ylabel("Loss", **_SMALL)
    panels[0].set_title(stage, **_SMALL)
    if scores:
        panels[1].set(ylim=(0, 1.02))
        panels[1].set_ylabel("Validation", **_SMALL)
    panels[-1].set_xlabel("Epoch", **_SMALL)
    _finish(figure, path, panels[-1])


def tool_timeline(path: Path, report: Report, video: str) -> None:
    """When each tool is present: truth above, and the predictions of each run at its thresholds below."""
    tools, presence = report.truth.spec.tools, list(tool_presence(report, video))
    figure, (axes,) = _figure(7.5, 0.9 + 0.13 * len(tools) * (1 + len(presence)))
    height = 0.8 / len(presence)
    samples = len(report.truth.videos[video].phase)
    edges_min = sample_edges_s(report.times_s(video), samples, report.truth.fps) / 60
    for row, (name, present) in enumerate(presence):
        colour = "#222222" if name == TRUTH_NAME else RUN_COLOURS[(row - 1) % len(RUN_COLOURS)]
        for k in range(len(tools)):
            begin, end = edges_min[np.array(true_spans(present[:, k]), dtype=int).reshape(-1, 2)].T
            spans = np.stack([begin, end - begin], axis=1)
            label = short_name(name, 30) if k == 0 else None
            axes.broken_barh(spans, (k - 0.4 + row * height, height * 0.9), facecolor=colour, linewidth=0, label=label)
    axes.set_yticks(range(len(tools)), [short_name(tool, 26) for tool in tools], **_SMALL)
    axes.set(xlim=(0, edges_min[-1]), ylim=(len(tools) - 0.5, -0.5))
    axes.set_xlabel("Time (min)", **_SMALL)
    axes.set_title(short_name(video, 60), **_SMALL)
    _finish(figure, path, axes)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _line(number: int) -> dict[str, Any]:
    return {
        "color": RUN_COLOURS[number % len(RUN_COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 1.4,
    }


def _finish(figure: Any, path: Path, legend_of: Any) -> None:
    """Add one legend below the figure of the curves or bars of `legend_of` (None: no legend), and write the file."""
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    save_figure(figure, path)
