"""Training speed of stage two, compared with plain nn.LSTM, the matrix product, clips and end-to-end training.

    python benchmarks/temporal.py --json FILE [--repeat N]

Figures are in labelled frames per second of training, on all cores of the CPU, medians of `--repeat` rounds; all
programs run in each round, each in its own process, so that other load affects all of them.

- `frames_per_s`, `frames_per_s_bf16`: the command `train-temporal` on forty videos of Cholec80's lengths (`lengths`
  says whether they are the real ones) with random features, 86,304 x 2048 fp16 where they are; LSTM of 512, whole
  videos, eight per step, `temporal.projection` fp32 and bf16. It is the rate in the run's result: from the first batch
  of an epoch to its last update, without reading, validation and checkpoints, the median of three epochs (the other
  programs do not count their first steps).
- `ratio_to_nn_lstm`, `ratio_to_nn_lstm_bf16`: to nn.LSTM in fp32 on a batch of 8 x 1000 frames, nothing padded, from
  fp32 features (`nn_lstm_frames_per_s`).
- `ratio_to_bound`: of the fp32 figure to the fp32 matrix product (`product_gflops`) over 23.1 MFLOP per frame.
- `ratio_to_clips`: of the fp32 figure to clips of 10 with stride 1, where each clip adds one labelled frame. The faster
  of two ways counts: `train-temporal` on fewer videos (`clips_frames_per_s`), and nn.LSTM
  (`nn_lstm_clips_frames_per_s`).
- `ratio_to_end_to_end`: of the fp32 figure to ResNet50 and LSTM in one net from 224x224 images, forward and backward in
  fp32, every frame of a clip counted (`end_to_end_frames_per_s`); at stride 1 it would be a tenth.
- `peak_rss_mb`, `peak_rss_mb_bf16`: the peak memory (VmHWM) of the process that trained, in MB of 10^6 bytes, start to
  exit, with the per-frame baseline and checkpoints.

Without native bf16 the figures of bf16 are null. The programs to compare with (`temporal_reference.py`) import nothing
from the project.
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
MFLOP_A_FRAME = 23.1  # 2 x 4 x 512 x (2 x 2048 + 3 x 512) + 6 x 512 x 7: no gradient goes to stored features
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
    """Parse, measure, print, write."""
    given = training_options(__doc__).parse_args()
    phases = phases_of(given.lengths)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), phases, given.repeat, given.set)
    figures["lengths"] = "real" if lengths_file(given.lengths).is_file() else "made up: 40 of 2,158"
    say(figures, given.json)


def measure(folder: Path, phases: Sequence[np.ndarray], repeat: int, settings: Sequence[str]) -> dict[str, object]:
    """All figures."""
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
    """Whether `temporal.projection=bf16` is allowed here."""
    script = "import sys; sys.path.insert(0, ''); import engine.device; print(engine.device.cpu_has_bf16())"
    return output(["-c", script]).strip() == "True"


def median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


if __name__ == "__main__":
    main()
