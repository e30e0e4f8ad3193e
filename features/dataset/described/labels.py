"""Turn the records of a file of labels into rows or intervals of classes, as the data set's description states."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec, class_ids, folded_name
from configs.errors import UserError, did_you_mean, listed
from configs.file_pattern import match_path
from configs.label_source import TIME_UNITS, Column, LabelSource
from features.clock import clock_seconds
from features.dataset.annotations import MAX_FILE_BYTES, LabelTrack, read_content, shown_cell, stride_of_rows
from features.dataset.described import annotation_tools  # noqa: F401 - registers its readers
from features.dataset.described.intervals import TimedLabels, TimedRows, TimeScale
from features.dataset.described.records import MAX_JSON_BYTES, READERS, Records, places_at
from features.ids import id_key, normal_id, numbered_id

_MAX_DIGITS = 15  # float64 represents every such integer
_NUMBER = re.compile(rf"[0-9]{{1,{_MAX_DIGITS}}}(\.0+)?")
_PER_SECOND = {"second": 1.0, "clock": 1.0, "millisecond": 1000.0}
_UNLABELLED = ("", "-1", "-1.0", "nan", "NaN", "NA", "None", "null")


def records_by_video(content: bytes, path: Path, source: LabelSource, spec: DataSetSpec) -> dict[str | None, Records]:
    """Return the records of a file that `source.where` selects, by `id_key` of their video.

    In a file of one video, the key is None. Raises UserError if the file is not of the format that the description
    states.
    """
    records = _selected(READERS.find(source.format)(content, path, source).parsed(source, path), source, path, spec)
    if not source.is_shared:
        return {None: records}
    column: Column = "video" if source.columns.video is None else source.columns.video
    by_cell: dict[str, list[int]] = {}
    for at, cell in enumerate(map(str, records.column(column, path, "columns.video"))):
        by_cell.setdefault(cell, []).append(at)
    cells: dict[str, list[str]] = {}
    for cell in by_cell:
        cells.setdefault(_video_key(cell, path, spec), []).append(cell)
    videos: dict[str | None, Records] = {}
    for key, names in cells.items():
        own = records.only(sorted(at for name in names for at in by_cell[name]))
        notes = [] if videos else [*own.notes]  # the file's notes are given once
        if len(names) > 1:
            shown = listed([shown_cell(name) for name in names], 4)
            notes.append(f"{path.name}: {shown} are read as names of one video, {key}")
        videos[key] = replace(own, notes=tuple(notes))
    return videos


def read_described(path: Path, source: LabelSource, spec: DataSetSpec) -> tuple[dict[str | None, Records], str]:
    """Return `records_by_video` of a file, and the SHA-256 of the file.

    Files with the labels of several videos are kept in memory, so that they are not read once per video and track.
    """
    if not source.is_shared:
        content = _content(path, source)
        return records_by_video(content, path, source, spec), sha256(content).hexdigest()
    state = path.stat()
    return _read_shared(path, (state.st_size, state.st_mtime_ns), _Key(source, spec))


def _content(path: Path, source: LabelSource) -> bytes:
    return read_content(path, MAX_JSON_BYTES if source.format == "json" else MAX_FILE_BYTES)


@dataclass(frozen=True)
class _Key:
    """A description's part that says how to read a file, compared by its content; the same for several tracks."""

    source: LabelSource = field(compare=False)
    spec: DataSetSpec = field(compare=False)
    text: str = field(init=False)

    def __post_init__(self) -> None:
        known = self.source.format in ("table", "json") and not self.source.categories
        parts = {"format", "delimiter", "header", "records", "join", "parse", "where"}
        read = self.source.model_dump(mode="json", include=parts) if known else self.source.model_dump(mode="json")
        named = self.spec.model_dump(mode="json", include={"name", "id_format", "patterns"})
        text = json.dumps([read, named, self.source.columns.video], sort_keys=True)
        object.__setattr__(self, "text", text)


@functools.lru_cache(maxsize=4)
def _read_shared(path: Path, state: tuple[int, int], key: _Key) -> tuple[dict[str | None, Records], str]:
    content = _content(path, key.source)
    return records_by_video(content, path, key.source, key.spec), sha256(content).hexdigest()


def _video_key(cell: str, path: Path, spec: DataSetSpec) -> str:
    """Return the key of the video that a cell names: by its number, its id, or the name of its file or folder.

    Raises UserError if it names one part of a recording.
    """
    for role, name in (("video", cell), ("video", f"{cell}.mp4"), ("frames", cell)):
        if match := match_path(spec.patterns.compiled(role), PurePosixPath(name)):
            if match.groupdict().get("part") is not None:
                raise UserError(
                    f"{path}: {cell[:80]!r} is one part of a recording; a file with the labels of several videos must "
                    "number the whole recording, or give each part a file of its own"
                )
            cell = match["id"]
            break
    is_number = _NUMBER.fullmatch(cell) is not None  # 7, or 7.0 as programs write it where a cell is empty
    return id_key(normal_id(numbered_id(int(float(cell)), spec) if is_number else cell))


def parse_described(
    records: Records, path: Path, source: LabelSource, role: str, spec: DataSetSpec
) -> LabelTrack | TimedRows | TimedLabels:
    """Return the labels of one video: rows whose numbering is stated or inferred later, timed rows, or intervals.

    Raises UserError naming `path` and the record that cannot be understood.
    """
    if len(records) == 0:
        raise UserError(f"{path}: has no labels" + (f" with {source.where}" if source.where else ""))
    start, tick = _numbers(records, source.columns.start, "columns.start", source, path)
    if source.form == "rows":
        is_timed = source.unit in TIME_UNITS or source.offset_s != 0
        return _rows(records, start, _scale(source, tick) if is_timed else None, path, source, role, spec)
    return _intervals(records, start, tick, path, source, role, spec)


def _scale(source: LabelSource, tick: float) -> TimeScale:
    """Return what the numbers count; times are in seconds, written with a distance of `tick` seconds."""
    is_time = source.unit in TIME_UNITS
    return TimeScale(
        per_s=1.0 if is_time else source.rate,
        origin=0 if is_time or not isinstance(source.origin, int) else source.origin,
        tick_s=tick if is_time else 0.0,
        offset_s=source.offset_s,
        from_container=source.zero == "container",
    )


def _intervals(
    records: Records,
    start: NDArray[np.float64],
    tick: float,
    path: Path,
    source: LabelSource,
    role: str,
    spec: DataSetSpec,
) -> TimedLabels:
    """Return intervals, or starts each of which lasts to the next."""
    if source.form == "intervals":
        column: Column = "end" if source.columns.end is None else source.columns.end
        end, other_tick = _numbers(records, column, "columns.end", source, path)
        tick = min(tick, other_tick)
        if (wrong := np.flatnonzero(end < start)).size:
            raise UserError(f"{path}: {records.places[wrong[0]]} ends before it starts")
    else:
        if role != "tool":
            _refuse_same_start(records, start, path)
        following = np.append(np.unique(start), np.inf)
        end = following[np.searchsorted(following, start, side="right")]
    at, classes = _labelled(records, path, source, role, spec)
    known = class_ids(*spec.classes_of(role))
    priorities = () if isinstance(source.overlaps, str) else source.overlaps
    return TimedLabels(
        start=start[at],
        end=end[at],
        classes=classes,
        places=places_at(records.places, at.tolist()),
        scale=_scale(source, tick),
        inclusive=source.end == "inclusive" and source.form == "intervals",
        overlaps=tuple(known[folded_name(name)] for name in priorities) or str(source.overlaps),
        gap=known[folded_name(source.gaps)] if source.gaps else -1,
        tool_count=len(spec.tools) if role == "tool" else 0,
    )


def _selected(records: Records, source: LabelSource, path: Path, spec: DataSetSpec) -> Records:
    """Return the records that have the values which `where` asks for."""
    for name, value in source.where.items():
        column: Column = int(name) if name.isdecimal() and records.numbered and name not in records.columns else name
        cells = records.column(column, path, f"where.{name}")
        keep = [at for at, cell in enumerate(cells) if str(cell) == value]
        if cells and not keep:
            others = listed(sorted({shown_cell(str(cell)) for cell in cells}), 8)
            raise UserError(
                f"{path}: no record has {name} {value!r}, which `where` in `labels` of {spec.name} asks for; found: "
                f"{others}"
            )
        records = records.only(keep)
    return records


# ---------------------------------------------------------------------------------------------- times and numbers


def _numbers(
    records: Records, column: Column, key: str, source: LabelSource, path: Path
) -> tuple[NDArray[np.float64], float]:
    """Return a column (N,) float64 in seconds or as whole numbers, and the distance in seconds of times written so."""
    cells = records.column(column, path, key)
    if source.unit not in TIME_UNITS:
        origin = source.origin if isinstance(source.origin, int) and source.unit != "auto" else 0
        values = _whole_numbers(cells)
        if not (values >= origin).all():
            at = int(np.argmin(values >= origin))
            what = f"not a whole number of {origin} or more"
            raise UserError(f"{path}: {records.places[at]}: {key} is {_shown(cells[at])}, {what}")
        return values, 0.0
    texts = [str(cell).strip() if cell is not None and not isinstance(cell, bool) else "" for cell in cells]
    values = np.array([_seconds(text, source.unit) for text in texts], dtype=np.float64)
    if not (values >= 0).all():
        at = int(np.argmin(values >= 0))
        what = "a time such as 00:12:34.500" if source.unit == "clock" else "a number"
        raise UserError(f"{path}: {records.places[at]}: {key} is {_shown(cells[at])}, not {what}")
    return values, records.tick_s or 10.0 ** -max(map(_decimals, texts), default=0) / _PER_SECOND[source.unit]


def _shown(cell: Any) -> str:
    return "missing" if cell is None else shown_cell(str(cell))


def _whole_numbers(cells: Sequence[Any]) -> NDArray[np.float64]:
    """Return cells (N,) as numbers; NaN for one that is not a whole number of 0 or more."""
    if set(map(type, cells)) == {str} and all(cells) and max(map(len, cells)) <= _MAX_DIGITS:
        joined = "".join(cells)
        if joined.isascii() and joined.isdecimal():
            return np.array(list(map(int, cells)), dtype=np.float64)
    texts = ["" if isinstance(cell, bool) else str(cell).strip() for cell in cells]
    return np.array([float(text) if _NUMBER.fullmatch(text) else math.nan for text in texts], dtype=np.float64)


def _seconds(text: str, unit: str) -> float:
    """Return a time in seconds; NaN if a text is none."""
    if unit == "clock":
        return clock_seconds(text)
    try:
        value = float(text) / _PER_SECOND[unit]
    except ValueError:
        return math.nan
    return value if 0 <= value < 1e9 and "_" not in text else math.nan


def _decimals(text: str) -> int:
    """Return how many digits follow the decimal mark, at most 9; none for 12.0, which programs write for 12."""
    fraction = text.replace(",", ".").partition(".")[2]
    return 9 if "e" in text.casefold() else 0 if fraction == "0" else min(len(fraction), 9)


def _refuse_same_start(records: Records, start: NDArray[np.float64], path: Path) -> None:
    order = np.argsort(start, kind="stable")
    again = np.flatnonzero(np.diff(start[order]) == 0)
    if len(again):
        one, other = records.places[order[again[0]]], records.places[order[again[0] + 1]]
        raise UserError(f"{path}: {one} and {other} start at the same time")


def _rows(
    records: Records,
    numbers: NDArray[np.float64],
    scale: TimeScale | None,
    path: Path,
    source: LabelSource,
    role: str,
    spec: DataSetSpec,
) -> LabelTrack | TimedRows:
    """Return rows in order, one per number; with `scale` they are timed.

    Raises UserError if records of one number differ; tools of one number are put together.
    """
    order = np.argsort(numbers, kind="stable")
    if role == "tool":
        rows, labels, first = _tool_rows(records, numbers, path, source, spec)
    else:
        _, classes = _labelled(records, path, source, role, spec, keep=True)
        again = np.diff(numbers[order]) == 0
        if (differs := again & (np.diff(classes[order]) != 0)).any():
            at = int(np.flatnonzero(differs)[0])
            one, other = (records.places[order[at + step]] for step in (0, 1))
            raise UserError(f"{path}: {one} and {other} give {numbers[order[at]]:.10g} two labels")
        first = order[np.concatenate([[True], ~again])]
        rows, labels = numbers[first], classes[first]
    places = places_at(records.places, first.tolist())
    if scale is not None:
        return TimedRows(rows, labels, places, scale)
    own = rows.astype(np.int64)
    return LabelTrack(own, labels, stride_of_rows(own, path, places), places)


# ---------------------------------------------------------------------------------------------- classes


def _labelled(
    records: Records, path: Path, source: LabelSource, role: str, spec: DataSetSpec, keep: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return the records that have a label, and their classes, both (M,). A record of several tools counts for each.

    A record that says that its tools are not labelled has class -1. With `keep`, records without a label are kept with
    class -1. Raises UserError for an unknown label.
    """
    if role == "tool":
        present = _present(records, path, source, spec)  # (N, K)
        shows, tools = np.nonzero(present == 1)
        unknown = np.flatnonzero((present < 0).all(axis=1))
        none = np.full(len(unknown), -1)
        return np.append(shows, unknown).astype(np.int64), np.append(tools, none).astype(np.int8)
    label = source.columns.label
    column: Column = "label" if label is None or isinstance(label, tuple) else label
    cells = records.column(column, path, "columns.label")
    texts, find = list(map(_text, cells)), _finder(source, role, spec)
    found = {text: find(text) for text in dict.fromkeys(texts)}
    for text, one in found.items():
        if isinstance(one, str):
            raise UserError(f"{path}: {records.places[texts.index(text)]}: {one} (data set {spec.name})")
    classes = np.array([found[text] for text in texts], dtype=np.int8)
    at = np.arange(len(cells), dtype=np.int64) if keep else np.flatnonzero(classes >= 0)
    return at, classes[at]


def _text(cell: Any) -> str:
    return cell.strip() if isinstance(cell, str) else "" if cell is None else str(cell)


def _finder(source: LabelSource, role: str, spec: DataSetSpec) -> Callable[[str], int | str]:
    """Return a function that gives the class of a text, -1 for none, or says why it has none."""
    names, aliases = spec.classes_of(role)
    known = class_ids(names, aliases) | {
        folded_name(label): class_ids(names, aliases)[folded_name(name)] for label, name in source.meaning.items()
    }
    bare = set(_UNLABELLED)

    @functools.lru_cache(maxsize=4096)
    def find(text: str) -> int | str:
        if text in source.no_label or text in source.no_tool:
            return -1
        if folded_name(text) in known and (source.numbers_from is None or text in source.meaning):
            return known[folded_name(text)]
        if text in bare:
            return -1
        if source.numbers_from is not None:
            if not _NUMBER.fullmatch(text):
                return f"label {shown_cell(text)} is not a number"
            number = int(float(text)) - source.numbers_from
            last = len(names) - 1 + source.numbers_from
            return number if 0 <= number < len(names) else f"label {text} is not one of {source.numbers_from} to {last}"
        hint = did_you_mean(text[:80], (*aliases, *names)) or f" (known: {listed(names, 20)})"
        return f"unknown label {shown_cell(text)}{hint}; or add it to `meaning` or `no_label` of its `labels`"

    return find


def _present(records: Records, path: Path, source: LabelSource, spec: DataSetSpec) -> NDArray[np.int8]:
    """Return which tools each record shows, (N, K): 1, 0, or -1 for no label.

    Where cells name tools, an empty one names none, and one of `no_label` makes all tools of its record unknown.
    """
    label = source.columns.label
    naming: Sequence[Column] = source.columns.labels or (() if label is None or isinstance(label, tuple) else (label,))
    if not naming:
        if isinstance(label, tuple) and len(label) != len(spec.tools):
            raise UserError(
                f"{path}: labels.tools.columns.label names {len(label)} columns for {len(spec.tools)} tools"
            )
        columns: Sequence[Column] = label if isinstance(label, tuple) else _tool_columns(records, path, spec)
        values = {"0": 0, "0.0": 0, "1": 1, "1.0": 1, "True": 1, "False": 0, **dict.fromkeys(_UNLABELLED, -1)}
        values |= dict.fromkeys(source.no_tool, 0) | dict.fromkeys(source.no_label, -1)
        present = np.empty((len(records), len(columns)), dtype=np.int8)
        for tool, name in enumerate(columns):
            texts = list(map(_text, records.column(name, path, "columns.label")))
            if odd := set(texts) - values.keys():
                at = next(at for at, text in enumerate(texts) if text in odd)
                raise UserError(
                    f"{path}: {records.places[at]}: {spec.tools[tool]} is {shown_cell(texts[at])}, not 0 or 1"
                )
            present[:, tool] = [values[text] for text in texts]
        return present
    find = _finder(source, "tool", spec)
    present = np.zeros((len(records), len(spec.tools)), dtype=np.int8)
    unknown = np.zeros(len(records), dtype=bool)
    for column in naming:
        for at, cell in enumerate(records.column(column, path, "columns.label")):
            for text in map(_text, _names_in(cell, source)):
                unknown[at] |= text in source.no_label
                found = find(text)
                if isinstance(found, str):
                    raise UserError(f"{path}: {records.places[at]}: {found} (data set {spec.name})")
                if found >= 0:
                    present[at, found] = 1
    present[unknown] = -1
    return present


def _names_in(cell: Any, source: LabelSource) -> list[Any]:
    if isinstance(cell, list):
        return cell
    if isinstance(cell, str) and cell.startswith("[") and cell.endswith("]"):
        try:
            return list(json.loads(cell))
        except (ValueError, RecursionError):
            return [cell]
    if source.separator and isinstance(cell, str):
        return cell.split(source.separator)
    return [cell]


def _tool_columns(records: Records, path: Path, spec: DataSetSpec) -> list[str]:
    """Return the name of each tool's column. Raises UserError if one is missing."""
    known = class_ids(spec.tools, spec.tool_aliases)
    by_tool = {known[folded_name(name)]: name for name in records.columns if folded_name(name) in known}
    if missing := [tool for at, tool in enumerate(spec.tools) if at not in by_tool]:
        raise UserError(
            f"{path}: has no column for the tool{'s' * (len(missing) > 1)} {', '.join(missing)} (found: "
            f"{listed(list(records.columns), 12)})"
        )
    return [by_tool[at] for at in range(len(spec.tools))]


def _tool_rows(
    records: Records, numbers: NDArray[np.float64], path: Path, source: LabelSource, spec: DataSetSpec
) -> tuple[NDArray[np.float64], NDArray[np.int8], NDArray[np.int64]]:
    """Return one row per number with its tools, (R,) and (R, K), and its first record (R,)."""
    present = _present(records, path, source, spec)
    rows, first, group = np.unique(numbers, return_index=True, return_inverse=True)
    labels = np.full((len(rows), len(spec.tools)), -1, dtype=np.int8)
    np.maximum.at(labels, group, present)
    return rows, labels, first
