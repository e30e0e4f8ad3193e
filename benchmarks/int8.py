"""What int8 features cost: tools and phases from int8 and from fp32 features of the five real operations.

    python benchmarks/int8.py --root DIR --json FILE [--work DIR] [--seeds N]

For each seed stage one is trained once (`configs/mini.yaml`); its features are extracted by torch in fp32 and by
OpenVINO in int8, and stage two is trained and evaluated on each. The JSON holds per precision and figure the seeds'
values, mean and standard deviation (n - 1), in percent: tool mAP and phase accuracy of the test video, and the
validation accuracy of stage two; `cosine` is that of int8 features to fp32 ones over all frames, mean and worst. With
the same `--work`, it resumes where it stopped.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from command import options, pipeline, say

PRECISIONS = {
    "fp32": ["extract.precision=fp32"],
    "int8": ["extract.engine=openvino", "extract.precision=int8"],
}


def main() -> None:
    """Parse, measure, print, write."""
    parser = options(__doc__, repeat=None)
    parser.add_argument("--root", type=Path, required=True, help="data root of the five real operations")
    parser.add_argument("--work", type=Path, default=Path("artifacts/int8"), help="index, features and runs")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    say(measure(given.root, given.work, given.seeds), given.json)


def measure(root: Path, work: Path, seeds: int) -> dict[str, Any]:
    """Figures by precision."""
    found: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
    cosines = []
    for seed in range(seeds):
        folders = {}
        for precision, chosen in PRECISIONS.items():
            figures, folders[precision] = one_run(root, work, seed, precision, chosen)
            found[precision].append(figures)
        cosines.append(similarity(folders["fp32"], folders["int8"]))
    summary: dict[str, Any] = {
        precision: {key: spread([run[key] for run in runs]) for key in runs[0]} for precision, runs in found.items()
    }
    every = np.concatenate(cosines)
    return {**summary, "cosine": {"mean": round(float(every.mean()), 5), "worst": round(float(every.min()), 5)}}


def one_run(root: Path, work: Path, seed: int, precision: str, chosen: list[str]) -> tuple[dict[str, float], Path]:
    """Figures of one seed and precision, and its feature folder."""
    name, first = f"{precision}-{seed}", f"fp32-{seed}"
    runs = work / "runs"
    settings = [
        f"data.root={root}",
        f"data.index={work / 'index.json'}",
        f"extract.store={work / 'features'}",
        f"runs={runs}",
        f"seed={seed}",
        "device=cpu",
        *chosen,
    ]
    pipeline("index", "mini", None, settings)
    if name == first:
        pipeline("train-cnn", "mini", name, settings)
    elif not (runs / name / "cnn").exists():
        shutil.copytree(runs / first / "cnn", runs / name / "cnn")
    for command in ("extract", "train-temporal", "evaluate"):
        pipeline(command, "mini", name, settings)
    metrics = read(runs / name / "evaluate" / "test" / "metrics.json")
    figures = {
        "val_accuracy": 100 * read(runs / name / "temporal" / "result.json")["val_accuracy"],
        "test_accuracy": metrics["phases"]["temporal"]["phase_mean"]["accuracy"]["mean"],
        "test_tool_map": metrics["tools"]["map_pooled"],
    }
    return figures, Path(read(runs / name / "extract" / "result.json")["folder"])


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation of the seeds' values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"seeds": values, "mean": statistics.fmean(values), "std": deviation}


def similarity(one: Path, other: Path) -> np.ndarray:
    """Cosine of each frame's two embeddings."""
    values = []
    for path in sorted(one.glob("*.h5")):
        with h5py.File(path) as left, h5py.File(other / path.name) as right:
            first, second = (file["features"][:].astype(np.float64) for file in (left, right))
        values.append((first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1))
    return np.concatenate(values)


if __name__ == "__main__":
    main()
