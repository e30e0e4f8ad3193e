"""Find out from a video's packets how many frames it has, when each is shown, and whether this is reliable.

This takes one pass over the packets; only the first frames are decoded. `features.video.base` defines the terms.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from features.video import h264, mp4
from features.video.base import REMEDY, ReaderError
from features.video.container import (
    container_family,
    decoded_from,
    ends_early,
    header_rate,
    import_av,
    open_container,
    packets_of,
    promised_frames,
    video_stream,
)
from features.video.times import FrameTimes

# No codec that FFmpeg decodes moves a frame further in the order than this (H.264 and HEVC: 16).
MAX_REORDER = 16
# This many frames show whether the decoder returns frames in the order of their times.
_FIRST_FRAMES = 3 * MAX_REORDER
# A video with fewer IDR pictures is not split, since each part must be decoded from the IDR picture before it.
_MANY_STARTS = 4
_HIDDEN, _KEY, _IDR, _B = 1, 2, 4, 8


@dataclass(frozen=True)
class VideoInfo:
    """Rate, frame count and times of a video.

    If the rate is not constant, `times` contains the times of the frames, and `fps` is the mean rate. `notes` describe
    irregularities of the container and how they were handled.
    """

    fps: float
    frame_count: int
    times: FrameTimes | None = None
    notes: tuple[str, ...] = ()


def probe_video(path: Path) -> VideoInfo:
    """Find out rate, frame count and times from the container; only the first few frames are decoded.

    For an MP4 file with a constant rate, its own tables are used if they agree with its duration. Otherwise the packets
    are read: other containers have no such tables, and edit lists may hide frames. Raises ReaderError if the file is
    not a video or is shorter than its container claims, or if frames or their times cannot be determined.
    """
    info, shown_pts = _from_tables(path)
    if info is None or info.times is not None:  # varying times may come from a damaged table, so read the packets
        scan = scan_video(path)
        info = VideoInfo(scan.fps, scan.frame_count, scan.times, scan.notes)
        shown_pts = scan.shown_pts if scan.timed else None
    notes = info.notes + _check_first_frames(path, shown_pts, info.times is not None)
    if info.times is not None:
        notes += (f"{path.name}: no constant rate, {info.fps:.4g} fps on average; frames are taken by their own times",)
    return dataclasses.replace(info, notes=notes)


def _from_tables(path: Path) -> tuple[VideoInfo | None, np.ndarray | None]:
    """Return what an MP4 file's tables say, and the times (F,) of its frames in ticks.

    Both are None if the tables are not sufficient.
    """
    with open_container(path) as container:
        stream = video_stream(container, path)
        promised, pts = promised_frames(stream), mp4.frame_times(path)
        try:
            first_is_key = next((packet.is_keyframe for packet in packets_of(container, stream)), False)
        except import_av().error.FFmpegError:
            first_is_key = False
        if pts is None or len(pts) != promised or pts[0] != pts.min() or not first_is_key or ends_early(path):
            return None, None
        shown_pts = np.sort(pts)
        fps, times = _rate_and_times(path, shown_pts, stream.time_base, header_rate(stream))
        return VideoInfo(fps, promised, times), shown_pts


def _check_first_frames(path: Path, shown_pts: np.ndarray | None, variable: bool) -> tuple[str, ...]:
    """Return a note if the first frames show that time stamps are not presentation times.

    Raises ReaderError if the rate varies as well, so that no frame's time is known. Damage in these frames is ignored.
    """
    with open_container(path) as container:
        seen: list[int] = []
        try:
            for frame in itertools.islice(decoded_from(container, video_stream(container, path), 0), _FIRST_FRAMES):
                seen += [] if frame.pts is None else [frame.pts]
        except import_av().error.FFmpegError:
            pass  # reading will report the damage, if it affects requested frames
    back = next((k for k in range(1, len(seen)) if seen[k] <= seen[k - 1]), None)
    if back is None or shown_pts is None:
        return ()
    if variable:
        raise ReaderError(
            f"{path}: its rate varies, and from frame {back} on its time stamps are not the times of its frames, so no "
            f"frame's time is known; {REMEDY}"
        )
    return (f"{path.name}: from frame {back} on, time stamps are not the times of the frames; frames are counted",)


def _rate_and_times(
    path: Path, shown_pts: np.ndarray, tick_s: Fraction, rate: Fraction
) -> tuple[float, FrameTimes | None]:
    """Return the rate of frames shown at `shown_pts` (F,), increasing, and their times if the rate is not constant.

    Raises ReaderError if there is no rate.
    """
    fps, span_s = float(rate), float((shown_pts[-1] - shown_pts[0]) * tick_s)
    mean = (len(shown_pts) - 1) / span_s if span_s > 0 else fps
    if not mean > 0:
        raise ReaderError(f"{path}: has no frame rate; {REMEDY}")
    try:
        times = FrameTimes.of_stream(shown_pts, tick_s, fps or mean)
        return (fps if fps and (times is None or abs(mean - fps) < 0.01 * fps) else mean), times
    except ValueError as error:
        raise ReaderError(f"{path}: {error}; {REMEDY}") from error


def first_frame_s(path: Path) -> float:
    """Return when the first frame is shown, in seconds from the container's start (its earliest stream, often sound).

    Raises ReaderError as `scan_video` does, and if the frames have no times.
    """
    scan = scan_video(path)
    if scan.container == "avi":  # has no times; all streams start together
        return 0.0
    if not scan.timed:
        raise ReaderError(f"{path}: its frames have no times, so their distance from the container's start is unknown")
    with open_container(path) as container:
        start_s = Fraction(container.start_time or 0, 1_000_000)
    return round(float(int(scan.shown_pts[0]) * scan.tick_s - start_s), 6)


def count_packets(path: Path) -> int:
    """Count the complete frames in a file (packets that are shown) without decoding.

    The count equals the frame count of an intact video, and is smaller if the file is incomplete. Raises ReaderError if
    the file is not a video.
    """
    return _scan(path).frame_count


def has_many_starts(paths: Sequence[Path]) -> bool:
    """Whether reading a video, in one or several files, from its middle is cheap.

    It is if frames are known by their times, and IDR pictures are frequent. Raises ReaderError as `scan_video` does.
    """
    scans = [scan_video(path) for path in paths]
    return all(scan.numbered for scan in scans) and sum(int(scan.idr.sum()) for scan in scans) >= _MANY_STARTS


# ---------------------------------------------------------------------------------------------- the scan


@dataclass(frozen=True)
class Packets:
    """A stream's N packets in decoding order, and the problems that occurred while reading them.

    `pts` (N,) int64 are presentation times in ticks, and `flags` (N,) uint8 the packets' flags. Where `untimed` (N,)
    bool is true, the container gives no time, and `pts` is the packet's number. `back_at` is the packet at which the
    decoding clock goes back.
    """

    pts: np.ndarray
    flags: np.ndarray
    untimed: np.ndarray
    last_dts: int | None
    back_at: int | None
    damage: str | None

    def flagged(self, flag: int) -> np.ndarray:
        """Return whether each packet has this flag, (N,) bool."""
        return (self.flags & flag) > 0


@dataclass(frozen=True)
class VideoScan:
    """What one pass over a video's N packets shows, without decoding. Arrays are in decoding order.

    `tick_s` is the unit of the packets' times. `shown` (N,) bool says whether a packet's frame is shown: an edit list
    must not hide it, and everything it depends on must exist. `times_known` says whether every shown packet has a time.
    `damage` says why frames are missing; the first `certain_count` frames are certain nevertheless. `first` is the
    packet where decoding begins. If frames are shown repeatedly (empty chunks of AVI), `repeats` (F,) int64 is the
    coded frame that each frame shows; otherwise it is None.
    """

    path: Path
    container: str
    codec: str
    pix_fmt: str
    width_px: int
    height_px: int
    video_streams: int
    packets: Packets
    shown: np.ndarray
    times_known: bool
    damage: str | None
    certain_count: int
    tick_s: Fraction
    rate: Fraction
    first: int
    repeats: np.ndarray | None
    notes: tuple[str, ...]

    @property
    def pts(self) -> np.ndarray:
        """The packets' presentation times in ticks, (N,) int64."""
        return self.packets.pts

    @functools.cached_property
    def idr(self) -> np.ndarray:
        """Whether each packet is an H.264 IDR picture, (N,) bool. No frame after one refers to anything before it."""
        return self.packets.flagged(_IDR)

    @property
    def key_count(self) -> int:
        """The number of packets that are key frames, whether IDR pictures or not."""
        return int(self.packets.flagged(_KEY).sum())

    @property
    def frame_count(self) -> int:
        return self.picture_count if self.repeats is None else len(self.repeats)

    @property
    def picture_count(self) -> int:
        """The number of coded frames that are shown. A frame that repeats another is not counted separately."""
        return int(self.shown.sum())

    @property
    def timed(self) -> bool:
        """Whether the packets' times are presentation times.

        They are not in AVI, where they count chunks, nor if the clock goes back.
        """
        return self.times_known and self.container != "avi" and self.packets.back_at is None

    @property
    def fps(self) -> float:
        """The rate, or the mean rate if it varies. Raises ReaderError if there is none."""
        return self._rate_and_times[0]

    @property
    def times(self) -> FrameTimes | None:
        """The times at which frames are shown, or None if the rate is constant."""
        return self._rate_and_times[1]

    @functools.cached_property
    def _rate_and_times(self) -> tuple[float, FrameTimes | None]:
        numbers = self.shown_pts if self.timed else np.zeros(1, dtype=np.int64)
        return _rate_and_times(self.path, numbers, self.tick_s, self.rate)

    @functools.cached_property
    def shown_pts(self) -> np.ndarray:
        """The presentation times of the shown frames, (F,), in presentation order."""
        return np.sort(self.pts[self.shown])

    @functools.cached_property
    def position(self) -> np.ndarray:
        """The packet number of each frame k, (F,)."""
        packets = np.flatnonzero(self.shown)
        return packets[np.argsort(self.pts[packets], kind="stable")]

    @functools.cached_property
    def numbered(self) -> bool:
        """Whether a frame's time stamp alone determines its number, so that frames may be left undecoded.

        This is so for H.264 in containers that have all presentation times; other videos are decoded fully and counted.
        """
        if self.codec != "h264" or self.container not in {"mp4", "matroska", "mpegts"}:
            return False
        return _in_presentation_order(self.packets, self.first) and self.rising

    @functools.cached_property
    def rising(self) -> bool:
        """Whether all packets have presentation times, and no two are equal."""
        return self.timed and bool((np.diff(self.shown_pts) > 0).all())


def scan_video(path: Path) -> VideoScan:
    """Read a video's packets once without decoding; this takes 10 bytes of memory per frame.

    Raises ReaderError if the file is not a video, contains no frame, or is shorter than its container claims.
    """
    scan = _scan(path)
    if scan.frame_count == 0:
        raise ReaderError(f"{path}: contains no frame, so frame 0 cannot be read; leave it out")
    if scan.packets.back_at is not None and not _is_steady(scan):
        raise ReaderError(
            f"{path}: has parts joined at frame {scan.packets.back_at}, where its clock goes back; {REMEDY}"
        )
    if scan.damage is not None:
        raise ReaderError(
            f"{path}: {scan.damage}; frame {scan.certain_count} is the first that cannot be read; {REMEDY}"
        )
    return scan


def _is_steady(scan: VideoScan) -> bool:
    """Whether times differ from the rate by less than half a second, as when a writer of MPEG-PS rounds its clock."""
    time_s = (scan.shown_pts - scan.shown_pts[:1]) * float(scan.tick_s)
    error = np.abs(time_s * float(scan.rate) - np.arange(len(time_s)))
    return scan.damage is None and bool((error < scan.rate / 2).all())


def _scan(path: Path) -> VideoScan:
    with open_container(path) as container:
        stream = video_stream(container, path)
        context = stream.codec_context
        packets = _read_packets(container, stream)
        family = container_family(container.format.name)
        first, shown = _start(path, packets)
        if first and family == "avi" and context.has_b_frames:
            raise ReaderError(f"{path}: begins within a group of pictures, and its container has no times; {REMEDY}")
        promised = promised_frames(stream)
        damage = "cut short" if ends_early(path) else packets.damage
        times_known = not packets.untimed[shown].any()
        held, repeats = _held(path, packets, shown) if family == "avi" else (len(shown), None)
        if damage is None and held < promised - 1:  # the last frame is often missing, which does no harm
            damage = f"contains only {held} of the {promised} frames that its header claims"
        notes = []
        if damage is None and held != promised > 0:
            notes.append(f"its header claims {promised} frames, but it contains {held}")
        if repeats is not None:
            notes.append(f"{len(repeats) - shown.sum()} empty chunks show the frame before them again")
        if left_out := int((~shown & ~packets.flagged(_HIDDEN)).sum()):
            notes.append(f"begins within a group of pictures; {left_out} cannot be shown; frame 0 is the next")
        # A lost packet would be decoded after the last packet, and is shown no earlier than it is decoded.
        bounded = damage is not None and packets.last_dts is not None and times_known
        certain = (packets.pts[shown] <= packets.last_dts).sum() if bounded else shown.sum()
        return VideoScan(
            path=path,
            container=family,
            codec=context.name,
            pix_fmt=context.pix_fmt or "unknown",
            width_px=context.width,
            height_px=context.height,
            video_streams=len(container.streams.video),
            packets=packets,
            shown=shown,
            times_known=times_known,
            damage=damage,
            certain_count=int(certain),
            tick_s=stream.time_base,
            rate=header_rate(stream),
            first=first,
            repeats=repeats,
            notes=tuple(f"{path.name}: {note}" for note in notes),
        )


def _start(path: Path, packets: Packets) -> tuple[int, np.ndarray]:
    """Return the packet where decoding begins, and which packets are shown, (N,) bool.

    A recording that begins within a group of pictures is shown from its first key frame on. In an open group, the first
    packets follow the key frame but would be shown before it; they are shown if the decoder returns them. Programs that
    cut videos give such packets no times.
    """
    shown = ~packets.flagged(_HIDDEN)
    first = int(np.argmax(packets.flagged(_KEY))) if len(shown) else 0
    shown[:first] = False
    leading = shown & (packets.untimed if packets.untimed.any() else packets.pts < packets.pts[first : first + 1])
    if leading.any() and not leading[first + 1 + MAX_REORDER :].any():
        with open_container(path) as container:
            try:
                frame = next(decoded_from(container, video_stream(container, path), first), None)
            except import_av().error.FFmpegError:
                frame = None
        if frame is not None and frame.pts is not None:
            shown &= ~leading | (~packets.untimed & (packets.pts >= frame.pts))
    return first, shown


def _held(path: Path, packets: Packets, shown: np.ndarray) -> tuple[int, np.ndarray | None]:
    """Return how many frames an AVI file has and, if empty chunks repeat some, which coded frame each shows, (F,).

    A packet's time is its position among all chunks. If positions do not increase, or are larger than the file allows,
    each packet counts as one frame.
    """
    pts = packets.pts
    spans = np.diff(pts, append=pts[-1:] + 1 + mp4.empty_tail(path))  # 1 + the number of empty chunks that follow
    usable = len(pts) and not packets.untimed.any() and (spans > 0).all() and pts[0] >= 0
    if not usable or pts[-1] >= min(mp4.MAX_FRAMES, path.stat().st_size):
        return len(shown), None
    repeats = None if (spans[shown] == 1).all() else np.arange(shown.sum()).repeat(spans[shown])
    return int(pts[0] + spans.sum()), repeats


def _in_presentation_order(packets: Packets, first: int) -> bool:
    """Whether the time stamps of H.264 packets are presentation times.

    By presentation times, exactly the B-frames are shown before a frame that was decoded earlier. By decoding times, no
    frame is.
    """
    timed = ~packets.untimed & (np.arange(len(packets.pts)) >= first)
    pts, is_b = packets.pts[timed], packets.flagged(_B)[timed]
    return bool(((pts < np.maximum.accumulate(pts)) == is_b).all()) if len(pts) else False


def _read_packets(container: Any, stream: Any) -> Packets:
    """Read all packets up to the first incomplete one. If the container gives no time, it is the packet's number."""
    pts, flags, untimed = array("q"), bytearray(), bytearray()
    last_dts, back_at, damage = None, None, None
    counts_chunks = container.format.name == "avi"
    length_bytes = h264.nal_length_bytes(stream.codec_context.extradata)
    is_h264 = stream.codec_context.name == "h264"
    try:
        packets = packets_of(container, stream)
        for packet in packets:
            if packet.is_corrupt:
                after = [packet, *itertools.islice(packets, _FIRST_FRAMES)]
                damage = "cut short or damaged" if len(after) == 1 else "damaged, or joined from parts"
                back = (
                    n for n, other in enumerate(after) if None not in (other.dts, last_dts) and other.dts < last_dts
                )
                back_at = next((len(pts) + n for n in back), None) if back_at is None else back_at
                break
            is_key = packet.is_keyframe
            idr, is_b = h264.picture_kind(packet, length_bytes) if is_h264 else (False, False)
            flags.append(_HIDDEN * packet.is_discard | _KEY * is_key | _IDR * (is_key and idr) | _B * is_b)
            shown_at = packet.dts if counts_chunks else packet.pts
            untimed.append(shown_at is None)
            pts.append(len(pts) if shown_at is None else shown_at)
            if packet.dts is not None:
                if last_dts is not None and packet.dts < last_dts and back_at is None:
                    back_at = len(pts) - 1
                last_dts = packet.dts
    except import_av().error.FFmpegError:
        damage = "damaged"
    times = np.frombuffer(pts.tobytes(), dtype=np.int64)
    kinds, unknown = np.frombuffer(bytes(flags), dtype=np.uint8), np.frombuffer(bytes(untimed), dtype=bool)
    return Packets(times, kinds, unknown, last_dts, back_at, damage)
