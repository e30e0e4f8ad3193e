"""Train and test the published and the best recipes on the whole of Cholec80: `make reproduce-cholec80 ROOT=DIR`.

Every recipe is trained with several seeds on every split, and tested under every convention of docs/evaluation.md. The
table (Markdown and JSON, with published figures beside it) is written to the folder `--out`. Everything runs through
the command line in ordinary run folders, so a second start resumes where the first one stopped; a run whose settings
have changed is refused. docs/cholec80.md describes the recipes, their cost, and jobs of Slurm.

    python benchmarks/reproduce_cholec80.py --root DIR [--recipes A,B] [--splits 32/8/40,40/40] [--seeds 3]
    python benchmarks/reproduce_cholec80.py --root DIR --part I/N      (every N-th part of the work, for job arrays)
    python benchmarks/reproduce_cholec80.py --root DIR --table         (only the table, of the runs that are finished)
    python benchmarks/reproduce_cholec80.py --root DIR --dry-run       (only print the commands)

Exit codes are those of the commands: 2 for bad input, 75 or 130 if stopped, in which case a second start resumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cholec80_table import Runs, write_table
from command import stage_to_end

from configs.errors import UserError, did_you_mean, listed
from configs.load import load_config, load_dataset, read_yaml
from engine.ending import report
from engine.files import read_json_object, sha256_file, sha256_json, write_json
from engine.runs import BEST_FILE
from engine.stopping import Stopped, StopRequest, watch_signals
from evaluation.metrics.conventions import CONVENTIONS
from evaluation.metrics.results import METRICS_FILE
from features.dataset.index import Index

Stage = Callable[[Sequence[str], StopRequest], int]  # runs one command of pipeline.py; returns its exit code
PARTLY = 1  # exit code of a command that has left videos out
MOST_SEEDS = 100
OWN_KEYS = ("data.root", "data.index", "data.split.rule", "runs", "seed")
EVALUATED_FILE = "reproduce.json"  # in a run: the identity of its evaluation
NO_SPLIT = "null"  # data.split.rule: the data set's usual split, or none if there are too few videos


@dataclass(frozen=True)
class Recipe:
    """A preset and the form in which it is trained: end to end (`joint`), or in two stages."""

    title: str
    preset: str
    joint: bool
    settings: tuple[str, ...] = ()


RECIPES = {
    "mtrcnet_cl": Recipe("MTRCNet-CL, end to end, as published", "mtrcnet_cl", joint=True),
    "cholec80": Recipe("ResNet50, then an LSTM on whole operations", "cholec80", joint=False),
    "best_joint": Recipe(
        "ConvNeXt-T and an LSTM, end to end on long clips",
        "cholec80_best",
        joint=True,
        settings=("temporal.head.name=lstm", "temporal.head.hidden=512"),
    ),
    "best_two_stages": Recipe("ConvNeXt-T, then the head of the preset", "cholec80_best", joint=False),
}


class _CommandFailedError(Exception):
    """A command ended with this exit code, after it had printed why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def main(arguments: Sequence[str] | None = None, stage: Stage = stage_to_end) -> int:
    """Run the program and return its exit code. `stage` runs the commands, each in a process of its own by default."""
    try:
        plan = _read(_options(arguments))
        with watch_signals() as stop:
            return _work(plan, stage, stop)
    except _CommandFailedError as error:
        return error.code
    except (UserError, Stopped, OSError) as error:
        return report(error) or 2


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of Cholec80's videos and annotations (default: $SURGSTAGE_DATA)")
    parser.add_argument("--recipes", default=",".join(RECIPES), help=f"comma-separated (default: {','.join(RECIPES)})")
    parser.add_argument("--splits", default="32/8/40,40/40", help="comma-separated values of data.split.rule")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--conventions", help="comma-separated names for the table (default: all)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="run every N-th part of the work, starting at I")
    parser.add_argument(
        "--stage-one-per-seed",
        action="store_true",
        help="train stage one of the two-stage recipes with every seed, instead of once per split",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="[RECIPE:]KEY=VALUE", dest="sets", help="change a setting"
    )
    parser.add_argument("--settings", type=Path, metavar="FILE", help="YAML file of such keys and values")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--name", default="reproduce", help="first part of the runs' names")
    parser.add_argument("--out", type=Path, default=Path("artifacts/reproduce-cholec80"), help="folder of the table")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--table", action="store_true", help="write the table of the runs that are finished")
    return parser.parse_args(arguments)


# ---------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """What is asked for: the options, checked."""

    root: str
    recipes: tuple[str, ...]
    splits: tuple[str, ...]
    seeds: int
    conventions: tuple[str, ...]
    part: tuple[int, int]
    per_seed: bool
    common: tuple[str, ...]  # settings of every recipe
    own: dict[str, list[str]]  # settings of one recipe
    runs: Path
    name: str
    out: Path
    mode: str

    def index(self, split: str) -> Path:
        """The index of a split, which all recipes share."""
        return self.out / f"index-{split.replace('/', '-')}.json"

    def run_name(self, recipe: str, split: str, seed: int) -> str:
        """The name of the run that trains a recipe on a split with a seed."""
        return f"{self.name}-{recipe}-{split.replace('/', '-')}-seed{seed}"

    def folder(self, recipe: str, split: str, seed: int) -> Path:
        """The folder of that run."""
        return self.runs / self.run_name(recipe, split, seed)

    def shares(self, recipe: str) -> bool:
        """Whether all seeds of a recipe use the features of one stage one."""
        return not (RECIPES[recipe].joint or self.per_seed)

    def parts(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """The parts of the work (recipe, split, seeds): those that `--part` chooses.

        Runs that share features are one part, since the first of them makes the features. The recipes alternate, so
        that a part of an array is not all of the slowest.
        """
        seeds = tuple(range(self.seeds))
        found = [
            (recipe, split, chosen)
            for split in self.splits
            for recipe in self.recipes
            for chosen in ([seeds] if self.shares(recipe) else [(seed,) for seed in seeds])
        ]
        return found[self.part[0] :: self.part[1]]

    def settings(self, recipe: str, split: str) -> list[str]:
        """The settings of every command of a recipe on a split; given ones replace those of the recipe."""
        place = {"data.root": self.root, "data.index": self.index(split), "data.split.rule": split, "runs": self.runs}
        values = {key: str(value) for key, value in place.items()}
        for setting in (*RECIPES[recipe].settings, *self.common, *self.own[recipe]):
            key, _, value = setting.partition("=")
            values[key] = value
        return [f"{key}={value}" for key, value in values.items()]

    def arguments(self, command: str, recipe: str, split: str, seed: int | None, *more: str) -> list[str]:
        """The arguments of one command of pipeline.py; without a seed, of one that belongs to no run."""
        named = [] if seed is None else ["--name", self.run_name(recipe, split, seed)]
        sets = self.settings(recipe, split) + ([] if seed is None else [f"seed={seed}"])
        return [
            *(command, "--config", RECIPES[recipe].preset, *named, *more),
            *(word for setting in sets for word in ("--set", setting)),
        ]


def _read(options: argparse.Namespace) -> Plan:
    """Check the options. Raises UserError naming the one that is wrong."""
    root = options.root or os.environ.get("SURGSTAGE_DATA") or ""
    if not root:
        raise UserError("--root: name the folder of Cholec80's videos: make reproduce-cholec80 ROOT=DIR")
    if not Path(root).is_dir() and not options.dry_run:
        raise UserError(f"--root: {root} is not a folder")
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds: {options.seeds} is not a number of seeds from 1 to {MOST_SEEDS}")
    recipes = _names("--recipes", options.recipes, tuple(RECIPES))
    known = tuple(CONVENTIONS.names())
    common, own = _settings([*_from_file(options.settings), *options.sets])
    return Plan(
        root=root,
        recipes=recipes,
        splits=_names("--splits", options.splits, None),
        seeds=options.seeds,
        conventions=_names("--conventions", options.conventions, known) if options.conventions else known,
        part=_part(options.part),
        per_seed=options.stage_one_per_seed,
        common=common,
        own=own,
        runs=options.runs,
        name=options.name,
        out=options.out,
        mode="dry-run" if options.dry_run else "table" if options.table else "run",
    )


def _settings(given: Sequence[str]) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """The settings (`--set`) of all recipes, and those of each."""
    own: dict[str, list[str]] = {recipe: [] for recipe in RECIPES}
    common = []
    for setting in given:
        key, equals, value = setting.partition("=")
        recipe, colon, rest = key.rpartition(":")
        if not (equals and rest) or (colon and recipe not in RECIPES):
            expected = f"KEY=VALUE, or RECIPE:KEY=VALUE with one of {', '.join(RECIPES)}"
            raise UserError(f"--set {setting}: expected {expected}")
        if rest in OWN_KEYS:
            raise UserError(f"--set {setting}: {rest} is set for each run; use --root, --splits, --seeds or --runs")
        (own[recipe] if colon else common).append(f"{rest}={value}")
    return tuple(common), own


def _from_file(path: Path | None) -> list[str]:
    values = read_yaml(path) if path else {}
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def _names(option: str, text: str, known: tuple[str, ...] | None) -> tuple[str, ...]:
    found = tuple(name.strip() for name in text.split(","))
    for name in found:
        if not name or (known is not None and name not in known):
            hint = did_you_mean(name, known or ()) if name else ""
            raise UserError(f"{option}: {name!r} is not one of {', '.join(known) if known else 'the rules'}{hint}")
    if len(set(found)) != len(found):
        raise UserError(f"{option}: {text}: a name occurs twice")
    return found


def _part(text: str) -> tuple[int, int]:
    first, slash, count = text.partition("/")
    digits = text.isascii() and slash and first.isdecimal() and count.isdecimal() and len(text) < 12
    if not digits or not int(first) < int(count):
        raise UserError(f"--part {text}: expected I/N with I from 0 to N-1, for example 0/4")
    return int(first), int(count)


# ---------------------------------------------------------------------------------------------- the work


def _work(plan: Plan, stage: Stage, stop: StopRequest) -> int:
    if plan.mode == "dry-run":
        _print_commands(plan)
        return 0
    if plan.mode == "run":
        _require_all_videos(plan, stage, stop)
        for split in dict.fromkeys(split for _, split, _ in plan.parts()):
            _run(plan.arguments("index", plan.recipes[0], split, None), stage, stop, allow_partly=True)
        for recipe, split, seeds in plan.parts():
            for arguments, run in _commands(plan, recipe, split, seeds):
                if run is None:
                    _run(arguments, stage, stop)
                else:
                    _evaluate(run, arguments, stage, stop)
        if plan.part != (0, 1):
            print("this part is done; when all are, the same command with --table instead of --part writes the table")
            return 0
    runs = Runs(
        folders={
            (recipe, split): [plan.folder(recipe, split, seed) for seed in range(plan.seeds)]
            for recipe in plan.recipes
            for split in plan.splits
        },
        titles={name: RECIPES[name].title for name in plan.recipes},
        conventions=plan.conventions,
    )
    print(write_table(plan.out, runs))
    return 0


def _require_all_videos(plan: Plan, stage: Stage, stop: StopRequest) -> None:
    """Require that no video of the data set is missing. Raises UserError that names them, before hours of training."""
    recipe = plan.recipes[0]
    plan.out.mkdir(parents=True, exist_ok=True)
    _run(plan.arguments("index", recipe, NO_SPLIT, None), stage, stop, allow_partly=True)
    index = Index.load(plan.index(NO_SPLIT))
    spec = load_dataset(load_config(RECIPES[recipe].preset, plan.settings(recipe, NO_SPLIT)).data.dataset)
    expected = [spec.id_format.format(number=number) for number in range(1, (spec.videos or 0) + 1)]
    whole = {entry.id for entry in index.videos if entry.records or (entry.phase_file and entry.tool_file)}
    if missing := [name for name in expected if name not in whole]:
        reasons = {video.id: video.reason for video in index.left_out}
        first = f" ({missing[0]}: {reasons[missing[0]]})" if missing[0] in reasons else ""
        raise UserError(
            f"{plan.root}: {spec.title or spec.name} has {len(expected)} videos, but {len(missing)} are missing here, "
            f"or lack labels of phases or tools: {listed(missing, 8)}{first}; complete the folder and start again"
        )


def _commands(plan: Plan, recipe: str, split: str, seeds: Sequence[int]) -> Iterator[tuple[list[str], Path | None]]:
    """The commands of a part, in order, with the run that a command evaluates, or None for other commands.

    They are made one by one, since the features' folder is known only when the first run has made it.
    """
    for seed in seeds:
        folder = plan.folder(recipe, split, seed)
        if RECIPES[recipe].joint:
            yield plan.arguments("train-joint", recipe, split, seed), None
            yield plan.arguments("evaluate", recipe, split, seed), folder
        elif seed == seeds[0]:
            yield plan.arguments("run", recipe, split, seed), None
        else:
            features = ("--features", _features(plan.folder(recipe, split, seeds[0])))
            yield plan.arguments("train-temporal", recipe, split, seed, *features), None
            yield plan.arguments("evaluate", recipe, split, seed, *features), folder


def _features(run: Path) -> str:
    made = run / "extract" / "result.json"
    return str(read_json_object(made)["folder"]) if made.exists() else "FOLDER"


def _evaluate(run: Path, arguments: Sequence[str], stage: Stage, stop: StopRequest) -> None:
    """Evaluate a run, unless its evaluation was made from the same weights with the same settings."""
    made = run / EVALUATED_FILE
    if made.exists() and read_json_object(made) == _identity(run, arguments):
        return
    _run(arguments, stage, stop)
    write_json(made, _identity(run, arguments))


def _identity(run: Path, arguments: Sequence[str]) -> dict[str, str]:
    """What the evaluation of a run by a command depends on, and the evaluation itself."""
    sets = [value for word, value in itertools.pairwise(arguments) if word == "--set"]
    config = load_config(arguments[arguments.index("--config") + 1], sets).model_dump(mode="json")
    files = {run / "evaluate" / "test" / METRICS_FILE, *(run / "temporal").rglob(BEST_FILE)}
    files |= {*(run / "joint").rglob(BEST_FILE), *(run / "temporal").rglob("decoding.json")}
    hashes = {str(path.relative_to(run)): sha256_file(path) for path in sorted(files) if path.exists()}
    return {"identity_sha256": sha256_json([list(arguments), config, hashes])}


def _run(arguments: Sequence[str], stage: Stage, stop: StopRequest, allow_partly: bool = False) -> None:
    """Run a command to its end. Raises Stopped if asked to stop, or _CommandFailedError if it fails."""
    stop.raise_if_set()
    print(f"$ {_shown(arguments)}", flush=True)
    code = stage(arguments, stop)
    stop.raise_if_set()
    code = 128 - code if code < 0 else code  # killed by a signal
    if code and not (allow_partly and code == PARTLY):
        more = ": videos were left out, so its figures would not be those of the data set" if code == PARTLY else ""
        print(f"error: {arguments[0]} ended with exit code {code}{more}; see the lines above", file=sys.stderr)
        raise _CommandFailedError(code)


def _shown(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "pipeline.py", *arguments])


def _print_commands(plan: Plan) -> None:
    for split in dict.fromkeys(split for _, split, _ in plan.parts()):
        print(_shown(plan.arguments("index", plan.recipes[0], split, None)))
    trainings = 0
    for recipe, split, seeds in plan.parts():
        trainings += len(seeds)
        for arguments, _ in _commands(plan, recipe, split, seeds):
            print(_shown(arguments))
    print(f"# {len(plan.parts())} parts, {trainings} runs; GPU hours are not known: no run of these was ever measured")


if __name__ == "__main__":
    sys.exit(main())
