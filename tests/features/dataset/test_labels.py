"""Which labels frames get, and what happens if labels and video disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import DataConfig
from features.dataset.annotations import LabelTrack
from features.dataset.formats.cholec80 import read_phase_file, read_tool_file
from features.dataset.labels import Role, fit_tracks, sample_labels, unlabelled_note
from features.dataset.row_numbers import Extent, RowNumbering, infer_numberings

PHASES = Path("root/video01-phase.txt")
TOOLS = Path("root/video01-tool.txt")


def phase_track(rows: int, stride: int = 1, first: int = 0) -> LabelTrack:
    frames = first + stride * np.arange(rows, dtype=np.int64)
    return LabelTrack(frames, (np.arange(rows) % 7).astype(np.int8), stride)


def tool_track(rows: int, stride: int = 25, first: int = 0, tools: int = 7) -> LabelTrack:
    frames = first + stride * np.arange(rows, dtype=np.int64)
    return LabelTrack(frames, (np.arange(rows * tools).reshape(rows, tools) % 2).astype(np.int8), stride)


# ---------------------------------------------------------------------------------------------- rows to frames


def slow_labels(
    frames: list[int], phase: LabelTrack | None, tools: LabelTrack | None, between_rows: str, tool_count: int
) -> tuple[list[int], list[list[int]]]:
    """The rules written out: a row holds until the next, for at most a stride; a tool row may label only its own
    frame.
    """

    def row_at(frame: int, track: LabelTrack, hold: bool) -> int | None:
        before = [row for row, start in enumerate(track.frame_index.tolist()) if start <= frame]
        start = int(track.frame_index[before[-1]]) if before else frame + 1
        return before[-1] if start == frame or (hold and start < frame < start + track.stride) else None

    phase_labels, tool_labels = [], []
    for frame in frames:
        row = None if phase is None else row_at(frame, phase, hold=True)
        phase_labels.append(-1 if phase is None or row is None else int(phase.labels[row]))
        row = None if tools is None else row_at(frame, tools, hold=between_rows == "hold")
        tool_labels.append([-1] * tool_count if tools is None or row is None else tools.labels[row].tolist())
    return phase_labels, tool_labels


def with_gaps(track: LabelTrack, lost: set[int]) -> LabelTrack:
    """The track without some of its rows, but always with the first."""
    kept = [row for row in range(len(track.frame_index)) if row == 0 or row not in lost]
    return LabelTrack(track.frame_index[kept], track.labels[kept], track.stride)


GAPS = st.sets(st.integers(1, 30), max_size=12)


@settings(deadline=None, max_examples=200)
@given(
    phase=st.none()
    | st.builds(with_gaps, st.builds(phase_track, st.integers(1, 30), st.integers(1, 9), st.integers(0, 40)), GAPS),
    tools=st.none()
    | st.builds(
        with_gaps, st.builds(tool_track, st.integers(1, 30), st.integers(1, 9), st.integers(0, 40), st.just(4)), GAPS
    ),
    frames=st.builds(range, st.integers(0, 40), st.integers(0, 400), st.integers(1, 30)).map(list),
    between_rows=st.sampled_from(["mask", "hold"]),
)
def test_labels_are_what_the_obvious_restatement_gives(
    phase: LabelTrack | None, tools: LabelTrack | None, frames: list[int], between_rows: str
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
    phase: LabelTrack | None,
    tools: LabelTrack | None,
    frame_count: int,
    fps: float = 25.0,
    described: float = 25.0,
    stride: int = 1,
    **data: Any,
) -> tuple[LabelTrack | None, LabelTrack | None, tuple[str, ...]]:
    """The lists read, placed and fitted as `index` does it."""
    extent = Extent("video01.mp4", frame_count, fps, described, stride)
    lists = [(path, track) for path, track in ((PHASES, phase), (TOOLS, tools)) if track is not None]
    readings = infer_numberings(lists, extent, DataConfig(**data))
    placed: dict[Role, tuple[Path, LabelTrack]] = {
        "phase" if path is PHASES else "tool": (path, reading.place(path, track, extent))
        for (path, track), reading in zip(lists, readings, strict=True)
    }
    notes = [note for (path, _), reading in zip(lists, readings, strict=True) for note in reading.notes(path, extent)]
    fitted_phase, fitted_tools, fit_notes, _ = fit_tracks(placed, extent)
    return fitted_phase, fitted_tools, (*notes, *fit_notes)


def reading(track: LabelTrack, frame_count: int, fps: float, described: float, **data: Any) -> RowNumbering:
    extent = Extent("video01.mp4", frame_count, fps, described, stride=int(data.pop("stride", 1)))
    return infer_numberings([(PHASES, track)], extent, DataConfig(**data))[0]


def asked(track: LabelTrack, frame_count: int, fps: float, described: float, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        reading(track, frame_count, fps, described, **data)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_rate_close_to_the_videos_own_is_literal_if_only_that_fits() -> None:
    ntsc = 30000 / 1001
    with pytest.raises(UserError, match=r"set data\.row_fps if the numbers count something"):
        fit(phase_track(18_000), None, 17_982, ntsc)
    assert reading(phase_track(18_000), 17_982, ntsc, 25, row_fps=30) == RowNumbering(30)
    assert reading(phase_track(17_982), 17_982, ntsc, 25, row_fps=30) == RowNumbering()
    assert reading(phase_track(10_000), 17_982, ntsc, 25, row_fps=30) == RowNumbering()


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


def test_one_tool_row_beyond_the_video_allows_a_second_of_phase_rows() -> None:
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
    phase: LabelTrack | None, tools: LabelTrack | None, frame_count: int, file: Path, row: str
) -> None:
    with pytest.raises(UserError) as caught:
        fit(phase, tools, frame_count)
    message = str(caught.value)
    assert message.startswith(f"{file}: {row}, beyond the {frame_count} frames (")
    assert "s at 25 fps) of video01.mp4: by their numbers, the rows last " in message


def test_one_list_may_end_before_the_other() -> None:
    phase, tools, notes = fit(phase_track(800), tool_track(30), 800)
    assert phase is not None
    assert tools is not None
    assert (len(phase.frame_index), len(tools.frame_index)) == (800, 30)
    assert notes == ("video01-tool.txt: ends early; the last 50 frames (6.2%) have no label",)
    phase, tools, notes = fit(phase_track(700), tool_track(32), 800)
    assert phase is not None
    assert tools is not None
    assert (len(phase.frame_index), len(tools.frame_index)) == (700, 32)
    assert notes == ("video01-phase.txt: ends early; the last 100 frames (12.5%) have no label",)


@pytest.mark.parametrize(
    ("rows", "frame_count", "fps", "described", "wanted"),
    [
        (25_000, 30_000, 30.0, 25.0, 25.0),
        (30_000, 25_000, 25.0, 30.0, 30.0),
        (24_000, 25_000, 25.0, 24.0, 24.0),
        (900, 22_500, 25.0, 1.0, 1.0),
        (900, 22_500, 25.0, 25.0, 1.0),
        (901, 22_510, 25.0, 25.0, 1.0),
        (750, 22_500, 25.0, 1.0, 1.0),  # ends early
        (750, 22_500, 25.0, 25.0, 1.0),
        (300, 22_500, 25.0, 1.0, 1.0),  # as the description says
        (30_000, 30_000, 30.0, 25.0, None),
        (29_980, 30_000, 30.0, 25.0, None),
        (30_001, 30_000, 30.0, 25.0, None),
        (27_000, 30_000, 30.0, 25.0, None),  # ends early; at 25 fps it would continue for 80 s after the end
        (54_000, 60_000, 50.0, 25.0, None),
        (20_000, 25_000, 25.0, 25.0, None),
        (1_000, 25_000, 25.02, 25.0, 1.0),
        (30_000, 30_000, 30_000 / 1001, 30.0, None),
        (1_001, 30_000, 30_000 / 1001, 30.0, 1.0),
        (1, 1, 25.0, 25.0, None),
        (3, 3, 25.0, 25.0, None),
        (50, 50, 25.0, 25.0, None),
    ],
)
def test_what_rows_count_follows_from_the_lengths(
    rows: int, frame_count: int, fps: float, described: float, wanted: float | None
) -> None:
    assert reading(phase_track(rows), frame_count, fps, described) == RowNumbering(wanted)


def test_rows_may_number_a_folders_images() -> None:
    assert reading(phase_track(180), 180 * 5, 25, 25, stride=5) == RowNumbering(5.0)
    assert reading(phase_track(180 * 5), 180 * 5, 25, 25, stride=5) == RowNumbering()
    assert reading(phase_track(36), 180 * 5, 25, 25, stride=5) == RowNumbering(1.0)
    assert "set data.row_fps" in asked(phase_track(90), 180 * 25, 25, 25, stride=25)
    assert reading(phase_track(90), 180 * 25, 25, 25, stride=25, folder_fps=1) == RowNumbering(1.0)


@pytest.mark.parametrize(
    ("rows", "frame_count", "fps", "described", "wanted"),
    [
        (22_000, 30_000, 30.0, 25.0, "25 (covers 88%) or source (covers 73%)"),
        (450, 22_500, 25.0, 25.0, "1 (covers 50%) or source (covers 2%)"),
        (30_000, 25_000, 25.0, 25.0, "as if at 30 fps, but video01.mp4 runs at 25 fps"),
        (24_000, 25_000, 25.0, 25.0, "set data.row_fps=24, or data.row_fps=source"),
    ],
)
def test_ambiguous_lengths_are_asked_about_and_settings_answer(
    rows: int, frame_count: int, fps: float, described: float, wanted: str
) -> None:
    message = asked(phase_track(rows), frame_count, fps, described)
    assert wanted in message
    assert "set data.row_fps" in message
    assert reading(phase_track(rows), frame_count, fps, described, row_fps="source") == RowNumbering()
    assert reading(phase_track(rows), frame_count, fps, described, row_fps=20) == RowNumbering(20.0)
    assert reading(phase_track(rows), frame_count, fps, described, row_fps=fps * 1.001) == RowNumbering()


def test_the_lists_of_a_video_may_count_different_things() -> None:
    extent = Extent("video01.mp4", 30_000, 30.0, 25.0)
    lists: list = [(PHASES, phase_track(30_000)), (TOOLS, tool_track(1000, 1))]
    assert infer_numberings(lists, extent, DataConfig()) == [RowNumbering(), RowNumbering(1.0)]
    assert infer_numberings(lists[::-1], extent, DataConfig()) == [RowNumbering(1.0), RowNumbering()]


@pytest.mark.parametrize(
    ("track", "frame_count", "wanted"),
    [
        (phase_track(350, first=1), 350, RowNumbering(None, 1)),
        (phase_track(351, first=1), 350, RowNumbering(None, 1)),
        (phase_track(28, first=1), 700, RowNumbering(1.0, 1)),
        (phase_track(28, first=1), 710, RowNumbering(1.0, 1)),
        (phase_track(29, first=1), 710, RowNumbering(1.0, 1)),
        (tool_track(13, first=1), 350, RowNumbering(None, 1)),
        (phase_track(250, first=100), 350, RowNumbering(None, 0)),
    ],
)
def test_rows_may_be_numbered_from_one(track: LabelTrack, frame_count: int, wanted: RowNumbering) -> None:
    assert reading(track, frame_count, 25, 25) == wanted
    extent = Extent("video01.mp4", frame_count, 25, 25)
    placed = wanted.place(PHASES, track, extent)
    assert int(placed.frame_index[0]) == (0 if wanted.base else 100)


def test_an_ambiguous_first_number_is_asked_about() -> None:
    for rows in (349, 300):
        message = asked(phase_track(rows, first=1), 350, 25, 25)
        assert message.startswith(
            f"{PHASES}: row 1 (line 2) is number 1, and the last row is number {rows} of 350 in video01.mp4"
        )
        assert message.endswith(
            "set data.row_base=1 if rows are numbered from 1, or data.row_base=0 if row 0 is missing"
        )
        for base in (0, 1):
            assert reading(phase_track(rows, first=1), 350, 25, 25, row_base=base) == RowNumbering(None, base)
    for first in (25, 13):
        assert f"starts at {first}, not at 0 or 1" in asked(tool_track(14, first=first), 350, 25, 25)
        assert reading(tool_track(14, first=first), 350, 25, 25, row_base=0) == RowNumbering()
    with pytest.raises(UserError, match=r"is number 0, before data\.row_base=1; set data\.row_base=0"):
        fit(phase_track(350), None, 350, row_base=1)
    phase, _, _ = fit(phase_track(349, first=1), tool_track(14), 350)  # the tool list is numbered from 0
    assert phase is not None
    assert phase.frame_index[0] == 1


@settings(deadline=None, max_examples=80)
@given(
    frame_count=st.integers(1, 400),
    fps=st.sampled_from([24.0, 25.0, 30_000 / 1001, 30.0, 50.0]),
    row_fps=st.sampled_from([1.0, 2.0, 24.0, 25.0, 30.0, 60.0]),
    rows=st.integers(1, 400),
    stride=st.sampled_from([1, 2, 25]),
    base=st.integers(0, 1),
    lost=GAPS,
    constant=st.booleans(),
)
def test_rows_at_any_rate_label_the_frames_on_screen_at_their_times(
    frame_count: int, fps: float, row_fps: float, rows: int, stride: int, base: int, lost: set[int], constant: bool
) -> None:
    """By brute force: a row's frame is the last one shown by its time, and it holds for less than a stride's time."""
    steps_s = np.where(np.arange(frame_count) % 7 == 3, 3, 1) / fps
    times_s = np.arange(frame_count) / fps if constant else np.concatenate([[0], np.cumsum(steps_s)[:-1]])
    extent = Extent("video01.mp4", frame_count, fps, fps, times_s=None if constant else times_s)
    track = with_gaps(phase_track(rows, stride, base), lost)
    placed = RowNumbering(row_fps, base).place(PHASES, track, extent)  # type: ignore[arg-type]
    labels, _ = sample_labels(range(frame_count), placed, None, "mask", 0)
    for frame in range(0, frame_count, 3):
        shown_s = (times_s[frame] - 1e-6, (times_s[frame + 1] if frame + 1 < frame_count else times_s[-1] + 1 / fps))
        starts_s = [(number - base) / row_fps for number in track.frame_index.tolist()]
        on_screen = [row for row, start_s in enumerate(starts_s) if shown_s[0] <= start_s < shown_s[1] - 1e-6]
        before = [row for row, start_s in enumerate(starts_s) if start_s < shown_s[0]]
        if on_screen:
            assert labels[frame] == track.labels[on_screen[0]]
        elif before and constant:
            held = shown_s[0] < starts_s[before[-1]] + stride / row_fps - 1 / fps
            gone = shown_s[0] > starts_s[before[-1]] + stride / row_fps + 1 / fps
            assert labels[frame] == track.labels[before[-1]] or not held
            assert labels[frame] == -1 or not gone
        elif not before:
            assert labels[frame] == -1


def test_rows_in_seconds_label_the_frames_sampled_at_1_fps_at_any_rate() -> None:
    for fps, frame_count in ((25.0, 2500), (30_000 / 1001, 2997), (50.0, 5000)):
        phase, tools, notes = fit(phase_track(100), tool_track(100, 1), frame_count, fps)
        sampled = np.floor(np.arange(100) * fps + 1e-6).astype(int)
        phase_labels, tool_labels = sample_labels(sampled, phase, tools, "mask", 7)
        assert phase_labels.tolist() == phase_track(100).labels.tolist()
        assert tool_labels.tolist() == tool_track(100, 1).labels.tolist()
        assert notes[:2] == tuple(f"{path.name}: rows are numbered at 1 fps" for path in (PHASES, TOOLS))


def test_numbers_beyond_any_video_are_refused_at_any_rate() -> None:
    track = LabelTrack(np.array([0, 1, 10**15 - 1]), np.zeros(3, dtype=np.int8), 1)
    for row_fps in ("auto", "source", 0.001, 1, 10_000):
        with pytest.raises(UserError, match="beyond the 350 frames"):
            fit(track, None, 350, row_fps=row_fps)


def test_missing_rows_are_noted() -> None:
    phase, _, notes = fit(with_gaps(phase_track(350), set(range(150, 200)) | {300}), None, 350)  # type: ignore[arg-type]
    assert notes == ("video01-phase.txt: rows are missing, first from frame 150; 51 frames without a label",)
    labels, _ = sample_labels(range(350), phase, None, "mask", 0)
    assert np.flatnonzero(labels < 0).tolist() == [*range(150, 200), 300]


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
        fitted_phase, fitted_tools, _ = fit(phase, tools, frame_count, row_fps="source")
    except UserError:
        assert max(phase.frame_index[-1], tools.frame_index[-1]) >= frame_count + 25, "no track continues after the end"
        return
    assert fitted_phase is not None
    assert fitted_tools is not None
    end = min(frame_count, phase_rows * phase_stride, tool_rows * 25)
    if max(phase.frame_index[-1], tools.frame_index[-1]) >= end + 25:
        end = frame_count
    assert fitted_phase.frame_index.tolist() == [frame for frame in phase.frame_index if frame < end]
    assert fitted_tools.frame_index.tolist() == [frame for frame in tools.frame_index if frame < end]


def test_frames_without_a_phase_are_reported() -> None:
    phases = {f"video{n}": np.array([0, 1, -1 if n != 2 else 1]) for n in range(6)}
    assert unlabelled_note(phases, "are not scored") == [
        "note: 5 of 18 frames have no phase label (video0, video1, video3 and 2 more) and are not scored"
    ]
    assert unlabelled_note({"video2": phases["video2"]}, "are not scored") == []
