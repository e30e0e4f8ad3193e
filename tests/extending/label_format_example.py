"""Labels as subtitles (.srt), in which each subtitle is an interval: a number, a line of times, and the label.

SURGSTAGE_PLUGINS=label_format_example.py python pipeline.py index --root DIR --set data.dataset=DATA_SET.yaml

    labels:
      phases: {files: 'op(?P<id>\\d+)\\.srt', format: srt, form: intervals, unit: clock,
               columns: {start: start, end: end, label: label}}
"""

import re
from pathlib import Path

from configs.errors import UserError
from configs.label_source import LabelSource
from features.dataset.annotations import text_lines
from features.dataset.described.records import READERS, Records

TIMES = re.compile(r"(\S+) --> (\S+)")


def read_subtitles(content: bytes, path: Path, source: LabelSource) -> Records:
    """Columns start, end (hh:mm:ss,mmm) and label. What they mean is stated in the data set's description."""
    columns: dict[str, list[str]] = {"start": [], "end": [], "label": []}
    places = []
    lines = text_lines(content, path)
    for number, line in enumerate(lines):
        if match := TIMES.fullmatch(line.strip()):
            label = lines[number + 1].strip() if number + 1 < len(lines) else ""
            for name, value in zip(columns, (match[1], match[2], label), strict=True):
                columns[name].append(value)
            places.append(f"line {number + 1}")
    if not places:
        raise UserError(f"{path}: has no line of times such as 00:00:01,000 --> 00:00:04,500")
    return Records(columns, places)


READERS.register("srt", read_subtitles)
