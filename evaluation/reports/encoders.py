"""Show a comparison of encoders: as tables for a terminal, as CSV with one row per training, and as a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.encoder_comparison import PROBE
from engine.files import write_text
from evaluation.comparison import ModelPair
from evaluation.encoders import MAIN_METRIC, METRICS, TOOL_HEAD, EncoderRow, Encoders, Ranking, Training
from evaluation.metrics.conventions import metric_title
from evaluation.metrics.results import OFFLINE, Interval, counted, marked
from evaluation.reports.ablation import no_formula
from evaluation.reports.plotly_base import RUN_COLOURS, plain
from evaluation.reports.tables import IN_BRACKETS, ResultTable, interval_text, mean_std_text, number_text
from evaluation.reports.templates import template_environment

ENCODERS_PAGE = "encoders.html"
_TEMPLATE = "encoders.html.j2"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_NUMBERS = ("val_accuracy", *(f"test_{metric}" for metric in METRICS))
_COSTS = ("best_epoch", "epochs", "parameters", "seconds", "frames_per_s")


def encoders_tables(result: Encoders) -> list[ResultTable]:
    """Return the scores under each metric, the differences to the reference, and what each encoder is and costs."""
    scores = [_score_table(result, metric) for metric in METRICS]
    return [*scores, _difference_table(result), _cost_table(result)]


def encoders_notes(result: Encoders) -> list[str]:
    """Return sentences on how far the numbers can be trusted."""
    about, videos = result.about, len(result.about.videos)
    notes = [f"SIMULATED operations ({about.dataset}): the numbers mean nothing."] if about.simulated else []
    notes.append(
        f"{counted(videos, 'test video')} of {about.dataset} ({about.frames:,} frames at {about.fps:g} fps), "
        f"{about.folds}; {counted(len(about.seeds), 'seed')} per head."
    )
    notes.append("A difference whose interval contains 0 is not established.")
    if videos < 10:
        notes.append(f"Intervals over {counted(videos, 'video')} are rough, and say little about other operations.")
    if about.reference is None and any(result.comparisons.values()):
        notes.append(
            "The reference is the best encoder under each head, chosen on these same videos, so differences to it tend "
            "to be too large; name a reference in the file to avoid that."
        )
    notes += [f"{row.name}: {row.facts.note}." for row in result.encoders if row.facts.note]
    return notes


def ranking_sentences(result: Encoders) -> list[str]:
    """Say for each head whether the frame probe ranks the encoders in the same way."""
    return [_ranking_sentence(head, ranking) for head, ranking in result.rankings.items()]


def _ranking_sentence(head: str, ranking: Ranking) -> str:
    tau = "not defined, since all are equal" if ranking.kendall_tau is None else f"{ranking.kendall_tau:.2f}"
    under, by_probe = (" > ".join(order) for order in (ranking.order, ranking.probe_order))
    if ranking.is_the_probes:
        return f"Under {head} the encoders rank as by the frame probe: {under} (Kendall's tau {tau})."
    return f"Under {head} the encoders rank {under}; by the frame probe they rank {by_probe} (Kendall's tau {tau})."


# ---------------------------------------------------------------------------------------------- tables


def _title(result: Encoders, head: str) -> str:
    return "frame probe" if head == PROBE else marked(head, OFFLINE if head in (result.about.offline or ()) else None)


def _score_table(result: Encoders, metric: str) -> ResultTable:
    about, seeds = result.about, len(result.about.seeds)

    def cell(row: EncoderRow, head: str) -> str:
        scores = row.scores[head]
        fewer = f" ({counted(scores.seeds, 'seed')})" if head != PROBE and 0 < scores.seeds < seeds else ""
        return mean_std_text(scores.metrics[metric]) + fewer

    return ResultTable(
        f"{metric_title(metric)} [{about.convention}], percent",
        "Encoder",
        [_title(result, head) for head in result.heads],
        [(row.name, [cell(row, head) for head in result.heads]) for row in result.encoders],
        [f"Mean {about.mean}. ±: standard deviation {about.std}."],
    )


def _difference_table(result: Encoders) -> ResultTable:
    pairs = {(head, pair.second): pair for head, of_head in result.comparisons.items() for pair in of_head}
    references = {head: of_head[0].first for head, of_head in result.comparisons.items() if of_head}

    def cell(row: EncoderRow, head: str) -> str:
        if references.get(head) == row.name:
            return "reference"
        pair = pairs.get((head, row.name))
        return "-" if pair is None else difference_text(pair)

    return ResultTable(
        f"{metric_title(MAIN_METRIC)}: difference to the reference, percentage points",
        "Encoder",
        [_title(result, head) for head in result.heads],
        [(row.name, [cell(row, head) for head in result.heads]) for row in result.encoders],
        [f"In brackets: {result.about.interval}."],
    )


def difference_text(pair: ModelPair, metric: str = MAIN_METRIC) -> str:
    """Return the difference of the second model to the first, the reference, with its interval."""
    found = pair.metrics[metric]
    low, high = (None if end is None else -end + 0.0 for end in (found.high, found.low))
    interval = interval_text(Interval(None, low, high), IN_BRACKETS)
    return f"{-found.difference + 0.0:+.1f} {interval}".rstrip()


def _size(crop_px: int | Sequence[int]) -> str:
    return str(crop_px) if isinstance(crop_px, int) else "x".join(map(str, crop_px))


# Title, and text of a row's cell. Columns of which no row has a value are left out.
_COST_COLUMNS: tuple[tuple[str, Callable[[EncoderRow], str]], ...] = (
    ("mAP probe", lambda row: number_text(row.tool_map.get(PROBE))),
    ("mAP head", lambda row: number_text(row.tool_map.get(TOOL_HEAD))),
    ("D", lambda row: str(row.facts.embedding_dim)),
    ("param. M", lambda row: f"{row.facts.parameters / 1e6:.1f}"),
    ("px", lambda row: _size(row.facts.crop_px)),
    ("MB", lambda row: "-" if row.facts.size_bytes is None else f"{row.facts.size_bytes / 1e6:.1f}"),
    ("frames/s", lambda row: number_text(row.facts.frames_per_s)),
    ("encoded/s", lambda row: number_text(row.facts.encoded_per_s)),
    ("tuning s", lambda row: "-" if row.facts.finetuning_s is None else f"{row.facts.finetuning_s:.0f}"),
)


def _cost_table(result: Encoders) -> ResultTable:
    shown = [(title, cell) for title, cell in _COST_COLUMNS if any(cell(row) != "-" for row in result.encoders)]
    note = (
        f"mAP in percent, {result.about.tool_map}; of a logistic regression on the features (probe), and of the head "
        "trained with the encoder. D: width of an embedding. Parameters without classifier, millions. px: size of the "
        "images. MB: feature files of all videos. frames/s: extraction in this comparison, on this machine, with this "
        "encoder alone; encoded/s: without reading the frames, which is faster from the frame cache. Tuning: "
        "fine-tuning in all folds."
    )
    return ResultTable(
        "Tools and cost",
        "Encoder",
        [title for title, _ in shown],
        [(row.name, [cell(row) for _, cell in shown]) for row in result.encoders],
        [note],
    )


def write_encoders_csv(path: Path, trainings: Sequence[Training]) -> None:
    """Write one row per training, atomically. `val_accuracy` is a fraction; test scores are percent, of one fold."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["encoder", "head", "fold", "seed", "test_videos", *_NUMBERS, *_COSTS, "folder"])
    for one in trainings:
        seed = "" if one.seed is None else one.seed
        numbers = [one.result.get(key) for key in (*_NUMBERS, *_COSTS)]
        row = [one.encoder, one.head, one.fold, seed, " ".join(one.predicted), *numbers, one.result.get("folder")]
        writer.writerow([no_formula("" if cell is None else cell) for cell in row])
    write_text(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------- the page


def write_encoders_page(path: Path, result: Encoders) -> None:
    """Write an HTML page that needs no network, atomically: tables, sentences and plots of accuracy against cost."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    options = {"include_plotlyjs": False, "full_html": False, "config": {"displaylogo": False, "responsive": True}}
    figures = cost_figures(result)
    page = (
        template_environment(html=True)
        .get_template(_TEMPLATE)
        .render(
            about=result.about,
            trainings=result.trainings,
            notes=encoders_notes(result),
            rankings=ranking_sentences(result),
            tables=encoders_tables(result),
            encoders=result.encoders,
            figures=[(title, Markup(figure.to_html(**options))) for title, figure in figures],
            plotly=Markup(get_plotlyjs()) if figures else "",
        )
    )
    write_text(path, page)


def cost_figures(result: Encoders) -> list[tuple[str, Any]]:
    """Return plots of accuracy against the speed of encoding and against the number of parameters, with titles.

    A plot in which all encoders would cost the same is left out.
    """
    costs: Mapping[str, Callable[[EncoderRow], float | None]] = {
        "Frames per second, encoding only": lambda row: row.facts.encoded_per_s,
        "Parameters, millions": lambda row: row.facts.parameters / 1e6,
    }
    figures = ((title, _figure(result, title, cost)) for title, cost in costs.items())
    return [(title, figure) for title, figure in figures if figure is not None]


def _figure(result: Encoders, title: str, cost: Callable[[EncoderRow], float | None]) -> Any | None:
    from plotly import graph_objects

    rows = [row for row in result.encoders if cost(row)]
    if len({cost(row) for row in rows}) < 2:
        return None
    figure = graph_objects.Figure()
    for number, head in enumerate(result.heads):
        known = [row for row in rows if row.scores[head].metrics[MAIN_METRIC].mean is not None]
        scores = [row.scores[head].metrics[MAIN_METRIC] for row in known]
        figure.add_scatter(
            x=[cost(row) for row in known],
            y=[score.mean for score in scores],
            error_y={"type": "data", "array": [score.std or 0.0 for score in scores], "thickness": 1},
            mode="markers+text",
            text=[plain(row.name, 24) for row in known],
            textposition="top center",
            marker={
                "color": RUN_COLOURS[number % len(RUN_COLOURS)],
                "symbol": _SYMBOLS[number % len(_SYMBOLS)],
                "size": 10,
            },
            name=plain(_title(result, head)),
        )
    figure.update_xaxes(title=title, type="log")
    figure.update_yaxes(title="Accuracy, percent")
    figure.update_layout(template="plotly_white", height=420, margin={"l": 60, "r": 20, "t": 20, "b": 50})
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return figure
