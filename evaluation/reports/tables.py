"""Terminal tables of results, legible at 80 columns. Each names the convention its numbers follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from configs.errors import UserError
from evaluation.metrics.conventions import MAIN_CONVENTION
from evaluation.metrics.results import (
    ByConvention,
    Interval,
    PhaseAbout,
    PhaseResults,
    PooledScore,
    Score,
    ThresholdScores,
    ToolResults,
)
from evaluation.metrics.scores import metric_title

if TYPE_CHECKING:
    from rich.table import Table

    from evaluation.comparison import ComparisonAbout, ModelPair
    from evaluation.metrics.results import ToolAbout


def phase_table(results: ByConvention, convention: str = MAIN_CONVENTION) -> Table:
    """The metrics of each phase and over all, percent.

    A phase's row is mean ± standard deviation over the videos that have it; the last row follows the convention.
    Raises UserError if `results` lack the convention or it is not one of frames.
    """
    result = _of_frames(results, convention)
    about, metrics = result.about, result.metrics[1:]
    table = _table(f"Phases, {about.title} [{convention}], percent", "Phase", [*map(metric_title, metrics), "Videos"])
    for phase, entry in (result.per_phase or {}).items():
        _add_row(table, phase, *(mean_std_text(entry.scores.get(metric)) for metric in metrics), str(entry.videos))
    table.add_section()
    _add_row(table, "all", *(mean_std_text(result.score(m)) for m in metrics), str(about.videos), style="bold")
    table.caption = (
        f"Accuracy {mean_std_text(result.score('accuracy'))} %. Standard deviation: {about.std}. {_setting(about)}."
    )
    return table


def conventions_table(results: ByConvention) -> Table:
    """One row per convention of frames: the same predictions under each."""
    shown = {name: result for name, result in results.items() if result.of_frames}
    table = _scores_table("Phases under every convention, percent", "Convention", shown)
    if shown:
        about = list(shown.values())[-1].about
        table.caption = f"Standard deviation: over videos or phases, as the convention has it. {_setting(about)}."
    if "relaxed_matlab" in shown and (found := shown["relaxed_matlab"].score("f1_surgformer")):
        table.caption = f"{table.caption} F1 as Surgformer's copy of relaxed_matlab has it: {mean_std_text(found)}."
    return table


def intervals_table(results: ByConvention) -> Table:
    """One row per convention of frames: 95 % bootstrap intervals over videos (`intervals` of each result)."""
    shown = {name: result for name, result in results.items() if result.of_frames}
    metrics = metrics_of(shown.values())
    table = _table("95 % intervals, bootstrap over videos, percent", "Convention", [*map(metric_title, metrics)])
    for name, result in shown.items():
        _add_row(table, name, *(interval_text((result.intervals or {}).get(metric)) or "-" for metric in metrics))
    return table


def comparison_table(
    models: Mapping[str, ByConvention], convention: str = MAIN_CONVENTION, title: str = "Models on the same videos"
) -> Table:
    """One row per model (a head, a baseline) under one convention of frames."""
    shown = {name: _of_frames(results, convention) for name, results in models.items()}
    table = _scores_table(f"{title} [{convention}], percent", "Model", shown)
    if shown:
        about = list(shown.values())[-1].about
        table.caption = f"Standard deviation: {about.std}. {_setting(about)}."
    return table


def _scores_table(title: str, name: str, rows: Mapping[str, PhaseResults]) -> Table:
    metrics = metrics_of(rows.values())
    table = _table(title, name, [*map(metric_title, metrics)])
    for row, result in rows.items():
        _add_row(table, row, *(mean_std_text(result.score(metric)) for metric in metrics))
    return table


def metrics_of(results: Iterable[PhaseResults]) -> list[str]:
    """The metrics over all videos that any of the results has."""
    return list(dict.fromkeys(metric for result in results for metric in result.metrics))


def segment_table(results: ByConvention, convention: str = "segmental") -> Table:
    """Edit score and F1 at the overlaps, percent. Raises UserError if `results` lack the convention."""
    if convention not in results:
        raise UserError(f"no results under the convention {convention}; evaluate with it first")
    result = results[convention]
    table = _table(f"Segments [{convention}], percent", "Score", ["Pooled", "Mean over videos"])
    for name in result.metrics[1:]:
        score = result.score(name)
        pooled = number_text(score.pooled) if isinstance(score, PooledScore) else ""
        _add_row(table, metric_title(name), pooled, mean_std_text(score))
    table.caption = f"{_setting(result.about)}."
    if result.about.background:
        table.caption = f"{table.caption} Left out as background: {', '.join(result.about.background)}."
    return table


MEAN_AP = "mean (mAP)"
THRESHOLD_TITLES = ("Precision", "Recall", "F1")


def tool_table(results: ToolResults) -> Table:
    """Average precision of each tool and mAP, percent; scores at thresholds if there are any."""
    extra = THRESHOLD_TITLES if results.at_threshold else ()
    table = _table("Tools, average precision, percent", "Tool", ["Pooled", "Per video", "Present", *extra])
    for name, (pooled, over_videos, *scores) in tool_cells(results).items():
        if name == MEAN_AP:
            table.add_section()
        present = f"{results.per_tool[name].present:,}" if name in results.per_tool else ""
        _add_row(table, name, pooled, over_videos, present, *scores, style="bold" if name == MEAN_AP else None)
    spread = "mean ± standard deviation over videos"
    table.caption = f"Pooled: over all frames. Per video: {spread}. {_setting(results.about)}."
    return table


def tool_cells(results: ToolResults) -> dict[str, list[str]]:
    """Average precision pooled and over videos as text, then precision, recall and F1 at the threshold if there is one:
    of each tool, and last, as `MEAN_AP`, the means over tools."""
    rows: dict[str, tuple[float | None, str, ThresholdScores | None]] = {
        tool: (entry.ap_pooled, mean_std_text(entry.ap_video), entry.at_threshold)
        for tool, entry in results.per_tool.items()
    }
    rows[MEAN_AP] = (results.map_pooled, number_text(results.map_video), results.at_threshold)
    return {
        name: [number_text(pooled), text, *(map(number_text, vars(scores).values()) if scores else ())]
        for name, (pooled, text, scores) in rows.items()
    }


def difference_table(pair: ModelPair, about: ComparisonAbout) -> Table:
    """Two models on the same videos, one row per metric."""
    columns = ["A", "B", "A - B", "95 % interval", "p", "p (Holm)"]
    table = _table(f"A = {pair.first}, B = {pair.second} [{about.convention}]", "Metric", columns)
    for metric, entry in pair.metrics.items():
        _add_row(
            table,
            metric_title(metric),
            mean_std_text(entry.first),
            mean_std_text(entry.second),
            f"{entry.difference:+.1f}",
            interval_text(Interval(entry.difference, entry.low, entry.high), "{:+.1f} to {:+.1f}") or "-",
            f"{entry.p_value:.4f}",
            f"{entry.p_holm:.4f}",
        )
    spread = " Standard deviation: over seeds." if max(about.seeds) > 1 else ""
    table.caption = (
        f"Percent, means over videos.{spread} Interval and test: over videos; {about.correction}. {_setting(about)}."
    )
    return table


def _of_frames(results: ByConvention, convention: str) -> PhaseResults:
    of_frames = {name: result for name, result in results.items() if result.of_frames}
    if convention not in of_frames:
        known = ", ".join(of_frames) or "none"
        raise UserError(f"no table under the convention {convention!r}; these results have {known}")
    return of_frames[convention]


def _table(title: str, name: str, numbers: Sequence[str]) -> Table:
    """An empty table; on a narrow terminal the names are shortened, never the numbers."""
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
    """Add names literally: square brackets in a name are not markup."""
    from rich.text import Text

    table.add_row(Text(name), *cells, style=style)
    for column, cell in zip(table.columns[1:], cells, strict=True):
        column.min_width = max(column.min_width or len(str(column.header)), len(cell))


IN_BRACKETS = "[{:.1f}, {:.1f}]"  # a form of `interval_text`


def number_text(value: float | None) -> str:
    """One digit after the point; a dash if there is no number."""
    return "-" if value is None else f"{value:.1f}"


def mean_std_text(score: Score | None) -> str:
    """`mean ± std` with one digit; the mean alone where there is no standard deviation."""
    if score is None or score.mean is None or score.std is None:
        return number_text(score.mean if score else None)
    return f"{score.mean:.1f} ± {score.std:.1f}"


def interval_text(interval: Interval | None, form: str = "{:.1f} to {:.1f}") -> str:
    """The ends of an interval, with one digit; empty where there is none."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return form.format(interval.low, interval.high)


def _setting(about: PhaseAbout | ToolAbout | ComparisonAbout) -> str:
    """Split, number of videos and rate, as far as known."""
    parts = [f"split {about.split}"] if about.split else []
    parts.append(f"{about.videos} videos" if about.videos != 1 else "1 video")
    if about.fps:
        parts.append(f"{about.fps:g} fps")
    return ", ".join(parts).capitalize()
