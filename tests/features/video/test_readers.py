"""Frame k is the right frame in every kind of container, with both readers, or an error names file and frame."""

from __future__ import annotations

import functools
import importlib.util
import struct
import subprocess
import sys
import textwrap
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from features.video import container, images
from features.video.base import ReaderError
from features.video.decord import DecordReader, why_not_decord
from features.video.images import FolderReader
from features.video.open import open_video, require_same_pixels
from features.video.pyav import PyavReader
from features.video.scan import count_packets, probe_video, scan_video
from tests import videos
from tests.videos import VideoSpec, decode_everything, frame_number, write_video

needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed here")
PROJECT = Path(__file__).resolve().parents[3]

FASTSTART = {"movflags": "faststart"}
PYRAMID = {"x264-params": "bframes=7:b-pyramid=normal:b-adapt=0:ref=5"}

# Videos for which decord returns PyAV's bytes, and is accepted.
EQUAL = {
    "b_frames.mp4": VideoSpec(),
    "b_frames.mkv": VideoSpec(),
    "b_frames.mov": VideoSpec(),
    "no_b_frames.mp4": VideoSpec(b_frames=0),
    "pyramid.mp4": VideoSpec(gop=48, b_frames=7, codec_options=PYRAMID),
    "one_group.mp4": VideoSpec(gop=1000),
    "variable_rate.mp4": videos.variable_rate(),
    "variable_rate.mkv": videos.variable_rate(),
    "late_start.mp4": VideoSpec(start_s=3.2),
    "late_start.mkv": VideoSpec(start_s=3.2),
    "fragments.mp4": VideoSpec(container_options={"movflags": "frag_keyframe+empty_moov"}),
    "ntsc.mp4": VideoSpec(fps=Fraction(30000, 1001)),
    "even_not_by_four.mp4": VideoSpec(width_px=98, height_px=66),
    "with_sound.mp4": VideoSpec(with_audio=True),
    "full_range.mp4": VideoSpec(color_range=2),
}
# Videos that older releases of PyAV round differently: the comparison of the first frame decides.
EITHER = {"bt709.mp4": VideoSpec(colorspace=1, color_range=1)}
# Videos for which decord returns other frames or other bytes, and must be refused.
DIFFERENT = {
    "open_gop.mp4": videos.open_gop(),
    "open_gop.mkv": videos.open_gop(),
    "open_gop.ts": videos.open_gop(),
    "b_frames.ts": VideoSpec(),
    "b_frames.avi": VideoSpec(),
    "mpeg4.avi": VideoSpec(codec="mpeg4", b_frames=2),
    "mpeg4.mp4": VideoSpec(codec="mpeg4", b_frames=2),
    "mpeg2.ts": VideoSpec(codec="mpeg2video", b_frames=2),
    "odd_size.mp4": VideoSpec(width_px=95, height_px=63, pix_fmt="yuv444p"),
    "odd_size.mkv": VideoSpec(width_px=95, height_px=63, codec="mpeg4", b_frames=2),
    "ten_bit.mp4": VideoSpec(pix_fmt="yuv420p10le"),
    "interlaced.mp4": VideoSpec(codec_options={"x264-params": "tff=1"}),
    "intra_refresh.mp4": VideoSpec(b_frames=0, codec_options={"x264-params": "intra-refresh=1"}),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Write a named video of the tables above once and decode all of it: (path, frames)."""
    folder = tmp_path_factory.mktemp("videos")

    @functools.cache
    def written(name: str) -> tuple[Path, list[np.ndarray]]:
        path = write_video(folder / name, {**EQUAL, **EITHER, **DIFFERENT}[name])
        return path, decode_everything(path)

    return written


def read(path: Path, frame_index, reader: str = "auto", **options) -> tuple[str, list[np.ndarray]]:
    """The name of the reader, and the frames."""
    with open_video(path, reader, **options) as source:
        return source.name, list(source.read(frame_index))


def assert_same(got: list[np.ndarray], truth: list[np.ndarray], frame_index) -> None:
    assert len(got) == len(frame_index)
    for k, frame in zip(frame_index, got, strict=True):
        assert frame.dtype == np.uint8
        assert frame.flags.c_contiguous
        assert np.array_equal(frame, truth[k]), f"frame {k}"


def some_indices(count: int) -> list[list[int]]:
    scattered = np.random.default_rng(count).choice(count, size=9, replace=False)
    return [list(range(count)), list(range(0, count, 7)), sorted(scattered.tolist()), [count - 1], []]


# ------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("name", [*EQUAL, *EITHER, *DIFFERENT])
def test_frame_k_is_frame_k(make, name):
    path, truth = make(name)
    assert [frame_number(frame) for frame in truth] == list(range(60))
    assert probe_video(path).frame_count == count_packets(path) == 60
    for frame_index in some_indices(60):
        name_used, got = read(path, frame_index, "pyav")
        assert name_used == "pyav"
        assert_same(got, truth, frame_index)
    assert_same(read(path, range(0, 60, 9), "auto")[1], truth, range(0, 60, 9))


@needs_decord
@pytest.mark.parametrize("name", EQUAL)
def test_decord_is_accepted_where_it_gives_the_same_bytes(make, name):
    path, truth = make(name)
    for frame_index in some_indices(60):
        for reader, taken in (("auto", "pyav"), ("decord", "decord")):
            name_used, got = read(path, frame_index, reader)
            assert name_used == taken
            assert_same(got, truth, frame_index)


@pytest.mark.parametrize("name", DIFFERENT)
def test_decord_is_refused_where_it_differs(make, name):
    path, truth = make(name)
    name_used, got = read(path, range(0, 60, 3))
    assert name_used == "pyav"
    assert_same(got, truth, range(0, 60, 3))
    with pytest.raises(ReaderError, match=f"{name}: decord does not return the right frames"):
        read(path, [0], "decord")


@pytest.mark.parametrize("reader", ["pyav", pytest.param("decord", marks=needs_decord)])
@pytest.mark.parametrize(("degrees", "turns"), [(90, 3), (180, 2), (270, 1)])
def test_rotation_is_applied_as_players_do(tmp_path, reader, degrees, turns):
    path = videos.set_rotation(write_video(tmp_path / "phone.mp4", VideoSpec(count=10)), degrees)
    name_used, got = read(path, range(10), reader)
    assert name_used == reader
    assert_same(got, [np.rot90(frame, turns) for frame in decode_everything(path)], range(10))
    assert [frame_number(np.rot90(frame, -turns)) for frame in got] == list(range(10))


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path):
    path = videos.hide_frames(write_video(tmp_path / "cut.mp4"), first=18, duration_s=1.0)
    assert probe_video(path).frame_count == count_packets(path) == 25
    name_used, got = read(path, range(25))
    assert name_used == "pyav"
    assert [frame_number(frame) for frame in got] == list(range(18, 43))
    with pytest.raises(ReaderError, match=r"cut\.mp4: decord .* edit list"):
        read(path, [0], "decord")


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(["pyramid.mp4", "open_gop.mp4", "open_gop.ts", "intra_refresh.mp4", "variable_rate.mkv"]),
    wanted=st.sets(st.integers(0, 59), min_size=1, max_size=12),
)
def test_leaving_frames_undecoded_changes_no_byte(make, name, wanted):
    path, truth = make(name)
    assert scan_video(path).numbered  # selective decoding is tested
    assert_same(read(path, sorted(wanted), "pyav")[1], truth, sorted(wanted))


@pytest.mark.parametrize("reader", ["pyav", pytest.param("decord", marks=needs_decord)])
def test_real_clips_are_read_exactly(shared_data, reader):
    path = sorted((shared_data / "clips" / "videos").glob("*.mp4"))[0]
    truth = decode_everything_lightly(path, 300)
    for frame_index in (range(0, 300, 25), range(240, 262)):
        _, got = read(path, frame_index, reader)
        assert [checksum(frame) for frame in got] == [truth[k] for k in frame_index]


def decode_everything_lightly(path: Path, count: int) -> list[int]:
    import av

    with av.open(str(path)) as container:
        decoded = container.decode(video=0)
        return [checksum(next(decoded).to_ndarray(format="rgb24")) for _ in range(count)]


def checksum(frame: np.ndarray) -> int:
    return zlib.crc32(frame.tobytes())


def test_two_readings_at_once_do_not_disturb_each_other(make):
    path, truth = make("b_frames.mp4")
    with open_video(path, "pyav") as source:
        pairs = list(zip(source.read(range(30)), source.read(range(30, 60)), strict=True))
    assert_same([a for a, _ in pairs], truth, range(30))
    assert_same([b for _, b in pairs], truth, range(30, 60))


# ------------------------------------------------------------------------------------------ seeking

SHORT_GROUPS = {
    f"gop_{gop}_{b}.{kind}": VideoSpec(gop=gop, b_frames=b)
    for gop, b, kind in [(1, 0, "mp4"), (2, 1, "mp4"), (3, 2, "mkv"), (5, 3, "mov"), (250, 3, "mp4")]
}


@pytest.mark.parametrize("name", [*EQUAL, *DIFFERENT, *SHORT_GROUPS])
def test_reading_from_the_middle_gives_the_same_frames(make, name, tmp_path):
    """From every start: a seek that lands elsewhere than the scan says would give other frames."""
    if name in SHORT_GROUPS:
        path = write_video(tmp_path / name, SHORT_GROUPS[name])
        truth = decode_everything(path)
    else:
        path, truth = make(name)
    with open_video(path, "pyav") as source:
        for first in range(0, 60, 3):
            assert_same(list(source.read(range(first, 60, 5))), truth, range(first, 60, 5))


class Seeking:
    """An open container that counts its seeks and lands `error` ticks away."""

    def __init__(self, opened, error: int) -> None:
        self._opened, self._error, self.seeks = opened, error, 0

    def __getattr__(self, name: str):
        return getattr(self._opened, name)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._opened.close()

    def seek(self, time_stamp: int, **options) -> None:
        self.seeks += 1
        self._opened.seek(time_stamp + self._error, **options)


@pytest.mark.parametrize("name", ["b_frames.mp4", "b_frames.mkv", "late_start.mp4"])
def test_reading_from_the_middle_seeks_and_verifies_where_the_seek_lands(make, name):
    path, truth = make(name)
    scan = scan_video(path)
    for error, openings in ((0, [1]), (10**7, [1, 1, 0])):  # the last one reads from the start
        opened = []

        def opener(path, hardware, error=error, opened=opened):
            opened.append(Seeking(container.open_container(path, hardware), error))
            return opened[-1]

        with PyavReader(scan, opener=opener) as source:
            assert_same(list(source.read([40, 58])), truth, [40, 58])
        assert [one.seeks for one in opened] == openings


# ------------------------------------------------------------------------------------------ requests


def test_requests_are_checked_before_anything_is_decoded(make):
    path, _ = make("b_frames.mp4")
    with open_video(path, "auto") as source:
        for wrong in ([3, 2], [4, 4], [-1, 0]):
            with pytest.raises(ValueError, match="strictly increasing"):
                source.read(wrong)
        with pytest.raises(ReaderError, match=r"b_frames\.mp4: has 60 frames, so frame 60 cannot be read"):
            source.read([0, 60, 61])


def test_a_reader_has_name_version_and_frame_count(make):
    path, _ = make("b_frames.mp4")
    with open_video(path, "pyav") as source:
        assert (source.name, source.frame_count) == ("pyav", 60)
        assert source.version[0].isdigit()
        assert source.spread(4) == [0, 20, 39, 59]
        assert source.spread(1000) == list(range(60))


def test_probe_reads_the_container(make):
    info = probe_video(make("ntsc.mp4")[0])
    assert (info.fps, info.frame_count) == (30000 / 1001, 60)
    assert probe_video(make("b_frames.mkv")[0]).fps == 25.0


def test_decord_missing_is_no_obstacle(make, monkeypatch):
    path, truth = make("b_frames.mp4")
    monkeypatch.setitem(sys.modules, "decord", None)
    name_used, got = read(path, [5])
    assert name_used == "pyav"
    assert_same(got, truth, [5])
    with pytest.raises(ReaderError, match="decord is not installed"):
        read(path, [5], "decord")


@needs_decord
def test_a_first_frame_that_differs_rules_decord_out(make, monkeypatch):
    path, _ = make("b_frames.mp4")
    monkeypatch.setattr(DecordReader, "decode", lambda self, batch: np.zeros((1, 64, 96, 3), np.uint8))
    with pytest.raises(ReaderError, match=r"its first frame differs from PyAV's"):
        read(path, [0], "decord")


# ------------------------------------------------------------------------------------------ bad videos


@pytest.mark.parametrize("share", [0.3, 0.62, 0.97])
@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.avi"])
def test_cut_short_video_names_the_first_frame_that_cannot_be_read(tmp_path, name, share):
    path = videos.truncate(write_video(tmp_path / name, VideoSpec(container_options=FASTSTART)), share)
    for reader in ("auto", "pyav", "decord"):
        with pytest.raises(ReaderError, match="cut short; frame ") as caught:
            read(path, [0], reader)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert "re-encode the video or leave it out" in message
    first_missing = int(message.split("frame ")[1].split(" ")[0])
    assert count_packets(path) - 8 <= first_missing <= count_packets(path) < 60
    with pytest.raises(ReaderError, match="cut short"):
        probe_video(path)
    if name != "cut.avi":  # H.264 in AVI has no presentation times
        assert [frame_number(frame) for frame in first_decodable(path, first_missing)] == list(range(first_missing))


def first_decodable(path: Path, count: int) -> list[np.ndarray]:
    import av

    got = []
    with av.open(str(path)) as container:
        for av_frame in container.decode(video=0):
            got.append(av_frame.to_ndarray(format="rgb24"))
            if len(got) == count:
                break
    return got


def test_frames_that_the_header_counts_but_the_file_lacks_are_detected(make, tmp_path):
    path = tmp_path / "dropped.avi"
    content = bytearray(make("mpeg4.avi")[0].read_bytes())
    length = content.index(b"strh") + 8 + 32
    assert struct.unpack_from("<I", content, length) == (60,)
    struct.pack_into("<I", content, length, 63)
    path.write_bytes(bytes(content))
    assert count_packets(path) == 60
    with pytest.raises(ReaderError, match=r"dropped\.avi: contains only 60 of the 63 frames that its header claims"):
        read(path, [0])


def test_a_file_cut_between_two_frames_is_detected(tmp_path):
    path = write_video(tmp_path / "cut.mp4", VideoSpec(container_options=FASTSTART))
    offset, size = videos.packet_spans(path)[30]
    path.write_bytes(path.read_bytes()[: offset + size])
    with pytest.raises(ReaderError, match="cut short"):
        read(path, [0])


def not_videos() -> dict[str, bytes]:
    return {
        "empty.mp4": b"",
        "text.mp4": b"Frame\tPhase\n0\tPreparation\n" * 50,
        "noise.mkv": np.random.default_rng(0).bytes(5000),
        "zeros.avi": bytes(100_000),
    }


@pytest.mark.parametrize("name", not_videos())
@pytest.mark.parametrize("reader", ["auto", "pyav", "decord"])
def test_a_file_that_is_not_a_video_is_refused_in_one_line(tmp_path, capfd, name, reader):
    path = tmp_path / name
    path.write_bytes(not_videos()[name])
    for attempt in (lambda: read(path, [0], reader), lambda: probe_video(path), lambda: count_packets(path)):
        with pytest.raises(ReaderError) as caught:
            attempt()
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_images_audio_missing_files_and_folders_are_not_videos(tmp_path):
    image = tmp_path / "image.mp4"
    Image.new("RGB", (64, 48)).save(image, format="PNG")
    sound = tmp_path / "sound.mp4"
    write_audio(sound)
    headless = videos.truncate(write_video(tmp_path / "headless.mp4"), 0.5)
    for path, what in (
        (image, "an image"),
        (sound, "no video stream"),
        (headless, "no moov box"),
        (tmp_path / "missing.mp4", "no such file; restore it, or run `index --force`"),
        (tmp_path, "not a video"),
    ):
        with pytest.raises(ReaderError, match=what) as caught:
            probe_video(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_odd_names_and_titles_are_no_obstacle(make, tmp_path):
    source, truth = make("b_frames.mkv")
    path = tmp_path / "concat:a%d é.mkv"
    content = source.read_bytes().replace(b"Lavf", b"L\xe9vf")  # the writing program's name, not in UTF-8
    assert content != source.read_bytes()
    path.write_bytes(content)
    for reader in ("pyav", "auto"):
        assert_same(read(path, [0, 30], reader)[1], truth, [0, 30])


def write_audio(path: Path) -> None:
    import av

    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def test_frame_size_has_a_limit(make, monkeypatch):
    monkeypatch.setattr(container, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(ReaderError, match=r"b_frames\.mp4: its frames are too large to decode \(96 x 64 pixels\)"):
        probe_video(make("b_frames.mp4")[0])


# Large and detailed enough that an overwritten frame cannot pass for an intact one.
SOUND = {
    "b_frames.mp4": VideoSpec(width_px=320, height_px=240, codec_options={"crf": "12"}),
    "b_frames.mkv": VideoSpec(width_px=320, height_px=240, codec_options={"crf": "12"}),
    "pyramid.mp4": VideoSpec(width_px=320, height_px=240, gop=48, b_frames=7, codec_options={**PYRAMID, "crf": "12"}),
    "mpeg4.mp4": VideoSpec(width_px=320, height_px=240, codec="mpeg4", b_frames=2),
}


@pytest.mark.parametrize(
    ("name", "reader"),
    [(name, "pyav") for name in SOUND] + [pytest.param(name, "decord", marks=needs_decord) for name in list(SOUND)[:3]],
)
def test_damage_never_yields_a_wrong_frame(tmp_path, capfd, name, reader):
    """Frames that do not depend on the damaged one are returned; the first that does is an error, never wrong
    pixels.
    """
    path = write_video(tmp_path / name, SOUND[name])
    truth, sound = decode_everything(path), path.read_bytes()
    for damaged in (3, 26, 50):
        path.write_bytes(sound)
        videos.damage_packet(path, damaged)
        got = []
        with (
            open_video(path, reader) as source,
            pytest.raises(ReaderError, match=r"damaged, frame \d+ cannot be read") as caught,
        ):
            got.extend(source.read(range(60)))
        assert str(caught.value).startswith(f"{path}: ")
        lost = int(str(caught.value).split("damaged, frame ")[1].split(" ")[0])
        assert abs(lost - damaged) <= 20
        assert_same(got, truth, range(len(got)))
    assert capfd.readouterr() == ("", "")


@needs_decord
def test_pyav_reads_what_decord_reports_as_damaged(tmp_path, capfd):
    """decord returns concealed damage; its log reveals it."""
    path = write_video(tmp_path / "broken.mp4", SOUND["b_frames.mp4"])
    truth = decode_everything(path)
    videos.damage_packet(path, 46)  # in the group of frames 36 to 47
    asked = []

    class Arbiter(PyavReader):
        def read(self, frame_index):
            asked.append(list(frame_index))
            return super().read(frame_index)

    scan = scan_video(path)
    assert why_not_decord(scan) is None
    with DecordReader(scan, Arbiter(scan), batch_frames=6) as source:
        got = list(source.read([*range(36), *range(48, 60)]))
        assert_same(got, [*truth[:36], *truth[48:]], range(48))
        assert asked == []
        with pytest.raises(ReaderError, match=r"broken\.mp4: damaged, frame 4\d cannot be read"):
            list(source.read(range(60)))
    assert asked[-1] == list(range(42, 48))
    assert capfd.readouterr() == ("", "")


def test_damage_that_no_requested_frame_depends_on_is_ignored(tmp_path):
    path = write_video(tmp_path / "broken.mp4", SOUND["b_frames.mp4"])
    truth = decode_everything(path)
    videos.damage_packet(path, 30)  # in the group of frames 24 to 35
    assert_same(read(path, [3, 23, 24, 36, 59], "pyav")[1], truth, [3, 23, 24, 36, 59])


# ------------------------------------------------------------------------------------------ processes and memory


def run_script(script: str, *arguments: object) -> str:
    """Run Python code in its own process; its exit must be clean and stderr empty."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=280, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.fixture(scope="module")
def two_hours(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    return videos.repeat_video(write_video(folder / "short.mp4", VideoSpec(count=600)), folder / "long.mp4", times=300)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["pyav", pytest.param("decord", marks=needs_decord)])
def test_memory_is_flat_over_two_hours(two_hours, reader):
    script = """
        import resource, sys
        from pathlib import Path
        from features.video.open import open_video
        with open_video(Path(sys.argv[1]), sys.argv[2]) as source:
            assert source.frame_count == 180_000
            for n, frame in enumerate(source.read(range(0, 180_000, 3000))):
                if n == 20:
                    early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early)
    """
    assert int(run_script(script, two_hours, reader)) < 8 * 1024  # KiB, over two thirds of the video


@needs_decord
def test_decord_stops_decoding_after_a_batch(shared_data):
    path = sorted((shared_data / "clips" / "videos").glob("*.mp4"))[0]
    script = """
        import sys, time
        from pathlib import Path
        import psutil
        from features.video.open import open_video
        with open_video(Path(sys.argv[1]), "decord") as source:
            frames = source.read(range(0, 800, 25))
            next(frames)
            before = psutil.Process().memory_info().rss
            time.sleep(1.5)
            print((psutil.Process().memory_info().rss - before) >> 20)
    """
    assert int(run_script(script, path)) < 20  # MiB; without care it is hundreds


@needs_decord
def test_decord_survives_a_fork_and_an_untidy_exit(make):
    script = """
        import os, sys, zlib
        from pathlib import Path
        from features.video.open import open_video
        source = open_video(Path(sys.argv[1]), "decord")
        want = [zlib.crc32(frame) for frame in source.read(range(0, 60, 5))]
        child = os.fork()
        got = [zlib.crc32(frame) for frame in source.read(range(0, 60, 5))]
        if child == 0:
            os._exit(0 if got == want else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert got == want
        half_read = source.read(range(60))
        next(half_read)
        print("left open")
    """
    assert run_script(script, make("b_frames.mp4")[0]) == "left open"


def test_a_decord_without_its_own_ffmpeg_is_refused(make, tmp_path):
    """Its log, which alone reports damage, is found in the folder decord.libs beside the package."""
    script = """
        import sys, types
        from pathlib import Path
        sys.modules["decord"] = types.ModuleType("decord")
        sys.modules["decord"].__file__ = sys.argv[2]
        from features.video.base import ReaderError
        from features.video.open import open_video
        try:
            open_video(Path(sys.argv[1]), "decord")
        except ReaderError as error:
            print(error)
    """
    answer = run_script(script, make("b_frames.mp4")[0], tmp_path / "decord/__init__.py")
    assert "this build of decord does not report damage" in answer


def test_importing_the_module_imports_no_decoder_and_no_torch():
    script = """
        import sys
        import features.video.open
        print([name for name in ("av", "decord", "PIL", "torch") if name in sys.modules])
    """
    assert run_script(script) == "[]"


# ------------------------------------------------------------------------------------------ frame folders


def save_images(folder: Path, numbers, size=(40, 30)) -> dict[int, str]:
    folder.mkdir(exist_ok=True)
    files = []
    for number in numbers:
        name = f"video01_{number:06d}.png"
        Image.fromarray(videos.painted_frame(number, *size)).save(folder / name)
        files.append((number, name))
    return dict(files)


def test_folder_gives_the_image_of_each_source_frame(tmp_path):
    frames = save_images(tmp_path, range(0, 500, 100), size=(96, 64))
    with FolderReader(tmp_path, frames) as source:
        assert (source.name, source.frame_count) == ("pillow", 401)
        assert [frame_number(frame) for frame in source.read([100, 300, 400])] == [100, 300, 400]
        assert source.spread(3) == [0, 200, 400]
        with pytest.raises(ReaderError, match=r"has no image of frame 150"):
            source.read([100, 150])


def test_folder_images_may_change_in_size_and_kind(tmp_path):
    frames = save_images(tmp_path, [0])
    rgb = Image.fromarray(videos.painted_frame(1, 51, 37))
    extra = []
    for number, (mode, suffix) in enumerate([("L", "png"), ("P", "png"), ("RGBA", "png"), ("RGB", "jpg")], start=1):
        rgb.convert(mode).save(tmp_path / f"f{number}.{suffix}")
        extra.append((number, f"f{number}.{suffix}"))
    with FolderReader(tmp_path, {**frames, **dict(extra)}) as source:
        shapes = [frame.shape for frame in source.read(range(5))]
        assert shapes == [(30, 40, 3), *[(37, 51, 3)] * 4]
        assert np.array_equal(next(source.read([3])), np.asarray(rgb))


def test_folder_applies_the_camera_rotation(tmp_path):
    rgb = videos.painted_frame(5, 40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated clockwise by 90 degrees
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    with FolderReader(tmp_path, {0: "a.png"}) as source:
        assert np.array_equal(next(source.read([0])), np.rot90(rgb, -1))


def bomb_png() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.95])
def test_half_an_image_is_refused_in_one_line_that_names_it(tmp_path, suffix, keep):
    path = tmp_path / f"video01_000100.{suffix}"
    Image.fromarray(videos.painted_frame(9, 200, 150)).save(path)
    videos.truncate(path, keep)
    with (
        FolderReader(tmp_path, {100: path.name}) as source,
        pytest.raises(ReaderError, match="frame 100 cannot be read") as caught,
    ):
        next(source.read([100]))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_images_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    (tmp_path / "bomb.png").write_bytes(bomb_png())
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (400, 251)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for name, what in (
        ("bomb.png", "too large to decode"),
        ("large.png", "too large to decode"),
        ("deep.png", "not 8-bit colour"),
        ("text.png", "damaged or not an image"),
        ("folder.png", "damaged or not an image"),
        ("gone.png", "no such image"),
    ):
        with (
            FolderReader(tmp_path, {0: name}) as source,
            pytest.raises(ReaderError, match=what) as caught,
        ):
            next(source.read([0]))
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ReaderError, match="contains no images"):
        FolderReader(tmp_path, {})


# ---------------------------------------------------------------------------------------------- hardware


class Nv12:
    """A container, stream, codec or packet of PyAV whose decoded frames are NV12, as hardware hands them out."""

    def __init__(self, real) -> None:
        self.__dict__["real"] = real

    def __getattr__(self, name: str):
        found = getattr(self.real, name)
        return Nv12(found) if name in ("streams", "codec_context") else found

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.real, name, value)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.real.close()

    def best(self, kind: str):
        return Nv12(self.real.best(kind))

    def demux(self, stream):
        return map(Nv12, self.real.demux(stream.real))

    def decode(self, *packet):
        return [frame.reformat(format="nv12", dst_color_range=frame.color_range) for frame in self.real.decode(*packet)]


def on_hardware(path: Path, opened: list[str | None]) -> PyavReader:
    """A reader that would decode on hardware, which is not available here: software decodes instead."""

    def opener(path, hardware):
        opened.append(hardware)
        return Nv12(container.open_container(path))

    return PyavReader(scan_video(path), hardware="cuda", opener=opener)


@pytest.mark.parametrize(
    "name", ["b_frames.mp4", "no_b_frames.mp4", "even_not_by_four.mp4", "bt709.mp4", "full_range.mp4"]
)
def test_hardware_that_gives_the_same_samples_in_nv12_decodes_and_is_named(make, name):
    path, truth = make(name)
    opened: list[str | None] = []
    with on_hardware(path, opened) as reader:
        require_same_pixels(PyavReader(scan_video(path)), reader, path)
        assert reader.version.endswith(", decoded by cuda")
        assert_same(list(reader.read([0, 7, 20])), truth, [0, 7, 20])
    assert opened == ["cuda", "cuda"]  # the first frame, and the reading


def test_hardware_that_gives_different_pixels_is_refused(make):
    path, other = make("b_frames.mp4")[0], make("no_b_frames.mp4")[0]
    with pytest.raises(ReaderError, match="cuda returns other pixels than decoding in software; leave extract"):
        require_same_pixels(PyavReader(scan_video(other)), on_hardware(path, []), path)


def test_hardware_needs_a_release_that_keeps_the_flags_of_damage(make, monkeypatch):
    monkeypatch.setattr(container.import_av(), "__version__", "17.0.1")
    with pytest.raises(ReaderError, match=r"needs PyAV 18 or newer, but this is 17\.0\.1; leave extract"):
        open_video(make("b_frames.mp4")[0], "auto", hardware="cuda")


def test_missing_hardware_is_refused_in_one_line(make):
    for device in ("videotoolbox", "nonsense"):
        with pytest.raises(ReaderError, match=rf"cannot be decoded by {device} \(.+\); leave extract"):
            open_video(make("b_frames.mp4")[0], "auto", hardware=device)
    with pytest.raises(ReaderError, match="only PyAV decodes by hardware"):
        open_video(make("b_frames.mp4")[0], "decord", hardware="cuda")
