"""Read phase files of other programs, in the usual text formats.

A file is UTF-8 text with one row per frame. Columns are separated by tabs, commas, semicolons or blanks. A row contains
only the phase, or the frame and the phase. Below a header that names the columns, there may be further ones, as in the
prediction files of `evaluation.files.predictions`. Phases are names, ids from 0, or one column per phase (one-hot,
probabilities or logits). MS-TCN's recognition files have all names on one line. Frame numbers may count anything
(source frames, samples, seconds), and nothing is assumed about them.

There is no label where a cell is -1 or empty, or where frame numbers show that a row is missing. Everything else is an
error that names file and row and, if it was recognised, the kind of file.
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
from features.dataset.annotations import UNLABELLED_CELLS, read_content, shown_cell, text_lines, unknown_class
from features.dataset.phase_order import ids_of_order
from features.ids import id_of_stem, natural_key, normal_id, numbered_id

SUFFIXES = (".txt", ".csv", ".tsv", "")  # MS-TCN's recognition files have no suffix
_OTHER_KINDS = ("-tool", "-timestamp")  # files of Cholec80 next to its `-phase` files
_FRAME_WORDS = ("frame", "frames", "frame_id", "frame_index", "index", "second", "seconds", "time", "time_s")
_SECOND_WORDS = ("second", "seconds", "time_s")
_NAME_WORD = "phase_name"  # a column of names next to ids, as in our own files; names decide, as they are unambiguous
_PHASE_WORDS = (_NAME_WORD, "phase", "phase_id", "label", "prediction", "predicted", "pred", "gt", "truth", "class")
_START_WORDS = ("start", "start_frame", "start_time", "start_s", "onset", "begin", "from")
_MARKS = ("\t", ",", ";")
_RECOGNITION = "###"  # the first characters of MS-TCN's recognition files
_ROUNDING = 1e-3  # how far a row of probabilities may be from a sum of 1
_NUMBER, _GAP = r"[0-9.:]+", r"[\t ,;]+"
_SEGMENT = re.compile(rf"{_NUMBER}{_GAP}{_NUMBER}{_GAP}[^\W\d].*|[^\W\d].*?{_GAP}{_NUMBER}{_GAP}{_NUMBER}")


@dataclass(frozen=True, eq=False)
class PhaseFile:
    """The phases of one video, read from a file.

    `phase` (T,) int16 is in the data set's order, with -1 for no label. `frame` (T,) float64 are rising numbers in the
    file's own unit, or None without such a column. `fps` is the rate of the rows if the file has a column of seconds.
    `numbered` says that the file contained ids or a column per phase, rather than names. `missing` is the number of
    rows of `phase` and `frame` that were filled in because the frame numbers skip them. `scores` (T, C) are the
    probabilities in the data set's order, or None if the file has none; one-hot rows and logits are none. `unread`
    says why scores beside a phase are not used, for some are no numbers.
    """

    path: Path
    phase: NDArray[np.int16]
    frame: NDArray[np.float64] | None
    fps: float | None
    numbered: bool
    header: bool
    missing: int = 0
    scores: NDArray[np.float64] | None = None
    unread: str = ""

    @property
    def step(self) -> float | None:
        """The mean distance between rows in the file's own unit; None without frame numbers or with a single row."""
        if self.frame is None or len(self.frame) < 2:
            return None
        return float(self.frame[-1] - self.frame[0]) / (len(self.frame) - 1)


# ---------------------------------------------------------------------------------------------- folders


def find_phase_files(folder: Path, spec: DataSetSpec) -> tuple[dict[str, Path], list[str]]:
    """Find the phase files in a folder; returns them by video id, and the names of all other files.

    The video's number is read from names like `video41-phase.txt`, `video_41.csv` or `41.txt`. If the data set's
    annotation files are named by ids, a name without a number is an id. Raises UserError if the folder has no phase
    file, a name has several numbers, or two files have the same number.
    """
    try:
        paths = sorted((path for path in folder.iterdir() if _may_hold_phases(path)), key=lambda p: natural_key(p.name))
    except OSError as error:
        raise UserError(f"{folder}: not a folder that can be read ({error.strerror}); choose another one") from error
    found: dict[str, Path] = {}
    without = []
    for path in paths:
        readable = path.suffix.casefold() in SUFFIXES
        numbers = _numbers(path, spec) if readable else set()
        video = numbered_id(min(numbers), spec) if len(numbers) == 1 else _named_id(path, spec) if readable else None
        if video is None and numbers:
            raise UserError(f"{path}: the name has several numbers; rename the file to something like video41.txt")
        if video is None:
            without.append(path.name)
            continue
        if video in found:
            which = min(numbers) if len(numbers) == 1 else video
            raise UserError(f"{path} and {found[video]}: two files for video {which}; keep one of them")
        found[video] = path
    if not found:
        other = f"; files like {without[0]} are not read, so write text with one row per frame" if without else ""
        raise UserError(
            f"{folder}: contains no file with a video number, like video41-phase.txt, 41.txt or video41.csv{other}"
        )
    return found, without


def _may_hold_phases(path: Path) -> bool:
    return not path.name.startswith(".") and not path.stem.casefold().endswith(_OTHER_KINDS) and path.is_file()


def _numbers(path: Path, spec: DataSetSpec) -> set[int]:
    stem = path.stem.casefold().replace(spec.name.casefold(), "")
    return set(map(int, re.findall(r"video[_ -]?([0-9]+)", stem) or re.findall(r"[0-9]+", stem)))


def _named_id(path: Path, spec: DataSetSpec) -> str | None:
    """Return the id in a file's name, or None if the data set's annotation files are not named by ids."""
    names = (f"{id_of_stem(path.stem)}{tail}" for tail in (".txt", "-phase.txt"))
    match = next(filter(None, map(spec.patterns.compiled("phase").fullmatch, names)), None)
    return normal_id(match["id"]) if match and not (match["id"] or "0").isdecimal() else None


# ---------------------------------------------------------------------------------------------- one file


def read_external_phases(path: Path, spec: DataSetSpec, order: Sequence[str] | None) -> PhaseFile:
    """Read the phases of one video from a ground truth or a prediction.

    `order` are the phases of ids 0, 1, ..., and of the columns of one-hot rows and scores. With None, ids are in the
    data set's order, and columns without a header are refused. Raises UserError naming the file and the row if anything
    cannot be read.
    """
    header, rows, where = _table(path, spec)
    columns = _columns(where, header, rows, spec)
    scores, unread = None, ""
    if isinstance(columns["phase"], tuple):
        phase, numbered = _phases(where, columns["phase"], spec, order or spec.phases)
        if "scores" in columns:
            try:
                values = _values(where, columns["scores"], phase >= 0)
                scores = values if _are_probabilities(values[phase >= 0]) else None
            except UserError as error:  # the prediction does not need them
                unread = str(error)
    else:
        (phase, scores), numbered = _of_scores(where, columns["phase"], spec, order), True
    if "name" in columns:
        names, was_numbered = _phases(where, columns["name"], spec, order or spec.phases)
        if not (was_numbered or np.array_equal(names, phase)):
            row = int(np.flatnonzero(names != phase)[0])
            raise where.error(
                row, f"has phase {columns['phase'][row]}, but name {columns['name'][row]!r}; id and name must agree"
            )
        numbered = was_numbered
    frame = _rising(where, columns["frame"]) if "frame" in columns else None
    time_s = _rising(where, columns["time_s"]) if "time_s" in columns else None
    given = len(phase)
    if frame is not None:
        phase, frame, rows_of = _with_missing_rows(where, phase, frame, time_s)
        scores = None if scores is None else scores[rows_of]
    fps = None if time_s is None or len(time_s) < 2 else 1.0 / _usual_step(np.diff(time_s))[0]
    return PhaseFile(path, phase, frame, fps, numbered, header is not None, len(phase) - given, scores, unread)


@dataclass(frozen=True)
class _Place:
    """Formats the position of an error. Rows are counted from 1 below the header, and lines from 1.

    `lines` is False if the rows of the file are not its lines; only the row is then given.
    """

    path: Path
    header: bool
    lines: bool = True

    def error(self, row: int, problem: str) -> UserError:
        line = f" (line {row + 1 + self.header})" if self.lines else ""
        return UserError(f"{self.path}: row {row + 1}{line} {problem}")


def _table(path: Path, spec: DataSetSpec) -> tuple[list[str] | None, list[list[str]], _Place]:
    """Read a file; returns the header's cells (None without a header), the rows' cells, and a `_Place` for messages.

    Raises UserError unless all rows have the same number of cells.
    """
    lines = [line.rstrip(" ") for line in text_lines(read_content(path), path)]
    if lines and lines[0].startswith(_RECOGNITION):
        names = [[name] for line in lines[1:] if not line.startswith(_RECOGNITION) for name in line.split()]
        return None, _filled(path, names), _Place(path, False, lines=False)
    _refuse_other_forms(path, lines, spec)
    # the second line is a row, even if the first one is a header
    second = next((line for line in lines[1:] if line.strip()), "".join(lines[:1]))
    mark = next((mark for mark in _MARKS if mark in second), None)
    header = _header(lines[0], mark, spec) if lines else None
    body = lines[header is not None :]
    rows = _filled(path, [_split(line, mark) for line in body])
    place = _Place(path, header is not None)
    width = len(header or rows[0])
    if header is None and width > 2 and not any(row[-1] for row in rows if len(row) == width):
        width -= 1  # every row ends with a separator
    for row, cells in enumerate(rows):
        while len(cells) > width and not cells[-1]:
            cells.pop()
        if len(cells) != width or (width > 1 and not any(cells)):
            what = f"has {len(cells)} column(s), not {width}" if any(cells) else "is blank"
            raise place.error(row, f"{what}; every row of the file must have the same form")
    return header, rows, place


def _filled(path: Path, rows: list[list[str]]) -> list[list[str]]:
    if not any(cell for cells in rows for cell in cells):
        raise UserError(f"{path}: contains no rows; write one row per frame")
    return rows


def _refuse_other_forms(path: Path, lines: Sequence[str], spec: DataSetSpec) -> None:
    """Raise UserError naming the kind of file if it is a known kind that is not read."""
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
            f"{path}: contains JSON or lists in brackets, which are not read; write text, with one row per frame and "
            "one file per video"
        )


def _split(line: str, mark: str | None) -> list[str]:
    if mark:
        return [cell.strip(' "') for cell in line.split(mark)]
    cells = line.split()
    if len(cells) > 2 and all(_number(cell) is not None for cell in cells):
        return cells
    cells = line.split(None, 1)  # split only once, since a name may contain blanks
    return cells if len(cells) == 2 and _number(cells[0]) is not None else [line.strip()]


def _header(line: str, mark: str | None, spec: DataSetSpec) -> list[str] | None:
    """Return the cells of the first line if it is a header, otherwise None. Its separator may differ from the rows'."""
    cells = line.strip().split(mark) if mark and mark in line else re.split(r"[\t,; ]+", line.strip())
    words = [cell.strip(' "').casefold() for cell in cells]
    known = any(word in _FRAME_WORDS or word in _PHASE_WORDS for word in words) or _score_columns(words, spec)
    if known and not any(_number(word) is not None for word in words):
        return words
    numbers = words[1:] if words[0] in ("", *_FRAME_WORDS) else words  # pandas writes numbers as column names
    return words if numbers == [str(number) for number in range(len(spec.phases))] and len(numbers) > 2 else None


def _score_columns(header: Sequence[str], spec: DataSetSpec) -> list[int]:
    """Return the columns of the phases if the header names all (`Preparation` or `p_Preparation`), else none."""
    phases = class_ids(spec.phases, spec.phase_aliases)
    found = {phases.get(folded_name(re.sub(r"^(p|prob)_", "", word))): k for k, word in enumerate(header)}
    return [found[c] for c in range(len(spec.phases))] if set(range(len(spec.phases))) <= set(found) else []


def _columns(
    where: _Place, header: Sequence[str] | None, rows: Sequence[Sequence[str]], spec: DataSetSpec
) -> dict[str, Any]:
    """Return the columns that are used: `phase` and, if they exist, `frame`, `time_s`, `name` (names next to ids) and
    `scores` (a `_Scores`, next to phases).

    `phase` is a tuple of cells, or a `_Scores` if there is one column per phase.
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
        raise UserError(f"{where.path}: the header {problem}; name one column phase")
    columns: dict[str, Any] = {
        "phase": table[header.index(ids[0])] if ids else _Scores([table[k] for k in scores], True)
    }
    if ids and scores:
        columns["scores"] = _Scores([table[k] for k in scores], True)
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
            f"has {width} columns and no header that names them; expected one row per frame, with frame and phase or "
            f"with a column for each of the {classes} phases of {spec.name}",
        )
    scores = {"phase": _Scores(table[width - classes :], False)}
    return scores | ({"frame": table[0]} if width > classes else {})


@dataclass(frozen=True)
class _Scores:
    """One column of cells per phase. If a header `named` them, they are already in the data set's order."""

    cells: Sequence[tuple[str, ...]]
    named: bool


def _of_scores(
    where: _Place, scores: _Scores, spec: DataSetSpec, order: Sequence[str] | None
) -> tuple[NDArray[np.int16], NDArray[np.float64] | None]:
    """Return the id of each row's largest score, (T,), the first of equal ones; -1 for a one-hot row without a 1.

    Also returns the scores (T, C) in the data set's order, or None if they are not probabilities.
    """
    values = _values(where, scores, np.ones(len(scores.cells[0]), bool))
    ones = values.sum(axis=1)
    one_hot = bool(np.isin(values, (0.0, 1.0)).all())
    if one_hot and (ones > 1).any():
        raise where.error(int((ones > 1).argmax()), "has several ones, like tool labels; expected one phase per frame")
    if order is None and not scores.named:
        kind = "one-hot rows" if one_hot else "probabilities or scores"
        raise UserError(
            f"{where.path}: contains {kind}, one column for each of {values.shape[1]} phases; say which column is "
            f"which phase with --phase-order ({', '.join((*spec.phase_orders, 'a file', 'or comma-separated names'))})"
        )
    ours = np.arange(len(spec.phases)) if scores.named else ids_of_order(order or (), spec.phases)
    phase = ours[values.argmax(axis=1)].astype(np.int16)
    if one_hot:
        return np.where(ones == 0, np.int16(-1), phase), None
    return phase, values[:, np.argsort(ours)] if _are_probabilities(values) else None


def _values(where: _Place, scores: _Scores, asked: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the scores (T, C), 0 in rows that are not `asked` (T,). Raises UserError for one that is no number."""
    values = np.array([[_number(cell) for cell in cells] for cells in scores.cells], dtype=np.float64).T
    values[~asked] = 0.0
    if np.isnan(values).any():
        row, column = np.argwhere(np.isnan(values))[0]
        raise where.error(int(row), f"has score {shown_cell(scores.cells[column][row])}, which is not a number")
    return values


def _are_probabilities(values: NDArray[np.float64]) -> bool:
    """Return whether the rows of scores (T, C) are probabilities; there must be rows."""
    return bool(values.size and values.min() >= 0 and np.abs(values.sum(axis=1) - 1.0).max() <= _ROUNDING)


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _rising(where: _Place, cells: Sequence[str]) -> NDArray[np.float64]:
    """Return a column of frames or times (T,). Raises UserError unless the cells are rising numbers."""
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
) -> tuple[NDArray[np.int16], NDArray[np.float64], NDArray[np.int64]]:
    """Insert rows without a label where the frame numbers skip rows.

    Returns phases and frame numbers of all rows, and the row in the file of each, (T,) each; for inserted rows, it is
    that of the row before.

    At a variable rate, frame numbers are uneven. If there are times too, rows count as missing only if both skip them.
    Raises UserError if frame numbers without times are uneven, or if more rows are missing than present.
    """
    rows, usual, uneven = _rows_passed(frame)
    if time_s is not None:
        rows, uneven = np.minimum(rows, _rows_passed(time_s)[0]), np.zeros_like(uneven)
    if uneven.any() or rows.sum() > 2 * len(frame):
        row = int(uneven.argmax() if uneven.any() else rows.argmax()) + 1
        many = "" if uneven.any() else "; more rows are missing than present"
        apart = f"has frame {frame[row]:g} after {frame[row - 1]:g}, but rows are usually {usual:g} apart{many}"
        raise where.error(row, apart)
    position = np.r_[0, np.cumsum(rows)].astype(np.int64)
    filled = np.full(int(position[-1]) + 1, -1, np.int16)
    filled[position] = phase
    rows_of = np.searchsorted(position, np.arange(len(filled)), side="right") - 1
    return filled, np.interp(np.arange(len(filled)), position, frame), rows_of


def _rows_passed(numbers: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, NDArray[np.bool_]]:
    """Count the rows from each number to the next, (T - 1,).

    Also returns the usual distance, and which distances are not a whole number of rows. Sampling 25 fps at 10 fps gives
    steps of 2 and 3 (and 30 fps at 20 fps as many steps of 1 as of 2). Therefore a step counts as skipping rows only if
    it is about a multiple of the usual step.
    """
    steps = np.diff(numbers)
    if not len(steps):
        return steps, 0.0, np.zeros(0, bool)
    usual, even = _usual_step(steps)
    rows = np.where(even, 1.0, np.maximum(np.round(steps / usual), 1.0))
    return rows, usual, ~even & ((rows < 2) | (np.abs(steps / usual - rows) > 0.25))


def _usual_step(steps: NDArray[np.float64]) -> tuple[float, NDArray[np.bool_]]:
    """Return the mean of the typical steps, and a mask (T - 1,) that says which steps are typical."""
    middle = float(np.sort(steps)[(len(steps) - 1) // 2])
    longer = steps == steps.min() + 1
    alternating = bool((longer | (steps == steps.min())).all()) and longer.mean() >= 0.25 and len(steps) > 3
    even = np.abs(steps - middle) <= 0.5 * middle + 1e-9 + alternating
    return float(steps[even].mean()), even


def _phases(
    where: _Place, cells: Sequence[str], spec: DataSetSpec, order: Sequence[str]
) -> tuple[NDArray[np.int16], bool]:
    """Convert a column of phases to ids in the data set's order, (T,), with -1 for no label.

    Also returns whether the column contained ids rather than names. Each distinct cell is parsed only once.
    """
    distinct = dict.fromkeys(cells)
    numbers = {cell: value for cell in distinct if (value := _number(cell)) is not None}
    none = [cell for cell in distinct if cell in UNLABELLED_CELLS or numbers.get(cell) == -1]
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
                f"has phase {shown_cell(cell)}; ids of {spec.name} are 0 to {len(ours) - 1}, and -1 for no label{hint}",
            )
    return {cell: ours[int(value)] for cell, value in numbers.items()}


def _of_names(where: _Place, cells: Sequence[str], names: Iterable[str], spec: DataSetSpec) -> dict[str, int]:
    """Return the ids of names or aliases of the data set, in any spelling that `folded_name` treats as equal."""
    known = class_ids(spec.phases, spec.phase_aliases)
    for name in names:
        if folded_name(name) not in known:
            raise where.error(cells.index(name), f"has the {unknown_class('phase', name, spec)}")
    return {name: known[folded_name(name)] for name in names}
