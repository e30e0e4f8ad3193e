"""Which labels frames get, and what happens where labels and video disagree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import load_dataset
from features.annotations import PhaseTrack, ToolTrack, read_phase_file, read_tool_file
from features.labels import Extent, fit_tracks, sample_labels

PHASES = Path("root/video01-phase.txt")
TOOLS = Path("root/video01-tool.txt")


def phase_track(rows: int, stride: int = 1, first: int = 0) -> PhaseTrack:
    frames = first + stride * np.arange(rows, dtype=np.int64)
    return PhaseTrack(frames, (np.arange(rows) % 7).astype(np.int8), stride)


def tool_track(rows: int, stride: int = 25, first: int = 0, tools: int = 7) -> ToolTrack:
    frames = first + stride * np.arange(rows, dtype=np.int64)
    return ToolTrack(frames, (np.arange(rows * tools).reshape(rows, tools) % 2).astype(np.int8), stride)


# ---------------------------------------------------------------------------------------------- rows to frames


def slow_labels(
    frames: list[int], phase: PhaseTrack | None, tools: ToolTrack | None, between_rows: str, tool_count: int
) -> tuple[list[int], list[list[int]]]:
    """The rules in words: a phase holds until the next row (the last for a stride); a tool row labels its frame."""
    phase_labels, tool_labels = [], []
    for frame in frames:
        label = -1
        if phase is not None:
            for start, value in zip(phase.frame_index.tolist(), phase.phase.tolist(), strict=True):
                if start <= frame < start + phase.stride:
                    label = value
        phase_labels.append(label)
        row = [-1] * tool_count
        if tools is not None:
            for start, values in zip(tools.frame_index.tolist(), tools.tools.tolist(), strict=True):
                if frame == start or (between_rows == "hold" and start <= frame < start + tools.stride):
                    row = values
        tool_labels.append(row)
    return phase_labels, tool_labels


@settings(deadline=None, max_examples=200)
@given(
    phase=st.none() | st.builds(phase_track, st.integers(1, 30), st.integers(1, 9), st.integers(0, 40)),
    tools=st.none() | st.builds(tool_track, st.integers(1, 30), st.integers(1, 9), st.integers(0, 40), st.just(4)),
    frames=st.builds(range, st.integers(0, 40), st.integers(0, 400), st.integers(1, 30)).map(list),
    between_rows=st.sampled_from(["mask", "hold"]),
)
def test_labels_are_what_the_obvious_restatement_gives(
    phase: PhaseTrack | None, tools: ToolTrack | None, frames: list[int], between_rows: str
) -> None:
    phase_labels, tool_labels = sample_labels(frames, phase, tools, between_rows, 4)
    assert phase_labels.dtype == tool_labels.dtype == np.int8
    assert tool_labels.shape == (len(frames), 4)
    assert (phase_labels.tolist(), tool_labels.tolist()) == slow_labels(frames, phase, tools, between_rows, 4)


def test_a_data_set_without_tools_has_tool_labels_of_no_column() -> None:
    phase_labels, tool_labels = sample_labels([0, 1], phase_track(2), None, "mask", 0)
    assert phase_labels.tolist() == [0, 1]
    assert tool_labels.shape == (2, 0)


def test_real_labels_at_one_fps_are_the_published_ones(shared_data: Path) -> None:
    spec = load_dataset("cholec80")
    published = np.load(shared_data / "labels" / "train40_1fps.npz")
    for name in ("video01", "video02", "video03", "video04", "video05"):
        folder = shared_data / "mini-cholec80"
        phase = read_phase_file(folder / "phase_annotations" / f"{name}-phase.txt", spec)
        tools = read_tool_file(folder / "tool_annotations" / f"{name}-tool.txt", spec)
        frames = np.arange(0, len(phase.frame_index), 25)
        phase_labels, tool_labels = sample_labels(frames, phase, tools, "mask", 7)
        assert np.array_equal(phase_labels, published[f"{name}_phase"])
        assert np.array_equal(tool_labels, published[f"{name}_tools"])


# ---------------------------------------------------------------------------------------------- tracks to video


def fit(
    phase: PhaseTrack | None,
    tools: ToolTrack | None,
    frame_count: int,
    fps: float = 25.0,
    row_fps: float = 25.0,
    stride: int = 1,
) -> tuple[PhaseTrack | None, ToolTrack | None, tuple[str, ...]]:
    extent = Extent("video01.mp4", frame_count, fps, row_fps, stride)
    return fit_tracks(None if phase is None else (PHASES, phase), None if tools is None else (TOOLS, tools), extent)


def test_labels_that_fit_are_left_alone() -> None:
    phase, tools = phase_track(800), tool_track(32)
    fitted_phase, fitted_tools, notes = fit(phase, tools, 800)
    assert notes == ()
    assert fitted_phase is not None
    assert fitted_tools is not None
    assert len(fitted_phase.frame_index) == 800
    assert len(fitted_tools.frame_index) == 32


def test_no_labels_at_all_are_fine() -> None:
    assert fit(None, None, 800) == (None, None, ())


def test_a_phase_list_one_row_longer_than_the_tool_list_is_cut_with_a_note() -> None:
    phase, tools, notes = fit(phase_track(33, 25), tool_track(32), 801)
    assert phase is not None
    assert tools is not None
    assert phase.frame_index[-1] == tools.frame_index[-1] == 775
    assert notes == ("video01-phase.txt: 1 trailing row cut, from frame 800 on",)


def test_rows_that_start_after_the_video_are_cut_with_a_note() -> None:
    phase, tools, notes = fit(phase_track(801), tool_track(33), 800)
    assert phase is not None
    assert tools is not None
    assert phase.frame_index[-1] == 799
    assert tools.frame_index[-1] == 775
    assert notes == (
        "video01-phase.txt: 1 trailing row cut, from frame 800 on",
        "video01-tool.txt: 1 trailing row cut, from frame 800 on",
    )


def test_a_second_of_phase_rows_beyond_the_video_is_one_row_of_the_tool_list() -> None:
    phase, _, notes = fit(phase_track(825), tool_track(32), 800)
    assert phase is not None
    assert phase.frame_index[-1] == 799
    assert notes == ("video01-phase.txt: 25 trailing rows cut, from frame 800 on",)


@pytest.mark.parametrize(
    ("phase", "tools", "frame_count", "file", "row"),
    [
        (phase_track(826), tool_track(32), 800, PHASES, "row 801 (line 802) is frame 800"),
        (phase_track(802), None, 800, PHASES, "row 801 (line 802) is frame 800"),
        (phase_track(800), tool_track(34), 800, TOOLS, "row 33 (line 34) is frame 800"),
        (None, tool_track(40), 810, TOOLS, "row 34 (line 35) is frame 825"),
        (phase_track(40, 25), None, 900, PHASES, "row 37 (line 38) is frame 900"),
    ],
)
def test_labels_beyond_the_video_are_refused_naming_the_first_row_outside(
    phase: PhaseTrack | None, tools: ToolTrack | None, frame_count: int, file: Path, row: str
) -> None:
    with pytest.raises(UserError) as caught:
        fit(phase, tools, frame_count)
    message = str(caught.value)
    assert message.startswith(f"{file}: {row}, beyond the {frame_count} frames (")
    assert "s at 25 fps) of video01.mp4: the rows, numbered at 25 fps, last " in message


def test_lists_that_disagree_by_more_than_a_row_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        fit(phase_track(800), tool_track(30), 800)
    assert str(caught.value) == (
        f"{PHASES}: row 751 (line 752) is frame 750, but video01-tool.txt ends with frame 725: more than the usual "
        "trailing row (25 frames) apart; correct or remove one of the two"
    )
    with pytest.raises(
        UserError, match=r"video01-tool.txt: row 31 \(line 32\) is frame 750, but video01-phase.txt ends"
    ):
        fit(phase_track(726), tool_track(32), 800)


@pytest.mark.parametrize(
    ("rows", "frame_count", "fps", "row_fps"),
    [
        (25_000, 30_000, 30.0, 25.0),
        (30_000, 25_000, 25.0, 30.0),
        (24_000, 25_000, 25.0, 24.0),
        (900, 22_500, 25.0, 1.0),
    ],
)
def test_rows_at_another_rate_than_the_video_are_refused_naming_both(
    rows: int, frame_count: int, fps: float, row_fps: float
) -> None:
    """Whether the data set's description knows the rows' rate or takes them for the video's."""
    for described in (row_fps, fps):
        with pytest.raises(UserError) as caught:
            fit(phase_track(rows), None, frame_count, fps, described)
        message = str(caught.value)
        assert message.startswith(f"{PHASES}: row {rows} (line {rows + 1}) is frame {rows - 1}: ")
        assert f"{row_fps:g} fps" in message
        assert f"{fps:g} fps" in message
        assert "renumber them by the video's frames" in message


def test_tool_rows_at_another_rate_than_the_video_are_refused_too() -> None:
    with pytest.raises(UserError, match=r"video01-tool\.txt: row 1000 .* runs at 30 fps .* numbered at 25 fps"):
        fit(None, tool_track(1000), 30_000, 30.0)


@pytest.mark.parametrize("rows", [30_000, 29_999, 30_001, 29_980])
def test_rows_that_count_the_frames_of_a_faster_video_are_taken_with_a_note(rows: int) -> None:
    phase, _, notes = fit(phase_track(rows), None, 30_000, 30.0)
    assert phase is not None
    assert len(phase.frame_index) == min(rows, 30_000)
    assert notes[0] == "video01-phase.txt: rows number the video's own frames at 30 fps, not at 25 fps"


def test_rows_that_fit_neither_rate_are_refused() -> None:
    with pytest.raises(UserError, match=r"28000.* runs at 30 fps .* fits neither; set annotation_fps"):
        fit(phase_track(28_001), None, 30_000, 30.0)


def test_ntsc_rates_are_their_whole_numbers() -> None:
    assert fit(phase_track(30_000), None, 30_000, 30_000 / 1001, 30.0)[2] == ()


def test_labels_that_start_late_or_end_early_are_noted() -> None:
    phase, _, notes = fit(phase_track(20, 25, first=100), None, 1000)
    assert phase is not None
    assert len(phase.frame_index) == 20
    assert notes == (
        "video01-phase.txt: starts late; the first 100 frames have no label",
        "video01-phase.txt: ends early; the last 400 frames (40.0%) have no label",
    )


def test_labels_wholly_outside_the_video_are_refused() -> None:
    with pytest.raises(UserError, match=r"video01-phase\.txt: .*beyond the 90 frames"):
        fit(phase_track(2, 25, first=100), None, 90)


@settings(deadline=None, max_examples=200)
@given(
    frame_count=st.integers(1, 400),
    phase_rows=st.integers(1, 450),
    tool_rows=st.integers(1, 30),
    phase_stride=st.sampled_from([1, 5, 25]),
)
def test_what_is_fitted_lies_inside_the_video_and_both_lists(
    frame_count: int, phase_rows: int, tool_rows: int, phase_stride: int
) -> None:
    phase, tools = phase_track(phase_rows, phase_stride), tool_track(tool_rows)
    try:
        fitted_phase, fitted_tools, _ = fit(phase, tools, frame_count)
    except UserError:
        ends = (frame_count, phase_rows * phase_stride, tool_rows * 25)
        assert max(ends) > min(ends), "nothing disagreed"
        return
    assert fitted_phase is not None
    assert fitted_tools is not None
    end = min(frame_count, phase_rows * phase_stride, tool_rows * 25)
    assert fitted_phase.frame_index.tolist() == [frame for frame in phase.frame_index if frame < end]
    assert fitted_tools.frame_index.tolist() == [frame for frame in tools.frame_index if frame < end]
    assert max(phase.frame_index[-1], tools.frame_index[-1]) < end + 25
