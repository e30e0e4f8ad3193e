"""One video's labels at its samples: made from annotations, stored beside features, compared with predictions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class VideoLabels:
    """The labels of one video's T samples; -1 in `phase` and `tools`: no label."""

    frame_index: NDArray[np.int64]  # (T,) frame of the source video
    time_s: NDArray[np.float64]  # (T,) seconds from its first frame
    phase: NDArray[np.int8]  # (T,)
    tools: NDArray[np.int8]  # (T, K)
