"""Phase files of other programs, in the text formats in use, read strictly and without assuming what numbers mean.

A file is UTF-8 text and holds one row per frame, columns delimited by tabs, commas, semicolons or blanks: the phase
alone, the frame and the phase, or, below a header that names them, these among other columns (the prediction files of
`evaluation.files.predictions` are of that kind). Phases are names, ids from 0, or one column per phase (one-hot,
probabilities, logits). MS-TCN's recognition files hold the names on one line. Frames may count anything (source frames,
samples, seconds). -1, an empty cell or a row that is missing by the frame numbers means no label. Everything else is an
error that names file and row, and the form where one was recognised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec, class_ids, folded_name
from configs.errors import UserError
from features.dataset.annotations import NO_LABEL, read_content, shown_cell, text_lines, unknown_class
from features.dataset.phase_order import ids_of_order
from features.ids import id_of_stem, natural_key, normal_id, numbered_id

SUFFIXES = (".txt", ".csv", ".tsv", "")  # MS-TCN's recognition files have none
_OTHER_KINDS = ("-tool", "-timestamp")  # what Cholec80 keeps beside `-phase` files
_FRAME_WORDS = ("frame", "frames", "frame_id", "frame_index", "index", "second", "seconds", "time", "time_s")
_SECOND_WORDS = ("second", "seconds", "time_s")
_NAME_WORD = "phase_name"  # beside ids, as in our own files: names are safe, so they decide
_PHASE_WORDS = (_NAME_WORD, "phase", "phase_id", "label", "prediction", "predicted", "pred", "gt", "truth", "class")
_START_WORDS = ("start", "start_frame", "start_time", "start_s", "onset", "begin", "from")
_MARKS = ("\t", ",", ";")
_RECOGNITION = "###"  # the first characters of MS-TCN's recognition files
_NUMBER, _GAP = r"[0-9.:]+", r"[\t ,;]+"
_SEGMENT = re.compile(rf"{_NUMBER}{_GAP}{_NUMBER}{_GAP}[^\W\d].*|[^\W\d].*?{_GAP}{_NUMBER}{_GAP}{_NUMBER}")


@dataclass(frozen=True, eq=False)
class PhaseFile:
    """The phases of one video in a file.

    `phase` (T,) int16 in the data set's order, -1 where there is none. `frame` (T,) float64 rising, in a unit of the
    file's own; None without such a column. `fps` is the rate of the rows where the file has a column of seconds.
    `numbered`: the file held ids or a column per phase, not names. `missing`: rows of `phase` and `frame` that were
    filled in because the frame numbers skip them.
    """

    path: Path
    phase: NDArray[np.int16]
    frame: NDArray[np.float64] | None
    fps: float | None
    numbered: bool
    header: bool
    missing: int = 0

    @property
    def step(self) -> float | None:
        """The mean distance between rows in the file's own unit; None without a frame column or with a single row."""
        if self.frame is None or len(self.frame) < 2:
            return None
        return float(self.frame[-1] - self.frame[0]) / (len(self.frame) - 1)


# ---------------------------------------------------------------------------------------------- folders


def find_phase_files(folder: Path, spec: DataSetSpec) -> tuple[dict[str, Path], list[str]]:
    """The phase files of a folder by video id, and the names of files without a video number or of another kind.

    The number comes from names like `video41-phase.txt`, `video_41.csv` or `41.txt`; a name without a number is an id
    where the data set's annotation files are named by ids. Raises UserError if the folder has no such file, a name
    has several numbers, or two files have the same.
    """
    try:
        paths = sorted((path for path in folder.iterdir() if _may_hold_phases(path)), key=lambda p: natural_key(p.name))
    except OSError as error:
        raise UserError(f"{folder}: not a folder that can be read ({error.strerror}); name one with files") from error
    found: dict[str, Path] = {}
    without = []
    for path in paths:
        readable = path.suffix.casefold() in SUFFIXES
        numbers = _numbers(path, spec) if readable else set()
        video = numbered_id(min(numbers), spec) if len(numbers) == 1 else _named_id(path, spec) if readable else None
        if video is None and numbers:
            raise UserError(f"{path}: which number is the video's? Rename it to something like video41.txt")
        if video is None:
            without.append(path.name)
            continue
        if video in found:
            which = min(numbers) if len(numbers) == 1 else video
            raise UserError(f"{path} and {found[video]}: two files for video {which}; keep one of them")
        found[video] = path
    if not found:
        other = f"; {without[0]} and its like are not read, so write text, one row per frame" if without else ""
        raise UserError(
            f"{folder}: holds no file with a video number, like video41-phase.txt, 41.txt or video41.csv{other}"
        )
    return found, without


def _may_hold_phases(path: Path) -> bool:
    return not path.name.startswith(".") and not path.stem.casefold().endswith(_OTHER_KINDS) and path.is_file()


def _numbers(path: Path, spec: DataSetSpec) -> set[int]:
    stem = path.stem.casefold().replace(spec.name.casefold(), "")
    return set(map(int, re.findall(r"video[_ -]?([0-9]+)", stem) or re.findall(r"[0-9]+", stem)))


def _named_id(path: Path, spec: DataSetSpec) -> str | None:
    """The id in a file's name, if the data set's annotation files are named by ids."""
    names = (f"{id_of_stem(path.stem)}{tail}" for tail in (".txt", "-phase.txt"))
    match = next(filter(None, map(spec.patterns.compiled("phase").fullmatch, names)), None)
    return normal_id(match["id"]) if match and not (match["id"] or "0").isdecimal() else None


# ---------------------------------------------------------------------------------------------- one file


def read_external_phases(path: Path, spec: DataSetSpec, order: Sequence[str] | None) -> PhaseFile:
    """Read one video's phases, of a ground truth or a prediction.

    `order` names ids 0, 1, ... and the columns of one-hot rows and scores; None takes ids in the data set's order and
    refuses columns that no header names. Raises UserError naming the file and the row for everything that cannot be
    read.
    """
    header, rows, where = _table(path, spec)
    columns = _columns(where, header, rows, spec)
    if isinstance(columns["phase"], tuple):
        phase, numbered = _phases(where, columns["phase"], spec, order or spec.phases)
    else:
        phase, numbered = _of_scores(where, columns["phase"], spec, order), True
    if "name" in columns:
        names, was_numbered = _phases(where, columns["name"], spec, order or spec.phases)
        if not (was_numbered or np.array_equal(names, phase)):
            row = int(np.flatnonzero(names != phase)[0])
            raise where.error(
                row, f"has phase {columns['phase'][row]}, called {columns['name'][row]!r}; id and name must agree"
            )
        numbered = was_numbered
    frame = _rising(where, columns["frame"]) if "frame" in columns else None
    time_s = _rising(where, columns["time_s"]) if "time_s" in columns else None
    given = len(phase)
    if frame is not None:
        phase, frame = _with_missing_rows(where, phase, frame, time_s)
    fps = None if time_s is None or len(time_s) < 2 else 1.0 / _usual_step(np.diff(time_s))[0]
    return PhaseFile(path, phase, frame, fps, numbered, header is not None, len(phase) - given)


@dataclass(frozen=True)
class _Place:
    """Positions in a file for messages: rows below the header, lines from 1; `lines` False: rows are not lines."""

    path: Path
    header: bool
    lines: bool = True

    def error(self, row: int, problem: str) -> UserError:
        line = f" (line {row + 1 + self.header})" if self.lines else ""
        return UserError(f"{self.path}: row {row + 1}{line} {problem}")


def _table(path: Path, spec: DataSetSpec) -> tuple[list[str] | None, list[list[str]], _Place]:
    """Header cells (None without a header) and the cells of the rows, each row as wide as the first."""
    lines = [line.rstrip(" ") for line in text_lines(read_content(path), path)]
    if lines and lines[0].startswith(_RECOGNITION):
        names = [[name] for line in lines[1:] if not line.startswith(_RECOGNITION) for name in line.split()]
        return None, _filled(path, names), _Place(path, False, lines=False)
    _refuse_other_forms(path, lines, spec)
    second = next((line for line in lines[1:] if line.strip()), "".join(lines[:1]))  # a row, whatever the first line is
    mark = next((mark for mark in _MARKS if mark in second), None)
    header = _header(lines[0], mark, spec) if lines else None
    body = lines[header is not None :]
    rows = _filled(path, [_split(line, mark) for line in body])
    place = _Place(path, header is not None)
    width = len(header or rows[0])
    if header is None and width > 2 and not any(row[-1] for row in rows if len(row) == width):
        width -= 1  # a mark at the end of every row
    for row, cells in enumerate(rows):
        while len(cells) > width and not cells[-1]:
            cells.pop()
        if len(cells) != width or (width > 1 and not any(cells)):
            what = f"has {len(cells)} column(s), not {width}" if any(cells) else "is blank"
            raise place.error(row, f"{what}; every row of the file must have the same form")
    return header, rows, place


def _filled(path: Path, rows: list[list[str]]) -> list[list[str]]:
    if not any(cell for cells in rows for cell in cells):
        raise UserError(f"{path}: holds no rows")
    return rows


def _refuse_other_forms(path: Path, lines: Sequence[str], spec: DataSetSpec) -> None:
    """Raise UserError for forms of files that are known but not read, naming the form."""
    first = lines[0].strip() if lines else ""
    words = re.split(r"[\t,; ]+", first.casefold())
    if _SEGMENT.fullmatch(first) and folded_name(first) not in class_ids(spec.phases, spec.phase_aliases):
        raise UserError(
            f"{path}: line 1 looks like a segment (start, end and phase); segments are not read: write one row per "
            "frame, or name the columns in a header (frame,time_s,phase)"
        )
    if any(word in _START_WORDS for word in words):
        raise UserError(
            f"{path}: the header names segments ({first[:60]}), which are not read; write one row per frame"
        )
    if first.startswith(("{", "[")) or any("[" in line for line in lines[:2]):
        raise UserError(
            f"{path}: holds JSON or lists in brackets, which are not read; write text, one row per frame and one file "
            "per video"
        )


def _split(line: str, mark: str | None) -> list[str]:
    if mark:
        return [cell.strip(' "') for cell in line.split(mark)]
    cells = line.split()
    if len(cells) > 2 and all(_number(cell) is not None for cell in cells):
        return cells
    cells = line.split(None, 1)  # a name may hold blanks
    return cells if len(cells) == 2 and _number(cells[0]) is not None else [line.strip()]


def _header(line: str, mark: str | None, spec: DataSetSpec) -> list[str] | None:
    """The cells of the first line if it is a header, whose delimiter may differ from that of the rows; else None."""
    cells = line.strip().split(mark) if mark and mark in line else re.split(r"[\t,; ]+", line.strip())
    words = [cell.strip(' "').casefold() for cell in cells]
    known = any(word in _FRAME_WORDS or word in _PHASE_WORDS for word in words) or _score_columns(words, spec)
    if known and not any(_number(word) is not None for word in words):
        return words
    numbers = words[1:] if words[0] in ("", *_FRAME_WORDS) else words  # pandas writes the columns' numbers
    return words if numbers == [str(number) for number in range(len(spec.phases))] and len(numbers) > 2 else None


def _score_columns(header: Sequence[str], spec: DataSetSpec) -> list[int]:
    """The column of each phase, where the header names one for each (`Preparation` or `p_Preparation`), else none."""
    phases = class_ids(spec.phases, spec.phase_aliases)
    found = {phases.get(folded_name(re.sub(r"^(p|prob)_", "", word))): k for k, word in enumerate(header)}
    return [found[c] for c in range(len(spec.phases))] if set(range(len(spec.phases))) <= set(found) else []


def _columns(
    where: _Place, header: Sequence[str] | None, rows: Sequence[Sequence[str]], spec: DataSetSpec
) -> dict[str, Any]:
    """The columns that matter: `phase` and, if present, `frame`, `time_s` and `name` (names next to ids).

    `phase` is a tuple of cells, or a `_Scores` where there is one column per phase.
    """
    table = list(zip(*rows, strict=True))
    if header is None or header[-1].isdecimal():
        return _columns_without_header(where, table, spec)
    candidates = [word for word in header if word in _PHASE_WORDS]
    if len(header) == 2 and header[0] in _FRAME_WORDS:
        candidates = [header[1]]
    ids = [word for word in candidates if word != _NAME_WORD] or candidates
    scores = _score_columns(header, spec)
    if len(ids) != 1 and not (scores and not ids):
        problem = f"names {len(ids)} columns that could be the phase" if ids else "names no column of phases"
        raise UserError(f"{where.path}: the header {problem}; call one of them phase")
    columns: dict[str, Any] = {
        "phase": table[header.index(ids[0])] if ids else _Scores([table[k] for k in scores], True)
    }
    if _NAME_WORD in candidates and ids != [_NAME_WORD]:
        columns["name"] = table[header.index(_NAME_WORD)]
    for word in _FRAME_WORDS:
        if word in header:
            columns.setdefault("frame", table[header.index(word)])
            if word in _SECOND_WORDS:
                columns.setdefault("time_s", table[header.index(word)])
    return columns


def _columns_without_header(where: _Place, table: Sequence[tuple[str, ...]], spec: DataSetSpec) -> dict[str, Any]:
    width, classes = len(table), len(spec.phases)
    if width <= 2:
        return dict(zip(("frame", "phase")[-width:], table, strict=True))
    if width not in (classes, classes + 1):
        raise where.error(
            0,
            f"has {width} columns and no header that names them; expected, in one row per frame: frame and phase, or a "
            f"column for each of the {classes} phases of {spec.name}",
        )
    scores = {"phase": _Scores(table[width - classes :], False)}
    return scores | ({"frame": table[0]} if width > classes else {})


@dataclass(frozen=True)
class _Scores:
    """One column of cells per phase; `named`: a header named them, so that they are in the data set's order."""

    cells: Sequence[tuple[str, ...]]
    named: bool


def _of_scores(where: _Place, scores: _Scores, spec: DataSetSpec, order: Sequence[str] | None) -> NDArray[np.int16]:
    """(T,) our ids of the greatest of each row's scores (the first of equals), -1 where a one-hot row has no 1."""
    values = np.array([[_number(cell) for cell in cells] for cells in scores.cells], dtype=np.float64).T  # (T, C)
    if np.isnan(values).any():
        row, column = np.argwhere(np.isnan(values))[0]
        raise where.error(int(row), f"has score {shown_cell(scores.cells[column][row])}, which is not a number")
    ones = values.sum(axis=1)
    one_hot = bool(np.isin(values, (0.0, 1.0)).all())
    if one_hot and (ones > 1).any():
        raise where.error(int((ones > 1).argmax()), "has several ones, like tool labels; expected one phase per frame")
    if order is None and not scores.named:
        kind = "one-hot rows" if one_hot else "probabilities or scores"
        raise UserError(
            f"{where.path}: holds {kind}, one column for each of {values.shape[1]} phases; say which column is which "
            f"phase with --phase-order ({', '.join((*spec.phase_orders, 'a file', 'or names, comma-separated'))})"
        )
    ours = np.arange(len(spec.phases)) if scores.named else ids_of_order(order or (), spec.phases)
    phase = ours[values.argmax(axis=1)].astype(np.int16)
    return np.where(ones == 0, np.int16(-1), phase) if one_hot else phase


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _rising(where: _Place, cells: Sequence[str]) -> NDArray[np.float64]:
    """A column of frames or times (T,). Raises UserError for a cell that is no number or does not rise."""
    values = [_number(cell) for cell in cells]
    if None in values:
        row = values.index(None)
        raise where.error(row, f"has frame {shown_cell(cells[row])}, which is not a number")
    numbers = np.array(values, dtype=np.float64)
    late = np.flatnonzero(np.diff(numbers) <= 0)
    if len(late):
        row = int(late[0]) + 1
        raise where.error(row, f"has frame {cells[row]} after {cells[row - 1]}; frame numbers must rise")
    return numbers


def _with_missing_rows(
    where: _Place, phase: NDArray[np.int16], frame: NDArray[np.float64], time_s: NDArray[np.float64] | None
) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """Phases (T,) with the rows that the numbers skip filled in without a label, and the numbers of all rows.

    Frame numbers of a variable rate are uneven; if there are times too, rows are missing only if both skip them.
    Raises UserError if frame numbers without times are uneven, and if more rows are missing than present.
    """
    rows, usual, uneven = _rows_passed(frame)
    if time_s is not None:
        rows, uneven = np.minimum(rows, _rows_passed(time_s)[0]), np.zeros_like(uneven)
    if uneven.any() or rows.sum() > 2 * len(frame):
        row = int(uneven.argmax() if uneven.any() else rows.argmax()) + 1
        many = "" if uneven.any() else "; more rows are missing than present"
        apart = f"has frame {frame[row]:g} after {frame[row - 1]:g}, where rows are {usual:g} apart{many}"
        raise where.error(row, apart)
    position = np.r_[0, np.cumsum(rows)].astype(np.int64)
    filled = np.full(int(position[-1]) + 1, -1, np.int16)
    filled[position] = phase
    return filled, np.interp(np.arange(len(filled)), position, frame)


def _rows_passed(numbers: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, NDArray[np.bool_]]:
    """Rows from each number to the next (T - 1,), the usual distance, and which distances are no whole number of rows.

    Sampling 25 fps at 10 gives steps of 2 and 3 (and 30 at 20 as many of 1 as of 2), so only a step of about a whole
    number of usual ones skips rows.
    """
    steps = np.diff(numbers)
    if not len(steps):
        return steps, 0.0, np.zeros(0, bool)
    usual, even = _usual_step(steps)
    rows = np.where(even, 1.0, np.maximum(np.round(steps / usual), 1.0))
    return rows, usual, ~even & ((rows < 2) | (np.abs(steps / usual - rows) > 0.25))


def _usual_step(steps: NDArray[np.float64]) -> tuple[float, NDArray[np.bool_]]:
    """Mean of the typical steps, and a mask (T - 1,) of them."""
    middle = float(np.sort(steps)[(len(steps) - 1) // 2])
    longer = steps == steps.min() + 1
    alternating = bool((longer | (steps == steps.min())).all()) and longer.mean() >= 0.25 and len(steps) > 3
    even = np.abs(steps - middle) <= 0.5 * middle + 1e-9 + alternating
    return float(steps[even].mean()), even


def _phases(
    where: _Place, cells: Sequence[str], spec: DataSetSpec, order: Sequence[str]
) -> tuple[NDArray[np.int16], bool]:
    """Our ids of a column of phases (T,), -1 where there is none, and whether it held ids. Each distinct cell is
    parsed once."""
    distinct = dict.fromkeys(cells)
    numbers = {cell: value for cell in distinct if (value := _number(cell)) is not None}
    none = [cell for cell in distinct if cell in NO_LABEL or numbers.get(cell) == -1]
    for cell in none:
        del distinct[cell]
        numbers.pop(cell, None)
    if numbers and len(numbers) < len(distinct):
        first = next(iter(distinct))
        odd = next(cell for cell in distinct if (cell in numbers) != (first in numbers))
        raise where.error(cells.index(odd), f"has phase {shown_cell(odd)}: ids and names are mixed in one file")
    meaning = _of_ids(where, cells, numbers, spec, order) if numbers else _of_names(where, cells, distinct, spec)
    meaning |= dict.fromkeys(none, -1)
    return np.array([meaning[cell] for cell in cells], dtype=np.int16), bool(numbers)


def _of_ids(
    where: _Place, cells: Sequence[str], numbers: Mapping[str, float], spec: DataSetSpec, order: Sequence[str]
) -> dict[str, int]:
    ours = ids_of_order(order, spec.phases).tolist()
    for cell, value in numbers.items():
        if value not in range(len(ours)):
            from_one = value == len(ours) and 0.0 not in numbers.values()
            hint = f"; the file seems to count from 1: write {spec.phases[0]} as 0" if from_one else ""
            raise where.error(
                cells.index(cell),
                f"has phase {shown_cell(cell)}; ids of {spec.name} are 0 to {len(ours) - 1}, and -1 for none{hint}",
            )
    return {cell: ours[int(value)] for cell, value in numbers.items()}


def _of_names(where: _Place, cells: Sequence[str], names: Iterable[str], spec: DataSetSpec) -> dict[str, int]:
    """Ids of names of the data set or its aliases, in any spelling that `folded_name` equates."""
    known = class_ids(spec.phases, spec.phase_aliases)
    for name in names:
        if folded_name(name) not in known:
            raise where.error(cells.index(name), f"has the {unknown_class('phase', name, spec)}")
    return {name: known[folded_name(name)] for name in names}
