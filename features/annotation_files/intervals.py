"""Labelled intervals of videos, the common form of annotation files, and what their readers and writers share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import UserError
from features.ids import id_problem, normal_id

MAX_S = 1e9
DEFAULT_TRACK = "phase"
_NOT_IN_XML = re.compile("[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Interval:
    """A label that holds from `start_s` to before `end_s`, in seconds from the first frame.

    `confidence` is between 0 and 1, for labels that a model has given.
    """

    track: str
    label: str
    start_s: float
    end_s: float
    confidence: float | None = None
    annotator: str | None = None


@dataclass(frozen=True)
class VideoAnnotations:
    """The intervals of a video, its frame rate, and the path or URL of its file, as far as they are known."""

    video: str
    intervals: tuple[Interval, ...]
    fps: float | None = None
    media: str | None = None


@dataclass(frozen=True)
class Annotations:
    """The content of an annotation file: the intervals by video, and notes for the user."""

    videos: tuple[VideoAnnotations, ...]
    notes: tuple[str, ...] = ()


FrameRate = Callable[[str], float | None]  # frames per second of a video, by its id


@dataclass
class Losses:
    """What a writer could not keep, counted, for one note each."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int = 1) -> None:
        """Count something that is lost; `what` continues a number: `boundaries rounded to ms`."""
        if count:
            self.counts[what] = self.counts.get(what, 0) + count

    def notes(self) -> list[str]:
        """Return one note for each kind of loss."""
        return [f"{count:,} {what}" for what, count in self.counts.items()]


def clean_text(text: str, where: str) -> str:
    """Return a label or name with single blanks between words.

    Raises UserError, which starts with `where`, for control characters and lone surrogates: XML and UTF-8 lack them.
    """
    joined = " ".join(text.split())
    if bad := _NOT_IN_XML.search(joined):
        raise UserError(f"{where}: a text with the character {bad[0]!r}, which cannot be written; remove it")
    return joined


def checked_interval(interval: Interval, where: str) -> Interval:
    """Return the interval with clean texts. Raises UserError, which starts with `where`, if it is not a sound one."""
    start, end = interval.start_s, interval.end_s
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start <= end < MAX_S):
        raise UserError(f"{where}: from {start:.10g} s to {end:.10g} s is not an interval of a video; correct it")
    if interval.confidence is not None and not 0 <= interval.confidence <= 1:
        raise UserError(f"{where}: confidence {interval.confidence:.10g} is not between 0 and 1")
    annotator = None if interval.annotator is None else clean_text(interval.annotator, where) or None
    track, label = clean_text(interval.track, where), clean_text(interval.label, where)
    return Interval(track or DEFAULT_TRACK, label, start, end, interval.confidence, annotator)


def checked_video(name: str, where: str) -> str:
    """Return the id of a video. Raises UserError, which starts with `where`, if the name cannot be one."""
    if problem := id_problem(name):
        raise UserError(f"{where}: the video's name {problem}")
    return normal_id(name)


def without_empty(intervals: Iterable[Interval]) -> tuple[tuple[Interval, ...], list[str]]:
    """Return the intervals that have a length and a label, by track and time, and notes on the others."""
    given = list(intervals)
    kept = [one for one in given if one.label and one.end_s > one.start_s]
    unnamed = sum(not one.label for one in given)
    notes = [f"{unnamed:,} interval(s) without a label left out"] if unnamed else []
    if empty := len(given) - len(kept) - unnamed:
        notes.append(f"{empty:,} interval(s) without a length left out")
    return tuple(sorted(kept, key=lambda one: (one.track, one.start_s, one.end_s, one.label))), notes


def in_milliseconds(intervals: Sequence[Interval], losses: Losses) -> list[tuple[int, int]]:
    """Return start and end of each interval in whole milliseconds; an interval stays at least one long."""
    spans = []
    for one in intervals:
        start, end = round(one.start_s * 1000), round(one.end_s * 1000)
        rounded = sum(abs(exact * 1000 - whole) > 1e-5 for exact, whole in ((one.start_s, start), (one.end_s, end)))
        losses.add("boundaries rounded to the millisecond", rounded)
        spans.append((start, max(end, start + 1)))
    return spans


def text_of(content: bytes, path: Path) -> str:
    """Return the text of a file. Raises UserError if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
