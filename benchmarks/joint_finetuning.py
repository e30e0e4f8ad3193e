"""The gain of end-to-end fine-tuning after two stages, with a control: the table in `docs/results.md`.

For each seed, four rows are measured. `two stages`: stage one and stage two. `joint`: the joint net, which starts from
these and is trained in its three steps. `control`: the same with alpha = 0 in the third step; it shares the first two
steps and has the same number of epochs. `again`: stage two, trained again on features of the fine-tuned backbone.
Everything is evaluated over whole videos with carried state, on the validation videos and on the test videos. When
started again, the program resumes where it stopped.

    python benchmarks/joint_finetuning.py --data demo --json FILE               (SIMULATED operations)
    python benchmarks/joint_finetuning.py --data mini --root DIR --json FILE
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import pipeline

ROWS = ("two stages", "joint", "control", "again")
MEASURES = ("accuracy", "f1", "tool_map", "mapped_map", "gap_nats")
SPLITS = ("val", "test")


@dataclass(frozen=True)
class Trial:
    """The runs of one seed on one data set."""

    data: str
    seed: int
    root: Path
    runs: Path

    @property
    def settings(self) -> list[str]:
        """The settings of every command.

        Each seed has its own simulated operations; the real operations are the same for all seeds.
        """
        index = f"artifacts/{self.data}/index-{self.seed if self.data == 'demo' else 'all'}.json"
        return [f"seed={self.seed}", f"data.root={self.root}", f"data.index={index}", f"runs={self.runs}"]

    def name(self, row: str) -> str:
        """The name of the run from which a row of the table is taken."""
        return f"{self.data}-seed{self.seed}-{row.replace(' ', '-')}"

    def folder(self, row: str) -> Path:
        """The folder of the run from which a row of the table is taken."""
        return self.runs / self.name(row)


def main() -> None:
    options = _options()
    started = time.monotonic()
    rows = []
    for seed in range(options.seeds):
        root = Path(f"artifacts/demo/videos-{seed}") if options.data == "demo" else options.root
        rows += list(_trial(Trial(options.data, seed, root, options.runs)))
    report = {
        "data": options.data,
        "rows": rows,
        "table": _table(rows),
        "seconds": round(time.monotonic() - started, 1),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _print(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["demo", "mini"], required=True)
    parser.add_argument("--root", type=Path, help="data root of the five real operations (--data mini)")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.data == "mini" and options.root is None:
        parser.error("--data mini needs --root")
    return options


def _trial(trial: Trial) -> Iterator[dict[str, Any]]:
    stages, joint = f"configs/{trial.data}.yaml", f"configs/{trial.data}_joint.yaml"
    start = ("--from-cnn", trial.name("two stages"), "--from-temporal", trial.name("two stages"))
    pipeline("run", stages, trial.name("two stages"), trial.settings)
    pipeline("train-joint", joint, trial.name("joint"), trial.settings, start)
    _share_steps(trial)
    pipeline("train-joint", joint, trial.name("control"), [*trial.settings, "joint.loss.alpha=0"], start)
    again = ("--from-joint", trial.name("joint"))
    pipeline("extract", stages, trial.name("again"), trial.settings, again)
    pipeline("train-temporal", stages, trial.name("again"), trial.settings)
    for row in ROWS:
        config, more = (joint, ("--model", "joint")) if row in ("joint", "control") else (stages, ())
        for split in SPLITS:
            out = trial.folder(row) / "evaluate" / f"{split}-carried" / "metrics.json"
            if not out.exists():
                way = ("--split", split, "--inference", "carried", *more)
                pipeline("evaluate", config, trial.name(row), trial.settings, way)
            yield {"seed": trial.seed, "row": row, "split": split, **_measures(json.loads(out.read_text()))}


def _share_steps(trial: Trial) -> None:
    """Copy the first two steps of `joint`, as far as they are complete, to `control`, which shares them."""
    for step in ("multitask", "mapping"):
        source, target = (trial.folder(row) / "joint" / step for row in ("joint", "control"))
        if not (target / "result.json").exists():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)


def _measures(metrics: dict[str, Any]) -> dict[str, float | None]:
    strict = metrics["phases"]["temporal"]["phase_mean"]
    return {
        "accuracy": strict["accuracy"]["mean"],
        "f1": strict["f1"]["mean"],
        "tool_map": (metrics["tools"] or {}).get("map_pooled"),
        "mapped_map": (metrics.get("mapped_tools") or {}).get("map_pooled"),
        "gap_nats": metrics.get("gap_nats"),
    }


def _table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation (n - 1) over seeds, for each row, split and measure.

    All are in percent, except the gap, which is in nats.
    """
    table = []
    for split in SPLITS:
        for name in ROWS:
            mine = [row for row in rows if (row["row"], row["split"]) == (name, split)]
            table.append({"row": name, "split": split} | {key: _spread([row[key] for row in mine]) for key in MEASURES})
    return table


def _spread(values: list[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "std": std, "seeds": known}


def _print(report: dict[str, Any]) -> None:
    def cell(value: dict[str, Any] | None, digits: int) -> str:
        if value is None:
            return "-"
        seeds = ", ".join(f"{one:.{digits}f}" for one in value["seeds"])
        std = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
        return f"{value['mean']:.{digits}f}{std} ({seeds})"

    print(f"| videos | net | {' | '.join(MEASURES)} |\n|---|---|{'---|' * len(MEASURES)}")
    for row in report["table"]:
        cells = (cell(row[key], 4 if key == "gap_nats" else 1) for key in MEASURES)
        print(f"| {row['split']} | {row['row']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
