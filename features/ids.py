"""Video ids: any printable text, compared in one form, and turned into file names by one function."""

from __future__ import annotations

import unicodedata
from urllib.parse import unquote

# Of a file name's 255 bytes; what programs append to an id (`-phase.txt`) must still fit.
MAX_STEM_BYTES = 240
# Separators, what some file systems refuse, and `%`, by which these are escaped.
_RESERVED = frozenset('/\\:*?"<>|%')


def normal_id(text: str) -> str:
    """The one spelling in which an id is kept: Unicode NFC (macOS writes file names in NFD)."""
    return unicodedata.normalize("NFC", text)


def id_key(text: str) -> str:
    """What two spellings of one id have in common: ids that differ in case or Unicode form alone are the same video."""
    return normal_id(normal_id(text).casefold())


def file_stem(video_id: str) -> str:
    """The file name, without an ending, that stands for a video id; `id_of_stem` turns it back.

    Letters of any script, digits, blanks and most signs stay as they are. Separators, reserved characters, a leading
    dot, dash or blank, and a trailing dot or blank become percent-escapes of their UTF-8 bytes, as in addresses.
    """
    text = normal_id(video_id)
    last = len(text) - 1

    def must_be_escaped(at: int, character: str) -> bool:
        at_an_end = (at == 0 and character in ".- ") or (at == last and character in ". ")
        return at_an_end or character in _RESERVED or not character.isprintable()

    return "".join(
        "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
        if must_be_escaped(at, character)
        else character
        for at, character in enumerate(text)
    )


def id_of_stem(stem: str) -> str:
    """The video id of a file that was named by `file_stem`."""
    return normal_id(unquote(stem))


def id_problem(video_id: str) -> str | None:
    """Why a text cannot be a video id, or None."""
    if not video_id:
        return "is empty"
    if "/" in video_id:
        return "holds a slash"
    if not video_id.isprintable():
        return "holds characters that cannot be printed"
    if len(file_stem(video_id).encode()) > MAX_STEM_BYTES:
        return f"is longer than {MAX_STEM_BYTES} bytes as a file name"
    return None
