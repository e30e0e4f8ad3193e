"""For videos of any program: frame k has number k and its own time, or the video is refused at every rate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from features.dataset.index import VideoEntry
from features.dataset.sampling import frame_times_s, sampled_frames
from features.video.base import ReaderError
from features.video.open import open_video
from features.video.scan import probe_video
from features.video.write import encode_mp4
from tests import videos
from tests.videos import VideoSpec, frame_number, write_video

COUNT, START = 40, 5
CODECS = {"libx264": {"preset": "ultrafast", "x264-params": "b-adapt=0"}, "mpeg4": {}, "mpeg2video": {}, "libx265": {}}
PAUSED_S = tuple(0.04 * k + 0.5 * (k >= 17) + 0.02 * (k >= 29) for k in range(COUNT))
SIZES = {"width_px": 96, "height_px": 64, "gop": 12}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("encoded")

    @functools.cache
    def written(codec: str, b_frames: int, container: str, paused: bool, first: int = 0) -> Path:
        options = {"x265-params": f"log-level=none:bframes={b_frames}"} if codec == "libx265" else CODECS[codec]

        def paint(number: int, width_px: int, height_px: int) -> np.ndarray:
            return videos.painted_frame(number + first, width_px, height_px)

        spec = VideoSpec(
            count=COUNT,
            codec=codec,
            b_frames=b_frames,
            times_s=PAUSED_S if paused else None,
            codec_options=options,
            paint=paint,
            **SIZES,
        )
        return write_video(folder / f"{codec}{b_frames}{paused}{first}.{container}", spec)

    return written


def read_all(path: Path) -> tuple[list[int], list[float]]:
    """Numbers and times of all frames, after checking that every rate gives the same; ReaderError where all refuse."""
    info = probe_video(path)
    entry = VideoEntry(
        id="video",
        kind="video",
        source=path.name,
        size_bytes=1,
        modified_ns=0,
        sha256_ends="0" * 64,
        fps=info.fps,
        frame_count=info.frame_count,
        split="none",
        times=info.times,
    )
    taken = [sampled_frames(entry, rate) for rate in (25.0, 12.5, 7.3, 1.0) if rate <= entry.most_fps * 1.004]
    taken.insert(0, np.arange(info.frame_count))
    found: list[list[int]] = []
    refused: list[ReaderError] = []
    for frames in taken:
        try:
            with open_video(path, "auto") as reader:
                assert (reader.frame_count, reader.times) == (info.frame_count, info.times)
                found.append([frame_number(rgb) for rgb in reader.read(frames.tolist())])
        except ReaderError as error:
            refused.append(error)
    if refused:
        assert not found, f"refused at one rate and read at another: {refused[0]}"
        raise refused[0]
    for frames, numbers in zip(taken, found, strict=True):
        assert numbers == [found[0][k] for k in frames.tolist()]
    return found[0], frame_times_s(entry, taken[0]).tolist()


FORMS = ("as it is", "copied", "decoding times", "without start", "cat", "joined", "paused", "paused, decoding times")


@pytest.mark.slow
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    codec=st.sampled_from(list(CODECS)),
    b_frames=st.sampled_from([0, 2]),
    container=st.sampled_from(["mp4", "mkv", "avi", "ts", "mov"]),
    form=st.sampled_from(FORMS),
)
def test_frame_k_carries_number_k_and_its_time(
    encoded: Callable[..., Path], tmp_path_factory, codec: str, b_frames: int, container: str, form: str
) -> None:
    assume((codec, container) != ("libx265", "avi"))
    paused = form.startswith("paused") and container != "avi" and codec != "mpeg2video"
    source = encoded(codec, b_frames, container, paused)
    target = tmp_path_factory.mktemp("form") / f"video.{container}"
    numbers, times_s = list(range(COUNT)), list(PAUSED_S if paused else np.arange(COUNT) / 25)
    may_be_refused = False
    if form == "copied":
        videos.rewrite(source, target, lambda packets: packets)
    elif form.endswith("decoding times") and container != "avi":  # which holds no others
        videos.rewrite(source, target, videos.decoding_times)
        may_be_refused = paused and b_frames > 0
    elif form == "without start":
        videos.rewrite(source, target, videos.without_start)
        numbers = numbers[12:]  # the next group of pictures
        times_s = times_s[: len(numbers)]
        may_be_refused = container == "avi" or (codec, container) == ("mpeg2video", "mov")
    elif form == "cat":
        other = encoded(codec, b_frames, container, False, COUNT)
        target.write_bytes(source.read_bytes() + other.read_bytes())
        may_be_refused = True  # in some containers FFmpeg continues with the second part, in others it ignores it
        numbers, times_s = [*numbers, *range(COUNT, 2 * COUNT)], list(np.arange(2 * COUNT) / 25)
        if container not in {"ts", "avi"}:
            numbers, times_s = numbers[:COUNT], times_s[:COUNT]
    elif form == "joined":
        videos.repeat_video(source, target, 2) if container == "mp4" else target.write_bytes(source.read_bytes())
        if container == "mp4":
            numbers, times_s = numbers * 2, list(np.arange(2 * COUNT) / 25)
    else:
        target.write_bytes(source.read_bytes())
    refusal = None
    try:
        got, got_s = read_all(target)
    except ReaderError as error:
        refusal = str(error)
    if refusal is not None:
        assert may_be_refused, refusal
        assert refusal.startswith(f"{target}: ")
        assert "\n" not in refusal
        return
    assert got == numbers
    assert got_s == pytest.approx(times_s, abs=0.0011)


def test_decoding_times_in_place_of_presentation_times_are_detected(tmp_path: Path) -> None:
    source = write_video(tmp_path / "source.mp4", VideoSpec(count=60))
    path = videos.rewrite(source, tmp_path / "copy.mp4", videos.decoding_times)
    info = probe_video(path)
    assert [note for note in info.notes if "time stamps are not the times of the frames" in note]
    assert read_all(path) == (list(range(60)), pytest.approx([k / 25 for k in range(60)]))
    with pytest.raises(ReaderError, match="decord does not return the right frames"):
        open_video(path, "decord")


def test_empty_chunks_show_the_previous_frame_again(tmp_path: Path) -> None:
    source = write_video(tmp_path / "source.avi", VideoSpec(count=30, codec="mpeg4", b_frames=0))
    path = videos.with_empty_chunks(source, tmp_path / "lost.avi", [9, 10, 20, 29])
    numbers = [k for k in range(30) for _ in range(2 if k in (9, 10, 20, 29) else 1)]
    assert read_all(path) == (numbers, pytest.approx([k / 25 for k in range(34)]))
    with open_video(path, "auto") as reader:
        assert [frame_number(rgb) for rgb in reader.read([10, 11, 33])] == [9, 10, 29]


def test_one_missing_last_frame_is_tolerated_and_more_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.avi", VideoSpec(count=30, codec="mpeg4", b_frames=0))
    content = bytearray(path.read_bytes())
    place = content.index(b"strh") + 8 + 32
    for promised, count in ((31, 30), (29, 30), (20, 30)):
        content[place : place + 4] = promised.to_bytes(4, "little")
        path.write_bytes(bytes(content))
        assert probe_video(path).frame_count == count
        assert read_all(path)[0] == list(range(count))
    content[place : place + 4] = (33).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    with pytest.raises(ReaderError, match="contains only 30 of the 33 frames that its header claims"):
        probe_video(path)


def test_joined_parts_are_refused_naming_the_frame_where_they_meet(tmp_path: Path) -> None:
    part = write_video(tmp_path / "part.ts", VideoSpec(count=60)).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(part + part)
    with pytest.raises(ReaderError, match=r"joined\.ts: has parts joined at frame 60, where its clock goes back"):
        probe_video(path)


def test_a_recording_begins_with_the_first_frame_that_can_be_shown(tmp_path: Path) -> None:
    source = write_video(tmp_path / "source.mkv", VideoSpec(count=60, gop=20))
    path = videos.rewrite(source, tmp_path / "late.mkv", videos.without_start)
    assert probe_video(path).notes == (
        "late.mkv: begins within a group of pictures; 15 cannot be shown; frame 0 is the next",
    )
    assert read_all(path) == (list(range(20, 60)), pytest.approx([k / 25 for k in range(40)]))


def test_a_video_drawn_at_varying_times_keeps_them(tmp_path: Path) -> None:
    times_s = [0.0, 0.04, 0.08, 1.0, 1.04, 3.5]
    painted = (videos.painted_frame(k) for k in range(6))
    encode_mp4(tmp_path / "drawn.mp4", painted, 25.0, {"preset": "veryfast"}, lambda: None, times_s)
    assert read_all(tmp_path / "drawn.mp4") == (list(range(6)), pytest.approx(times_s, abs=1e-4))


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_a_wrong_rate_in_the_container_is_not_used(tmp_path: Path, container: str) -> None:
    times_s = [k / 20 for k in range(60)]
    path = write_video(tmp_path / f"twenty.{container}", VideoSpec(count=60, times_s=times_s))  # the encoder says 25
    assert read_all(path) == (list(range(60)), pytest.approx(times_s, abs=0.0011))
    assert probe_video(path).fps == pytest.approx(20, rel=0.01)


def test_an_empty_frame_of_an_mp4_file_is_not_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "empty.mp4", VideoSpec(count=30, b_frames=0))
    content = bytearray(path.read_bytes())
    sizes = content.index(b"stsz") + 16
    content[sizes + 4 * 29 : sizes + 4 * 30] = bytes(4)
    path.write_bytes(bytes(content))
    assert read_all(path) == (list(range(29)), pytest.approx([k / 25 for k in range(29)]))
