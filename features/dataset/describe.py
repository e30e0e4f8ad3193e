"""Describe a data set in words: what `datasets list` and `datasets show` print about its description."""

from __future__ import annotations

import fnmatch
import textwrap
from collections.abc import Sequence
from pathlib import PurePosixPath

from configs.dataset_spec import DataSetSpec
from configs.errors import listed
from configs.file_pattern import example_of, file_pattern
from configs.label_source import Column, LabelSource
from configs.load import dataset_names, load_dataset
from features.dataset.overlaps import overlap_lines
from features.ids import natural_key, numbered_id

WIDTH = 110
_SOURCES = {"video": "videos", "frames": "or folders of frames", "tfrecord": "or TFRecord files"}
_ENDINGS = {"video": ".mp4", "frames": "", "tfrecord": ".tfrecord"}
_UNITS = {
    "auto": "rows numbered from {origin} by frame, sample or second (inferred)",
    "source": "numbers of the video's frames, from {origin}",
    "sample": "numbers at {rate:g} per second, from {origin}",
    "second": "times in seconds",
    "millisecond": "times in milliseconds",
    "clock": "times such as 00:12:34.500",
}
_FORMS = {
    "rows": "one row per labelled frame",
    "starts": "each row starts a label, which lasts until the next",
    "intervals": "each row is an interval, whose end is {end}",
}


def dataset_rows() -> list[tuple[str, ...]]:
    """Return a table of the data sets in `configs/datasets`: a header, and one row for each."""
    rows: list[tuple[str, ...]] = [("name", "data set", "videos", "classes", "splits", "description")]
    for name in dataset_names():
        spec = load_dataset(name)
        classes = ", ".join(f"{len(spec.classes_of(role)[0])} {track_title(role)}" for role in spec.roles)
        checked = "unverified" if spec.unverified else "verified"
        rows.append(
            (name, spec.title or name, str(spec.videos or "-"), classes, listed(_split_names(spec), 3), checked)
        )
    return rows


def dataset_lines(spec: DataSetSpec) -> list[str]:
    """Return everything that a description says, in lines of at most WIDTH columns."""
    about = [
        ("videos", str(spec.videos or "")),
        ("source", spec.source),
        ("licence", spec.licence),
        ("where to get it", ", ".join(filter(None, (spec.homepage, spec.request)))),
        ("not verified", spec.unverified),
    ]
    lines = [spec.title if spec.title in ("", spec.name) else f"{spec.name}: {spec.title}"]
    for name, text in about:
        lines += _wrapped(f"{name}: {text}") if text else []
    for role in spec.roles:
        classes, _ = spec.classes_of(role)
        lines += ["", f"{track_title(role)} ({len(classes)})"]
        lines += _wrapped(", ".join(f"{number} {name}".replace(" ", "\xa0") for number, name in enumerate(classes)))
    lines += ["", "splits", *(f"  {line}" for line in _split_lines(spec))]
    lines += ["", "expected files, in any folders below the data root"]
    for line in _layout_lines(spec):
        lines += _wrapped(line)
    if shared := overlap_lines(spec.name):
        lines += ["", "operations that are also in other data sets"]
        for line in shared:
            lines += _wrapped(line)
    return lines


def _wrapped(text: str) -> list[str]:
    """Break a text into indented lines; it is not broken at a no-break space, which becomes an ordinary one."""
    lines = textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    return [line.replace("\xa0", " ") for line in lines]


def track_title(role: str) -> str:
    """Return a track's name in the plural: phases, tools, steps."""
    return role if role.endswith("s") else f"{role}s"


# ---------------------------------------------------------------------------------------------- splits


def _split_names(spec: DataSetSpec) -> list[str]:
    """Return the names of the published splits, and the usual split first."""
    return list(dict.fromkeys((spec.default_split, *spec.splits)))


def _split_lines(spec: DataSetSpec) -> list[str]:
    lines = []
    for name in _split_names(spec):
        parts = spec.splits.get(name)
        usual = " (default)" if name == spec.default_split else ""
        listed = ((part, getattr(parts, part)) for part in ("train", "val", "test")) if parts else ()
        sizes = ", ".join(f"{part} {_size(entries, spec)}" for part, entries in listed if entries)
        if parts and parts.needs_copy:
            sizes = "train, val and test as lists or folders in the copy say"
        lines.append(f"{name}{usual}: {sizes}" if parts else f"{name}{usual}: train/val/test, by video number")
    return lines


def _size(entries: Sequence[str], spec: DataSetSpec) -> str:
    """Return how many videos these entries of a split name, or the entries if a pattern's number is not known."""
    ids = [numbered_id(number, spec) for number in range(1, (spec.videos or 0) + 1)]
    counts = [1 if not set(entry) & set("*?[") else len(fnmatch.filter(ids, entry)) for entry in entries]
    return f"{sum(counts)} videos" if all(counts) else ", ".join(entries)


# ---------------------------------------------------------------------------------------------- files


def _layout_lines(spec: DataSetSpec) -> list[str]:
    lines = []
    for role, what in _SOURCES.items():
        pattern = getattr(spec.patterns, role)
        if pattern is not None:
            named = numbered_id(1, spec) + _ENDINGS[role]
            own = spec.patterns.compiled(role).fullmatch(named)
            lines.append(f"{what}: {named if own else example_of(pattern) or pattern}")
    for role in spec.roles:
        if pattern := spec.label_pattern(role):
            lines.append(f"labels of {track_title(role)}: {example_of_labels(role, spec)}; {label_form(role, spec)}")
    return lines


def example_of_labels(role: str, spec: DataSetSpec) -> str:
    """Return the name of a file with labels of this role, or the pattern if no name is found that it matches."""
    pattern = spec.label_pattern(role) or ""
    usual = f"{numbered_id(1, spec)}-{role}.txt"
    return usual if file_pattern(pattern).fullmatch(usual) else example_of(pattern) or pattern


def label_form(role: str, spec: DataSetSpec) -> str:
    """Return the form of a role's label files in words."""
    source = spec.label_source(role)
    if source is None:
        cells = "the phase's name" if role == "phase" else "0 or 1 for each tool"
        return f"one file per video; tab-separated text with a header: number of the frame, {cells}"
    kind = {"table": f"{source.delimiter}-separated", "json": f"JSON, records at {source.records}"}
    bare = ", no header" if source.format == "table" and not source.header else ""
    origin = "0 or 1" if source.origin == "auto" else source.origin
    parts = [
        "one file for all videos" if source.is_shared else "one file per video",
        kind.get(source.format, source.format) + bare,
        _FORMS[source.form].format(end=source.end),
        _UNITS[source.unit].format(origin=origin, rate=source.rate or 0),
        *_columns(source),
        *_meaning(source),
    ]
    return "; ".join(parts)


def _columns(source: LabelSource) -> list[str]:
    """Return which columns of a table, or fields of JSON records, hold what."""
    if source.format not in ("table", "json"):
        return []
    columns, word = source.columns, "column" if source.format == "table" else "field"

    def shown(column: Column) -> str:
        return f"number {column}" if isinstance(column, int) else column

    found = {"video": columns.video, "start": columns.start, "end": columns.end}
    texts = [f"{name} in {shown(column)}" for name, column in found.items() if column is not None]
    label = columns.labels or columns.label
    if isinstance(label, tuple):
        texts.append(f"labels in {', '.join(map(shown, label))}")
    else:
        texts.append(f"label in {shown(label)}" if label is not None else "one per tool, named like it")
    return [f"{word}s: {', '.join(texts)}"]


def _meaning(source: LabelSource) -> list[str]:
    """Return what the labels are, and what applies where there is none or there are several."""
    numbers = "" if source.numbers_from is None else f"labels are numbers from {source.numbers_from}"
    return [
        *([numbers] if numbers else ["labels are names" + (" or have a listed meaning" if source.meaning else "")]),
        *([f"only records with {' and '.join(f'{k} {v}' for k, v in source.where.items())}"] if source.where else []),
        *([f"no label: {', '.join(source.no_label)}"] if source.no_label else []),
        *([f"frames without a label are {source.gaps}"] if source.gaps else []),
        *([f"where labels overlap: {_overlaps(source)}"] if source.overlaps != "refuse" else []),
    ]


def _overlaps(source: LabelSource) -> str:
    words = {"inner": "the shorter", "outer": "the longer", "first": "the earlier", "last": "the later"}
    if isinstance(source.overlaps, str):
        return f"{words.get(source.overlaps, source.overlaps)} one counts"
    return f"{' before '.join(source.overlaps)} before the others"


def such_as(paths: Sequence[str], noun: str = "") -> str:
    """Return how many paths there are, and the first of them: `3 files, such as labels/label_01.txt`."""
    first = min(paths, key=lambda path: (len(PurePosixPath(path).parts), natural_key(path)))
    count = f"{len(paths)} {noun}{'s' * (len(paths) != 1)}" if noun else str(len(paths))
    return f"{count}, such as {first}" if len(paths) > 1 else f"{count}, {first}"
