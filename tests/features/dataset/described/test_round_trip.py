"""Labels that an annotator's program would write, in every form, are read back as the same label of each frame."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configs.dataset_spec import DataSetSpec
from configs.schema import DataConfig
from features.dataset.annotations import LabelTrack
from features.dataset.labels import FittedTracks, fit_annotations, read_annotation, sample_labels
from features.dataset.row_numbers import Extent, infer_numberings
from tests.features.dataset.described.annotators import (
    CLASSES,
    Film,
    Numbering,
    Record,
    Spelling,
    Written,
    files,
    films,
    labels_of,
    numberings,
    runs_of,
    spellings,
    spread,
)

TOOLS = ("Grasper", "Hook", "Irrigation & suction")
_NUMBER = itertools.count()


@pytest.fixture(scope="module")
def root() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def described(labels: dict[str, Any], key: str) -> DataSetSpec:
    return DataSetSpec.model_validate(
        {
            "name": "own",
            "annotation_fps": 25,
            "phases": CLASSES,
            "tools": TOOLS if key == "tools" else (),
            "id_format": "video{number:02d}",
            "patterns": {"video": r"video(?P<id>\d+)\.{video}", "frames": r"video(?P<id>\d+)"},
            "labels": {key: labels},
        }
    )


def read_back(root: Path, written: Written, options: dict[str, Any], film: Film, role: str = "phase") -> FittedTracks:
    """Return the tracks of a file, found and fitted as the command `index` does."""
    name = f"{'all' if written.video else 'video07'}-{next(_NUMBER)}.txt"
    (root / name).write_bytes(written.content.encode())
    pattern = r"all-\d+\.txt" if written.video else r"video(?P<id>\d+)-\d+\.txt"
    columns = {**written.columns, **options.pop("columns", {})}
    labels = {"files": pattern, "columns": columns, **options, **written.options}
    spec = described(labels, "phases" if role == "phase" else "tools")
    found = read_annotation(root, name, role, spec, "video07")
    times_s = None if film.is_steady else np.array([float(time) for time in film.times])
    extent = Extent("video07.mp4", film.count, float(film.fps), 25.0, times_s=times_s)
    if isinstance(found.track, LabelTrack):
        data = DataConfig()
        found = found.with_numbering(
            infer_numberings([(found.path, found.track)], extent, data, [found.numbered_by(data)])[0]
        )
    return fit_annotations({role: found}, extent)


def phases(root: Path, written: Written, options: dict[str, Any], film: Film) -> list[int]:
    fitted = read_back(root, written, options, film)
    return sample_labels(np.arange(film.count), fitted.phase, None, "mask", 0)[0].tolist()


def is_exact(numbering: Numbering, used: Sequence[Any]) -> bool:
    """Whether numbers show how exactly they were written: 2.0 may be rounded to whole seconds, or to milliseconds."""
    if numbering.options["unit"] != "second":
        return True
    is_whole = all(float(numbering.written[at]).is_integer() for at in range(len(numbering.written)))
    return is_whole or any(not float(number).is_integer() for number in used)


def firsts(numbering: Numbering) -> list[int]:
    """Return the samples that show another frame than the one before."""
    return [at for at, shown in enumerate(numbering.shown) if at == 0 or shown != numbering.shown[at - 1]]


ALWAYS = settings(max_examples=60, deadline=None)


@ALWAYS
@given(data=st.data())
def test_rows(root: Path, data: st.DataObject) -> None:
    film = data.draw(films())
    numbering, spelling = data.draw(numberings(film)), data.draw(spellings())
    frame_labels = data.draw(labels_of(film.count))
    labels = [frame_labels[shown] for shown in numbering.shown]
    kept = list(range(len(labels)))
    distances = set(np.diff(numbering.shown).tolist())
    is_timed = numbering.options["unit"] not in ("source", "sample")
    if (len(distances) == 1 or is_timed) and data.draw(st.booleans()):
        last = len(kept) - 1 if film.is_steady else -1  # at a constant rate, the last row may last a frame longer
        kept = [at for at in kept if labels[at] >= 0 or at == last]
        assume(sum(after - before == 1 for before, after in itertools.pairwise(kept)) > len(kept) / 2)
    records = [
        {"start": numbering.written[at], "label": spelling.none if labels[at] < 0 else spelling.names[labels[at]]}
        for at in kept
    ]
    assume(is_exact(numbering, [one["start"] for one in records]))
    written = data.draw(files(records, records[::-1]))
    options = {"form": "rows", **numbering.options, **spelling.options}
    assert phases(root, written, options, film) == spread(film, numbering, labels)


@ALWAYS
@given(data=st.data())
def test_starts(root: Path, data: st.DataObject) -> None:
    film = data.draw(films())
    numbering, spelling = data.draw(numberings(film)), data.draw(spellings())
    frame_labels = data.draw(labels_of(film.count))
    labels = [frame_labels[shown] for shown in numbering.shown]
    records, before = [], -1
    for at, label in enumerate(labels):
        if label != before:
            name = spelling.none if label < 0 else spelling.names[label]
            records.append({"start": numbering.written[at], "label": name})
        before = label
    assume(records and is_exact(numbering, [one["start"] for one in records]))
    gaps = data.draw(st.sampled_from([None, *CLASSES]))
    written = data.draw(files(records, records[1:]))
    options = {"form": "starts", **numbering.options, **spelling.options, **({"gaps": gaps} if gaps else {})}
    expected = spread(film, numbering, labels)
    expected = [CLASSES.index(gaps) if gaps and label < 0 else label for label in expected]
    assert phases(root, written, options, film) == expected


@st.composite
def overlays(draw: st.DrawFn, numbering: Numbering) -> list[tuple[int, int, int]]:
    bounds = [*firsts(numbering), len(numbering.shown)]
    drawn = draw(st.lists(st.tuples(*[st.sampled_from(bounds)] * 2, st.integers(0, len(CLASSES) - 1)), max_size=3))
    return [(min(a, b), max(a, b), label) for a, b, label in drawn if a != b]


def winner(covering: Sequence[tuple[Any, Any, int]], overlaps: Any) -> int:
    """Return the class that counts of intervals (start, end, class) over one sample."""
    shortest = min(covering, key=lambda one: one[1] - one[0])[2]
    if isinstance(overlaps, list):
        listed = [
            label for label in (CLASSES.index(name) for name in overlaps) if label in {one[2] for one in covering}
        ]
        return listed[0] if listed else shortest
    longest = max(covering, key=lambda one: one[1] - one[0])[2]
    ends = {"first": min(covering)[2], "last": max(covering)[2], "inner": shortest, "outer": longest}
    return ends[overlaps]


@ALWAYS
@given(data=st.data())
def test_intervals(root: Path, data: st.DataObject) -> None:
    film = data.draw(films())
    numbering, spelling = data.draw(numberings(film)), data.draw(spellings())
    frame_labels = data.draw(labels_of(film.count))
    labels = [frame_labels[shown] for shown in numbering.shown]
    inclusive = data.draw(st.booleans())
    overlaps: Any = data.draw(st.sampled_from(["refuse", "inner", "outer", "first", "last", list(CLASSES[2:])]))
    intervals = runs_of(labels)
    above = data.draw(overlays(numbering)) if overlaps != "refuse" else []
    intervals += above
    lengths = numbering.lengths
    measured = [(lengths[a], lengths[b - inclusive], label) for a, b, label in intervals]
    if above:
        assume(len({end - start for start, end, _ in measured}) == len(measured))
        assume(len({start for start, _, _ in measured}) == len(measured))
    none = [(a, b) for a, b, label in runs_of([-1 if label >= 0 else 0 for label in labels])]
    records: list[Record] = [
        {"start": numbering.written[a], "end": numbering.written[b - inclusive], "label": spelling.names[label]}
        for a, b, label in intervals
    ]
    if data.draw(st.booleans()):
        records += [
            {"start": numbering.written[a], "end": numbering.written[b - inclusive], "label": spelling.none}
            for a, b in none
        ]
    assume(records and is_exact(numbering, [number for one in records for number in (one["start"], one["end"])]))
    truth = []
    for sample in range(len(labels)):
        over = [one for (a, b, _), one in zip(intervals, measured, strict=True) if a <= sample < b]
        truth.append(winner(over, overlaps) if over and above else over[0][2] if over else -1)
    gaps = data.draw(st.sampled_from([None, *CLASSES]))
    written = data.draw(files(records, records[1:]))
    options = {"form": "intervals", "end": "inclusive" if inclusive else "exclusive", "overlaps": overlaps}
    options |= {**numbering.options, **spelling.options, **({"gaps": gaps} if gaps else {})}
    expected = [CLASSES.index(gaps) if gaps and label < 0 else label for label in spread(film, numbering, truth)]
    assert phases(root, written, options, film) == expected


def tool_cells(kind: str, shown: Sequence[int], spelling: Spelling) -> list[Record]:
    """Return the fields of the records that say which tools (K,) a sample shows, 0 or 1 each."""
    names = [spelling.names[tool] for tool in range(len(TOOLS)) if shown[tool]]
    if kind == "columns":
        return [dict(zip(TOOLS, shown, strict=True))]
    if kind == "other columns":
        return [{f"c{tool}": str(one) for tool, one in enumerate(shown)}]
    if kind == "separator":
        return [{"label": " | ".join(map(str, names))}]
    if kind == "list":
        return [{"label": json.dumps(names)}]
    if kind == "slots":
        return [{f"slot{at}": names[at] if at < len(names) else spelling.none for at in range(len(TOOLS))}]
    return [{"label": name} for name in names] or [{"label": spelling.none}]


TOOL_OPTIONS: dict[str, dict[str, Any]] = {
    "columns": {},
    "other columns": {"columns": {"label": [f"c{tool}" for tool in range(len(TOOLS))]}},
    "separator": {"separator": "|"},
    "list": {},
    "slots": {"columns": {"labels": [f"slot{at}" for at in range(len(TOOLS))]}},
    "records": {},
}


@ALWAYS
@given(data=st.data())
def test_tools(root: Path, data: st.DataObject) -> None:
    film = data.draw(films())
    numbering, spelling = data.draw(numberings(film)), data.draw(spellings(TOOLS))
    by_tool = [data.draw(labels_of(film.count)) for _ in TOOLS]
    present = [[int(labels[shown] > 0) for labels in by_tool] for shown in numbering.shown]
    kind = data.draw(st.sampled_from([*TOOL_OPTIONS, "intervals"]))
    expected = np.array([spread(film, numbering, column) for column in zip(*present, strict=True)]).T
    options: dict[str, Any] = {**numbering.options}
    if kind == "intervals":
        records = [
            {"start": numbering.written[a], "end": numbering.written[b], "label": spelling.names[tool]}
            for tool in range(len(TOOLS))
            for a, b, is_shown in runs_of([row[tool] for row in present])
            if is_shown
        ]
        options |= {"form": "intervals", **spelling.options}
        used = [number for one in records for number in (one["start"], one["end"])]
    else:
        records = [
            {"start": numbering.written[at], **cells}
            for at, shown in enumerate(present)
            for cells in tool_cells(kind, shown, spelling)
        ]
        options |= TOOL_OPTIONS[kind] | ({} if "columns" in kind else spelling.options)
        used = [one["start"] for one in records]
    if "no_label" in options:
        options["no_tool"] = options.pop("no_label")
    assume(records and is_exact(numbering, used))
    written = data.draw(files(records, records[1:]))
    given = options.pop("columns", {})
    assume(all(isinstance(column, str) for column in written.columns.values()) or (kind not in ("columns",)))
    for key, columns in given.items():
        given = {key: [written.columns.pop(column) for column in columns]}
    columns = {key: column for key, column in written.columns.items() if key in ("video", "start", "end", "label")}
    fitted = read_back(root, dataclasses.replace(written, columns=columns | given), options, film, "tool")
    found = sample_labels(np.arange(film.count), None, fitted.tools, "hold", len(TOOLS))[1]
    assert found.tolist() == expected.tolist()
