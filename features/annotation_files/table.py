"""Read and write intervals as CSV: `video,track,label,start,end,confidence,annotator`, times in seconds."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from configs.dataset_spec import FORMULA_STARTS
from configs.errors import UserError, did_you_mean, listed
from features.annotation_files.intervals import (
    Annotations,
    Interval,
    Losses,
    VideoAnnotations,
    checked_interval,
    checked_video,
    in_milliseconds,
    text_of,
    without_empty,
)
from features.clock import clock_seconds
from features.ids import id_of_stem

COLUMNS = ("video", "track", "label", "start", "end", "confidence", "annotator")
_NEEDED = ("label", "start", "end")
_NUMBER = re.compile(r"\d{1,10}(\.\d{0,12})?|\.\d{1,12}")


def read_csv(content: bytes, path: Path) -> Annotations:
    """Read a table of intervals, separated by commas, semicolons or tabs, with columns in any order.

    Only label, start and end are needed: the video is otherwise the file's name and the track `phase`. Times are in
    seconds or as hh:mm:ss.mmm. Raises UserError naming `path` and the line at fault.
    """
    videos: dict[str, list[Interval]] = {}
    for line, row in _rows(text_of(content, path), path):
        where = f"{path}: line {line}"
        video = checked_video(row.get("video") or id_of_stem(path.stem), where)
        confidence = _fraction(row["confidence"], where) if row.get("confidence") else None
        start_s, end_s = (_seconds(row[name], name, where) for name in ("start", "end"))
        found = Interval(row.get("track", ""), row["label"], start_s, end_s, confidence, row.get("annotator") or None)
        videos.setdefault(video, []).append(checked_interval(found, where))
    read, notes = [], []
    for video, own in videos.items():
        intervals, left_out = without_empty(own)
        read.append(VideoAnnotations(video, intervals))
        notes += [f"{path.name}: {video}: {note}" for note in left_out]
    return Annotations(tuple(read), tuple(notes))


def _rows(text: str, path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return each row's line and its cells by column."""
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().casefold() for name in next(reader, [])]
        if missing := [name for name in _NEEDED if name not in header]:
            hint = did_you_mean(missing[0], header) or f" (found: {listed(header, 8)})"
            raise UserError(f"{path}: has no column {missing[0]}{hint}; expected {','.join(COLUMNS)}")
        if twice := [name for name in COLUMNS if header.count(name) > 1]:
            raise UserError(f"{path}: has the column {twice[0]} twice")
        rows = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise UserError(f"{path}: line {reader.line_num} has {len(cells)} columns, not {len(header)}")
            rows.append((reader.line_num, dict(zip(header, map(str.strip, cells), strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}: is not a CSV file ({error})") from error
    return rows


def _seconds(cell: str, name: str, where: str) -> float:
    if _NUMBER.fullmatch(cell):
        return float(cell)
    time_s = clock_seconds(cell)
    if math.isnan(time_s):
        raise UserError(f"{where}: {name} is {cell[:40]!r}, neither seconds nor hh:mm:ss.mmm")
    return time_s


def _fraction(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise UserError(f"{where}: confidence is {cell[:40]!r}, not a number") from error


def csv_text(videos: Sequence[VideoAnnotations], losses: Losses) -> str:
    """Return the table of all intervals of videos; columns of confidence and annotator only if one is given.

    Raises UserError for a text that a spreadsheet would evaluate as a formula.
    """
    every = [one for video in videos for one in video.intervals]
    optional = [name for name in COLUMNS[5:] if any(getattr(one, name) is not None for one in every)]
    buffer = io.StringIO(newline="")
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow([*COLUMNS[:5], *optional])
    for video in videos:
        for one, (start, end) in zip(video.intervals, in_milliseconds(video.intervals, losses), strict=True):
            more = {
                "confidence": "" if one.confidence is None else f"{one.confidence:.4f}",
                "annotator": one.annotator or "",
            }
            times = (f"{value // 1000}.{value % 1000:03}" for value in (start, end))
            texts = [video.video, one.track, one.label]
            if odd := [text for text in (*texts, more["annotator"]) if text.startswith(FORMULA_STARTS)]:
                raise UserError(
                    f"{video.video}: a spreadsheet would read {odd[0][:40]!r} as a formula; rename it, or choose "
                    "another format than CSV"
                )
            rows.writerow([*texts, *times, *(more[name] for name in optional)])
    return buffer.getvalue()
