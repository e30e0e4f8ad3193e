"""Open a video file with the reader that the settings name."""

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
    """Open a video file. `auto` means PyAV (docs/performance.md compares the speeds of both readers).

    A reader decodes in one thread, because reading several videos at once is faster than using several threads for one.
    `hardware` is a kind of device on which FFmpeg decodes (cuda, qsv, ...); only PyAV supports it. Open a reader in the
    process that uses it. Raises ReaderError if the video cannot be read, or if decord or hardware is requested but
    would return other frames.
    """
    scan = scan_video(path)
    if hardware is not None:
        if reader == "decord":
            raise ReaderError(f"{path}: only PyAV decodes by hardware; set data.reader=auto")
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
    """Raise ReaderError unless both readers return the same bytes for the first frame.

    Because of this check, the identity of features need not record whether frames were decoded by hardware.
    """
    first, other = (next(reader.read([0])) for reader in (software, accelerated))
    software.close()
    accelerated.close()
    if not np.array_equal(first, other):
        raise ReaderError(
            f"{path}: {accelerated.hardware} returns other pixels than decoding in software; leave "
            "extract.hardware_decoding unset"
        )
