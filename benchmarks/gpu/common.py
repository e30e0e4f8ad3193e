"""What the steps of the GPU check share: sizes, settings, output of figures, calls of commands, and a GPU monitor."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = Path(os.environ.get("OUT", ROOT / "artifacts" / "gpu_check" / "out"))
WORK = Path(os.environ.get("GPU_CHECK_WORK", "/tmp/gpu_check"))
CLIP = Path(os.environ.get("GPU_CHECK_CLIP", ROOT / "artifacts" / "gpu_check" / "clip.mp4"))
REHEARSE = bool(os.environ.get("GPU_CHECK_REHEARSE"))
DEVICE = "cpu" if REHEARSE else "cuda"
CORES = len(os.sched_getaffinity(0))
SIDE_PX, RESIZE_PX = (64, 72) if REHEARSE else (224, 250)
BACKBONE = "resnet18" if REHEARSE else "resnet50"
SIMULATED, VIDEOS = 6, 6 if REHEARSE else 24  # the other videos are links to the simulated ones
SPEED_UP = 128 if REHEARSE else 4  # divides the length of a simulated operation of about 2,300 s at 1 fps
STEP = "GPU_CHECK_STEP"  # environment variable with the name of the step that runs
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def figure(name: str, value: Any, wanted: Any = None, **more: Any) -> None:
    """Write a figure as one line to the terminal and to $OUT/figures.jsonl."""
    if isinstance(value, float):
        value = float(f"{value:.6g}")
    line = {
        "step": os.environ.get(STEP, ""),
        "figure": name,
        "value": value,
        **({} if wanted is None else {"wanted": wanted}),
        **more,
    }
    text = json.dumps(line, default=str)
    print(text, flush=True)
    with (OUT / "figures.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(text + "\n")


# ---------------------------------------------------------------------------------------------- commands


class Watch:
    """Polls nvidia-smi for the mean utilisation of the GPU and its decoder (percent) and the peak memory (MiB)."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu,utilization.decoder,memory.used"]
        while not self._end.wait(0.5):
            try:
                said = subprocess.run(
                    [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5
                )
                self.rows.append(
                    [float(part) if part.strip().isdigit() else 0.0 for part in said.stdout.split(",")[:3]]
                )
            except (OSError, ValueError, subprocess.SubprocessError):
                return

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()

    def means(self) -> dict[str, float]:
        rows = [row for row in self.rows if len(row) == 3]
        if not rows:
            return {}
        names = ("gpu_percent", "decoder_percent")
        found = {name: round(statistics.fmean(row[n] for row in rows), 1) for n, name in enumerate(names)}
        return found | {"gpu_memory_mib": max(row[2] for row in rows)}


def run(words: list[str], timeout: float, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command; its output goes to $OUT/log.txt. Raises RuntimeError if it fails and `check` is set.

    A rehearsal may take four times `timeout` (seconds).
    """
    timeout *= 4 if REHEARSE else 1
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired as error:
        parts = [part.decode("utf-8", "replace") for part in (error.stdout, error.stderr) if isinstance(part, bytes)]
        log(words, f"exceeded its {timeout:.0f} s\n{''.join(parts)}")
        raise
    log(words, done.stdout + done.stderr)
    if check and done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"exit {done.returncode}: {last[:300]}")
    return done


def log(words: list[str], output: str) -> None:
    """Append a command and the end of its output to $OUT/log.txt."""
    with (OUT / "log.txt").open("a", encoding="utf-8") as stream:
        stream.write(f"\n$ {' '.join(words)}\n{output.replace(chr(13), chr(10))[-20000:]}\n")


def settings(*lines: str) -> list[str]:
    """The words of a command that set each KEY=VALUE of `lines`.

    A later one replaces earlier ones with the same key or with a key below it.
    """
    chosen: dict[str, str] = {}
    for line in lines:
        key = line.partition("=")[0]
        chosen = {known: one for known, one in chosen.items() if known != key and not known.startswith(f"{key}.")}
        chosen[key] = line
    return [word for line in chosen.values() for word in ("--set", line)]


def pipeline(command: str, *words: str, timeout: float = 120, check: bool = True, timed: Path | None = None) -> Any:
    """Run a command of the project; with `timed`, record the time of each training step in that file (timed.py)."""
    start = [str(HERE / "timed.py"), str(timed)] if timed else [str(ROOT / "pipeline.py")]
    return run([sys.executable, *start, command, *words], timeout, check)


def rate(once: Callable[[], None], times: int, warm_up: int) -> float:
    """Calls of `once` per second, after `warm_up` calls that do not count; waits for the GPU to finish them."""
    import torch

    def wait() -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    for _ in range(warm_up):
        once()
    wait()
    started = time.perf_counter()
    for _ in range(times):
        once()
    wait()
    return times / (time.perf_counter() - started)


def timed_rate(file: Path, per_step: float, skip: int) -> dict[str, Any]:
    """The speed of a training that timed.py recorded in `file`, and the other values in it.

    The speed is in units per second for `per_step` units in a step, without the first `skip` steps.
    """
    noted = json.loads(file.read_text())
    stamps = noted["stamps"]
    skip = min(skip, len(stamps) // 2)
    counted = len(stamps) - 1 - skip
    rate = counted * per_step / (stamps[-1] - stamps[skip]) if counted > 0 else float("nan")
    return {"rate": rate, "steps": len(stamps), **{key: noted[key] for key in noted if key != "stamps"}}


def base(data: str, *more: str) -> list[str]:
    """The settings that every command gets: the data set `data` below WORK, and output folders there."""
    return [
        f"data.root={WORK / data}",
        f"data.index={WORK / data}.json",
        f"data.split.rule={VIDEOS - 2}/1/1",
        f"runs={WORK / 'runs'}",
        f"cache.dir={WORK / 'cache'}",
        f"extract.store={WORK / 'store'}",
        f"cnn.backbone={BACKBONE}",
        "cnn.weights=random",
        f"device={DEVICE}",
        f"preprocess.resize_px={RESIZE_PX}",
        f"preprocess.crop_px={SIDE_PX}",
        *more,
    ]


def base_of_features(data: str, *more: str) -> list[str]:
    """The same for stage two on features that are not of this data set, and so have splits of their own."""
    return [one for one in base(data, *more) if not one.startswith("data.split.")]


def make_clip(path: Path) -> None:
    """Write a clip: about 23 s of a simulated operation, 854x480 at 25 fps, H.264."""
    place = path.parent / "clip-tmp"
    words = ["--videos", "1", "--seed", "0", "--fps", "25", "--width", "854", "--height", "480", "--speed-up", "64"]
    pipeline("simulate", str(place), *words, timeout=580)
    shutil.move(next(place.rglob("*.mp4")), path)
    shutil.rmtree(place)
