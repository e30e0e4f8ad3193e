"""Phase files of other programs, in the text formats in use, read strictly and without assuming what numbers mean.

A file is UTF-8 text and holds a row a frame, columns divided by tabs, commas, semicolons or blanks: the phase alone,
the frame and the phase, or, below a header that names them, these among other columns (the prediction files of
`evaluation.predictions` are of that kind). Phases are names, or ids from 0. Frames may count anything (source frames,
samples, seconds): only their order and spacing are used. Everything else is an error that names file and row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import DataSetSpec, class_ids, folded_name
from features.annotations import read_content
from features.class_order import ids_of_order
from features.discover import natural_key, numbered_id

SUFFIXES = (".txt", ".csv", ".tsv")
_OTHER_KINDS = ("-tool", "-timestamp")  # what Cholec80 keeps beside `-phase` files
_FRAME_WORDS = ("frame", "frames", "frame_id", "frame_index", "index", "second", "seconds", "time", "time_s")
_NAME_WORD = "phase_name"  # beside ids, as in our own files: names are safe, so they decide
_PHASE_WORDS = (_NAME_WORD, "phase", "phase_id", "label", "prediction", "predicted", "pred", "gt", "truth", "class")
_MARKS = ("\t", ",", ";")


@dataclass(frozen=True, eq=False)
class PhaseFile:
    """One video's phases as a file has them.

    `phase` (T,) int16 in the data set's order, -1 where a frame has no label. `frame` (T,) float64 rising, in a unit of
    the file's own; None without such a column. `fps` is the rate of the rows where the file says it (a column
    `time_s`). `numbered`: the file held ids, not names.
    """

    path: Path
    phase: NDArray[np.int16]
    frame: NDArray[np.float64] | None
    fps: float | None
    numbered: bool
    header: bool


# ---------------------------------------------------------------------------------------------- folders


def find_phase_files(folder: Path, spec: DataSetSpec) -> tuple[dict[str, Path], list[str]]:
    """The phase files of a folder by video id, and the names of files that have no video number.

    The number comes from names like `video41-phase.txt`, `video_41.csv` or `41.txt`. Raises UserError when the folder
    holds none, when a name has several numbers, or two files have the same.
    """
    try:
        paths = sorted((path for path in folder.iterdir() if _is_phase_file(path)), key=lambda p: natural_key(p.name))
    except OSError as error:
        raise UserError(f"{folder}: not a folder that can be read ({error.strerror}); name one with files") from error
    found: dict[str, Path] = {}
    without = []
    for path in paths:
        number = _video_number(path, spec)
        if number is None:
            without.append(path.name)
            continue
        video = numbered_id(number, spec)
        if video in found:
            raise UserError(f"{path} and {found[video]}: two files for video {number}; keep one of them")
        found[video] = path
    if not found:
        raise UserError(f"{folder}: holds no file with a video number, like video41-phase.txt, 41.txt or video41.csv")
    return found, without


def _is_phase_file(path: Path) -> bool:
    return (
        path.suffix.casefold() in SUFFIXES
        and not path.name.startswith(".")
        and not path.stem.casefold().endswith(_OTHER_KINDS)
        and path.is_file()
    )


def _video_number(path: Path, spec: DataSetSpec) -> int | None:
    stem = path.stem.casefold().replace(spec.name.casefold(), "")
    texts = re.findall(r"video[_ -]?([0-9]+)", stem) or re.findall(r"[0-9]+", stem)
    numbers = {int(text) for text in texts}
    if len(numbers) > 1:
        raise UserError(f"{path}: which number is the video's? Rename it to something like video41.txt")
    return numbers.pop() if numbers else None


# ---------------------------------------------------------------------------------------------- one file


def read_foreign_phases(path: Path, spec: DataSetSpec, order: Sequence[str], *, unlabelled: bool = False) -> PhaseFile:
    """Read one video's phases. `order` names ids 0, 1, ... where the file holds ids.

    With `unlabelled`, id -1 stands for a frame without a label (a ground truth may have such, a prediction not). Raises
    UserError naming the file and the row for everything that is not in order.
    """
    header, rows = _table(path)
    where = _Place(path, header is not None)
    columns = _columns(where, header, rows)
    phase, numbered = _phases(where, columns["phase"], spec, order, unlabelled)
    if "name" in columns:
        names, was_numbered = _phases(where, columns["name"], spec, order, False)
        if not (was_numbered or np.array_equal(names, phase)):
            row = int(np.flatnonzero(names != phase)[0])
            raise where.error(
                row, f"has phase {columns['phase'][row]}, called {columns['name'][row]!r}; id and name must agree"
            )
        numbered = was_numbered
    frame = _rising(where, columns["frame"]) if "frame" in columns else None
    time_s = _rising(where, columns["time_s"]) if "time_s" in columns else None
    fps = None if time_s is None or len(time_s) < 2 else (len(time_s) - 1) / float(time_s[-1] - time_s[0])
    return PhaseFile(path, phase, frame, fps, numbered, header is not None)


@dataclass(frozen=True)
class _Place:
    """Where in a file: rows are those below the header, lines count from 1."""

    path: Path
    header: bool

    def error(self, row: int, problem: str) -> UserError:
        return UserError(f"{self.path}: row {row + 1} (line {row + 1 + self.header}) {problem}")


def _table(path: Path) -> tuple[list[str] | None, list[list[str]]]:
    """Header cells (None without a header) and the cells of the rows, each row as wide as the first."""
    try:
        text = read_content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as plain UTF-8 text") from error
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")]
    second = lines[min(1, len(lines) - 1)]  # a row, whatever the first line is
    mark = next((mark for mark in _MARKS if mark in second), None)
    header = _header(lines[0], mark)
    body = lines[header is not None :]
    if not "".join(body):
        raise UserError(f"{path}: holds no rows")
    place = _Place(path, header is not None)
    rows = [_split(line, mark) for line in body]
    width = len(header or rows[0])
    for row, cells in enumerate(rows):
        if len(cells) != width or not body[row]:
            what = f"has {len(cells)} column(s), not {width}" if body[row] else "is blank"
            raise place.error(row, f"{what}; every row of the file is wanted in the same form")
    return header, rows


def _split(line: str, mark: str | None) -> list[str]:
    if mark:
        return [cell.strip(' "') for cell in line.split(mark)]
    cells = line.split(None, 1)  # a name may hold blanks
    return cells if len(cells) == 2 and _number(cells[0]) is not None else [line.strip()]


def _header(line: str, mark: str | None) -> list[str] | None:
    """The first line's cells where it is a header, which may be divided in another way than the rows."""
    cells = line.split(mark) if mark and mark in line else re.split(r"[\t,; ]+", line.strip())
    words = [cell.strip(' "').casefold() for cell in cells]
    known = any(word in _FRAME_WORDS or word in _PHASE_WORDS for word in words)
    return words if known and not any(_number(word) is not None for word in words) else None


def _columns(where: _Place, header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> dict[str, Sequence[str]]:
    """The columns that matter: `phase`, and where there are such `frame`, `time_s` and `name` (names beside ids)."""
    table = list(zip(*rows, strict=True))
    if header is None:
        if len(table) > 2:
            raise where.error(0, f"has {len(table)} columns and no header that names them; wanted: frame and phase")
        return dict(zip(("frame", "phase")[-len(table) :], table, strict=True))
    candidates = [word for word in header if word in _PHASE_WORDS]
    if len(header) == 2 and header[0] in _FRAME_WORDS:
        candidates = [header[1]]
    ids = [word for word in candidates if word != _NAME_WORD] or candidates
    if len(ids) != 1:
        problem = f"names {len(ids)} columns that could be the phase" if ids else "names no column of phases"
        raise UserError(f"{where.path}: the header {problem}; call one of them phase")
    columns = {"phase": table[header.index(ids[0])]}
    if _NAME_WORD in candidates and ids != [_NAME_WORD]:
        columns["name"] = table[header.index(_NAME_WORD)]
    for word in _FRAME_WORDS:
        if word in header:
            columns.setdefault("frame", table[header.index(word)])
    return columns | ({"time_s": table[header.index("time_s")]} if "time_s" in header else {})


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _rising(where: _Place, cells: Sequence[str]) -> NDArray[np.float64]:
    """A column of frames or times: numbers that rise, by steps that differ by less than a missing row would make."""
    values = [_number(cell) for cell in cells]
    if None in values:
        row = values.index(None)
        raise where.error(row, f"has frame {_shown(cells[row])}, which is not a number")
    numbers = np.array(values, dtype=np.float64)
    steps = np.diff(numbers)
    usual = float(np.median(steps)) if len(steps) else 1.0
    # Sampling 25 fps at 10 gives steps of 2 and 3; a row left out or twice there gives at least 4 or 0.
    uneven = np.abs(steps - usual) > 0.5 * abs(usual) + 1e-9
    wrong = np.flatnonzero(steps <= 0) if (steps <= 0).any() else np.flatnonzero(uneven)
    if len(wrong):
        row = int(wrong[0]) + 1
        raise where.error(
            row, f"has frame {cells[row]} after {cells[row - 1]}, where rows are {usual:g} apart; no row may be missing"
        )
    return numbers


def _phases(
    where: _Place, cells: Sequence[str], spec: DataSetSpec, order: Sequence[str], unlabelled: bool
) -> tuple[NDArray[np.int16], bool]:
    """Our ids of a column of phases (T,), and whether it held ids. Each distinct cell is looked at once."""
    distinct = dict.fromkeys(cells)
    numbers = {cell: value for cell in distinct if (value := _number(cell)) is not None}
    if numbers and len(numbers) < len(distinct):
        odd = next(cell for cell in distinct if (cell in numbers) != (cells[0] in numbers))
        raise where.error(cells.index(odd), f"has phase {_shown(odd)}: ids and names are mixed in one file")
    meaning = _of_ids(where, cells, numbers, spec, order, unlabelled) if numbers else _of_names(where, cells, spec)
    return np.array([meaning[cell] for cell in cells], dtype=np.int16), bool(numbers)


def _of_ids(
    where: _Place,
    cells: Sequence[str],
    numbers: Mapping[str, float],
    spec: DataSetSpec,
    order: Sequence[str],
    unlabelled: bool,
) -> dict[str, int]:
    ours = ids_of_order(order, spec.phases).tolist()
    allowed = {float(number): ours[number] for number in range(len(ours))} | ({-1.0: -1} if unlabelled else {})
    for cell, value in numbers.items():
        if value not in allowed:
            from_one = value == len(ours) and 0.0 not in numbers.values()
            hint = f"; the file seems to count from 1: write {spec.phases[0]} as 0" if from_one else ""
            raise where.error(
                cells.index(cell), f"has phase {_shown(cell)}; ids of {spec.name} are 0 to {len(ours) - 1}{hint}"
            )
    return {cell: allowed[value] for cell, value in numbers.items()}


def _of_names(where: _Place, cells: Sequence[str], spec: DataSetSpec) -> dict[str, int]:
    """Names as in the data set or one of its aliases, however they are spelled (`folded_name`)."""
    known = class_ids(spec.phases, spec.phase_aliases)
    for cell in dict.fromkeys(cells):
        if folded_name(cell) not in known:
            raise where.error(
                cells.index(cell), f"has the unknown phase {_shown(cell)}; {spec.name} has {', '.join(spec.phases)}"
            )
    return {cell: known[folded_name(cell)] for cell in dict.fromkeys(cells)}


def _shown(cell: str) -> str:
    return repr(cell if len(cell) <= 60 else f"{cell[:57]}...")
