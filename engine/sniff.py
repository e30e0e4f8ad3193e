"""Recognise the content of a file that cannot be read, for example a failed download or an incomplete recording.

Error messages use this to name the cause and a remedy.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

HEAD_BYTES = 4096
PICKLE = "a Python pickle"
TORCH = "a PyTorch file"
SAFETENSORS = "a file of safetensors"
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself; run `git annex get`"),
    (b"\x1f\x8b", "gzip-compressed; unpack it with gunzip"),
    (b"x\x9c", "zlib-compressed; write it again without compression"),
    (b"x\xda", "zlib-compressed; write it again without compression"),
    (b"BZh", "bzip2-compressed; unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "xz-compressed; unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive; unpack it"),
    (b"%PDF-", "a PDF document"),
    (b"{\\rtf", "a formatted document (RTF); save it as plain text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document; export it as plain text"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file of a language model"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\xff\xfe", "text in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16; save it as UTF-8"),
    (b"\0\5\x16\7", "metadata that macOS keeps beside a file (AppleDouble), not the file itself; copy that"),
)
# First bytes of the containers Matroska, MPEG program stream, ASF and Flash.
_CONTAINERS = (b"\x1a\x45\xdf\xa3", b"\0\0\x01\xba", b"\x30\x26\xb2\x75", b"FLV\x01")
# Brands of MP4 files without video: images or sound only.
_NO_VIDEO = (b"heic", b"heix", b"mif1", b"avif", b"M4A ", b"M4B ")
# Formats that are ZIP files, recognised by the names of their first members.
_ZIP_SIGNATURE = b"PK\x03\x04"
_ZIPPED = (
    (b"[Content_Types].xml", "an Office document; export it as plain text"),
    (b"xl/", "an Excel workbook; export it as plain text"),
    (b"/data.pkl", TORCH),
    (b".npy", "a NumPy archive"),
)
_PAGE = re.compile(
    rb"\s*(<!--.{0,200}-->\s*)?<(!doctype\s+html|html|head|body|script|meta)\b", re.IGNORECASE | re.DOTALL
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_ONNX = re.compile(rb"\x08[\x03-\x20]\x12.(pytorch|tf2onnx|onnx|skl2onnx|keras|paddle)", re.DOTALL | re.IGNORECASE)
_SAVED_MODEL = re.compile(rb"\x08\x01\x12.{1,5}\x0a", re.DOTALL)  # schema version 1, then the first graph
# The header of safetensors is JSON, and has its length in 8 bytes before it; the format limits that to 100 MB.
_MAX_SAFETENSORS_HEADER = 100_000_000
_DV = re.compile(rb"\x1f\x07\x00[\x3f\xbf]")  # start of a raw DV stream (header section of its first DIF block)


def holds_video(path: Path) -> bool:
    """Whether a file starts with the signature of a video container; its name does not matter."""
    try:
        with path.open("rb") as stream:
            head = stream.read(12)
    except OSError:
        return False
    return (
        head[:4] + head[8:] == b"RIFFAVI "
        or (head[4:8] == b"ftyp" and head[8:] not in _NO_VIDEO)
        or head.startswith(_CONTAINERS)
    )


def recognise_file(path: Path) -> str | None:
    """Describe the content of a file as a noun phrase, with a remedy if one is known; None if it is not recognised.

    Only the first 4 KiB are read, and the headers of the top-level boxes of an MP4 file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
            if head[4:8] in (b"ftyp", b"mdat", b"wide", b"skip") and b"moov" not in _top_level(stream, size):
                return (
                    "an MP4 file without its table of frames (no moov box), as left by an interrupted recording or "
                    "copy; copy it again, or rebuild the table with a tool such as untrunc from an intact file of the "
                    "same device"
                )
    except OSError:
        return None
    if not head:
        return "an empty file (0 bytes); copy it again or leave it out"
    if not head.strip(b"\0"):
        return "filled with zeros, as left by an interrupted copy; copy it again"
    if _DV.match(head):
        return "a raw DV stream; put it into a container: `ffmpeg -i FILE -c copy NEW.avi`"
    return recognise_start(head) or _text(head)


def recognise_start(head: bytes) -> str | None:
    """Describe a file that starts with the bytes `head`, as `recognise_file` does, by known format signatures alone."""
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return what
    if head.startswith(_ZIP_SIGNATURE):
        return next((what for name, what in _ZIPPED if name in head[:HEAD_BYTES]), "a ZIP archive; unpack it")
    if _PAGE.match(head.removeprefix(b"\xef\xbb\xbf")):
        return "a web page, so its download failed; download it again, logged in if the site asks for it"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_SAFETENSORS_HEADER:
        return SAFETENSORS
    return PICKLE if _PICKLE.match(head) else None


def recognise_weights(path: Path) -> str | None:
    """Describe a file of weights as `recognise_file` does, including formats of other frameworks."""
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:
        return None
    convert = "; convert it to a state dict of PyTorch where the program it belongs to is installed"
    if _ONNX.match(head):
        return f"an ONNX model{convert}"
    if head[4:8] == b"TFL3" or _SAVED_MODEL.match(head) or ".ckpt" in path.stem:
        return f"a file of TensorFlow{convert}"
    return recognise_file(path)


def _text(head: bytes) -> str | None:
    text = head.decode("utf-8", "replace")
    if "\ufffd" in text[:-3] or not text[:-3].translate({9: "", 10: "", 13: ""}).isprintable():
        return None
    first = " ".join(text.split())[:60]
    return f"a text that begins with {first!r}; it may be a server's error message in place of a download"


def _top_level(stream: BinaryIO, size: int) -> list[bytes]:
    """Return the kinds of an MP4 file's top-level boxes (at most the first 10,000)."""
    return [kind for kind, _, _ in itertools.islice(mp4_boxes(stream, size), 10_000)]


def mp4_boxes(
    stream: BinaryIO, size: int, containers: frozenset[bytes] = frozenset()
) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start of the body, end) of the boxes of an MP4 file of `size` bytes, in order (ISO/IEC 14496-12).

    These are the top-level boxes, and the boxes inside those whose kind is in `containers`. If the file is truncated,
    an end may lie beyond it.
    """
    offset = 0
    while offset + 8 <= size:
        stream.seek(offset)
        head = stream.read(16).ljust(16, b"\0")
        length, kind, body = int.from_bytes(head[:4], "big"), head[4:8], offset + 8
        if length == 1:
            length, body = int.from_bytes(head[8:], "big"), offset + 16
        end = offset + max(length, 8) if length else size  # length 0: the box extends to the end of the file
        yield kind, body, end
        offset = body if kind in containers else end
