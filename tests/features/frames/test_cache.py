"""The frame cache: its pixels are the video's, files are complete or absent, and only changed ones are made again."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from configs.schema import CacheConfig, PreprocessConfig
from engine.files import sha256_ends
from features.frames.cache import CachedFrames, CacheRequest, FrameCache
from features.frames.preprocess import Geometry
from features.sealed_hdf5 import seal
from features.store import SourceIdentity
from features.video.base import ReaderError
from features.video.open import open_video
from tests.videos import VideoSpec, damage_packet, decode_everything, painted_frame, write_video

PROJECT = Path(__file__).resolve().parents[3]
SMALL = PreprocessConfig(resize_px=48, crop_px=40)


def round_field(number: int, width_px: int, height_px: int) -> np.ndarray:
    """A numbered frame with a black margin left and right."""
    frame = np.zeros((height_px, width_px, 3), np.uint8)
    margin = width_px // 4
    frame[:, margin:-margin] = painted_frame(number, width_px - 2 * margin, height_px)
    return frame


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("source") / "video01.mp4", VideoSpec(paint=round_field))


def request_of(path: Path, frame_index=range(0, 60, 5), video_id: str = "video01") -> CacheRequest:
    source = SourceIdentity(video_id, sha256_ends(path), path.stat().st_size, 25.0)
    index = np.asarray(frame_index, dtype=np.int64)
    return CacheRequest(source, index, lambda: open_video(path, "pyav"))


def cache_in(folder: Path, preprocess: PreprocessConfig = SMALL, fps: float = 5.0, **settings) -> FrameCache:
    # model_construct: codecs are more than the settings offer
    return FrameCache(
        CacheConfig.model_construct(**{**CacheConfig().model_dump(), "dir": folder, **settings}), preprocess, fps
    )


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def no_reader():
    raise AssertionError("the video must not be opened")


def closed(request: CacheRequest) -> CacheRequest:
    """The same request, failing where the video is opened again."""
    return CacheRequest(request.source, request.frame_index, no_reader)


# ------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("codec", ["png", "webp"])
@pytest.mark.parametrize("cut_margin", [False, True])
def test_pixels_from_cache_are_pixels_from_video(tmp_path, video, codec, cut_margin):
    preprocess = SMALL.model_copy(update={"cut_margin": cut_margin})
    request = request_of(video)
    cached = cache_in(tmp_path, preprocess, codec=codec).ensure(request)
    with request.open_reader() as reader:
        geometry = Geometry.of_video(preprocess, reader)
        frames = [geometry.resize_frame(frame) for frame in reader.read(request.frame_index)]
    assert (geometry.box is not None) == cut_margin
    assert len(cached) == 12
    assert cached.frame_index.tolist() == list(range(0, 60, 5))
    for position in (11, 0, 5, 5, 3):
        assert np.array_equal(cached[position], frames[position])
        assert cached[position].flags.writeable


def test_pixels_are_also_those_of_plain_decoding(tmp_path, video):
    """Against an independent implementation: PyAV decodes everything, Pillow resizes."""
    truth = decode_everything(video)
    cached = cache_in(tmp_path).ensure(request_of(video))
    for position, k in enumerate(range(0, 60, 5)):
        want = Image.fromarray(np.ascontiguousarray(truth[k])).resize((48, 48), Image.Resampling.BILINEAR)
        assert np.array_equal(cached[position], np.asarray(want))


def test_jpeg_is_close_and_smaller(tmp_path, video):
    request = request_of(video)
    lossless, lossy = (cache_in(tmp_path, codec=codec).ensure(request) for codec in ("png", "jpeg"))
    assert lossy.path.parent != lossless.path.parent
    difference = np.abs(lossy[3].astype(int) - lossless[3])
    assert 0 < difference.mean() < 8
    assert lossy.path.stat().st_size < lossless.path.stat().st_size


def test_real_clip(tmp_path, shared_data):
    path = shared_data / "clips" / "videos" / "video05.mp4"
    request = request_of(path, range(0, 100, 25))
    cached = cache_in(tmp_path, PreprocessConfig()).ensure(request)
    with request.open_reader() as reader:
        for position, frame in enumerate(reader.read(request.frame_index)):
            assert np.array_equal(cached[position], Geometry(250).resize_frame(frame))
    assert cached.path.stat().st_size < cache_in(tmp_path, PreprocessConfig()).estimate_bytes(4)


# ------------------------------------------------------------------------------------------ identity


def test_digest_is_over_what_changes_the_pixels(tmp_path):
    base = cache_in(tmp_path)
    different = [
        cache_in(tmp_path, fps=1.0),
        cache_in(tmp_path, PreprocessConfig(resize_px=50, crop_px=40)),
        cache_in(tmp_path, SMALL.model_copy(update={"cut_margin": True})),
        cache_in(tmp_path, codec="jpeg"),
        cache_in(tmp_path, codec="jpeg", jpeg_quality=80),
    ]
    assert len({cache.digest for cache in [base, *different]}) == 6
    same = [
        cache_in(tmp_path / "elsewhere"),
        cache_in(tmp_path, codec="webp"),
        cache_in(tmp_path, jpeg_quality=80),
        cache_in(tmp_path, PreprocessConfig(resize_px=48, crop_px=30, mean=(0.5, 0.5, 0.5))),
    ]
    assert {cache.digest for cache in same} == {base.digest}
    assert base.path("video01") == tmp_path / base.digest[:12] / "video01.h5"


def test_a_file_records_its_identity(tmp_path, video):
    cache = cache_in(tmp_path, SMALL.model_copy(update={"cut_margin": True}))
    request = request_of(video)
    with h5py.File(cache.ensure(request).path) as file:
        attributes = dict(file.attrs)
        assert [file[name].shape for name in ("blobs", "crc32", "frame_index")] == [(12,)] * 3
    assert attributes["complete"]
    assert attributes["video_id"] == "video01"
    assert attributes["source_sha256_ends"] == request.source.source_sha256_ends
    assert (attributes["source_fps"], attributes["fps"]) == (25.0, 5.0)
    assert attributes["reader"] == "pyav"
    assert '"box": [24, 0, 72, 64]' in attributes["geometry"]


@pytest.mark.parametrize("name", ["../video01", "a/b", ".hidden", "a\x00b", "病例 一号"])
def test_an_id_of_any_kind_stays_in_the_folder(tmp_path, name):
    cache = cache_in(tmp_path)
    assert cache.path(name).parent == cache.folder


# ------------------------------------------------------------------------------------------ reuse


def test_a_second_call_reads_no_video_and_reports_no_progress(tmp_path, video):
    cache, heard = cache_in(tmp_path), []
    request = request_of(video)
    assert cache.find(request) is None
    cache.ensure(request, heard.append)
    assert heard == list(range(1, 13))
    heard.clear()
    assert len(cache.ensure(closed(request), heard.append)) == 12
    assert heard == []
    assert cache.problem(request, deep=True) is None
    assert content(tmp_path) == [f"{cache.digest[:12]}/video01.h5"]


def test_a_replaced_source_and_other_frames_are_made_again(tmp_path, video):
    cache = cache_in(tmp_path)
    cache.ensure(request_of(video))
    replaced = tmp_path / "replaced.mp4"
    write_video(replaced, VideoSpec(count=61))
    assert "source_sha256_ends" in cache.problem(request_of(replaced))
    with request_of(replaced).open_reader() as reader:
        want = Geometry(48).resize_frame(next(reader.read([55])))
    assert np.array_equal(cache.ensure(request_of(replaced))[11], want)
    assert cache.problem(request_of(replaced, range(0, 60, 4))) == "contains another number of frames"
    assert cache.problem(request_of(replaced, range(1, 60, 5))) == "contains other frames"
    assert len(cache.ensure(request_of(replaced, range(0, 60, 4)))) == 15


def damaged_files(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    return {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no HDF5 at all", "short": whole[:-100]}


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "short"])
def test_a_file_cut_short_is_made_again(tmp_path, video, kind):
    cache, request = cache_in(tmp_path), request_of(video)
    path = cache.ensure(request).path
    path.write_bytes(damaged_files(path)[kind])
    assert cache.problem(request) in ("damaged or cut short", "not a file of this project, or damaged")
    with pytest.raises(UserError, match="delete it, and it will be created again") as caught:
        CachedFrames(path)[0]
    assert str(caught.value).startswith(f"{path}: ")
    cache.ensure(request)
    assert cache.problem(request, deep=True) is None


def test_a_file_that_is_not_marked_complete_is_made_again(tmp_path, video):
    cache, request = cache_in(tmp_path), request_of(video)
    path = cache.ensure(request).path
    with h5py.File(path, "r+") as file:
        del file.attrs["complete"]
    assert cache.problem(request) == "damaged or cut short"
    seal(path)
    assert cache.problem(request) == "not complete"
    cache.ensure(request)
    assert cache.problem(request) is None


def test_a_flipped_byte_is_found_when_read(tmp_path, video):
    cache, request = cache_in(tmp_path), request_of(video)
    cached = cache.ensure(request)
    with h5py.File(cached.path, "r") as file:
        blob = file["blobs"][7].tobytes()
    whole = bytearray(cached.path.read_bytes())
    whole[whole.index(blob) + len(blob) // 2] ^= 1
    cached.path.write_bytes(bytes(whole))
    assert cache.problem(request) == "damaged or cut short"  # by the seal, before HDF5 opens the file
    seal(cached.path)
    assert cache.problem(request) is None  # the cheap check reads no frame
    assert cache.problem(request, deep=True) == "frame 35 is damaged"
    cached[6]
    with pytest.raises(UserError, match=r"video01\.h5: .*frame 35 fails its checksum.*delete it") as caught:
        cached[7]
    assert "\n" not in str(caught.value)


def test_positions_outside_are_errors(tmp_path, video):
    cached = cache_in(tmp_path).ensure(request_of(video))
    for position in (-1, 12):
        with pytest.raises(IndexError, match=r"of 12"):
            cached[position]


# ------------------------------------------------------------------------------------------ no partial files


class Stop(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("error", [Stop(), OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_an_interruption_leaves_nothing_behind(tmp_path, video, error):
    cache, request = cache_in(tmp_path), request_of(video)

    def interrupt(done: int) -> None:
        if done == 7:
            raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        cache.ensure(request, interrupt)
    assert content(tmp_path) == []
    assert len(cache.ensure(request)) == 12


def test_a_damaged_video_leaves_nothing_behind(tmp_path):
    path = write_video(tmp_path / "bad.mp4", VideoSpec(width_px=320, height_px=240, codec_options={"crf": "12"}))
    damage_packet(path, 30)
    cache = cache_in(tmp_path / "cache")
    with pytest.raises(ReaderError, match=r"bad\.mp4: damaged, frame \d+ cannot be read"):
        cache.ensure(request_of(path))
    assert content(tmp_path / "cache") == []


def test_free_space_is_checked_before_the_start(tmp_path, video, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match=r"caching these frames needs about .* MB"):
        cache_in(tmp_path).ensure(closed(request_of(video)))
    assert content(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on file sizes")
@pytest.mark.parametrize("limit", [0, 500, 10_000, 20_000])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, video, limit):
    script = """
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        sys.path.insert(0, ".")
        from configs.errors import UserError
        from tests.features.frames.test_cache import cache_in, request_of
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = int(sys.argv[3])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            cache_in(Path(sys.argv[2])).ensure(request_of(Path(sys.argv[1])))
        except UserError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(video), str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=280, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().endswith(
        "video01.h5: no room left on the disk; free some space or choose another folder"
    )
    assert content(tmp_path) == []


# ------------------------------------------------------------------------------------------ processes


def test_cached_frames_travel_between_processes(tmp_path, video):
    cached = cache_in(tmp_path).ensure(request_of(video))
    want = cached[4]
    copy = pickle.loads(pickle.dumps(cached))  # noqa: S301 (our own bytes)
    assert np.array_equal(copy[4], want)
    cached.close()
    assert np.array_equal(cached[4], want)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(cached[4], want) and np.array_equal(cached[9], copy[9]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(cached[4], want)


def test_frames_are_written_as_they_come(tmp_path, video):
    """One frame is read, written and reported before the next: memory does not grow."""
    events = []

    class Recorder:
        name, version, fps, frame_count = "recorder", "0", 25.0, 60

        def read(self, frame_index):
            for k in frame_index:
                events.append(("read", k))
                yield painted_frame(k)

        def spread(self, count):
            return [0]

        def close(self):
            events.append("closed")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.close()

    request = request_of(video, [0, 25, 50])
    cache_in(tmp_path).ensure(CacheRequest(request.source, request.frame_index, Recorder), events.append)
    assert events == [("read", 0), 1, ("read", 25), 2, ("read", 50), 3, "closed"]
