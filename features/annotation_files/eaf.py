"""Read and write ELAN's annotation files (`.eaf`), versions 2.7 to 3.0: one tier per track, times in milliseconds.

Written files have a tier per track. Intervals of a track that overlap, or that have different annotators, are on
further tiers of linguistic type `further-tier`, named `phase (2)`, since ELAN allows no overlaps in a tier. The
confidence of an interval is the value of a dependent annotation, on a tier of linguistic type `confidence`.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from configs.errors import UserError, one_line
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
from features.ids import id_of_stem

_VERSIONS = ("2.7", "2.8", "3.0")
_MILLISECONDS = re.compile(r"\d{1,12}")
_CONFIDENCE, _FURTHER = "confidence", "further-tier"
_SUFFIX = re.compile(r"(.+) \(\d+\)")
_SCHEMA = "http://www.w3.org/2001/XMLSchema-instance"
_DATE = "1970-01-01T00:00:00+00:00"  # equal annotations give equal bytes, and ELAN requires a date
_CONSTRAINTS = {
    "Time_Subdivision": "Time subdivision of parent annotation's time interval, no time gaps allowed within this "
    "interval",
    "Symbolic_Subdivision": "Symbolic subdivision of a parent annotation. Annotations refering to the same parent are "
    "ordered",
    "Symbolic_Association": "1-1 association with a parent annotation",
    "Included_In": "Time alignable annotations within the parent annotation's time interval, gaps are allowed",
}
_MOST_LAYERS = 100  # of intervals that overlap; each needs a tier of its own
_MIME_TYPES = {".mp4": "video/mp4", ".mpg": "video/mpeg", ".mpeg": "video/mpeg", ".mov": "video/quicktime"}


@dataclass
class EafAnnotation:
    """One annotation: its value, and its time slots or the annotation that it belongs to."""

    id: str
    value: str = ""
    slots: tuple[str, str] | None = None
    parent: str = ""
    span: tuple[float, float] | None = None  # milliseconds


@dataclass
class Tier:
    """A tier with its annotations in the order of the file."""

    id: str
    type: str
    annotator: str
    participant: str
    annotations: list[EafAnnotation] = field(default_factory=list)


@dataclass(frozen=True)
class EafRecord:
    """One annotation of an ELAN file: its tier, the tier's track, and its interval, whose label may be empty."""

    tier: str
    participant: str
    place: str
    interval: Interval


# ---------------------------------------------------------------------------------------------- reading


class _Document:
    """What the parser reports of an ELAN file; all other content is dropped while reading."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.version = self.time_units = ""
        self.media: list[str] = []
        self.time_origins: list[str] = []
        self.slots: dict[str, float] = {}
        self.tiers: list[Tier] = []
        self.odd_slot: str | None = None
        self._value: list[str] | None = None

    def start(self, tag: str, given: dict[str, str]) -> None:
        if self.root is None:
            self.root, self.version = tag, given.get("FORMAT") or given.get("VERSION", "")
        elif tag == "HEADER":
            self.time_units = given.get("TIME_UNITS", "")
        elif tag == "MEDIA_DESCRIPTOR":
            self.media.append(given.get("RELATIVE_MEDIA_URL") or given.get("MEDIA_URL", ""))
            self.time_origins.append(given.get("TIME_ORIGIN", "0"))
        elif tag == "TIME_SLOT":
            self._add_slot(given.get("TIME_SLOT_ID", ""), given.get("TIME_VALUE"))
        elif tag == "TIER":
            type_of_tier, annotator = given.get("LINGUISTIC_TYPE_REF", ""), given.get("ANNOTATOR", "")
            self.tiers.append(Tier(given.get("TIER_ID", ""), type_of_tier, annotator, given.get("PARTICIPANT", "")))
        elif tag == "ALIGNABLE_ANNOTATION" and self.tiers:
            slots = given.get("TIME_SLOT_REF1", ""), given.get("TIME_SLOT_REF2", "")
            self.tiers[-1].annotations.append(EafAnnotation(given.get("ANNOTATION_ID", ""), slots=slots))
        elif tag == "REF_ANNOTATION" and self.tiers:
            parent = given.get("ANNOTATION_REF", "")
            self.tiers[-1].annotations.append(EafAnnotation(given.get("ANNOTATION_ID", ""), parent=parent))
        elif tag == "ANNOTATION_VALUE":
            self._value = []

    def data(self, text: str) -> None:
        if self._value is not None:
            self._value.append(text)

    def end(self, tag: str) -> None:
        if tag == "ANNOTATION_VALUE" and self._value is not None:
            if self.tiers and self.tiers[-1].annotations:
                self.tiers[-1].annotations[-1].value = "".join(self._value)
            self._value = None

    def close(self) -> None:
        """Called by the parser at the end."""

    def _add_slot(self, slot: str, value: str | None) -> None:
        if value is None:  # not aligned: between its neighbours
            return
        if _MILLISECONDS.fullmatch(value):
            self.slots[slot] = float(value)
        else:
            self.odd_slot = self.odd_slot or slot


def eaf_records(content: bytes, path: Path) -> tuple[list[EafRecord], list[str], list[str]]:
    """Return the annotations of an ELAN file, notes for the user, and the media files that it names.

    Annotations of dependent tiers have the time of what they refer to; a parent's time is divided evenly among several
    annotations of one tier, and so is the time between aligned slots among those that are not aligned, as ELAN shows
    them. Raises UserError naming `path` and the annotation at fault.
    """
    document = _parsed(content, path)
    notes = []
    if document.version not in _VERSIONS:
        notes.append(f"{path.name}: EAF version {document.version or '(none)'}; read like 3.0")
    confidence = _confidences(document, path, notes)
    _place_all(document.tiers, document.slots)
    records = []
    for tier in document.tiers:
        if tier.type == _CONFIDENCE and all(one.parent for one in tier.annotations):
            continue
        further = _SUFFIX.fullmatch(tier.id) if tier.type == _FURTHER else None
        track = further[1] if further else tier.id
        for one in tier.annotations:
            place = f"annotation {one.id or '(no id)'} of tier {tier.id}"
            if one.span is None:
                raise UserError(f"{path}: {place} has no time: its slots or its parent are missing; align it in ELAN")
            start_s, end_s = (value / 1000 for value in one.span)
            found = Interval(track, one.value, start_s, end_s, confidence.get(one.id), tier.annotator or None)
            records.append(EafRecord(tier.id, tier.participant, place, checked_interval(found, f"{path}: {place}")))
    return records, notes, document.media


def read_eaf(content: bytes, path: Path) -> Annotations:
    """Read an ELAN file; the video's id is the file's name. Raises UserError as `eaf_records` does."""
    records, notes, media = eaf_records(content, path)
    intervals, left_out = without_empty(one.interval for one in records)
    video = checked_video(id_of_stem(path.stem), str(path))
    notes += [f"{path.name}: {note}" for note in left_out]
    return Annotations((VideoAnnotations(video, intervals, None, next(iter(media), None) or None),), tuple(notes))


def _parsed(content: bytes, path: Path) -> _Document:
    """Parse without entities: a document type declaration, without which there are none, is refused."""
    text = text_of(content, path)
    if "<!DOCTYPE" in text:
        raise UserError(f"{path}: has a document type declaration, which ELAN never writes; remove it")
    document = _Document()
    parser = ET.XMLParser(target=document)
    try:
        parser.feed(text)
        parser.close()
    except (ET.ParseError, ValueError) as error:
        raise UserError(f"{path}: is not XML: {one_line(error)}") from error
    if document.root != "ANNOTATION_DOCUMENT":
        raise UserError(f"{path}: is not an ELAN file: its root is {str(document.root)[:60]!r}")
    if document.time_units not in ("", "milliseconds"):
        raise UserError(f"{path}: times in {document.time_units[:40]!r}; save it in milliseconds with a current ELAN")
    if shifted := [origin for origin in document.time_origins if origin.strip("+-0")]:
        raise UserError(
            f"{path}: a media file with an offset (TIME_ORIGIN {shifted[0][:20]!r}), so it is not clear when "
            "labels start; remove the offset in ELAN (media synchronisation)"
        )
    if document.odd_slot is not None:
        raise UserError(f"{path}: time slot {document.odd_slot[:40]!r} is not a number of milliseconds")
    return document


def _confidences(document: _Document, path: Path, notes: list[str]) -> dict[str, float]:
    """Return the confidence of annotations by their id, from the tiers that hold it."""
    found: dict[str, float] = {}
    for tier in document.tiers:
        if tier.type != _CONFIDENCE:
            continue
        for one in tier.annotations:
            try:
                value = float(one.value)
            except ValueError:
                value = -1.0
            if one.parent and 0 <= value <= 1:
                found[one.parent] = value
            elif one.parent:
                notes.append(f"{path.name}: confidence {one.value[:20]!r} is not between 0 and 1, and is left out")
    return found


def _place_all(tiers: Sequence[Tier], slots: dict[str, float]) -> None:
    """Give each annotation its span, as far as it can be known."""
    spans: dict[str, tuple[float, float]] = {}
    for tier in tiers:
        times = _with_unaligned(tier, slots)
        for one in tier.annotations:
            if one.slots and one.slots[0] in times and one.slots[1] in times:
                one.span = spans[one.id] = times[one.slots[0]], times[one.slots[1]]
    siblings: dict[str, list[list[EafAnnotation]]] = {}  # by parent: the annotations of each tier that refer to it
    for tier in tiers:
        of_tier: dict[str, list[EafAnnotation]] = {}
        for one in tier.annotations:
            if one.parent:
                of_tier.setdefault(one.parent, []).append(one)
        for parent, group in of_tier.items():
            siblings.setdefault(parent, []).append(group)
    waiting = list(spans)
    while waiting:
        parent = waiting.pop()
        start, end = spans[parent]
        for group in siblings.pop(parent, ()):
            for at, one in enumerate(group):
                one.span = start + (end - start) * at / len(group), start + (end - start) * (at + 1) / len(group)
                spans[one.id] = one.span
                waiting.append(one.id)


def _with_unaligned(tier: Tier, slots: dict[str, float]) -> dict[str, float]:
    """Return the times of slots, with those that are not aligned evenly between the aligned ones around them."""
    following = {one.slots[0]: one.slots[1] for one in tier.annotations if one.slots}
    if all(slot in slots for pair in following.items() for slot in pair):
        return slots
    times, seen = dict(slots), set()
    for first in following:
        if first not in slots:
            continue
        chain = [following[first]]
        while chain[-1] not in times and chain[-1] in following and chain[-1] not in seen:
            seen.add(chain[-1])
            chain.append(following[chain[-1]])
        if chain[-1] in times:
            start, end = times[first], times[chain[-1]]
            times |= {slot: start + (end - start) * (at + 1) / len(chain) for at, slot in enumerate(chain[:-1])}
    return times


# ---------------------------------------------------------------------------------------------- writing


def eaf_text(video: VideoAnnotations, losses: Losses) -> str:
    """Return the text of an ELAN file (EAF 3.0) with a video's intervals; what it cannot hold is added to `losses`."""
    root = ET.Element("ANNOTATION_DOCUMENT", AUTHOR="surgstage", DATE=_DATE, FORMAT="3.0", VERSION="3.0")
    ET.register_namespace("xsi", _SCHEMA)
    root.set(f"{{{_SCHEMA}}}noNamespaceSchemaLocation", "http://www.mpi.nl/tools/elan/EAFv3.0.xsd")
    header = ET.SubElement(root, "HEADER", MEDIA_FILE="", TIME_UNITS="milliseconds")
    if video.media:
        _link_media(header, video.media)
    last = ET.SubElement(header, "PROPERTY", NAME="lastUsedAnnotationId")
    order = ET.SubElement(root, "TIME_ORDER")
    bounds: list[int] = []  # the time of each slot, by its number; ELAN wants them in order
    last.text = str(_write_tiers(root, video.intervals, bounds, losses))
    rank = {slot: at for at, slot in enumerate(sorted(range(len(bounds)), key=lambda slot: (bounds[slot], slot)), 1)}
    for slot, at in rank.items():
        ET.SubElement(order, "TIME_SLOT", TIME_SLOT_ID=f"ts{at}", TIME_VALUE=str(bounds[slot]))
    for one in root.iter("ALIGNABLE_ANNOTATION"):
        for name in ("TIME_SLOT_REF1", "TIME_SLOT_REF2"):
            one.set(name, f"ts{rank[int(one.get(name, ''))]}")
    for name in ("default-lt", _FURTHER):
        ET.SubElement(
            root, "LINGUISTIC_TYPE", GRAPHIC_REFERENCES="false", LINGUISTIC_TYPE_ID=name, TIME_ALIGNABLE="true"
        )
    about = {"GRAPHIC_REFERENCES": "false", "LINGUISTIC_TYPE_ID": _CONFIDENCE, "TIME_ALIGNABLE": "false"}
    ET.SubElement(root, "LINGUISTIC_TYPE", {"CONSTRAINTS": "Symbolic_Association", **about})
    for name, description in _CONSTRAINTS.items():
        ET.SubElement(root, "CONSTRAINT", DESCRIPTION=description, STEREOTYPE=name)
    ET.indent(root, "    ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _link_media(header: ET.Element, media: str) -> None:
    name = PurePosixPath(media).name
    url = media if "://" in media else f"file://{media}" if media.startswith("/") else f"./{name}"
    kind = _MIME_TYPES.get(PurePosixPath(name).suffix.lower(), "video/*")
    relative = f"./{name}"
    ET.SubElement(header, "MEDIA_DESCRIPTOR", MEDIA_URL=url, MIME_TYPE=kind, RELATIVE_MEDIA_URL=relative)


def _write_tiers(root: ET.Element, intervals: Sequence[Interval], bounds: list[int], losses: Losses) -> int:
    """Write a tier per track, further ones for overlaps and annotators, and confidences; returns how many annotations.

    The times of slots are added to `bounds`, and annotations refer to slots by their position there.
    """
    layers = _layers(list(zip(intervals, in_milliseconds(intervals, losses), strict=True)))
    taken = {one.track for one in intervals}
    count, seen = 0, set()
    for layer in layers:
        first = layer[0][0]
        further = first.track in seen
        seen.add(first.track)
        name = _free_name(first.track, taken) if further else first.track
        tier = ET.SubElement(root, "TIER", LINGUISTIC_TYPE_REF=_FURTHER if further else "default-lt", TIER_ID=name)
        if first.annotator is not None:
            tier.set("ANNOTATOR", first.annotator)
        numbers = {}
        for one, span in layer:
            count += 1
            numbers[count] = one
            annotation = ET.SubElement(ET.SubElement(tier, "ANNOTATION"), "ALIGNABLE_ANNOTATION")
            slots = {"TIME_SLOT_REF1": str(len(bounds)), "TIME_SLOT_REF2": str(len(bounds) + 1)}
            annotation.attrib |= {"ANNOTATION_ID": f"a{count}", **slots}
            bounds += span
            ET.SubElement(annotation, "ANNOTATION_VALUE").text = one.label
        count = _write_confidence(root, name, numbers, taken, count)
    return count


def _write_confidence(root: ET.Element, parent: str, numbers: dict[int, Interval], taken: set[str], count: int) -> int:
    """Write the confidences of a tier's annotations, given by their number, as a dependent tier."""
    given = {number: one.confidence for number, one in numbers.items() if one.confidence is not None}
    if not given:
        return count
    wanted = f"{parent} {_CONFIDENCE}"
    name = _free_name(wanted, taken) if wanted in taken else wanted
    taken.add(name)
    tier = ET.SubElement(root, "TIER", LINGUISTIC_TYPE_REF=_CONFIDENCE, PARENT_REF=parent, TIER_ID=name)
    for number, value in given.items():
        count += 1
        annotation = ET.SubElement(ET.SubElement(tier, "ANNOTATION"), "REF_ANNOTATION")
        annotation.attrib |= {"ANNOTATION_ID": f"a{count}", "ANNOTATION_REF": f"a{number}"}
        ET.SubElement(annotation, "ANNOTATION_VALUE").text = f"{value:.4f}"
    return count


def _layers(spanned: Sequence[tuple[Interval, tuple[int, int]]]) -> list[list[tuple[Interval, tuple[int, int]]]]:
    """Return the intervals, with their spans, in groups of one track and annotator in which none overlap."""
    layers: dict[tuple[str, str], list[list[tuple[Interval, tuple[int, int]]]]] = {}
    for one, span in sorted(spanned, key=lambda pair: (pair[0].track, pair[0].annotator or "", pair[1])):
        groups = layers.setdefault((one.track, one.annotator or ""), [])
        group = next((group for group in groups if group[-1][1][1] <= span[0]), None)
        if group is None:
            group = []
            groups.append(group)
            if len(groups) > _MOST_LAYERS:
                raise UserError(f"track {one.track}: more than {_MOST_LAYERS} of its intervals overlap; correct them")
        group.append((one, span))
    return [group for groups in layers.values() for group in groups]


def _free_name(name: str, taken: set[str]) -> str:
    number = next(at for at in range(2, len(taken) + 3) if f"{name} ({at})" not in taken)
    taken.add(f"{name} ({number})")
    return f"{name} ({number})"
