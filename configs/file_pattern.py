"""Regular expressions for the names of a data set's files."""

from __future__ import annotations

import functools
import re
from pathlib import PurePosixPath

# File name extensions of the video containers that can be read completely.
VIDEO_ENDINGS = (
    *("mp4", "m4v", "mov", "qt", "f4v", "3gp", "3g2", "avi", "divx", "mkv", "webm", "ogv", "flv", "mxf", "dv"),
    *("mpg", "mpeg", "mod", "vob", "ts", "mts", "m2ts", "m2t", "wmv", "asf"),
)
_GROUP = re.compile(r"(?<!\\)\((?:\?P<\w+>|\?:)?((?:\\.|[^()\\])*)\)(\?|\*)?")  # one without groups inside
_DIGITS = re.compile(r"\\d(?:\{(\d+)(?:,\d*)?\}|[+*])?")
_CHOICE = re.compile(r"\[([^\]])[^\]]*\](\?|\*|\+|\{\d+\})?")
# A repeated group of repetitions, (a+)+ or (\w+\s*)*. To find that a text does not match takes years if it is long.
_NESTED = re.compile(r"\((?:\?:|\?P<\w+>)?(?:(?:\\.|\[[^\]]*\]|[^()\[\]\\|+*?])[+*]\??)+\)(?:[+*]|\{\d*,)")
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff")


def quick_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern. Raises re.error if it is none, or one that could take years to match a text."""
    if slow := _NESTED.search(pattern):
        raise re.error(f"{slow[0][:60]} repeats a repetition, which can take endless time; write (ab*)+ as a[ab]*")
    return re.compile(pattern)


@functools.lru_cache(maxsize=256)
def file_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern for file names, in which `{video}` and `{image}` stand for any extension that can be read.

    Raises re.error as `quick_pattern` does.
    """
    quick_pattern(pattern)
    for name, endings in (("{video}", VIDEO_ENDINGS), ("{image}", IMAGE_ENDINGS)):
        pattern = pattern.replace(name, f"({'|'.join(endings)})")
    return re.compile(pattern, re.IGNORECASE)


def example_of(pattern: str) -> str | None:
    """Return a short name that a pattern matches, for messages; None if the pattern is too intricate to find one.

    Whatever is optional is left out, the first of several choices is taken, and numbers are 1.
    """
    text = pattern.replace("{video}", "mp4").replace("{image}", "jpg")
    while group := _GROUP.search(text):
        text = text[: group.start()] + ("" if group[2] else group[1].partition("|")[0]) + text[group.end() :]
    text = _DIGITS.sub(lambda found: "1".zfill(max(int(found[1] or 0), 2)), text)
    text = _CHOICE.sub(lambda found: "" if found[2] in ("?", "*") else found[1], text)
    text = re.sub(r"\\?.[?*]", "", text)
    text = re.sub(r"\\(.)", r"\1", text)
    return text if file_pattern(pattern).fullmatch(text) else None


def match_path(pattern: re.Pattern[str], path: PurePosixPath) -> re.Match[str] | None:
    """Match a file's name or, for a pattern with slashes, as many parts at the end of `path`, given below the root."""
    return pattern.fullmatch("/".join(path.parts[-pattern.pattern.count("/") - 1 :]))


def part_number(text: str) -> int | None:
    """Return the number of a recording's part, as the group `part` of a pattern gives it: digits, or a letter (a: 1).

    Returns None for other texts.
    """
    if len(text) == 1 and text.isascii() and text.isalpha():
        return ord(text.lower()) - ord("a") + 1
    return int(text) if re.fullmatch("[0-9]{1,4}", text) else None
