"""Write the report as one HTML file that needs no network: plotly.js, style and data are inside.

A content security policy blocks everything else. Names are escaped by Jinja in the page, and by `plotly_base.plain`
in figures.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from engine.files import write_text
from evaluation.metrics.conventions import metric_title
from evaluation.reports import html_tables, plotly_base, plotly_figures
from evaluation.reports.gather import Report
from evaluation.reports.templates import TEMPLATES, template_environment


def write_report(path: Path, report: Report) -> None:
    """Write the page atomically. Raises UserError if the disk is full or writing is not allowed."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """Return the whole page as HTML."""
    environment = template_environment(html=True)
    environment.tests["match_start"] = str.startswith
    environment.filters["yaml"] = lambda tree: yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    environment.filters["clock"] = plotly_base.clock
    environment.filters["data_uri"] = lambda jpeg: f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    figures = plotly_figures.all_figures(report)
    # No text in an inline script may look like its end tag. The hashes are those of exactly the text between the tags.
    scripts = [_script(get_plotlyjs()), _script((TEMPLATES / "report.js").read_text(encoding="utf-8"))]
    return environment.get_template("report.html.j2").render(
        report=report,
        tables=html_tables.all_tables(report),
        figures=figures,
        metrics=[(metric, metric_title(metric)) for metric in next(iter(report.phase_metrics.values()), ())],
        unlabelled=any((video.phase < 0).any() for video in report.truth.videos.values()),
        phases=plotly_base.legend(report.truth.spec.phases),
        tracks={name: plotly_base.legend(report.truth.spec.tracks[name].classes) for name in report.tracks},
        policy=Markup(_policy(scripts)),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        plotly=Markup(scripts[0]),
        script=Markup(scripts[1]),
        data=Markup(safe_json({figure.id: figure.spec for figure in figures.values()})),
    )


def safe_json(value: Any) -> str:
    """Return JSON that is safe inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII only
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script(text: str) -> str:
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("a script of the report would end early inside its page")
    return text.replace("\r\n", "\n")


def _policy(scripts: Sequence[str]) -> str:
    """Return the content security policy.

    It allows the page's two scripts (by their hashes), inline styles, and images inside the page.
    """
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    sources = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
