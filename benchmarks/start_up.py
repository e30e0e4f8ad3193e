"""Start-up time: `--help`, and `train-temporal` up to its first optimiser step.

Every figure is a median over several rounds. Each round starts all programs, so that other load affects all of them.
The features are random fp16 values of width 2048. The videos have the lengths of Cholec80's forty training videos if
these are known.

    python benchmarks/start_up.py --json FILE

All figures are in seconds:

- `import_torch_s`: `python -c "import torch"` from start to exit.
- `read_s`: reading every feature file with plain h5py, in a process of its own, when the files are in the disk cache.
- `begin_s`, `first_step_s`: from the start of `train-temporal` to its first batch, and to the end of its first
  optimiser step.
- `over_torch_s`: `first_step_s` minus `import_torch_s` and `read_s`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from command import PROJECT, SHARED, options, say

if TYPE_CHECKING:
    from features.store import EncoderSpec

sys.path.insert(0, str(PROJECT))
WIDTH = 2048

IMPORT_TORCH = "import torch"
READ = """
import sys, time
from pathlib import Path
import h5py
started = time.perf_counter()
for path in sorted(Path(sys.argv[1]).glob("*.h5")):
    with h5py.File(path, "r") as file:
        file["features"][...]
print(time.perf_counter() - started)
"""
# Runs the real command line, records when the first batch reaches the model and when its step has ended, and exits.
FIRST_STEP = """
import os, runpy, sys, time
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
begun = []
def begin(module, inputs):
    if module.training and not begun:
        begun.append(time.time())
def end(optimizer, arguments, keywords):
    print(begun[0], time.time(), flush=True)
    os._exit(0)
register_module_forward_pre_hook(begin)
register_optimizer_step_post_hook(end)
sys.argv = ["pipeline.py", *sys.argv[1:]]
sys.path.insert(0, "")
runpy.run_path("pipeline.py", run_name="__main__")
"""


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    given = training_options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), phases_of(given.lengths), given.repeat, given.set)
    say(figures, given.json)


def training_options(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark of `train-temporal`, with options for the lengths of videos and for settings."""
    parser = options(doc)
    parser.add_argument(
        "--lengths", type=Path, metavar="NPZ", help="arrays videoNN_phase; default: those in SURGSTAGE_SHARED, if any"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to train-temporal")
    return parser


def phases_of(file: Path | None) -> list[np.ndarray]:
    """The phases (T,) of each video: the real ones or, if they are not known, those of forty videos of equal length."""
    file = lengths_file(file)
    if not file.is_file():
        return [np.repeat(np.arange(7, dtype=np.int8), 309)[:2158] for _ in range(40)]
    with np.load(file) as arrays:
        return [arrays[name].astype(np.int8) for name in sorted(arrays.files) if name.endswith("_phase")]


def lengths_file(file: Path | None) -> Path:
    """The file with the real phases, and thus the real lengths; it may not exist."""
    return file or SHARED / "data" / "labels" / "train40_1fps.npz"


def measure(folder: Path, phases: Sequence[np.ndarray], repeat: int, settings: Sequence[str]) -> dict[str, object]:
    """Measure all figures; the first round fills the disk cache and does not count."""
    features = folder / "features"
    write_feature_set(features, phases)
    rounds = []
    for number in range(repeat + 1):
        every = [f"runs={folder / f'runs{number}'}", *settings]
        command = ["train-temporal", "--features", str(features), *(word for one in every for word in ("--set", one))]
        found = {
            "import_torch_s": wall(["-c", IMPORT_TORCH]),
            "help_s": wall(["pipeline.py", "--help"]),
            "read_s": float(output(["-c", READ, str(features)])),
        }
        started = time.time()
        begun, done = (float(word) for word in output(["-c", FIRST_STEP, *command]).split())
        found |= {"begin_s": begun - started, "first_step_s": done - started}
        found["over_torch_s"] = found["first_step_s"] - found["import_torch_s"] - found["read_s"]
        rounds.append(found)
    figures: dict[str, object] = {
        key: round(statistics.median(found[key] for found in rounds[1:]), 3) for key in rounds[0]
    }
    return figures | {"frames": sum(map(len, phases)), "videos": len(phases), "settings": list(settings)}


def write_feature_set(
    folder: Path, phases: Sequence[np.ndarray], train_share: float = 0.8, encoder: EncoderSpec | None = None
) -> None:
    """Write random features in the format of `extract`.

    `train_share` is the fraction of the videos that are for training; the others are for validation. `encoder` is
    recorded as the encoder that made the features, by default a ResNet50.
    """
    from configs.load import load_dataset
    from features.dataset.index import Index, VideoEntry
    from features.store import EncoderSpec, SourceIdentity, feature_path, write_features

    encoder = encoder or EncoderSpec("resnet50", "0" * 64, {}, 1.0, "fp32", "float16", WIDTH)
    rng = np.random.default_rng(0)
    entries = []
    for number, phase in enumerate(phases):
        name, count = f"video{number + 1:02d}", len(phase)
        source = SourceIdentity(name, "0" * 64, 1, 25.0)
        no_tools = np.full((count, 7), -1, np.int8)
        with write_features(
            feature_path(folder, name), encoder, source, np.arange(count) * 25, phase, no_tools, {}
        ) as writer:
            writer.append(rng.standard_normal((count, WIDTH), np.float32), no_tools.astype(np.float32))
        entries.append(
            VideoEntry(
                id=name,
                kind="video",
                source=f"{name}.mp4",
                size_bytes=1,
                modified_ns=0,
                sha256_ends="0" * 64,
                fps=25.0,
                frame_count=count * 25,
                split="train" if number < train_share * len(phases) else "val",
            )
        )
    Index(dataset=load_dataset("cholec80"), videos=tuple(entries)).save(folder / "index.json")


def wall(words: Sequence[str]) -> float:
    """The time that a new interpreter takes from start to exit, in seconds."""
    started = time.perf_counter()
    output(words)
    return time.perf_counter() - started


def output(words: Sequence[str]) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, *words], cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words[:2])[:60]}: failed\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
