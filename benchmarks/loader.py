"""Images per second of the loaders of stage one and of the joint net, without training, by number of processes.

    python benchmarks/loader.py --json FILE

Frames are simulated noise of the real size (250x250, lossless WebP, in the project's frame cache). They compress worse
than real frames, so the figures are conservative. `--real FOLDER` uses JPEG or PNG files instead.

- `images_per_s`, `clips_per_s` (clips of 10 frames): by number of processes (0: in the training process itself).
- `device_images_per_s`: mirroring, colour changes and normalisation of whole batches on this CPU, one thread per core.
- `train_step_images_per_s`: forward and backward pass of ResNet50 in fp32 on this CPU.
- `gpu_needs_images_per_s`: an assumption, not a measurement: 1,300, the rate at which a data-centre GPU might train
  ResNet50 at 224x224 in bf16.
- `processes_for_gpu`: the number of loader processes needed for this rate, computed from the rate of one process.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command import PROJECT, options, say

sys.path.insert(0, str(PROJECT))
RESIZE_PX, CROP_PX, BATCH, CLIP = 250, 224, 64, 10
GPU_NEEDS = 1300


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__, repeat=None)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes")
    parser.add_argument("--batches", type=int, default=12, help="batches of 64 frames per figure")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="images to load instead of noise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), given.workers, given.batches, given.real)
    say(figures, given.json)


def measure(folder: Path, workers: Sequence[int], batches: int, real: Path | None) -> dict[str, object]:
    """Measure all figures."""
    from configs.schema import AugmentConfig, SequenceConfig
    from stage1_cnn.data import ClipDataset, Request
    from stage2_temporal.data import Span
    from stage2_temporal.joint.data import clip_requests

    frames, source = cached_frames(folder, real)
    augment = AugmentConfig(brightness=0.2, contrast=0.2, saturation=0.2)
    dataset = ClipDataset({"train": frames}, CROP_PX, augment, 0)
    rows = np.random.default_rng(0).integers(0, len(frames), (batches + 2 * max(1, *workers), BATCH))
    requests = [Request.of_frames("train", 0, batch) for batch in rows.tolist()]
    sequence = SequenceConfig(mode="clips", frames=CLIP, batch=BATCH // CLIP, inference="clip")
    in_clips = clip_requests([Span(0, len(frames))], sequence, 0, 0, None)[: len(requests)]
    images = {str(count): round(rate(dataset, requests, count), 1) for count in workers}
    found = {str(count): round(rate(dataset, in_clips, count), 1) for count in workers}
    alone = images.get("1") or images[str(workers[0])]
    return {
        "images_per_s": images,
        "clips_per_s": found,
        "device_images_per_s": round(device_rate(dataset[requests[0]]), 1),
        "train_step_images_per_s": round(step_rate(dataset[requests[0]]), 1),
        "gpu_needs_images_per_s": GPU_NEEDS,
        "processes_for_gpu": round(GPU_NEEDS / alone, 1),
        "frames": source,
        "batch_frames": BATCH,
    }


def cached_frames(folder: Path, real: Path | None) -> tuple[Any, str]:
    """200 frames in the project's frame cache, and a description of them."""
    from features.frames.cache import CachedFrames
    from stage1_cnn.data import LabelledFrames

    images = real_images(real) if real else noise()
    path = folder / "video01.h5"
    write_cache(path, images)
    count = len(images)
    labels = np.zeros(count, np.int8), np.zeros((count, 7), np.int8)
    frames = LabelledFrames(("video01",), (CachedFrames(path),), np.zeros(count, np.int64), np.arange(count), *labels)
    return frames, f"{count} images of {real.name}" if real else f"{count} simulated"


def real_images(folder: Path) -> list[np.ndarray]:
    """Up to 200 images from below a folder, resized in the same way as in the project."""
    from PIL import Image

    from features.frames.preprocess import Geometry

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:200]
    if not files:
        sys.exit(f"{folder}: no JPEG or PNG files below it")
    return [Geometry(RESIZE_PX).resize_frame(np.array(Image.open(path).convert("RGB"))) for path in files]


def noise(count: int = 200) -> list[np.ndarray]:
    """Simulated frames: blurred noise with grain, which compresses no better than laparoscopic frames."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        coarse = rng.integers(20, 220, (26, 26, 3)).repeat(10, axis=0).repeat(10, axis=1)[:RESIZE_PX, :RESIZE_PX]
        images.append((coarse + rng.integers(-3, 4, coarse.shape)).astype(np.uint8))
    return images


def write_cache(path: Path, images: Sequence[np.ndarray]) -> None:
    """Write a cache file in the format of `train-cnn`, with only what is needed to read frames."""
    import io
    import zlib

    import h5py
    from PIL import Image

    blobs = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, format="WEBP", lossless=True, method=0, quality=0)
        blobs.append(stream.getvalue())
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("blobs", (len(blobs),), dtype=h5py.vlen_dtype(np.uint8))
        for number, blob in enumerate(blobs):
            stored[number] = np.frombuffer(blob, np.uint8)
        file["crc32"] = np.array([zlib.crc32(blob) for blob in blobs], np.uint32)
        file["frame_index"] = np.arange(len(blobs), dtype=np.int64)


def rate(dataset: Any, requests: Sequence[Any], workers: int) -> float:
    """Images or clips per second of a loader, not counting the batches that were prefetched while it started."""
    import torch

    from engine.stopping import StopRequest
    from stage1_cnn.data import PREFETCH_BATCHES, FrameLoader

    warm = max(1, PREFETCH_BATCHES * workers)
    with FrameLoader(dataset, workers, torch.device("cpu"), StopRequest()) as loader:
        batches = loader.batches(requests)
        for _ in range(warm):
            next(batches)
        started = time.perf_counter()
        delivered = sum(len(batch.first) for batch in batches)
        return delivered / (time.perf_counter() - started)


def device_rate(batch: Any, repeat: int = 5) -> float:
    """How many images per second are mirrored, changed in colour and normalised; the median."""
    import torch

    from configs.schema import PreprocessConfig

    def once() -> None:
        batch.inputs(PreprocessConfig(), torch.device("cpu"))

    return len(batch.images) / median_s(once, repeat)


def step_rate(batch: Any, repeat: int = 3) -> float:
    """Images per second of the forward and backward pass of ResNet50, fp32, channels last; the median."""
    import torch
    from torchvision.models import resnet50

    from configs.schema import PreprocessConfig

    net = resnet50(weights=None).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = batch.inputs(PreprocessConfig(), torch.device("cpu"))[:16]

    def once() -> None:
        net(images).square().mean().backward()
        net.zero_grad()

    return len(images) / median_s(once, repeat)


def median_s(work: Any, repeat: int) -> float:
    """The median time of a call of `work`, in seconds, after a first call that does not count."""
    work()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
