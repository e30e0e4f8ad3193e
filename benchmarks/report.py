"""The time that `report` takes for forty videos of Cholec80's mean length, with synthetic labels and predictions.

    python benchmarks/report.py --json FILE

- `report_s`: wall time of the command from start to exit, the median over several calls; `report_cpu_s`: its processor
  time (the two differ on a busy machine).
- `two_runs_s`: wall time with two runs side by side.
- `figures_s`: wall time with `--figures` (PDF and PNG).
- `report_mb`: the size of the page.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from command import PROJECT, options, say

sys.path.insert(0, str(PROJECT))


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--seconds", type=int, default=2455, help="length of each video, at 1 fps")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), given.videos, given.seconds, given.repeat)
    say(figures, given.json)


def measure(folder: Path, videos: int, seconds: int, repeat: int) -> dict[str, object]:
    """Measure all figures."""
    from tests.report_material import write_run

    names = [f"video{number:02d}" for number in range(1, videos + 1)]
    runs = [write_run(folder / name, names, frames=seconds, seed=seed) for seed, name in enumerate(("one", "two"))]
    before = cpu_s()
    one = statistics.median([wall(["report", str(runs[0])]) for _ in range(repeat)])
    return {
        "report_s": round(one, 2),
        "report_cpu_s": round((cpu_s() - before) / repeat, 2),
        "two_runs_s": round(wall(["report", *map(str, runs), "--out", str(folder / "two.html")]), 2),
        "figures_s": round(wall(["report", str(runs[0]), "--figures", str(folder / "figures")]), 2),
        "report_mb": round((runs[0] / "report.html").stat().st_size / 1e6, 2),
        "videos": videos,
        "seconds_a_video": seconds,
    }


def wall(arguments: list[str]) -> float:
    """The wall time that a command of the pipeline takes, in seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "pipeline.py", *arguments], cwd=PROJECT, check=True, capture_output=True)
    return time.perf_counter() - started


def cpu_s() -> float:
    """The processor time of all commands so far, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
