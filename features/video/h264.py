"""Find out the kind of frame in an H.264 packet from the header of its first slice, without decoding (ITU-T H.264)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# The first slice begins within this many bytes, after other units (such as x264's description of itself, 700 bytes).
_HEAD_BYTES = 1 << 14


def nal_length_bytes(extradata: bytes | None) -> int | None:
    """Return the size of the length field before each NAL unit (ISO/IEC 14496-15, `avcC`), or None.

    None means that units begin with start codes instead (Annex B).
    """
    if extradata and len(extradata) > 4 and extradata[0] == 1:
        return (extradata[4] & 3) + 1
    return None


def picture_kind(packet: Any, length_bytes: int | None) -> tuple[bool, bool]:
    """Return whether a packet contains an IDR picture, and whether it contains a B-frame.

    No frame after an IDR picture refers to anything before it. The header of the first slice shows both (sections 7.3.1
    to 7.3.3): NAL unit type 5 for an IDR picture, `slice_type` 1 or 6 for a B-frame.
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
    """Yield where the NAL units of a packet begin, after their length (`avcC`) or start code (Annex B)."""
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
    """Read an unsigned Exp-Golomb number (section 9.1) from 64 bits, of which `used` have been read already.

    Returns the number, and how many bits have been read after it.
    """
    rest = (bits << used) & (2**64 - 1)
    zeros = 64 - rest.bit_length()
    return (rest >> max(63 - 2 * zeros, 0)) - 1, used + 2 * zeros + 1
