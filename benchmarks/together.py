"""Two trainings at the same time on one machine compared with one alone, with idle threads that wait and that spin.

    python benchmarks/together.py --json FILE [--repeat N]

Each training is a command with its default number of threads. In a round, one training runs alone, and then two of the
same run at the same time, with the project's setting `GOMP_SPINCOUNT=1000`. The first round also does both with
libgomp's default (`GOMP_SPINCOUNT=300000`), with which two trainings take minutes. The figures are medians over rounds.
The time of a training is that of its epochs after the first; of two trainings, the slower one counts.

- `train_cnn`: ResNet50 on frames of 224x224, eight per step, fp32.
- `train_temporal`: an LSTM with 512 units on random features of whole videos, eight per step, fp32.
- `alone_s`, `together_s`, `ratio`: given for each of the two; names that begin with `spinning_` are those with
  libgomp's default.
- `alone_ratio_to_spinning`: the effect of the setting on a single training.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from command import CORES, PIPELINE, options, say
from start_up import output, write_feature_set

# libgomp's default
SPINNING = {"GOMP_SPINCOUNT": "300000"}
VIDEOS, FRAMES = 10, 2158


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    given = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainings = {"train_cnn": cnn_words(folder), "train_temporal": temporal_words(folder)}
        figures = {key: measure(folder, words, given.repeat) for key, words in trainings.items()}
    say({**figures, "cores": CORES, "rounds": given.repeat}, given.json)


def cnn_words(folder: Path) -> list[str]:
    """The words of a `train-cnn` command on simulated videos, which are indexed and whose frames are in the cache."""
    simulate = ["simulate", str(folder / "videos"), "--videos", "3", "--fps", "2", "--speed-up", "60"]
    output([str(PIPELINE), *simulate, "--width", "112", "--height", "112"])
    settings = [
        f"data.root={folder / 'videos'}",
        f"data.index={folder / 'index.json'}",
        "data.dataset=simulated",
        "data.split.rule=2/1/0",
        f"cache.dir={folder / 'frames'}",
        "cnn.weights=random",
        "cnn.precision=fp32",
        "cnn.batch_frames=8",
        "cnn.frames_per_epoch=32",
        "cnn.epochs=2",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    output([str(PIPELINE), "index", *words])
    train(folder, [["train-cnn", *words]], {}, "cnn")  # fills the cache
    return ["train-cnn", *words]


def temporal_words(folder: Path) -> list[str]:
    """The words of a `train-temporal` command on random features."""
    phases = [np.repeat(np.arange(7, dtype=np.int8), FRAMES // 7 + 1)[:FRAMES] for _ in range(VIDEOS)]
    write_feature_set(folder / "features", phases)
    settings = ["mode=full", "batch=8"]
    settings = [*(f"sequence.{one}" for one in settings), "epochs=3", "baseline=false", "precision=fp32"]
    words = [word for setting in settings for word in ("--set", f"temporal.{setting}")]
    return ["train-temporal", "--features", str(folder / "features"), *words]


def measure(folder: Path, words: Sequence[str], repeat: int) -> dict[str, float]:
    """Measure all figures of one kind of training."""
    stage = "cnn" if words[0] == "train-cnn" else "temporal"
    found: dict[str, list[float]] = {}
    for number in range(repeat):
        for prefix, environment in (("", {}), ("spinning_", SPINNING))[: 1 if number else 2]:
            found.setdefault(f"{prefix}alone_s", []).append(train(folder, [words], environment, stage))
            found.setdefault(f"{prefix}together_s", []).append(train(folder, [words, words], environment, stage))
    middle = {key: statistics.median(values) for key, values in found.items()}
    for prefix in ("", "spinning_"):
        middle[f"{prefix}ratio"] = middle[f"{prefix}together_s"] / middle[f"{prefix}alone_s"]
    middle["alone_ratio_to_spinning"] = middle["alone_s"] / middle["spinning_alone_s"]
    return {key: round(value, 3) for key, value in middle.items()}


def train(folder: Path, commands: Sequence[Sequence[str]], environment: dict[str, str], stage: str) -> float:
    """The time of the slowest of several trainings that are started together, in seconds."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        running = []
        for number, words in enumerate(commands):
            where = ["--name", f"run{number}", "--set", f"runs={runs}", "--set", "device=cpu"]
            command = [sys.executable, str(PIPELINE), *words, *where]
            log = Path(runs, f"{number}.log")
            with log.open("wb") as out:
                running.append(subprocess.Popen(command, env={**inherited, **environment}, stdout=out, stderr=out))
        try:
            for number, process in enumerate(running):
                if process.wait():
                    said = Path(runs, f"{number}.log").read_text(errors="replace")
                    sys.exit(f"{commands[number][0]}: failed\n{said}")
        finally:
            for process in running:
                process.terminate()
        return max(epoch_seconds(Path(runs, f"run{number}", stage)) for number in range(len(commands)))


def epoch_seconds(stage: Path) -> float:
    """The time of all epochs except the first, in seconds."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float(sum([row["seconds"] for row in rows if "seconds" in row][1:]))


if __name__ == "__main__":
    main()
