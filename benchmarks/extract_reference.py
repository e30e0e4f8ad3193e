"""The programs that `benchmarks/extract.py` compares with: plain loops that import nothing from the project.

    python benchmarks/extract_reference.py decode|forward|usual|features ARGUMENTS

Each program prints `ready` when it is set up, waits for a line of input, runs, and prints its figures as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

EVERY = 25
# The forward pass is fastest with few frames at a time on some machines and with more on others; the faster one counts.
FORWARD_BATCHES, FORWARD_FRAMES = (8, 32), 64
MEAN, STD = (0.3456, 0.2281, 0.2233), (0.2528, 0.2135, 0.2104)


def wait_for_start() -> None:
    """Print `ready` and wait for a line of input, so that all processes start together."""
    print("ready", flush=True)
    sys.stdin.readline()


def processor_seconds() -> float:
    """The user and system time, in seconds, of this process and of its child processes that have ended."""
    return sum(os.times()[:4])


def decode(paths: list[str]) -> dict[str, float]:
    """Decode every 25th frame to full-size RGB with one thread, skipping frames to which no other frame refers."""
    wait_for_start()
    started, before, count = time.perf_counter(), processor_seconds(), 0
    for path in paths:
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_type = "NONE"
            step = round(1 / stream.average_rate / stream.time_base)
            for packet in container.demux(stream):
                wanted = packet.pts is None or round(packet.pts / step) % EVERY == 0
                stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"
                for frame in packet.decode():
                    if round(frame.pts / step) % EVERY == 0:
                        frame.to_ndarray(format="rgb24")
                        count += 1
    return figures(count, started, before)


def figures(frames: int, started: float, before: float) -> dict[str, float]:
    """The figures to print: the number of frames, and wall time and processor time since the start, in seconds."""
    return {
        "frames": frames,
        "seconds": time.perf_counter() - started,
        "processor_seconds": processor_seconds() - before,
    }


def resnet50(weights: str) -> torch.nn.Module:
    """ResNet50 without its classifier, in fp32."""
    net = torchvision.models.resnet50(weights=None)
    net.fc = torch.nn.Identity()
    net.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    return net.eval()


def fold(net: torch.nn.Module) -> torch.nn.Module:
    """Fold the batch norms of a ResNet50 into the convolutions before them."""
    fuse = torch.nn.utils.fusion.fuse_conv_bn_eval
    for block in [net, *(m for m in net.modules() if isinstance(m, torchvision.models.resnet.Bottleneck))]:
        for number in (1, 2, 3):
            if hasattr(block, f"conv{number}"):
                setattr(block, f"conv{number}", fuse(getattr(block, f"conv{number}"), getattr(block, f"bn{number}")))
                setattr(block, f"bn{number}", torch.nn.Identity())
        if getattr(block, "downsample", None) is not None:
            block.downsample = fuse(*block.downsample)
    return net


def forward(precision: str, weights: str) -> dict[str, float]:
    """Run images through the folded network (channels last, one thread) with the batch size that is fastest."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    return time_batches(fold(resnet50(weights)).to(dtype).to(memory_format=torch.channels_last), dtype)


def time_batches(net: torch.nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """The figures of the network alone, with the batch size that is fastest."""
    torch.set_num_threads(1)
    batch = torch.randn(max(FORWARD_BATCHES), 3, 224, 224).to(dtype)
    with torch.inference_mode():
        return time_calls(net, [batch[:size].contiguous(memory_format=torch.channels_last) for size in FORWARD_BATCHES])


def time_calls(net: Callable[[torch.Tensor], object], batches: Sequence[torch.Tensor]) -> dict[str, float]:
    """Run `FORWARD_FRAMES` frames in batches like each of `batches`; returns the figures of the fastest."""
    found = []
    net(batches[-1])
    wait_for_start()
    for images in batches:
        net(images)
        started, before = time.perf_counter(), processor_seconds()
        for _ in range(FORWARD_FRAMES // len(images)):
            net(images)
        found.append(figures(FORWARD_FRAMES, started, before))
    return min(found, key=lambda one: one["processor_seconds"])


class JpegFiles(Dataset):
    """A data set of JPEG files, read in the usual way: open, centre crop, convert to a tensor, normalise."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.prepare = torchvision.transforms.Compose(
            [
                torchvision.transforms.CenterCrop(224),
                torchvision.transforms.ToTensor(),
                torchvision.transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.paths[number]) as image:
            return self.prepare(image.convert("RGB"))


def usual(weights: str, *paths: str) -> dict[str, float]:
    """Decode to JPEG files of 250x250 with all cores; then run the net in fp32 on a DataLoader with two workers."""
    net = resnet50(weights)
    wait_for_start()
    started, before = time.perf_counter(), processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for path in paths:
            with av.open(path) as container:
                container.streams.video[0].thread_type = "AUTO"
                for number, frame in enumerate(container.decode(video=0)):
                    if number % EVERY == 0:
                        files.append(Path(folder) / f"{len(files):06d}.jpg")
                        small = Image.fromarray(frame.to_ndarray(format="rgb24")).resize((250, 250))
                        small.save(files[-1], quality=95)
        decoded = time.perf_counter()
        with torch.inference_mode():
            for images in DataLoader(JpegFiles(files), batch_size=32, num_workers=2):
                net(images).numpy()
    return {**figures(len(files), started, before), "jpeg_seconds": decoded - started}


def features(weights: str, target: str, *paths: str) -> dict[str, float]:
    """Write the fp32 embeddings of every 25th frame of each video to an .npz file; every frame is decoded.

    The names of the arrays are those of the videos.
    """
    net = resnet50(weights)
    wait_for_start()
    started, before = time.perf_counter(), processor_seconds()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    found = {}
    for path in paths:
        images = []
        with av.open(path) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % EVERY == 0:
                    image = Image.fromarray(frame.to_ndarray(format="rgb24")).resize((250, 250), Image.BILINEAR)
                    pixels = torch.from_numpy(np.array(image)[13:237, 13:237]).permute(2, 0, 1)
                    images.append((pixels.float() / 255 - mean) / std)
        with torch.inference_mode():
            found[Path(path).stem] = torch.cat(
                [net(torch.stack(images[i : i + 32])) for i in range(0, len(images), 32)]
            )
    np.savez(target, **{name: value.numpy() for name, value in found.items()})
    return figures(sum(map(len, found.values())), started, before)


if __name__ == "__main__":
    what, arguments = sys.argv[1], sys.argv[2:]
    sides = {"decode": lambda *paths: decode(list(paths)), "forward": forward, "usual": usual, "features": features}
    print(json.dumps(sides[what](*arguments)))
