"""The measures of a run that `few_operations.py` compares, and its tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from evaluation.metrics.results import HEAD, METRICS_FILE, read_evaluation
from evaluation.metrics.statistics import paired_interval

MODES = ("none", "calibrated", "filter", "causal")


@dataclass(frozen=True)
class Measures:
    """Results of one operation, in percent, per hour for false transitions; None where it has no label for one."""

    accuracy: float
    f1: float | None
    tool_map: float
    false_per_hour: float | None
    missed: float | None
    ece: float | None
    ece_near: float | None

    @property
    def score(self) -> float:
        """What candidates are compared by."""
        return (self.accuracy + self.tool_map) / 2


def measures(run: Path, evaluated: str = "test") -> dict[str, Measures]:
    """The measures of every test video, from a run's evaluation. Raises UserError without phases or tools in one."""
    path = run / "evaluate" / evaluated / METRICS_FILE
    found = read_evaluation(path)
    phases = found.phases[HEAD]

    def of(convention: str, video: str, key: str) -> float | None:
        return phases[convention].per_video[video].get(key)

    def needed(value: float | None, video: str) -> float:
        if value is None:
            raise UserError(f"{path}: {video} has no phase accuracy or no tool mAP; it needs labels of both")
        return value

    tools = found.tools.per_video if found.tools else {}
    return {
        one: Measures(
            accuracy=needed(of(found.convention, one, "accuracy"), one),
            f1=of(found.convention, one, "f1"),
            tool_map=needed(tools[one].map if one in tools else None, one),
            false_per_hour=of("transitions", one, "false_per_hour"),
            missed=of("transitions", one, "missed"),
            ece=of("calibration", one, "ece"),
            ece_near=of("calibration", one, "ece_near"),
        )
        for one in found.videos
    }


ByVideo = Mapping[str, Measures]
Value = Callable[[Measures], float | None]


def print_tables(
    stage_one: Mapping[str, Mapping[Any, ByVideo]],
    temporal: Mapping[str, Mapping[Any, Sequence[ByVideo]]],
    outer: Mapping[str, Mapping[str, Any]],
    decoded: Sequence[Mapping[str, ByVideo]],
) -> None:
    print("\nInner models, stage one (one seed)\n")
    _compared({name: _by_video([one] for one in pairs.values()) for name, pairs in stage_one.items()})
    print("\nInner models, stage two (mean over seeds)\n")
    _compared({name: _by_video(pairs.values()) for name, pairs in temporal.items()})
    if outer:
        _outer(outer)
    if decoded:
        print("\nDecoding that was fitted on one operation, tested on another\n")
        videos = sorted({video for modes in decoded for video in modes["none"]})
        _modes({mode: {v: [way[mode][v] for way in decoded if v in way[mode]] for v in videos} for mode in MODES})


def _outer(outer: Mapping[str, Mapping[str, Any]]) -> None:
    print(
        "\nOuter folds: the chosen recipe, without decoding\n\n| tested | stage one | stage two | accuracy | tool mAP |"
    )
    print("|---|---|---|---|---|")
    for video, fold in outer.items():
        chosen = fold["candidates"][fold["temporal"]]
        accuracy = statistics.fmean(one.accuracy for one in chosen)
        print(f"| {video} | {fold['stage_one']} | {fold['temporal']} | {accuracy:.1f} | {chosen[0].tool_map:.1f} |")
    print("\nOuter folds: the chosen recipe, decoded\n")
    _modes({mode: {video: fold["decoded"][mode] for video, fold in outer.items()} for mode in MODES})
    names = [n for n in next(iter(outer.values()))["candidates"] if all(n in f["candidates"] for f in outer.values())]
    if len(names) > 1:
        print("\nOuter folds: every head\n")
        _compared({name: {video: fold["candidates"][name] for video, fold in outer.items()} for name in names})


def _by_video(pairs: Iterable[Sequence[ByVideo]]) -> dict[str, list[Measures]]:
    """All results of each operation, over pairs and seeds."""
    found: dict[str, list[Measures]] = {}
    for seeds in pairs:
        for seed in seeds:
            for video, one in seed.items():
                found.setdefault(video, []).append(one)
    return dict(sorted(found.items()))


def _compared(candidates: Mapping[str, Mapping[str, Sequence[Measures]]]) -> None:
    """Print one row per candidate, with the paired difference of its accuracy and its mAP to those of the first one."""
    print("| candidate | accuracy | operations | seeds | difference | F1 | tool mAP | operations | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    first = next(iter(candidates.values()))
    for name, videos in candidates.items():
        accuracy = _cells(videos, lambda one: one.accuracy)
        seeds = _spread_of_seeds(list(videos.values()))
        f1 = _number(_mean(videos, lambda one: one.f1))
        tools = _cells(videos, lambda one: one.tool_map)
        differences = [_difference(videos, first, value) for value in (lambda m: m.accuracy, lambda m: m.tool_map)]
        print(f"| {name} | {accuracy} | {seeds} | {differences[0]} | {f1} | {tools} | {differences[1]} |")


def _modes(modes: Mapping[str, Mapping[str, Sequence[Measures]]]) -> None:
    print(
        "| decoding | accuracy | operations | F1 | false transitions per hour | missed | ECE | ECE near transitions |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for mode, videos in modes.items():
        values: list[Value] = [
            lambda one: one.f1,
            lambda one: one.false_per_hour,
            lambda one: one.missed,
            lambda one: one.ece,
            lambda one: one.ece_near,
        ]
        others = " | ".join(_number(_mean(videos, value)) for value in values)
        print(f"| {mode} | {_cells(videos, lambda one: one.accuracy)} | {others} |")


def _of_video(results: Sequence[Measures], value: Value) -> float | None:
    known = [found for one in results if (found := value(one)) is not None]
    return statistics.fmean(known) if known else None


def _mean(videos: Mapping[str, Sequence[Measures]], value: Value) -> float | None:
    """The mean over operations of their means over results."""
    known = [found for results in videos.values() if (found := _of_video(results, value)) is not None]
    return statistics.fmean(known) if known else None


def _cells(videos: Mapping[str, Sequence[Measures]], value: Value) -> str:
    each = ", ".join(_number(_of_video(results, value)) for results in videos.values())
    return f"{_number(_mean(videos, value))} | {each}"


def _spread_of_seeds(videos: Sequence[Sequence[Measures]]) -> str:
    """The standard deviation (n - 1) over seeds of the mean over operations; of one seed there is none."""
    count = min(len(seeds) for seeds in videos)
    means = [statistics.fmean(seeds[at].accuracy for seeds in videos) for at in range(count)]
    return f"± {statistics.stdev(means):.1f}" if count > 1 else "-"


def _difference(videos: Mapping[str, Sequence[Measures]], first: Mapping[str, Sequence[Measures]], value: Value) -> str:
    pairs = [(_of_video(videos[one], value), _of_video(first[one], value)) for one in first]
    found = paired_interval([a - b for a, b in pairs if a is not None and b is not None])
    if videos is first or found.low is None:
        return "-"
    return f"{found.mean:+.1f} [{found.low:.1f}, {found.high:.1f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
