"""The folder layout of MS-TCN (Farha and Gall 2019) and ASFormer (Yi et al. 2021), which other programs share.

`features/VIDEO.npy` has the features (D, T), `groundTruth/VIDEO.txt` one class name per line, `mapping.txt` lines of a
number and a name, and `splits/train.split1.bundle` lines `VIDEO.txt`. The programs split lines of `mapping.txt` at
white space, take what is before the first dot as a video's name, and lose a last line without a line break. So names
are written without blanks and dots, and every line with its line break.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from configs.dataset_spec import DataSetSpec, class_ids, folded_name
from configs.errors import UserError, listed
from features.dataset.annotations import read_content, shown_cell, text_lines, unknown_class
from features.dataset.index import AnnotationFile, first_fault
from features.dataset.splits import Split

FEATURES, TRUTH, MAPPING, SPLITS = "features", "groundTruth", "mapping.txt", "splits"
BUNDLE = ".bundle"
BACKGROUND = "background"  # the class that the programs' own metrics leave out
PARTS: tuple[Split, ...] = ("train", "val", "test")


def read_mapping(path: Path) -> tuple[str, ...]:
    """Return the class names of `mapping.txt` in the order of their numbers.

    Raises UserError naming the line that is not a number and a name, or if the numbers are not 0, 1, 2, ...
    """
    names: dict[int, str] = {}
    for line_number, line in enumerate(text_lines(read_content(path), path), start=1):
        number, name = (*line.split(maxsplit=1), "", "")[:2]
        name = name.strip()
        if not (number.isascii() and number.isdigit() and len(number) < 5 and name and name.isprintable()):
            raise UserError(f"{path}: line {line_number} is {shown_cell(line)}, not a number, a blank and a class name")
        if int(number) in names:
            raise UserError(f"{path}: line {line_number}: number {int(number)} occurs twice")
        names[int(number)] = name
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{path}: its numbers must be 0 to {len(names) - 1}, each once")
    return tuple(names[number] for number in range(len(names)))


def spec_of_mapping(path: Path, name: str, fps: float) -> DataSetSpec:
    """Describe a data set by its `mapping.txt` alone. Raises UserError if the names cannot be those of a data set."""
    names = read_mapping(path)
    try:
        return DataSetSpec(
            name="".join(mark if mark.isascii() and mark.isalnum() else "-" for mark in name).strip("-") or "imported",
            annotation_fps=fps,
            phases=names,
            background=tuple(one for one in names if one == BACKGROUND),
            patterns={"video": r"(?P<id>.+)\.{video}", "frames": "(?P<id>.+)"},
        )
    except ValidationError as error:
        raise UserError(f"{path}: {first_fault(error)}; give the data set's description with --dataset") from error


def read_truth(path: Path, relative: str, spec: DataSetSpec) -> tuple[NDArray[np.int8], AnnotationFile]:
    """Return the phases (T,) of a file in `groundTruth`, and what the index records about the file.

    A last line without a line break counts. Raises UserError naming the line with an unknown class.
    """
    content = read_content(path)
    known, phases = class_ids(spec.phases, spec.phase_aliases), []
    for number, line in enumerate(text_lines(content, path), start=1):
        phase = known.get(folded_name(line))
        if phase is None:
            raise UserError(f"{path}: line {number}: {unknown_class('phase', line.strip(), spec)}")
        phases.append(phase)
    if not phases:
        raise UserError(f"{path}: has no lines")
    record = AnnotationFile(path=relative, sha256=sha256(content).hexdigest(), rows=len(phases))
    return np.array(phases, dtype=np.int8), record


def read_bundles(folder: Path, name: str | None) -> dict[str, Split]:
    """Return the split of each video that the bundles of one division name, by the name of its files.

    `name` is what is between `train.` and `.bundle`, by default that of the only division. Raises UserError if there
    are several divisions and none is named, or if a video is in two parts.
    """
    divisions = sorted({path.name.removesuffix(BUNDLE).partition(".")[2] for path in folder.glob(f"*{BUNDLE}")})
    if name is None and len(divisions) != 1:
        raise UserError(f"{folder}: choose one of its divisions with --split: {listed(divisions, 12) or 'it has none'}")
    chosen = divisions[0] if name is None else name
    if chosen not in divisions:
        raise UserError(f"{folder}: has no division {chosen!r} (--split); it has {listed(divisions, 12) or 'none'}")
    found: dict[str, Split] = {}
    for part in PARTS:
        path = folder / f"{part}.{chosen}{BUNDLE}"
        for line in text_lines(read_content(path), path) if path.is_file() else ():
            video = line.strip().removesuffix(".txt")
            if video and found.setdefault(video, part) != part:
                raise UserError(f"{path}: {shown_cell(video)} is in {found[video]} too")
    if not found:
        raise UserError(f"{folder}: no video is in train.{chosen}{BUNDLE} or test.{chosen}{BUNDLE}")
    return found


# ---------------------------------------------------------------------------------------------- writing


def written_names(names: Sequence[str], what: str) -> dict[str, str]:
    """Return each name of a class or a video (`what`) without blanks and dots, as these programs can read it.

    Raises UserError if two names become the same.
    """
    written = {name: "_".join(name.replace(".", " ").split()) for name in names}
    seen: dict[str, str] = {}
    for name, short in written.items():
        if not short or seen.setdefault(short, name) != name:
            raise UserError(
                f"{what} {name!r}: would be written as {short!r}, as {seen.get(short)!r}; rename one of them"
            )
    return written


def truth_text(phase: NDArray[np.int8], names: Sequence[str]) -> str:
    """The text of a `groundTruth` file, from phases (T,) and the names as written."""
    return "".join(f"{names[number]}\n" for number in phase.tolist())


def mapping_text(names: Sequence[str]) -> str:
    """The text of `mapping.txt`."""
    return "".join(f"{number} {name}\n" for number, name in enumerate(names))


def bundle_text(videos: Sequence[str]) -> str:
    """The text of a bundle, from the names of its videos as written."""
    return "".join(f"{video}.txt\n" for video in videos)


def divided(splits: Mapping[str, Split]) -> dict[Split, list[str]]:
    """The videos of each part, without empty parts."""
    return {part: videos for part in PARTS if (videos := [name for name, split in splits.items() if split == part])}
