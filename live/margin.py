"""Cutting and resizing the frames of a running video, of which the black margin is not known in advance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.schema import PreprocessConfig
from features.frames.preprocess import MARGIN_FRAMES, Box, Geometry, field_of_view, margin_of


class RunningGeometry:
    """Resizes frames as `Geometry` does, with the margin of the frames so far.

    The margin is looked for in the first `MARGIN_FRAMES` frames, and again when their size changes. A video file's
    margin is known from the whole file instead: then `Geometry.of_video` gives `fixed`.
    """

    def __init__(self, config: PreprocessConfig, fixed: Geometry | None = None) -> None:
        size = None if config.short_side_px is None else config.crop_px
        plain = Geometry(config.resize_px, None, config.interpolation, config.short_side_px, size)
        self._geometry, self._looks = fixed or plain, config.cut_margin and fixed is None
        self.reset()

    def reset(self) -> None:
        """Forget the frames so far."""
        self._seen, self._fields = 0, list[Box]()
        self._size: tuple[int, int] | None = None

    def resize(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut and resize a frame: (H, W, 3) -> (R, R, 3)."""
        size = (rgb.shape[0], rgb.shape[1])
        if self._looks and size != self._size:
            self._seen, self._fields, self._size = 0, [], size
        if self._looks and self._seen < MARGIN_FRAMES:
            field = field_of_view(rgb)
            self._fields += [] if field is None else [field]
            self._seen += 1
            self._geometry = replace(self._geometry, box=margin_of(self._fields, size))
        return self._geometry.resize_frame(rgb)

    def state(self) -> dict[str, Any]:
        """What is remembered of the frames so far, as plain containers."""
        return {"seen": self._seen, "fields": list(self._fields), "size": self._size}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises ValueError, KeyError or TypeError if it is not one."""
        size = state["size"]
        self._seen, self._size = int(state["seen"]), None if size is None else (int(size[0]), int(size[1]))
        self._fields = [(int(left), int(top), int(right), int(low)) for left, top, right, low in state["fields"]]
        if self._looks and self._size is not None:
            self._geometry = replace(self._geometry, box=margin_of(self._fields, self._size))
