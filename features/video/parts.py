"""The reader of a recording in several files, whose frames are numbered through all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from features.video.base import FrameReader, ReaderError


class PartsReader(FrameReader):
    """Reads the files of a recording in their order as one video: the first frame of a file follows the last before it.

    `openers` open the files' readers. Pictures of different files may have different sizes, since every frame is
    resized to the same square; with `same_size`, they may not.
    """

    def __init__(self, openers: Sequence[Callable[[], FrameReader]], same_size: bool = False) -> None:
        with ExitStack() as stack:
            self._readers = [stack.enter_context(opener()) for opener in openers]
            if same_size:
                self._require_same_size()
            self._closing = stack.pop_all()
        first = self._readers[0]
        self.name, self.version, self.path = first.name, first.version, first.path
        self.frame_count = sum(reader.frame_count for reader in self._readers)

    def _require_same_size(self) -> None:
        first, *others = [(reader.path, next(reader.read([0])).shape) for reader in self._readers]
        for path, shape in others:
            if shape != first[1]:
                (high, wide, _), (other_high, other_wide, _) = first[1], shape
                raise ReaderError(
                    f"{path}: has pictures of {other_wide}x{other_high}, but {first[0].name} of {wide}x{high}, and "
                    "preprocess.cut_margin needs one size for all parts; re-encode one, or set it to false"
                )

    def _frames(self, wanted: list[int]) -> Iterator[np.ndarray]:
        first = 0
        for reader in self._readers:
            end = first + reader.frame_count
            yield from reader.read([k - first for k in wanted if first <= k < end])
            first = end

    def close(self) -> None:
        self._closing.close()
