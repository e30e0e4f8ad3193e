"""Run pipeline.py and measure it: `timed.py FILE WORDS...`.

FILE receives the time of every optimiser step, the peak memory and, if GPU_CHECK_WAITS is set, the lines at which
steps 5 to 25 wait for the GPU.
"""

from __future__ import annotations

import atexit
import collections
import json
import os
import runpy
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from common import HERE, ROOT

STARTED = time.perf_counter()


def main(file: Path, words: list[str]) -> None:
    """Run pipeline.py with `words` in this process."""
    import torch

    from engine.session import TrainingSession

    stamps: list[float] = []
    waits: collections.Counter[str] = collections.Counter()
    finds_waits = bool(os.environ.get("GPU_CHECK_WAITS"))
    update = TrainingSession.update

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = update(self, *args, **kwargs)
        stamps.append(time.perf_counter())
        if finds_waits and torch.cuda.is_available():  # not in the first steps, which allocate what later ones reuse
            torch.cuda.set_sync_debug_mode("warn" if 5 <= len(stamps) < 25 else "default")
        return found

    def count_wait(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if str(ROOT) in f.filename and str(HERE) not in f.filename]
        waits[f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "elsewhere"] += 1

    TrainingSession.update = timed  # type: ignore[method-assign]
    if finds_waits:
        warnings.simplefilter("always")
        warnings.showwarning = count_wait

    def write() -> None:
        more: dict[str, Any] = {}
        if torch.cuda.is_available():
            more["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            more["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        if stamps:
            more["seconds_to_first_step"] = round(stamps[0] - STARTED, 1)
        file.write_text(json.dumps({"stamps": stamps, "waits": waits, **more}))

    atexit.register(write)
    sys.argv = ["pipeline.py", *words]
    runpy.run_path(str(ROOT / "pipeline.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
