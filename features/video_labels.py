"""The labels of a video's sampled frames, which are made from annotations and stored in feature files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from configs.schema import MAIN_TRACK

NO_LABEL = -1  # in `phase` and `tools`


@dataclass(frozen=True, eq=False)
class VideoLabels:
    """The labels of one video's T sampled frames. `NO_LABEL` stands for a missing one."""

    frame_index: NDArray[np.int64]  # (T,) number of the frame in the source video
    time_s: NDArray[np.float64]  # (T,) seconds from the source's first frame
    phase: NDArray[np.int8]  # (T,)
    tools: NDArray[np.int8]  # (T, K)
    tracks: Mapping[str, NDArray[np.int8]] = field(default_factory=dict, kw_only=True)  # (T,), additional tracks

    def of_track(self, name: str) -> NDArray[np.int8]:
        """Return the labels (T,) of `phases` or of an additional track."""
        return self.phase if name == MAIN_TRACK else self.tracks[name]
