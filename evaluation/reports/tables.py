"""Make tables of results for a terminal of at least 80 columns. Each names the convention that its numbers follow.

The tables of the HTML report are in `html_tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.errors import UserError
from configs.schema import MAIN_TRACK
from evaluation.metrics.conventions import MAIN_CONVENTION, convention_titles, metric_title
from evaluation.metrics.results import (
    HEAD,
    ByConvention,
    Interval,
    PhaseAbout,
    PhaseResults,
    PooledScore,
    Score,
    ThresholdScores,
    ToolResults,
    counted,
    marked,
)
from evaluation.metrics.tools import tool_metric_title

if TYPE_CHECKING:
    from rich.table import Table

    from evaluation.comparison import ComparisonAbout, ModelPair
    from evaluation.metrics.results import ToolAbout


@dataclass(frozen=True)
class ResultTable:
    """A table: `rows` are (name, cells), and `notes` are shown below. With `total`, the last row is set apart.

    `corner` is the heading of the column of names, and `columns` are the headings of the cells.

    In the HTML page, a cell may have a second line in smaller letters, and `groups` (title, number of columns) are
    headings above columns.
    """

    title: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    notes: Sequence[str] = ()
    groups: Sequence[tuple[str, int]] = ()
    total: bool = False

    @property
    def group_starts(self) -> set[int]:
        """The columns at which a group begins; they have a line on their left."""
        widths = [width for _, width in self.groups]
        return {sum(widths[:group]) for group in range(len(widths))} if len(widths) > 1 else set()

    def __rich__(self) -> Table:
        """Return the table for a terminal. On a narrow one, names are shortened, but never numbers.

        Names are shown literally, so that square brackets in a name are not read as markup.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(self.title, style="bold"),
            title_justify="left",
            caption=Text(" ".join(self.notes), style="table.caption") if self.notes else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=0,
        )
        table.add_column(self.corner, overflow="ellipsis")  # only this column may become narrower
        for texts in zip(self.columns, *(cells for _, cells in self.rows), strict=True):
            table.add_column(texts[0], justify="right", no_wrap=True, min_width=max(map(len, texts)))
        for row, (name, cells) in enumerate(self.rows, start=1):
            total = self.total and row == len(self.rows)
            if total:
                table.add_section()
            table.add_row(Text(name), *cells, style="bold" if total else None)
        return table


def phase_table(results: ByConvention, convention: str = MAIN_CONVENTION, track: str = MAIN_TRACK) -> ResultTable:
    """Return a table of the metrics of each phase and over all phases, in percent; `track` names another label track.

    A phase's row contains mean ± standard deviation over the videos with that phase; the last row follows the
    convention. Raises UserError if `results` do not contain the convention or it does not compare frames.
    """
    result = _of_frames(results, convention)
    about, metrics = result.about, result.metrics[1:]
    found: dict[str, tuple[Callable[[str], Score | None], int]] = {
        phase: (entry.scores.get, entry.videos) for phase, entry in (result.per_phase or {}).items()
    }
    found["all"] = (result.score, about.videos)
    return ResultTable(
        f"{marked(track_title(track), about.mark)}, {about.title} [{convention}], percent",
        "Phase" if track == MAIN_TRACK else "Class",
        [*map(metric_title, metrics), "Videos"],
        [(name, [*(mean_std_text(score(m)) for m in metrics), str(videos)]) for name, (score, videos) in found.items()],
        [f"Accuracy {mean_std_text(result.score('accuracy'))} %. Standard deviation: {about.std}. {_setting(about)}."],
        total=True,
    )


def conventions_table(results: ByConvention) -> ResultTable:
    """Return a table of the same predictions under each convention that compares frames, with one row for each."""
    shown = _frame_conventions(results)
    about = next(iter(shown.values())).about
    note = f"Standard deviation: over videos or phases, as the convention has it. {_setting(about)}."
    titles = convention_titles()
    for result in shown.values():
        own = [name for name in result.scores if name in titles and name not in result.metrics]
        note += "".join(f" {titles[name]}: {mean_std_text(result.score(name))}." for name in own)
    return _scores_table("Phases under every convention, percent", "Convention", shown, note)


def intervals_table(results: ByConvention) -> ResultTable:
    """Return a table of 95 % bootstrap intervals over videos, with one row per convention that compares frames."""
    shown = _frame_conventions(results)
    metrics = metrics_of(shown.values())
    found = {name: result.intervals or {} for name, result in shown.items()}
    rows = [(name, [interval_text(one.get(metric)) or "-" for metric in metrics]) for name, one in found.items()]
    title = "95 % intervals, bootstrap over videos, percent"
    return ResultTable(title, "Convention", [*map(metric_title, metrics)], rows)


def track_title(track: str) -> str:
    """Return the name of a label track as a title: `Steps` for `steps`."""
    return track.replace("_", " ").capitalize()


def comparison_table(
    models: Mapping[str, ByConvention], convention: str = MAIN_CONVENTION, track: str | None = None
) -> ResultTable:
    """Return a table with one row per model (head or baseline), under one convention that compares frames.

    If there are tables of several label tracks, `track` names this one's in the title.
    """
    found = {name: _of_frames(results, convention) for name, results in models.items()}
    shown = {marked(name, result.about.mark): result for name, result in found.items()}
    about = next(iter(shown.values())).about
    note = f"Standard deviation: {about.std}. {_setting(about)}."
    title = f"{f'{track_title(track)}, m' if track else 'M'}odels on the same videos [{convention}], percent"
    return _scores_table(title, "Model", shown, note)


def _scores_table(title: str, corner: str, results: Mapping[str, PhaseResults], note: str) -> ResultTable:
    metrics = metrics_of(results.values())
    rows = [(name, [mean_std_text(result.score(metric)) for metric in metrics]) for name, result in results.items()]
    return ResultTable(title, corner, [*map(metric_title, metrics)], rows, [note])


def _frame_conventions(results: ByConvention) -> ByConvention:
    return {name: result for name, result in results.items() if result.of_frames}


def metrics_of(results: Iterable[PhaseResults]) -> list[str]:
    """Return the names of the metrics over all videos that at least one of the results has."""
    return list(dict.fromkeys(metric for result in results for metric in result.metrics))


def others_table(results: ByConvention) -> ResultTable:
    """Return a table of the conventions that do not count frames for each phase, such as `segmental`.

    Raises UserError if `results` contain none.
    """
    others = {name: result for name, result in results.items() if not result.of_frames}
    if not others:
        raise UserError("no results of segments, transitions or calibration; evaluate with such a convention first")
    rows = []
    for convention, result in others.items():
        for name in (metric for metric in result.metrics if metric != "accuracy"):
            score = result.score(name)
            pooled = number_text(score.pooled) if isinstance(score, PooledScore) else ""
            rows.append((f"{metric_title(name)} [{convention}]", [pooled, mean_std_text(score)]))
    about = next(iter(others.values())).about
    notes = [f"Percent, except delays and rates. {_setting(about)}."]
    if left_out := next((one.about.background for one in others.values() if one.about.background), None):
        notes.append(f"Left out as background: {', '.join(left_out)}.")
    return ResultTable("Other scores of the same predictions", "Score", ["Pooled", "Mean over videos"], rows, notes)


def events_table(models: Mapping[str, ByConvention], track: str | None = None) -> ResultTable:
    """Return a table of transitions and calibration over all videos, with one row per model (head or baseline).

    If there are tables of several label tracks, `track` names this one's in the title. Models without probabilities
    have no calibration. The scores of PhaKIR are in the note.
    """
    rows, columns, notes = [], dict[str, None](), []
    for convention in ("transitions", "calibration"):
        columns |= dict.fromkeys(m for one in models.values() if convention in one for m in one[convention].metrics)
    for model, results in models.items():
        found = {m: score for one in results.values() if not one.of_frames for m, score in one.scores.items()}
        scores = [found.get(metric) for metric in columns]
        name = marked(model, next(iter(results.values())).about.mark)
        rows.append((name, [number_text(one.pooled if isinstance(one, PooledScore) else None) for one in scores]))
        if (phakir := results.get("phakir")) is not None and model == HEAD:
            shown = (f"{metric_title(metric)} {mean_std_text(phakir.score(metric))}" for metric in phakir.metrics)
            notes.append(f"PhaKIR: {', '.join(shown)}.")
    title = f"{f'{track_title(track)}, t' if track else 'T'}ransitions and calibration, all videos pooled"
    return ResultTable(title, "Model", [*map(metric_title, columns)], rows, notes)


MEAN_AP = "mean (mAP)"
THRESHOLD_TITLES = ("Precision", "Recall", "F1")


def tool_table(results: ToolResults) -> ResultTable:
    """Return a table of each tool's average precision and of mAP, in percent, and scores at thresholds if there are
    any.
    """
    metrics = shared_tool_metrics([results])
    extra = [*tool_metric_columns(metrics), *(THRESHOLD_TITLES if results.at_threshold else ())]
    columns = ["Pooled", "Per video", "Present", *extra]
    present = {name: f"{entry.present:,}" for name, entry in results.per_tool.items()}
    rows = [
        (name, [pooled, over_videos, present.get(name, ""), *scores])
        for name, (pooled, over_videos, *scores) in tool_cells(results, metrics).items()
    ]
    spread = "mean ± standard deviation over videos"
    notes = [f"Pooled: over all frames. Per video: {spread}. {_setting(results.about)}."]
    return ResultTable("Tools, average precision, percent", "Tool", columns, rows, notes, total=True)


def shared_tool_metrics(results: Sequence[ToolResults]) -> list[str]:
    """Return the names of the registered metrics that all results have."""
    return [name for name in results[0].metrics or () if all(name in (one.metrics or ()) for one in results)]


def tool_metric_columns(metrics: Sequence[str]) -> list[str]:
    """Return the column headers of registered metrics in `tool_cells`."""
    return [f"{tool_metric_title(name)} pooled" for name in metrics]


def tool_cells(results: ToolResults, metrics: Sequence[str]) -> dict[str, list[str]]:
    """Return the cells of each tool, and last, under `MEAN_AP`, those of the means over tools.

    They are average precision on pooled frames and over videos, `metrics` on pooled frames and, if there
    is a threshold, precision, recall and F1.
    """
    others = [(results.metrics or {})[name] for name in metrics]
    rows: dict[str, tuple[float | None, str, list[float | None], ThresholdScores | None]] = {
        tool: (
            entry.ap_pooled,
            mean_std_text(entry.ap_video),
            [other.per_tool[tool].pooled for other in others],
            entry.at_threshold,
        )
        for tool, entry in results.per_tool.items()
    }
    means = [other.pooled for other in others]
    rows[MEAN_AP] = (results.map_pooled, number_text(results.map_video), means, results.at_threshold)
    return {
        name: [number_text(pooled), text, *map(number_text, [*more, *(vars(scores).values() if scores else ())])]
        for name, (pooled, text, more, scores) in rows.items()
    }


def difference_table(pair: ModelPair, about: ComparisonAbout) -> ResultTable:
    """Return a table that compares two models on the same videos, with one row per metric."""
    rows = [
        (
            metric_title(metric),
            [
                mean_std_text(entry.first),
                mean_std_text(entry.second),
                f"{entry.difference:+.1f}",
                interval_text(Interval(entry.difference, entry.low, entry.high), "{:+.1f} to {:+.1f}") or "-",
                f"{entry.p_value:.4f}",
                f"{entry.p_holm:.4f}",
            ],
        )
        for metric, entry in pair.metrics.items()
    ]
    spread = " Standard deviation: over seeds." if max(about.seeds) > 1 else ""
    unit = about.unit.removesuffix(" points").capitalize()
    return ResultTable(
        f"A = {pair.first}, B = {pair.second} [{about.convention}]",
        "Metric",
        ["A", "B", "A - B", "95 % interval", "p", "p (Holm)"],
        rows,
        [f"{unit}, means over videos.{spread} Interval and test: over videos; {about.correction}. {_setting(about)}."],
    )


def _of_frames(results: ByConvention, convention: str) -> PhaseResults:
    of_frames = _frame_conventions(results)
    if convention not in of_frames:
        known = ", ".join(of_frames) or "none"
        raise UserError(f"no table under the convention {convention!r}; these results have {known}")
    return of_frames[convention]


IN_BRACKETS = "[{:.1f}, {:.1f}]"  # a form of `interval_text`


def number_text(value: float | None) -> str:
    """Return a number with one digit after the point, or a dash if there is none."""
    return "-" if value is None else f"{value:.1f}"


def mean_std_text(score: Score | None) -> str:
    """Return `mean ± std` with one digit after the point, or only the mean if there is no standard deviation."""
    if score is None or score.mean is None or score.std is None:
        return number_text(score.mean if score else None)
    return f"{score.mean:.1f} ± {score.std:.1f}"


def interval_text(interval: Interval | None, form: str = "{:.1f} to {:.1f}") -> str:
    """Return the ends of an interval with one digit after the point, or an empty text if there is none."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return form.format(interval.low, interval.high)


def _setting(about: PhaseAbout | ToolAbout | ComparisonAbout) -> str:
    """Return split, number of videos and rate as text, as far as they are known."""
    parts = [f"split {about.split}"] if about.split else []
    parts.append(counted(about.videos, "video"))
    if about.fps:
        parts.append(f"{about.fps:g} fps")
    return ", ".join(parts).capitalize()
