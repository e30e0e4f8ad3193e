"""What the files of an import are and agree on, found out before anything is written.

T of the features, of the labels and of the indexed video must agree to a second; D must be the same in all files. From
this follows which axis is time. Lengths are compared in samples, which are the rows that `every` keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, listed
from configs.schema import MAX_FPS
from engine.files import sha256_ends, sha256_json
from engine.progress import say
from interop.feature_files.arrays import Content
from interop.feature_files.found import FeatureFile, Found
from interop.feature_files.labels import Labels


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to read the files of another program: what its options say that the files do not."""

    layout: str | None = None  # `mstcn` or a format of single files
    fps: float | None = None  # rows per second
    every: int = 1  # take one row in `every`
    axes: str | None = None  # `TD` or `DT`
    key: str | None = None
    labels: str | None = None  # `files`, `index`, `none`, or a folder
    index: Path | None = None
    split: str | None = None  # a division in MS-TCN's bundles
    dataset: str | None = None
    phase_order: str | None = None
    encoder: str | None = None  # the user's name for the encoder


@dataclass(frozen=True, eq=False)
class SurveyedVideo:
    """What was found out about one video's file before anything is written."""

    id: str
    file: FeatureFile
    sha256_ends: str
    shape: tuple[int, int]
    dtype: str
    labels: Labels  # of all rows of the file
    frame_index: NDArray[np.int64] | None  # sampled frames of the indexed video

    def rows(self, axes: str) -> int:
        """T, the number of rows of the file."""
        return self.shape[axes.index("T")]

    def samples(self, axes: str, every: int) -> list[int]:
        """How many samples the features have, and then the labels and the indexed video, as far as they are known."""
        known = [] if self.labels.rows is None else [-(-self.labels.rows // every)]
        known += [] if self.frame_index is None else [len(self.frame_index)]
        return [-(-self.rows(axes) // every), *known]


def rate_of(found: Found, request: Request, exported_fps: float | None) -> float:
    """Rows per second: what the user says, or what the files' names or the file beside them say. Never a guess."""
    named = {file.fps for file in found.files if file.fps is not None} | {exported_fps} - {None}
    rate = request.fps if request.fps is not None else next(iter(named), None)
    if rate is None or len(named) > 1:
        what = f"name different rates ({', '.join(map(str, sorted(filter(None, named))))})" if named else "name no rate"
        raise UserError(f"{found.root}: its files {what}; give the rows per second with --fps RATE")
    if named - {rate}:
        raise UserError(f"--fps {rate:g}: {found.files[0].path.name} was made at {named.pop():g} rows per second")
    if not 1e-3 <= rate <= MAX_FPS:
        raise UserError(f"--fps {rate:g}: not a rate from 0.001 to {MAX_FPS:g}")
    return float(rate)


def file_identity(file: FeatureFile) -> str:
    """The hash of a file's ends or, in a file of several videos, of that and the video's rows."""
    ends = sha256_ends(file.path)
    return ends if file.rows is None else sha256_json([ends, file.rows.start, file.rows.stop])


def require_values(content: Content) -> None:
    """Raise UserError if there are no features in a file, as in TRIDENT's for a slide without tissue."""
    if not all(content.shape):
        raise UserError(f"{content.path}: its features are empty ({'x'.join(map(str, content.shape))})")


def time_axis(videos: Sequence[SurveyedVideo], found: Found, request: Request, slack: int) -> str:
    """Which axis is time: `TD` or `DT`. The D of all files must be equal, and T must agree with labels and index.

    Raises UserError if that leaves both possible, or if files have different D.
    """
    same_dim = [axes for axes in ("TD", "DT") if len({video.shape[axes.index("D")] for video in videos}) == 1]
    if request.axes is not None or found.format in ("tecno", "lfb"):
        chosen = [request.axes or "TD"]
    else:
        counts = {axes: [video.samples(axes, request.every) for video in videos] for axes in same_dim}
        off = {
            axes: max(abs(own - other) for own, *others in counts[axes] for other in (own, *others)) for axes in counts
        }
        fitting = [axes for axes in same_dim if off[axes] <= slack]
        chosen = fitting or sorted(same_dim, key=off.__getitem__)[:1]
    if len(chosen) > 1:
        first, shape = videos[0].file.path, "x".join(map(str, videos[0].shape))
        raise UserError(f"{first}: cannot tell which axis of {shape} is time; say so with --layout TD or --layout DT")
    if not chosen or chosen[0] not in same_dim:
        axis = (chosen or ["TD"])[0].index("D")
        one = videos[0]
        other = next(video for video in videos if video.shape[axis] != one.shape[axis])
        raise UserError(
            f"{other.file.path}: has {'x'.join(map(str, other.shape))} features, but {one.file.path.name} "
            f"{'x'.join(map(str, one.shape))}: all files need the same number of features per frame (see --layout)"
        )
    return chosen[0]


def common_length(video: SurveyedVideo, axes: str, every: int, slack: int) -> int:
    """The number of samples to keep. Raises UserError if features, labels and index differ by more than a second."""
    counts = video.samples(axes, every)
    if max(counts) - min(counts) > slack:
        known = " and ".join(map(str, counts[1:]))
        raise UserError(
            f"{video.file.path}: {counts[0]} samples of features, but {known} of labels or of the indexed video of "
            f"{video.id}; check --fps, --every and --layout (up to {slack} would be cut)"
        )
    return min(counts)


def say_cuts(videos: Sequence[SurveyedVideo], axes: str, lengths: Mapping[str, int], every: int) -> None:
    """Name the videos whose features or labels are longer than the number of samples to keep."""
    cut = []
    for video in videos:
        counts = video.samples(axes, every)
        if max(counts) > lengths[video.id]:
            cut.append(f"{video.id} to {lengths[video.id]} (of {' and '.join(map(str, sorted(set(counts))))})")
    if cut:
        say(f"note: features and labels of {len(cut)} video(s) differ in length and are cut: {listed(cut, 5)}")
