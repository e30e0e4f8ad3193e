"""Reading a source in a thread of its own, so that frames are taken from it whatever the nets are doing."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from live.sampling import Sampler, Shown
from live.sources.base import Begin, Grabbed, Source

_LEAVE_S = 2.0  # how long a reading that cannot be interrupted is waited for


class Taken(NamedTuple):
    """A sampled frame with its pixels, the time of the newest frame that was awaited for it, and when it arrived.

    `ready` is when it could be processed; both are of `time.perf_counter`. `decode_s` are seconds of decoding it.
    """

    shown: Shown[NDArray[np.uint8]]
    now_s: float
    arrived: float
    ready: float
    decode_s: float


class Capture:
    """Reads and samples the frames of a source in a thread, and hands over one at a time.

    Of a live source the newest frame wins: a frame that has not been taken when the next one is there is `dropped`. So
    latency does not build up if frames arrive faster than they are processed. Other sources wait.
    """

    def __init__(self, source: Source, sampler: Sampler[Grabbed], begin: Begin) -> None:
        self._source, self._sampler, self._begin = source, sampler, begin
        self._stop, self._changed = threading.Event(), threading.Condition()
        self._next: Taken | None = None
        self._error: BaseException | None = None
        self.dropped, self.ended = 0, False
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def take(self, timeout_s: float) -> Taken | None:
        """The next frame; None if there is none in time, or if the source has `ended`. Raises the source's errors."""
        with self._changed:
            self._changed.wait_for(lambda: self._next is not None or self._finished, timeout_s)
            found, self._next = self._next, None
            self._changed.notify_all()
            if found is None and self._finished:
                if self._error is not None:
                    raise self._error
                self.ended = True
            return found

    def close(self) -> None:
        """End the thread; one that waits for a source is left behind, and ends with the process."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_LEAVE_S)

    _finished = False

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for frame in self._source.frames(self._begin, self._stop):
                for shown in self._sampler.push(frame.number, frame.time_s, frame):
                    self._put(shown, frame.time_s)
            for shown in [] if self._stop.is_set() else self._sampler.finish(self._source.end_s):
                self._put(shown, shown.time_s)
        except BaseException as raised:
            error = raised
        with self._changed:
            self._error, self._finished = error, True
            self._changed.notify_all()

    def _put(self, shown: Shown[Grabbed], now_s: float) -> None:
        frame = shown.picture
        if frame.picture is None:
            return
        begun = time.perf_counter()
        pixels = frame.picture()
        ready = time.perf_counter()
        decode_s = frame.decode_s + ready - begun
        with self._changed:
            if not self._source.live:
                self._changed.wait_for(lambda: self._next is None or self._stop.is_set())
            if self._stop.is_set():
                return
            self.dropped += self._next is not None
            self._next = Taken(Shown(shown.number, shown.time_s, pixels), now_s, frame.arrived, ready, decode_s)
            self._changed.notify_all()
