"""Intervals are the same after they were written and read, in every format and from each format to each other one."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from features.annotation_files.eaf import eaf_text, read_eaf
from features.annotation_files.intervals import Annotations, Interval, Losses, VideoAnnotations
from features.annotation_files.label_studio import label_studio_tasks, read_label_studio
from features.annotation_files.table import csv_text, read_csv
from tests.features.annotation_files.material import FPS, intervals, sorted_intervals, video_of


def through_eaf(video: VideoAnnotations, losses: Losses) -> Annotations:
    return read_eaf(eaf_text(video, losses).encode(), Path(f"{video.video}.eaf"))


def through_csv(video: VideoAnnotations, losses: Losses) -> Annotations:
    return read_csv(csv_text([video], losses).encode(), Path("all.csv"))


def through_label_studio(video: VideoAnnotations, losses: Losses) -> Annotations:
    tasks = label_studio_tasks([video], lambda name: FPS, losses)
    return read_label_studio(json.dumps(tasks).encode(), Path("export.json"))


FORMATS = {"eaf": through_eaf, "csv": through_csv, "labelstudio": through_label_studio}


@settings(max_examples=60, deadline=None)
@given(found=st.booleans().flatmap(lambda confidences: intervals(confidences, annotators=True)))
def test_every_format_keeps_everything(found: tuple[Interval, ...]) -> None:
    for name, through in FORMATS.items():
        losses = Losses()
        read = through(video_of(found), losses)
        assert (name, losses.notes()) == (name, [])
        assert [video.video for video in read.videos] == ["video01"]
        assert (name, sorted_intervals(read.videos[0].intervals)) == (name, found)


@settings(max_examples=25, deadline=None)
@given(found=intervals(confidences=True, annotators=True))
def test_chains_of_formats_keep_everything(found: tuple[Interval, ...]) -> None:
    for chain in permutations(FORMATS.values()):
        video, losses = video_of(found), Losses()
        for through in chain:
            [video] = through(video, losses).videos
        assert sorted_intervals(video.intervals) == found
        assert losses.notes() == []


@pytest.mark.parametrize("fps", [1, 23.976, 24000 / 1001, 25, 29.97, 30, 50, 59.94, 60])
def test_frames_survive_the_milliseconds_of_the_other_formats(fps: float) -> None:
    tasks = [
        {
            "data": {"video": "video01.mp4", "fps": fps},
            "annotations": [
                {
                    "result": [
                        {
                            "type": "timelinelabels",
                            "from_name": "phase",
                            "value": {"ranges": [{"start": frame + 1, "end": frame + 7}], "timelinelabels": ["A"]},
                        }
                    ]
                }
                for frame in range(0, 20000, 49)
            ],
        }
    ]
    [video] = read_label_studio(json.dumps(tasks).encode(), Path("export.json")).videos
    [from_csv] = through_csv(video, Losses()).videos
    [back] = label_studio_tasks([from_csv], lambda name: fps, Losses())
    ranges = [one["value"]["ranges"][0] for one in back["annotations"][0]["result"]]
    assert ranges == [{"start": frame + 1, "end": frame + 7} for frame in range(0, 20000, 49)]


def test_what_a_format_cannot_hold_is_noted() -> None:
    found = (Interval("phase", "A", 0, 1.0004), Interval("phase", "B", 1.0104, 1.0206), Interval("phase", "C", 2.5, 9))
    losses = Losses()
    [video] = through_csv(video_of(found), losses).videos
    assert [(one.start_s, one.end_s) for one in video.intervals] == [(0, 1), (1.01, 1.021), (2.5, 9)]
    assert losses.notes() == ["3 boundaries rounded to the millisecond"]
    losses = Losses()
    through_label_studio(video_of(found), losses)
    assert losses.notes() == [
        "1 interval(s) shorter than a frame made one frame long",
        "3 boundaries moved to the next frame",
    ]


@pytest.mark.parametrize("label", ["=1+1", "@SUM(A1)", "-1", "+1"])
def test_a_table_has_no_formulas(label: str) -> None:
    with pytest.raises(UserError, match="a spreadsheet would read"):
        csv_text([video_of((Interval("phase", label, 0, 1),))], Losses())
