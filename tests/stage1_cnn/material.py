"""A data set so small that stage one trains on it in a second: colours show the tools, brightness shows the phase."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.dataset_spec import DataSetSpec, FilePatterns
from configs.schema import (
    CacheConfig,
    CnnConfig,
    Config,
    DataConfig,
    ExtractConfig,
    OptimConfig,
    PreprocessConfig,
    SplitConfig,
)
from engine.stopping import StopRequest
from features.dataset.annotations import LabelTrack
from features.dataset.build import build_index
from features.dataset.formats.cholec80 import write_label_file
from features.dataset.index import Dataset, Index
from tests.videos import VideoSpec, write_video

FRAMES = 65  # 13 samples at 5 fps: a batch of 4 leaves one over
STRIDE = 5
SPEC = DataSetSpec(
    name="tiny",
    annotation_fps=25,
    phases=("open", "cut", "close"),
    tools=("Grasper", "Hook"),
    patterns=FilePatterns(
        video=r"video(?P<id>\d+)\.mp4",
        frames=r"frames(?P<id>\d+)",
        frame=r"(?P<frame>\d+)\.png",
        phase=r"video(?P<id>\d+)-phase\.txt",
        tool=r"video(?P<id>\d+)-tool\.txt",
    ),
)


def tools_at(number: int) -> tuple[int, int]:
    return int(number // 10 % 2), int(number // 20 % 2)


def phase_at(number: int) -> int:
    return min(number * 3 // FRAMES, 2)


def paint(number: int, width_px: int, height_px: int) -> np.ndarray:
    """Red for one tool, blue for the other, brighter from phase to phase, and a texture that moves."""
    first, second = tools_at(number)
    y, x = np.mgrid[:height_px, :width_px]
    texture = (3 * x + 5 * y + 7 * number) % 32
    level = 40 * phase_at(number)
    colour = np.array([120 * first, level, 120 * second])
    return (colour + texture[..., None]).clip(0, 255).astype(np.uint8)


def write_labels(root: Path, number: int, tools: bool = True, phases: bool = True) -> None:
    """Annotations of one video: tools at every 5th frame, phases at every frame."""
    if tools:
        index = np.arange(0, FRAMES, STRIDE)
        rows = np.array([tools_at(frame) for frame in index], dtype=np.int8)
        write_label_file(root / f"video{number:02d}-tool.txt", LabelTrack(index, rows, STRIDE), SPEC)
    if phases:
        index = np.arange(FRAMES)
        rows = np.array([phase_at(frame) for frame in index], dtype=np.int8)
        write_label_file(root / f"video{number:02d}-phase.txt", LabelTrack(index, rows, 1), SPEC)


def write_dataset(root: Path, count: int = 4) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        write_video(root / f"video{number:02d}.mp4", VideoSpec(count=FRAMES, width_px=64, height_px=48, paint=paint))
        write_labels(root, number)
    return root


@dataclass(frozen=True)
class World:
    """A data set, its index and settings that fit it, everything below one folder."""

    base: Path
    root: Path
    config: Config

    @property
    def run(self) -> Path:
        return self.config.runs / "first"

    def index(self) -> Index:
        return build_index(self.root, SPEC, self.config.data)

    def dataset(self, index: Index | None = None) -> Dataset:
        """The data set with this index, by default its own."""
        return Dataset(index or self.index(), self.root)

    def set(self, **blocks: dict[str, object]) -> Config:
        """The settings with some values of some blocks changed; `top` holds those outside any block."""
        changed = self.config.model_dump()
        for block, values in blocks.items():
            (changed if block == "top" else changed[block]).update(values)
        return Config.model_validate(changed)


def make_world(base: Path, root: Path) -> World:
    config = Config(
        device="cpu",
        runs=base / "runs",
        data=DataConfig(root=root, index=base / "index.json", fps=5, split=SplitConfig(rule="2/1/1")),
        preprocess=PreprocessConfig(resize_px=40, crop_px=32),
        cache=CacheConfig(dir=base / "frames"),
        cnn=CnnConfig(
            backbone="shufflenet_v2_x0_5",
            weights="random",
            epochs=2,
            batch_frames=4,
            precision="fp32",
            workers=0,
            optim=OptimConfig(lr=3e-3),
            backbone_lr_factor=1.0,
        ),
        extract=ExtractConfig(store=base / "features", precision="fp32", storage="float32", batch_frames=4, workers=1),
    )
    return World(base, root, config)


class StopAfter(StopRequest):
    """A signal that arrives after `times` polls."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def poll(self) -> int | None:
        self.left -= 1
        if self.left < 0:
            self.number = signal.SIGTERM
        return super().poll()


def truncate(path: Path, share: float) -> None:
    """Keep the first `share` of the file's bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip_bytes(path: Path, at_share: float, count: int = 64) -> None:
    """Damage `count` bytes somewhere inside."""
    content = bytearray(path.read_bytes())
    start = int(len(content) * at_share)
    content[start : start + count] = bytes(byte ^ 0x5A for byte in content[start : start + count])
    path.write_bytes(bytes(content))
