"""Features that stay in their files: a table that may be larger than memory, and reading the next batch in advance."""

from __future__ import annotations

import bisect
import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.store import StoredFeatures

Item = TypeVar("Item")
Result = TypeVar("Result")


class StreamedFeatures:
    """The features (N, D) of several videos, with the parts of a tensor's interface that a `FeatureBank` uses.

    Only tool logits are in memory. A batch has the same values and memory layout as one taken from a tensor.
    """

    def __init__(self, videos: Sequence[StoredFeatures]) -> None:
        """The features of `videos` must have the same width and type, and one video at least must have a frame."""
        self.device = torch.device("cpu")
        self._videos = tuple(videos)
        self._first = list(itertools.accumulate((len(video) for video in videos), initial=0))
        self._columns: Tensor | None = None  # (N, K)
        self._width = videos[0].shape[1]
        self.dtype = torch.from_numpy(np.empty(0, videos[0].dtype)).dtype
        self._padding = self._read([0], [1], 1)[0, 0]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D), or (N, D + K) with tool logits."""
        return self._first[-1], self._width + (0 if self._columns is None else self._columns.shape[1])

    def __len__(self) -> int:
        return self._first[-1]

    def to(self, device: torch.device) -> StreamedFeatures:
        """The same table, whose batches are put on `device`."""
        found = copy.copy(self)
        found.device = device
        return found

    def with_columns(self, columns: Tensor) -> StreamedFeatures:
        """The same table with `columns` (N, K), which are on the CPU and of the same type, added at the right."""
        found = copy.copy(self)
        found._columns = columns
        return found

    def share_memory_(self) -> StreamedFeatures:
        """Move the part of the table that is in memory, the tool logits, into shared memory."""
        if self._columns is not None:
            self._columns.share_memory_()
        return self

    def __getitem__(self, rows: slice) -> Tensor:
        """The rows (T, D) of one video, or of a part of it."""
        return self.take(torch.arange(rows.start, rows.stop)[None])[0]

    def take(self, rows: Tensor) -> Tensor:
        """The features (B, T, D) of the rows (B, T). Each sequence lies within one video and may end with -1 (padding).

        Raises FeatureFileError naming a file that is damaged or was replaced.
        """
        rows = rows.cpu()
        lengths = (rows >= 0).sum(dim=1).tolist()
        found = self._read(rows[:, 0].tolist(), lengths, rows.shape[1])
        for sequence, length in zip(found, lengths, strict=True):
            sequence[length:] = self._padding
        if self._columns is not None:
            more = self._columns.index_select(0, rows.clamp(min=0).flatten()).view(*rows.shape, -1)
            found = torch.cat([found, more], dim=2)
        return found.to(self.device)

    def _read(self, first: Sequence[int], lengths: Sequence[int], longest: int) -> Tensor:
        """The sequences (B, T, D) with these first rows and lengths; each file is opened only once."""
        found = torch.empty(len(first), longest, self._width, dtype=self.dtype)
        parts: dict[int, list[tuple[int, NDArray[np.generic]]]] = {}
        for row, length, values in zip(first, lengths, found.numpy(), strict=True):
            video = bisect.bisect_right(self._first, row) - 1
            parts.setdefault(video, []).append((row - self._first[video], values[:length]))
        for video, wanted in parts.items():
            self._videos[video].read(sorted(wanted, key=lambda part: part[0]))
        return found


def ahead(
    features: Tensor | StreamedFeatures, items: Iterable[Item], work: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of `work(item)`, which reads `features`.

    If the features are streamed, a thread computes the next result while the caller uses the previous one, so that two
    results exist at a time. Otherwise no thread is used, since it would only take computing time from the caller.
    """
    if not isinstance(features, StreamedFeatures):
        yield from ((item, work(item)) for item in items)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="features") as reader:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            waiting.append((item, reader.submit(work, item)))
            if len(waiting) > 1:
                ready, future = waiting.popleft()
                yield ready, future.result()
        for ready, future in waiting:
            yield ready, future.result()
