"""Frames for stage one: labelled samples from the frame cache, their order in an epoch, augmentation, loading.

Loader processes decode, draw and crop; mirroring, colour changes and normalisation run on the device, on whole batches.
The batch of a step is a function of (seed, epoch, step) alone: resuming needs no history, and the number of loader
processes changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from configs.errors import UserError
from configs.schema import AugmentConfig, Config
from engine.launch import available_cores
from engine.pool import failure_reason, serve_parent
from engine.session import epoch_generator
from engine.stopping import Stopped, StopRequest
from features.dataset.index import Index, VideoEntry
from features.dataset.labels import load_labels
from features.dataset.sampling import sampled_frames
from features.frames.cache import CachedFrames
from features.frames.preprocess import augment_generator, changes_colour, crop_frames, draw_change
from features.frames.source import frame_cache

PREFETCH_BATCHES = 2
MOST_WORKERS = 8
_WORKER_DIED = re.compile(r"DataLoader worker \(pid")
AnyBatch = TypeVar("AnyBatch")


@dataclass(frozen=True)
class LabelledFrames:
    """Samples of some videos that have a label, R of them; row r is sample `sample[r]` of video `videos[video[r]]`."""

    videos: tuple[str, ...]
    caches: tuple[CachedFrames, ...]
    video: NDArray[np.int64]  # (R,)
    sample: NDArray[np.int64]  # (R,)
    phase: NDArray[np.int8]  # (R,) -1 = no label
    tools: NDArray[np.int8]  # (R, K) -1 = no label

    def __len__(self) -> int:
        return len(self.video)

    def name(self, row: int) -> str:
        """The video and frame of a row, for messages."""
        video = int(self.video[row])
        return f"{self.videos[video]}, frame {int(self.caches[video].frame_index[self.sample[row]])}"


class Request(NamedTuple):
    """One batch to make: rows of a split; `epoch` seeds the augmentation, None means none.

    Without `counts` its frames have no labels: a process without a part in a step computes but learns nothing.
    """

    split: str
    epoch: int | None
    rows: tuple[int, ...]
    counts: bool = True

    def share(self, rank: int, count: int) -> Request:
        """The part of process `rank` of `count`.

        Parts of a single frame are avoided if possible, since batch norm cannot learn from one: a small last batch
        goes to fewer processes. Those without a part get rank 0's rows, which do not count.
        """
        parts = min(count, max(1, len(self.rows) // 2)) if len(self.rows) < 2 * count else count
        place = rank if rank < parts else 0
        return self._replace(rows=self.rows[place::parts], counts=rank < parts)


class FrameBatch(NamedTuple):
    """N frames and their labels."""

    images: Tensor  # (N, S, S, 3) uint8, cropped
    phase: Tensor  # (N,) int64, -1 = no label
    tools: Tensor  # (N, K) float32, -1 = no label
    rows: Tensor  # (N,) int64
    flip: Tensor  # (N,) bool, still to be mirrored
    colour: Tensor  # (N, 3) float32, factors still to be applied; (0, 3) = none


def labelled_frames(
    config: Config,
    index: Index,
    root: Path,
    entries: Sequence[VideoEntry],
    with_phases: bool,
    every_frame: bool = False,
) -> LabelledFrames:
    """All samples of `entries` with a tool label or, `with_phases`, a phase label; their frames need not be cached yet.

    `every_frame` keeps the others too, for clips without gaps. Raises UserError naming the video whose labels cannot be
    read.
    """
    tools = np.zeros((0, len(index.dataset.tools)), dtype=np.int8)
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int8), tools)]
    for number, entry in enumerate(entries):
        frame_index = sampled_frames(entry, config.data.fps)
        phase, tools = load_labels(entry, root, index, frame_index, config.data.tools_between_rows)
        usable = np.flatnonzero((tools >= 0).any(axis=1) | ((phase >= 0) & with_phases) | every_frame)
        parts.append((np.full(len(usable), number), usable, phase[usable], tools[usable]))
    video, sample, phase, tools = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    cache = frame_cache(config)
    caches = tuple(CachedFrames(cache.path(entry.id)) for entry in entries)
    return LabelledFrames(tuple(entry.id for entry in entries), caches, video, sample, phase, tools)


# ---------------------------------------------------------------------------------------------- order


def training_requests(seed: int, epoch: int, frames: int, batch_frames: int, subset: int | None) -> list[Request]:
    """The epoch's batches: a permutation of all rows (or a random `subset`), cut every `batch_frames`.

    A single frame left over at the end is left out, since batch norm cannot learn from one.
    """
    order = torch.randperm(frames, generator=epoch_generator(seed, epoch))[: subset or frames].tolist()
    requests = [Request("train", epoch, rows) for rows in _cut(order, batch_frames)]
    single = batch_frames > 1 and len(requests) > 1 and len(requests[-1].rows) == 1
    return requests[:-1] if single else requests


def validation_requests(frames: int, batch_frames: int) -> list[Request]:
    """All rows of the validation videos, in order."""
    return [Request("val", None, rows) for rows in _cut(range(frames), batch_frames)]


def _cut(order: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    return (tuple(order[start : start + size]) for start in range(0, len(order), size))


# ---------------------------------------------------------------------------------------------- frames


class FrameDataset(Dataset):
    """Makes whole batches: `dataset[request]` is a FrameBatch, or the UserError that prevented it.

    Errors are returned as values because a loader process would wrap them into a traceback.
    """

    def __init__(self, splits: dict[str, LabelledFrames], crop_px: int, augment: AugmentConfig, seed: int) -> None:
        self.splits, self.crop_px, self.augment, self.seed = splits, crop_px, augment, seed

    def __getitem__(self, request: Request) -> FrameBatch | UserError:
        frames = self.splits[request.split]
        try:
            images, flip, colour = zip(*(self._image(frames, row, request.epoch) for row in request.rows), strict=True)
        except UserError as error:
            return error
        rows = np.array(request.rows, dtype=np.int64)
        phase, tools = frames.phase[rows].astype(np.int64), frames.tools[rows].astype(np.float32)
        if not request.counts:
            phase[:], tools[:] = -1, -1
        return FrameBatch(
            images=torch.from_numpy(np.stack(images)),
            phase=torch.from_numpy(phase),
            tools=torch.from_numpy(tools),
            rows=torch.from_numpy(rows),
            flip=torch.tensor(flip),
            colour=colour_factors(colour, self.augment, request.epoch is not None),
        )

    def _image(
        self, frames: LabelledFrames, row: int, epoch: int | None
    ) -> tuple[NDArray[np.uint8], bool, NDArray[np.float32]]:
        """The crop (S, S, 3), whether to mirror it, and colour factors (3,)."""
        image = frames.caches[frames.video[row]][int(frames.sample[row])][None]  # (1, R, R, 3)
        if epoch is None:
            return crop_frames(image, self.crop_px)[0, 0], False, np.ones(3, np.float32)
        generator = augment_generator(self.seed, epoch, row)
        draw = draw_change(generator, self.augment, image.shape[1], self.crop_px)
        return draw.crop(image, self.crop_px)[0], draw.flip, draw.colour


def colour_factors(drawn: Sequence[NDArray[np.float32]], config: AugmentConfig, training: bool) -> Tensor:
    """Factors (N, 3) in the form that a batch holds: (0, 3) if no colour changes."""
    return torch.from_numpy(np.stack(drawn)) if training and changes_colour(config) else torch.zeros(0, 3)


# ---------------------------------------------------------------------------------------------- loading


class FrameLoader(Generic[AnyBatch]):
    """Loads requests in order, ahead of time in `workers` processes, which live until the loader is closed.

    `dataset[request]` is a batch or the UserError that prevented it. `stop` is the training's stop request.
    """

    def __init__(self, dataset: Dataset, workers: int, device: torch.device, stop: StopRequest) -> None:
        self._stop = stop
        self._requests: list[Any] = []
        self._running: Generator[AnyBatch, None, None] | None = None
        options: dict[str, Any] = {}
        if workers:
            options = {
                # a fork would copy open decoders and files
                "multiprocessing_context": "spawn",
                "persistent_workers": True,
                "prefetch_factor": PREFETCH_BATCHES,
                "worker_init_fn": serve_parent,
            }
        self._loader: DataLoader | None = DataLoader(
            dataset,
            sampler=self._requests,
            batch_size=None,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            # without a generator of its own, a loader draws from the one that dropout uses
            generator=torch.Generator(),
            **options,
        )

    def batches(self, requests: Iterable[Any]) -> Iterator[AnyBatch]:
        """The batches of `requests`, one each. Raises UserError naming the frame that cannot be read."""
        self._requests[:] = requests
        self._running = self._batches()
        return self._running

    def _batches(self) -> Generator[AnyBatch, None, None]:
        assert self._loader is not None
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def close(self) -> None:
        """End the loader's processes, also while batches are still being read.

        torch has no public call for it. Without its private one the iterator's destructor ends them, which prints a
        traceback where a process has died.
        """
        if self._running is not None:
            self._running.close()
        shut_down = getattr(getattr(self._loader, "_iterator", None), "_shutdown_workers", None)
        if shut_down is not None:
            with suppress(RuntimeError):
                shut_down()
        self._running = self._loader = None

    def __enter__(self) -> FrameLoader[AnyBatch]:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raises UserError if a loader process died; Stopped where this one was asked to stop as well.

        torch raises an exception in whatever code runs at that moment; a process that died while it was sending a batch
        shows up as an error of the pipe first. A signal to the whole process group ends a loader process that has only
        just started and does not ignore signals yet: training then resumes from its last checkpoint, as after any
        other stop.
        """
        self.close()
        cut_off = isinstance(error, EOFError | ConnectionError)
        if error is not None and (cut_off or (isinstance(error, RuntimeError) and _WORKER_DIED.match(str(error)))):
            if self._stop.number is not None:
                raise Stopped(self._stop.number) from error
            raise UserError(
                f"{failure_reason(error)}: a process that loads frames died (out of memory or of /dev/shm, or killed); "
                "start again: it resumes from its last checkpoint; fewer workers or smaller batches need less memory"
            ) from error


def choose_workers(wanted: int, device: torch.device) -> int:
    """Loader processes for `cnn.workers`: -1 means none if the CPU itself trains, otherwise one per spare core."""
    if wanted >= 0:
        return wanted
    return 0 if device.type == "cpu" else min(MOST_WORKERS, max(1, available_cores() - 1))
