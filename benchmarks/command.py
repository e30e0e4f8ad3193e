"""Functions that the benchmarks share: their options, the output of figures, and calls of the command line."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.stopping import StopRequest

PROJECT = Path(__file__).resolve().parent.parent
PIPELINE = PROJECT / "pipeline.py"
SHARED = Path(os.environ.get("SURGSTAGE_SHARED", PROJECT.parent / "shared"))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def options(doc: str | None, repeat: int | None = 3) -> argparse.ArgumentParser:
    """A parser with the module's docstring `doc` as help, and the options `--json` and `--repeat`.

    `repeat` is the default of `--repeat`; with None there is no such option.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    if repeat is not None:
        parser.add_argument("--repeat", type=int, default=repeat, metavar="N", help=f"rounds (default: {repeat})")
    return parser


def say(figures: Mapping[str, Any], file: Path | None) -> None:
    """Print the figures as JSON and, if a file is given, write them to it."""
    text = json.dumps(figures, indent=1)
    print(text)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")


def pipeline(command: str, config: str, name: str | None, settings: Iterable[str], more: Sequence[str] = ()) -> None:
    """Run one command of the pipeline, with `--name name` unless this is None.

    Raises CalledProcessError if the command fails.
    """
    arguments = [command, "--config", config, *(["--name", name] if name else []), *more]
    for setting in settings:
        arguments += ["--set", setting]
    subprocess.run([sys.executable, str(PIPELINE), *arguments], check=True)


def stage_to_end(arguments: Sequence[str], stop: StopRequest) -> int:
    """Run one command of the pipeline and return its exit code.

    A stop signal of this process is passed on to the command once, which then saves its state and exits; a second
    Ctrl-C is passed on too. The command is in a session of its own, so that it gets Ctrl-C from here only.
    """
    process = subprocess.Popen([sys.executable, str(PIPELINE), *arguments], start_new_session=True)
    passed_on = False
    while True:
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            if stop.number is not None and not passed_on:
                passed_on = True
                process.send_signal(stop.number)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
