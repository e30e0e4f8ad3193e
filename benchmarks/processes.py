"""Time and memory of a command, including the processes that it starts, read from Linux's /proc."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_EVERY_S = 0.1


@dataclass
class Cost:
    """Time and memory of a command. `tree_mb` counts shared pages once for each process, so it is too high."""

    seconds: float
    tree_mb: float  # the peak, over time, of the sum of all processes' resident memory
    biggest_mb: float  # highest resident memory of one process
    processor_s: float  # processor time of all processes, which other load hardly changes


def run_measured(words: Sequence[str], folder: Path) -> Cost:
    """Run a Python program in `folder` and measure it; if it fails, exits with its output. MB are 10^6 bytes."""
    started, used = time.perf_counter(), _processor_s()
    with subprocess.Popen(
        [sys.executable, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        peaks = [0.0, 0.0]
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
        watcher.start()
        output, _ = process.communicate()
        ended.set()
        watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(words[:3])}: exit code {process.returncode}\n{output[-3000:]}")
    return Cost(time.perf_counter() - started, *peaks, _processor_s() - used)


def _processor_s() -> float:
    """The processor time, in seconds, of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watch(pid: int, peaks: list[float], ended: threading.Event) -> None:
    while not ended.wait(_EVERY_S):
        resident, highest = [], []
        for member in _tree(pid):
            try:
                fields = dict(line.split(":", 1) for line in Path(f"/proc/{member}/status").read_text().splitlines())
                resident.append(int(fields["VmRSS"].split()[0]) * 1024 / 1e6)
                highest.append(int(fields["VmHWM"].split()[0]) * 1024 / 1e6)
            except (OSError, KeyError, ValueError):
                continue  # the process has just ended
        peaks[0] = max(peaks[0], sum(resident))
        peaks[1] = max(peaks[1], *highest, 0.0) if highest else peaks[1]


def _tree(pid: int) -> list[int]:
    """The ids of a process and of all its descendants."""
    found = [pid]
    for member in found:
        try:
            tasks = Path(f"/proc/{member}/task").iterdir()
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found
