"""Whether `temporal.projection: bf16` costs accuracy: trainings with fp32 and with bf16 on the five real operations.

    python benchmarks/projection.py --root DIR --json FILE [--work DIR]

Features of the initial backbone of `configs/mini.yaml` are extracted once. Then `train-temporal` runs with every
combination of seed and projection. `fp32` and `bf16` in the JSON hold the validation accuracies of the seeds, with mean
and standard deviation (n - 1). With the same `--work`, the program resumes where it stopped.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from command import options, pipeline, say


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__, repeat=None)
    parser.add_argument("--root", type=Path, required=True, help="data root of the five real operations")
    parser.add_argument("--work", type=Path, default=Path("artifacts/projection"), help="index, features and runs")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    figures = measure(given.root, given.work, given.seeds)
    say(figures, given.json)


def measure(root: Path, work: Path, seeds: int) -> dict[str, Any]:
    """The validation accuracies for each projection."""
    settings = [
        "extract.encoder=initial",
        f"data.root={root}",
        f"data.index={work / 'index.json'}",
        f"extract.store={work / 'features'}",
        f"runs={work / 'runs'}",
        "device=cpu",
    ]
    pipeline("index", "mini", None, settings)
    pipeline("extract", "mini", "features", settings)
    (features,) = (work / "features").iterdir()
    figures: dict[str, Any] = {}
    for projection in ("fp32", "bf16"):
        found = []
        for seed in range(seeds):
            own = [*settings, f"seed={seed}", f"temporal.projection={projection}", "temporal.baseline=false"]
            name = f"{projection}-{seed}"
            pipeline("train-temporal", "mini", name, own, ("--features", str(features)))
            result = json.loads((work / "runs" / name / "temporal" / "result.json").read_text(encoding="utf-8"))
            found.append(result["val_accuracy"])
        spread = statistics.stdev(found) if len(found) > 1 else None
        figures[projection] = {"seeds": found, "mean": statistics.fmean(found), "std": spread}
    return figures


if __name__ == "__main__":
    main()
