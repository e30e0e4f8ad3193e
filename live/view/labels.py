"""The labels that are made in the viewer: one CSV file of intervals per video, and every earlier state of it.

A folder of labels has `ID.csv` for each video, in the form that `annotations convert` and `index` read, with the labels
of all annotators; `history/ID.jsonl` has one line for each time it was saved. Whoever saves says which state the
changes were made on. If the file has another one by then, nothing is written and `Conflict` is raised, whether the
other change was made in another tab, by another server, or with an editor.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from configs.errors import UserError, one_line
from engine.files import atomic_path, exclusive_lock, fsync_folder, make_folder, read_bounded
from features.annotation_files.intervals import Interval, Losses, VideoAnnotations, checked_interval, without_empty
from features.annotation_files.table import csv_text, read_csv
from features.dataset.annotations import read_content
from features.ids import file_stem, id_key

HISTORY = "history"
MAX_INTERVALS = 50_000
_HISTORY_BYTES = 64 << 20  # of one file; a full one is put aside as full/ID-1.jsonl, full/ID-2.jsonl, ...
NO_FILE = "new"  # the state of a video without a file


class Conflict(UserError):
    """The labels have been changed since they were read; `current` is what they are now."""

    def __init__(self, message: str, current: Labels) -> None:
        super().__init__(message)
        self.current = current


@dataclass(frozen=True)
class Labels:
    """The labels of a video: the state of its file, which identifies its content, and the intervals of everyone."""

    state: str
    intervals: tuple[Interval, ...] = ()

    def of(self, annotator: str | None) -> list[Interval]:
        """Return one person's intervals."""
        return [one for one in self.intervals if one.annotator == annotator]

    def of_others(self, annotator: str | None) -> list[Interval]:
        """Return the intervals of everyone else."""
        return [one for one in self.intervals if one.annotator != annotator]


class LabelFolder:
    """A folder of labels. Several threads and processes may use it."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is not a folder; name a folder of labels with --labels")
        self.folder = folder
        self._last: dict[str, str] = {}  # the state in the last line of each history

    def path(self, video: str) -> Path:
        """Return the file with a video's labels."""
        return self.folder / f"{file_stem(video)}.csv"

    def read(self, video: str) -> Labels:
        """Return the labels of a video; none if there is no file. Raises UserError if it cannot be read."""
        path = self.path(video)
        if not path.exists():
            return Labels(NO_FILE)
        content = read_content(path)
        intervals: tuple[Interval, ...] = ()
        for one in read_csv(content, path).videos:
            if id_key(one.video) != id_key(video):
                raise UserError(f"{path}: has labels of {one.video}, not of {video} alone; name another folder")
            intervals += one.intervals
        return Labels(_state(content), intervals)

    def save(self, video: str, base: str, annotator: str | None, own: Sequence[Interval]) -> Labels:
        """Replace one person's labels, which were changed from the state `base`, and return all labels.

        Raises Conflict if the file is in another state, and UserError if an interval is no sound one or the folder
        cannot be written.
        """
        if len(own) > MAX_INTERVALS:
            raise UserError(f"{video}: {len(own):,} intervals; at most {MAX_INTERVALS:,} can be saved")
        path, history = self.path(video), self._history(video)
        with exclusive_lock(history.parent, "folder of labels", wait=True):
            before = self.read(video)
            if before.state != base:
                raise Conflict(f"{path}: was changed elsewhere since you opened it", before)
            kept, _ = without_empty([checked_interval(one, video) for one in own])
            after = (*before.of_others(annotator), *kept)
            content = csv_text([VideoAnnotations(video, after)], Losses()).encode()
            if _state(content) != before.state:
                if before.state not in (NO_FILE, self._last_state(video)):
                    _append(history, before)  # as it was found, so that it can be restored
                _append(history, Labels(_state(content), after))
                self._last[video] = _state(content)
                with atomic_path(path) as temporary:
                    temporary.write_bytes(content)
            return self.read(video)

    def history(self, video: str) -> list[dict[str, Any]]:
        """Return the saved states of a video, oldest first: when, and the intervals.

        Damaged lines are left out, and so are files that were put aside because they were full.
        """
        path = self._history(video)
        if not path.exists():
            return []
        found = []
        for line in read_bounded(path, _HISTORY_BYTES).splitlines():
            try:
                entry = json.loads(line)
                intervals = [_interval(one) for one in entry["intervals"]]
                found.append({"saved": str(entry["saved"]), "state": str(entry["state"]), "intervals": intervals})
            except (UserError, ValueError, TypeError, KeyError, RecursionError, AttributeError):
                continue  # the last line of a process that was killed, or not written by this program
        return found

    def _last_state(self, video: str) -> str:
        if video not in self._last:
            self._last[video] = next((entry["state"] for entry in reversed(self.history(video))), NO_FILE)
        return self._last[video]

    def _history(self, video: str) -> Path:
        return self.folder / HISTORY / f"{file_stem(video)}.jsonl"


def _state(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _append(path: Path, labels: Labels) -> None:
    """Add a line to the history and flush it to the disk."""
    saved = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entry = {"saved": saved, "state": labels.state, "intervals": [interval_json(one) for one in labels.intervals]}
    line = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode()
    try:
        if path.exists() and path.stat().st_size + len(line) >= _HISTORY_BYTES:
            numbers = itertools.count(1)
            full = make_folder(path.parent / "full")
            path.rename(next(one for n in numbers if not (one := full / f"{path.stem}-{n}.jsonl").exists()))
        new = not make_folder(path.parent).joinpath(path.name).exists()
        with path.open("ab") as stream:
            # the line of a process that was killed may have no end
            stream.write(b"" if new else b"\n")
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder of labels") from error
    if new:
        fsync_folder(path.parent)


def interval_json(one: Interval) -> dict[str, Any]:
    """Return an interval as the page and the history have it."""
    found = {"track": one.track, "label": one.label, "start": round(one.start_s, 6), "end": round(one.end_s, 6)}
    return found | {name: value for name in ("confidence", "annotator") if (value := getattr(one, name)) is not None}


def _interval(value: Any) -> Interval:
    """Return the interval that a JSON value describes. Raises ValueError or TypeError if it describes none."""
    numbers = [value["start"], value["end"], value.get("confidence", 0.0)]
    texts = [value["track"], value["label"], value.get("annotator", "")]
    if any(isinstance(one, bool) or not isinstance(one, int | float) for one in numbers):
        raise TypeError("start, end or confidence is not a number")
    if not all(isinstance(one, str) and len(one) <= 1000 for one in texts):
        raise TypeError("track, label or annotator is not a text")
    start, end, confidence = map(float, numbers)
    found = Interval(texts[0], texts[1], start, end, confidence if "confidence" in value else None, texts[2] or None)
    return checked_interval(found, "labels")


def intervals_of(value: Any, annotator: str | None) -> list[Interval]:
    """Return the intervals that the page sends, as those of `annotator`. Raises UserError if they are no such list."""
    if not isinstance(value, list) or len(value) > MAX_INTERVALS:
        raise UserError(f"intervals: expected a list of at most {MAX_INTERVALS:,}")
    try:
        given = [_interval(one) for one in value]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"intervals: {one_line(error)}") from error
    return [Interval(one.track, one.label, one.start_s, one.end_s, one.confidence, annotator) for one in given]
