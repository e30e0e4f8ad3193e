"""Leave-one-video-out cross-validation on a small data set: the tables in `docs/results.md`.

Everything runs through the command line. In each fold one video is tested, another chooses the best epoch, and the rest
are for training. Stage one is fine-tuned once per fold (seed 0). Stage two and the per-frame head are trained with
several seeds per fold, on the fine-tuned features and on those of the initial backbone. The standard deviation over
folds (of each fold's mean over seeds) and the one over seeds (of each seed's mean over folds) are given separately.
When started again, the program resumes where it stopped, since its runs are ordinary run folders.

    python benchmarks/leave_one_out.py --root DIR --json FILE [--config FILE] [--folds N] [--seeds N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command import pipeline

KEYS = (
    "phase_accuracy_temporal",
    "phase_accuracy_frame",
    "phase_accuracy_majority",
    "phase_f1_temporal",
    "phase_f1_frame",
)


def main() -> None:
    options = _options()
    started = time.monotonic()
    rows = []
    for fold in range(options.folds):
        for kind in ("finetuned", "initial"):
            features = _first_seed(options, fold, kind)
            for seed in range(options.seeds):
                if seed:
                    _other_seed(options, fold, kind, seed, features)
                summary = json.loads((options.runs / _name(options, fold, kind, seed) / "summary.json").read_text())
                rows.append({"fold": fold, "features": kind, "seed": seed, **summary})
    report = {
        "rows": rows,
        "tables": {kind: _table(rows, kind) for kind in ("finetuned", "initial")},
        "seconds": round(time.monotonic() - started, 1),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _print(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data root")
    parser.add_argument("--config", default="configs/mini_folds.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--name", default="folds", help="prefix of the runs' names")
    parser.add_argument("--folds", type=int, default=5, help="number of folds: as many as there are videos")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("artifacts/bench/leave_one_out.json"))
    return parser.parse_args()


def _name(options: argparse.Namespace, fold: int, kind: str, seed: int) -> str:
    return f"{options.name}-{fold}-{kind}" + (f"-seed{seed}" if seed else "")


def _first_seed(options: argparse.Namespace, fold: int, kind: str) -> Path:
    """Run the whole pipeline with seed 0 and return its feature folder.

    With the initial backbone, stage one is not trained.
    """
    name = _name(options, fold, kind, 0)
    _pipeline("run", options, fold, name, f"extract.encoder={kind}")
    pointer: dict[str, Any] = json.loads((options.runs / name / "extract" / "result.json").read_text())
    return Path(pointer["folder"])


def _other_seed(options: argparse.Namespace, fold: int, kind: str, seed: int, features: Path) -> None:
    for command in ("train-temporal", "evaluate"):
        name = _name(options, fold, kind, seed)
        _pipeline(command, options, fold, name, f"seed={seed}", more=("--features", str(features)))


def _pipeline(
    command: str, options: argparse.Namespace, fold: int, name: str, *sets: str, more: Sequence[str] = ()
) -> None:
    settings = (
        f"data.root={options.root}",
        f"runs={options.runs}",
        "data.split.rule=leave_one_out",
        f"data.split.fold={fold}",
        f"data.index=artifacts/{options.name}/index-{fold}.json",
        *sets,
    )
    pipeline(command, options.config, name, settings, more)


def _table(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """For each measure the mean and the standard deviations (n - 1) over folds and over seeds, in percent.

    The first is that of the folds' means over seeds, the second that of the seeds' means over folds.
    """
    mine = [row for row in rows if row["features"] == kind]
    keys = (*KEYS, "tool_map") if kind == "finetuned" else KEYS
    return {key: _spread(mine, key, per_seed=key != "tool_map") for key in keys}


def _spread(rows: Sequence[dict[str, Any]], key: str, per_seed: bool) -> dict[str, Any]:
    def means(by: str) -> list[float]:
        groups = sorted({row[by] for row in rows})
        return [100 * statistics.fmean(row[key] for row in rows if row[by] == group) for group in groups]

    folds, seeds = means("fold"), means("seed")
    return {
        "mean": statistics.fmean(folds),
        "folds": folds,
        "std_over_folds": statistics.stdev(folds) if len(folds) > 1 else None,
        "std_over_seeds": statistics.stdev(seeds) if per_seed and len(seeds) > 1 else None,
    }


def _print(report: dict[str, Any]) -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    print("| features | measure | mean | std over folds | std over seeds | folds |\n|---|---|---|---|---|---|")
    for kind, table in report["tables"].items():
        for key, row in table.items():
            folds = ", ".join(map(number, row["folds"]))
            spread = f"{number(row['std_over_folds'])} | {number(row['std_over_seeds'])}"
            print(f"| {kind} | {key} | {number(row['mean'])} | {spread} | {folds} |")


if __name__ == "__main__":
    main()
