"""Time and memory of linear probes of tools and phases on as many frames as Cholec80's training half has.

    python benchmarks/probe.py [--frames 86304] [--json FILE]

The features are simulated: non-negative mixtures of slow random processes with noise, as float16, in 40 training and 8
validation videos. `seconds` is wall time, `cpu_seconds` the processor time of all threads, and `peak_gb` the most
memory that the process has held until then.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from command import PROJECT, options, say

sys.path.insert(0, str(PROJECT))

from features.store import VideoFeatures
from stage2_temporal.probe import Probe, fit_phases, fit_tools

WIDTH, PROCESSES, CLASSES, TRAIN, VAL = 2048, 256, 7, 40, 8


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__, repeat=None)
    parser.add_argument("--frames", type=int, default=86_304, help="training frames")
    given = parser.parse_args()
    random = np.random.default_rng(0)
    mixing = random.normal(size=(PROCESSES, WIDTH)) * np.arange(1, PROCESSES + 1)[:, None] ** -0.5
    weights = 0.25 * random.normal(size=(PROCESSES, CLASSES))
    videos = {
        f"video{number:02d}": a_video(random, mixing, weights, given.frames // TRAIN) for number in range(TRAIN + VAL)
    }
    train, val = dict(list(videos.items())[:TRAIN]), dict(list(videos.items())[TRAIN:])
    names = [f"class{number}" for number in range(CLASSES)]
    figures: dict[str, Any] = {"frames": given.frames, "width": WIDTH, "start_gb": peak_gb()}
    figures["tools"] = measured(lambda: fit_tools(train, val, names))
    figures["phases"] = measured(lambda: fit_phases(train, val, names))
    say(figures, given.json)


def a_video(random: np.random.Generator, mixing: Any, weights: Any, frames: int) -> VideoFeatures:
    """A simulated video whose tools and phases depend on the slow processes, with noise."""
    steps = 0.243 * random.normal(size=(frames, PROCESSES))
    slow, state = np.empty_like(steps), random.normal(size=PROCESSES)
    for number, step in enumerate(steps):
        state = 0.97 * state + step
        slow[number] = state
    features = np.maximum(0.3 * slow @ mixing + 0.1 * random.normal(size=(frames, WIDTH)), 0).astype(np.float16)
    scores = slow @ weights + 1.5 * random.normal(size=(frames, CLASSES)) - np.linspace(0, 4, CLASSES)
    phase = (1.5 * slow[:, :CLASSES] + random.normal(size=(frames, CLASSES))).argmax(axis=1)
    no_logits = np.full(scores.shape, np.nan, np.float32)
    times = np.arange(frames)
    return VideoFeatures(
        times, times.astype(float), phase.astype(np.int8), (scores > 0).astype(np.int8), features, no_logits
    )


def measured(fit: Callable[[], Probe]) -> dict[str, float | None]:
    """Wall time, processor time and memory of a fit, and what it chose."""
    started, computed = time.monotonic(), time.process_time()
    probe = fit()
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - computed
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_gb": peak_gb(),
        "c": probe.c,
        "score": probe.score,
    }


def peak_gb() -> float:
    """The most memory that this process has held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


if __name__ == "__main__":
    main()
