"""Clips of frames for the joint net: chosen in the same way as in stage two, and loaded by `stage1_cnn.data`.

The batch of a step depends on (seed, epoch, step) alone. Each clip is augmented as a whole. If state is carried from
clip to clip (`chunked`), all clips of a video are augmented in the same way within an epoch, so that the image does not
jump from one clip to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from configs.schema import SequenceConfig
from stage1_cnn.data import LabelledFrames, Request
from stage2_temporal.data import Batch, Span, epoch_batches


def spans_of(frames: LabelledFrames) -> list[Span]:
    """The rows of each video. `frames` must contain every sample of its videos, in order."""
    counts = np.bincount(frames.video, minlength=len(frames.videos))
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return [Span(int(start), int(count)) for start, count in zip(first, counts, strict=True) if count]


def clip_requests(
    spans: Sequence[Span], config: SequenceConfig, seed: int, epoch: int, subset: int | None
) -> list[Request]:
    """The batches of an epoch, in order (see `epoch_batches`).

    With `subset`, which has an effect in mode `clips` only, the epoch consists of that many random clips.
    """
    batches = epoch_batches(spans, config, seed, epoch)
    if subset is not None and config.mode == "clips":
        whole, rest = divmod(subset, config.batch)
        last = [Batch(batch.first[:rest], batch.lengths[:rest]) for batch in batches[whole : whole + 1] if rest]
        batches = batches[:whole] + last
    return [_request(batch, spans, config, epoch) for batch in batches]


def _request(batch: Batch, spans: Sequence[Span], config: SequenceConfig, epoch: int) -> Request:
    first = batch.first.tolist()
    draws = first if config.mode == "clips" else [_video_start(spans, row) for row in first]
    return Request("train", epoch, tuple(first), tuple(batch.lengths.tolist()), tuple(draws), batch.fresh)


def _video_start(spans: Sequence[Span], row: int) -> int:
    return next(span.first for span in spans if span.first <= row < span.first + span.frames)
