"""Training speed, memory, size of the state and time of a step of every temporal head, at its default settings.

    python benchmarks/heads.py --json FILE [--repeat N] [--heads lstm,ssm] [--device cuda:0] [--quick]

Features are random fp16 values. Every head is measured in a process of its own. On a CPU, one thread computes, and
times are processor times, so that other programs disturb them little; on a GPU, they are wall times, with the device
synchronised.

- `parameters`: how many the head has, without the standardisation.
- `frames_per_s`: frames per second of training: forward and backward pass and a step of AdamW, on a batch of
  `--videos` whole videos of `--frames` frames, in fp32 and training mode. The median of `--repeat` steps after one that
  does not count. `ratio_to_lstm` divides it by the rate of the head `lstm`, if this is measured first, as by default.
- `memory_mb`: by how much the peak memory during these steps exceeds the memory before the head was built, in MB of
  10^6 bytes: weights, gradients, moments of the optimiser and activations. On a GPU, the peak of allocated memory.
- `state_bytes`, `state_bytes_early`: the size of the state of one video after `--late` and after `--early` frames.
- `step_ms`, `step_ms_early`: the time of a step of one video, one frame, in evaluation mode, after as many frames,
  which have been computed in chunks. The two alternate, and their order too; medians of `--steps` steps each.
- `step_ratio`: the first divided by the second. It is about 1 if the cost of a frame does not depend on the past.

Heads that look into the future are marked `offline` and have neither state nor step.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import CORES, PROJECT, options, say

sys.path.insert(0, str(PROJECT))

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.head_settings import read_head
from configs.schema import OptimConfig
from engine.optim import build_optimizer
from stage2_temporal.heads.base import HEADS, State, build_head
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.model import PhaseModel

PHASES, CHUNK = 7, 1000
COLUMNS = ("parameters", "frames_per_s", "ratio_to_lstm", "memory_mb", "state_bytes", "step_ms", "step_ratio")
QUICK = {"videos": 2, "frames": 200, "width": 64, "early": 100, "late": 2000, "steps": 10, "repeat": 1}


def main() -> None:
    """Parse the options, measure each head in its own process, and print and write the figures."""
    given = parser().parse_args()
    if given.quick:
        vars(given).update(QUICK)
    if given.one:
        print(json.dumps(measured(given.one, given)))
        return
    names = given.heads.split(",") if given.heads else sorted(HEADS.names(), key=lambda name: (name != "lstm", name))
    heads: dict[str, dict[str, Any]] = {}
    print(line("head", dict(zip(COLUMNS, COLUMNS, strict=True))), flush=True)
    for name in names:
        found = heads[name] = in_own_process(name, given)
        lstm = heads.get("lstm")
        found["ratio_to_lstm"] = rounded(found["frames_per_s"] / lstm["frames_per_s"]) if lstm else None
        print(line(name, found), flush=True)
    sizes = {key: getattr(given, key) for key in QUICK}
    say({"heads": heads, **sizes, "device": given.device, "cores": CORES}, given.json)


def parser() -> argparse.ArgumentParser:
    """The options of this program."""
    one = options(__doc__, repeat=5)
    one.add_argument("--heads", metavar="NAMES", help="comma-separated names of heads (default: all)")
    one.add_argument("--device", default="cpu", help="cpu (default) or a GPU, such as cuda:0")
    one.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    sizes = {"videos": 4, "frames": 2000, "width": 2048, "early": 100, "late": 20_000, "steps": 200}
    for name, default in sizes.items():
        one.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default:,})")
    one.add_argument("--one", metavar="NAME", help="measure this head in this process")
    return one


def in_own_process(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of one head, measured in a new process."""
    words = [word for key in QUICK for word in (f"--{key}", str(getattr(given, key)))]
    command = [sys.executable, __file__, "--one", name, "--device", given.device, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """All figures of one head."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device(given.device)
    x = torch.randn(given.videos, given.frames, given.width).half().to(device)
    labels = torch.randint(PHASES, (given.videos, given.frames)).to(device)
    training_seconds(model_of("linear", given.width, device), x[:, :2], labels[:, :2], 1)  # loads torch's libraries
    before = memory(device, "VmRSS")
    model = model_of(name, given.width, device)
    head = model.head
    seconds = training_seconds(model, x, labels, given.repeat)
    figures = {
        "offline": not head.causal,
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "frames_per_s": round(given.videos * given.frames / seconds, 1),
        "memory_mb": round((memory(device, "VmHWM") - before) / 1e6, 1),
    }
    return figures | (steps(model, x.device, given) if head.causal else {})


def model_of(name: str, width: int, device: torch.device) -> PhaseModel:
    """A model with the head of this name, at its default settings."""
    head = build_head(read_head({"name": name}), width, PHASES)
    return PhaseModel(Standardise.identity(width), head).to(device)


def training_seconds(model: PhaseModel, x: Tensor, labels: Tensor, repeat: int) -> float:
    """The median time of a training step on x (B, T, D) with labels (B, T)."""
    optimizer = build_optimizer([{"params": model.head.parameters()}], OptimConfig(name="adamw"))
    lengths = torch.full((len(x),), x.shape[1])

    def step() -> None:
        stages = model.train()(x, None, lengths).logits_per_stage
        losses = [F.cross_entropy(logits.flatten(0, 1), labels.flatten()) for logits in stages]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return statistics.median([seconds_of(step, x.device) for _ in range(repeat + 1)][1:])


@torch.no_grad()
def steps(model: PhaseModel, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of single frames after `early` and after `late` frames of one video."""
    model.eval()
    states: dict[str, State] = {}
    state: State | None = None
    for start, stop, name in ((0, given.early, "early"), (given.early, given.late, "late")):
        for at in range(start, stop, CHUNK):
            state = model(torch.randn(1, min(CHUNK, stop - at), given.width).half().to(device), state).state
        states[name] = state or ()
    frame = torch.randn(1, given.width).half().to(device)
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for number in range(given.steps + 5):  # the first five do not count
        for name in sorted(states, reverse=bool(number % 2)):
            copied = tuple(tensor.clone() for tensor in states[name])
            seconds[name].append(seconds_of(lambda own=copied: model.step(frame, own), device))  # type: ignore[misc]
    early, late = (statistics.median(seconds[name][5:]) for name in ("early", "late"))
    sizes = {name: sum(tensor.numel() * tensor.element_size() for tensor in states[name]) for name in states}
    return {
        "state_bytes": sizes["late"],
        "state_bytes_early": sizes["early"],
        "step_ms": rounded(late * 1e3),
        "step_ms_early": rounded(early * 1e3),
        "step_ratio": rounded(late / early),
    }


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The processor time that `work` takes on a CPU, or its wall time on a GPU."""
    if device.type == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def memory(device: torch.device, name: str) -> int:
    """Bytes of memory of this process, or allocated on the GPU: now (`VmRSS`) or at the most so far (`VmHWM`)."""
    if device.type != "cpu":
        return torch.cuda.memory_allocated(device) if name == "VmRSS" else torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


def rounded(value: float) -> float:
    return round(value, 3)


def line(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    missing = "offline" if found.get("offline") else "-"
    cells = (found.get(column) for column in COLUMNS)
    return f"{name:<12}" + "".join(f"{missing if cell is None else cell:>15}" for cell in cells)


if __name__ == "__main__":
    main()
