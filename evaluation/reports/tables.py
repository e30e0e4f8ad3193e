"""Terminal tables of results, legible at 80 columns. Each names the convention its numbers follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from configs.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

METRIC_TITLES = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "jaccard": "Jaccard", "f1": "F1"}


def phase_table(results: Mapping[str, Any], convention: str = "phase_mean") -> Table:
    """Precision, recall, Jaccard and F1 a phase and over all, percent, from what `evaluate_phases` returns.

    A phase's row is mean ± standard deviation over the videos that have it; the last row follows the convention.
    Raises UserError where `results` lack the convention or it is not one of frames.
    """
    result = _of_frames(results, convention)
    about, metrics = result["about"], [metric for metric in METRIC_TITLES if metric != "accuracy"]
    table = _table(
        f"Phases, {about['title']} [{convention}], percent",
        "Phase",
        [*map(METRIC_TITLES.__getitem__, metrics), "Videos"],
    )
    for phase, entry in result["per_phase"].items():
        _add_row(table, phase, *(mean_std_text(entry[metric]) for metric in metrics), str(entry["videos"]))
    table.add_section()
    _add_row(table, "all", *(mean_std_text(result[metric]) for metric in metrics), str(about["videos"]), style="bold")
    table.caption = f"Accuracy {mean_std_text(result['accuracy'])} %. Deviation: {about['std']}. {_setting(about)}."
    return table


def conventions_table(results: Mapping[str, Any]) -> Table:
    """A row a convention of frames: the same predictions under each, from what `evaluate_phases` returns."""
    table = _table("Phases under every convention, percent", "Convention", list(METRIC_TITLES.values()))
    about: Mapping[str, Any] = {}
    for name, result in results.items():
        if name != "segmental":
            about = result["about"]
            _add_row(table, name, *(mean_std_text(result[metric]) for metric in METRIC_TITLES))
    if about:
        table.caption = f"Deviation: over videos or phases, as the convention has it. {_setting(about)}."
    if found := results.get("relaxed_matlab", {}).get("f1_surgformer"):
        table.caption = f"{table.caption} F1 as Surgformer's copy of relaxed_matlab has it: {mean_std_text(found)}."
    return table


def intervals_table(results: Mapping[str, Any]) -> Table:
    """A row a convention of frames: 95 % bootstrap intervals over videos (`intervals` of each result)."""
    table = _table("95 % intervals, bootstrap over videos, percent", "Convention", list(METRIC_TITLES.values()))
    for name, result in results.items():
        if name != "segmental":
            _add_row(table, name, *(interval_text(result["intervals"][metric]) for metric in METRIC_TITLES))
    return table


def interval_text(entry: Mapping[str, float | None], sign: str = "") -> str:
    """`low to high` with one digit; `-` where there is none."""
    if entry["low"] is None or entry["high"] is None:
        return "-"
    return f"{entry['low']:{sign}.1f} to {entry['high']:{sign}.1f}"


def segment_table(results: Mapping[str, Any]) -> Table:
    """Edit score and F1 at the overlaps, percent, from what `evaluate_phases` returns."""
    if "segmental" not in results:
        raise UserError("no results under the convention segmental; evaluate with it first")
    result = results["segmental"]
    table = _table("Segments [segmental], percent", "Score", ["Pooled", "Mean over videos"])
    _add_row(table, "Edit", "", mean_std_text(result["edit"]))
    for name in (key for key in result if key.startswith("f1@")):
        _add_row(table, name.replace("f1", "F1"), number_text(result[name]["pooled"]), mean_std_text(result[name]))
    table.caption = f"{_setting(result['about'])}."
    if background := result["about"].get("background"):
        table.caption = f"{table.caption} Left out as background: {', '.join(background)}."
    return table


def tool_table(results: Mapping[str, Any]) -> Table:
    """Average precision a tool and mAP, percent, from what `evaluate_tools` returns; scores at thresholds if any."""
    extra = ("precision", "recall", "f1") if "at_threshold" in results else ()
    columns = ["Pooled", "Per video", "Present", *(METRIC_TITLES[metric] for metric in extra)]
    table = _table("Tools, average precision, percent", "Tool", columns)
    for tool, entry in results["per_tool"].items():
        scores = (number_text(entry[metric]) for metric in extra)
        _add_row(
            table,
            tool,
            number_text(entry["ap_pooled"]),
            mean_std_text(entry["ap_video"]),
            f"{entry['present']:,}",
            *scores,
        )
    table.add_section()
    means = (number_text(results["at_threshold"][metric]) for metric in extra)
    _add_row(
        table,
        "mean (mAP)",
        number_text(results["map_pooled"]),
        number_text(results["map_video"]),
        "",
        *means,
        style="bold",
    )
    about = results["about"]
    table.caption = f"Pooled: over all frames. Per video: mean ± deviation over videos. {_setting(about)}."
    return table


def comparison_table(
    models: Mapping[str, Mapping[str, Any]], convention: str = "phase_mean", title: str = "Models on the same videos"
) -> Table:
    """A row a model (a head, a baseline): `models` maps names to what `evaluate_phases` returns."""
    table = _table(f"{title} [{convention}], percent", "Model", list(METRIC_TITLES.values()))
    about: Mapping[str, Any] = {}
    for name, results in models.items():
        result = _of_frames(results, convention)
        about = result["about"]
        _add_row(table, name, *(mean_std_text(result[metric]) for metric in METRIC_TITLES))
    if about:
        table.caption = f"Deviation: {about['std']}. {_setting(about)}."
    return table


def difference_table(comparison: Mapping[str, Any], about: Mapping[str, Any]) -> Table:
    """Two models on the same videos, a row a metric, from what `evaluation.comparison.compare_models` returns."""
    columns = ["A", "B", "A - B", "95 % interval", "p", "p (Holm)"]
    table = _table(f"A = {comparison['first']}, B = {comparison['second']} [{about['convention']}]", "Metric", columns)
    for metric, entry in comparison["metrics"].items():
        _add_row(
            table,
            METRIC_TITLES.get(metric, metric),
            mean_std_text(entry["first"]),
            mean_std_text(entry["second"]),
            f"{entry['difference']:+.1f}",
            interval_text(entry, "+"),
            f"{entry['p_value']:.4f}",
            f"{entry['p_holm']:.4f}",
        )
    spread = " Deviation: over seeds." if max(about["seeds"]) > 1 else ""
    table.caption = (
        f"Percent, means over videos.{spread} Interval and test: over videos; {about['correction']}. {_setting(about)}."
    )
    return table


def _of_frames(results: Mapping[str, Any], convention: str) -> Mapping[str, Any]:
    if convention not in results or convention == "segmental":
        known = ", ".join(name for name in results if name != "segmental") or "none"
        raise UserError(f"no table under the convention {convention!r}; these results have {known}")
    return results[convention]


def _table(title: str, name: str, numbers: Sequence[str]) -> Table:
    """An empty table; where the terminal is narrow the names are shortened, never the numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    table.add_column(name, overflow="ellipsis")  # the only one that may wrap, so the only one to shrink
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _add_row(table: Table, name: str, *cells: str, style: str | None = None) -> None:
    """Names go in as they are: square brackets in one are no markup."""
    from rich.text import Text

    table.add_row(Text(name), *cells, style=style)
    for column, cell in zip(table.columns[1:], cells, strict=True):
        column.min_width = max(column.min_width or len(str(column.header)), len(cell))


def number_text(value: float | None) -> str:
    """One digit after the point; a dash where there is no number."""
    return "-" if value is None else f"{value:.1f}"


def mean_std_text(entry: Mapping[str, float | None]) -> str:
    """`mean ± std` with one digit; the mean alone where there is no deviation."""
    if entry["mean"] is None or entry["std"] is None:
        return number_text(entry["mean"])
    return f"{entry['mean']:.1f} ± {entry['std']:.1f}"


def _setting(about: Mapping[str, Any]) -> str:
    """Split, number of videos and rate, as far as known."""
    parts = [f"{about['videos']} videos" if about["videos"] != 1 else "1 video"]
    if about["split"]:
        parts.insert(0, f"split {about['split']}")
    if about["fps"]:
        parts.append(f"{about['fps']:g} fps")
    return ", ".join(parts).capitalize()
