"""Write the report's figures for papers, as PDF and PNG, with matplotlib.

The phase ribbons of all videos form one figure (`paper_figures`). The other figures are drawn from the same Plotly
specifications as in the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import make_folder
from evaluation.reports.gather import Report
from evaluation.reports.paper_figures import add_legend, phase_ribbons, save_figure, short_name
from evaluation.reports.plotly_base import RUN_DASHES, Figure, literal
from evaluation.reports.plotly_figures import all_figures

SUFFIXES = (".pdf", ".png")
_DASHES = dict(zip(RUN_DASHES, ("-", "--", ":", "-.", (0, (8, 2)), (0, (5, 1, 1, 1))), strict=True))
_SMALL = {"fontsize": 8, "parse_math": False}  # a dollar sign in a name does not start a formula
_WIDTH_INCH = 7.5
_PX_PER_INCH = 96  # the resolution with which a browser prints
_COLUMNS = 3


def write_figures(folder: Path, report: Report) -> list[Path]:
    """Write all figures of the report into `folder`, each as PDF and PNG, and return the files.

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
    """Return the functions that draw the figures of this report, by file name."""
    found: dict[str, Callable[[Path], None]] = {}
    predicted = [video for video in report.videos if any(video in run.predictions for run in report.runs)]
    if predicted:
        found["ribbons"] = partial(_ribbons, report=report, videos=predicted)
        for track in report.tracks:
            found[f"{track}-ribbons"] = partial(_ribbons, report=report.of_track(track), videos=predicted)
    panels: dict[str, list[Figure]] = {}
    for figure in all_figures(report).values():
        panels.setdefault(figure.file, []).append(figure)
    return found | {name: partial(draw_panels, figures=figures) for name, figures in panels.items() if name}


def _ribbons(path: Path, report: Report, videos: list[str]) -> None:
    rows = [
        (v, report.truth.videos[v].phase, {r.name: r.predictions[v].phase for r in report.runs if v in r.predictions})
        for v in videos
    ]
    spec = report.truth.spec
    title = f"{spec.title or spec.name}, split {report.truth.split}: truth and predictions"
    times_s = {video: time_s for video in videos if (time_s := report.times_s(video)) is not None}
    phase_ribbons(path, rows, report.truth.fps, spec.phases, title, times_s)


def draw_panels(path: Path, figures: Sequence[Figure]) -> None:
    """Draw figures of the page side by side in one file, with a panel for each y axis, and one legend below."""
    from matplotlib.figure import Figure as Canvas

    panels = [(figure, axis) for figure in figures for axis in ("yaxis", "yaxis2") if axis in figure.spec["layout"]]
    columns = min(_COLUMNS, len(figures))
    height_px = figures[0].height_px * -(-len(figures) // columns)
    canvas = Canvas(figsize=(_WIDTH_INCH, height_px / _PX_PER_INCH), layout="constrained")
    places = canvas.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, (figure, axis) in zip(places, panels, strict=False):
        traces = [trace for trace in figure.spec["data"] if trace.get("yaxis", "y") == axis.replace("axis", "")]
        handles |= {literal(trace.get("name", "")): _draw_trace(axes, trace) for trace in traces}
        axes.set_title(short_name(figure.title, 60) if axis == "yaxis" else "", **_SMALL)
        axes.spines[["top", "right"]].set_visible(False)
        _style_axis(axes, "x", figure.spec["layout"]["xaxis"])
        _style_axis(axes, "y", figure.spec["layout"][axis])
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    if len(handles) > 1:
        add_legend(canvas, list(handles.values()), list(handles), loc="outside lower center")
    save_figure(canvas, path)


def _draw_trace(axes: Any, trace: dict[str, Any]) -> Any:
    """Draw a matrix, a line, bars with intervals, or bars over time; returns the object that a legend shows for it."""
    from matplotlib.patches import Patch

    if trace["type"] == "heatmap":
        percent = np.array(trace["z"], dtype=float)
        for row, column in np.argwhere(percent > 0):
            text = f"{percent[row, column]:.1f}\n{trace['customdata'][row][column][-1]}"
            colour = "white" if percent[row, column] > 50 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
        return axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    if trace["type"] == "scatter":
        line, values = trace["line"], np.array(trace["y"], dtype=float)  # None becomes NaN, which leaves a gap
        return axes.plot(trace["x"], values, color=line["color"], linestyle=_DASHES[line["dash"]], linewidth=1.4)[0]
    colour, low, height = trace["marker"]["color"], np.array(trace["y"]) + trace["offset"], trace["width"]
    if "base" in trace:
        spans = np.stack([trace["base"], trace["x"]], axis=1)
        for edge in np.unique(low):
            axes.broken_barh(spans[low == edge], (edge, height), facecolor=colour, linewidth=0)
        return Patch(facecolor=colour)
    style: dict[str, Any] = {"facecolor": colour, "hatch": trace["marker"]["pattern"]["shape"], "edgecolor": "white"}
    # NaN stands for no error bar
    reach = np.array([trace["error_x"]["arrayminus"], trace["error_x"]["array"]], dtype=float)
    lengths = np.nan_to_num(np.array(trace["x"], dtype=float))
    error = {"elinewidth": 1, "capsize": 2, "ecolor": "#222222"}
    axes.barh(low, lengths, height, align="edge", xerr=reach, error_kw=error, **style)
    return Patch(**style)


def _style_axis(axes: Any, letter: str, spec: dict[str, Any]) -> None:
    axis = getattr(axes, f"{letter}axis")
    if "tickvals" in spec:
        axis.set_ticks(spec["tickvals"])
    if "ticktext" in spec:
        axis.set_ticklabels([literal(text) for text in spec["ticktext"]], parse_math=False)
    elif "ticksuffix" in spec:
        axis.set_major_formatter(f"{{x:g}}{spec['ticksuffix']}")
    axis.set_tick_params(labelsize=8)
    axis.set_label_text(literal(spec.get("title", {}).get("text", "")), **_SMALL)
    axes.set(**{f"{letter}lim": spec.get("range")})
