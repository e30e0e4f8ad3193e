"""What all sources of a stream have in common."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from features.frames.preprocess import Geometry


class Grabbed(NamedTuple):
    """A frame as it arrives.

    `number` counts the frames of the source from 0, and `time_s` is when it is shown, in seconds from the first one.
    `picture` converts it to (H, W, 3) uint8 RGB; None if there is no image of it (a folder of frames with gaps).
    `arrived` is `time.perf_counter` when its data were there, and `decode_s` the seconds that decoding it took.
    """

    number: int
    time_s: float
    picture: Callable[[], NDArray[np.uint8]] | None
    arrived: float
    decode_s: float


class Begin(NamedTuple):
    """Where a stream begins or continues: with the frame of this number; `time_s` is that of a live source's frame."""

    number: int = 0
    time_s: float = 0.0


class SourceLost(UserError):
    """A live source has given no frame for too long. It had given frames before, unless `never`."""

    def __init__(self, message: str, never: bool) -> None:
        super().__init__(message)
        self.never = never


@dataclass
class Faults:
    """What a source survived: damaged frames, connections that were lost, and leaps of its clock."""

    damaged: int = 0
    reconnects: int = 0
    clock_leaps: int = 0


@dataclass
class Source(ABC):
    """A source of frames. `name` is for messages, and `identity` recognises a recorded source in a saved state.

    Of a `live` source, a frame that is not processed before the next one is due is lost. `endless` sources do not end
    by themselves, but are lost. `geometry` is that of a stored video.
    """

    name: str
    live: bool
    endless: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
    geometry: Geometry | None = None
    end_s: float | None = None  # until when the last frame is shown, if that is known
    faults: Faults = field(default_factory=Faults)

    @abstractmethod
    def frames(self, begin: Begin, stop: threading.Event) -> Iterator[Grabbed]:
        """The frames from `begin` on, until the source ends or `stop` is set.

        Raises UserError if the source cannot be read, and SourceLost if a live source stays away.
        """
