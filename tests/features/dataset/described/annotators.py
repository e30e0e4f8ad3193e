"""Write random labels of a video in the files and numbers that annotation programs use, without the project's code.

Every function follows an annotator who works carefully: who notes the frame on screen, its number, or its time as a
program displays it. Times are fractions, so that nothing is rounded except where a program would round it.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

CLASSES = ("Preparation", "Clipping & cutting", "Step 1-1", "Closure")
RATES = (*map(Fraction, (24, 25, 30, 50, 60)), Fraction(30000, 1001), Fraction(24000, 1001))
SAMPLE_RATES = (*map(Fraction, (1, 10, 25, 30, 50)), Fraction("29.97"))


@dataclass(frozen=True)
class Film:
    """A video's frames: the time in seconds at which each is shown, and when the last one ends."""

    times: tuple[Fraction, ...]
    end: Fraction
    is_steady: bool

    @property
    def count(self) -> int:
        return len(self.times)

    @property
    def fps(self) -> Fraction:
        return self.count / self.end if self.is_steady else (self.count - 1) / self.times[-1]

    def on_screen(self, time: Fraction) -> int:
        return sum(shown <= time for shown in self.times) - 1


@st.composite
def films(draw: st.DrawFn) -> Film:
    count = draw(st.integers(20, 90))
    if draw(st.booleans()):
        fps = draw(st.sampled_from(RATES))
        return Film(tuple(k / fps for k in range(count)), count / fps, is_steady=True)
    steps_ms = draw(st.lists(st.sampled_from([17, 33, 40, 41, 120, 900]), min_size=count, max_size=count))
    times = [Fraction(0)]
    for step in steps_ms[1:]:
        times.append(times[-1] + Fraction(step, 1000))
    return Film(tuple(times), times[-1] * Fraction(count, count - 1), is_steady=False)


def runs_of(labels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (first, stop, class) of each run of equal labels, without those of -1."""
    cuts = [0, *(at for at in range(1, len(labels)) if labels[at] != labels[at - 1]), len(labels)]
    return [(a, b, labels[a]) for a, b in itertools.pairwise(cuts) if labels[a] >= 0]


@st.composite
def labels_of(draw: st.DrawFn, count: int, gaps: bool = True) -> list[int]:
    """Return a class for each of `count` frames or samples, or -1 for none."""
    labels: list[int] = []
    classes = st.integers(-1 if gaps else 0, len(CLASSES) - 1)
    while len(labels) < count:
        labels += [draw(classes)] * draw(st.integers(1, max(count // 3, 1)))
    labels = labels[:count]
    return labels if any(label >= 0 for label in labels) else [0, *labels[1:]]


# ---------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Numbering:
    """How positions are written: `options` of the description, and the text or number of a frame or sample.

    The K things that are numbered are frames or samples; `shown` (K,) says which frame each of them shows.
    """

    options: Mapping[str, Any]
    shown: tuple[int, ...]
    written: tuple[Any, ...]  # (K + 1,), the last one is the end of the video
    lengths: tuple[Fraction, ...]  # (K + 1,) what the written numbers measure


def _rounded(value: Fraction, digits: int, down: bool) -> Fraction:
    scaled = value * 10**digits
    return Fraction(math.floor(scaled) if down else math.floor(scaled + Fraction(1, 2)), 10**digits)


def _clock(time: Fraction, digits: int) -> str:
    minutes, seconds = divmod(time, 60)
    text = f"{float(seconds):0{3 + digits if digits else 2}.{digits}f}"
    return f"{int(minutes) // 60:02d}:{int(minutes) % 60:02d}:{text}"


def _written_time(time: Fraction, unit: str, digits: int) -> Any:
    if unit == "millisecond":
        return int(time * 1000)
    if unit == "clock":
        return _clock(time, digits)
    return float(time) if digits else int(time)


@st.composite
def numberings(draw: st.DrawFn, film: Film) -> Numbering:
    kind = draw(st.sampled_from(["source", "sample", "time", "grid"]))
    origin = draw(st.sampled_from([0, 1]))
    if kind == "source":
        numbers = tuple(range(origin, film.count + origin + 1))
        options = {"unit": "source", "origin": origin}
        return Numbering(options, tuple(range(film.count)), numbers, tuple(map(Fraction, numbers)))
    if kind == "sample":
        rate = draw(st.sampled_from(SAMPLE_RATES))
        if film.is_steady and abs(rate - film.fps) <= film.fps / 200:  # a nominal rate: samples are the frames
            shown = tuple(range(film.count))
        else:
            shown = tuple(film.on_screen(k / rate) for k in range(math.ceil(film.end * rate)))
        numbers = tuple(range(origin, len(shown) + origin + 1))
        options = {"unit": "sample", "rate": float(rate), "origin": origin}
        return Numbering(options, shown, numbers, tuple(map(Fraction, numbers)))
    unit = draw(st.sampled_from(["second", "millisecond", "clock"]))
    if kind == "grid":  # a program that shows whole or tenths of seconds takes the frame on screen then
        digits = draw(st.sampled_from([0, 1])) if unit != "millisecond" and film.is_steady else 0
        if unit == "millisecond":
            unit = "second"
        steps = math.ceil(film.end * 10**digits)
        times = [Fraction(k, 10**digits) for k in range(steps + 1)]
        shown = tuple(film.on_screen(time) for time in times[:-1])
    else:
        digits, down = draw(st.sampled_from([3, 3, 4, 6])), draw(st.booleans())
        digits = 3 if unit == "millisecond" else digits
        times = [_rounded(time, digits, down) for time in (*film.times, film.end)]
        shown = tuple(range(film.count))
    return Numbering({"unit": unit}, shown, tuple(_written_time(time, unit, digits) for time in times), tuple(times))


def spread(film: Film, numbering: Numbering, labels: Sequence[int]) -> list[int]:
    """Return the label of each frame (F,) if that of each sample (K,) holds until the next sample."""
    found = [-1] * film.count
    for frame in range(film.count):
        before = [at for at, shown in enumerate(numbering.shown) if shown <= frame]
        # of several samples of one frame, the first
        at = numbering.shown.index(numbering.shown[before[-1]])
        found[frame] = labels[at]
    return found


# ---------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Spelling:
    """How classes are written: `options` of the description, and the text or number of each class, and of none."""

    options: Mapping[str, Any]
    names: tuple[Any, ...]
    none: Any


@st.composite
def spellings(draw: st.DrawFn, classes: Sequence[str] = CLASSES) -> Spelling:
    kind = draw(st.sampled_from(["names", "numbers", "meaning"]))
    none = draw(st.sampled_from(["idle", "-1", ""]))
    options: dict[str, Any] = {"no_label": ["idle"]} if none == "idle" else {}
    if kind == "names":
        respell = draw(st.sampled_from([str, str.upper, lambda name: name.replace(" ", "_")]))
        return Spelling(options, tuple(map(respell, classes)), none)
    if kind == "numbers":
        first = draw(st.sampled_from([0, 1]))
        return Spelling({**options, "numbers_from": first}, tuple(range(first, first + len(classes))), none)
    codes = tuple(f"G{7 - at}" for at in range(len(classes)))
    return Spelling({**options, "meaning": dict(zip(codes, classes, strict=True))}, codes, none)


# ---------------------------------------------------------------------------------------------- files


@dataclass
class Written:
    """A file of labels: its content, the description of its form, and the video whose labels it has, if several."""

    content: str
    options: dict[str, Any]
    video: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


Record = dict[str, Any]
_DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";", "blank": " "}


@st.composite
def files(draw: st.DrawFn, records: Sequence[Record], decoys: Sequence[Record]) -> Written:
    """Write records (mappings with the same fields) in a table or JSON, among `decoys` of others."""
    records, decoys = [dict(one) for one in records], [dict(one) for one in decoys]
    options: dict[str, Any] = {}
    video = None
    if draw(st.booleans()):
        video, name, other = "video07", *draw(st.sampled_from([("7", "8"), ("video07", "video08"), ("07", "x")]))
        records = [{"case": name, **one} for one in records]
        records += [{"case": other, **one} for one in decoys]
    if draw(st.booleans()):
        records = [{"who": "1", **one} for one in records] + [{"who": "2", **one} for one in decoys[:5]]
        if video is not None:
            records = [one if "case" in one else {"case": name, **one} for one in records]
        options["where"] = {"who": "1"}
    if draw(st.booleans()):
        records = draw(st.permutations(records))
    shape = draw(st.sampled_from(["table", "table", "list", "vectors", "coco", "mapping"]))
    keys = list(dict.fromkeys(key for one in records for key in one))
    if draw(st.booleans()):
        keys = draw(st.permutations(keys))
    numbers = {key: at for at, key in enumerate(keys, start=1)}
    by_name = {key: key for key in keys}
    if shape == "table":
        text, more = draw(_table(records, keys))
        columns = numbers if not more.get("header", True) or draw(st.booleans()) else by_name
    elif shape == "vectors":
        rows = [[one.get(key) for key in keys] for one in records]
        text, more, columns = (
            json.dumps({"data": {"rows": rows}}),
            {"format": "json", "records": "data.rows.*"},
            numbers,
        )
    elif shape == "coco":
        texts = {"images": [], "annotations": []}
        for number, one in enumerate(records):
            texts["images"].append({"id": number, **{key: one[key] for key in ("case", "start") if key in one}})
            rest = {key: value for key, value in one.items() if key not in ("case", "start")}
            texts["annotations"].append({"image": number, **rest})
        join = {"records": "images", "by": "image", "key": "id"}
        text, more, columns = json.dumps(texts), {"format": "json", "records": "annotations", "join": join}, by_name
    elif shape == "mapping" and len({str(one["start"]) for one in records}) == len(records):
        tree = {str(one["start"]): {key: one[key] for key in one if key != "start"} for one in records}
        text, more, columns = json.dumps(tree), {"format": "json", "records": "{start}"}, by_name
    else:
        text, more, columns = json.dumps({"all": {"of": records}}), {"format": "json", "records": "all.of"}, by_name
    options |= more
    if isinstance(columns.get("who"), int) and "where" in options:
        options["where"] = {str(columns["who"]): "1"}
    return Written(
        text, options, video, {{"case": "video"}.get(key, key): columns[key] for key in keys if key != "who"}
    )


@st.composite
def _table(draw: st.DrawFn, records: Sequence[Record], keys: Sequence[str]) -> tuple[str, dict[str, Any]]:
    texts = [[str(one.get(key, "")) for key in keys] for one in records]
    odd = any(not text or " " in text or '"' in text for row in (keys, *texts) for text in row)
    delimiter = draw(st.sampled_from(["tab", "comma", "semicolon", *([] if odd else ["blank"])]))
    header = draw(st.booleans())
    stream = io.StringIO()
    ending = draw(st.sampled_from(["\n", "\r\n"]))
    writer = csv.writer(stream, delimiter=_DELIMITERS[delimiter], lineterminator=ending)
    writer.writerows([list(keys), *texts] if header else texts)
    options = {"delimiter": delimiter, "header": header}
    return draw(st.sampled_from(["", "\ufeff"])) + stream.getvalue(), options
