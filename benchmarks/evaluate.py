"""Processor time of the command `evaluate --predictions` for forty videos of 2,455 s at 1 fps, under all conventions.

The whole command is measured: starting the interpreter, reading eighty text files, tables, bootstrap intervals and
JSON. Labels are synthetic: every video has the seven phases in order, and predictions have 300 random errors per video.

    python benchmarks/evaluate.py --json FILE

The figures are medians, in seconds: `process_s` is the user and system time of the command, `wall_s` its time from
start to exit.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from command import PROJECT, options, say

VIDEOS, SECONDS, SLIPS = 40, 2455, 300


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    given = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), given.repeat)
    say(figures, given.json)


def measure(folder: Path, repeat: int) -> dict[str, object]:
    """The medians over several processes; the first one fills the disk cache and does not count."""
    write_labels(folder)
    command = [
        sys.executable,
        str(PROJECT / "pipeline.py"),
        "evaluate",
        "--fps",
        "1",
        "--json",
        str(folder / "out.json"),
    ]
    command += ["--predictions", str(folder / "predicted"), "--ground-truth", str(folder / "truth")]
    rounds = [timed(command) for _ in range(repeat + 1)][1:]
    conventions = list(json.loads((folder / "out.json").read_text(encoding="utf-8")))
    process_s, wall_s = (round(statistics.median(column), 3) for column in zip(*rounds, strict=True))
    return {"process_s": process_s, "wall_s": wall_s, "videos": VIDEOS, "seconds": SECONDS, "conventions": conventions}


def write_labels(folder: Path) -> None:
    """Write truth and predictions as `Frame<TAB>Phase` files with phase names, in the format of Cholec80."""
    sys.path.insert(0, str(PROJECT))
    from configs.load import load_dataset

    names = load_dataset("cholec80").phases
    rng = np.random.default_rng(0)
    for number in range(1, VIDEOS + 1):
        truth = np.sort(rng.integers(0, len(names), SECONDS))
        predicted = truth.copy()
        predicted[rng.integers(0, SECONDS, SLIPS)] = rng.integers(0, len(names), SLIPS)
        for kind, phases in (("truth", truth), ("predicted", predicted)):
            path = folder / kind / f"video{number:02d}-phase.txt"
            path.parent.mkdir(exist_ok=True)
            rows = (f"{25 * k}\t{names[phase]}\n" for k, phase in enumerate(phases))
            path.write_text("Frame\tPhase\n" + "".join(rows), encoding="utf-8")


def timed(command: list[str]) -> tuple[float, float]:
    """The processor time and wall time of a command, in seconds."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, started = used(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return used() - before, time.perf_counter() - started


if __name__ == "__main__":
    main()
