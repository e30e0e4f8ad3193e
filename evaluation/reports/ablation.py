"""Report the outcome of an ablation: ranked settings with standard deviations over seeds, as table, CSV and page."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from configs.dataset_spec import FORMULA_STARTS
from engine.files import write_text
from evaluation.metrics.results import OFFLINE, marked
from evaluation.reports.templates import template_environment

ABLATION_PAGE = "ablation.html"
_TEMPLATE = "ablation.html.j2"


@dataclass(frozen=True)
class Trial:
    """One training of a setting: the setting's label and changes, the seed, and stage two's result."""

    label: str
    changes: Mapping[str, Any]
    seed: int
    is_base: bool
    result: Mapping[str, Any]
    folder: str

    @property
    def score(self) -> float:
        """The score by which settings are ranked, a fraction, computed on the validation videos."""
        return float(self.result["val_accuracy"])


@dataclass(frozen=True)
class Row:
    """The results of one setting over its seeds, in percent. Each difference is to the base with the same seed."""

    label: str
    is_base: bool
    offline: bool  # whether its head looks into the future
    seeds: int
    mean: float
    std: float | None
    difference: float | None
    difference_std: float | None
    best_epoch: float
    seconds: float


def ablation_rows(trials: Sequence[Trial]) -> list[Row]:
    """Rank the settings, with the best mean first. Settings for which seeds are missing (failed or not done) come last.

    Standard deviations are over seeds (n - 1), and None for a single seed.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.label, []).append(trial)
    base = {trial.seed: trial.score for trial in trials if trial.is_base}
    rows = [_row(label, group, base) for label, group in groups.items()]
    return sorted(rows, key=lambda row: (-row.seeds, -row.mean))


def _row(label: str, group: Sequence[Trial], base: Mapping[int, float]) -> Row:
    scores = [100 * trial.score for trial in group]
    paired = [100 * (trial.score - base[trial.seed]) for trial in group if trial.seed in base]
    is_base = any(trial.is_base for trial in group)
    return Row(
        label=label,
        is_base=is_base,
        offline=any(trial.result.get("offline") for trial in group),
        seeds=len(group),
        mean=statistics.fmean(scores),
        std=_std(scores),
        difference=None if is_base or not paired else statistics.fmean(paired),
        difference_std=None if is_base else _std(paired),
        best_epoch=statistics.fmean(trial.result["best_epoch"] + 1 for trial in group),
        seconds=statistics.fmean(trial.result["seconds"] for trial in group),
    )


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


_HEADERS = ("setting", "seeds", "mean", "std", "against base", "std", "best epoch", "seconds")


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        marked(
            f"{row.label} (base)" if row.is_base and row.label != "base" else row.label,
            OFFLINE if row.offline else None,
        ),
        str(row.seeds),
        number(row.mean, ".2f"),
        number(row.std, ".2f"),
        number(row.difference, "+.2f"),
        number(row.difference_std, ".2f"),
        number(row.best_epoch, ".1f"),
        number(row.seconds, ".1f"),
    ]


def ablation_table(trials: Sequence[Trial], score: str) -> Table:
    """Return the ranked table for a terminal; `score` describes the numbers."""
    table = Table(title=Text(f"{score}, percent; standard deviations over seeds"), title_justify="left")
    for number, header in enumerate(_HEADERS):
        table.add_column(header, justify="right" if number else "left", overflow="fold")
    for row in ablation_rows(trials):
        table.add_row(*map(Text, _cells(row)), style="bold" if row.is_base else None)
    return table


def write_ablation_csv(path: Path, trials: Sequence[Trial]) -> None:
    """Write one row per training, atomically: setting, changes, seed, score (a fraction), epochs, speed and folder."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.changes))
    of_tracks = dict.fromkeys(key for trial in trials for key in trial.result if key.startswith("val_accuracy_"))
    offline = ["offline"] if any(trial.result.get("offline") for trial in trials) else []
    numbers = ("val_accuracy", *of_tracks, "best_epoch", "epochs", "parameters", "seconds", "frames_per_s", *offline)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["setting", *keys, "seed", "base", *numbers, "folder"])
    for trial in sorted(trials, key=lambda one: (one.label, one.seed)):
        values = [trial.changes.get(key, "") for key in keys]
        result = [trial.result.get(name) for name in numbers]
        row = [trial.label, *values, trial.seed, int(trial.is_base), *result, trial.folder]
        writer.writerow([no_formula(cell) for cell in row])
    write_text(path, buffer.getvalue())


def no_formula(cell: Any) -> Any:
    """Put an apostrophe before text that a spreadsheet would evaluate as a formula; other cells are unchanged."""
    text = isinstance(cell, str) and cell.startswith(FORMULA_STARTS)
    return f"'{cell}" if text else cell


def ablation_page(title: str, trials: Sequence[Trial], score: str, figures: Sequence[Any]) -> str:
    """Return an HTML page that needs no network, with the ranked table and Plotly `figures`. Names are escaped."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    options = {"include_plotlyjs": False, "full_html": False, "config": {"displaylogo": False}}
    return (
        template_environment(html=True)
        .get_template(_TEMPLATE)
        .render(
            title=title,
            score=score,
            headers=_HEADERS,
            rows=[(row.is_base, _cells(row)) for row in ablation_rows(trials)],
            figures=[Markup(figure.to_html(**options)) for figure in figures],
            plotly=Markup(get_plotlyjs()) if figures else "",
            trainings=len(trials),
        )
    )
