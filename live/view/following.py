"""Follow the file of JSON lines that `stream` writes, one line per recognised frame."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError

MAX_LINE_BYTES = 1 << 20
_MOST_BYTES = 1 << 20  # read at once
_MOST_CLASSES = 1000
_MOST_NAME = 200


@dataclass
class Classes:
    """The names of a track's classes, in the order in which the file has them."""

    names: dict[str, int] = field(default_factory=dict)

    def number(self, name: Any) -> int:
        """Return the number of a class, a new one for a name that is not known. Raises ValueError if it is no name."""
        if not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME or not name.isprintable():
            raise ValueError("not a name of a class")
        if name not in self.names and len(self.names) >= _MOST_CLASSES:
            raise ValueError("too many classes")
        return self.names.setdefault(name, len(self.names))


@dataclass(frozen=True)
class News:
    """What a file has had since the last reading.

    Each of `rows` is [time_s, since_s, delay_s, phase, probability, probabilities of the tools, {track: [class,
    probability]}]. `reset` says that the file has begun again, so that everything before is void. `skipped` counts
    lines that were not as `stream` writes them. `classes` and `tools` are the names by number.
    """

    rows: list[list[Any]]
    classes: dict[str, list[str]]
    tools: list[str]
    reset: bool
    skipped: int

    def to_json(self) -> dict[str, Any]:
        """Return the message for the page."""
        return dict(vars(self))


class Follower:
    """Reads what is added to a file. A file that does not exist yet is waited for."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name the file that `stream --jsonl` writes")
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._offset, self._identity, self._rest, self._last_s = 0, (0, 0), b"", -math.inf
        self._tracks: dict[str, Classes] = {"phase": Classes()}
        self._tools = Classes()

    def read(self) -> News | None:
        """Return what is new, at most a megabyte of it; None if nothing is. An unreadable file counts as unchanged."""
        try:
            state = self._path.stat()
            identity = (state.st_dev, state.st_ino)
            reset = self._offset > 0 and (state.st_size < self._offset or identity != self._identity)
            if reset:
                self._begin()
            self._identity = identity
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                content = stream.read(_MOST_BYTES)
        except OSError:
            return None
        if not content and not reset:
            return None
        self._offset += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        skipped = 0
        if len(self._rest) > MAX_LINE_BYTES:  # no line of `stream`; what follows its end is read again
            self._rest, skipped = b"", 1
        rows: list[list[Any]] = []
        for line in filter(bytes.strip, lines):
            try:
                row = self._row(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
                skipped += 1
                continue
            if row[0] < self._last_s:  # a source that was started again
                rows, reset = [], True
            self._last_s = row[0]
            rows.append(row)
        classes = {name: list(known.names) for name, known in self._tracks.items()}
        return News(rows, classes, list(self._tools.names), reset, skipped)

    def _row(self, value: Any) -> list[Any]:
        """Return a line in short. Raises ValueError, TypeError or KeyError if it is not as `stream` writes it."""
        phases = self._tracks["phase"]
        probabilities = value["probabilities"]
        for name in probabilities:
            phases.number(name)
        name = value["phase_name"]
        tools = value.get("tools") or {}
        numbers = [self._tools.number(tool) for tool in tools]
        scores = [0.0] * len(self._tools.names)
        for number, score in zip(numbers, tools.values(), strict=True):
            scores[number] = _number(score, 0, 1)
        tracks = {}
        for track, one in (value.get("tracks") or {}).items():
            if track == "phase" or len(self._tracks) > _MOST_CLASSES or len(track) > _MOST_NAME:
                raise ValueError("not a name of a track")
            known = self._tracks.setdefault(track, Classes())
            for label in one.get("probabilities") or {}:
                known.number(label)
            tracks[track] = [known.number(one["name"]), _number((one.get("probabilities") or {}).get(one["name"], 1))]
        times = [_number(value[key], 0, 1e9) for key in ("time_s", "since_s", "delay_s")]
        return [*times, phases.number(name), _number(probabilities.get(name, 1), 0, 1), scores, tracks]


def _number(value: Any, least: float = 0.0, most: float = 1.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("not a number")
    # a probability may be outside by rounding
    return round(min(max(float(value), least), most), 6)
