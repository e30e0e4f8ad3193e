"""Checks of surgstage on a machine with a GPU: first correctness, then speed.

    python benchmarks/gpu/gpu_check.py all [STEP...]    every step (or those), each in a process with a time limit
    python benchmarks/gpu/gpu_check.py step STEP        one step in this process
    python benchmarks/gpu/gpu_check.py clip             make the 854x480 clip that extraction reads (needs no GPU)

Each result is a line {"step": ..., "figure": ..., "value": ..., "wanted": ...}, in which `wanted`, if present, is the
value to reach. The project is used through its command line, except for the LSTM on two devices and the joint net
before its first step, for which there is no command. The programs to compare with are plain torch. gpu_check.sh runs
all steps.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import correctness
import speed
from common import CLIP, CORES, OUT, REHEARSE, ROOT, STEP, WORK, figure, log, make_clip

STARTED = time.time()
TOTAL_S = float(os.environ.get("GPU_CHECK_SECONDS", "545"))
# The steps with their time limits in seconds. The most important come first, since the last may not be run in time.
STEPS = {
    correctness.about: 70,
    correctness.lstm: 50,
    correctness.material: 70,
    speed.stage_one: 110,
    speed.extract: 110,
    correctness.features: 170,
    correctness.parity: 170,
    correctness.resume: 170,
    correctness.resume_temporal: 170,
    correctness.nccl: 170,
    correctness.half: 170,
    correctness.ahead: 170,
    speed.hardware: 170,
    speed.joint: 100,
    speed.stage_two: 80,
    speed.waits: 40,
    speed.together: 60,
    speed.switches: 90,
    speed.compiled: 120,
}
# These steps can run at the same time: their figures do not depend on what else runs, and most of their time is the
# start of commands.
SIDE_BY_SIDE = {
    step.__name__
    for step in (
        correctness.features,
        correctness.parity,
        correctness.resume,
        correctness.resume_temporal,
        correctness.nccl,
        correctness.half,
        correctness.ahead,
        speed.hardware,
    )
}
BY_NAME = {step.__name__: step for step in STEPS}
NEEDS_NO_MATERIAL = {"about", "lstm", "material"}


def all_steps(names: list[str]) -> None:
    """Run every step in its own process until time is up, then print a table of the figures.

    The exit code is 1 if a step failed, was cut off or was not started.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    if unknown := [name for name in names if name not in BY_NAME]:
        sys.exit(f"no such step: {', '.join(unknown)}; choose from {', '.join(BY_NAME)}")
    wanted = names or list(BY_NAME)
    if "material" not in wanted and set(wanted) - NEEDS_NO_MATERIAL and not (WORK / "data.json").exists():
        wanted = ["material", *wanted]
    outcomes: list[Any] = []
    for _, group in itertools.groupby(wanted, key=lambda name: runs_beside_others(name) or name):
        with ThreadPoolExecutor(CORES) as pool:
            outcomes += pool.map(run_step, group)
    table()
    if any(outcomes):
        sys.exit(1)


def runs_beside_others(name: str) -> bool:
    """Whether the step may run at the same time as others; in a rehearsal, in which no speed counts, nearly all may."""
    return name != "material" if REHEARSE else name in SIDE_BY_SIDE


def run_step(name: str) -> Any:
    """Run a step in a process of its own, unless time is up; returns its exit code, or a text if it did not end."""
    started = float(os.environ.get("GPU_CHECK_STARTED", STARTED))
    left_s, limit_s = TOTAL_S - (time.time() - started), STEPS[BY_NAME[name]] * (6 if REHEARSE else 1)
    if left_s < min(25, limit_s) and not REHEARSE:
        figure("not started: time is up", name, step=name)
        return "not started"
    begun = time.time()
    # in a session of its own, so that all processes that the step has started end with it
    process = subprocess.Popen(
        [sys.executable, __file__, "step", name], cwd=ROOT, start_new_session=True, env={**os.environ, STEP: name}
    )
    try:
        outcome: Any = process.wait(timeout=limit_s if REHEARSE else min(limit_s, left_s - 5))
    except subprocess.TimeoutExpired:
        outcome = "exceeded its limit"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    figure("seconds of the step", round(time.time() - begun, 1), step=name, outcome=outcome)
    return outcome


def table() -> None:
    """Print the figures, one per line."""
    print("\n== figures", flush=True)
    for line in (OUT / "figures.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["figure"] != "seconds of the step" or row.get("outcome") != 0:
            goal = f"   (wanted: {row['wanted']})" if "wanted" in row else ""
            print(f"{row['step']:10} {str(row['value'])[:40]:>14}  {row['figure']}{goal}", flush=True)


def one_step(name: str) -> None:
    """Run one step in this process. If it raises, report a figure `failed` and exit with code 1."""
    os.environ[STEP] = name
    OUT.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        BY_NAME[name]()
    except BaseException as error:
        log([name], traceback.format_exc())
        figure("failed", f"{type(error).__name__}: {str(error)[:300]}")
        sys.exit(1)


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or [""]
    if what == "all":
        all_steps(rest)
    elif what == "step":
        one_step(rest[0])
    elif what == "clip":
        OUT.mkdir(parents=True, exist_ok=True)
        CLIP.parent.mkdir(parents=True, exist_ok=True)
        make_clip(CLIP)
    else:
        sys.exit(__doc__)
