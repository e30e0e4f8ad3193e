"""What the report's figures have in common: their form, colours of runs, layout and axes, and texts that are safe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape
from typing import Any

from evaluation.reports.paper_figures import phase_colours, short_name

# Okabe and Ito's darker colours, which are clearly visible on a white page, each with a pattern and a dash.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#222222", "#E69F00")
RUN_PATTERNS = ("", "/", "x", ".", "-", "+")
RUN_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class Figure:
    """A figure: `spec` is the input of `Plotly.newPlot`, and `alt` describes in words what is drawn.

    For papers, figures with the same `file` (a name without suffix) are panels of one file. A figure without `file` is
    shown only in the page.
    """

    id: str
    title: str
    alt: str
    height_px: int
    spec: dict[str, Any]
    file: str = ""


def clock(seconds: float) -> str:
    """Return a time in a video as text like `1:02:03`, for figures and captions."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def plain(name: str, letters: int | None = None) -> str:
    """Escape a name so that Plotly shows it literally: it interprets some HTML in texts, and %{...} in templates."""
    text = short_name(name, letters) if letters else name
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("%{", "%\u200b{")


def literal(text: str) -> str:
    """Undo the escaping of `plain`."""
    return unescape(text.replace("\u200b", ""))


def legend(phases: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (name, colour, colour of text on that colour) of each phase. Figures show phases by number, from 1."""
    return [(name, colour, text_on(colour)) for name, colour in zip(phases, phase_colours(len(phases)), strict=True)]


def run_line(number: int, dash: int | None = None) -> dict[str, str]:
    """Return colour and dash of a run's line, given the run's number."""
    which = number if dash is None else dash
    return {"color": RUN_COLOURS[number % len(RUN_COLOURS)], "dash": RUN_DASHES[which % len(RUN_DASHES)]}


def text_on(colour: str) -> str:
    """Return black or white, whichever is more legible on `colour` (WCAG 2 relative luminance)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return "#000000" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 else "#FFFFFF"


def base_layout(bottom_px: int, **more: Any) -> dict[str, Any]:
    """Return the layout that all figures share.

    It uses the page's font, and disables dragging, so that a finger scrolls the page.
    """
    return {
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222222"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "barmode": "overlay",  # the positions of bars are set explicitly
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "#FFFFFF", "bordercolor": "#222222", "font": {"color": "#222222"}},
        "margin": {"l": 10, "r": 14, "t": 4, "b": bottom_px},
        "legend": {"orientation": "h", "itemclick": False, "itemdoubleclick": False, "y": 1.02, "yanchor": "bottom"},
        "showlegend": False,
        **more,
    }


def plain_axis(**more: Any) -> dict[str, Any]:
    return {"fixedrange": True, "automargin": True, "zeroline": False, "gridcolor": "#E3E3E3", **more}


def rows_axis(names: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return an axis of named rows, from top to bottom."""
    rows = {"tickvals": list(range(len(names))), "ticktext": list(names), "showgrid": False}
    return plain_axis(**rows, range=[len(names) - 0.5, -0.5], **more)
