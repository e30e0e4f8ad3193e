"""Compare video ids, which can be any printable text, and convert them to file names and back."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import unquote

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError

# A file name can have 255 bytes; the rest is reserved for what is appended to an id (such as `-phase.txt`).
MAX_STEM_BYTES = 240
# Path separators, characters that some file systems refuse, and `%`, which marks an escaped character.
_RESERVED = frozenset('/\\:*?"<>|%')


def normal_id(text: str) -> str:
    """Return an id in Unicode form NFC, in which all ids are kept (macOS writes file names in NFD)."""
    return unicodedata.normalize("NFC", text)


def id_key(text: str) -> str:
    """Return the key by which ids are compared: it is equal for ids that differ only in case or Unicode form."""
    return normal_id(normal_id(text).casefold())


def file_stem(video_id: str) -> str:
    """Return the file name, without extension, for a video id; `id_of_stem` is the inverse.

    Letters of any script, digits, blanks and most punctuation stay as they are. Separators, reserved characters, a
    leading dot, dash or blank, and a trailing dot or blank are percent-encoded by their UTF-8 bytes, as in URLs.
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
    """Return the video id for a file name that `file_stem` made."""
    return normal_id(unquote(stem))


def id_problem(video_id: str) -> str | None:
    """Return why a text cannot be a video id, or None if it can."""
    if not video_id:
        return "is empty"
    if "/" in video_id:
        return "contains a slash"
    if not video_id.isprintable():
        return "contains characters that cannot be printed"
    if len(file_stem(video_id).encode()) > MAX_STEM_BYTES:
        return f"is longer than {MAX_STEM_BYTES} bytes as a file name"
    return None


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that compares numbers inside texts by value, so that video9 comes before video10."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple((0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts if part)


def numbered_id(number: int, spec: DataSetSpec) -> str:
    """Return the id of the video with this number. Raises UserError if `id_format` cannot format a number."""
    try:
        return spec.id_format.format(number=number)
    except (LookupError, ValueError, AttributeError) as error:
        raise UserError(f"data set {spec.name}: id_format {spec.id_format!r} does not take a number") from error
