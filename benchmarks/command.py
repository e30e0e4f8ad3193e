"""The project's command line as the longer benchmarks use it: as a user would, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

PIPELINE = Path(__file__).resolve().parent.parent / "pipeline.py"


def pipeline(command: str, config: str, name: str, settings: Iterable[str], more: Sequence[str] = ()) -> None:
    """Run one command for the run `name`; raises CalledProcessError where it fails."""
    arguments = [command, "--config", config, "--name", name, *more]
    for setting in settings:
        arguments += ["--set", setting]
    subprocess.run([sys.executable, str(PIPELINE), *arguments], check=True)
