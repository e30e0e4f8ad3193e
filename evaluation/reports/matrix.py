"""Show a matrix of training sets and test sets: as tables, as CSV and as a page."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from engine.files import write_text
from evaluation.metrics.conventions import metric_title
from evaluation.metrics.results import Interval
from evaluation.reports.ablation import no_formula
from evaluation.reports.tables import IN_BRACKETS, ResultTable, interval_text, number_text
from evaluation.reports.templates import template_environment

if TYPE_CHECKING:
    from evaluation.matrix import Cell, Matrix

_TEMPLATE = "matrix.html.j2"
_COLUMNS = ("metric", "trained_on", "model", "tested_on", "mean", "low", "high", "videos", "own", "overlap")


def matrix_tables(matrix: Matrix) -> list[ResultTable]:
    """Return one table per metric: a row per training set, a column per test set."""
    about = matrix.about
    rows = [(row, [row.cells.get(name) for name in matrix.tested_on]) for row in matrix.rows]
    return [
        ResultTable(
            f"{metric_title(metric)} [{about.convention}], percent",
            "Trained on",
            [f"on {name}" for name in matrix.tested_on],
            [(row.title, [_text(cell, metric) for cell in cells]) for row, cells in rows],
            matrix_notes(matrix),
        )
        for metric in matrix.metrics
    ]


def matrix_notes(matrix: Matrix) -> list[str]:
    """Return sentences on how the numbers were computed."""
    about = matrix.about
    notes = [f"Split {about.split}. Mean {about.mean}; in brackets: {about.interval}."]
    if about.mapping:
        notes.append(f"Phases in the vocabulary of {about.mapping}.")
    if any(cell.overlap for row in matrix.rows for cell in row.cells.values()):
        notes.append("*: trained on some of the test videos, so the number is too good.")
    return notes


def _text(cell: Cell | None, metric: str) -> str:
    if cell is None:
        return "-"
    interval = cell.metrics[metric]
    star = "*" if cell.overlap else ""
    return f"{number_text(interval.mean)}{star} {interval_text(interval, IN_BRACKETS)}".rstrip()


def write_matrix_csv(path: Path, matrix: Matrix) -> None:
    """Write one row per metric, model and test set, atomically; empty cells mean that there is no number."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for metric in matrix.metrics:
        for row in matrix.rows:
            for name, cell in row.cells.items():
                interval: Interval = cell.metrics[metric]
                numbers = ["" if value is None else value for value in (interval.mean, interval.low, interval.high)]
                flags = [cell.videos, int(cell.own), int(cell.overlap)]
                words = [metric, " + ".join(row.trained_on), row.name, name]
                writer.writerow([no_formula(word) for word in [*words, *numbers, *flags]])
    write_text(path, buffer.getvalue())


def write_matrix_page(path: Path, matrix: Matrix) -> None:
    """Write an HTML page that needs no network, atomically. Cells are darker the higher their mean; names are escaped.

    The diagonal, on which a model is tested on the data set of its training, has a border.
    """
    tables = [
        (
            f"{metric_title(metric)}, percent",
            [(row.title, [_shaded(row.cells.get(name), metric) for name in matrix.tested_on]) for row in matrix.rows],
        )
        for metric in matrix.metrics
    ]
    template = template_environment(html=True).get_template(_TEMPLATE)
    page = template.render(columns=matrix.tested_on, tables=tables, notes=matrix_notes(matrix), about=matrix.about)
    write_text(path, page)


def _shaded(cell: Cell | None, metric: str) -> tuple[str, float, bool]:
    """Return a cell's text, how dark it is (0 to 0.6), and whether it is on the diagonal."""
    mean = None if cell is None else cell.metrics[metric].mean
    return _text(cell, metric), round(0.006 * (mean or 0.0), 3), cell is not None and cell.own
