"""Labels in files of ELAN and Label Studio are read as the label of each frame, at every rate of frames."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configs.dataset_spec import DataSetSpec, FilePatterns
from configs.errors import UserError
from configs.label_source import LabelSource
from features.annotation_files.eaf import eaf_text
from features.annotation_files.intervals import Interval, Losses, VideoAnnotations
from features.annotation_files.label_studio import label_studio_tasks
from features.dataset.described.intervals import TimedLabels
from features.dataset.described.labels import parse_described, records_by_video
from features.dataset.row_numbers import Extent
from tests.features.dataset.described.annotators import CLASSES, Film, films, labels_of, runs_of


def read_back(content: bytes, name: str, film: Film, **fields: Any) -> list[int]:
    source = LabelSource.model_validate({"files": r"video(?P<id>\d+)\..*", "where": {"track": "phase"}, **fields})
    patterns = FilePatterns(video=r"video(?P<id>\d+)\.{video}", frames=r"video(?P<id>\d+)")
    spec = DataSetSpec(name="own", annotation_fps=25, phases=CLASSES, patterns=patterns, labels={"phases": source})
    [records] = records_by_video(content, Path(name), source, spec).values()
    track = parse_described(records, Path(name), source, "phase", spec)
    assert isinstance(track, TimedLabels)
    times_s = None if film.is_steady else np.array(film.times, dtype=np.float64)
    extent = Extent("video01.mp4", film.count, float(film.fps), 25.0, times_s=times_s)
    return track.place(Path(name), extent).labels.tolist()


def annotated(labels: list[int], film: Film) -> VideoAnnotations:
    """The labels as an annotator gives them: from the time of a frame to that of the first one after it."""
    times = [*film.times, film.end]
    phases = [Interval("phase", CLASSES[name], float(times[a]), float(times[b])) for a, b, name in runs_of(labels)]
    whole = Interval("step", "Across", 0.0, float(film.end))
    return VideoAnnotations("video01", (*phases, whole), float(film.fps), "video01.mp4")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_labels_come_back_to_the_frame(data: st.DataObject) -> None:
    film = data.draw(films())
    labels = data.draw(labels_of(film.count))
    video = annotated(labels, film)
    assert read_back(eaf_text(video, Losses()).encode(), "video01.eaf", film, format="eaf") == labels
    if film.is_steady:
        tasks = label_studio_tasks([video], lambda name: None, Losses())
        for fields in ({}, {"unit": "source"}, {"unit": "sample", "rate": float(film.fps)}):
            found = read_back(json.dumps(tasks).encode(), "video01.json", film, format="labelstudio", **fields)
            assert (fields, found) == (fields, labels)


def test_times_of_elan_are_milliseconds_even_if_all_are_whole_seconds() -> None:
    """At 29.97 fps a label from 20 s begins with frame 600, the first one shown later, whatever the others' times."""
    film = Film(tuple(Fraction(frame * 1001, 30000) for frame in range(1200)), Fraction(1200 * 1001, 30000), True)
    for end in (40.0, 40.001):
        phases = (Interval("phase", CLASSES[0], 0.0, 20.0), Interval("phase", CLASSES[1], 20.0, end))
        text = eaf_text(VideoAnnotations("video01", phases, 30000 / 1001, "video01.mp4"), Losses())
        assert read_back(text.encode(), "video01.eaf", film, format="eaf").index(1) == 600


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_one_of_two_annotators_can_be_chosen(data: st.DataObject) -> None:
    film = data.draw(films())
    assume(film.is_steady)
    both = [data.draw(labels_of(film.count)) for _ in range(2)]
    intervals = [
        Interval("phase", one.label, one.start_s, one.end_s, None, who)
        for who, labels in zip("ab", both, strict=True)
        for one in annotated(labels, film).intervals[:-1]
    ]
    video = VideoAnnotations("video01", tuple(intervals), float(film.fps))
    texts = {
        "eaf": eaf_text(video, Losses()),
        "labelstudio": json.dumps(label_studio_tasks([video], lambda n: None, Losses())),
    }
    for who, labels in zip("ab", both, strict=True):
        for kind, text in texts.items():
            where = {"track": "phase", "annotator": who}
            assert read_back(text.encode(), f"video01.{kind}", film, format=kind, where=where) == labels


def test_tools_may_be_visible_together() -> None:
    found = [Interval("tools", "Hook", 0, 2), Interval("tools", "Grasper", 1, 3), Interval("phase", "Closure", 0, 4)]
    text = eaf_text(VideoAnnotations("video01", tuple(found)), Losses())
    assert 'TIER_ID="tools (2)"' in text
    source = LabelSource.model_validate({"files": r"(?P<id>x)", "format": "eaf", "where": {"track": "tools"}})
    patterns = FilePatterns(video=r"video(?P<id>\d+)\.{video}", frames=r"video(?P<id>\d+)")
    fields = {
        "name": "own",
        "annotation_fps": 25,
        "phases": CLASSES,
        "tools": ("Grasper", "Hook"),
        "patterns": patterns,
    }
    spec = DataSetSpec.model_validate(fields | {"labels": {"tools": source}})
    [records] = records_by_video(text.encode(), Path("video01.eaf"), source, spec).values()
    track = parse_described(records, Path("video01.eaf"), source, "tool", spec)
    assert isinstance(track, TimedLabels)
    placed = track.place(Path("video01.eaf"), Extent("video01.mp4", 4, 1.0, 1.0))
    assert placed.labels.tolist() == [[0, 1], [1, 1], [1, 0], [0, 0]]


def test_units_that_a_format_does_not_have_are_refused() -> None:
    film = Film((0, 1), 2, True)  # type: ignore[arg-type]
    video = annotated([0, 1], film)
    with pytest.raises(UserError, match="ELAN files have times; leave unit out"):
        read_back(eaf_text(video, Losses()).encode(), "video01.eaf", film, format="eaf", unit="source")
    tasks = json.dumps(label_studio_tasks([video], lambda name: None, Losses())).encode()
    with pytest.raises(UserError, match="unit clock: Label Studio has frames"):
        read_back(tasks, "video01.json", film, format="labelstudio", unit="clock")


def test_a_video_numbered_by_thousands_of_digits_is_no_video() -> None:
    source = LabelSource.model_validate({
        "files": "all.csv", "delimiter": "comma", "form": "intervals", "unit": "second",
        "columns": {"video": "video", "start": "start", "end": "end", "label": "label"},
    })  # fmt: skip
    patterns = FilePatterns(video=r"video(?P<id>\d+)\.{video}", frames=r"video(?P<id>\d+)")
    spec = DataSetSpec(name="own", annotation_fps=25, phases=CLASSES, patterns=patterns, labels={"phases": source})
    for cell in ("9" * 8782, "video" + "9" * 8782):
        found = records_by_video(f"video,label,start,end\n{cell},Closure,0,1\n".encode(), Path("x"), source, spec)
        assert [len(records) for records in found.values()] == [1]
