"""The reader for decord 0.6.0, selected, and imported, only with `reader="decord"`.

PyAV is the reference, and what `reader="auto"` uses: on real operations it returns nearly twice as many sampled frames
per second (`benchmarks/readers.py`, docs/performance.md). decord is used where it provably returns the same bytes and
refused elsewhere. Where it differs (each measured with decord 0.6.0 and PyAV 18.1; `tests/features/video/
test_readers.py` has every case):

- AVI, MPEG-TS: no usable presentation times or a seek that lands elsewhere; wrong frames throughout.
- open GOP and intra refresh (key frames that are not IDR pictures): decord numbers key frames by decoding order; wrong
  frames after each seek. MPEG-4 part 2 with B-frames in MP4 fails the same way.
- edit lists that hide frames: hidden frames are counted and the last frame is repeated silently.
- files cut short: the last frame is repeated silently.
- odd width or height with 4:2:0 colour, interlaced video, more than 8 bits: other RGB values (other scaler paths).
- missing or repeated time stamps, several video streams, a first packet that is not a key frame: refused untested.

Constant or variable rate, B-frames and pyramids, a start time other than zero, rotation, fragmented MP4, full range and
BT.709 are equal. All of this is decided from the container's packets without decoding, plus the first frame of each
video, which both readers must decode to the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from features.video.base import FrameReader
from features.video.container import import_av, open_container, video_stream
from features.video.pyav import PyavReader, upright
from features.video.scan import VideoScan


def why_not_decord(scan: VideoScan) -> str | None:
    """Why decord would return other frames than PyAV on this video, or None if it returns the same.

    Decided by the packets, then by comparing the first frame.
    """
    idr_only = scan.idr[0] and scan.key_count == scan.idr.sum()
    reasons = {
        "presentation times unknown, repeated or not kept by this container or codec": not scan.numbered,
        "MPEG-TS is not sought exactly": scan.container == "mpegts",
        "an edit list hides frames": not scan.shown.all(),
        "key frames that are not IDR pictures, as in an open GOP": not idr_only,
        "odd width or height": bool(scan.width_px % 2 or scan.height_px % 2),
        f"pixel format {scan.pix_fmt}": scan.pix_fmt not in {"yuv420p", "yuvj420p"},
        "several video streams": scan.video_streams != 1,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        return reason
    try:
        _import_decord()
    except ImportError:
        return "decord is not installed"
    if _watched_log() is None:
        return "this build of decord does not report damage"
    return _why_first_frame_differs(scan)


def _why_first_frame_differs(scan: VideoScan) -> str | None:
    """Compare frame 0 of both readers: catches interlacing and what this machine's scalers do differently."""
    try:
        with open_container(scan.path) as container:
            stream = video_stream(container, scan.path)
            frame = next(container.decode(stream))
            rgb = upright(frame, stream)
    except (StopIteration, import_av().error.FFmpegError):
        return "its first frame cannot be decoded"
    if frame.interlaced_frame:
        return "interlaced video"
    with DecordReader(scan, PyavReader(scan)) as reader:
        other = reader.decode([0])
    # None: decord met damage, which says nothing about this kind of video; PyAV then reads the damaged batch.
    return None if other is None or np.array_equal(other[0], rgb) else "its first frame differs from PyAV's"


def _import_decord() -> ModuleType:
    import decord

    return decord


class _WatchedLog:
    """Counts the error messages of decord's own FFmpeg, since decord returns damaged frames without reporting them.

    FFmpeg hands every message of a process to one callback; errors (level 16 and below) and notes of concealed damage
    count.
    """

    _ERROR_LEVEL = 16

    def __init__(self, library: ctypes.CDLL) -> None:
        self.complaints = 0
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._callback = prototype(self._heard)  # kept: FFmpeg holds the bare pointer
        library.av_log_set_callback(self._callback)

    def _heard(self, context: int, level: int, message: bytes | None, arguments: int) -> None:
        if level <= self._ERROR_LEVEL or (message or b"").startswith(b"concealing"):
            self.complaints += 1


@functools.cache
def _watched_log() -> _WatchedLog | None:
    """The log counter of decord, one per process; None if decord was installed without its own libavutil."""
    folder = Path(_import_decord().__file__ or "").parent.parent / "decord.libs"
    for path in sorted(folder.glob("libavutil*")):
        try:
            return _WatchedLog(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):
            continue
    return None


class DecordReader(FrameReader):
    """Reads with decord 0.6.0, in batches small enough to keep memory flat; a batch for which decord's FFmpeg reports
    an error is read again by PyAV (`arbiter`), whose result counts.

    decord's hazards and how they are met: its thread continues to decode after a batch, and memory grows (`seek(0)`
    after each batch); a video open at interpreter exit aborts the process, and one open across a fork can hang the
    child (open only while frames are read, and closed by an exit hook: fork between readings, not within one); it
    repeats the last frame silently (its fault tolerance is set to none).
    """

    name = "decord"
    _BATCH_BYTES = 48 << 20
    _NO_FAULTS = 1e-9

    def __init__(self, scan: VideoScan, arbiter: PyavReader, batch_frames: int = 32) -> None:
        self.version = _import_decord().__version__
        self.path = scan.path
        self.frame_count = scan.frame_count
        self.times = scan.times
        self._scan = scan
        self._arbiter = arbiter
        self._batch_frames = max(1, min(batch_frames, self._BATCH_BYTES // (3 * scan.width_px * scan.height_px)))
        self._open: list[Any] = []  # the video, while frames are read
        weakref.finalize(self, self._open.clear)  # also at exit, where the reader may still be referred to

    def close(self) -> None:
        self._open.clear()
        self._arbiter.close()

    def _frames(self, wanted: list[int]) -> Iterator[np.ndarray]:
        try:
            for start in range(0, len(wanted), self._batch_frames):
                batch = wanted[start : start + self._batch_frames]
                frames = self.decode(batch)
                yield from self._arbiter.read(batch) if frames is None else frames
        finally:
            self._open.clear()

    def decode(self, batch: list[int]) -> np.ndarray | None:
        """(N, H, W, 3) uint8 RGB; None if decord failed or its FFmpeg complained of damage."""
        log = _watched_log()
        assert log is not None  # why_not_decord has checked it
        before = log.complaints
        try:
            if not self._open:
                path = str(self.path.resolve())
                self._open.append(_import_decord().VideoReader(path, num_threads=1, fault_tol=self._NO_FAULTS))
            [video] = self._open
            if len(video) != self.frame_count:
                return None
            frames = video.get_batch(batch)
            rgb = frames.asnumpy() if hasattr(frames, "asnumpy") else np.asarray(frames)
            video.seek(0)
        except Exception as error:
            if not type(error).__module__.startswith("decord") and not isinstance(error, RuntimeError | AssertionError):
                raise
            self._open.clear()
            return None
        return rgb if log.complaints == before else None
