"""Read and write phase and tool annotations in Cholec80's text format.

A file is tab-separated UTF-8 text with a header. A phase file has the header `Frame<TAB>Phase` and one phase name per
row; a tool file has the header `Frame<TAB>Grasper<TAB>...` and a 0 or 1 per tool. -1 or an empty cell means no label.
Frame numbers increase in fixed steps (the stride), which are inferred from the Frame column; rows may be missing. What
the numbers count is decided in `features.dataset.row_numbers`. Class names are compared by
`configs.dataset_spec.folded_name`.

Additions by editors and programs that do not change the meaning are accepted: a byte-order mark, CRLF, blank lines at
the end, tabs and blanks at the end of a line. Everything else is an error that names the file, the row (the first row
below the header is 1) and the line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec, class_ids, folded_name
from configs.errors import UserError
from engine.files import write_text
from features.dataset.annotations import (
    UNLABELLED_CELLS,
    LabelTrack,
    read_content,
    row_error,
    shown_cell,
    stride_of_rows,
    text_lines,
    unknown_class,
)
from features.dataset.formats.base import DEFAULT_FORMAT, FORMATS, AnnotationFormat

_HEADER = re.compile(rb"(\xef\xbb\xbf)?\s*frame *\t", re.IGNORECASE)
_WHOLE_NUMBER = re.compile(r"[0-9]+")
_MISSING = ("nan", "NaN", "NA", "N/A", "-1.0")  # "no label" as written by pandas and R, unless a class has that name
_MAX_DIGITS = 15  # of a frame number: far more than any video needs, and safe in int64


# ---------------------------------------------------------------------------------------------- reading


def read_phase_file(path: Path, spec: DataSetSpec) -> LabelTrack:
    """Read a phase annotation file.

    Raises UserError if the file is missing, unreadable or not a phase file of the data set, naming file and row.
    """
    return parse_phases(read_content(path), path, spec)


def read_tool_file(path: Path, spec: DataSetSpec) -> LabelTrack:
    """Read a tool annotation file; columns are matched by name, in any order.

    Raises UserError if the file is missing, unreadable or not a tool file of the data set, naming file and row.
    """
    return parse_tools(read_content(path), path, spec)


def _recognises(content: bytes, path: Path) -> bool:
    return _HEADER.match(content) is not None


def parse_phases(content: bytes, path: Path, spec: DataSetSpec) -> LabelTrack:
    """Parse a phase file's bytes; `path` is used in messages only. Raises UserError as `read_phase_file` does."""
    header, lines = _lines(content, path)
    if [name.casefold() for name in header] != ["frame", "phase"]:
        raise _header_error(path, header, "Frame<TAB>Phase")
    cells = _cells(lines, 2, path)
    frame_index, stride = _frame_column(cells[::2], path)
    names = cells[1::2]
    known = class_ids(spec.phases, spec.phase_aliases)
    numbers = {
        name: -1 if name in UNLABELLED_CELLS else known.get(folded_name(name), -1 if name in _MISSING else None)
        for name in set(names)
    }
    for row, name in enumerate(names if None in numbers.values() else ()):
        if numbers[name] is None:
            raise row_error(path, row, unknown_class("phase", name, spec))
    return LabelTrack(frame_index, np.array([numbers[name] for name in names], dtype=np.int8), stride)


def parse_tools(content: bytes, path: Path, spec: DataSetSpec) -> LabelTrack:
    """Parse a tool file's bytes; `path` is used in messages only. Raises UserError as `read_tool_file` does."""
    if not spec.tools:
        raise UserError(
            f"{path}: data set {spec.name} has no tools; remove the file, or add tools to the data set's description"
        )
    header, lines = _lines(content, path)
    if header[0].casefold() != "frame":
        raise _header_error(path, header, "<TAB>".join(("Frame", *spec.tools)))
    columns = _tool_columns(header, path, spec)
    cells = _cells(lines, len(header), path)
    frame_index, stride = _frame_column(cells[:: len(header)], path)
    tools = np.empty((len(frame_index), len(columns)), dtype=np.int8)
    for position, column in enumerate(columns, start=1):
        tools[:, column] = _zeros_and_ones(cells[position :: len(header)], header[position], path)
    return LabelTrack(frame_index, tools, stride)


FORMATS.register(DEFAULT_FORMAT, AnnotationFormat(_recognises, parse_phases, parse_tools))


def _lines(content: bytes, path: Path) -> tuple[list[str], list[str]]:
    """Return the cells of the header, and the lines below it without blank lines at the end."""
    lines = text_lines(content, path)
    if not lines:
        raise UserError(f"{path}: is empty")
    header = [cell.strip() for cell in lines[0].rstrip().split("\t")]
    if len(lines) == 1 and not _WHOLE_NUMBER.fullmatch(header[0]):
        raise UserError(f"{path}: has no row below the header")
    return header, lines[1:]


def _cells(lines: Sequence[str], width: int, path: Path) -> list[str]:
    """Return all cells in one flat list, `width` cells per row.

    The list is flat because a list per row would take more time than the parsing.
    """
    if set(map(_count_tabs, lines)) != {width - 1}:
        lines = [_without_surplus(line, width) for line in lines]
        for row, found in enumerate(_count_tabs(line) + 1 for line in lines):
            if found != width:
                what = f"has {found} column{'s' * (found > 1)}" if lines[row].strip() else "is blank"
                raise row_error(path, row, f"{what}; expected {width}, separated by tabs")
    return list(map(str.strip, "\t".join(lines).split("\t")))


def _without_surplus(line: str, width: int) -> str:
    """Return the line without additional empty cells at its end, beyond the `width` of the header."""
    while _count_tabs(line) >= width and not line[line.rindex("\t") :].strip():
        line = line[: line.rindex("\t")]
    return line


def _count_tabs(line: str) -> int:
    return line.count("\t")


def _zeros_and_ones(cells: Sequence[str], name: str, path: Path) -> NDArray[np.int8]:
    values = {"0": 0, "0.0": 0, "1": 1, "1.0": 1, **dict.fromkeys((*UNLABELLED_CELLS, *_MISSING), -1)}
    if not values.keys() >= set(cells):
        row = next(row for row, cell in enumerate(cells) if cell not in values)
        raise row_error(path, row, f"{name} is {shown_cell(cells[row])}, not 0 or 1 (-1 or empty: no label)")
    return np.array([values[cell] for cell in cells], dtype=np.int8)


def _header_error(path: Path, header: Sequence[str], wanted: str) -> UserError:
    found = "has no header" if _WHOLE_NUMBER.fullmatch(header[0]) else f"has the header {shown_cell(' '.join(header))}"
    return UserError(f"{path}: line 1 {found}; expected {wanted}, separated by tabs")


def _tool_columns(header: Sequence[str], path: Path, spec: DataSetSpec) -> list[int]:
    """Return the number of the tool in each tool column of the file."""
    known = class_ids(spec.tools, spec.tool_aliases)
    columns: list[int] = []
    for name in header[1:]:
        tool = known.get(folded_name(name))
        if tool is None:
            raise UserError(f"{path}: line 1 has the {unknown_class('tool', name, spec)}")
        if tool in columns:
            raise UserError(f"{path}: line 1 has the tool {spec.tools[tool]} twice")
        columns.append(tool)
    missing = [tool for i, tool in enumerate(spec.tools) if i not in columns]
    if missing:
        raise UserError(f"{path}: line 1 lacks the tool{'s' * (len(missing) > 1)} {', '.join(missing)}")
    return columns


def _frame_column(cells: Sequence[str], path: Path) -> tuple[NDArray[np.int64], int]:
    """Return the Frame column (R,) int64 and its stride.

    Raises UserError unless the cells are whole numbers of 0 or more, evenly spaced except for missing rows.
    """
    digits = "".join(cells)
    if not (digits.isascii() and digits.isdigit() and all(cells) and max(map(len, cells)) <= _MAX_DIGITS):
        for row, cell in enumerate(cells):
            if not _WHOLE_NUMBER.fullmatch(cell) or len(cell) > _MAX_DIGITS:
                raise row_error(path, row, f"frame {shown_cell(cell)} is not a whole number of 0 or more")
    frame_index = np.array(list(map(int, cells)), dtype=np.int64)
    return frame_index, stride_of_rows(frame_index, path)


# ---------------------------------------------------------------------------------------------- writing


def write_label_file(path: Path, track: LabelTrack, spec: DataSetSpec) -> None:
    """Write phases or tools in Cholec80's format: a header, tab-separated cells, and LF at the end of every line."""
    if track.labels.ndim == 1:
        header = ["Frame", "Phase"]
        rows = [[spec.phases[phase] if phase >= 0 else UNLABELLED_CELLS[0]] for phase in track.labels.tolist()]
    else:
        header, rows = ["Frame", *spec.tools], track.labels.astype(str).tolist()
    lines = ["\t".join(header)]
    lines += ["\t".join((str(frame), *cells)) for frame, cells in zip(track.frame_index.tolist(), rows, strict=True)]
    write_text(path, "\n".join(lines) + "\n")
