"""Files of ELAN and Label Studio as these programs and their libraries write them, and files with faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import UserError
from features.annotation_files.eaf import eaf_text, read_eaf
from features.annotation_files.intervals import Interval, Losses
from features.annotation_files.label_studio import label_studio_config, read_label_studio
from features.annotation_files.table import read_csv
from tests.features.annotation_files.material import LABEL_STUDIO_EXPORT, PYMPI_EAF, SDK_JSON_MIN, SDK_TASK, video_of

EAF, EXPORT, TABLE = Path("video01.eaf"), Path("export.json"), Path("video01.csv")


def eaf(body: str, slots: str = "", header: str = "", version: str = "3.0") -> bytes:
    return (
        f'<ANNOTATION_DOCUMENT FORMAT="{version}"><HEADER TIME_UNITS="milliseconds">{header}</HEADER>'
        f"<TIME_ORDER>{slots}</TIME_ORDER>{body}</ANNOTATION_DOCUMENT>"
    ).encode()


def slot(number: int, value: int | None = None) -> str:
    time = "" if value is None else f' TIME_VALUE="{value}"'
    return f'<TIME_SLOT TIME_SLOT_ID="ts{number}"{time}/>'


def aligned(number: int, first: int, last: int, value: str) -> str:
    slots = f'TIME_SLOT_REF1="ts{first}" TIME_SLOT_REF2="ts{last}"'
    return (
        f'<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a{number}" {slots}>'
        f"<ANNOTATION_VALUE>{value}</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>"
    )


def spans(content: bytes) -> list[tuple[str, str, float, float]]:
    [video] = read_eaf(content, EAF).videos
    return [(one.track, one.label, one.start_s, one.end_s) for one in video.intervals]


def test_a_file_of_pympi_is_read() -> None:
    read = read_eaf(PYMPI_EAF.encode(), EAF)
    assert read.notes == ()
    [video] = read.videos
    assert (video.video, video.media) == ("video01", "./video01.mp4")
    assert video.intervals == (
        Interval("phase", "Preparation", 0.0, 2.0),
        Interval("phase", "Calot triangle dissection", 2.0, 3.48),
        Interval("steps", "Trocars", 0.0, 2.0),
        Interval("steps", "Peritoneum", 2.0, 3.48),
    )


def test_slots_without_a_time_and_parts_of_a_parent_are_spread_evenly() -> None:
    body = (
        f'<TIER TIER_ID="phase">{aligned(1, 1, 2, "A")}{aligned(2, 2, 3, "B")}{aligned(3, 3, 4, "C")}</TIER>'
        '<TIER TIER_ID="parts" PARENT_REF="phase">'
        + "".join(
            f'<ANNOTATION><REF_ANNOTATION ANNOTATION_ID="p{at}" ANNOTATION_REF="a1">'
            f"<ANNOTATION_VALUE>p{at}</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION>"
            for at in (1, 2)
        )
        + "</TIER>"
    )
    slots = slot(1, 1000) + slot(2) + slot(3) + slot(4, 7000)
    assert spans(eaf(body, slots)) == [
        ("parts", "p1", 1.0, 2.0),
        ("parts", "p2", 2.0, 3.0),
        ("phase", "A", 1.0, 3.0),
        ("phase", "B", 3.0, 5.0),
        ("phase", "C", 5.0, 7.0),
    ]


def test_old_and_unknown_versions_are_read_with_a_note_on_the_unknown_ones() -> None:
    body = f'<TIER TIER_ID="phase">{aligned(1, 1, 2, "A")}</TIER>'
    for version in ("2.7", "2.8", "3.0"):
        assert read_eaf(eaf(body, slot(1, 0) + slot(2, 40), version=version), EAF).notes == ()
    assert read_eaf(eaf(body, slot(1, 0) + slot(2, 40), version="9.0"), EAF).notes == (
        "video01.eaf: EAF version 9.0; read like 3.0",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'<!DOCTYPE a [<!ENTITY b "c">]><ANNOTATION_DOCUMENT/>', "has a document type declaration"),
        (b"<ANNOTATION_DOCUMENT>", "is not XML: no element found"),
        (b"<a/>", "is not an ELAN file: its root is 'a'"),
        (b"\xff\xfe<\x00", "not UTF-8 text"),
        (eaf("", header='<MEDIA_DESCRIPTOR TIME_ORIGIN="1500"/>'), "a media file with an offset (TIME_ORIGIN '1500')"),
        (eaf("", '<TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="1.5"/>'), "time slot 'ts1' is not a number"),
        (
            eaf(f'<TIER TIER_ID="phase">{aligned(1, 1, 2, "A")}</TIER>', slot(1, 0) + slot(2)),
            "annotation a1 of tier phase has no time",
        ),
        (
            eaf(f'<TIER TIER_ID="phase">{aligned(1, 1, 2, "A")}</TIER>', slot(1, 40) + slot(2, 0)),
            "annotation a1 of tier phase: from 0.04 s to 0 s is not an interval",
        ),
    ],
)
def test_faults_of_elan_files_are_named(content: bytes, message: str) -> None:
    with pytest.raises(UserError) as found:
        read_eaf(content, EAF)
    assert message in str(found.value)
    assert str(found.value).startswith("video01.eaf: ")


def test_a_written_elan_file_has_its_parts_in_the_order_of_the_schema() -> None:
    found = (Interval("phase", "A", 0, 1, 0.5), Interval("phase", "B", 0.5, 2))
    text = eaf_text(video_of(found), Losses())
    tags = ["HEADER", "TIME_ORDER", "TIER", "LINGUISTIC_TYPE", "CONSTRAINT"]
    assert sorted(tags, key=lambda tag: text.index(f"<{tag} " if tag != "TIME_ORDER" else "<TIME_ORDER")) == tags
    assert 'FORMAT="3.0"' in text
    assert [line.strip() for line in text.splitlines() if "<TIME_SLOT " in line] == [
        f'<TIME_SLOT TIME_SLOT_ID="ts{at}" TIME_VALUE="{value}" />' for at, value in enumerate((0, 500, 1000, 2000), 1)
    ]
    assert [line.split('TIER_ID="')[1].split('"')[0] for line in text.splitlines() if "<TIER " in line] == [
        "phase",
        "phase confidence",
        "phase (2)",
    ]


def test_an_export_of_label_studio_is_read() -> None:
    read = read_label_studio(LABEL_STUDIO_EXPORT.encode(), EXPORT)
    assert read.notes == ()
    [video] = read.videos
    assert (video.video, video.fps) == ("video01", 25)
    assert video.intervals == (
        Interval("phase", "Preparation", 0.0, 2.0, None, "ann@example.org"),
        Interval("phase", "Calot triangle dissection", 2.0, 3.48, None, "ann@example.org"),
    )


@pytest.mark.parametrize("content", [SDK_TASK, SDK_JSON_MIN])
def test_files_of_label_studios_sdk_are_read(content: str) -> None:
    read = read_label_studio(content.encode(), EXPORT)
    assert read.notes == ()
    assert (read.videos[0].video, read.videos[0].intervals) == (
        "video01",
        (
            Interval("phase", "Preparation", 0.0, 1.92, None, "3"),
            Interval("phase", "Closure", 1.92, 3.48, None, "3"),
        ),
    )


def test_predictions_are_read_if_there_is_nothing_else() -> None:
    [task] = json.loads(LABEL_STUDIO_EXPORT)
    read = read_label_studio(json.dumps([task | {"annotations": []}]).encode(), EXPORT)
    assert read.notes == ("export.json: video01 has no annotations; its predictions are read",)
    assert read.videos[0].intervals == (Interval("phase", "Preparation", 0.0, 3.48, 0.8, "surgstage"),)


def task(ranges: list[tuple[float, float]], **data: object) -> bytes:
    results = [
        {
            "id": f"r{at}",
            "type": "timelinelabels",
            "from_name": "phase",
            "value": {"ranges": [{"start": start, "end": end}], "timelinelabels": [f"L{at}"]},
        }
        for at, (start, end) in enumerate(ranges)
    ]
    data = {"video": "/data/local-files/?d=videos/video02.mp4", **data}
    return json.dumps([{"data": data, "annotations": [{"result": results}]}]).encode()


def test_files_with_frames_from_0_are_read_with_notes() -> None:
    read = read_label_studio(task([(0, 10), (10, 20)], fps=10), EXPORT)
    [video] = read.videos
    assert video.video == "video02"
    assert [(one.start_s, one.end_s) for one in video.intervals] == [(0.0, 1.0), (1.0, 2.0)]
    assert len(read.notes) == 1
    assert "has a frame 0, but Label Studio counts from 1" in read.notes[0]
    read = read_label_studio(task([(1, 10), (10, 20), (21, 30)], fps=10), EXPORT)
    assert [(one.start_s, one.end_s) for one in read.videos[0].intervals] == [(0.0, 1.0), (0.9, 2.0), (2.0, 3.0)]
    assert len(read.notes) == 1
    assert "1 region(s) end in the frame in which another one begins" in read.notes[0]


def test_json_min_and_regions_of_audio_are_read() -> None:
    small = [
        {
            "video": "video01.mp4",
            "id": 1,
            "fps": "25",
            "annotator": 2,
            "phase": [{"ranges": [{"start": 1, "end": 25}], "timelinelabels": ["A", "B"]}],
        }
    ]
    [video] = read_label_studio(json.dumps(small).encode(), EXPORT).videos
    assert video.intervals == (
        Interval("phase", "A", 0.0, 1.0, None, "2"),
        Interval("phase", "B", 0.0, 1.0, None, "2"),
    )
    value = {"start": 0.25, "end": 1.5, "channel": 0, "labels": ["Kick"]}
    result = [{"type": "labels", "from_name": "tricks", "value": value}, {"type": "videorectangle", "value": {}}]
    old = [{"data": {"video_url": "https://example.org/a/video03.mp4?x=1"}, "annotations": [{"result": result}]}]
    old[0]["data"]["video"] = old[0]["data"].pop("video_url")  # type: ignore[attr-defined]
    read = read_label_studio(json.dumps(old).encode(), EXPORT)
    assert (read.videos[0].video, read.videos[0].intervals) == ("video03", (Interval("tricks", "Kick", 0.25, 1.5),))
    assert read.notes == ("export.json: 1 result(s) of type videorectangle left out, which are no intervals",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"3", "is not a list of tasks"),
        (b"[3]", "task 1 is int, not an object"),
        (b'[{"data": {}}]', "task 1 names no video in its data"),
        (task([(1, 2)]), "frames at an unknown rate"),
        (task([(1, 2)], fps=0), "fps '0' is not a frame rate"),
        (task([(3, 2)], fps=1), "start and end must be numbers from 0 in increasing order"),
        (task([(1, 2.5)], fps=1), "frames 1 to 2.5 are not whole numbers"),
        (b'[{"data": {"video": "a.mp4"}, "annotations": 3}]', "annotations is int, not a list"),
        (task([(1, 2)], fps=1).replace(b"L0", b"\\ud800"), "a text with the character"),
    ],
)
def test_faults_of_label_studio_files_are_named(content: bytes, message: str) -> None:
    with pytest.raises(UserError) as found:
        read_label_studio(content, EXPORT)
    assert message in str(found.value)


def test_a_labelling_configuration_escapes_names() -> None:
    text = label_studio_config([("phase", ["A & B", '<"C">'])])
    assert '<Label value="A &amp; B"/>' in text
    assert "<Label value='&lt;\"C\"&gt;'/>" in text
    assert 'frameRate="$fps"' in text


def test_a_table_needs_only_labels_and_times() -> None:
    read = read_csv(b"\xef\xbb\xbfEnd;Start;Label\r\n00:01:02.5;1.25;A\r\n\r\n70;62,5;B\r\n".replace(b",", b"."), TABLE)
    [video] = read.videos
    assert (video.video, video.intervals) == (
        "video01",
        (Interval("phase", "A", 1.25, 62.5), Interval("phase", "B", 62.5, 70)),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column label"),
        (b"label,start\nA,1\n", "has no column end (found: label, start)"),
        (b"label,start,end\nA,1\n", "line 2 has 2 columns, not 3"),
        (b"label,start,end\nA,x,2\n", "line 2: start is 'x', neither seconds nor hh:mm:ss.mmm"),
        (b"label,start,end\nA,3,2\n", "line 2: from 3 s to 2 s is not an interval"),
        (b"label,start,end,confidence\nA,1,2,nan\n", "line 2: confidence nan is not between 0 and 1"),
        (b"label,start,end,video\nA,1,2,a/b\n", "line 2: the video's name contains a slash"),
    ],
)
def test_faults_of_tables_are_named(content: bytes, message: str) -> None:
    with pytest.raises(UserError) as found:
        read_csv(content, TABLE)
    assert message in str(found.value)
