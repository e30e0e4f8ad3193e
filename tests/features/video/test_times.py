"""Which frames sampling selects, and when frames are shown, at constant and at variable rates."""

from __future__ import annotations

import base64
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.errors import UserError
from features.dataset.annotations import LabelTrack
from features.dataset.index import VideoEntry
from features.dataset.labels import sample_labels
from features.dataset.layouts import FolderLayout
from features.dataset.sampling import frame_times_s, sampled_frames
from features.video.times import FrameTimes


def entry(frame_count: int, fps: float, **more: object) -> VideoEntry:
    common = {"id": "video01", "kind": "video", "source": "video01.mp4", "split": "none", "sha256_ends": "0" * 64}
    size = {"size_bytes": 1, "modified_ns": 0}
    return VideoEntry.model_validate({**common, **size, "frame_count": frame_count, "fps": fps, **more})


def varying(pts: list[int], tick_s: Fraction = Fraction(1, 1000)) -> VideoEntry:
    mean = (len(pts) - 1) / float((pts[-1] - pts[0]) * tick_s)
    times = FrameTimes.of_stream(np.array(pts), tick_s, mean)
    assert times is not None
    return entry(len(pts), mean, times=times)


@pytest.mark.parametrize(
    ("frame_count", "source_fps", "fps", "wanted"),
    [
        (100, 25, 1, [0, 25, 50, 75]),
        (101, 25, 1, [0, 25, 50, 75, 100]),
        (5, 25, 25, [0, 1, 2, 3, 4]),
        (20, 25, 5, [0, 5, 10, 15]),
        (201, 25, 0.25, [0, 100, 200]),
        (61, 30000 / 1001, 30000 / 1001, list(range(61))),
        (61, 30000 / 1001, 29.97, list(range(61))),
        (61, 30000 / 1001, 30, list(range(61))),
        (121, 60, 0.5, [0, 120]),
        (3, 25, 1, [0]),
        (13, 25, 25 / 6, [0, 6, 12]),
        (61, 29.97, 1, [0, 29, 59]),
        (49, 24000 / 1001, 1, [0, 23, 47]),
        (75, 24.8, 1, [0, 24, 49, 74]),
        (13, 25, 10, [0, 2, 5, 7, 10, 12]),
        (26, 25, 24, [*range(24), 25]),
    ],
)
def test_sampling_selects_the_frame_on_screen(
    frame_count: int, source_fps: float, fps: float, wanted: list[int]
) -> None:
    frames = sampled_frames(entry(frame_count, source_fps), fps)
    assert frames.dtype == np.int64
    assert frames.tolist() == wanted


@settings(deadline=None, max_examples=200)
@given(
    frame_count=st.integers(1, 5000),
    step=st.integers(1, 200),
    source_fps=st.sampled_from([24.0, 25.0, 29.97, 30000 / 1001, 30.0, 50.0, 59.94]),
)
def test_an_integer_ratio_selects_every_nth_frame(frame_count: int, step: int, source_fps: float) -> None:
    assert sampled_frames(entry(frame_count, source_fps), source_fps / step).tolist() == list(
        range(0, frame_count, step)
    )


@settings(deadline=None, max_examples=80)
@given(steps=st.lists(st.integers(1, 3000), min_size=1, max_size=60), fps=st.fractions(Fraction(1, 20), 3))
def test_sampling_by_time_agrees_with_the_rule_in_words(steps: list[int], fps: Fraction) -> None:
    pts = [0, *np.cumsum(steps).tolist()]
    mean = (len(pts) - 1) / pts[-1] * 1000
    times = FrameTimes.of_stream(np.array(pts), Fraction(1, 1000), mean)
    video = entry(len(pts), mean, times=times)
    if fps > video.most_fps:
        return
    end_ms = pts[-1] + Fraction(pts[-1], len(pts) - 1)
    wanted: list[int] = []
    number = 0
    shown = pts if times is not None else [Fraction(pts[-1] * k, len(pts) - 1) for k in range(len(pts))]
    while (sampled_ms := 1000 * number / fps) < end_ms - Fraction(1, 100):
        on_screen = max(k for k, at in enumerate(shown) if at <= sampled_ms + Fraction(1, 2000))
        if on_screen not in wanted:
            wanted.append(on_screen)
        number += 1
    assert sampled_frames(video, float(fps)).tolist() == wanted


def test_a_pause_is_one_frame_and_times_are_the_streams_own() -> None:
    video = varying([500, 540, 580, 3580, 3620, 3660, 5000])
    assert sampled_frames(video, 1.0).tolist() == [0, 2, 5, 6]
    assert frame_times_s(video, [0, 2, 3, 6]).tolist() == pytest.approx([0.0, 0.08, 3.08, 4.5])
    assert sampled_frames(video, 25.0).tolist() == list(range(7))


def test_constant_rates_need_no_times_within_the_rounding_of_the_clock() -> None:
    milliseconds = np.rint(np.arange(1000) * 1001 / 30).astype(np.int64) + 7
    assert FrameTimes.of_stream(milliseconds, Fraction(1, 1000), 30000 / 1001) is None
    assert FrameTimes.of_stream(np.arange(1000) * 512, Fraction(1, 12800), 25.0) is None
    assert FrameTimes.of_stream(np.arange(10), Fraction(1, 25), 25.0) is None
    late = np.arange(1000) * 40
    late[500:] += 12
    assert FrameTimes.of_stream(late, Fraction(1, 1000), 25.0) is not None
    with pytest.raises(ValueError, match="frame 2 is shown years after"):
        FrameTimes.of_stream(np.array([0, 1, 2**40, 2**40 + 1]), Fraction(1, 25), 25.0)


@pytest.mark.parametrize(
    ("frame_count", "fps", "more", "problem"),
    [
        (1000, 30, {}, "data.fps=30 is too high for 25 fps; the most is 25"),
        (
            1000,
            1,
            {"kind": "frames", "frames": {"numbering": "source", "base": 0, "stride": 100, "first": 0, "count": 10}},
            "data.fps=1 is too high for images of one in 100 frames at 25 fps; the most is 0.25",
        ),
    ],
)
def test_a_rate_above_the_available_one_is_refused_naming_one_that_works(
    frame_count: int, fps: float, more: dict, problem: str
) -> None:
    video = entry(frame_count, 25, **more)
    with pytest.raises(UserError, match="is too high") as caught:
        sampled_frames(video, fps)
    assert problem in str(caught.value)
    offered = float(str(caught.value).split("the most is ")[1])
    assert len(sampled_frames(video, offered)) == frame_count // video.image_stride


def test_a_folder_of_samples_is_sampled_from_its_first_image() -> None:
    layout = FolderLayout(numbering="source", base=0, stride=100, first=100, count=4)
    video = entry(500, 25, kind="frames", frames=layout)
    assert sampled_frames(video, 0.125).tolist() == [100, 300]


def test_tool_rows_label_the_sample_next_to_them() -> None:
    frames = sampled_frames(entry(2000, 30000 / 1001), 1.0)
    rows = np.arange(0, 2000, 30)
    tools = LabelTrack(rows, np.ones((len(rows), 2), np.int8), 30)
    _, labels = sample_labels(frames, None, tools, "mask", 2)
    assert (labels == 1).all()
    _, sparse = sample_labels(sampled_frames(entry(2000, 30000 / 1001), 5.0), None, tools, "mask", 2)
    assert (sparse[:, 0] == 1).sum() == len(rows)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tick_s": (0, 25)},
        {"tick_s": (1, 2**40)},
        {"steps": "no base64!"},
        {"steps": base64.b64encode(b"no zlib").decode()},
        {"steps": base64.b64encode(zlib.compress(b"\1\0\0\0" * 5)).decode()},
        {"steps": base64.b64encode(zlib.compress(bytes(200 << 20), 1)).decode()},
    ],
)
def test_hostile_times_are_refused_and_not_unpacked(wrong: dict) -> None:
    video = varying([0, 40, 90, 150, 700, 710, 720])
    value = video.model_dump(mode="json")
    assert VideoEntry.model_validate(value) == video
    value["times"].update(wrong)
    with pytest.raises(ValidationError):
        VideoEntry.model_validate(value)
