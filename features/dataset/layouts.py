"""What an index records of a folder of images and of a TFRecord file: their frames and labels on the timeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from configs.dataset_spec import DataSetSpec
from configs.schema import OmitsDefaults, Strict
from engine.files import sha256_json
from features.dataset.annotations import LabelTrack
from features.dataset.phase_order import ids_of_order
from features.video.mp4 import MAX_FRAMES

Numbering = Literal["source", "sample"]


class FolderLayout(OmitsDefaults):
    """The images of a folder on the source's timeline.

    Image i of `count` is source frame `first` + i * `stride`. The numbers in the names count source frames or samples
    (`numbering`), and the video's first has the number `base`. `missing` are the runs of images that are lost, each as
    (first i, last i + 1).
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
        """Source frames that the images represent, a stride each."""
        return self.first + self.count * self.stride

    def frames(self) -> NDArray[np.int64]:
        """Source frame (N,) int64 of each image that exists."""
        exists = np.ones(self.count, dtype=bool)
        for start, stop in self.missing:
            exists[start:stop] = False
        return self.first + np.flatnonzero(exists) * self.stride


_RUN = r"\d{1,9}x\d{1,3}:(-|\d{1,3}(,\d{1,3})*)"


class RecordLayout(Strict):
    """The labels of a TFRecord file, kept in the index because reading them again means reading every image.

    `phase_order` names the file's phase numbers. `labels` are runs of frames with equal labels, in the file's numbers,
    as `<frames>x<phase>:<tools>`: `34x0:0,2 5x1:-` is 34 frames of phase 0 with tools 0 and 2, then 5 of phase 1 with
    none.
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
        """The layout of a file whose frames have these `rows`: each the phase and the tools that are present."""
        runs = ((len(list(run)), *row) for row, run in groupby(rows))
        labels = " ".join(f"{frames}x{phase}:{','.join(map(str, tools)) or '-'}" for frames, phase, tools in runs)
        return cls(frame_base=frame_base, total_frames=total_frames, phase_order=phase_order, labels=labels)

    @property
    def frame_count(self) -> int:
        return sum(frames for frames, _, _ in self._runs())

    def problem(self, spec: DataSetSpec) -> str | None:
        """Why this cannot be a layout of the data set's files, or None."""
        if sorted(self.phase_order) != sorted(spec.phases):
            return "phase_order does not name each phase once"
        numbers = {phase for _, phase, _ in self._runs()}
        tools = {tool for _, _, tools in self._runs() for tool in tools}
        beyond = max(numbers) >= len(spec.phases) or max(tools, default=-1) >= len(spec.tools)
        return f"labels name a phase or tool that {spec.name} lacks" if beyond else None

    def tracks(self, spec: DataSetSpec) -> tuple[LabelTrack, LabelTrack | None]:
        """The labels in the data set's numbers, one row per frame."""
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
        """SHA-256 over what the labels depend on, in place of an annotation file's hash."""
        return sha256_json([self.phase_order, self.labels])

    def _runs(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        for run in self.labels.split(" "):
            frames, _, row = run.partition("x")
            phase, _, tools = row.partition(":")
            yield int(frames), int(phase), () if tools == "-" else tuple(map(int, tools.split(",")))
