"""The speed of the project's own LSTM recurrence on a CPU compared with torch's, forward and backward pass.

    python benchmarks/recurrence.py --json FILE [--repeat N] [--frames 1000]

An LSTM with 512 units gets 2048 stored fp16 features per frame and computes in fp32, without head, loss and optimiser.
The figures are medians of `--repeat` rounds, after one that does not count. The two alternate in each round, so that
other programs affect both. For each case, `own` and `torch` are frames per second of processor time, and `ratio` is
over 1 if the project's recurrence is faster. torch's recurrence is called in the way in which `heads.recurrent` calls
it elsewhere: for all sequences up to the end of the shortest, then for the rest up to the next end, and so on.

- `equal`: eight sequences of `--frames` frames.
- `unequal`: eight sequences of lengths from half of `--frames` to `--frames`.
- `single`: one sequence of `--frames` frames.
- `clips`: `--frames` clips of 10 frames.

On a CPU with AVX512, `ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` runs the code for a CPU without AVX512, though
with the caches of this one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from command import CORES, PROJECT, options, say

sys.path.insert(0, str(PROJECT))

import torch
from torch import Tensor, nn

from stage2_temporal.heads.lstm_cpu import run_lstm
from stage2_temporal.heads.recurrent import run_torch

WIDTH, HIDDEN = 2048, 512
SHARES = (1, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__)
    parser.add_argument(
        "--frames", type=int, default=1000, metavar="N", help="frames of the longest sequence (default: 1000)"
    )
    given = parser.parse_args()
    cases = {
        "equal": [given.frames] * len(SHARES),
        "unequal": [max(1, int(given.frames * share)) for share in SHARES],
        "single": [given.frames],
        "clips": [10] * given.frames,
    }
    figures: dict[str, object] = {name: compared(lengths, given.repeat) for name, lengths in cases.items()}
    say(figures | {"capability": torch.backends.cpu.get_cpu_capability(), "cores": CORES}, given.json)


def compared(lengths: list[int], rounds: int) -> dict[str, float]:
    """Frames per second of both recurrences for sequences of these lengths, and their ratio."""
    torch.manual_seed(0)
    rnn = nn.LSTM(WIDTH, HIDDEN, batch_first=True)
    x = torch.randn(len(lengths), max(lengths), WIDTH).half()
    mean, scale, counts = torch.zeros(WIDTH), torch.ones(WIDTH), torch.tensor(lengths)
    ways: dict[str, Callable[[], Tensor]] = {
        "own": lambda: run_lstm(rnn, x, None, lengths, (mean, scale))[0],
        "torch": lambda: run_torch(rnn, torch.sub(x, mean).mul_(scale), None, counts)[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            way().square().mean().backward()
            rnn.zero_grad()
            seconds[name].append(time.process_time() - started)
    rate = {name: sum(lengths) / statistics.median(found[1:]) for name, found in seconds.items()}
    return {name: round(value) for name, value in rate.items()} | {"ratio": round(rate["own"] / rate["torch"], 2)}


if __name__ == "__main__":
    main()
