"""The reader for decord 0.6.0, which is used (and imported) only with `reader="decord"`.

PyAV is the reference, and `reader="auto"` selects it: on real operations it returns nearly twice as many sampled frames
per second as decord (`benchmarks/readers.py`, docs/performance.md). decord is used only where it provably returns the
same bytes, and refused otherwise. It differs in these cases, each measured with decord 0.6.0 and PyAV 18.1
(`tests/features/video/test_readers.py` tests all of them):

- AVI and MPEG-TS: there are no usable presentation times, or seeks end elsewhere, so frames are wrong throughout.
- Key frames that are not IDR pictures (open GOP, intra refresh): decord numbers key frames by decoding order, so frames
  are wrong after each seek. MPEG-4 part 2 with B-frames in MP4 fails in the same way.
- Edit lists that hide frames: decord counts hidden frames, and repeats the last frame without an error.
- Incomplete files: decord repeats the last frame without an error.
- Odd width or height with 4:2:0 colour, interlaced video, more than 8 bits: RGB values differ, because the scaler
  computes them in another way.

Missing or repeated time stamps, several video streams, and a first packet that is not a key frame are refused too,
although no difference was measured. Both readers agree for constant and variable rates, B-frames and pyramids, a start
time other than zero, rotation, fragmented MP4, full range and BT.709. Whether decord is refused is decided from the
container's packets without decoding, and by the first frame of each video, which both readers must decode to the same
bytes.
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
    """Return why decord would return other frames than PyAV on this video, or None if it returns the same.

    This is decided from the packets, and then by comparing the first frame.
    """
    idr_only = scan.idr[0] and scan.key_count == scan.idr.sum()
    reasons = {
        "presentation times unknown, repeated or not kept by this container or codec": not scan.numbered,
        "seeks in MPEG-TS are not exact": scan.container == "mpegts",
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
    """Compare frame 0 of both readers, which shows interlacing, and any difference between scalers on this machine."""
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
    # `other` is None if decord met damage. That says nothing about this kind of video, and PyAV will read the batch.
    return None if other is None or np.array_equal(other[0], rgb) else "its first frame differs from PyAV's"


def _import_decord() -> ModuleType:
    import decord

    return decord


class _WatchedLog:
    """Counts the error messages of decord's own FFmpeg, since decord itself does not report damaged frames.

    FFmpeg passes all messages in a process to one callback. Errors (level 16 and below) and notes about concealed
    damage are counted.
    """

    _ERROR_LEVEL = 16

    def __init__(self, library: ctypes.CDLL) -> None:
        self.complaints = 0
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._callback = prototype(self._heard)  # keeps the callback alive, to which FFmpeg has only a pointer
        library.av_log_set_callback(self._callback)

    def _heard(self, context: int, level: int, message: bytes | None, arguments: int) -> None:
        if level <= self._ERROR_LEVEL or (message or b"").startswith(b"concealing"):
            self.complaints += 1


@functools.cache
def _watched_log() -> _WatchedLog | None:
    """Return this process's counter of decord's errors; None if decord was installed without its own libavutil."""
    folder = Path(_import_decord().__file__ or "").parent.parent / "decord.libs"
    for path in sorted(folder.glob("libavutil*")):
        try:
            return _WatchedLog(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):
            continue
    return None


class DecordReader(FrameReader):
    """Reads with decord 0.6.0, in batches small enough that memory does not grow.

    If decord's FFmpeg reports an error in a batch, the batch is read again by PyAV (`arbiter`), whose result counts.

    Problems of decord, and what this class does about them: after a batch, its thread continues to decode and memory
    grows, so each batch ends with `seek(0)`. A video that is open when the interpreter exits aborts the process, and
    one that is open during a fork can hang the child, so it is open only while frames are read, and an exit hook closes
    it (fork between two readings, not during one). It repeats the last frame without an error, so its fault tolerance
    is set to none.
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
        self._open: list[Any] = []  # contains the video while frames are read
        weakref.finalize(self, self._open.clear)  # closes the video at exit too, if the reader still exists

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
        """Return frames (N, H, W, 3) uint8 RGB, or None if decord failed or its FFmpeg reported damage."""
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
