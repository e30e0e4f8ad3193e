"""The time of writing and reading feature files compared with plain files: 38 minutes at 1 fps, (2300, 2048) float16.

    python benchmarks/store.py --json FILE

Three formats are compared, each in every round, when the files are in the disk cache. `store` is this project's format:
chunks with checksums and a seal, read back after writing, and renamed when complete. `npy` is numpy.save and
numpy.load. `h5py` has the same chunks and checksums, but no seal, and is not read back. Every file is flushed to the
disk (fsync).
The figures are the medians `<format>_write_ms`, `<format>_read_ms`, `<format>_write_mb_per_s` and
`<format>_read_mb_per_s`; they count the features only, and MB are 10^6 bytes.

`cache_find_ms` is the time to open a frame cache file of 2,300 frames of 50 kB (random bytes, `cache_mb` in total),
most of which goes into the checksum of the whole file. `cache_find_unsealed_ms` is the time without this checksum.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import h5py
import numpy as np
from command import PROJECT, options, say

sys.path.insert(0, str(PROJECT))
if TYPE_CHECKING:
    from features.frames.cache import CacheRequest, FrameCache
SHAPE, CHUNK_FRAMES, FRAME_BYTES = (2300, 2048), 256, 50_000
Way = tuple[Callable[[Path, np.ndarray], None], Callable[[Path], np.ndarray]]


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__, repeat=15)
    parser.add_argument("--folder", type=Path, help="measure the disk of this folder; default: that of temporary files")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        figures = measure(Path(folder), given.repeat)
    say(figures, given.json)


def measure(folder: Path, repeat: int) -> dict[str, object]:
    """Measure all figures; the first round fills the disk cache and does not count."""
    features = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)
    ways: dict[str, Way] = {
        "store": (write_store, read_store),
        "npy": (write_npy, np.load),
        "h5py": (write_h5py, read_h5py),
    }
    seconds: dict[str, list[float]] = {}
    for number in range(repeat + 1):
        for name, (write, read) in ways.items():
            path = folder / f"{name}{number}.{'npy' if name == 'npy' else 'h5'}"
            started = time.perf_counter()
            write(path, features)
            written = time.perf_counter()
            found = read(path)
            done = time.perf_counter()
            assert np.array_equal(found, features), name
            path.unlink()
            if number:
                seconds.setdefault(f"{name}_write", []).append(written - started)
                seconds.setdefault(f"{name}_read", []).append(done - written)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures: dict[str, object] = {f"{name}_ms": round(1000 * value, 2) for name, value in medians.items()}
    figures |= {f"{name}_mb_per_s": round(features.nbytes / 1e6 / value) for name, value in medians.items()}
    figures |= {"mb": round(features.nbytes / 1e6, 2), "shape": SHAPE, "repeat": repeat}
    return figures | measure_cache(folder, repeat)


def measure_cache(folder: Path, repeat: int) -> dict[str, object]:
    """Measure opening a cache file as long as an operation, with and without verifying its seal."""
    from features import sealed_hdf5 as module
    from features.frames.cache import FrameCache

    blob = np.random.default_rng(0).bytes(FRAME_BYTES)
    cache, request = _cache(folder), _request(folder)
    with patch.object(FrameCache, "_encoded", lambda self, rgb: blob):
        cache.ensure(request)
    path = cache.path("video01")
    seconds: dict[str, list[float]] = {"cache_find": [], "cache_find_unsealed": []}
    for number in range(repeat + 1):
        for name, look in (("cache_find", module.broken_seal), ("cache_find_unsealed", lambda path: None)):
            with patch.object(module, "broken_seal", look):
                started = time.perf_counter()
                assert cache.find(request) is not None
            if number:
                seconds[name].append(time.perf_counter() - started)
    figures: dict[str, object] = {f"{name}_ms": round(1000 * statistics.median(v), 2) for name, v in seconds.items()}
    return figures | {"cache_mb": round(path.stat().st_size / 1e6, 1)}


def _cache(folder: Path) -> FrameCache:
    from configs.schema import CacheConfig, PreprocessConfig
    from features.frames.cache import FrameCache

    return FrameCache(CacheConfig(dir=folder / "cache"), PreprocessConfig(), 1.0)


def _request(folder: Path) -> CacheRequest:
    """A request for the frames of an operation, all of which are the same small image."""
    from features.frames.cache import CacheRequest
    from features.store import SourceIdentity

    class OneImage:
        """A reader that returns the same image for every frame."""

        name, version, width_px, height_px, frame_count, fps = "none", "0", 64, 48, 25 * SHAPE[0], 25.0

        def __enter__(self) -> OneImage:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def read(self, wanted: list[int]) -> Iterator[np.ndarray]:
            return (np.zeros((48, 64, 3), np.uint8) for _ in wanted)

    index = np.arange(SHAPE[0], dtype=np.int64) * 25
    return CacheRequest(SourceIdentity("video01", "0" * 64, 1, 25.0), index, OneImage)  # type: ignore[arg-type]


def write_store(path: Path, features: np.ndarray) -> None:
    """Write features in the way of `extract`, from float32 blocks of 32 frames."""
    from features.store import EncoderSpec, SourceIdentity, write_features

    encoder = EncoderSpec("resnet50", "0" * 64, {}, 1.0, "fp32", "float16", SHAPE[1])
    source = SourceIdentity("video01", "0" * 64, 1, 25.0)
    phase, tools = np.zeros(len(features), np.int8), np.zeros((len(features), 7), np.int8)
    index = np.arange(len(features), dtype=np.int64) * 25
    with write_features(path, encoder, source, index, phase, tools, {}) as writer:
        for start in range(0, len(features), 32):
            block = features[start : start + 32]
            writer.append(block.astype(np.float32), np.zeros((len(block), 7), np.float32))


def read_store(path: Path) -> np.ndarray:
    """Read features in the way of `train-temporal`."""
    from features.store import read_features

    return read_features(path).features


def write_npy(path: Path, features: np.ndarray) -> None:
    """Write features with numpy.save."""
    with path.open("wb") as stream:
        np.save(stream, features)
        stream.flush()
        os.fsync(stream.fileno())


def write_h5py(path: Path, features: np.ndarray) -> None:
    """Write features with h5py, in chunks with checksums, and do nothing else."""
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features, chunks=(CHUNK_FRAMES, SHAPE[1]), fletcher32=True)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def read_h5py(path: Path) -> np.ndarray:
    """Read all features with h5py."""
    with h5py.File(path, "r") as file:
        found: np.ndarray = file["features"][...]
    return found


if __name__ == "__main__":
    main()
