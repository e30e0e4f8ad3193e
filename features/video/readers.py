"""Frames out of videos and image folders: frame k is the k-th that is shown, at its own time, whatever reads it.

**Definition.** Frame k of a video is the k-th picture that a player shows (pictures that an edit list hides left out);
its pixels are FFmpeg's conversion to 8-bit RGB with the stream's own colour matrix and range. Its time is that of its
time stamp, counted from frame 0. A rotation noted in the container (a multiple of 90 degrees) is applied, by both
readers, because annotators worked on what their player showed. In a frame folder, frame k is the image of source frame
k; an EXIF rotation is applied.

**Times and numbers.** Time stamps number pictures only where they are known to be those of pictures: decoding times
never go back, and exactly the B pictures are shown before something decoded earlier. Otherwise (stamps that stand for
decoding, as after a copy of AVI to MP4; other codecs) pictures are counted as the decoder gives them; where the rate
varies too, each must come at its time. All of it is looked at on the first pictures by `probe_video` and on every
picture while reading. A recording that begins within a group of pictures begins at the first that can be shown, an
empty chunk of AVI shows the picture before it again, and parts joined with their clocks as they were are refused.

**Readers.** PyAV is the reference, and what `reader="auto"` takes: on real operations it gives nearly twice the sampled
frames a second (`benchmarks/readers.py`, docs/performance.md). `reader="decord"` takes decord 0.6.0 where it provably
gives the same bytes, and raises `ReaderError` elsewhere. Where it differs (each measured with decord 0.6.0 and PyAV
18.1; `tests/features/video/test_readers.py` holds every case):

- AVI, MPEG-TS: no usable presentation times or a seek that lands elsewhere; wrong frames throughout.
- open GOP and intra refresh (key frames that are no IDR pictures): decord numbers key frames by decoding order; wrong
  frames after each seek. MPEG-4 part 2 with B-frames in MP4 fails the same way.
- edit lists that hide frames: hidden frames are counted and the last frame repeated silently.
- files cut short: the last frame is repeated silently.
- odd width or height with 4:2:0 colour, interlaced video, more than 8 bits: other RGB values (other scaler paths).
- missing or repeated time stamps, several video streams, first packet no key frame: never tried, never trusted.

Constant or variable rate, B-frames and pyramids, a start time that is not zero, rotation, fragmented MP4, full range
and BT.709 are equal. All of it is decided from the container's packets without decoding, plus the first picture, which
both must decode to the same bytes once for each kind of picture (size, pixel format, colour, rotation) in a process.

**Damage.** Where FFmpeg notices damage, the frames that need the damaged picture are an error, never other pixels:
PyAV's error flags are checked on every picture that a wanted one depends on, and decord's log is watched; at its first
complaint PyAV reads the batch again and decides. Bytes that were changed into other valid pictures nobody can notice.
Containers that say they are longer than the file, or hold more frames than they do (but for a last one), are refused
when opened.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import itertools
import warnings
import weakref
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

from configs.errors import UserError
from engine.sniff import what_it_is
from features.video import mp4 as boxes
from features.video.times import FrameTimes

# A picture larger than this is refused before anything is decoded: 8K video has 33 million pixels.
MAX_PIXELS = 50_000_000
# A video with fewer pictures that start over is not worth splitting: each part decodes from the one before it.
_MANY_STARTS = 4
_WAY_OUT = "re-encode the video or leave it out"


class ReaderError(UserError):
    """A frame source that cannot be read exactly: names the file, the frame, and what to do."""


class FrameReader(Protocol):
    """What every source of frames offers. A context manager; `close` may be called twice."""

    name: str
    version: str
    fps: float
    frame_count: int
    times: FrameTimes | None  # of a video without a constant rate

    def read(self, frame_index: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield (H, W, 3) uint8 RGB, one a requested source frame number, lazily and with bounded memory.

        `frame_index` is strictly increasing. Raises ReaderError naming file and frame where one cannot be had.
        """

    def spread(self, count: int) -> list[int]:
        """At most `count` frame numbers spread evenly over the frames that exist, first and last included."""

    def close(self) -> None: ...

    def __enter__(self) -> FrameReader: ...

    def __exit__(self, *error: object) -> None: ...


@dataclass(frozen=True)
class VideoInfo:
    """What the container says. Sizes are as stored, before any rotation.

    `times` are those of the frames where they have no constant rate; `fps` is the mean one then. `notes` say what was
    made of a container that is odd.
    """

    fps: float
    frame_count: int
    width_px: int
    height_px: int
    codec: str
    times: FrameTimes | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrameFolder:
    """The images of a frame folder: `files` holds (source frame number, file name), sorted by number."""

    files: tuple[tuple[int, str], ...]
    fps: float


def probe_video(path: Path) -> VideoInfo:
    """Rate, frame count, times, size and codec from the container; of the pictures only the first few are decoded.

    An MP4 file's own tables are taken where they agree with its duration and its rate is constant; otherwise (other
    containers have no such tables, edit lists hide frames) the packets are read. Raises ReaderError for anything that
    is no video, for one whose container says it is longer than the file, and where frames or their times cannot be
    determined.
    """
    with _open_container(path) as container:
        stream = _video_stream(container, path)
        rate, context, tick_s = _rate(stream), stream.codec_context, stream.time_base
        info = VideoInfo(float(rate), _promised_frames(stream), context.width, context.height, context.name)
        pts = boxes.picture_times(path)
        try:
            first_is_key = next((packet.is_keyframe for packet in container.demux(stream) if packet.size), False)
        except _import_av().error.FFmpegError:
            first_is_key = False
    shown_pts = None
    if pts is not None and len(pts) == info.frame_count and pts[0] == pts.min() and first_is_key:
        shown_pts = None if _ends_early(path) else np.sort(pts)
    if shown_pts is not None:
        fps, times = _rate_and_times(path, shown_pts, tick_s, rate)
        info = dataclasses.replace(info, fps=fps, times=times)
    if shown_pts is None or info.times is not None:  # varying times may be a damaged table, which the packets show
        scan = scan_video(path)
        info = dataclasses.replace(info, frame_count=scan.frame_count, fps=scan.fps, times=scan.times, notes=scan.notes)
        shown_pts = scan.shown_pts if scan.timed else None
    notes = info.notes + _check_first_pictures(path, shown_pts, info.times is not None)
    if info.times is not None:
        notes += (f"{path.name}: no constant rate, {info.fps:.4g} fps on average; frames are taken by their own times",)
    return dataclasses.replace(info, notes=notes)


# Enough to see whether pictures come in the order of their times: no codec reorders over more than a third of it.
_FIRST_PICTURES = 48


def _check_first_pictures(path: Path, shown_pts: np.ndarray | None, variable: bool) -> tuple[str, ...]:
    """A note where times are not those of pictures, which the first groups of pictures show; they need not be sound.

    Raises ReaderError where the rate varies too, so that no frame's time is known.
    """
    with _open_container(path) as container:
        stream = _video_stream(container, path)
        seen: list[int] = []
        try:
            for picture in itertools.islice(_decoded_from(container, stream, 0), _FIRST_PICTURES):
                seen += [] if picture.pts is None else [picture.pts]
        except _import_av().error.FFmpegError:
            pass  # reading says so, where frames that are wanted are lost
    back = next((k for k in range(1, len(seen)) if seen[k] <= seen[k - 1]), None)
    if back is None or shown_pts is None:
        return ()
    if variable:
        raise ReaderError(
            f"{path}: its rate varies and its time stamps are not those of its pictures (from frame {back} on): no "
            f"frame's time is known; {_WAY_OUT}"
        )
    return (f"{path.name}: time stamps are not those of its pictures (from frame {back} on); frames are counted",)


def _rate_and_times(
    path: Path, shown_pts: np.ndarray, tick_s: Fraction, rate: Fraction
) -> tuple[float, FrameTimes | None]:
    """The rate of frames shown at `shown_pts` (F,), rising, and their times where that is not constant.

    Raises ReaderError where there is no rate.
    """
    fps, span_s = float(rate), float((shown_pts[-1] - shown_pts[0]) * tick_s)
    mean = (len(shown_pts) - 1) / span_s if span_s > 0 else fps
    if not mean > 0:
        raise ReaderError(f"{path}: has no frame rate; {_WAY_OUT}")
    try:
        times = FrameTimes.of_stream(shown_pts, tick_s, fps or mean)
        return (fps if fps and (times is None or abs(mean - fps) < 0.01 * fps) else mean), times
    except ValueError as error:
        raise ReaderError(f"{path}: {error}; {_WAY_OUT}") from error


def count_packets(path: Path) -> int:
    """How many whole pictures the file holds (packets that are shown), found without decoding.

    Equal to the frame count of a sound video and smaller for one cut short.
    """
    return _scan(path).frame_count


def open_reader(
    source_path: Path,
    kind: Literal["video", "frames"],
    reader: Literal["auto", "decord", "pyav"],
    *,
    frames: FrameFolder | None,
    fps: float,
    threads: int = 1,
    hardware: str | None = None,
) -> FrameReader:
    """Open a source of frames; `fps` is the source's rate and is only passed on.

    `threads` is for PyAV alone: several videos at once beat several threads on one. `hardware` is a kind of device that
    FFmpeg decodes on (cuda, qsv, ...), for PyAV and videos alone. Open a reader in the process that uses it. Raises
    ReaderError when the source cannot be read, or when decord or hardware was asked for and would give other frames.
    """
    if kind == "frames":
        if frames is None:
            raise ValueError("a frame folder needs its list of files")
        return FolderReader(source_path, frames)
    scan = scan_video(source_path)
    if hardware is not None:
        _require_same_on_hardware(scan, hardware, reader)
        return PyavReader(scan, fps, 1, hardware)
    pyav = PyavReader(scan, fps, threads)
    if reader != "decord":
        return pyav
    reason = why_not_decord(scan)
    if reason is not None:
        raise ReaderError(f"{source_path}: decord does not give the right frames here ({reason}); use auto or pyav")
    return DecordReader(scan, fps, pyav)


def checked_frames(frame_index: Sequence[int], frame_count: int, path: Path) -> list[int]:
    """The requested numbers as ints; ValueError unless strictly increasing, ReaderError unless the source has them."""
    wanted = [int(k) for k in frame_index]
    if any(b <= a for a, b in itertools.pairwise(wanted)) or (wanted and wanted[0] < 0):
        raise ValueError("frame numbers must be strictly increasing and not negative")
    if wanted and wanted[-1] >= frame_count:
        missing = next(k for k in wanted if k >= frame_count)
        raise ReaderError(f"{path}: has {frame_count} frames, so frame {missing} cannot be had; rebuild the index")
    return wanted


def can_start_inside(path: Path) -> bool:
    """Whether reading a video from its middle is cheap: its pictures are known by time, and many start over.

    Raises ReaderError for what `scan_video` refuses.
    """
    scan = scan_video(path)
    return scan.numbered and int(scan.idr.sum()) >= _MANY_STARTS


class ClosingReader:
    """The context manager half of every reader."""

    times: FrameTimes | None = None

    def close(self) -> None:
        """Nothing is held between reads unless a reader says so."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------- containers


def _import_av() -> ModuleType:
    """PyAV with FFmpeg's own chatter on stderr silenced: what matters comes back as errors and flags."""
    import av
    import av.logging

    av.logging.set_level(av.logging.PANIC)
    return av


def _open_container(path: Path, hardware: str | None = None) -> Any:
    """An open PyAV container. Raises ReaderError, in one line, for everything that is not a readable video.

    Its pictures are decoded by `hardware` where that is named, and then by nothing else.
    """
    av = _import_av()
    try:
        if path.stat().st_size == 0:
            raise ReaderError(f"{path}: is {what_it_is(path)}")
        if claim := boxes.overclaim(path):
            raise ReaderError(f"{path}: {claim}; {_WAY_OUT}")
        accelerated = _accelerated(path, hardware) if hardware is not None else {}
        # `file:` and the white list keep odd names and playlists in disguise from reaching other files or the network.
        return av.open(f"file:{path}", metadata_errors="replace", options={"protocol_whitelist": "file"}, **accelerated)
    except FileNotFoundError as error:
        raise ReaderError(f"{path}: no such file") from error
    except (av.error.FFmpegError, OSError, RuntimeError) as error:
        if hardware is not None:
            raise _no_hardware(path, hardware, error) from error
        if found := what_it_is(path):
            raise ReaderError(f"{path}: not a video that can be read: it is {found}") from error
        if _ends_early(path):
            raise ReaderError(
                f"{path}: cut short, not even frame 0 can be had; copy it again or leave it out"
            ) from error
        what = getattr(error, "strerror", None) or type(error).__name__
        raise ReaderError(f"{path}: not a video that can be read ({what}); copy it again or leave it out") from error


def _accelerated(path: Path, hardware: str) -> dict[str, Any]:
    """What PyAV's `open` takes to decode on hardware and to fail rather than to do it in software."""
    try:
        from av.codec.hwaccel import HWAccel
    except ImportError as error:  # PyAV before 14
        raise _no_hardware(path, hardware, error) from error
    return {"hwaccel": HWAccel(device_type=hardware, allow_software_fallback=False)}


def _no_hardware(path: Path, hardware: str, error: Exception) -> ReaderError:
    what = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return ReaderError(f"{path}: cannot be decoded by {hardware} ({what}); leave extract.hardware_decoding unset")


def _video_stream(container: Any, path: Path) -> Any:
    """The stream a player would show (cover pictures are none). Raises ReaderError where there is none."""
    find_best = getattr(container.streams, "best", None)  # since PyAV 13
    stream = find_best("video") if find_best else next(iter(container.streams.video), None)
    format_name = container.format.name
    if format_name.endswith("_pipe") or format_name in {"image2", "gif", "tty"}:
        raise ReaderError(f"{path}: an image or a text, not a video; leave it out")
    if stream is None or stream.codec_context is None:
        raise ReaderError(f"{path}: holds no video stream that can be decoded; leave it out")
    width_px, height_px = stream.codec_context.width, stream.codec_context.height
    if width_px < 1 or height_px < 1:
        raise ReaderError(f"{path}: holds a video stream without a picture size; {_WAY_OUT}")
    if width_px * height_px > MAX_PIXELS:
        raise ReaderError(f"{path}: refuses to decode pictures of {width_px} x {height_px} pixels; leave it out")
    _use_threads(stream.codec_context, 1)
    return stream


def _use_threads(context: Any, threads: int) -> None:
    """Decode in this thread alone, or in several: never by slices, which switches FFmpeg's damage flags off.

    PyAV frees contexts late; one with threads that is freed in a forked child hangs it.
    """
    context.thread_type = "FRAME" if threads > 1 else "NONE"
    context.thread_count = threads


@dataclass(frozen=True)
class VideoScan:
    """What one pass over a video's packets tells, nothing decoded. Arrays run over packets in decoding order.

    `pts` (N,) int64 presentation times in ticks of `tick_s`, `shown` (N,) bool (an edit list hides the others, or there
    is no picture before them that they need), `idr` (N,) bool packets that start over: nothing after one refers to
    anything before it (H.264 IDR pictures). `first` is the packet where decoding begins. `in_order`: times are in the
    order that H.264 pictures are shown in. `repeats` (F,) int64: which picture each frame shows, where some are shown
    again (empty chunks of AVI); None elsewhere.
    """

    path: Path
    container: str
    codec: str
    pix_fmt: str
    width_px: int
    height_px: int
    colour: tuple[int, int]
    video_streams: int
    pts: np.ndarray
    shown: np.ndarray
    idr: np.ndarray
    key_count: int
    times_known: bool
    damage: str | None
    certain_count: int
    tick_s: Fraction
    rate: Fraction
    first: int
    in_order: bool
    back_at: int | None
    repeats: np.ndarray | None
    notes: tuple[str, ...]

    @property
    def frame_count(self) -> int:
        return self.picture_count if self.repeats is None else len(self.repeats)

    @property
    def picture_count(self) -> int:
        """How many pictures are shown; frames that repeat one are counted with it."""
        return int(self.shown.sum())

    @property
    def timed(self) -> bool:
        """Whether packets have the times of pictures: in AVI they count chunks, and a clock goes forward."""
        return self.times_known and self.container != "avi" and self.back_at is None

    @property
    def fps(self) -> float:
        return self._rate_and_times[0]

    @property
    def times(self) -> FrameTimes | None:
        """When frames are shown, where there is no constant rate."""
        return self._rate_and_times[1]

    @functools.cached_property
    def _rate_and_times(self) -> tuple[float, FrameTimes | None]:
        numbers = self.shown_pts if self.timed else np.zeros(1, dtype=np.int64)
        return _rate_and_times(self.path, numbers, self.tick_s, self.rate)

    @functools.cached_property
    def shown_pts(self) -> np.ndarray:
        """(F,) presentation times of the shown frames, in presentation order."""
        return np.sort(self.pts[self.shown])

    @functools.cached_property
    def position(self) -> np.ndarray:
        """(F,) packet number of frame k."""
        packets = np.flatnonzero(self.shown)
        return packets[np.argsort(self.pts[packets], kind="stable")]

    @functools.cached_property
    def numbered(self) -> bool:
        """Whether a picture's time stamp alone tells its number, so that pictures may be left undecoded.

        Holds for H.264 in containers that carry every presentation time; anything else is decoded whole and counted.
        """
        trusted = self.codec == "h264" and self.container in {"mp4", "matroska", "mpegts"} and self.in_order
        return trusted and self.rising

    @functools.cached_property
    def rising(self) -> bool:
        """Whether packets have the times of pictures, and no two the same."""
        return self.timed and bool((np.diff(self.shown_pts) > 0).all())


def scan_video(path: Path) -> VideoScan:
    """Read a video's packets once, decoding nothing; memory is 10 bytes a frame.

    Raises ReaderError for a file that is no video, holds no picture, or ends before its container says.
    """
    scan = _scan(path)
    if scan.frame_count == 0:
        raise ReaderError(f"{path}: holds no picture, frame 0 cannot be had; leave it out")
    if scan.back_at is not None and not _is_steady(scan):
        raise ReaderError(f"{path}: parts joined at frame {scan.back_at}, where its clock goes back; {_WAY_OUT}")
    if scan.damage is not None:
        raise ReaderError(
            f"{path}: {scan.damage}, frame {scan.certain_count} is the first that cannot be had; {_WAY_OUT}"
        )
    return scan


def _is_steady(scan: VideoScan) -> bool:
    """Whether times are those of the rate but for half a second, as where a writer of MPEG-PS rounds its clock."""
    time_s = (scan.shown_pts - scan.shown_pts[:1]) * float(scan.tick_s)
    return scan.damage is None and bool(
        (np.abs(time_s * float(scan.rate) - np.arange(len(time_s))) < scan.rate / 2).all()
    )


def _scan(path: Path) -> VideoScan:
    with _open_container(path) as container:
        stream = _video_stream(container, path)
        context = stream.codec_context
        packets = _read_packets(container, stream)
        family = _container_family(container.format.name)
        first, shown = _start(path, packets)
        if first and family == "avi" and context.has_b_frames:
            raise ReaderError(f"{path}: begins within a group of pictures, and its container has no times; {_WAY_OUT}")
        promised = _promised_frames(stream)
        damage = "cut short" if _ends_early(path) else packets.damage
        times_known = not packets.untimed[shown].any()
        held, repeats = _held(path, packets, shown) if family == "avi" else (len(shown), None)
        if damage is None and held < promised - 1:  # the last one alone is often missing, and costs nothing
            damage = f"holds {held} of the {promised} frames that its header promises"
        notes = []
        if damage is None and held != promised > 0:
            notes.append(f"its header promises {promised} frames, it holds {held}")
        if repeats is not None:
            notes.append(f"{len(repeats) - shown.sum()} empty chunks show the picture before them again")
        if left_out := int((~shown & ((packets.flags & _HIDDEN) == 0)).sum()):
            notes.append(f"begins within a group of pictures; {left_out} cannot be shown, frame 0 is the next")
        # A lost packet is decoded later than the last one and is shown no earlier than it is decoded.
        bounded = damage is not None and packets.last_dts is not None and times_known
        certain = (packets.pts[shown] <= packets.last_dts).sum() if bounded else shown.sum()
        return VideoScan(
            path=path,
            container=family,
            codec=context.name,
            pix_fmt=context.pix_fmt or "unknown",
            width_px=context.width,
            height_px=context.height,
            colour=(int(context.colorspace or 0), int(context.color_range or 0)),
            video_streams=len(container.streams.video),
            pts=packets.pts,
            shown=shown,
            idr=(packets.flags & _IDR) > 0,
            key_count=int(((packets.flags & _KEY) > 0).sum()),
            times_known=times_known,
            damage=damage,
            certain_count=int(certain),
            tick_s=stream.time_base,
            rate=_rate(stream),
            first=first,
            in_order=_in_order(packets, first),
            back_at=packets.back_at,
            repeats=repeats,
            notes=tuple(f"{path.name}: {note}" for note in notes),
        )


_HIDDEN, _KEY, _IDR, _B = 1, 2, 4, 8


def _start(path: Path, packets: _Packets) -> tuple[int, np.ndarray]:
    """The packet where decoding begins, and which packets (N,) are shown.

    A recording that begins within a group of pictures is shown from its first key frame on. What a key frame precedes
    but is shown before it (an open group's first pictures) is shown if the decoder gives it; programs that cut leave
    its time out.
    """
    shown = (packets.flags & _HIDDEN) == 0
    first = int(np.argmax((packets.flags & _KEY) > 0)) if len(shown) else 0
    shown[:first] = False
    leading = shown & (packets.untimed if packets.untimed.any() else packets.pts < packets.pts[first : first + 1])
    if leading.any() and not leading[first + 1 + PyavReader._MAX_REORDER :].any():
        with _open_container(path) as container:
            given = _decoded_from(container, _video_stream(container, path), first)
            try:
                picture = next(given, None)
            except _import_av().error.FFmpegError:
                picture = None
        if picture is not None and picture.pts is not None:
            shown &= ~leading | (~packets.untimed & (packets.pts >= picture.pts))
    return first, shown


def _decoded_from(container: Any, stream: Any, first: int) -> Iterator[Any]:
    """Every picture that the decoder gives from packet `first` on."""
    for packet in itertools.islice((packet for packet in container.demux(stream) if packet.size), first, None):
        yield from packet.decode()
    yield from stream.codec_context.decode(None)


def _held(path: Path, packets: _Packets, shown: np.ndarray) -> tuple[int, np.ndarray | None]:
    """How many frames an AVI file holds; which picture each (F,) shows, where empty chunks show the one before again.

    Packets' times are their places among all chunks. Where these do not rise, or are more than the file can hold, each
    packet is one frame.
    """
    pts = packets.pts
    spans = np.diff(pts, append=pts[-1:] + 1 + boxes.empty_tail(path))  # one, and one for each empty chunk after it
    usable = len(pts) and not packets.untimed.any() and (spans > 0).all() and pts[0] >= 0
    if not usable or pts[-1] >= min(boxes.MAX_PICTURES, path.stat().st_size):
        return len(shown), None
    repeats = None if (spans[shown] == 1).all() else np.arange(shown.sum()).repeat(spans[shown])
    return int(pts[0] + spans.sum()), repeats


def _in_order(packets: _Packets, first: int) -> bool:
    """Whether times tell the order in which H.264 pictures are shown: exactly B pictures are shown before one that was
    decoded earlier. Where times are those of decoding, none is."""
    timed = ~packets.untimed & (np.arange(len(packets.pts)) >= first)
    pts, is_b = packets.pts[timed], (packets.flags[timed] & _B) > 0
    return bool(((pts < np.maximum.accumulate(pts)) == is_b).all()) if len(pts) else False


@dataclass(frozen=True)
class _Packets:
    """A stream's packets in decoding order, and what went wrong on the way.

    `pts` (N,) int64, `flags` (N,) uint8, `untimed` (N,) bool: the container has no time, `pts` is the number.
    """

    pts: np.ndarray
    flags: np.ndarray
    untimed: np.ndarray
    last_dts: int | None
    back_at: int | None
    damage: str | None


def _read_packets(container: Any, stream: Any) -> _Packets:
    """All packets up to the first that is not whole. Times that the container does not tell are their numbers."""
    pts, flags, untimed = array("q"), bytearray(), bytearray()
    last_dts, back_at, damage = None, None, None
    counts_chunks = container.format.name == "avi"
    length_bytes = _nal_length_bytes(stream.codec_context.extradata)
    is_h264 = stream.codec_context.name == "h264"
    try:
        whole = (packet for packet in container.demux(stream) if packet.size)
        for packet in whole:
            if packet.is_corrupt:
                after = [packet, *itertools.islice(whole, _FIRST_PICTURES)]
                damage = "cut short or damaged" if len(after) == 1 else "damaged, or parts joined"
                back = (
                    n for n, other in enumerate(after) if None not in (other.dts, last_dts) and other.dts < last_dts
                )
                back_at = next((len(pts) + n for n in back), None) if back_at is None else back_at
                break
            is_key = packet.is_keyframe
            idr, is_b = _h264_kind(packet, length_bytes) if is_h264 else (False, False)
            flags.append(_HIDDEN * packet.is_discard | _KEY * is_key | _IDR * (is_key and idr) | _B * is_b)
            shown_at = packet.dts if counts_chunks else packet.pts
            untimed.append(shown_at is None)
            pts.append(len(pts) if shown_at is None else shown_at)
            if packet.dts is not None:
                if last_dts is not None and packet.dts < last_dts and back_at is None:
                    back_at = len(pts) - 1
                last_dts = packet.dts
    except _import_av().error.FFmpegError:
        damage = "damaged"
    times = np.frombuffer(pts.tobytes(), dtype=np.int64)
    kinds, unknown = np.frombuffer(bytes(flags), dtype=np.uint8), np.frombuffer(bytes(untimed), dtype=bool)
    return _Packets(times, kinds, unknown, last_dts, back_at, damage)


def _rate(stream: Any) -> Fraction:
    """Frames a second as the container says; 0 where it does not."""
    return stream.average_rate or stream.guessed_rate or Fraction(0)


def _promised_frames(stream: Any) -> int:
    """The header's frame count where it agrees with duration and rate, otherwise 0: edit lists hide frames from it."""
    span = stream.duration * stream.time_base * _rate(stream) if stream.duration else 0
    return stream.frames if round(span) == stream.frames else 0


def _container_family(format_name: str) -> str:
    """One name for FFmpeg's lists of aliases ("mov,mp4,m4a,3gp,3g2,mj2" is mp4)."""
    aliases = format_name.split(",")
    return next((name for name in ("mp4", "matroska") if name in aliases), aliases[0])


def _nal_length_bytes(extradata: bytes | None) -> int | None:
    """Size of the length field before each H.264 unit (ISO/IEC 14496-15 `avcC`), or None for start codes (Annex B)."""
    if extradata and len(extradata) > 4 and extradata[0] == 1:
        return (extradata[4] & 3) + 1
    return None


# Where the first slice of a picture begins, with what stands before it (x264's notes on itself have 700 bytes).
_HEAD_BYTES = 1 << 14


def _h264_kind(packet: Any, length_bytes: int | None) -> tuple[bool, bool]:
    """Whether an H.264 packet holds an IDR picture, the only one that no later one looks past, and whether a B picture.

    Its first slice says so (ITU-T H.264, 7.3.1 to 7.3.3): NAL unit type 5, and `slice_type` 1 or 6.
    """
    content = memoryview(packet)
    for at in _units(content, length_bytes):
        kind = content[at] & 31
        if kind in (1, 5):
            bits = int.from_bytes(bytes(content[at + 1 : at + 9]).ljust(8, b"\0"), "big")
            _, used = _exp_golomb(bits, 0)  # first_mb_in_slice
            slice_type, _ = _exp_golomb(bits, used)
            return kind == 5, slice_type % 5 == 1
    return False, False


def _units(content: memoryview, length_bytes: int | None) -> Iterator[int]:
    """Where the NAL units of a packet begin, after their length (`avcC`) or start code (Annex B)."""
    if length_bytes is None:
        head, at = bytes(content[:_HEAD_BYTES]), -1
        while (at := head.find(b"\x00\x00\x01", at + 1)) >= 0 and at + 3 < len(head):
            yield at + 3
        return
    offset = 0
    while offset + length_bytes < len(content):
        yield offset + length_bytes
        offset += length_bytes + int.from_bytes(content[offset : offset + length_bytes], "big")


def _exp_golomb(bits: int, used: int) -> tuple[int, int]:
    """An unsigned number (ITU-T H.264, 9.1) in 64 bits of which `used` are read, and how many are read then."""
    rest = (bits << used) & (2**64 - 1)
    zeros = 64 - rest.bit_length()
    return (rest >> max(63 - 2 * zeros, 0)) - 1, used + 2 * zeros + 1


def _ends_early(path: Path) -> bool:
    """Whether the container's own size fields reach beyond the end of the file (MP4, Matroska, AVI)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(12)
            if head[:4] == b"RIFF":
                promised = int.from_bytes(head[4:8], "little")
                return promised < 0xFFFFFFFF and 8 + promised > size
            if head[:4] == b"\x1a\x45\xdf\xa3":
                return _matroska_end(stream) > size
            return head[4:8] in boxes.TOP_LEVEL and boxes.end(stream, size) > size
    except OSError:  # a folder, or not ours to read: opening it as a video says so
        return False


def _matroska_end(stream: BinaryIO) -> int:
    """Where a Matroska file's segment ends, as its header says; 0 when unknown (live recordings)."""
    stream.seek(4)
    header_size, header_start = _ebml_number(stream, 4)
    stream.seek(header_start + (header_size or 0))
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    segment_size, segment_start = _ebml_number(stream, stream.tell())
    return segment_start + segment_size if segment_size is not None else 0


def _ebml_number(stream: BinaryIO, offset: int) -> tuple[int | None, int]:
    """An EBML size (RFC 8794, section 4) and where it ends; None is the value reserved for unknown."""
    stream.seek(offset)
    first = int.from_bytes(stream.read(1), "big")
    length = 9 - first.bit_length()
    if length > 8:
        return None, offset + 1
    bits = 7 * length
    value = int.from_bytes(bytes([first]) + stream.read(length - 1), "big") & ((1 << bits) - 1)
    return (None if value == (1 << bits) - 1 else value), offset + length


# ---------------------------------------------------------------------------------------------- PyAV


class PyavReader(ClosingReader):
    """Reads with PyAV, decoding only what the wanted frames need.

    In H.264 with known times, groups of pictures without a wanted frame are not decoded at all, nor is what follows
    the last wanted frame of a group, nor are pictures that nothing refers to (FFmpeg's `skip_frame=NONREF`, set before
    each packet); a reading that begins late seeks to the IDR picture it needs. All of it leaves the wanted pixels
    bit-identical to decoding everything. Elsewhere everything up to the last wanted frame is decoded and counted.
    """

    name = "pyav"
    # No codec FFmpeg decodes reorders over more pictures than this (H.264 and HEVC: 16).
    _MAX_REORDER = 16

    def __init__(self, scan: VideoScan, fps: float, threads: int = 1, hardware: str | None = None) -> None:
        av = _import_av()
        ffmpeg = getattr(av, "ffmpeg_version_info", None)
        self.version = f"{av.__version__} (FFmpeg {ffmpeg})" if ffmpeg else av.__version__
        self.version += f", decoded by {hardware}" if hardware is not None else ""
        self.fps = fps
        self.frame_count = scan.frame_count
        self.times = scan.times
        self._scan = scan
        self._threads = threads
        self._hardware = hardware
        self._readings: weakref.WeakSet[Any] = weakref.WeakSet()

    def read(self, frame_index: Sequence[int]) -> Iterator[np.ndarray]:
        """See FrameReader. Each call opens the file anew, so readings do not disturb each other."""
        wanted = checked_frames(frame_index, self.frame_count, self._scan.path)
        reading = self._frames(wanted) if self._scan.repeats is None else self._repeated(self._scan.repeats[wanted])
        self._readings.add(reading)
        return reading

    def spread(self, count: int) -> list[int]:
        return spread_evenly(range(self.frame_count), count)

    def close(self) -> None:
        for reading in list(self._readings):
            reading.close()

    def _repeated(self, pictures: np.ndarray) -> Iterator[np.ndarray]:
        """The wanted pictures (T,), some several times."""
        numbers, counts = np.unique(pictures, return_counts=True)
        for rgb, count in zip(self._frames(numbers.tolist()), counts.tolist(), strict=True):
            yield from itertools.repeat(rgb, count)

    def _frames(self, wanted: list[int]) -> Iterator[np.ndarray]:
        """Hold each wanted picture back until everything decoded before it has come out undamaged, then yield it."""
        if not wanted:
            return
        settled_at = self._settled_at(wanted)
        targets = deque(wanted)
        pending: deque[tuple[int, Any, int]] = deque()  # number, picture, number whose arrival settles it
        before = -1
        with self._opened(wanted) as (container, stream, packets):
            try:
                for number, picture in self._decoded(container, stream, packets, wanted):
                    if picture.is_corrupt:
                        raise self._lost(pending[0][0] if pending else targets[0], number)
                    if number <= before:
                        raise ReaderError(
                            f"{self._scan.path}: pictures leave the decoder out of the order of their times at frame "
                            f"{number}; {_WAY_OUT}"
                        )
                    before = number
                    if targets and number > targets[0]:
                        raise self._lost(targets[0], targets[0])
                    if targets and number == targets[0]:
                        pending.append((targets.popleft(), picture, settled_at[number]))
                    while pending and pending[0][2] <= number:
                        yield _upright(pending.popleft()[1], stream)
                    if not targets and not pending:
                        return
            except _import_av().error.FFmpegError as error:
                first = pending[0][0] if pending else targets[0]
                raise self._lost(first, first) from error
            if targets:
                raise self._lost(targets[0], targets[0])
            for _, picture, _ in pending:
                yield _upright(picture, stream)

    def _decoded(
        self, container: Any, stream: Any, packets: Iterator[tuple[int, Any]], wanted: list[int]
    ) -> Iterator[tuple[int, Any]]:
        """Every picture that the decoder gives, with its number, fed with what the wanted ones need."""
        context = stream.codec_context
        _use_threads(context, self._threads)
        if not self._scan.numbered:
            yield from self._counted(_decoded_from(container, stream, self._scan.first))
            return
        fed, whole = self._plan(wanted)
        last = int(self._scan.position[wanted].max())
        for at, packet in packets:
            if fed[at]:
                context.skip_frame = "DEFAULT" if whole[at] else "NONREF"
                yield from self._numbered(packet.decode())
            if at == last:
                break
        yield from self._numbered(context.decode(None))

    def _counted(self, pictures: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """Every picture with its number, counted, and checked by its time as far as the container has times.

        At a constant rate times may come in another order, as where they are those of decoding, but none may
        fail to come: the pictures after it would have wrong numbers.
        """
        scan, awaited, top = self._scan, set[int](), 0
        for number, picture in enumerate(pictures):
            if scan.times is not None and number < scan.picture_count and picture.pts != scan.shown_pts[number]:
                raise ReaderError(f"{scan.path}: frame {number} is not shown at its packet's time; {_WAY_OUT}")
            if scan.rising and picture.pts is not None:
                due = int(np.searchsorted(scan.shown_pts, picture.pts))
                awaited.update(range(top, due))
                top = max(top, due + 1)
                awaited.discard(due)
                if awaited and min(awaited) < number - self._MAX_REORDER:
                    raise self._lost(min(awaited), min(awaited))
            yield number, picture
        if awaited:
            raise self._lost(min(awaited), min(awaited))

    @contextmanager
    def _opened(self, wanted: list[int]) -> Iterator[tuple[Any, Any, Iterator[tuple[int, Any]]]]:
        """Container, stream, and its packets with their numbers, from the first that a wanted frame needs or earlier.

        Sought where the container has an index. Where a seek has landed, the packets' time stamps say: up to the needed
        one, each must be the one that the scan has there, otherwise the next attempt opens the file anew.
        """
        first = int(np.argmax(self._plan(wanted)[0])) if self._scan.numbered else 0
        for time_stamp in (*self._seek_times(first), None):
            with _open_container(self._scan.path, self._hardware) as container:
                stream = _video_stream(container, self._scan.path)
                packets = self._packets_after(container, stream, first, time_stamp)
                if packets is not None:
                    yield container, stream, packets
                    return

    def _seek_times(self, first: int) -> Iterator[int]:
        """Where to seek for packet `first`, an IDR picture: its time, then those of earlier ones.

        An index that goes by decoding time may lead behind it.
        """
        if first and self._scan.container in {"mp4", "matroska"}:
            starts = np.flatnonzero(self._scan.idr[: first + 1])
            yield from (int(self._scan.pts[starts[-back]]) for back in (1, 2, 5) if back <= len(starts))

    def _packets_after(
        self, container: Any, stream: Any, first: int, time_stamp: int | None
    ) -> Iterator[tuple[int, Any]] | None:
        """All packets (`time_stamp` None), or those from `first` on after a seek; None where that led elsewhere."""
        packets = (packet for packet in container.demux(stream) if packet.size)
        if time_stamp is None:
            return enumerate(packets)
        pts = self._scan.pts
        try:
            container.seek(time_stamp, stream=stream)
            packet = next(packets)
            at = int(np.argmax(pts == packet.pts))
            while at < first and packet.pts == pts[at]:
                packet, at = next(packets), at + 1
        except (StopIteration, _import_av().error.FFmpegError):
            return None
        if at != first or packet.pts != pts[first]:
            return None
        return itertools.chain([(first, packet)], enumerate(packets, first + 1))

    def _plan(self, wanted: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Which packets to decode, (N,) bool, and which of them even if nothing refers to them, (N,) bool."""
        scan = self._scan
        count = len(scan.pts)
        position = scan.position[wanted]
        group = np.cumsum(scan.idr)
        last_in_group = np.full(int(group[-1]) + 1, -1)
        np.maximum.at(last_in_group, group[position], position)
        whole = np.zeros(count, dtype=bool)
        whole[position] = True
        number = np.arange(count)
        return (number >= scan.first) & (number <= last_in_group[group]), whole

    def _settled_at(self, wanted: list[int]) -> dict[int, int]:
        """For each wanted number, the number by which everything decoded before it has come out."""
        if not self._scan.numbered:
            return {k: k + self._MAX_REORDER + 1 for k in wanted}
        number = np.full(len(self._scan.pts), -1)
        number[self._scan.position] = np.arange(self._scan.picture_count)
        furthest = np.maximum.accumulate(number)[self._scan.position[wanted]]
        return dict(zip(wanted, furthest.tolist(), strict=True))

    def _numbered(self, pictures: list[Any]) -> Iterator[tuple[int, Any]]:
        shown_pts = self._scan.shown_pts
        for picture in pictures:
            number = -1 if picture.pts is None else int(np.searchsorted(shown_pts, picture.pts))
            if not 0 <= number < len(shown_pts) or shown_pts[number] != picture.pts:
                raise ReaderError(f"{self._scan.path}: a picture's time stamp is not its packet's; {_WAY_OUT}")
            yield number, picture

    def _lost(self, wanted: int, damaged: int) -> ReaderError:
        cause = f" (damage at frame {damaged})" if damaged != wanted else ""
        return ReaderError(f"{self._scan.path}: damaged, frame {wanted} cannot be had{cause}; {_WAY_OUT}")


def _turns(picture: Any, stream: Any) -> int:
    """Anticlockwise quarter turns that bring a picture upright, by the container's display matrix.

    PyAV tells the angle with each picture since version 14, with the stream before. Angles between quarter turns are
    left alone, as decord does.
    """
    side_data = getattr(stream, "side_data", None) or {}
    turns = getattr(picture, "rotation", side_data.get("DISPLAYMATRIX", 0)) / 90
    return round(turns) % 4 if turns == round(turns) else 0


def _upright(picture: Any, stream: Any) -> np.ndarray:
    """The picture as a player shows it, (H, W, 3) uint8 RGB."""
    rgb: np.ndarray = picture.to_ndarray(format="rgb24")
    turns = _turns(picture, stream)
    return np.ascontiguousarray(np.rot90(rgb, turns))


_SAME_ON_HARDWARE: dict[tuple[Any, ...], bool] = {}


def _require_same_on_hardware(scan: VideoScan, hardware: str, reader: str) -> None:
    """Raise ReaderError unless the hardware's first picture is the software's to the byte.

    Decided once for each kind of picture in a process. Features then need no other name than the software's.
    """
    if reader == "decord":
        raise ReaderError(f"{scan.path}: only PyAV decodes on hardware; set data.reader=auto")
    kind = (hardware, scan.codec, scan.pix_fmt, scan.width_px, scan.height_px, scan.colour)
    if kind not in _SAME_ON_HARDWARE:
        readers = PyavReader(scan, 0.0), PyavReader(scan, 0.0, hardware=hardware)
        software, other = (next(one.read([0])) for one in readers)
        _SAME_ON_HARDWARE[kind] = np.array_equal(software, other)
        for one in readers:
            one.close()
    if not _SAME_ON_HARDWARE[kind]:
        raise ReaderError(
            f"{scan.path}: {hardware} does not give the software's pixels; leave extract.hardware_decoding unset"
        )


# ---------------------------------------------------------------------------------------------- decord


def why_not_decord(scan: VideoScan) -> str | None:
    """Why decord would give other frames than PyAV on this video, or None where it gives the same.

    From the packets alone, then by comparing the first picture, once for each kind of picture in a process.
    """
    reasons = {
        "presentation times unknown, repeated or not kept by this container or codec": not scan.numbered,
        "MPEG-TS is not sought exactly": scan.container == "mpegts",
        "an edit list hides frames": not scan.shown.all(),
        "key frames that later ones look past, as in an open GOP": not _starts_over(scan),
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
        return "this build of decord does not tell of damage"
    return _why_first_picture_differs(scan)


def _starts_over(scan: VideoScan) -> bool:
    """Whether the first packet and every key frame are IDR pictures."""
    return bool(scan.idr[0]) and scan.key_count == int(scan.idr.sum())


_PICTURE_KINDS: dict[tuple[Any, ...], str | None] = {}


def _why_first_picture_differs(scan: VideoScan) -> str | None:
    """Compare frame 0 of both readers: catches interlacing and what this machine's scalers do differently."""
    try:
        with _open_container(scan.path) as container:
            stream = _video_stream(container, scan.path)
            picture = next(container.decode(stream))
            turns = _turns(picture, stream)
            rgb = _upright(picture, stream)
    except (StopIteration, _import_av().error.FFmpegError):
        return "its first picture cannot be decoded"
    if picture.interlaced_frame:
        return "interlaced video"
    kind = (scan.codec, scan.pix_fmt, scan.width_px, scan.height_px, scan.colour, turns)
    if kind not in _PICTURE_KINDS:
        with DecordReader(scan, 0.0, PyavReader(scan, 0.0)) as decord:
            other = decord._decoded([0])
        if other is None:  # it stumbled over damage, which says nothing about this kind of picture
            return None
        _PICTURE_KINDS[kind] = None if np.array_equal(other[0], rgb) else "its first picture differs from PyAV's"
    return _PICTURE_KINDS[kind]


def _import_decord() -> ModuleType:
    import decord

    return decord


class _WatchedLog:
    """Counts what decord's own FFmpeg complains about: decord passes damaged pictures on without a word.

    FFmpeg hands every message to one callback; errors (level 16 and below) and notes of concealed damage count.
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
    """The watch on decord's log; None where decord does not bring its own libavutil beside it."""
    folder = Path(_import_decord().__file__ or "").parent.parent / "decord.libs"
    for path in sorted(folder.glob("libavutil*")):
        try:
            return _WatchedLog(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):
            continue
    return None


_OPEN_DECORD_READERS: weakref.WeakSet[DecordReader] = weakref.WeakSet()


class DecordReader(ClosingReader):
    """Reads with decord 0.6.0, in batches small enough to keep memory flat; PyAV decides where decord stumbles.

    decord's hazards and what is done: its thread goes on decoding after a batch and memory with it (`seek(0)` after
    each); a video open at interpreter exit aborts the process, and one open across a fork can hang the child (open
    only while frames are read, and closed by an exit hook: fork between readings, not within one); it repeats the last
    frame silently (its fault tolerance is set to none).
    """

    name = "decord"
    _BATCH_BYTES = 48 << 20
    _BATCH_FRAMES = 32
    _NO_FAULTS = 1e-9

    def __init__(self, scan: VideoScan, fps: float, arbiter: PyavReader) -> None:
        self.version = _import_decord().__version__
        self.fps = fps
        self.frame_count = scan.frame_count
        self.times = scan.times
        self._scan = scan
        self._arbiter = arbiter
        self._video: Any = None
        _OPEN_DECORD_READERS.add(self)

    def read(self, frame_index: Sequence[int]) -> Iterator[np.ndarray]:
        """See FrameReader."""
        return self._frames(checked_frames(frame_index, self.frame_count, self._scan.path))

    def spread(self, count: int) -> list[int]:
        return self._arbiter.spread(count)

    def close(self) -> None:
        self._video = None
        self._arbiter.close()

    def _frames(self, wanted: list[int]) -> Iterator[np.ndarray]:
        frame_bytes = 3 * self._scan.width_px * self._scan.height_px
        size = max(1, min(self._BATCH_FRAMES, self._BATCH_BYTES // frame_bytes))
        try:
            for start in range(0, len(wanted), size):
                batch = wanted[start : start + size]
                frames = self._decoded(batch)
                if frames is None:
                    yield from self._arbiter.read(batch)
                else:
                    yield from frames
        finally:
            self._video = None

    def _decoded(self, batch: list[int]) -> np.ndarray | None:
        """(N, H, W, 3) uint8 RGB; None where decord failed or its FFmpeg complained of damage."""
        log = _watched_log()
        assert log is not None  # why_not_decord has seen to it
        before = log.complaints
        try:
            if self._video is None:
                path = str(self._scan.path.resolve())
                self._video = _import_decord().VideoReader(path, num_threads=1, fault_tol=self._NO_FAULTS)
            if len(self._video) != self.frame_count:
                return None
            frames = self._video.get_batch(batch)
            rgb = frames.asnumpy() if hasattr(frames, "asnumpy") else np.asarray(frames)
            self._video.seek(0)
        except Exception as error:
            if not type(error).__module__.startswith("decord") and not isinstance(error, RuntimeError | AssertionError):
                raise
            self._video = None
            return None
        return rgb if log.complaints == before else None


@atexit.register
def _close_decord_readers() -> None:
    for reader in list(_OPEN_DECORD_READERS):
        reader.close()


# ---------------------------------------------------------------------------------------------- folders


# Pillow reads many more, some of them with other programs (EPS with Ghostscript).
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_IMAGE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


class FolderReader(ClosingReader):
    """Reads the images of a frame folder (PNG, JPEG; any size, also changing) with Pillow."""

    name = "pillow"

    def __init__(self, folder: Path, frames: FrameFolder) -> None:
        import PIL

        if not frames.files:
            raise ReaderError(f"{folder}: holds no images; leave it out")
        self.version = PIL.__version__
        self.fps = frames.fps
        self.frame_count = frames.files[-1][0] + 1
        self._folder = folder
        self._names = dict(frames.files)

    def read(self, frame_index: Sequence[int]) -> Iterator[np.ndarray]:
        """See FrameReader; only source frames that have an image can be had."""
        wanted = checked_frames(frame_index, self.frame_count, self._folder)
        missing = next((k for k in wanted if k not in self._names), None)
        if missing is not None:
            raise ReaderError(f"{self._folder}: has no image of frame {missing}; rebuild the index")
        paths = ((k, self._folder / self._names[k]) for k in wanted)
        return (decode_image(path, str(path), k) for k, path in paths)

    def spread(self, count: int) -> list[int]:
        return spread_evenly(list(self._names), count)


def decode_image(source: Path | BinaryIO, place: str, number: int) -> np.ndarray:
    """An image (PNG, JPEG) as it is meant to be seen, (H, W, 3) uint8 RGB.

    `place` and the frame's `number` are for messages. Raises ReaderError where it is missing, damaged, too large or no
    8-bit colour.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images (judged here) and of odd camera notes
            with Image.open(source, formats=_IMAGE_FORMATS) as image:
                _refuse_odd(image, place)
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise ReaderError(f"{place}: no such image (frame {number}); rebuild the index") from error
    except Image.DecompressionBombError as error:
        raise ReaderError(f"{place}: refuses to decode an image of so many pixels; replace it") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on damaged files
        raise ReaderError(
            f"{place}: damaged or not an image, frame {number} cannot be had; replace it or leave the video out"
        ) from error


def _refuse_odd(image: Any, place: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ReaderError(f"{place}: refuses to decode an image of {image.width} x {image.height} pixels")
    if image.mode not in _IMAGE_MODES:
        raise ReaderError(f"{place}: holds pixels of kind {image.mode}, not 8-bit colour; save it as RGB")


def spread_evenly(numbers: Sequence[int], count: int) -> list[int]:
    """At most `count` of the numbers, evenly spread, first and last included."""
    chosen = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return [numbers[i] for i in chosen.tolist()]
