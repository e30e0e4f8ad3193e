"""Clips of frames for the joint net: cut like features in stage two, loaded and augmented like frames in stage one.

The batch of a step is a function of (seed, epoch, step) alone. One augmentation is drawn per clip; if state is
carried from clip to clip (`chunked`), one per video and epoch, so that the image does not jump at the end of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from configs.errors import UserError
from configs.schema import AugmentConfig, SequenceConfig
from features.frames.preprocess import Draw, augment_generator, draw_change
from stage1_cnn.data import LabelledFrames, colour_factors
from stage2_temporal.data import NO_LABEL, Batch, Span, epoch_batches


class ClipRequest(NamedTuple):
    """One batch of clips to make: rows of each clip's first frame, clip lengths, and rows that seed each clip's draw.

    Without `counts` its frames have no labels: a process without a part in a step computes but learns nothing.
    """

    epoch: int
    first: tuple[int, ...]
    lengths: tuple[int, ...]
    draws: tuple[int, ...]
    fresh: bool
    counts: bool = True

    def share(self, rank: int, count: int) -> ClipRequest:
        """The part of process `rank` of `count`; see `Batch.share`."""
        counts = rank < len(self.first)
        mine = slice(rank, None, count) if counts else slice(1)
        part = self._replace(first=self.first[mine], lengths=self.lengths[mine], draws=self.draws[mine])
        return part._replace(fresh=self.fresh or not counts, counts=counts)


class ClipBatch(NamedTuple):
    """B clips of up to T frames. Padding, at the end only, is black and has no labels."""

    images: Tensor  # (B, T, S, S, 3) uint8, cropped
    phase: Tensor  # (B, T) int64, -1 = no label
    tools: Tensor  # (B, T, K) float32, -1 = no label
    lengths: Tensor  # (B,) int64
    first: Tensor  # (B,) int64, row of each clip's first frame
    flip: Tensor  # (B,) bool, still to be mirrored
    colour: Tensor  # (B, 3) float32, factors still to be applied; (0, 3) = none
    fresh: bool  # zero state at the start; otherwise clip i continues clip i of the batch before
    counts: bool  # False: no labels, and no clip changes the carried state


def spans_of(frames: LabelledFrames) -> list[Span]:
    """Each video's rows. `frames` must hold every sample of its videos, in order."""
    counts = np.bincount(frames.video, minlength=len(frames.videos))
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return [Span(int(start), int(count)) for start, count in zip(first, counts, strict=True) if count]


def clip_requests(
    spans: Sequence[Span], config: SequenceConfig, seed: int, epoch: int, subset: int | None
) -> list[ClipRequest]:
    """The epoch's batches in order (see `epoch_batches`); `subset` (mode `clips` only) takes that many random clips."""
    batches = epoch_batches(spans, config, seed, epoch)
    if subset is not None and config.mode == "clips":
        whole, rest = divmod(subset, config.batch)
        last = [Batch(batch.first[:rest], batch.lengths[:rest]) for batch in batches[whole : whole + 1] if rest]
        batches = batches[:whole] + last
    return [_request(batch, spans, config, epoch) for batch in batches]


def _request(batch: Batch, spans: Sequence[Span], config: SequenceConfig, epoch: int) -> ClipRequest:
    first = batch.first.tolist()
    draws = first if config.mode == "clips" else [_video_start(spans, row) for row in first]
    return ClipRequest(epoch, tuple(first), tuple(batch.lengths.tolist()), tuple(draws), batch.fresh)


def _video_start(spans: Sequence[Span], row: int) -> int:
    return next(span.first for span in spans if span.first <= row < span.first + span.frames)


class ClipDataset(Dataset):
    """Makes whole batches: `dataset[request]` is a ClipBatch, or the UserError that prevented it."""

    def __init__(self, frames: LabelledFrames, sizes_px: tuple[int, int], augment: AugmentConfig, seed: int) -> None:
        self.frames, self.augment, self.seed = frames, augment, seed
        self.resize_px, self.crop_px = sizes_px

    def __getitem__(self, request: ClipRequest) -> ClipBatch | UserError:
        frames, longest = self.frames, max(request.lengths)
        shape = (len(request.first), longest)
        images = np.zeros((*shape, self.crop_px, self.crop_px, 3), dtype=np.uint8)
        phase = np.full(shape, NO_LABEL, dtype=np.int64)
        tools = np.full((*shape, frames.tools.shape[1]), NO_LABEL, dtype=np.float32)
        drawn = [self._draw(request, n) for n in range(len(request.first))]
        try:
            for n, (first, length) in enumerate(zip(request.first, request.lengths, strict=True)):
                rows = slice(first, first + length)
                images[n, :length] = drawn[n].crop(self._images(rows), self.crop_px)
                if request.counts:
                    phase[n, :length], tools[n, :length] = frames.phase[rows], frames.tools[rows]
        except UserError as error:
            return error
        return ClipBatch(
            images=torch.from_numpy(images),
            phase=torch.from_numpy(phase),
            tools=torch.from_numpy(tools),
            lengths=torch.tensor(request.lengths),
            first=torch.tensor(request.first),
            flip=torch.tensor([draw.flip for draw in drawn]),
            colour=colour_factors([draw.colour for draw in drawn], self.augment, training=True),
            fresh=request.fresh,
            counts=request.counts,
        )

    def _draw(self, request: ClipRequest, n: int) -> Draw:
        """The augmentation of a batch's clip `n`."""
        generator = augment_generator(self.seed, request.epoch, request.draws[n])
        return draw_change(generator, self.augment, self.resize_px, self.crop_px)

    def _images(self, rows: slice) -> NDArray[np.uint8]:
        """(T, R, R, 3)."""
        frames = self.frames
        cache = frames.caches[frames.video[rows.start]]
        return np.stack([cache[int(sample)] for sample in frames.sample[rows]])
