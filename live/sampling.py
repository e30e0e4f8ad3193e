"""Sampling of a running video: the frames that `features.video.times.on_screen` chooses of the whole video."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from configs.errors import UserError
from features.video.times import ROUNDING_S

Picture = TypeVar("Picture")
# Frames that follow each other faster than this are one frame that is repeated, since no camera is so fast.
SAME_S = 1e-5


class Shown(NamedTuple, Generic[Picture]):
    """A frame: its number in the source, when it is shown in seconds, and what represents its pixels."""

    number: int
    time_s: float
    picture: Picture


@dataclass
class Counts:
    """What arrived. `missed` counts sampling times at which no new frame had been shown since the one before."""

    frames: int = 0
    sampled: int = 0
    late: int = 0
    repeated: int = 0
    missed: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


class Sampler(Generic[Picture]):
    """Chooses frames at `fps` by their times, as they arrive.

    Sampling times are the first frame's time and every 1 / fps seconds after it. For each, the frame on screen is
    chosen, once. A frame that arrives at a sampling time is known to be on screen then; of others that is known when
    the next frame arrives. A frame that is not later than the one before it is ignored and counted.
    """

    def __init__(self, fps: float) -> None:
        self._fps = fps
        self.counts = Counts()
        self.first_s: float | None = None
        self._last_s = -math.inf
        self._next_due = 0  # the first sampling time that is not served yet
        self._waiting: Shown[Picture] | None = None

    def push(self, number: int, time_s: float, picture: Picture) -> list[Shown[Picture]]:
        """The frames that are now known to be chosen, in order: the one before, this one, both or none.

        Raises UserError if `time_s` is not finite.
        """
        if not math.isfinite(time_s):
            raise UserError(f"frame {number}: its time, {time_s}, is not finite")
        self.counts.frames += 1
        if time_s < self._last_s + SAME_S:
            repeated = abs(time_s - self._last_s) < SAME_S
            self.counts.repeated += repeated
            self.counts.late += not repeated
            return []
        if self.first_s is None:
            self.first_s = time_s
        chosen = self._settled(self._due(time_s))
        frame = Shown(number, time_s, picture)
        self._last_s = time_s
        if (time_s - self.first_s + ROUNDING_S) * self._fps > self._due(time_s):
            return [*chosen, self._choose(frame)]
        self._waiting = frame
        return chosen

    def finish(self, end_s: float | None = None) -> list[Shown[Picture]]:
        """The last frame, if it is chosen: it is shown until `end_s`, or (None) not beyond its own time."""
        return [] if end_s is None or self.first_s is None else self._settled(self._due(end_s))

    def _settled(self, due: int) -> list[Shown[Picture]]:
        """The frame that waits, if it was on screen at a sampling time before the one numbered `due`."""
        frame, self._waiting = self._waiting, None
        return [self._choose(frame)] if frame is not None and self._due(frame.time_s) < due else []

    def _choose(self, frame: Shown[Picture]) -> Shown[Picture]:
        due = self._due(frame.time_s)
        self.counts.missed += due - self._next_due
        self.counts.sampled += 1
        self._next_due = due + 1
        return frame

    def _due(self, time_s: float) -> int:
        """The number of the first sampling time at or after this time; the arithmetic is that of `on_screen`."""
        assert self.first_s is not None
        return math.ceil((time_s - self.first_s - ROUNDING_S) * self._fps)

    def state(self, last_s: float | None) -> dict[str, Any]:
        """The state after the chosen frame at `last_s` (None: before the first), as if no later one had arrived."""
        return {"first_s": self.first_s if last_s is not None else None, "last_s": last_s, **self.counts.to_json()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after that frame. Raises ValueError, KeyError or TypeError if `state` is not one."""
        first_s, last_s = state["first_s"], state["last_s"]
        self.counts = Counts(**{name: int(state[name]) for name in self.counts.to_json()})
        if first_s is not None:
            if not (math.isfinite(first_s) and first_s <= last_s < math.inf):
                raise ValueError("its times are not those of frames")
            self.first_s, self._last_s = float(first_s), float(last_s)
            self._next_due = self._due(self._last_s) + 1
