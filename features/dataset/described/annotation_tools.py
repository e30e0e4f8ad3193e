"""Read files of annotation tools into columns: `format: eaf` (ELAN) and `format: labelstudio`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.label_source import TIME_UNITS, LabelSource
from features.annotation_files.eaf import eaf_records
from features.annotation_files.label_studio import Region, regions_of
from features.dataset.described.records import READERS, Records
from features.ids import id_of_stem


def read_eaf_records(content: bytes, path: Path, source: LabelSource) -> Records:
    """Read the annotations of an ELAN file, with times in seconds.

    Columns: video (the file's name), tier, track, label, start, end, annotator, participant, confidence.
    """
    if source.unit != "second":
        raise UserError(f"{path}: ELAN files have times; leave unit out of `labels` of the data set's description")
    found, notes, _ = eaf_records(content, path)
    rows = [
        {
            "video": id_of_stem(path.stem),
            "tier": one.tier,
            "track": one.interval.track,
            "label": one.interval.label,
            "start": one.interval.start_s,
            "end": one.interval.end_s,
            "annotator": one.interval.annotator or "",
            "participant": one.participant,
            "confidence": one.interval.confidence,
        }
        for one in found
    ]
    return _columns(rows, [one.place for one in found], notes, _EAF_COLUMNS)


def read_label_studio_records(content: bytes, path: Path, source: LabelSource) -> Records:
    """Read the regions of an export of Label Studio.

    Columns: video, track, tier (the same), label, start, end, annotator, kind, confidence. Predictions are read only if
    the description asks for a `kind` with `where`. Times are in seconds if the unit is, which takes the rate of the
    task's data; in other units they are frames, from 1 and with the last one included.
    """
    regions, notes = regions_of(content, path)
    if "kind" not in source.where:
        regions = [one for one in regions if one.kind == "annotation"]
    rows = [
        {
            "video": one.video,
            "track": one.track,
            "tier": one.track,
            "label": one.label,
            **dict(zip(("start", "end"), _bounds(one, path, source), strict=True)),
            "annotator": one.annotator or "",
            "kind": one.kind,
            "confidence": one.confidence,
        }
        for one in regions
    ]
    return _columns(rows, [one.place for one in regions], notes, _LABEL_STUDIO_COLUMNS)


_TICK_S = 0.001  # ELAN's times are in milliseconds, also in a file whose times are all whole seconds
_EAF_COLUMNS = ("video", "tier", "track", "label", "start", "end", "annotator", "participant", "confidence")
_LABEL_STUDIO_COLUMNS = ("video", "track", "tier", "label", "start", "end", "annotator", "kind", "confidence")


def _bounds(region: Region, path: Path, source: LabelSource) -> tuple[float, float] | tuple[int, int]:
    where = f"{path}: {region.place}"
    if source.unit in TIME_UNITS:
        if source.unit != "second":
            raise UserError(f"{where}: unit {source.unit}: Label Studio has frames; expected second, source or sample")
        if region.task_fps is None and not region.in_seconds:
            raise UserError(
                f"{where}: the task's data have no fps; in `labels` of the data set's description, say what frames "
                "count: `unit: source` (the video's own frames), or `unit: sample` with `rate` (the frameRate of the "
                "labelling configuration)"
            )
        return region.seconds(region.task_fps or 1.0)
    if region.in_seconds:
        raise UserError(f"{where}: is in seconds, not frames; leave unit out of `labels` of the data set's description")
    return int(region.start), int(region.end)


def _columns(rows: list[dict[str, Any]], places: list[str], notes: list[str], names: tuple[str, ...]) -> Records:
    columns = {name: [row[name] for row in rows] for name in names}
    return Records(columns, places, notes=tuple(notes), tick_s=_TICK_S)


READERS.register("eaf", read_eaf_records)
READERS.register("labelstudio", read_label_studio_records)
