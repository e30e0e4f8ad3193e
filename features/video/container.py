"""Open a video container with PyAV, choose its video stream, and read what its headers claim."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from configs.errors import one_line
from engine.sniff import recognise_file
from features.video import mp4
from features.video.base import MAX_PIXELS, REMEDY, ReaderError

# A function such as `open_container`, which opens a video to be decoded by the named kind of device, or (None) in
# software.
Opener = Callable[[Path, str | None], Any]


def import_av() -> ModuleType:
    """Import PyAV, and silence FFmpeg's own output on stderr: all that matters is reported as errors and flags."""
    import av
    import av.logging

    av.logging.set_level(av.logging.PANIC)
    return av


def open_container(path: Path, hardware: str | None = None) -> Any:
    """Open a video as a PyAV container. With `hardware`, frames are decoded only by that kind of device.

    Raises ReaderError in one line if the file is not a readable video.
    """
    av = import_av()
    try:
        if path.stat().st_size == 0:
            raise ReaderError(f"{path}: is {recognise_file(path)}")
        if claim := mp4.overclaim(path):
            raise ReaderError(f"{path}: {claim}; {REMEDY}")
        # `file:` and the list of allowed protocols keep odd file names and disguised playlists from opening other files
        # or network addresses.
        options: dict[str, Any] = {"metadata_errors": "replace", "options": {"protocol_whitelist": "file"}}
        if hardware is not None:
            _require_flags_from_hardware(av.__version__, path)
            from av.codec.hwaccel import HWAccel

            options["hwaccel"] = HWAccel(device_type=hardware, allow_software_fallback=False)
        return av.open(f"file:{path}", **options)
    except FileNotFoundError as error:
        raise ReaderError(f"{path}: no such file; restore it, or run `index --force` to continue without it") from error
    except (av.error.FFmpegError, ImportError, OSError, RuntimeError) as error:
        what = getattr(error, "strerror", None)
        if hardware is not None:
            what = what or one_line(error, most=None)
            refusal = f"cannot be decoded by {hardware} ({what}); leave extract.hardware_decoding unset"
        elif found := recognise_file(path):
            refusal = f"not a video that can be read: it is {found}"
        elif ends_early(path):
            refusal = "cut short: not even frame 0 can be read; copy it again or leave it out"
        else:
            refusal = f"not a video that can be read ({what or type(error).__name__}); copy it again or leave it out"
        raise ReaderError(f"{path}: {refusal}") from error


def _require_flags_from_hardware(version: str, path: Path) -> None:
    """Raise ReaderError if PyAV is older than 18, which loses the damage flags of frames decoded by hardware.

    Damaged frames would then go unnoticed.
    """
    if int(version.partition(".")[0]) < 18:
        raise ReaderError(
            f"{path}: decoding by hardware needs PyAV 18 or newer, but this is {version}; leave "
            "extract.hardware_decoding unset"
        )


def video_stream(container: Any, path: Path | str) -> Any:
    """Return the stream that a player would show, which is never a cover image. Raises ReaderError if there is none."""
    find_best = getattr(container.streams, "best", None)  # since PyAV 13
    stream = find_best("video") if find_best else next(iter(container.streams.video), None)
    format_name = container.format.name
    if format_name.endswith("_pipe") or format_name in {"image2", "gif", "tty"}:
        raise ReaderError(f"{path}: is an image or a text, not a video; leave it out")
    if stream is None or stream.codec_context is None:
        raise ReaderError(f"{path}: contains no video stream that can be decoded; leave it out")
    width_px, height_px = stream.codec_context.width, stream.codec_context.height
    if width_px < 1 or height_px < 1:
        raise ReaderError(f"{path}: its video stream has no frame size; {REMEDY}")
    if width_px * height_px > MAX_PIXELS:
        raise ReaderError(f"{path}: its frames are too large to decode ({width_px} x {height_px} pixels); leave it out")
    # Decode in the calling thread. With threads per slice, FFmpeg does not set damage flags. Besides, PyAV frees
    # decoders late, and a forked child hangs if it frees a decoder with threads.
    stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the stream's packets, except empty ones, in decoding order."""
    return (packet for packet in container.demux(stream) if packet.size)


def decoded_from(container: Any, stream: Any, first: int) -> Iterator[Any]:
    """Yield every frame that the decoder returns, starting at packet `first`."""
    for packet in itertools.islice(packets_of(container, stream), first, None):
        yield from packet.decode()
    yield from stream.codec_context.decode(None)


# ---------------------------------------------------------------------------------------------- what headers promise


def header_rate(stream: Any) -> Fraction:
    """Return the frames per second according to the container; 0 if it gives no rate."""
    return stream.average_rate or stream.guessed_rate or Fraction(0)


def promised_frames(stream: Any) -> int:
    """Return the header's frame count if it agrees with duration and rate, otherwise 0.

    They differ, for example, if an edit list hides frames.
    """
    span = stream.duration * stream.time_base * header_rate(stream) if stream.duration else 0
    return stream.frames if round(span) == stream.frames else 0


def container_family(format_name: str) -> str:
    """Return a single name for FFmpeg's list of aliases of a container (mp4 for "mov,mp4,m4a,3gp,3g2,mj2")."""
    aliases = format_name.split(",")
    return next((name for name in ("mp4", "matroska") if name in aliases), aliases[0])


def ends_early(path: Path) -> bool:
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
            return head[4:8] in mp4.TOP_LEVEL and mp4.end(stream, size) > size
    except OSError:  # a folder or an unreadable file; opening it as a video will report that
        return False


def _matroska_end(stream: BinaryIO) -> int:
    """Return where a Matroska file's segment ends according to its header; 0 if it is unknown (live recordings)."""
    header_size, header_start = _ebml_number(stream, 4)
    stream.seek(header_start + (header_size or 0))
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    segment_size, segment_start = _ebml_number(stream, stream.tell())
    return segment_start + segment_size if segment_size is not None else 0


def _ebml_number(stream: BinaryIO, offset: int) -> tuple[int | None, int]:
    """Read an EBML size (RFC 8794, section 4); returns it and the offset after it. None means an unknown size."""
    stream.seek(offset)
    first = int.from_bytes(stream.read(1), "big")
    length = 9 - first.bit_length()
    if length > 8:
        return None, offset + 1
    bits = 7 * length
    value = int.from_bytes(bytes([first]) + stream.read(length - 1), "big") & ((1 << bits) - 1)
    return (None if value == (1 << bits) - 1 else value), offset + length
