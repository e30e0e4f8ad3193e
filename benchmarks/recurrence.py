"""The project's LSTM recurrence on a CPU against torch's on the same sequences, forward and backward.

    python benchmarks/recurrence.py --json FILE [--repeat N] [--frames 1000]

LSTM of 512 over 2048 stored fp16 features, fp32 arithmetic, without head, loss and optimiser. Processor time, medians
of `--repeat` rounds in which both ways alternate, after one that does not count: other programs affect both alike. For
each case the frames per second of processor time of either (`own`, `torch`) and `ratio`, over 1 where the project's
recurrence is faster. torch's way is the one that `heads.recurrent` takes otherwise: all sequences up to the end of the
shortest, and so on.

- `equal`: eight sequences of `--frames` frames. `unequal`: eight from half to all of it. `single`: one sequence.
- `clips`: clips of 10 frames, `--frames` of them.

On a CPU with AVX512, `ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` measures what one without it would run, on this
CPU's caches.
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
    """Parse, measure, print, write."""
    parser = options(__doc__)
    parser.add_argument("--frames", type=int, default=1000, metavar="N", help="of the longest sequence (default: 1000)")
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
    """Frames per second of both ways over sequences of these lengths, and their ratio."""
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
