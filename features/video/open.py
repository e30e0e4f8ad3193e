"""One function that opens any video file with the reader that the settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from features.video.base import FrameReader, ReaderError
from features.video.pyav import PyavReader
from features.video.scan import scan_video


def open_video(
    path: Path, reader: Literal["auto", "decord", "pyav"] = "auto", hardware: str | None = None
) -> FrameReader:
    """Open a video file. `auto` is PyAV (docs/performance.md has the speeds of both readers).

    Decoding takes one thread: reading several videos at once is faster than several threads on one. `hardware` is a
    kind of device that FFmpeg decodes on (cuda, qsv, ...), with PyAV only. Open a reader in the process that uses it.
    Raises ReaderError if the video cannot be read, or if decord or hardware was requested and would return other
    frames.
    """
    scan = scan_video(path)
    if hardware is not None:
        if reader == "decord":
            raise ReaderError(f"{path}: only PyAV decodes on hardware; set data.reader=auto")
        accelerated = PyavReader(scan, hardware)
        require_same_pixels(PyavReader(scan), accelerated, path)
        return accelerated
    pyav = PyavReader(scan)
    if reader != "decord":
        return pyav
    from features.video.decord import DecordReader, why_not_decord

    reason = why_not_decord(scan)
    if reason is not None:
        raise ReaderError(f"{path}: decord does not return the right frames here ({reason}); use auto or pyav")
    return DecordReader(scan, pyav)


def require_same_pixels(software: PyavReader, accelerated: PyavReader, path: Path) -> None:
    """Raise ReaderError unless both return the same bytes for the first frame.

    Features decoded by hardware can then keep the identity of those decoded in software.
    """
    first, other = (next(reader.read([0])) for reader in (software, accelerated))
    software.close()
    accelerated.close()
    if not np.array_equal(first, other):
        raise ReaderError(
            f"{path}: {accelerated.hardware} does not return the software's pixels; leave extract.hardware_decoding "
            "unset"
        )
