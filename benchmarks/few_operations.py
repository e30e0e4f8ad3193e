"""Choose a recipe for few operations by nested leave-one-out: the tables in `docs/results.md`.

The candidates are `configs/mini_best.yaml` with the changes of a file of candidates: some change stage one, others
stage two alone, which are tried on the features of the first stage one. Inner models: for a pair of operations, every
candidate is trained on all the others and tested on both. For an outer fold, which tests operation T, the candidate of
either kind is chosen whose mean score (of phase accuracy and tool mAP) over the partners of T is the highest, in models
that have not seen T; nothing that is known of T takes part in the choice. Only then is the chosen recipe trained on all
other operations, and T is looked at. One inner model serves the folds of both its operations.

`--pairs all` trains every pair, `ring` two partners for each operation, `cover` one or two. With `--every-head`,
the outer folds also train every other head among the candidates of stage two, on the features of the chosen stage one,
for the tables; they take no part in a choice. With `--decoding`, the decoding of the first candidate is fitted on one
operation of each inner pair and tested on the other. Everything runs through the command line in ordinary run folders,
so a second start resumes where the first one stopped.

    python benchmarks/few_operations.py --root DIR --json FILE [--candidates FILE] [--pairs cover|ring|all] [--seeds N]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from command import PROJECT, pipeline
from few_operations_tables import MODES, Measures, measures, print_tables

from configs.errors import UserError
from configs.load import read_yaml
from engine.files import read_json_object
from features.dataset.index import Index
from features.store_folder import INDEX_FILE

CANDIDATES = PROJECT / "benchmarks" / "few_operations.yaml"
Changes = Mapping[str, Any]
Pair = tuple[str, str]
ByVideo = dict[str, Measures]


@dataclass
class Search:
    """All trainings of a search. The candidates are {name: {setting: value}}; those in `offline` are never chosen."""

    options: argparse.Namespace
    stage_one: Mapping[str, Changes]
    temporal: Mapping[str, Changes]
    offline: Mapping[str, Changes]
    videos: Sequence[str] = field(default_factory=list)

    @classmethod
    def of(cls, options: argparse.Namespace) -> Search:
        tree = read_yaml(options.candidates)
        found = cls(options, tree["stage_one"], tree["temporal"], tree.get("offline", {}))
        for names in (found.stage_one, found.temporal, found.offline):
            if wrong := [name for name in names if not re.fullmatch(r"[A-Za-z0-9._-]+", str(name))]:
                raise UserError(f"{options.candidates}: {wrong[0]}: names are run folders; use letters, digits and -")
        index = options.runs / "index.json"
        pipeline("index", options.config, None, found._settings(index))
        found.videos = [one["id"] for one in read_json_object(index)["videos"]]
        return found

    @cached_property
    def base(self) -> str:
        """The stage one on whose features the candidates of stage two are compared."""
        return next(iter(self.stage_one))

    @cached_property
    def pairs(self) -> list[Pair]:
        return list(_pairs(self.videos, self.options.pairs))

    # ------------------------------------------------------------------------------------------ inner models

    def inner_stage_one(self, name: str, pair: Pair) -> ByVideo:
        """The results of both operations of a pair, with a model trained on all others."""
        run = f"{name}-inner-{'-'.join(pair)}"
        self.whole(run, self.stage_one[name], self.without(pair, test=pair))
        return measures(self.options.runs / run)

    def inner_temporal(self, name: str, pair: Pair) -> list[ByVideo]:
        """The same for a candidate of stage two, on the features of the first stage one, for each seed."""
        features = f"{self.base}-inner-{'-'.join(pair)}"
        split = self.without(pair, test=pair)
        return [self.stage_two(features, name, seed, split) for seed in range(self.options.inner_seeds)]

    def decoded(self, name: str, pair: Pair) -> list[dict[str, ByVideo]]:
        """For either operation of a pair and every mode, its results with a decoding fitted on the other one."""
        features = f"{self.base}-inner-{'-'.join(pair)}"
        found = []
        for val, test in (pair, pair[::-1]):
            split = self.without(pair, val=[val], test=[test])
            run = f"{features}-{name}-fitted-{val}"
            found.append({mode: self.stage_two(features, name, 0, split, mode, run) for mode in MODES})
        return found

    # ------------------------------------------------------------------------------------------ outer folds

    def outer(self, tested: str, stage_one: str, temporal: str) -> dict[str, Any]:
        """The results of the operation that is tested, for every seed of stage two; of the chosen one, decoded too."""
        run, split = f"{stage_one}-outer-{tested}", self.without([tested], test=[tested])
        self.whole(run, self.stage_one[stage_one], split)
        seeds = range(self.options.seeds)
        first = next(iter(self.temporal))
        heads = [name for name, changes in self.temporal.items() if "temporal.head" in changes or name == first]
        heads += self.offline
        names = dict.fromkeys([*(heads if self.options.every_head else ()), temporal])
        return {
            "stage_one": stage_one,
            "temporal": temporal,
            "candidates": {n: [self.stage_two(run, n, seed, split)[tested] for seed in seeds] for n in names},
            "decoded": {
                mode: [self.stage_two(run, temporal, seed, split, mode)[tested] for seed in seeds] for mode in MODES
            },
            "seconds": read_json_object(self.options.runs / run / "summary.json").get("seconds"),
        }

    # ------------------------------------------------------------------------------------------ runs

    def without(self, held_out: Sequence[str], **parts: Sequence[str]) -> dict[str, Sequence[str]]:
        """A split whose training operations are all but some."""
        return {"train": [one for one in self.videos if one not in held_out], "val": [], **parts}

    def whole(self, run: str, changes: Changes, split: Mapping[str, Sequence[str]]) -> None:
        """Run the pipeline. What is finished is not repeated; a run of other settings is refused."""
        pipeline("run", self.options.config, run, self._settings_of(run, changes, split, 0))

    def stage_two(
        self,
        features_of: str,
        name: str,
        seed: int,
        split: Mapping[str, Sequence[str]],
        mode: str = "none",
        run: str | None = None,
    ) -> ByVideo:
        """Train and evaluate a candidate of stage two on the features of a run, with the splits that are given."""
        run = run or f"{features_of}-{name}-seed{seed}"
        evaluated = self.options.runs / run / "evaluate" / ("test" if mode == "none" else f"test-{mode}")
        if not (evaluated / "metrics.json").is_file():
            changes = self.offline[name] if name in self.offline else self.temporal[name]
            settings = self._settings_of(run, {**changes, "temporal.baseline": False}, split, seed)
            folder = str(self._features(features_of, run, split))
            pipeline("train-temporal", self.options.config, run, settings, ("--features", folder))
            decoding = () if mode == "none" else ("--decoding", mode)
            pipeline("evaluate", self.options.config, run, settings, ("--features", folder, *decoding))
        return measures(self.options.runs / run, evaluated.name)

    def _features(self, run: str, user: str, split: Mapping[str, Sequence[str]]) -> Path:
        """The features of a run or, for a user with other splits, a copy of them with these splits."""
        folder = Path(read_json_object(self.options.runs / run / "extract" / "result.json")["folder"])
        index, parts = Index.load(folder / INDEX_FILE), {one: part for part, ids in split.items() for one in ids}
        videos = tuple(one.model_copy(update={"split": parts[one.id]}) for one in index.videos)
        if videos == index.videos:
            return folder
        copy = self.options.runs / user / "features" / folder.name
        if not copy.is_dir():
            shutil.copytree(folder, copy)
            index.model_copy(update={"videos": videos}).save(copy / INDEX_FILE)
        return copy

    def _settings_of(self, run: str, changes: Changes, split: Mapping[str, Sequence[str]], seed: int) -> list[str]:
        sets = [f"data.split.{part}=[{','.join(ids)}]" for part, ids in split.items()]
        sets += [
            "data.split.rule=lists",
            f"seed={seed}",
            *(f"{key}={json.dumps(value)}" for key, value in changes.items()),
        ]
        return self._settings(self.options.runs / f"{run}.index.json", *sets)

    def _settings(self, index: Path, *more: str) -> list[str]:
        options = self.options
        own = [f"data.root={options.root}", f"runs={options.runs}", f"data.index={index}"]
        return [*own, *options.set, *more]


def main() -> None:
    options = _options()
    started = time.monotonic()
    search = Search.of(options)
    inner = {name: {pair: search.inner_stage_one(name, pair) for pair in search.pairs} for name in search.stage_one}
    of_temporal = {name: {pair: search.inner_temporal(name, pair) for pair in search.pairs} for name in search.temporal}
    searched = time.monotonic() - started
    outer: dict[str, Any] = {}
    if not options.inner_only:
        for video in search.videos:
            stage_one = _choice({n: {p: [one] for p, one in pairs.items()} for n, pairs in inner.items()}, video)
            outer[video] = search.outer(video, stage_one, _choice(of_temporal, video))
    first = next(iter(search.temporal))
    decoded = [one for pair in search.pairs for one in search.decoded(first, pair)] if options.decoding else []
    report = {
        "stage_one": {name: {"-".join(pair): one for pair, one in pairs.items()} for name, pairs in inner.items()},
        "temporal": {name: {"-".join(pair): one for pair, one in pairs.items()} for name, pairs in of_temporal.items()},
        "outer": outer,
        "decoded": decoded,
        "search_s": round(searched, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1, default=vars) + "\n", encoding="utf-8")
    print_tables(inner, of_temporal, outer, decoded)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data root")
    parser.add_argument("--config", default="mini_best")
    parser.add_argument("--candidates", type=Path, default=CANDIDATES, help="YAML file: see few_operations.yaml")
    parser.add_argument("--pairs", choices=("cover", "ring", "all"), default="cover")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of stage two in an outer fold")
    parser.add_argument("--inner-seeds", type=int, default=2, help="the same for each candidate of an inner model")
    parser.add_argument("--inner-only", action="store_true", help="stop before the outer folds")
    parser.add_argument("--every-head", action="store_true", help="train all heads in the outer folds too")
    parser.add_argument("--decoding", action="store_true", help="fit the decoding on one operation, test it on another")
    parser.add_argument("--runs", type=Path, default=Path("runs/few"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed to every command")
    parser.add_argument("--json", type=Path, default=Path("artifacts/bench/few_operations.json"))
    return parser.parse_args()


def _pairs(videos: Sequence[str], kind: str) -> Iterator[Pair]:
    if kind == "all":
        yield from combinations(videos, 2)
    elif kind == "ring":
        yield from zip(videos, [*videos[1:], videos[0]], strict=True)
    else:
        seconds = [*videos[1::2], videos[0]]
        yield from zip(videos[::2], seconds, strict=False)  # of an odd number, the last one has the first as partner


def _choice(inner: Mapping[str, Mapping[Pair, Sequence[ByVideo]]], tested: str) -> str:
    """The candidate with the highest mean score of the partners of the operation that is tested."""

    def score(name: str) -> float:
        partners = [(pair, ({*pair} - {tested}).pop()) for pair in inner[name] if tested in pair]
        return statistics.fmean(seed[partner].score for pair, partner in partners for seed in inner[name][pair])

    return max(inner, key=score)


if __name__ == "__main__":
    main()
