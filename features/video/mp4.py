"""Read the tables of MP4 files, and check their claims before FFmpeg opens a file.

FFmpeg creates an index entry for every frame that a header claims, even if the file is too small for it: with a damaged
count of 50 million, this takes gigabytes and minutes. A frame has at least one byte, so no table may claim more frames
than the file has bytes (ISO/IEC 14496-12, `stsz` and `trun`).
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from engine.sniff import mp4_boxes

MAX_FRAMES = 20_000_000  # frames of a video, nine days at 25 fps; sound may have more samples
MAX_BOXES = 500_000  # hours of fragments have about 100,000 boxes; more are meant to exhaust whoever reads the file
# Kinds of boxes at the top level of an MP4 or QuickTime file.
TOP_LEVEL = frozenset(
    {b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"sidx", b"styp", b"uuid", b"mfra"}
)
_AVI_ENTRY = np.dtype([("stream", "S2"), ("kind", "S2"), ("flags", "<u4"), ("offset", "<u4"), ("size", "<u4")])
_CONTAINERS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"edts"})


def overclaim(path: Path) -> str | None:
    """Describe a claim in a file's tables that its size makes impossible; None if there is none, or it is not MP4.

    Only headers are read. Raises OSError if the file cannot be read.
    """
    size = path.stat().st_size
    samples, sound = 0, False
    with path.open("rb") as stream:
        for number, (kind, body, _) in enumerate(mp4_boxes(stream, size, _CONTAINERS)):
            if number == MAX_BOXES:  # any further boxes are not checked
                return f"its tables have more than {MAX_BOXES:,} parts"
            if kind == b"hdlr":
                sound = _read(stream, body + 8, 4) == b"soun"
            elif kind == b"stsz":
                each, count = struct.unpack(">II", _read(stream, body + 4, 8))
                if max(each, 1) * count > size or (count > MAX_FRAMES and not sound):
                    return f"its header claims {count:,} frames, more than the file can contain"
            elif kind == b"trun":
                samples += int.from_bytes(_read(stream, body + 4, 4), "big")
                if samples > min(size, 4 * MAX_FRAMES):
                    return f"its fragments claim {samples:,} frames, more than the file can contain"
    return None


def frame_times(path: Path) -> NDArray[np.int64] | None:
    """Read from an MP4 file's tables when its frames are shown: (N,) ticks of the video track, in decoding order.

    Returns None if the tables are not sufficient for this: with several video tracks, fragments, edits that cut or
    pause, or empty frames, and for files that are not MP4.
    """
    size = path.stat().st_size
    tracks: list[dict[bytes, bytes]] = []
    with path.open("rb") as stream:
        for kind, body, _ in itertools.islice(mp4_boxes(stream, size, _CONTAINERS), MAX_BOXES):
            if kind == b"moof":
                return None
            if kind == b"trak":
                tracks.append({})
            elif tracks and kind == b"stsz":
                each, count = struct.unpack(">II", _read(stream, body + 4, 8))
                tracks[-1][kind] = b"" if each else _read(stream, body + 12, min(4 * count, size) // 4 * 4)
            elif tracks and kind in {b"hdlr", b"elst", b"stts", b"ctts"}:
                rows = int.from_bytes(_read(stream, body + 4, 4), "big") if kind != b"hdlr" else 1
                tracks[-1][kind] = _read(stream, body + 8, min(8 * rows, size) // 8 * 8)
    video = [track for track in tracks if track.get(b"hdlr", b"")[:4] == b"vide"]
    if len(video) != 1 or len(video[0].get(b"elst", b"")) > 8:
        return None
    if not np.frombuffer(video[0].get(b"stsz", b""), ">u4").all():
        return None
    steps = _repeated(video[0].get(b"stts", b""))
    delays = _repeated(video[0][b"ctts"]) if b"ctts" in video[0] else np.zeros_like(steps)
    if len(steps) != len(delays) or not len(steps) or steps.min() < 0:
        return None
    return np.cumsum(steps) - steps + delays


def _repeated(table: bytes) -> NDArray[np.int64]:
    """Expand a table of pairs (count, value) to an array; empty if it would have more than `MAX_FRAMES` values."""
    counts, values = np.frombuffer(table, ">i4").astype(np.int64).reshape(-1, 2).T
    usable = (counts >= 0).all() and counts.sum() <= MAX_FRAMES
    return values.repeat(counts) if usable else values[:0]


def empty_tail(path: Path) -> int:
    """Return how many empty chunks are at the end of an AVI file's first video stream, by its index (`idx1`)."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        offset = 12
        for _ in range(MAX_BOXES):
            kind, length = struct.unpack("<4sI", _read(stream, offset, 8))
            if kind == b"idx1":
                entries = np.frombuffer(_read(stream, offset + 8, min(length, size) // 16 * 16), _AVI_ENTRY)
                video = entries[np.isin(entries["kind"], (b"dc", b"db"))]
                filled = np.flatnonzero(video["size"][video["stream"] == video["stream"][:1]])
                return int((video["stream"] == video["stream"][:1]).sum() - filled[-1] - 1) if len(filled) else 0
            offset += 8 + length + length % 2
            if offset + 8 > size:
                break
    return 0


def end(stream: BinaryIO, size: int) -> int:
    """Return where the boxes of a file of `size` bytes end, according to the headers of the top-level boxes."""
    last = 0
    for kind, _, stop in itertools.islice(mp4_boxes(stream, size), MAX_BOXES):
        if kind not in TOP_LEVEL:  # these are trailing bytes, not a box
            break
        last = stop
    return last


def _read(stream: BinaryIO, offset: int, count: int) -> bytes:
    """Read `count` bytes, filled up with zeros if the file ends before."""
    stream.seek(offset)
    return stream.read(count).ljust(count, b"\0")
