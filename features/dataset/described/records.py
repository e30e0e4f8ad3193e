"""Read a file of labels into columns: tables (CSV and the like) and JSON. Formats from outside register here too."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from configs.errors import UserError, did_you_mean, listed
from configs.label_source import Categories, Column, LabelSource
from configs.registry import Registry
from engine.files import sha256_json
from features.dataset.annotations import shown_cell, text_lines

_DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";"}
# One JSON file may hold the boxes of every frame of a data set. Its values need up to 100 bytes of memory each.
MAX_JSON_BYTES = 256 << 20
MAX_JSON_VALUES = 1 << 24
_CAPTURE = re.compile(r"\{(\w+)\}")


class LineNumbers(Sequence[str]):
    """Where the records of a table are. The texts are made only when a message needs them."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> LineNumbers: ...
    def __getitem__(self, at: int | slice) -> str | LineNumbers:
        return LineNumbers(self.numbers[at]) if isinstance(at, slice) else f"line {self.numbers[at]}"

    def __len__(self) -> int:
        return len(self.numbers)


def places_at(places: Sequence[str], keep: Sequence[int]) -> Sequence[str]:
    """Return the places of the records at these positions."""
    if isinstance(places, LineNumbers):
        return LineNumbers([places.numbers[at] for at in keep])
    return [places[at] for at in keep]


@dataclass(frozen=True)
class Records:
    """The N records of a file of labels, by column.

    `columns` has the N values of each named column; `numbered` has them in the order of the columns, for columns that
    are named by number. Values are texts, or whatever JSON holds. `places` (N,) says where each record is. `notes` are
    about the whole file, for the user. `tick_s` is how exactly its times are written, if the format says so; otherwise
    it follows from their digits.
    """

    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str]
    numbered: Sequence[Sequence[Any]] = field(default=())
    notes: Sequence[str] = ()
    tick_s: float | None = None

    def column(self, name: Column, path: Path, key: str) -> Sequence[Any]:
        """Return the values (N,) of a column. Raises UserError naming `path` and the setting `key` if it is missing."""
        if isinstance(name, int):
            if name <= len(self.numbered):
                return self.numbered[name - 1]
            raise UserError(f"{path}: has {len(self.numbered)} columns, but {key} is column {name}")
        if name in self.columns:
            return self.columns[name]
        alike = [other for other in self.columns if other.casefold() == name.casefold()]
        if len(alike) == 1:
            return self.columns[alike[0]]
        hint = did_you_mean(name, self.columns) or f" (found: {listed(list(self.columns), 12) or 'no header'})"
        raise UserError(f"{path}: has no column {shown_cell(name)} for {key}{hint}")

    def only(self, keep: Sequence[int]) -> Records:
        """Return the records at these positions."""
        taken: dict[int, Sequence[Any]] = {}  # a table's columns are named and numbered, and need be taken only once
        for values in (*self.columns.values(), *self.numbered):
            if id(values) not in taken:
                taken[id(values)] = [values[at] for at in keep]
        return Records(
            {name: taken[id(values)] for name, values in self.columns.items()},
            places_at(self.places, keep),
            [taken[id(values)] for values in self.numbered],
            self.notes,
            self.tick_s,
        )

    def parsed(self, source: LabelSource, path: Path) -> Records:
        """Return the records with the columns that `source.parse` makes. Raises UserError for other values."""
        made: dict[str, list[Any]] = {}
        for column, pattern in source.parse.items():
            compiled = re.compile(pattern)
            made |= {name: [] for name in compiled.groupindex}
            for at, cell in enumerate(self.column(column, path, "parse")):
                match = compiled.fullmatch(str(cell))
                if match is None:
                    raise UserError(
                        f"{path}: {self.places[at]}: {column} is {shown_cell(str(cell))}, not like {pattern}"
                    )
                for name, value in match.groupdict().items():
                    made[name].append(value)
        return replace(self, columns={**self.columns, **made}) if made else self

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of the values. Raises UserError naming `path` for numbers that JSON cannot represent."""
        try:
            return sha256_json([self.columns, self.numbered])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: has a value that is too large or nested too deeply: {error}") from error

    def __len__(self) -> int:
        return len(self.places)


ReadRecords = Callable[[bytes, Path, LabelSource], Records]
READERS: Registry[ReadRecords] = Registry("format of labels", "surgstage.label_formats")


def read_table(content: bytes, path: Path, source: LabelSource) -> Records:
    """Read a table. Raises UserError naming the line that has more or fewer columns than the first."""
    lines = text_lines(content, path)
    if columns := _even_columns(lines, source):
        numbers: Sequence[int] = range(1, len(lines) + 1)
        names = [column[0] for column in columns]
        columns = [column[1:] for column in columns] if source.header else columns
    else:
        numbers, rows = _rows_of_cells(lines, source, path)
        if not rows:
            raise UserError(f"{path}: is empty")
        names, rows = _with_equal_widths(rows, numbers, source, path)
        columns = [list(map(str.strip, column)) for column in zip(*rows, strict=True)] if rows else [[] for _ in names]
    if not source.header:
        names = [str(at) for at in range(1, len(columns) + 1)]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: line {numbers[0]} names the column {twice[0]} twice")
    return Records(dict(zip(names, columns, strict=True)), LineNumbers(numbers[source.header :]), columns)


def _even_columns(lines: list[str], source: LabelSource) -> list[list[str]]:
    """Return the columns if all lines have as many cells, without quotes; otherwise nothing.

    Nearly all tables are so, and this takes half the time of making a list for each line.
    """
    mark = _DELIMITERS.get(source.delimiter)
    if not lines or mark is None or len({line.count(mark) for line in lines}) > 1:
        return []
    text = mark.join(lines)
    if '"' in text or lines[0].rstrip(" ").endswith(mark) or not all(line.strip(mark + " ") for line in lines):
        return []
    cells, width = text.split(mark), lines[0].count(mark) + 1
    return [list(map(str.strip, cells[at::width])) for at in range(width)]


def _rows_of_cells(lines: list[str], source: LabelSource, path: Path) -> tuple[Sequence[int], list[list[str]]]:
    """Return the numbers of the lines that are not empty, and their cells; the cells of the first are stripped."""
    if source.delimiter == "blank":
        rows = [line.split() for line in lines]
    elif '"' in (mark := _DELIMITERS[source.delimiter]).join(lines):
        rows = _quoted_rows(lines, mark, source, path)
    else:
        rows = [line.split(mark) for line in lines]
    numbers = [number for number, row in enumerate(rows, start=1) if any(map(str.strip, row))]
    if len(numbers) < len(rows):
        rows = [rows[number - 1] for number in numbers]
    if rows:
        rows[0] = list(map(str.strip, rows[0]))
    return numbers, rows


def _quoted_rows(lines: Sequence[str], mark: str, source: LabelSource, path: Path) -> list[list[str]]:
    """Return a row for each line; a quoted cell may continue on the next lines, which then have no cells."""
    rows: list[list[str]] = []
    reader = csv.reader(lines, delimiter=mark, strict=True)
    try:
        for row in reader:
            rows += [row, *[[]] * (reader.line_num - len(rows) - 1)]
    except csv.Error as error:
        raise UserError(f"{path}: is not a table separated by {source.delimiter}: {error}") from error
    return rows


def _with_equal_widths(
    rows: list[list[str]], numbers: Sequence[int], source: LabelSource, path: Path
) -> tuple[list[str], list[list[str]]]:
    """Return the cells of the first row and the rows below a header, all of one width.

    Empty cells at the end of all lines, or of lines that are too long, are left out.
    """
    names, asked_for = rows[0], source.columns.most_number
    while len(names) > asked_for and not names[-1] and not any("".join(row[len(names) - 1 :]).strip() for row in rows):
        names = names[:-1]  # a delimiter at the end of every line
    for at, cells in enumerate(rows):
        if len(cells) > len(names) and not "".join(cells[len(names) :]).strip():
            rows[at] = cells = cells[: len(names)]
        if len(cells) != len(names):
            found = f"{len(cells)} column{'s' * (len(cells) != 1)}"
            raise UserError(
                f"{path}: line {numbers[at]} has {found}; expected {len(names)}, separated by {source.delimiter}"
            )
    return names, rows[source.header :]


def read_json_records(content: bytes, path: Path, source: LabelSource) -> Records:
    """Read the records that `source.records` names. Raises UserError if there are none, or they are not alike."""
    if (values := content.count(b",") + content.count(b"[") + content.count(b"{")) > MAX_JSON_VALUES:
        raise UserError(f"{path}: has some {values:,} values, more than {MAX_JSON_VALUES:,}; split it by video")
    try:
        text = content.decode("utf-8-sig")
        tree = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {str(error)[:120]}") from error
    found = list(_walk(tree, (source.records or "").split("."), {}, "", path))
    joined = _joined(tree, found, source, path) if source.join else found
    widths = {len(record) for _, record, _ in joined if isinstance(record, list)}
    if odd := [place for place, record, _ in joined if widths and not isinstance(record, list)]:
        raise UserError(f"{path}: {odd[0]} is no list, unlike other records at {source.records}")
    if len(widths) > 1:
        raise UserError(f"{path}: the records at {source.records} are lists of {min(widths)} to {max(widths)} entries")
    shapes = dict.fromkeys((*keys, *(record if isinstance(record, dict) else ())) for _, record, keys in joined)
    names = dict.fromkeys(name for shape in shapes for name in shape)
    columns = {
        name: [keys.get(name, record.get(name) if isinstance(record, dict) else None) for _, record, keys in joined]
        for name in names
    }
    width = widths.pop() if widths else 0
    numbered = [[record[at] for _, record, _ in joined] for at in range(width)] if len(joined) else []
    if source.categories:
        _name_labels(columns, numbered, _class_names(tree, source.categories, path), source)
    return Records(columns, [place for place, _, _ in joined], numbered)


Found = tuple[str, Any, dict[str, Any]]  # place, record, captured keys


def _walk(tree: Any, path: Sequence[str], keys: dict[str, Any], place: str, file: Path) -> Iterator[Found]:
    """Yield the records at the end of `path`. The last step opens a list or mapping even without `*`."""
    if not path:
        if isinstance(tree, list) and tree and all(isinstance(entry, dict) for entry in tree):
            for number, entry in enumerate(tree):
                yield f"{place}[{number}]", entry, keys
        elif isinstance(tree, dict | list):
            yield place, tree, keys
        else:
            yield place, {"value": tree}, keys
        return
    step, rest = path[0], path[1:]
    capture = _CAPTURE.fullmatch(step)
    if step == "*" or capture:
        entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
        if entries is None:
            raise UserError(f"{file}: {place or 'the whole file'} is {type(tree).__name__}, not a list or mapping")
        inside = f"{place}." if place else ""
        for key, entry in entries:
            more = {**keys, capture[1]: key} if capture else keys
            here = f"{place}[{key}]" if isinstance(tree, list) else f"{inside}{str(key)[:60]}"
            yield from _walk(entry, rest, more, here, file)
        return
    if not isinstance(tree, dict) or step not in tree:
        has = f" (it has {listed([str(key)[:60] for key in tree], 8)})" if isinstance(tree, dict) else ""
        raise UserError(f"{file}: {place or 'the whole file'} has no {step}{has}")
    yield from _walk(tree[step], rest, keys, f"{place}.{step}" if place else step, file)


def _joined(tree: Any, found: Sequence[Found], source: LabelSource, path: Path) -> list[Found]:
    join = source.join
    assert join is not None
    others: dict[Any, dict[str, Any]] = {}
    for place, other, keys in _walk(tree, join.records.split("."), {}, "", path):
        if not isinstance(other, dict) or join.key not in other:
            raise UserError(f"{path}: {place} has no {join.key}, which join.key names")
        if others.setdefault(_hashable(other[join.key]), {**keys, **other}) != {**keys, **other}:
            raise UserError(f"{path}: {place}: another entry has the same {join.key}, which join.key names")
    result = []
    for place, record, keys in found:
        key = record.get(join.by) if isinstance(record, dict) else None
        other = others.get(_hashable(key))
        if other is None or not isinstance(record, dict):
            raise UserError(f"{path}: {place}: {join.by} {shown_cell(str(key))} is not in {join.records}")
        result.append((place, {**other, **record}, keys))
    return result


def _class_names(tree: Any, categories: Categories, path: Path) -> dict[str, str]:
    """Return the class names by id. Raises UserError if two classes have the same id, or one has no id or name."""
    names: dict[str, str] = {}
    for place, record, keys in _walk(tree, categories.records.split("."), {}, "", path):
        entry = {**keys, **record} if isinstance(record, dict) else keys
        key, name = entry.get(categories.key), entry.get(categories.name)
        if not isinstance(key, str | int) or not isinstance(name, str):
            raise UserError(f"{path}: {place} has no {categories.key} and {categories.name} of a class")
        if names.setdefault(str(key), name) != name:
            raise UserError(f"{path}: {place}: two classes have the {categories.key} {str(key)[:40]}")
    return names


def _name_labels(
    columns: dict[str, list[Any]], numbered: list[list[Any]], names: Mapping[str, str], source: LabelSource
) -> None:
    """Replace the ids in the columns of labels by the names of their classes; other values are kept."""

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [one if isinstance(one, list) else names.get(str(one), one) for one in value]
        return names.get(str(value), value)

    label = source.columns.label
    for column in source.columns.labels or (label if isinstance(label, tuple) else (label or "label",)):
        if isinstance(column, str) and column in columns:
            columns[column] = [name(value) for value in columns[column]]
        elif isinstance(column, int) and column <= len(numbered):
            numbered[column - 1] = [name(value) for value in numbered[column - 1]]


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else repr(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise ValueError(f"the key {shown_cell(twice)} comes twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


READERS.register("table", read_table)
READERS.register("json", read_json_records)
