"""Raw frames on standard input, as another program writes them."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from engine.progress import say
from features.video.base import MAX_PIXELS
from live.sources.base import Begin, Grabbed, Source

_LAYOUT = re.compile(r"([0-9]{1,6})x([0-9]{1,6})@([0-9]{1,4}(?:\.[0-9]{1,6})?)")
_PIPE_BYTES = 1 << 20


class RawSource(Source):
    """Frames as bytes, R, G and B of each pixel row by row, of a size and at a rate that `layout` states.

    `layout` is WIDTHxHEIGHT@FPS. Frame k is shown at k / FPS seconds. Raises UserError if the layout is none.
    """

    def __init__(self, layout: str, real: bool, descriptor: int = 0) -> None:
        found = _LAYOUT.fullmatch(layout)
        width_px, height_px, fps = (int(found[1]), int(found[2]), float(found[3])) if found else (0, 0, 0.0)
        if not (0 < width_px * height_px <= MAX_PIXELS and fps > 0):
            raise UserError(f"--raw {layout}: expected WIDTHxHEIGHT@FPS, such as 1280x720@25")
        self._shape, self._fps, self._descriptor = (height_px, width_px, 3), fps, descriptor
        super().__init__("standard input", live=real)

    def frames(self, begin: Begin, stop: threading.Event) -> Iterator[Grabbed]:
        number, size = begin.number, int(np.prod(self._shape))
        while not stop.is_set():
            content = bytearray()
            while len(content) < size and (part := os.read(self._descriptor, min(size - len(content), _PIPE_BYTES))):
                content += part
            if len(content) < size:
                if content:
                    say(f"note: standard input ends within frame {number}, which is left out")
                self.end_s = number / self._fps
                return
            yield Grabbed(number, number / self._fps, partial(self._picture, content), time.perf_counter(), 0.0)
            number += 1

    def _picture(self, content: bytearray) -> NDArray[np.uint8]:
        return np.frombuffer(content, np.uint8).reshape(self._shape)
