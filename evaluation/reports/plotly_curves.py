"""Make the report's figures of curves: precision against recall of tools, and the reliability of confidences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.calibration import CalibrationTable, Reliability, calibrate
from evaluation.metrics.counts import label_pairs
from evaluation.reports.gather import RunResults
from evaluation.reports.plotly_base import Figure, base_layout, plain, plain_axis, run_line

CURVE_POINTS = 200


def precision_recall(runs: Sequence[RunResults]) -> Iterator[Figure]:
    """Yield a figure of precision against recall for each tool that appears, with one curve per run."""
    for k, tool in enumerate(runs[0].truth.spec.tools):
        data = [_curve(run, number, k) for number, run in enumerate(runs)]
        lines = [line for line in data if line]
        if not lines:
            continue
        percent = plain_axis(range=[0, 103], tickvals=[0, 50, 100], ticksuffix=" %")
        layout = base_layout(
            40,
            xaxis={**percent, "title": {"text": "recall", "standoff": 4}},
            yaxis={**percent, "title": {"text": "precision", "standoff": 4}},
        )
        alt = f"Precision against recall of {tool}"
        yield Figure(f"curve-{k}", tool, alt, 230, {"data": lines, "layout": layout}, "precision-recall")


def curve_points(run: RunResults, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return (recall, precision) in percent of tool `k` on the pooled labelled frames.

    Points that would not be visible are left out.
    """
    pairs = [
        (run.truth.videos[name].tools[:, k], found[:, k])
        for name, found in run.tool_scores.items()
        if run.truth.videos[name].tools.size
    ]
    truth = np.concatenate([labels for labels, _ in pairs]) if pairs else np.empty(0, np.int8)
    if not (truth == 1).any():
        return None
    from sklearn.metrics import precision_recall_curve

    scores = np.concatenate([values for _, values in pairs])
    precision, recall, _ = precision_recall_curve(truth[truth >= 0], scores[truth >= 0])
    recall, precision = recall[::-1], precision[::-1]  # reverse, so that recall rises
    keep = np.unique(np.r_[0, np.searchsorted(recall, np.linspace(0, 1, CURVE_POINTS)), len(recall) - 1])
    keep = keep[keep < len(recall)]
    return 100.0 * recall[keep], 100.0 * precision[keep]


def _curve(run: RunResults, number: int, k: int) -> dict[str, Any] | None:
    points = curve_points(run, k)
    if points is None:
        return None
    recall, precision = (np.round(values, 2).tolist() for values in points)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plain(run.name, 30),
        "x": recall,
        "y": precision,
        "line": run_line(number),
        "hovertemplate": "%{fullData.name}<br>recall %{x:.1f} %, precision %{y:.1f} %<extra></extra>",
    }


def reliability_diagram(runs: Sequence[RunResults]) -> Figure | None:
    """Draw how often frames are right against their confidence, with one line per run; None without probabilities.

    A single run has a second line, of the frames within 10 s of a transition.
    """
    tables = [(number, run, table) for number, run in enumerate(runs) if (table := calibration_of(run)) is not None]
    if not tables:
        return None
    data: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": "calibrated", "x": [0, 100], "y": [0, 100], "hoverinfo": "skip",
         "line": {"color": "#999999", "dash": "dot", "width": 1}}
    ]  # fmt: skip
    for number, run, table in tables:
        kinds = ("all frames", "within 10 s of a transition") if len(runs) == 1 else (plain(run.name, 30),)
        whole = Reliability(*(part.sum(axis=0) for part in vars(table.bins).values()))  # of all videos, (2, bins)
        for near, name in enumerate(kinds):
            bins = Reliability(*(part[near] for part in vars(whole).values()))
            if bins.frames.any():
                data.append(_reliability_line(bins, name, run_line(number + near)))
    percent = plain_axis(range=[0, 103], tickvals=[0, 50, 100], ticksuffix=" %")
    layout = base_layout(
        40,
        xaxis={**percent, "title": {"text": "confidence", "standoff": 4}},
        yaxis={**percent, "title": {"text": "frames that are right", "standoff": 4}},
        showlegend=True,
    )
    errors = ", ".join(f"{run.name} {_pooled(table)['ece'][0]:.1f} %" for _, run, table in tables)
    alt = f"Frames that are right against their confidence; expected calibration error: {errors}"
    return Figure("reliability", "Reliability", alt, 340, {"data": data, "layout": layout}, "reliability")


def calibration_of(run: RunResults) -> CalibrationTable | None:
    """Return the bins of the predictions in files; None without labels or probabilities."""
    truth, predicted = run.labelled
    if not truth:
        return None
    scores = {name: run.predictions[name].probabilities for name in truth}
    return calibrate(label_pairs(truth, predicted, len(run.truth.spec.phases), scores)[0], run.truth.fps)


def _pooled(table: CalibrationTable) -> dict[str, NDArray[np.float64]]:
    return table.scores(np.ones((1, len(table.frames))))


def _reliability_line(bins: Reliability, name: str, line: dict[str, str]) -> dict[str, Any]:
    filled = bins.frames > 0
    frames = bins.frames[filled]
    confidence, right = (100.0 * part[filled] / frames for part in (bins.confidence, bins.right))
    sizes = 5.0 + 12.0 * np.sqrt(frames / frames.sum())
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": np.round(confidence, 2).tolist(),
        "y": np.round(right, 2).tolist(),
        "line": line,
        "marker": {"size": np.round(sizes, 1).tolist(), "color": line["color"]},
        "customdata": [f"{int(count):,}" for count in frames],
        "hovertemplate": "%{fullData.name}<br>confidence %{x:.1f} %, right %{y:.1f} %<br>%{customdata} frames"
        "<extra></extra>",
    }
