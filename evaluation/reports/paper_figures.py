"""Draw phase ribbons for papers and the README, and provide what other figures share: colours, names and file writing.

Figures are drawn with matplotlib but without pyplot, so that figures and threads share nothing and no display is
needed. matplotlib is imported when the first figure is drawn, since the import takes a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from engine.files import atomic_path
from evaluation.metrics.counts import label_pairs
from features.run_lengths import true_spans

# Okabe and Ito's colours, which can be distinguished with any common colour blindness, and one of Paul Tol's. They are
# ordered so that neighbouring phases of Cholec80 differ in lightness too.
PALETTE = ("#56B4E9", "#0072B2", "#F0E442", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#882255")
UNLABELLED: dict[str, Any] = {"facecolor": "#E6E6E6", "hatch": "////", "edgecolor": "white"}
_TEXT_COLOUR = "#222222"
_WIDTH_INCH = 9.0
_RIBBON_INCH = 0.17
_BAR = 0.86  # fraction of a ribbon's height that is coloured
_GAP_INCH = 0.13  # space between videos
_RIGHT_INCH = 0.55  # space for the accuracies
_LEGEND_COLUMNS = 4
_SUFFIXES = (".png", ".pdf")

Video = tuple[str, NDArray[Any], Mapping[str, NDArray[Any]]]
Ribbon = tuple[str, NDArray[Any], "float | None"]  # name, track, accuracy in percent


def phase_colours(classes: int) -> list[str]:
    """Return one colour per phase, the same in every figure.

    They are those of the palette or, for more phases, alternating light and dark colours of a perceptually uniform map.
    """
    if classes <= len(PALETTE):
        return list(PALETTE[:classes])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    order = np.argsort(np.r_[0:classes:2, 1:classes:2])
    return [to_hex(colour) for colour in colormaps["viridis"](order / (classes - 1))]


def sample_edges_s(time_s: NDArray[np.float64] | None, samples: int, fps: float) -> NDArray[np.float64]:
    """Return the times at which samples begin, and the end of the last one, (T + 1,).

    `time_s` is None if only the rate `fps` is known.
    """
    return np.arange(samples + 1) / fps if time_s is None else np.append(time_s, time_s[-1] + 1.0 / fps)


def phase_ribbons(
    path: Path,
    videos: Sequence[Video],
    fps: float,
    phases: Sequence[str],
    title: str = "",
    times_s: Mapping[str, NDArray[np.float64]] | None = None,
) -> None:
    """Draw truth and predictions of each video as ribbons over time.

    `videos` contains (id, truth (T,), {name: predicted (T,)}) with phase ids at `fps`. A truth of -1 (no label) is
    drawn hatched in grey. Each prediction of a video gets its own ribbon, with its accuracy in percent next to it. A
    truth without any label, as for new videos, is not drawn. `times_s` contains the times (T,) of each video's samples.
    The figure's height grows with the number of videos. `path` must end in .png or .pdf, otherwise UserError is raised;
    the file is written atomically.
    """
    if not videos or not all(len(truth) for _, truth, _ in videos):
        raise UserError(f"{path}: a ribbon figure needs at least one video, and frames in each")
    from matplotlib.figure import Figure

    rows = [_ribbons(truth, predicted) for _, truth, predicted in videos]
    heights = [len(ribbons) * _RIBBON_INCH + _GAP_INCH for ribbons in rows]
    widest_name = max(len(name) for ribbons in rows for name, _, _ in ribbons)
    left = min(0.4 + 0.062 * (max(len(video) for video, _, _ in videos) + widest_name), 3.0)
    legend_rows = -(-(len(phases) + 1) // _LEGEND_COLUMNS)
    top, bottom = 0.28 * bool(title) + 0.2 * legend_rows + 0.2, 0.5
    height, width = top + sum(heights) + bottom, _WIDTH_INCH - left - _RIGHT_INCH

    figure = Figure(figsize=(_WIDTH_INCH, height))
    axes = figure.add_axes((left / _WIDTH_INCH, bottom / height, width / _WIDTH_INCH, sum(heights) / height))
    edges_min = [sample_edges_s((times_s or {}).get(video), len(truth), fps) / 60 for video, truth, _ in videos]
    end_min = max(edges[-1] for edges in edges_min)
    axes.set(xlim=(0, end_min), ylim=(sum(heights), 0), xlabel="Time (min)")
    y = 0.0
    for (video, _, _), ribbons, video_height, edges in zip(videos, rows, heights, edges_min, strict=True):
        middle = y + (len(ribbons) - 1 + _BAR) * _RIBBON_INCH / 2
        _text(axes, (0.1 - left) / width, middle, short_name(video, 24), axes.get_yaxis_transform(), fontweight="bold")
        _draw_video(axes, ribbons, y, edges, phase_colours(len(phases)), end_min * 0.008)
        y += video_height
    _style_time_axis(axes)
    unlabelled = any((track < 0).any() for ribbons in rows for _, track, _ in ribbons)
    _phase_legend(figure, phases, unlabelled, 1 - 0.28 * bool(title) / height)
    if title:
        _text(figure, 0.1 / _WIDTH_INCH, 1 - 0.18 / height, title, figure.transFigure, fontsize=10)
    save_figure(figure, path)


def _ribbons(truth: NDArray[Any], predicted: Mapping[str, NDArray[Any]]) -> list[Ribbon]:
    """Return the ribbons of one video, with the truth first if it has labels."""
    labelled = truth >= 0
    if not labelled.any():
        return [(name, np.asarray(track), None) for name, track in predicted.items()]
    scored = [(name, track, 100.0 * float((track == truth)[labelled].mean())) for name, track in predicted.items()]
    return [("truth", truth, None), *scored]


def _draw_video(
    axes: Any,
    ribbons: Sequence[Ribbon],
    y: float,
    edges_min: NDArray[np.float64],
    colours: Sequence[str],
    margin_min: float,
) -> None:
    for name, track, accuracy in ribbons:
        for phase in np.unique(track):
            begin, end = edges_min[np.array(true_spans(track == phase))].T
            bars = np.stack([begin, end - begin], axis=1)
            style = UNLABELLED if phase < 0 else {"facecolor": colours[phase]}
            # Antialiasing would draw visible lines between adjacent bars.
            axes.broken_barh(bars, (y, _RIBBON_INCH * _BAR), antialiased=False, linewidth=0, **style)
        middle = y + _RIBBON_INCH * _BAR / 2
        _text(axes, -margin_min, middle, short_name(name, 16), axes.transData, fontsize=7, ha="right")
        if accuracy is not None:
            _text(axes, edges_min[-1] + margin_min, middle, f"{accuracy:.1f} %", axes.transData, fontsize=7)
        y += _RIBBON_INCH


def _text(parent: Any, x: float, y: float, text: str, transform: Any, **style: Any) -> None:
    """Draw text literally, so that a dollar sign in a name does not start a formula."""
    style = {"fontsize": 8, "color": _TEXT_COLOUR, "va": "center", **style}
    parent.text(x, y, text, transform=transform, parse_math=False, **style)


def _style_time_axis(axes: Any) -> None:
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.label.set_fontsize(8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _phase_legend(figure: Any, phases: Sequence[str], unlabelled: bool, top: float) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour) for colour in phase_colours(len(phases))]
    labels = [short_name(name, 28) for name in phases]
    if unlabelled:
        handles.append(Patch(**UNLABELLED))
        labels.append("no label")
    add_legend(figure, handles, labels, loc="upper center", bbox_to_anchor=(0.5, top))


def add_legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], **place: Any) -> None:
    """Add a legend to a whole figure. Text is literal, so that a dollar sign in a name does not start a formula."""
    legend = figure.legend(handles, labels, ncols=_LEGEND_COLUMNS, fontsize=8, frameon=False, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def confusion_counts(
    truth: Mapping[str, NDArray[Any]], predicted: Mapping[str, NDArray[Any]], classes: int
) -> NDArray[np.int64]:
    """Count the labelled frames of all videos by truth (rows) and prediction (columns), (C, C)."""
    videos, _ = label_pairs(truth, predicted, classes)
    cells = [classes * v.truth[v.labelled].astype(np.int64) + v.predicted[v.labelled] for v in videos]
    return np.bincount(np.concatenate(cells), minlength=classes**2).reshape(classes, classes)


def row_percent(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return the counts (C, C) as percentages of each row's sum; NaN in an empty row."""
    total = counts.sum(axis=1, keepdims=True)
    return np.divide(100.0 * counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def short_name(name: str, letters: int) -> str:
    """Return the name, shortened to that many letters."""
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure atomically as PNG or PDF, depending on the suffix.

    Raises UserError for another suffix.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path}: figures are written as {' or '.join(_SUFFIXES)}; give the file one of these endings")
    kind = path.suffix.lower()[1:]
    # No date is written, so that equal figures give equal bytes.
    metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # Letters that are not in the font are drawn as boxes; tables and the page do show them.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)
