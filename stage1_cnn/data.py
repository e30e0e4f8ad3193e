"""Data for training on frames: labelled samples of the frame cache, their order in an epoch, augmentation, loading.

Every batch is a batch of clips; the single frames of stage one are clips of length 1. Loader processes decode the
cached frames, draw the random augmentation and crop. Mirroring, colour changes and normalisation run on the device, for
a whole batch at once. The batch of a step depends on (seed, epoch, step) alone. So a training resumes without a record
of earlier batches, and the number of loader processes does not change the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from configs.errors import UserError
from configs.schema import AugmentConfig, Config, PreprocessConfig, Size, height_width
from engine.launch import available_cores
from engine.pool import Shared, failure_reason, serve_parent
from engine.session import epoch_generator
from engine.stopping import Stopped, StopRequest
from features.dataset.index import Dataset, Index, VideoEntry
from features.dataset.labels import sampled_labels
from features.frames.cache import CachedFrames
from features.frames.preprocess import augment_generator, changed_images, changes_colour, draw_change
from features.frames.source import frame_cache
from features.video_labels import NO_LABEL
from stage1_cnn.decoding import end_processes

PREFETCH_BATCHES = 2
# One core loads about 370 to 700 cached frames/s. 16 cores load more than the fastest GPUs can train on.
MOST_WORKERS = 16
_WORKER_DIED = re.compile(r"DataLoader worker \(pid")
_CENTRE = AugmentConfig(crop="centre", flip=False)


@dataclass(frozen=True)
class LabelledFrames:
    """R labelled samples of several videos; row r is sample `sample[r]` of video `videos[video[r]]`."""

    videos: tuple[str, ...]
    caches: tuple[CachedFrames, ...]
    video: NDArray[np.int64]  # (R,)
    sample: NDArray[np.int64]  # (R,)
    phase: NDArray[np.int8]  # (R,) -1 = no label
    tools: NDArray[np.int8]  # (R, K) -1 = no label

    def __len__(self) -> int:
        return len(self.video)

    def name(self, row: int) -> str:
        """The video and frame number of a row, for messages."""
        video = int(self.video[row])
        return f"{self.videos[video]}, frame {int(self.caches[video].frame_index[self.sample[row]])}"

    def start_of(self, batch: ClipBatch) -> Callable[[], str]:
        """A function that returns the name of the batch's first frame, for error messages.

        It keeps no reference to the batch, so the batch's memory can be freed.
        """
        what, row = "frame" if batch.images.shape[1] == 1 else "clip", int(batch.first[0])
        return lambda: f"first {what}: {self.name(row)}"


class Request(NamedTuple):
    """Which clips a batch contains; each clip is a range of consecutive rows of a split.

    Clip i begins at row `first[i]` and has `lengths[i]` rows. The row number `draws[i]` seeds its augmentation in
    `epoch`; if `epoch` is None, nothing is augmented. `fresh` and `counts` are explained in `ClipBatch`.
    """

    split: str
    epoch: int | None
    first: tuple[int, ...]
    lengths: tuple[int, ...]
    draws: tuple[int, ...]
    fresh: bool = True
    counts: bool = True

    @classmethod
    def of_frames(cls, split: str, epoch: int | None, rows: Sequence[int]) -> Request:
        """The request for a batch of single frames, each of which is augmented independently."""
        return cls(split, epoch, tuple(rows), (1,) * len(rows), tuple(rows))

    def share(self, rank: int, count: int, smallest: int = 1) -> Request:
        """The part of this batch for process `rank` of `count`: every `count`-th clip.

        A small last batch is shared among fewer processes, so that each part has at least `smallest` clips where
        possible (batch norm cannot learn from a single frame). The other processes repeat rank 0's part with
        `counts=False`. `stage2_temporal.data.Batch.share` does the same.
        """
        parts = min(count, max(1, len(self.first) // smallest))
        counts = rank < parts
        mine = slice(rank if counts else 0, None, parts)
        part = self._replace(first=self.first[mine], lengths=self.lengths[mine], draws=self.draws[mine])
        return part._replace(fresh=self.fresh or not counts, counts=counts)


class ClipBatch(NamedTuple):
    """B clips of up to T frames. Shorter clips are padded at the end with black frames without labels."""

    images: Tensor  # (B, T, S, S, 3) uint8, cropped
    phase: Tensor  # (B, T) int64, -1 = no label
    tools: Tensor  # (B, T, K) float32, -1 = no label
    lengths: Tensor  # (B,) int64
    first: Tensor  # (B,) int64, row of each clip's first frame
    flip: Tensor  # (B,) bool, True = the clip is still to be mirrored
    colour: Tensor  # (B, 3 or 4) float32, change of colours still to be applied; (0, 3) if they do not change
    fresh: bool  # True: the recurrent state starts at zero; False: clip i continues clip i of the previous batch
    counts: bool  # False: this process has no part in the step, so its frames have no labels and its state is dropped

    def inputs(self, config: PreprocessConfig, device: torch.device) -> Tensor:
        """The frames on the device, mirrored, colour-changed and normalised: (B T, 3, S, S) float32, channels last."""
        flip, colour = (
            part.to(device, non_blocking=True).repeat_interleave(self.images.shape[1], dim=0)
            for part in (self.flip, self.colour)
        )
        return changed_images(self.images.flatten(0, 1), flip, colour, config, device)

    def labels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The labels on the device: phases (B, T) and tools (B, T, K)."""
        return self.phase.to(device, non_blocking=True), self.tools.to(device, non_blocking=True)


def require_training_videos(config: Config, index: Index) -> None:
    """Raise UserError if the index has no training videos."""
    if not index.by_split("train"):
        raise UserError(f"{config.data.index}: no training videos; set data.split.rule and run index again")


def labelled_frames(
    config: Config, dataset: Dataset, entries: Sequence[VideoEntry], with_phases: bool, every_frame: bool = False
) -> LabelledFrames:
    """All samples of `entries` that have a tool label or, if `with_phases`, a phase label.

    With `every_frame`, samples without a label are kept as well, so that clips have no gaps. The frames need not be in
    the cache yet. Raises UserError naming the video whose labels cannot be read.
    """
    tools = np.zeros((0, len(dataset.spec.tools)), dtype=np.int8)
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int8), tools)]
    for number, entry in enumerate(entries):
        labels = sampled_labels(dataset, entry, config.data)
        usable = np.flatnonzero((labels.tools >= 0).any(axis=1) | ((labels.phase >= 0) & with_phases) | every_frame)
        parts.append((np.full(len(usable), number), usable, labels.phase[usable], labels.tools[usable]))
    video, sample, phase, tools = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    cache = frame_cache(config)
    caches = tuple(CachedFrames(cache.path(entry.id)) for entry in entries)
    return LabelledFrames(tuple(entry.id for entry in entries), caches, video, sample, phase, tools)


# ---------------------------------------------------------------------------------------------- order


def training_requests(seed: int, epoch: int, frames: int, batch_frames: int, subset: int | None) -> list[Request]:
    """The batches of an epoch: all rows (or `subset` random ones) in random order, `batch_frames` in each batch.

    If a single frame remains for the last batch, it is left out, since batch norm cannot learn from one frame.
    """
    order = torch.randperm(frames, generator=epoch_generator(seed, epoch))[: subset or frames].tolist()
    requests = _frame_requests("train", epoch, order, batch_frames)
    single = batch_frames > 1 and len(requests) > 1 and len(requests[-1].first) == 1
    return requests[:-1] if single else requests


def validation_requests(frames: int, batch_frames: int) -> list[Request]:
    """Batches of all rows of the validation videos, in order."""
    return _frame_requests("val", None, range(frames), batch_frames)


def _frame_requests(split: str, epoch: int | None, rows: Sequence[int], size: int) -> list[Request]:
    return [Request.of_frames(split, epoch, rows[start : start + size]) for start in range(0, len(rows), size)]


# ---------------------------------------------------------------------------------------------- frames


class ClipDataset(torch.utils.data.Dataset):
    """A data set whose items are whole batches: `dataset[request]` is a ClipBatch, or the UserError that prevented it.

    The error is returned and not raised, because a loader process would add a traceback to a raised one.
    """

    def __init__(self, splits: dict[str, LabelledFrames], crop_px: Size, augment: AugmentConfig, seed: int) -> None:
        self.splits, self.crop_px, self.augment, self.seed = splits, crop_px, augment, seed

    def __getitem__(self, request: Request) -> ClipBatch | UserError:
        frames = self.splits[request.split]
        augment = _CENTRE if request.epoch is None else self.augment
        shape = (len(request.first), max(request.lengths))
        images = np.zeros((*shape, *height_width(self.crop_px), 3), dtype=np.uint8)
        phase = np.full(shape, NO_LABEL, dtype=np.int64)
        tools = np.full((*shape, frames.tools.shape[1]), NO_LABEL, dtype=np.float32)
        drawn = []
        for n, (first, length, draw) in enumerate(zip(request.first, request.lengths, request.draws, strict=True)):
            rows = slice(first, first + length)
            cache = frames.caches[frames.video[first]]
            try:
                clip = np.stack([cache[int(sample)] for sample in frames.sample[rows]])  # (T, R, R, 3)
            except UserError as error:
                return error
            generator = augment_generator(self.seed, request.epoch or 0, draw)
            drawn.append(draw_change(generator, augment, clip.shape[1:3], self.crop_px))
            images[n, :length] = drawn[n].crop(clip, self.crop_px)
            if request.counts:
                phase[n, :length], tools[n, :length] = frames.phase[rows], frames.tools[rows]
        colour = np.stack([draw.colour for draw in drawn])
        return ClipBatch(
            images=torch.from_numpy(images),
            phase=torch.from_numpy(phase),
            tools=torch.from_numpy(tools),
            lengths=torch.tensor(request.lengths),
            first=torch.tensor(request.first),
            flip=torch.tensor([draw.flip for draw in drawn]),
            colour=torch.from_numpy(colour) if changes_colour(augment) else torch.zeros(0, 3),
            fresh=request.fresh,
            counts=request.counts,
        )


# ---------------------------------------------------------------------------------------------- loading


class _SharedDataset(torch.utils.data.Dataset):
    """A data set that loader processes receive in shared memory."""

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self._dataset = Shared(dataset)

    def __getitem__(self, request: Any) -> Any:
        return self._dataset.value[request]


class FrameLoader:
    """Loads requested batches in order, ahead of time, in loader processes that live until the loader is closed.

    `dataset[request]` is a batch or the UserError that prevented it. `workers` has the meaning of `wanted` in
    `choose_workers`. `stop` is the training's stop request.
    """

    def __init__(
        self, dataset: torch.utils.data.Dataset, workers: int, device: torch.device, stop: StopRequest
    ) -> None:
        self._stop = stop
        self._requests: list[Request] = []
        self._running: Generator[ClipBatch, None, None] | None = None
        workers = choose_workers(workers, device)
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
            _SharedDataset(dataset) if workers else dataset,
            sampler=self._requests,
            batch_size=None,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            # otherwise the loader draws from torch's global generator, which dropout uses
            generator=torch.Generator(),
            **options,
        )

    def batches(self, requests: Iterable[Request]) -> Iterator[ClipBatch]:
        """The batches of `requests`, one for each. Raises UserError naming a frame that cannot be read."""
        self._requests[:] = requests
        self._running = self._batches()
        return self._running

    def _batches(self) -> Generator[ClipBatch, None, None]:
        assert self._loader is not None
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def close(self) -> None:
        """End the loader's processes, even while batches are still being read."""
        if self._running is not None:
            self._running.close()
        end_processes(getattr(self._loader, "_iterator", None))
        self._running = self._loader = None

    def __enter__(self) -> FrameLoader:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close the loader. Raises UserError if a loader process died, or Stopped if a stop was requested as well.

        When a loader process dies, torch raises a RuntimeError in whatever code is running at that moment; if it dies
        while sending a batch, an error of the pipe comes first. A signal to the whole process group may also kill a
        loader process that has only just started and does not ignore signals yet. That counts as a stop, after which
        training resumes from its last checkpoint.
        """
        self.close()
        cut_off = isinstance(error, EOFError | ConnectionError)
        if error is not None and (cut_off or (isinstance(error, RuntimeError) and _WORKER_DIED.match(str(error)))):
            if self._stop.number is not None:
                raise Stopped(self._stop.number) from error
            raise UserError(
                f"{failure_reason(error)}: a process that loads frames died (killed, or no memory or /dev/shm left); "
                "start again to resume from the last checkpoint, if need be with fewer workers or smaller batches"
            ) from error


def choose_workers(wanted: int, device: torch.device) -> int:
    """The number of loader processes for `wanted`, the value of a setting `workers`.

    -1 means none if the net is trained on the CPU, otherwise one per spare core, `MOST_WORKERS` at most.
    """
    if wanted >= 0:
        return wanted
    return 0 if device.type == "cpu" else min(MOST_WORKERS, max(1, available_cores() - 1))
