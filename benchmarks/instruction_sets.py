"""Whether two kinds of CPU extract the same features: this one, and the same limited to AVX2.

    python benchmarks/instruction_sets.py --json FILE

The command `extract` runs on the real clips at `SURGSTAGE_SHARED` (by default `shared` beside the checkout), or on a
simulated video, with random ResNet50 weights: once with the CPU's own instruction set and once limited to AVX2
(`ONEDNN_MAX_CPU_ISA`, `ATEN_CPU_CAPABILITY`; OpenVINO computes with oneDNN too). It does so with torch in the precision
that each kind chooses itself, and with OpenVINO in int8 if it is installed. `*_cosine_mean` and `*_cosine_worst` are
the cosine similarities of the two features of a frame, over all frames. `input` says which videos were used.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import h5py
import numpy as np
from command import options, pipeline, say
from extract import CONFIG, INT8, data_set, extraction_settings, random_weights, source_videos

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    given = options(__doc__, repeat=None).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos, kind = source_videos(folder)
        weights, root = random_weights(folder / "resnet50.pth"), data_set(folder / "data", videos, 1)
        figures: dict[str, object] = {}
        for engine, settings in {"torch": (), "int8": INT8}.items():
            own = features(folder / f"{engine}-own", root, weights, settings, {})
            limited = features(folder / f"{engine}-avx2", root, weights, settings, AVX2)
            cosine = similarity(own, limited)
            figures |= {f"{engine}_cosine_mean": cosine.mean(), f"{engine}_cosine_worst": cosine.min()}
    rounded = {key: round(float(value), 6) for key, value in figures.items()}  # type: ignore[arg-type]
    say({**rounded, "frames": len(cosine), "input": kind}, given.json)


def features(
    out: Path, root: Path, weights: Path, settings: tuple[str, ...], variables: dict[str, str]
) -> dict[str, np.ndarray]:
    """Extract with these environment variables; returns the features (T, D) of each video."""
    os.environ.update(variables)
    try:
        chosen = [*extraction_settings(out, root, weights), *settings]
        pipeline("index", CONFIG, None, chosen)
        pipeline("extract", CONFIG, "kinds", chosen)
    finally:
        for name in variables:
            del os.environ[name]
    found = {}
    for path in sorted(out.rglob("video*.h5")):
        with h5py.File(path, "r") as file:
            found[path.name] = file["features"][:].astype(np.float64)
    return found


def similarity(own: dict[str, np.ndarray], limited: dict[str, np.ndarray]) -> np.ndarray:
    """The cosine similarity (T,) of the features of each frame of all videos."""
    one, other = (np.concatenate([side[name] for name in sorted(own)]) for side in (own, limited))
    products = (one * other).sum(axis=1)
    return products / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


if __name__ == "__main__":
    main()
