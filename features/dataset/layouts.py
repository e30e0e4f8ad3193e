"""What an index records about a folder of images (which frames exist) and about a TFRecord file (its labels)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from configs.dataset_spec import DataSetSpec
from configs.strict import OmitsDefaults, Strict
from engine.files import sha256_json
from features.dataset.annotations import LabelTrack
from features.dataset.phase_order import ids_of_order
from features.video.mp4 import MAX_FRAMES

Numbering = Literal["source", "sample"]


class FolderLayout(OmitsDefaults):
    """Which source frames the images of a folder are.

    Image i (of `count`) is source frame `first` + i * `stride`. `numbering` says whether the numbers in the images'
    names count source frames or samples, and `base` is the number of the video's first frame or sample. `missing`
    contains the runs of missing images, each as (first i, last i + 1).
    """

    OMITTED = frozenset({"missing"})
    numbering: Numbering
    base: int = Field(ge=0, lt=10**15)
    stride: int = Field(ge=1, le=10**9)
    first: int = Field(ge=0, le=10**9)
    count: int = Field(ge=1, le=MAX_FRAMES)
    missing: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _missing_lie_inside(self) -> FolderLayout:
        ends = [0, *(end for run in self.missing for end in run), self.count]  # the first and last image exist
        if any(one >= other for one, other in pairwise(ends)) and self.missing:
            raise ValueError("missing images are not runs inside the others")
        return self

    @property
    def frame_count(self) -> int:
        """The number of source frames that the images cover, of which each image covers a stride."""
        return self.first + self.count * self.stride

    def frames(self) -> NDArray[np.int64]:
        """Return the source frame (N,) int64 of each image that exists."""
        exists = np.ones(self.count, dtype=bool)
        for start, stop in self.missing:
            exists[start:stop] = False
        return self.first + np.flatnonzero(exists) * self.stride


_RUN = r"\d{1,9}x\d{1,3}:(-|\d{1,3}(,\d{1,3})*)"


class RecordLayout(Strict):
    """The labels of a TFRecord file. They are kept in the index, since reading them again would read every image.

    `phase_order` names the phase of each number in the file. `labels` lists runs of frames with equal labels, each as
    `<frames>x<phase>:<tools>` with the file's numbers: `34x0:0,2 5x1:-` means 34 frames of phase 0 with tools 0 and 2,
    then 5 frames of phase 1 without tools.
    """

    frame_base: Literal[0, 1]
    total_frames: int = Field(ge=0)
    phase_order: tuple[str, ...]
    labels: str = Field(pattern=rf"^{_RUN}( {_RUN})*$")

    @classmethod
    def of_rows(
        cls,
        frame_base: Literal[0, 1],
        total_frames: int,
        phase_order: tuple[str, ...],
        rows: Iterable[tuple[int, tuple[int, ...]]],
    ) -> RecordLayout:
        """Build the layout of a file from one row per frame, with the phase and the tools that are present."""
        runs = ((len(list(run)), *row) for row, run in groupby(rows))
        labels = " ".join(f"{frames}x{phase}:{','.join(map(str, tools)) or '-'}" for frames, phase, tools in runs)
        return cls(frame_base=frame_base, total_frames=total_frames, phase_order=phase_order, labels=labels)

    @property
    def frame_count(self) -> int:
        return sum(frames for frames, _, _ in self._runs())

    def problem(self, spec: DataSetSpec) -> str | None:
        """Return why this cannot be a layout for this data set, or None."""
        if sorted(self.phase_order) != sorted(spec.phases):
            return "phase_order does not name each phase once"
        numbers = {phase for _, phase, _ in self._runs()}
        tools = {tool for _, _, tools in self._runs() for tool in tools}
        beyond = max(numbers) >= len(spec.phases) or max(tools, default=-1) >= len(spec.tools)
        return f"labels contain a phase or tool that {spec.name} does not have" if beyond else None

    def tracks(self, spec: DataSetSpec) -> tuple[LabelTrack, LabelTrack | None]:
        """Return phases and tools (None if the data set has no tools), one row per frame, in the data set's numbers."""
        frames = np.array([frames for frames, _, _ in self._runs()], dtype=np.int64)
        numbers = np.array([phase for _, phase, _ in self._runs()], dtype=np.int64)
        present = np.zeros((len(frames), len(spec.tools)), dtype=np.int8)  # (runs, K)
        for row, (_, _, tools) in enumerate(self._runs()):
            present[row, list(tools)] = 1
        frame_index = np.arange(frames.sum(), dtype=np.int64)
        phase = ids_of_order(self.phase_order, spec.phases)[numbers].astype(np.int8)
        tool_track = LabelTrack(frame_index, present.repeat(frames, axis=0), 1) if spec.tools else None
        return LabelTrack(frame_index, phase.repeat(frames), 1), tool_track

    def labels_sha256(self) -> str:
        """Return the SHA-256 of everything the labels depend on, to be used like an annotation file's hash."""
        return sha256_json([self.phase_order, self.labels])

    def _runs(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        for run in self.labels.split(" "):
            frames, _, row = run.partition("x")
            phase, _, tools = row.partition(":")
            yield int(frames), int(phase), () if tools == "-" else tuple(map(int, tools.split(",")))
