"""Choose a recipe for few operations by nested leave-one-out: the tables in `docs/results.md`.

The candidates are `configs/mini_best.yaml` with the changes of a file of candidates. Inner models: for a pair of
operations, every candidate is trained on all the others, for a fixed number of epochs, without validation videos, and
tested on both. The candidate of an outer fold, which tests operation T, is the one with the highest mean score (of
phase accuracy and tool mAP) over the partners of T, in models that have not seen T; nothing that is known of T takes
part in the choice. Only then is the chosen candidate trained for the outer fold (three operations for training, one for
the best epoch and the decoding), and T is looked at once. One inner model serves the folds of both its operations.

`--pairs ring` trains half as many inner models: each operation has two partners instead of all. Everything runs through
the command line in ordinary run folders, so a second start resumes where the first one stopped.

    python benchmarks/few_operations.py --root DIR --json FILE [--candidates FILE] [--pairs ring|all] [--seeds N]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from command import PROJECT, pipeline

from configs.errors import UserError
from configs.load import read_yaml
from engine.files import read_json_object
from evaluation.metrics.results import HEAD, METRICS_FILE, read_evaluation

CANDIDATES = PROJECT / "benchmarks" / "few_operations.yaml"
Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """Phase accuracy and tool mAP of one operation, in percent; the choice is made by their mean."""

    accuracy: float
    tool_map: float

    @property
    def mean(self) -> float:
        return (self.accuracy + self.tool_map) / 2


def main() -> None:
    options = _options()
    started = time.monotonic()
    candidates: dict[str, Changes] = read_yaml(options.candidates)
    if wrong := [name for name in candidates if not re.fullmatch(r"[A-Za-z0-9._-]+", str(name))]:
        raise UserError(f"{options.candidates}: {wrong[0]}: candidates name run folders; use letters, digits and -")
    videos = _videos(options)
    inner = {
        name: {pair: _inner(options, name, changes, videos, pair) for pair in _pairs(videos, options.pairs)}
        for name, changes in candidates.items()
    }
    searched = time.monotonic() - started
    chosen = {video: _choice(inner, video) for video in videos}
    outer = {video: _outer(options, chosen[video], candidates, videos, video) for video in videos}
    report = {
        "inner": {name: {"-".join(pair): found for pair, found in pairs.items()} for name, pairs in inner.items()},
        "chosen": chosen,
        "outer": outer,
        "search_s": round(searched, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1, default=vars) + "\n", encoding="utf-8")
    _print(inner, chosen, outer)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data root")
    parser.add_argument("--config", default="mini_best")
    parser.add_argument("--candidates", type=Path, default=CANDIDATES, help="YAML file: {name: {setting: value}}")
    parser.add_argument("--pairs", choices=("ring", "all"), default="ring")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of stage two per outer fold")
    parser.add_argument("--runs", type=Path, default=Path("runs/few"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed to every command")
    parser.add_argument("--json", type=Path, default=Path("artifacts/bench/few_operations.json"))
    return parser.parse_args()


def _videos(options: argparse.Namespace) -> list[str]:
    """The ids of the operations that the data root has."""
    path = options.runs / "index.json"
    pipeline("index", options.config, None, _settings(options, path))
    return [one["id"] for one in read_json_object(path)["videos"]]


def _pairs(videos: Sequence[str], kind: str) -> Iterator[tuple[str, str]]:
    if kind == "all":
        yield from combinations(videos, 2)
    else:
        yield from zip(videos, [*videos[1:], videos[0]], strict=True)


def _inner(
    options: argparse.Namespace, name: str, changes: Changes, videos: Sequence[str], pair: tuple[str, str]
) -> dict[str, Scores]:
    """The scores of the two operations of a pair, under a model trained on all others."""
    run = f"{name}-inner-{'-'.join(pair)}"
    split = {"train": [one for one in videos if one not in pair], "val": [], "test": list(pair)}
    _run(options, run, changes, split)
    return _scores(options.runs / run)


def _choice(inner: Mapping[str, Mapping[tuple[str, str], Mapping[str, Scores]]], tested: str) -> str:
    """The candidate with the highest mean score of the partners of the operation that is tested."""

    def score(name: str) -> float:
        partners = [(pair, ({*pair} - {tested}).pop()) for pair in inner[name] if tested in pair]
        return statistics.fmean(inner[name][pair][partner].mean for pair, partner in partners)

    return max(inner, key=score)


def _outer(
    options: argparse.Namespace, name: str, candidates: Mapping[str, Changes], videos: Sequence[str], tested: str
) -> dict[str, Any]:
    """The scores of the operation that is tested, with every seed of stage two."""
    others = [one for one in videos if one != tested]
    val = videos[(videos.index(tested) + 1) % len(videos)]
    split = {"train": [one for one in others if one != val], "val": [val], "test": [tested]}
    run = f"{name}-outer-{tested}"
    _run(options, run, candidates[name], split)
    found = [_scores(options.runs / run)[tested]]
    for seed in range(1, options.seeds):
        _run(options, f"{run}-seed{seed}", candidates[name], split, seed, features_of=run)
        found.append(_scores(options.runs / f"{run}-seed{seed}")[tested])
    summary = read_json_object(options.runs / run / "summary.json")
    return {"candidate": name, "scores": found, "seconds": summary.get("seconds")}


def _run(
    options: argparse.Namespace,
    run: str,
    changes: Changes,
    split: Mapping[str, Sequence[str]],
    seed: int = 0,
    features_of: str | None = None,
) -> None:
    """Run the pipeline, or with `features_of` stage two alone on the features of that run.

    What is finished with the same settings and data is not repeated; a run of other settings is refused.
    """
    sets = [f"data.split.{part}=[{','.join(ids)}]" for part, ids in split.items()]
    sets += ["data.split.rule=lists", f"seed={seed}", *(f"{key}={json.dumps(value)}" for key, value in changes.items())]
    settings = _settings(options, options.runs / f"{features_of or run}.index.json", *sets)
    if features_of is None:
        pipeline("run", options.config, run, settings)
        return
    folder = read_json_object(options.runs / features_of / "extract" / "result.json")["folder"]
    for command in ("train-temporal", "evaluate"):
        pipeline(command, options.config, run, settings, ("--features", str(folder)))


def _settings(options: argparse.Namespace, index: Path, *more: str) -> list[str]:
    return [f"data.root={options.root}", f"runs={options.runs}", f"data.index={index}", *options.set, *more]


def _scores(run: Path) -> dict[str, Scores]:
    """The scores of every test video, from a run's evaluation."""
    found = read_evaluation(run / "evaluate" / "test" / METRICS_FILE)
    assert found.tools is not None
    phases, tools = found.phases[HEAD][found.convention].per_video, found.tools.per_video
    return {one: Scores(_number(phases[one]["accuracy"]), _number(tools[one].map)) for one in found.videos}


def _number(value: float | None) -> float:
    if value is None:
        raise UserError("a test video has no phase accuracy or no tool mAP; it needs labels of both")
    return value


def _print(
    inner: Mapping[str, Mapping[tuple[str, str], Mapping[str, Scores]]],
    chosen: Mapping[str, str],
    outer: Mapping[str, Mapping[str, Any]],
) -> None:
    print("| candidate | phase accuracy | tool mAP | difference of their mean to the first |\n|---|---|---|---|")
    first: list[float] = []
    for name, pairs in inner.items():
        found = [one for videos in pairs.values() for one in videos.values()]
        means = [one.mean for one in found]
        first = first or means
        accuracy, tool_map = (statistics.fmean(getattr(one, key) for one in found) for key in ("accuracy", "tool_map"))
        difference = statistics.fmean(a - b for a, b in zip(means, first, strict=True))
        print(f"| {name} | {accuracy:.1f} | {tool_map:.1f} | {difference:+.1f} |")
    print("\n| tested | chosen | phase accuracy | tool mAP |\n|---|---|---|---|")
    for video, one in outer.items():
        accuracy = statistics.fmean(score.accuracy for score in one["scores"])
        print(f"| {video} | {chosen[video]} | {accuracy:.1f} | {one['scores'][0].tool_map:.1f} |")


if __name__ == "__main__":
    main()
