"""Regular expressions for the names of a data set's files."""

from __future__ import annotations

import re

# File name extensions of the video containers that can be read completely.
VIDEO_ENDINGS = (
    *("mp4", "m4v", "mov", "qt", "f4v", "3gp", "3g2", "avi", "divx", "mkv", "webm", "ogv", "flv", "mxf", "dv"),
    *("mpg", "mpeg", "mod", "vob", "ts", "mts", "m2ts", "m2t", "wmv", "asf"),
)
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff")


def file_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern for file names, in which `{video}` and `{image}` stand for any extension that can be read."""
    for name, endings in (("{video}", VIDEO_ENDINGS), ("{image}", IMAGE_ENDINGS)):
        pattern = pattern.replace(name, f"({'|'.join(endings)})")
    return re.compile(pattern, re.IGNORECASE)
