"""The programs that `benchmarks/temporal.py` compares with: plain loops that import nothing from the project.

    python benchmarks/temporal_reference.py lstm|clips|product|end-to-end

Each program uses random data and all cores, and prints its figure as JSON: labelled frames per second or, for
`product`, GFLOP/s in fp32.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, PHASES, TOOLS, CLIP = 2048, 512, 7, 7, 10


class Lstm(nn.Module):
    """A net of nn.LSTM and a linear layer, in the usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, HIDDEN, batch_first=True)
        self.fc = nn.Linear(HIDDEN, PHASES)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, T, D) -> phase logits (B, T, C)."""
        return self.fc(self.lstm(x)[0])  # type: ignore[no-any-return]


class EndToEnd(nn.Module):
    """A net like MTRCNet: ResNet50, with tools recognised in each frame and phases by an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet50

        self.share = resnet50(weights=None)
        self.share.fc = nn.Identity()
        self.phase, self.tool = Lstm(), nn.Linear(WIDTH, TOOLS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, T, 3, S, S) -> logits of phases (B, T, C) and of tools (B, T, K)."""
        flat = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = self.share(flat).unflatten(0, images.shape[:2])
        return self.phase(x), self.tool(x)


def lstm() -> float:
    """The speed for batches of 8 sequences of 1,000 frames, without padding."""
    return sequences(8, 1000, steps=4)


def clips() -> float:
    """The speed for clips of 10 frames, 800 per batch. One frame per clip counts, as with stride 1."""
    return sequences(800, CLIP, steps=4) / CLIP


def sequences(batch: int, frames: int, steps: int) -> float:
    """Frames per second of forward pass, cross-entropy, backward pass and a step of SGD in fp32, from fp32 features."""
    model = Lstm()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, phase = torch.randn(batch, frames, WIDTH), torch.randint(PHASES, (batch, frames))

    def once() -> None:
        F.cross_entropy(model(x).flatten(0, 1), phase.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return batch * frames * steps / seconds(once, steps)


def product() -> float:
    """GFLOP/s of the fp32 product of 4,096 rows and the LSTM's weights, by MKL or oneDNN, whichever is faster."""
    x, weights = torch.randn(4096, WIDTH), torch.randn(4 * HIDDEN, WIDTH)
    ways: list[Callable[[], object]] = [lambda: F.linear(x, weights)]
    if torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, weights, None, "none", [], ""))
    return 2 * 4096 * WIDTH * 4 * HIDDEN * 10 / min(seconds(way, 10) for way in ways) / 1e9


def end_to_end() -> float:
    """Frames per second for images of 224x224 in clips of 10, 2 clips per batch, fp32, channels last.

    Every frame of a clip counts once.
    """
    model = EndToEnd().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(2, CLIP, 3, 224, 224)
    phase, tools = torch.randint(PHASES, (2, CLIP)), torch.randint(2, (2, CLIP, TOOLS)).float()

    def once() -> None:
        phases, present = model(images)
        loss = F.cross_entropy(phases.flatten(0, 1), phase.flatten())
        (loss + F.binary_cross_entropy_with_logits(present, tools)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return 2 * CLIP * 2 / seconds(once, 2)


def seconds(work: Callable[[], object], times: int) -> float:
    """The time of `times` calls of `work`, in seconds, after a first call that does not count."""
    work()
    started = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - started


if __name__ == "__main__":
    torch.manual_seed(0)
    sides = {"lstm": lstm, "clips": clips, "product": product, "end-to-end": end_to_end}
    print(json.dumps(sides[sys.argv[1]]()))
