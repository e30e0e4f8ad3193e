"""Labels in files whose form the data set's description states: rows, starts and intervals, in tables and JSON."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from configs.dataset_spec import DataSetSpec, FilePatterns
from configs.errors import UserError
from configs.label_source import Columns, LabelSource
from features.dataset.annotations import LabelTrack
from features.dataset.described.intervals import TimedLabels
from features.dataset.described.labels import parse_described, records_by_video
from features.dataset.labels import fit_tracks, sample_labels
from features.dataset.row_numbers import Extent, RowNumbering

EXTENT = Extent("video01.mp4", 100, 25.0, 25.0)
FILE = Path("labels")


def spec_of(source: LabelSource, **more: object) -> DataSetSpec:
    patterns = FilePatterns(video=r"video(?P<id>\d+)\.{video}", frames=r"video(?P<id>\d+)")
    fields = {"name": "own", "annotation_fps": 25, "phases": ("A", "B", "C"), "patterns": patterns}
    return DataSetSpec.model_validate(fields | {"labels": {"phases": source}} | more)


def labels_of(content: str, video: str | None = None, extent: Extent = EXTENT, **fields: object) -> list[int]:
    """Return the phase of each of the video's frames."""
    source = LabelSource.model_validate({"files": r"(?P<id>\d+)\.txt" if video is None else r"all\.txt"} | fields)
    spec = spec_of(source)
    records = records_by_video(content.encode(), FILE, source, spec)[video]
    track = parse_described(records, FILE, source, "phase", spec)
    if isinstance(track, LabelTrack):
        origin = source.origin if isinstance(source.origin, int) else 0
        track = RowNumbering(source.rate, origin).place(FILE, track, extent)
        frames = np.arange(extent.frame_count)
        row = np.searchsorted(track.frame_index, frames, "right") - 1
        return [int(track.labels[at]) if at >= 0 else -1 for at in row]
    return sample_labels(np.arange(extent.frame_count), track.place(FILE, extent), None, "mask", 0)[0].tolist()


def test_rows_at_a_rate_of_their_own_count_from_their_origin() -> None:
    found = labels_of(
        "Frame\tPhase\n1\t1\n2\t1\n3\t3\n4\t2\n",
        unit="sample",
        rate=1,
        origin=1,
        numbers_from=1,
        columns={"start": "Frame", "label": "Phase"},
    )
    assert found == [0] * 50 + [2] * 25 + [1] * 25


def test_starts_last_until_the_next_one_and_leave_the_beginning_unlabelled() -> None:
    found = labels_of(
        "VideoID;FrameNo;Phase\n2;0;A\n1;10;A\n1;30;C\n1;60;B\n",
        video="video01",
        delimiter="semicolon",
        form="starts",
        unit="source",
        columns={"video": "VideoID", "start": "FrameNo", "label": "Phase"},
    )
    assert found == [-1] * 10 + [0] * 20 + [2] * 30 + [1] * 40


@pytest.mark.parametrize(
    ("overlaps", "middle"), [("inner", 1), ("outer", 0), ("first", 0), ("last", 1), (["A"], 0), (["B"], 1)]
)
def test_nested_intervals(overlaps: object, middle: int) -> None:
    rows = [{"start": 0, "end": 4000, "name": "A"}, {"start": 1000, "end": 2000, "name": "B"}]
    content = json.dumps({"phases": rows})
    options = {
        "format": "json",
        "records": "phases",
        "form": "intervals",
        "unit": "millisecond",
        "columns": Columns(end="end", label="name"),
    }
    assert labels_of(content, overlaps=overlaps, **options) == [0] * 25 + [middle] * 25 + [0] * 50
    assert labels_of(content, no_label=["B"], **options) == [0] * 100
    with pytest.raises(UserError, match=r"labels: phases\[1\] overlaps phases\[0\], which has another label"):
        labels_of(content, **options)


@pytest.mark.parametrize("overlaps", ["inner", "outer", "first", "last", ["C"]])
def test_intervals_of_which_none_counts_more_are_refused(overlaps: object) -> None:
    """0.1 + 0.2 is not 0.3: lengths are compared as the decimals that they are."""
    content = "0.3,0.4,A\n0.4,0.5,C\n0.6,1.9,A\n0.8,2.1,B\n"
    if overlaps in ("first", "last"):
        content = "0,1.2,A\n0,1.3,B\n"
    options = {"delimiter": "comma", "header": False, "form": "intervals", "unit": "second", "overlaps": overlaps}
    with pytest.raises(UserError, match=r"line [24] overlaps line [13], which has another label and counts as much"):
        labels_of(content, columns={"start": 1, "end": 2, "label": 3}, **options)


@pytest.mark.parametrize("none", ["-1", "-1.0"])
@pytest.mark.parametrize(
    ("naming", "expected"),
    [
        ({"meaning": {"0": "A", "1": "B", "2": "C"}}, [0, -1, 1]),
        ({"meaning": {"0": "A", "1": "B", "-1": "C", "-1.0": "C"}}, [0, 2, 1]),
        ({"numbers_from": 0}, [0, -1, 1]),
        ({}, [0, -1, 1]),
    ],
)
def test_minus_one_is_no_label_unless_a_class_is_called_so(naming: dict, expected: list[int], none: str) -> None:
    content = f"start\tlabel\n0\t0\n1\t{none}\n2\t1\n"
    source = LabelSource.model_validate({"files": r"(?P<id>\d+)\.txt", "columns": {"label": "label"}, **naming})
    spec = spec_of(source, phase_aliases={} if naming else {"0": "A", "1": "B", "2": "C"})
    track = parse_described(records_by_video(content.encode(), FILE, source, spec)[None], FILE, source, "phase", spec)
    assert isinstance(track, LabelTrack)
    assert track.labels.tolist() == expected


def test_clock_times_gaps_and_inclusive_ends() -> None:
    content = "start,end,label\n00:00:00.000,00:00:01.000,A\n0:02,0:03.960,B\n"
    options = {"delimiter": "comma", "form": "intervals", "unit": "clock", "columns": Columns(end="end", label="label")}
    assert labels_of(content, **options) == [0] * 25 + [-1] * 25 + [1] * 49 + [-1]
    assert labels_of(content, end="inclusive", gaps="C", **options) == [0] * 26 + [2] * 24 + [1] * 50


def test_vectors_in_json_by_frame() -> None:
    content = json.dumps({"annotations": {str(frame): [[7, frame // 2]] * 2 for frame in range(4)}})
    found = labels_of(
        content,
        format="json",
        records="annotations.{frame}.*",
        unit="sample",
        rate=1,
        numbers_from=0,
        columns={"start": "frame", "label": 2},
    )
    assert found == [0] * 50 + [1] * 50


NTSC = Extent("video01.mp4", 90, 30000 / 1001, 25.0)


def test_rows_may_come_in_any_order_and_twice_if_they_agree() -> None:
    options = {"unit": "source", "columns": {"label": "label"}}
    assert labels_of("start\tlabel\n50\tB\n0\tA\n0\tA\n", **options) == [0] * 50 + [1] * 50
    with pytest.raises(UserError, match="labels: line 3 and line 4 give 0 two labels"):
        labels_of("start\tlabel\n50\tB\n0\tA\n0\tC\n", **options)


@pytest.mark.parametrize(
    ("starts", "unit", "first"),
    [(("0", "1"), "second", 29), (("0.000", "1.000"), "second", 30), ((0, 1000), "millisecond", 30)],
)
def test_whole_seconds_are_samples_and_other_times_are_moments(starts: tuple, unit: str, first: int) -> None:
    """At 29.97 fps, frame 29 is on screen after one second, and frame 30 is the first one shown later."""
    content = f"{starts[0]}\tA\n{starts[1]}\tB\n"
    found = labels_of(content, extent=NTSC, header=False, form="starts", unit=unit, columns={"start": 1, "label": 2})
    assert found.index(1) == first


def notes_on(content: str, **fields: object) -> list[str]:
    source = LabelSource.model_validate({"files": r"(?P<id>\d+)\.txt", "delimiter": "comma", **fields})
    spec = spec_of(source)
    track = parse_described(records_by_video(content.encode(), FILE, source, spec)[None], FILE, source, "phase", spec)
    assert isinstance(track, TimedLabels)
    track.place(FILE, EXTENT)
    return track.notes(FILE, EXTENT)


def test_labels_before_the_first_frame_are_refused_or_cut_with_a_note() -> None:
    content = "start,end,label\n10,12.5,A\n12.5,13,B\n"
    options = {"form": "intervals", "unit": "second", "columns": {"end": "end", "label": "label"}, "gaps": "C"}
    assert notes_on(content, offset_s=-10, **options) == []
    [note] = notes_on(content, offset_s=-12, **options)
    assert note == "labels: 1 of 2 labels begin before the first frame of video01.mp4, up to 2.0 s, and are cut there"
    with pytest.raises(UserError, match=r"line 2 ends 487\.5 s before the first frame of video01\.mp4; check offset_s"):
        notes_on(content, offset_s=-500, **options)
    with pytest.raises(UserError, match=r"line 2 ends 12\.0 s before the first frame"):
        notes_on("start,label\n0,A\n13,B\n15,C\n", form="starts", unit="second", offset_s=-25)


def test_notes_say_if_intervals_label_nothing_or_all_labels_start_early() -> None:
    options = {"form": "intervals", "unit": "second", "columns": {"end": "end", "label": "label"}}
    [note] = notes_on("start,end,label\n0,1,A\n2,2,B\n", **options)
    assert note == "labels: 1 of 2 labels end before the next frame and label none"
    starts = {"form": "starts", "unit": "source", "columns": {"label": "label"}}
    [note] = notes_on("start,label\n0,A\n1,B\n3,C\n", **starts)
    assert note.startswith("labels: all 3 labels begin in the first 3.0% of video01.mp4; check unit and rate")
    assert notes_on("start,label\n0,A\n1,B\n30,C\n", **starts) == []


def test_an_offset_moves_numbers_of_frames_too() -> None:
    content = "start\tlabel\n0\tA\n50\tB\n"
    options = {"unit": "source", "columns": {"label": "label"}, "form": "starts"}
    assert labels_of(content, offset_s=1, **options) == [-1] * 25 + [0] * 50 + [1] * 25
    assert labels_of(content, offset_s=-1, **options) == [0] * 25 + [1] * 75
    assert labels_of(content, offset_s=-1, **options | {"form": "rows"}) == [0] * 25 + [1] * 50 + [-1] * 25


def test_a_frame_of_no_interval_shows_no_tool_and_tools_may_overlap() -> None:
    content = "start,end,label\n2.8,3.2,unknown\n0,2,Hook\n1,3,Grasper\n"
    source = LabelSource.model_validate(
        {"files": r"(?P<id>\d+)\.txt", "delimiter": "comma", "form": "intervals", "unit": "second"}
        | {"columns": {"end": "end", "label": "label"}, "no_label": ["unknown"]}
    )
    spec = spec_of(source, tools=("Grasper", "Hook"), labels={"tools": source})
    track = parse_described(records_by_video(content.encode(), FILE, source, spec)[None], FILE, source, "tool", spec)
    assert isinstance(track, TimedLabels)
    shown = track.place(FILE, EXTENT).labels
    assert shown[[0, 30, 60, 72, 85]].tolist() == [[0, 1], [1, 1], [1, 0], [-1, -1], [0, 0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"rows": [{"start": 0, "label": "A", "label": "B"}]}',
            "is not JSON: the key 'label' comes twice in one object",
        ),
        ('{"rows": [{"start": NaN, "label": "A"}]}', "is not JSON: NaN is not a number"),
        ("[" * 100_000, "is not JSON: "),
        ('{"rows": [{"start": 0, "label": "A", "who": 2}]}', "no record has who '1', which `where` in `labels` of own"),
        (
            '{"rows": [{"start": 0, "label": "A", "who": 1}, {"who": 1}]}',
            "rows[1]: columns.start is missing, not",
        ),
        ('{"rows": [{"start": true, "label": "A", "who": 1}]}', "rows[0]: columns.start is 'True', not a whole"),
        ('{"rows": [{"start": 1e300, "label": "A", "who": 1}]}', "rows[0]: columns.start is '1e+300', not a whole"),
        ('{"rows": {"a": {"start": 0, "label": "D", "who": 1}}}', "has no column 'who' for where.who"),
        ('{"row": []}', "the whole file has no rows (it has row)"),
        ('{"rows": {"*": [[1, 2], {"start": 0, "label": "A"}, 5]}}', "rows.*[1] is no list, unlike other records"),
        ('{"rows": {"*": [5, [1, 2]]}}', "rows.*[0] is no list, unlike other records"),
    ],
)
def test_faults_in_json_are_named_with_their_path(content: str, message: str) -> None:
    records = "rows.*.*" if "*" in content else "rows"
    options = {"format": "json", "records": records, "unit": "source", "columns": {"label": "label"}}
    with pytest.raises(UserError, match="labels: ") as raised:
        labels_of(content, where={"who": 1}, **options)
    assert message in str(raised.value)


def test_messages_about_rows_name_their_line_and_the_description() -> None:
    """Without a header, the line is the row; and data.row_fps is no remedy where the description has `labels`."""
    source = LabelSource.model_validate(
        {"files": r"(?P<id>\d+)\.txt", "header": False, "columns": {"start": 1, "label": 2}}
    )
    spec = spec_of(source)
    content = "".join(f"{row}\tA\n" for row in range(40)).encode()
    track = parse_described(records_by_video(content, FILE, source, spec)[None], FILE, source, "phase", spec)
    assert isinstance(track, LabelTrack)
    with pytest.raises(UserError, match=r"labels: line 21 is frame 20, beyond .* set unit and rate in `labels` of the"):
        fit_tracks({"phase": (FILE, track)}, Extent("video01.mp4", 20, 25.0, 25.0))
    with pytest.raises(UserError, match=r"line 4 frame 7 follows 4, where 6 was due"):
        records = records_by_video(b"0\tA\n2\tA\n4\tA\n7\tB\n", FILE, source, spec)[None]
        parse_described(records, FILE, source, "phase", spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("start\tlabel\n0\tD\n", "line 2: unknown label 'D'"),
        ("start\tlabel\n-1\tA\n", "line 2: columns.start is '-1', not a whole number of 0 or more"),
        ("start\tlabel\n0\tA\textra\n", "line 2 has 3 columns; expected 2"),
        ("begin\tlabel\n0\tA\n", "has no column 'start' for columns.start"),
        ("start\tlabel\n", "has no labels"),
        ("", "is empty"),
        ("start\tlabel\n0\tA\n200\tB\n", "line 3 begins at 200, after the end of video01.mp4"),
        ("start\tlabel\n0\tA\n0\tB\n", "line 2 and line 3 start at the same time"),
    ],
)
def test_faults_are_named_with_their_place(content: str, message: str) -> None:
    with pytest.raises(UserError, match="labels: ") as raised:
        labels_of(content, form="starts", unit="source", columns={"label": "label"})
    assert message in str(raised.value)


COCO = {"images": [{"id": 5, "file_name": "video01/00001.jpg"}, {"id": 7, "file_name": "video01/00000.jpg"}]}
OF_COCO = {
    "format": "json",
    "records": "annotations",
    "join": {"records": "images", "by": "image_id"},
    "parse": {"file_name": r"(?P<case>\w+)/(?P<number>\d+)\.jpg"},
    "columns": {"video": "case", "start": "number", "label": "phase"},
    "categories": {"records": "classes"},
    "unit": "sample",
    "rate": 1,
}


def test_coco_like_files_name_video_number_and_class_in_other_lists() -> None:
    annotations = [{"image_id": 5, "phase": 1}, {"image_id": 5, "phase": 1}, {"image_id": 7, "phase": 0}]
    classes = [{"id": 0, "name": "C"}, {"id": 1, "name": "A"}]
    content = {**COCO, "annotations": annotations, "classes": classes}
    assert labels_of(json.dumps(content), video="video01", **OF_COCO) == [2] * 25 + [0] * 75
    for wrong, message in (
        ({"classes": [*classes, {"id": 1, "name": "B"}]}, r"classes\[2\]: two classes have the id 1"),
        ({"classes": [{"id": 0}]}, r"classes\[0\] has no id and name of a class"),
        ({"annotations": [{"image_id": 5, "phase": 9}]}, r"annotations\[0\]: unknown label '9'"),
        ({"annotations": [{"image_id": 5, "phase": functools.reduce(lambda one, _: [one], range(800), 1)}]}, "label"),
        ({"images": [{"id": 5, "file_name": "00001.jpg"}]}, r"annotations\[0\]: file_name is '00001.jpg', not like"),
        ({"annotations": [{"image_id": 6, "phase": 1}]}, r"image_id '6' is not in images"),
        ({"images": [{"id": None}], "annotations": [7]}, r"annotations: image_id 'None' is not in images"),
    ):
        broken = {**content, "annotations": annotations[:2], **wrong}
        with pytest.raises(UserError, match=message):
            labels_of(json.dumps(broken), video="video01", **OF_COCO)


def test_several_columns_can_each_name_a_tool() -> None:
    source = LabelSource.model_validate(
        {
            "files": r"(?P<id>\d+)\.csv",
            "delimiter": "comma",
            "unit": "second",
            "columns": {"start": "time", "labels": ["first", "second"]},
            "numbers_from": 1,
            "no_label": ["-1"],
            "no_tool": ["0", "-2"],
        }
    )
    spec = spec_of(LabelSource(files=r"(?P<id>\d+)\.txt"), tools=("P", "Q", "R"))
    records = records_by_video(b"time,first,second\n0,1,-2\n1,3,2\n2,0,-2\n3,-1,-2\n", FILE, source, spec)[None]
    track = parse_described(records, FILE, source, "tool", spec)
    assert not isinstance(track, LabelTrack)
    assert track.place(FILE, EXTENT).labels.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [-1, -1, -1]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parse": {"a": "("}}, "a is not a regular expression"),
        ({"parse": {"a": "(a+)+b"}}, r"a is not .*: \(a\+\)\+ repeats a repetition, which can take endless time"),
        ({"files": r"(?P<id>(o+p*)+)+\.csv"}, r"\(o\+p\*\)\+ repeats a repetition"),
        ({"columns": {"start": True}}, "columns.start"),
        ({"columns": {"label": [2, 2]}}, "label names a column twice"),
        ({"columns": {"labels": ["a", "b", "a"]}}, "labels names a column twice"),
        ({"categories": {"records": "x"}}, "categories is for format json"),
        ({"format": "json", "records": "r", "categories": {"records": "x"}, "numbers_from": 0}, "numbers_from must be"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LabelSource.model_validate({"files": r"(?P<id>\d+)", **fields})


def test_a_last_column_without_any_value_is_a_column_if_it_is_asked_for() -> None:
    options = {"unit": "source", "header": False}
    assert labels_of("0\t\n1\t\n", **options, columns={"start": 1, "label": 2}) == [-1] * 100
    assert labels_of("A\t0\t\nA\t1\t\n", **options, columns={"start": 2, "label": 1}) == [0] * 100


def test_a_number_beyond_floats_in_a_file_of_several_videos_is_named() -> None:
    source = LabelSource.model_validate(
        {"files": "all", "format": "json", "records": "rows", "columns": {"video": "v", "label": "l"}}
    )
    records = records_by_video(b'{"rows": [{"v": "x", "l": "A", "start": 1e999}]}', FILE, source, spec_of(source))["x"]
    with pytest.raises(UserError, match="labels: has a value that is too large"):
        records.digest(FILE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gaps": "A"}, "gaps is for form starts and intervals"),
        ({"end": "inclusive"}, "end is for form intervals"),
        ({"form": "starts", "unit": "source", "overlaps": "inner"}, "overlaps is for form intervals"),
        ({"unit": "second", "origin": 1}, "origin is for numbers of frames or samples; times count from 0"),
        ({"records": "phases"}, "records is for format json"),
        ({"format": "json", "records": "phases", "header": False}, "header is for format table"),
        ({"form": "starts", "unit": "source", "origin": "auto"}, "origin must be 0 or 1 for form starts"),
        ({"separator": "|"}, "labels.phases: separator, no_tool and several columns of labels are for tools"),
    ],
)
def test_options_without_effect_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_of(LabelSource.model_validate({"files": r"(?P<id>\d+)\.txt", **given}))


@pytest.mark.parametrize("id_format", ["{number:0999999999d}", "{number:{number}}"])
def test_an_id_of_endless_digits_is_refused(id_format: str) -> None:
    with pytest.raises(ValueError, match="gives numbers more than 99 digits"):
        spec_of(LabelSource(files=r"(?P<id>\d+)\.txt"), id_format=id_format)


def test_a_note_says_which_names_are_read_as_one_video() -> None:
    content = b"video,start,label\n1,0,A\nvideo01,5,B\n01,7,A\n2,0,A\n"
    columns = {"video": "video", "label": "label"}
    source = LabelSource.model_validate({"files": "all", "delimiter": "comma", "columns": columns})
    videos = records_by_video(content, FILE, source, spec_of(source))
    assert videos["video01"].notes == ("labels: '1', 'video01', '01' are read as names of one video, video01",)
    assert videos["video02"].notes == ()


def test_an_alias_of_no_class_is_named_where_the_description_has_labels() -> None:
    with pytest.raises(ValueError, match="alias 'a' points to 'D', which is not one of the phases"):
        spec_of(LabelSource(files=r"(?P<id>\d+)\.txt"), phase_aliases={"a": "D"})
