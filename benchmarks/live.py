"""Latency, throughput and memory of recognition frame by frame.

    python benchmarks/live.py --json FILE [--minutes 60] [--paced-minutes 60] [--memory-hours 10]

Frames are pushed into a `PhaseRecogniser` as a camera would give them: (480, 854, 3) pixels, decoded already. ResNet50
at 224 x 224 pixels and an LSTM with 512 units have random weights, with the precision that `extract` chooses on this
machine, and decoding is off. All figures are of frames that are sampled and recognised.

- `fast`: as many frames as possible for `--minutes`: milliseconds per frame from `push` to the result, in parts, and
  frames per second.
- `paced`: one frame per `1 / --rate` seconds for `--paced-minutes`, as in an operating room, where caches are cold.
- `memory`: a small encoder (ShuffleNet, 64 pixels) and Viterbi with a lag of 5 s, over `--memory-hours` of a video at
  25 frames per second that is sampled once per second, as fast as possible: the resident memory (MB) after the first
  tenth, at the end, and the growth between them.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from command import CORES, PROJECT, options, say

sys.path.insert(0, str(PROJECT))

import numpy as np
import torch
from numpy.typing import NDArray

from configs.head_settings import LstmHead
from configs.load import load_dataset
from configs.schema import Config, DecodingConfig
from engine.device import start_stage
from live.latency import Latencies
from live.nets import Nets, encode_as_stored
from live.recogniser import PARTS, PhaseRecogniser
from stage1_cnn.encoders.encoder import load_encoder
from stage2_temporal.decoding.chosen import ChosenDecoding
from stage2_temporal.decoding.fitted import FittedDecoding, TrackDecoding
from stage2_temporal.decoding.graph import learn_graph
from stage2_temporal.heads.base import build_head
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.model import PhaseModel

SPEC = load_dataset("cholec80")
PICTURES = 16
VIDEO_FPS = 25


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__, repeat=None)
    parser.add_argument("--minutes", type=float, default=1.0, help="of `fast` (default: 1)")
    parser.add_argument("--paced-minutes", type=float, default=1.0, help="of `paced` (default: 1)")
    parser.add_argument("--rate", type=float, default=1.0, help="frames per second of `paced` (default: 1)")
    parser.add_argument("--memory-hours", type=float, default=1.0, help="of video in `memory` (default: 1)")
    parser.add_argument("--backbone", default="resnet50", help="of `fast` and `paced` (default: resnet50)")
    parser.add_argument("--size", type=int, default=224, help="its input in pixels (default: 224)")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    if given.minutes > 0 or given.paced_minutes > 0:
        nets = random_nets(given.backbone, given.size, LstmHead(hidden=512))
        figures = {"precision": nets.weights["precision"]}
        if given.minutes > 0:
            figures["fast"] = latency(nets, 60 * given.minutes, None)
        if given.paced_minutes > 0:
            figures["paced"] = latency(nets, 60 * given.paced_minutes, given.rate)
    if given.memory_hours > 0:
        figures["memory"] = memory(given.memory_hours)
    say({**figures, "cores": CORES, "threads": torch.get_num_threads()}, given.json)


def random_nets(backbone: str, size_px: int, head: LstmHead, decoding: ChosenDecoding | None = None) -> Nets:
    """Nets of two stages with random weights, which recognise Cholec80's phases once per second."""
    config = Config.model_validate(
        {
            "preprocess": {"resize_px": size_px * 8 // 7, "crop_px": size_px},
            "cnn": {"backbone": backbone, "weights": "random"},
            "extract": {"encoder": "initial"},
            "data": {"fps": 1.0},
        }
    )
    encoder = load_encoder(config, None, SPEC.tools)
    start_stage("live", config, encoder.device, encoder.spec.precision)
    width = encoder.spec.embedding_dim
    model = PhaseModel(Standardise.identity(width), build_head(head, width, len(SPEC.phases))).eval()
    encode = encode_as_stored(encoder, False, None, "benchmark")
    weights = {"precision": encoder.spec.precision}
    return Nets(encode, model, "carried", 1, config, SPEC, weights, decoding=decoding, tools=False)


def pictures() -> list[NDArray[np.uint8]]:
    """Random frames (480, 854, 3), smooth as real ones are."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (PICTURES, 15, 27, 3), dtype=np.uint8)
    return list(np.ascontiguousarray(coarse.repeat(32, 1).repeat(32, 2)[:, :, :854]))


def latency(nets: Nets, seconds: float, rate: float | None) -> dict[str, Any]:
    """Figures of frames that are pushed for some seconds: at a rate, or (None) one after the other."""
    latencies, frames = Latencies((*PARTS, "push")), pictures()
    recogniser = PhaseRecogniser(nets, record=latencies.add)
    for number in range(3):  # the first ones prepare the nets
        recogniser.push(frames[number], float(number))
    latencies = Latencies((*PARTS, "push"))
    recogniser = PhaseRecogniser(nets, record=latencies.add)
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        if rate is not None:
            time.sleep(max(begun + count / rate - time.perf_counter(), 0))
        started = time.perf_counter()
        found = recogniser.push(frames[count % PICTURES], float(count))
        latencies.add("push", time.perf_counter() - started)
        assert len(found) == 1
        count += 1
    elapsed = time.perf_counter() - begun
    return {"frames": count, "frames_per_s": round(count / elapsed, 2), "ms": latencies.to_json()}


def memory(hours: float) -> dict[str, Any]:
    """Resident memory in a video of some hours."""
    recogniser = PhaseRecogniser(random_nets("shufflenet_v2_x0_5", 64, LstmHead(hidden=128), lagging()))
    total, frames = int(hours * 3600 * VIDEO_FPS), pictures()
    after_a_tenth, begun, recognised = 0.0, time.perf_counter(), 0
    for number in range(total):
        recognised += len(recogniser.push(frames[number % PICTURES], number / VIDEO_FPS))
        if number == total // 10:
            after_a_tenth = resident_mb()
    end_mb = resident_mb()
    return {
        "hours": hours,
        "recognised": recognised,
        "after_a_tenth_mb": round(after_a_tenth, 1),
        "end_mb": round(end_mb, 1),
        "growth_mb": round(end_mb - after_a_tenth, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def lagging() -> ChosenDecoding:
    """Viterbi with a lag, with the transitions of operations in which each phase lasts five minutes."""
    labels = np.repeat(np.arange(len(SPEC.phases)), 300)
    track = TrackDecoding(
        classes=SPEC.phases,
        filter_kappa=0.1,
        viterbi_kappa=0.1,
        min_duration_s=5.0,
        graph=learn_graph([labels], len(SPEC.phases), 1.0),
    )
    fitted = FittedDecoding(weights_sha256="", fps=1.0, train=(), val=(), tracks={"phases": track})
    return ChosenDecoding(fitted, DecodingConfig(mode="causal", lag_s=5.0), "")


def resident_mb() -> float:
    """The memory of this process that is in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
