"""Read the index pickles of the original MTRCNet programs: videos with image paths and labels.

`cholec80.pkl` is a list of videos, each of which is a list of rows `[path, tool 1, ..., tool 7, phase]`. The other
files have the parts train, val and test (or train and val, or test only). They contain first one list of paths per
part, then one list of labels (`[tool 1, ..., tool 7, phase]`) per part, and then, per part, one list with the number of
frames of each video. Newer files contain phases only: rows are `[path, phase]`, labels `[phase]`. The form is
recognised from the structure, never from the name of the file. The paths are those of another machine, so only the
names of an image and of its folder are used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from engine.progress import say
from engine.safe_pickle import load_plain
from features.dataset.splits import Split

LAYOUTS: dict[str, tuple[Split, ...]] = {
    "cholec80": (),
    "train_val_test": ("train", "val", "test"),
    "train_val": ("train", "val"),
    "test": ("test",),
}


@dataclass(frozen=True, eq=False)
class PickledVideo:
    """One video of an index pickle, with R rows; paths, and the numbers of phases, are those in the file."""

    where: str  # file and number of the video, for messages
    paths: tuple[str, ...]
    phase: NDArray[np.int64]  # (R,)
    tools: NDArray[np.int8] | None  # (R, K), None if the pickle contains phases only
    split: Split  # "none" if the pickle has no parts

    @property
    def folder(self) -> str:
        """The name of the folder that contains the images. Raises UserError if there are several folders."""
        names = {folder_and_file(path)[0] for path in self.paths}
        if len(names) != 1:
            raise UserError(f"{self.where}: its images are in several folders ({', '.join(sorted(names)[:3])})")
        return names.pop()

    @property
    def file_names(self) -> list[str]:
        """The names of the R image files, without folders."""
        return [folder_and_file(path)[1] for path in self.paths]


def folder_and_file(path: str) -> tuple[str, str]:
    """The names of the folder and of the file in a path of any operating system."""
    parts = re.split(r"[/\\]", path)
    return (parts[-2] if len(parts) > 1 else "", parts[-1])


def read_pickled_index(path: Path, spec: DataSetSpec) -> list[PickledVideo]:
    """The videos of an index pickle, in the order of the file.

    Raises UserError naming the file, and the video and row at fault, if the file is missing, unreadable or not an index
    pickle with the classes of `spec`.
    """
    content = load_plain(path)
    groups = content if isinstance(content, (list, tuple)) else ()
    if not groups or not all(isinstance(group, (list, tuple)) for group in groups):
        raise _not_an_index(path)
    first = next((group[0] for group in groups if group), None)
    if isinstance(first, str):
        return _from_parts(path, groups, spec)
    if not isinstance(first, (list, tuple)):
        raise _not_an_index(path)
    return [_from_rows(f"{path}: video {number}", rows, spec) for number, rows in enumerate(groups, start=1)]


def _not_an_index(path: Path) -> UserError:
    return UserError(
        f"{path}: not an index: neither a list of videos with rows [path, tools..., phase] nor lists of paths, labels "
        "and frames per video"
    )


def _from_rows(where: str, rows: Sequence[Any], spec: DataSetSpec) -> PickledVideo:
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row, (list, tuple)) and row):
            raise UserError(f"{where}, row {number}: not a row [path, labels...]")
    return _video(where, [row[0] for row in rows], [row[1:] for row in rows], "none", spec)


def _from_parts(path: Path, groups: Sequence[Any], spec: DataSetSpec) -> list[PickledVideo]:
    parts = next((splits for splits in LAYOUTS.values() if splits and 3 * len(splits) == len(groups)), None)
    if parts is None:
        raise UserError(f"{path}: contains {len(groups)} lists instead of 9, 6 or 3 (paths, labels, frames per video)")
    order = _order_of_lists(groups)
    if order != sorted(order):
        groups = [groups[k] for k in order]
        say(f"{path.name}: its lists are sorted into paths, labels and frames per video of {', '.join(parts)}")
    videos = []
    for number, split in enumerate(parts):
        paths, labels, lengths = groups[number :: len(parts)]
        if not all(type(length) is int and 0 < length <= len(paths) for length in lengths):
            raise UserError(f"{path}: part {split}: its frames per video are not integers of 1 or more")
        if not len(paths) == len(labels) == sum(lengths):
            raise UserError(
                f"{path}: part {split}: {len(paths)} paths, {len(labels)} labels and {sum(lengths)} frames in "
                f"{len(lengths)} videos do not agree"
            )
        ends = list(accumulate(lengths))
        for video, (end, length) in enumerate(zip(ends, lengths, strict=True), start=1):
            span = slice(end - length, end)
            videos.append(_video(f"{path}: part {split}, video {video}", paths[span], labels[span], split, spec))
    return videos


def _order_of_lists(groups: Sequence[Any]) -> list[int]:
    """The positions of the lists: those of paths for all parts, then those of labels, then those of frames per video.

    MTRCNet writes the lists in this order. Trans-SVNet writes the lists of paths, labels and frames per video for train
    and val in turn, and then those of test. The types of the entries decide. If they cannot, because some lists are
    empty or labels are integers like frames per video, the order must be one of these two.
    """
    kinds = [
        (str, list, int).index(type(group[0])) if group and type(group[0]) in (str, list, int) else 3
        for group in groups
    ]
    if sorted(kinds) == [k for k in range(3) for _ in range(len(groups) // 3)]:
        return sorted(range(len(groups)), key=kinds.__getitem__)
    test_last = len(groups) == 9 and (kinds[6] == 0 or kinds[2] in (1, 2))
    return [0, 1, 6, 2, 3, 7, 4, 5, 8] if test_last else list(range(len(groups)))


def _video(where: str, paths: Sequence[Any], labels: Sequence[Any], split: Split, spec: DataSetSpec) -> PickledVideo:
    if not paths:
        raise UserError(f"{where}: has no rows")
    width = len(labels[0]) if isinstance(labels[0], (list, tuple)) else 1
    for number, (path, row) in enumerate(zip(paths, labels, strict=True), start=1):
        if not (isinstance(path, str) and path and path.isprintable()):
            raise UserError(f"{where}, row {number}: its path is not a file name")
        _require_labels(f"{where}, row {number}", row, width, spec)
    table = np.array(labels, dtype=np.int64).reshape(len(paths), -1)  # (R, 1) or (R, K + 1)
    tools = table[:, :-1].astype(np.int8) if table.shape[1] > 1 else None
    return PickledVideo(where, tuple(paths), table[:, -1], tools, split)


def _require_labels(where: str, row: Any, width: int, spec: DataSetSpec) -> None:
    cells = row if isinstance(row, (list, tuple)) else [row]
    if len(cells) != width or width not in (1, len(spec.tools) + 1):
        raise UserError(
            f"{where}: {len(cells)} labels; {spec.name} has {len(spec.tools)} tools and a phase, or a phase only"
        )
    if not all(type(cell) is int for cell in cells):
        raise UserError(f"{where}: a label is not an integer")
    if not 0 <= cells[-1] < len(spec.phases):
        raise UserError(f"{where}: phase {cells[-1]}; {spec.name} has phases 0 to {len(spec.phases) - 1}")
    if not all(cell in (0, 1) for cell in cells[:-1]):
        raise UserError(f"{where}: a tool label is neither 0 nor 1")
