"""How much accuracy int8 features cost: results for tools and phases with int8 and with fp32 features.

    python benchmarks/int8.py --root DIR --json FILE [--work DIR] [--seeds N]

The data are the five real operations. For each seed, stage one is trained once (`configs/mini.yaml`). Its features are
extracted by torch in fp32 and by OpenVINO in int8, and stage two is trained and evaluated on either. For each precision
the JSON holds tool mAP and phase accuracy of the test video, and the validation accuracy of stage two, in percent: the
values of all seeds, their mean and standard deviation (n - 1). `cosine` is the cosine similarity between int8 and fp32
features over all frames, mean and worst. With the same `--work`, the program resumes where it stopped.
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
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__, repeat=None)
    parser.add_argument("--root", type=Path, required=True, help="data root of the five real operations")
    parser.add_argument("--work", type=Path, default=Path("artifacts/int8"), help="index, features and runs")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    say(measure(given.root, given.work, given.seeds), given.json)


def measure(root: Path, work: Path, seeds: int) -> dict[str, Any]:
    """The figures for each precision."""
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
    """The figures of one seed and precision, and the feature folder."""
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
    """The values of all seeds, and their mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"seeds": values, "mean": statistics.fmean(values), "std": deviation}


def similarity(one: Path, other: Path) -> np.ndarray:
    """The cosine similarity of the two embeddings of each frame."""
    values = []
    for path in sorted(one.glob("*.h5")):
        with h5py.File(path) as left, h5py.File(other / path.name) as right:
            first, second = (file["features"][:].astype(np.float64) for file in (left, right))
        values.append((first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1))
    return np.concatenate(values)


if __name__ == "__main__":
    main()
