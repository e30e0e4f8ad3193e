"""The reference reader, which decodes with PyAV only what the requested frames need, and detects damage."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from features.video.base import REMEDY, FrameReader, ReaderError
from features.video.container import Opener, decoded_from, import_av, open_container, packets_of, video_stream
from features.video.scan import MAX_REORDER, VideoScan


class PyavReader(FrameReader):
    """Reads with PyAV, and decodes only what the requested frames need.

    In H.264 with known times, three kinds of frames are not decoded: groups of pictures without a requested frame,
    frames after the last requested frame of a group, and frames to which no other frame refers (with FFmpeg's
    `skip_frame=NONREF`, set before each packet). A reading that does not start at the beginning seeks to the IDR
    picture that it needs. The requested pixels are bit-identical to those from decoding everything. In other videos,
    everything up to the last requested frame is decoded and counted.

    A frame is returned only when it is "settled": when all frames decoded before it have left the decoder without an
    error flag. Damage in a frame to which it refers may be reported only then.
    """

    name = "pyav"

    def __init__(self, scan: VideoScan, hardware: str | None = None, opener: Opener = open_container) -> None:
        av = import_av()
        ffmpeg = getattr(av, "ffmpeg_version_info", None)
        self.version = f"{av.__version__} (FFmpeg {ffmpeg})" if ffmpeg else av.__version__
        self.version += f", decoded by {hardware}" if hardware is not None else ""
        self.path = scan.path
        self.frame_count = scan.frame_count
        self.times = scan.times
        self.hardware = hardware
        self._scan = scan
        self._opener = opener
        self._readings: weakref.WeakSet[Any] = weakref.WeakSet()

    def _frames(self, wanted: list[int]) -> Iterator[np.ndarray]:
        """See FrameReader. Each call opens the file again, so that several readings do not interfere."""
        reading = self._settled(wanted) if self._scan.repeats is None else self._repeated(self._scan.repeats[wanted])
        self._readings.add(reading)
        return reading

    def close(self) -> None:
        for reading in list(self._readings):
            reading.close()

    def _repeated(self, pictures: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the requested coded frames (T,), of which some occur several times in a row."""
        numbers, counts = np.unique(pictures, return_counts=True)
        for rgb, count in zip(self._settled(numbers.tolist()), counts.tolist(), strict=True):
            yield from itertools.repeat(rgb, count)

    def _settled(self, wanted: list[int]) -> Iterator[np.ndarray]:
        """Yield each requested frame as soon as it is settled (see `PyavReader`)."""
        if not wanted:
            return
        settled_at = self._settled_at(wanted)
        targets = deque(wanted)
        pending: deque[tuple[int, Any, int]] = deque()  # number, frame, number of the frame that settles it
        before = -1
        with self._opened(wanted) as (container, stream, packets):
            try:
                for number, frame in self._decoded(container, stream, packets, wanted):
                    if frame.is_corrupt:
                        raise self._lost(pending[0][0] if pending else targets[0], number)
                    if number <= before:
                        raise ReaderError(
                            f"{self.path}: from frame {number} on, the decoder does not return frames in the "
                            f"order of their times; {REMEDY}"
                        )
                    before = number
                    if targets and number > targets[0]:
                        raise self._lost(targets[0])
                    if targets and number == targets[0]:
                        pending.append((targets.popleft(), frame, settled_at[number]))
                    while pending and pending[0][2] <= number:
                        yield upright(pending.popleft()[1], stream)
                    if not targets and not pending:
                        return
            except import_av().error.FFmpegError as error:
                raise self._lost(pending[0][0] if pending else targets[0]) from error
            if targets:
                raise self._lost(targets[0])
            for _, frame, _ in pending:
                yield upright(frame, stream)

    def _decoded(
        self, container: Any, stream: Any, packets: Iterator[tuple[int, Any]], wanted: list[int]
    ) -> Iterator[tuple[int, Any]]:
        """Yield every frame, with its number, that the decoder returns for the packets the requested frames need."""
        context = stream.codec_context
        if not self._scan.numbered:
            yield from self._counted(decoded_from(container, stream, self._scan.first))
            return
        needed, requested = self._plan(wanted)
        last = int(self._scan.position[wanted].max())
        for at, packet in packets:
            if needed[at]:
                context.skip_frame = "DEFAULT" if requested[at] else "NONREF"
                yield from self._numbered(packet.decode())
            if at == last:
                break
        yield from self._numbered(context.decode(None))

    def _counted(self, frames: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """Yield every frame with its number, found by counting, and check the times if the container has any.

        At a constant rate, times may be in another order (for example if they are decoding times). But no time may be
        missing, since all frames after it would have wrong numbers.
        """
        scan, awaited, top = self._scan, set[int](), 0
        for number, frame in enumerate(frames):
            if scan.times is not None and number < scan.picture_count and frame.pts != scan.shown_pts[number]:
                raise ReaderError(f"{scan.path}: frame {number} is not shown at its packet's time; {REMEDY}")
            if scan.rising and frame.pts is not None:
                due = int(np.searchsorted(scan.shown_pts, frame.pts))
                awaited.update(range(top, due))
                top = max(top, due + 1)
                awaited.discard(due)
                if awaited and min(awaited) < number - MAX_REORDER:
                    raise self._lost(min(awaited))
            yield number, frame
        if awaited:
            raise self._lost(min(awaited))

    @contextmanager
    def _opened(self, wanted: list[int]) -> Iterator[tuple[Any, Any, Iterator[tuple[int, Any]]]]:
        """Yield an open container, its stream and its numbered packets, from the first needed packet on or earlier.

        If the container has an index, this seeks. The packets' time stamps show where the seek ended: up to the needed
        packet, they must equal those of the scan. Otherwise the file is opened again for the next attempt.
        """
        first = int(np.argmax(self._plan(wanted)[0])) if self._scan.numbered else 0
        for time_stamp in (*self._seek_times(first), None):
            with self._opener(self.path, self.hardware) as container:
                stream = video_stream(container, self.path)
                packets = self._packets_after(container, stream, first, time_stamp)
                if packets is not None:
                    yield container, stream, packets
                    return

    def _seek_times(self, first: int) -> Iterator[int]:
        """Yield the times to seek to for packet `first`, an IDR picture: its own, then those of earlier IDR pictures.

        Earlier ones may be needed, since with an index by decoding time a seek may end after the packet.
        """
        if first and self._scan.container in {"mp4", "matroska"}:
            starts = np.flatnonzero(self._scan.idr[: first + 1])
            yield from (int(self._scan.pts[starts[-back]]) for back in (1, 2, 5) if back <= len(starts))

    def _packets_after(
        self, container: Any, stream: Any, first: int, time_stamp: int | None
    ) -> Iterator[tuple[int, Any]] | None:
        """Return all packets if `time_stamp` is None, otherwise those from `first` on after a seek to that time.

        Returns None if the seek ended elsewhere.
        """
        packets = packets_of(container, stream)
        if time_stamp is None:
            return enumerate(packets)
        pts = self._scan.pts
        try:
            container.seek(time_stamp, stream=stream)
            packet = next(packets)
            at = int(np.argmax(pts == packet.pts))
            while at < first and packet.pts == pts[at]:
                packet, at = next(packets), at + 1
        except (StopIteration, import_av().error.FFmpegError):
            return None
        if at != first or packet.pts != pts[first]:
            return None
        return itertools.chain([(first, packet)], enumerate(packets, first + 1))

    def _plan(self, wanted: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return two masks (N,) of packets: those to decode, and those to decode although no other frame needs them."""
        scan = self._scan
        position = scan.position[wanted]
        group = np.cumsum(scan.idr)
        last_in_group = np.full(int(group[-1]) + 1, -1)
        np.maximum.at(last_in_group, group[position], position)
        number = np.arange(len(scan.pts))
        return (number >= scan.first) & (number <= last_in_group[group]), np.isin(number, position)

    def _settled_at(self, wanted: list[int]) -> dict[int, int]:
        """Return, for each requested frame, the number of the frame whose arrival settles it (see `PyavReader`)."""
        if not self._scan.numbered:
            return {k: k + MAX_REORDER + 1 for k in wanted}
        number = np.full(len(self._scan.pts), -1)
        number[self._scan.position] = np.arange(self._scan.picture_count)
        furthest = np.maximum.accumulate(number)[self._scan.position[wanted]]
        return dict(zip(wanted, furthest.tolist(), strict=True))

    def _numbered(self, frames: list[Any]) -> Iterator[tuple[int, Any]]:
        shown_pts = self._scan.shown_pts
        for frame in frames:
            number = -1 if frame.pts is None else int(np.searchsorted(shown_pts, frame.pts))
            if not 0 <= number < len(shown_pts) or shown_pts[number] != frame.pts:
                raise ReaderError(f"{self.path}: a frame's time stamp is not its packet's; {REMEDY}")
            yield number, frame

    def _lost(self, wanted: int, damaged: int | None = None) -> ReaderError:
        cause = f" (damage at frame {damaged})" if damaged not in (None, wanted) else ""
        return ReaderError(f"{self.path}: damaged, frame {wanted} cannot be read{cause}; {REMEDY}")


def upright(frame: Any, stream: Any) -> np.ndarray:
    """Convert a decoded frame to (H, W, 3) uint8 RGB, rotated by the container's display matrix as a player does.

    Since version 14, PyAV gives the angle with each frame, and before with the stream. Angles between quarter turns are
    ignored, as decord does. Hardware returns NV12, which has the same samples as yuv420p in another order. It is
    converted to yuv420p first, since FFmpeg's conversion of NV12 to RGB rounds differently.
    """
    if frame.format.name == "nv12":
        frame = frame.reformat(format="yuv420p")
    rgb: np.ndarray = frame.to_ndarray(format="rgb24")
    side_data = getattr(stream, "side_data", None) or {}
    turns = getattr(frame, "rotation", side_data.get("DISPLAYMATRIX", 0)) / 90  # anticlockwise
    return np.ascontiguousarray(np.rot90(rgb, round(turns) % 4 if turns == round(turns) else 0))
