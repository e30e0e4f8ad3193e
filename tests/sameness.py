"""Whether two runs of one command left the same files, except wall times, and nothing unfinished."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

# What always differs between runs: times, and how the work was divided between the starts of a command.
WALL_TIMES = {"seconds", "decode_seconds", "encode_seconds", "frames_per_s", "sentence"}
PER_START = {"done", "skipped", "relabelled", "frames", "processes"}
EVENTS = "events"
_REVISION = re.compile(r", revision \w+")


def differences(expected: Path, found: Path) -> list[str]:
    """Every difference between two working folders, file by file; files of TensorBoard events are compared as scalars.

    A file that only one of them has is a difference, in particular a temporary file or a mark of work in progress.
    """
    here, there = _files(expected), _files(found)
    lines = [f"{name}: missing" for name in sorted(here.keys() - there.keys()) if not _is_spare(name)]
    lines += [f"{name}: a stray file" for name in sorted(there.keys() - here.keys()) if not _is_spare(name)]
    for name in sorted(here.keys() & there.keys()):
        lines += [f"{name}: {line}" for line in _compare(here[name], there[name])]
    for folder in sorted({path.parent for path in expected.rglob("events.out.tfevents.*")}):
        name = folder.relative_to(expected)
        if scalars(folder) != scalars(found / name):
            lines.append(f"{name}: other TensorBoard scalars")
    return lines


def left_half_done(folder: Path) -> list[str]:
    """Temporary files and marks of work in progress below `folder`."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(name) for name in names if name.name.endswith(".tmp") or name.name == "in-work")


def _is_spare(name: str) -> bool:
    """Whether it is a previous checkpoint, which exists if the last one was written at least twice, in any starts."""
    return name.endswith("/last.pt.previous")


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != EVENTS)
    return {str(path.relative_to(folder)): path for path in paths}


def _compare(expected: Path, found: Path) -> Iterator[str]:
    if expected.suffix == ".h5":
        yield from _compare_hdf5(expected, found)
    elif expected.suffix == ".pt":
        left, right = (torch.load(path, weights_only=True) for path in (expected, found))
        yield from _compare_values(left, right)
    elif expected.suffix == ".previous":  # it is of another step if the last start began in the middle of an epoch
        torch.load(found, weights_only=True)
    elif expected.suffix == ".html":  # it shows seconds
        if not found.read_text().rstrip().endswith("</html>"):
            yield "cut short"
    elif expected.name == "environment.json":
        json.loads(found.read_text())
    elif expected.name == "MODEL_CARD.md":  # it names the revision, as environment.json does
        left, right = (_REVISION.sub("", path.read_text()) for path in (expected, found))
        yield from _compare_values(left, right)
    elif expected.suffix == ".jsonl":
        left, right = ([json.loads(line) for line in path.read_text().splitlines()] for path in (expected, found))
        yield from _compare_values(left, right)
    elif expected.suffix == ".json":
        left, right = (json.loads(path.read_text()) for path in (expected, found))
        # these are hashes of checkpoints as files, and the checkpoints hold seconds
        of_files = {"metrics.json": "identity_sha256", "decoding.json": "weights_sha256"}.get(expected.name)
        left, right = ({k: v for k, v in one.items() if k != of_files} for one in (left, right))
        yield from _compare_values(left, right)
    elif expected.read_bytes() != found.read_bytes():
        yield "other content"


def _compare_hdf5(expected: Path, found: Path) -> Iterator[str]:
    with h5py.File(expected, "r", locking=False) as left, h5py.File(found, "r", locking=False) as right:
        yield from _compare_values(dict(left.attrs), dict(right.attrs), "attribute ")
        yield from _compare_values(*({name: list(f[name]) if f[name].dtype.hasobject else f[name][...] for name in f}
                                     for f in (left, right)), "data set ")  # fmt: skip


def _compare_values(left: Any, right: Any, where: str = "") -> Iterator[str]:
    if type(left) is not type(right):
        yield f"{where}: {type(right).__name__}, not {type(left).__name__}"
    elif isinstance(left, Mapping):
        passed = WALL_TIMES | PER_START
        for key in sorted({str(key) for key in [*left, *right]} - passed):
            missing = [side for side in (left, right) if not any(str(name) == key for name in side)]
            if missing:
                yield f"{where}{key}: only in one of them"
                continue
            one, other = ({str(name): value for name, value in side.items()}[key] for side in (left, right))
            yield from _compare_values(one, other, f"{where}{key}.")
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            yield f"{where}: {len(right)} entries, not {len(left)}"
        for number, (one, other) in enumerate(zip(left, right, strict=False)):
            yield from _compare_values(one, other, f"{where}{number}.")
    elif not _equal(left, right):
        yield f"{where.removesuffix('.')}: another value"


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        same = left.dtype == right.dtype and left.shape == right.shape
        return same and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows for a folder of event files: steps and values per name, without wall times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports what it leaves out, as expected
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = [tag for tag in events.Tags()["scalars"] if tag.rpartition("/")[2] not in WALL_TIMES]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}
