"""Training speed of stage two, compared with plain nn.LSTM, the matrix product, clips and end-to-end training.

    python benchmarks/temporal.py --json FILE [--repeat N]

Speeds are labelled frames per second of training, on all cores of the CPU. They are medians of `--repeat` rounds. Each
round runs all programs, each in its own process, so that other load affects all of them.

- `frames_per_s`, `frames_per_s_bf16`: the command `train-temporal` with `temporal.projection` fp32 and bf16, for an
  LSTM with 512 units on whole videos, eight per step. The features are random fp16 values for forty videos with
  Cholec80's lengths (86,304 x 2048; `lengths` says whether these are the real lengths). The rate is the one in the
  run's result: from the first batch of an epoch to its last update, without reading, validation and checkpoints, the
  median of three epochs. (The other programs do not count their first steps.)
- `ratio_to_nn_lstm`, `ratio_to_nn_lstm_bf16`: divided by the rate of nn.LSTM in fp32 on a batch of 8 x 1000 frames
  without padding, from fp32 features (`nn_lstm_frames_per_s`).
- `ratio_to_bound`: the fp32 rate divided by the rate that the speed of an fp32 matrix product (`product_gflops`) would
  allow with 23.1 MFLOP per frame.
- `ratio_to_clips`: the fp32 rate divided by that of clips of 10 frames with stride 1, in which each clip counts as one
  labelled frame. The latter is measured with `train-temporal` on fewer videos (`clips_frames_per_s`) and with nn.LSTM
  (`nn_lstm_clips_frames_per_s`), and the faster one is taken.
- `ratio_to_end_to_end`: the fp32 rate divided by that of ResNet50 and LSTM in one net on images of 224x224, forward and
  backward pass in fp32 (`end_to_end_frames_per_s`). Every frame of a clip counts; with stride 1 it would be a tenth.
- `peak_rss_mb`, `peak_rss_mb_bf16`: the peak memory (VmHWM) of the process that trained, in MB of 10^6 bytes, from
  start to exit, including the per-frame baseline and checkpoints.

On a CPU without native bf16 the figures for bf16 are null. The programs to compare with (`temporal_reference.py`)
import nothing from the project.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from command import CORES, say
from start_up import lengths_file, output, phases_of, training_options, write_feature_set

REFERENCE = Path(__file__).resolve().parent / "temporal_reference.py"
MFLOP_A_FRAME = 23.1  # 2 x 4 x 512 x (2 x 2048 + 3 x 512) + 6 x 512 x 7; stored features need no gradient
CLIP_VIDEOS = 2
# Runs the real command line and prints its peak memory at the end.
TRAIN = """
import re, runpy, sys
from pathlib import Path
sys.argv = ["pipeline.py", *sys.argv[1:]]
sys.path.insert(0, "")
try:
    runpy.run_path("pipeline.py", run_name="__main__")
finally:
    print("\\n" + re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
SIDES = {
    "nn_lstm_frames_per_s": "lstm",
    "product_gflops": "product",
    "nn_lstm_clips_frames_per_s": "clips",
    "end_to_end_frames_per_s": "end-to-end",
}


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    given = training_options(__doc__).parse_args()
    phases = phases_of(given.lengths)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), phases, given.repeat, given.set)
    figures["lengths"] = "real" if lengths_file(given.lengths).is_file() else "made up: 40 of 2,158"
    say(figures, given.json)


def measure(folder: Path, phases: Sequence[np.ndarray], repeat: int, settings: Sequence[str]) -> dict[str, object]:
    """Measure all figures."""
    whole, few = folder / "whole", folder / "few"
    write_feature_set(whole, phases, train_share=1.0)
    write_feature_set(few, phases[:CLIP_VIDEOS], train_share=1.0)
    full = ["temporal.sequence.mode=full", "temporal.sequence.batch=8", *settings]
    clips = ["mode=clips", "frames=10", "stride=1", "batch=800"]
    clips = [*(f"temporal.sequence.{setting}" for setting in clips), "temporal.baseline=false", *settings]
    rounds = []
    for number in range(repeat):
        runs = folder / f"runs{number}"
        found: dict[str, float | None] = {"frames_per_s_bf16": None, "peak_rss_mb_bf16": None}
        found["frames_per_s"], found["peak_rss_mb"] = train(runs, "fp32", whole, full)
        if has_bf16():
            lower = [*full, "temporal.projection=bf16"]
            found["frames_per_s_bf16"], found["peak_rss_mb_bf16"] = train(runs, "bf16", whole, lower)
        found["clips_frames_per_s"], _ = train(runs, "clips", few, clips)
        rounds.append(found | {key: float(output([str(REFERENCE), side])) for key, side in SIDES.items()})
    middle = {key: median([found[key] for found in rounds]) for key in rounds[0]}
    clip_rate = max(middle["clips_frames_per_s"] or 0.0, middle["nn_lstm_clips_frames_per_s"] or 0.0)
    bound = 1000 * (middle["product_gflops"] or 0.0) / MFLOP_A_FRAME
    ratios = {
        "ratio_to_nn_lstm": ratio(middle["frames_per_s"], middle["nn_lstm_frames_per_s"]),
        "ratio_to_nn_lstm_bf16": ratio(middle["frames_per_s_bf16"], middle["nn_lstm_frames_per_s"]),
        "ratio_to_bound": ratio(middle["frames_per_s"], bound),
        "ratio_to_clips": ratio(middle["frames_per_s"], clip_rate),
        "ratio_to_end_to_end": ratio(middle["frames_per_s"], middle["end_to_end_frames_per_s"]),
    }
    figures = {key: None if value is None else round(value, 3) for key, value in {**ratios, **middle}.items()}
    return {**figures, "cores": CORES, "frames": sum(map(len, phases)), "videos": len(phases), "rounds": rounds}


def train(runs: Path, name: str, features: Path, settings: Sequence[str]) -> tuple[float, float]:
    """Labelled frames per second of `train-temporal`, and the peak memory of its process in MB."""
    every = [f"runs={runs}", "device=cpu", "temporal.epochs=3", *settings]
    words = ["train-temporal", "--name", name, "--features", str(features)]
    said = output(["-c", TRAIN, *words, *(word for setting in every for word in ("--set", setting))])
    result = json.loads((runs / name / "temporal" / "result.json").read_text(encoding="utf-8"))
    return float(result["frames_per_s"]), int(said.split()[-1]) * 1024 / 1e6  # the kernel's kB are 1024 bytes


def has_bf16() -> bool:
    """Whether this CPU supports `temporal.projection=bf16`."""
    script = "import sys; sys.path.insert(0, ''); import engine.device; print(engine.device.cpu_has_bf16())"
    return output(["-c", script]).strip() == "True"


def median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


if __name__ == "__main__":
    main()
