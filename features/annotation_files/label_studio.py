"""Read and write Label Studio's JSON for the timelines of videos (tag `TimelineLabels`).

A region has `ranges`, whose frames are numbered from 1 and include the last one, and `timelinelabels`. The number of
frames per second is not in a region: it is the `frameRate` of the tag `Video`, which the labelling configuration
written here takes from each task's `fps`. Regions of audio timelines (`labels`) are in seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

from configs.errors import UserError, one_line
from configs.schema import MAX_FPS
from features.annotation_files.intervals import (
    MAX_S,
    Annotations,
    FrameRate,
    Interval,
    Losses,
    VideoAnnotations,
    checked_interval,
    checked_video,
    text_of,
    without_empty,
)
from features.ids import file_stem

MAX_FRAME = 10**9
# As in labels of intervals (features.dataset.described): times in ms are up to half of one before their frame.
_TOLERANCE_S = 5e-4 + 1e-7
_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # put before the names of uploaded files
_VIDEO_NAME = re.compile(r"\.(mp4|m4v|mov|avi|mkv|webm|mpe?g|wmv|ts|mts|vob|ogg|ogv)$", re.IGNORECASE)
LOCAL_FILES = "/data/local-files/?d="  # where Label Studio serves files of its own disk


@dataclass(frozen=True)
class Region:
    """A labelled region: in frames from 1 to `end` inclusive, or, if `in_seconds`, in seconds to before `end`.

    `kind` is annotation or prediction; `task_fps` is the rate that the task's data give, and `media` the path of the
    video's file, where they name one.
    """

    video: str
    track: str
    label: str
    start: float
    end: float
    in_seconds: bool
    kind: str
    place: str
    confidence: float | None = None
    annotator: str | None = None
    task_fps: float | None = None
    media: str | None = None

    def seconds(self, fps: float) -> tuple[float, float]:
        """Return start and end in seconds, for a video (or `frameRate`) of `fps`."""
        return (self.start, self.end) if self.in_seconds else ((self.start - 1) / fps, self.end / fps)


# ---------------------------------------------------------------------------------------------- reading


def regions_of(content: bytes, path: Path) -> tuple[list[Region], list[str]]:
    """Return the regions of an export of Label Studio (JSON or JSON-MIN), and notes for the user.

    Cancelled annotations are ignored. Raises UserError naming `path` and the task at fault.
    """
    tree = _parsed(content, path)
    found: list[Region] = []
    notes: list[str] = []
    skipped: dict[str, int] = {}
    for number, task in enumerate(tree, start=1):
        where = f"task {str(task.get('id', number))[:20] if isinstance(task, dict) else number}"
        if not isinstance(task, dict):
            raise UserError(f"{path}: {where} is {type(task).__name__}, not an object; export as JSON")
        for results in _results(task, where, path, skipped):
            found += _corrected(results, path, notes)
    for kind, count in skipped.items():
        notes.append(f"{path.name}: {count} result(s) of type {kind} left out, which are no intervals")
    return found, notes


def read_label_studio(content: bytes, path: Path, fps_of: FrameRate = lambda video: None) -> Annotations:
    """Read an export of Label Studio; a video's predictions are read only if it has no annotations.

    The rate is that of the task (`data.fps`), or else `fps_of` the video. Raises UserError if there is none.
    """
    regions, notes = regions_of(content, path)
    videos: dict[str, list[Region]] = {}
    for region in regions:
        videos.setdefault(region.video, []).append(region)
    read = []
    for video, own in videos.items():
        if any(one.kind == "annotation" for one in own):
            own = [one for one in own if one.kind == "annotation"]
        else:
            notes.append(f"{path.name}: {video} has no annotations; its predictions are read")
        fps = next((one.task_fps for one in own if one.task_fps), None) or fps_of(video)
        intervals, left_out = without_empty(_interval(one, fps, path) for one in own)
        notes += [f"{path.name}: {video}: {note}" for note in left_out]
        read.append(VideoAnnotations(video, intervals, fps, own[0].media))
    return Annotations(tuple(read), tuple(notes))


def _interval(region: Region, fps: float | None, path: Path) -> Interval:
    where = f"{path}: {region.place}"
    rate = region.task_fps or fps
    if rate is None and not region.in_seconds:
        raise UserError(
            f"{where}: frames at an unknown rate: the task's data have no fps; give the frameRate of the labelling "
            "configuration with --fps, or an index with --index"
        )
    start_s, end_s = region.seconds(rate or 1.0)
    found = Interval(region.track, region.label, start_s, end_s, region.confidence, region.annotator)
    return checked_interval(found, where)


def _parsed(content: bytes, path: Path) -> list[Any]:
    try:
        tree = json.loads(text_of(content, path), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {one_line(error, 120)}") from error
    if isinstance(tree, dict) and ("data" in tree or "annotations" in tree):
        return [tree]
    if not isinstance(tree, list):
        raise UserError(f"{path}: is not a list of tasks; export from Label Studio as JSON or JSON-MIN")
    return tree


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _results(task: dict[str, Any], where: str, path: Path, skipped: dict[str, int]) -> Iterator[list[Region]]:
    """Yield the regions of each annotation and prediction of a task."""
    flat = not isinstance(task.get("data"), dict)
    data: dict[str, Any] = task if flat else task["data"]
    (video, media), fps = _video_of(task, data, f"{path}: {where}"), _fps_of(data, f"{path}: {where}")
    if flat and "annotations" not in task:  # JSON-MIN
        who = _annotator(task.get("annotator"))
        about = Region(video, "", "", 0, 0, False, "annotation", where, None, who, fps, media)
        regions = []
        for name, values in task.items():
            for value in values if isinstance(values, list) else ():
                if isinstance(value, dict) and "timelinelabels" in value:
                    regions += _regions(value, "timelinelabels", replace(about, track=name), path)
        yield regions
        return
    for kind in ("annotations", "predictions"):
        for at, one in enumerate(_list(task.get(kind), f"{path}: {where}: {kind}"), start=1):
            if not isinstance(one, dict) or one.get("was_cancelled"):
                continue
            place = f"{where}, {kind[:-1]} {at}"
            who = _annotator(one.get("completed_by") if kind == "annotations" else one.get("model_version"))
            about = Region(video, "", "", 0, 0, False, kind[:-1], place, None, who, fps, media)
            regions = []
            for result in _list(one.get("result"), f"{path}: {place}: result"):
                regions += _of_result(result, about, path, skipped)
            yield regions


def _of_result(result: Any, about: Region, path: Path, skipped: dict[str, int]) -> list[Region]:
    """Return the regions of one result, or count it in `skipped` if it is of another type."""
    kind = str(result.get("type"))[:40] if isinstance(result, dict) else type(result).__name__
    value = result.get("value") if isinstance(result, dict) else None
    if kind not in ("timelinelabels", "labels") or not isinstance(value, dict):
        skipped[kind] = skipped.get(kind, 0) + 1
        return []
    score = _number(result.get("score"))
    place = f"{about.place}, region {str(result.get('id'))[:20]}"
    track = result.get("from_name")
    about = replace(about, track=track if isinstance(track, str) else "", place=place, confidence=score)
    return _regions(value, kind, about, path)


def _regions(value: dict[str, Any], kind: str, about: Region, path: Path) -> list[Region]:
    """Return a region for each range and label of a result's value."""
    where = f"{path}: {about.place}"
    in_seconds = kind == "labels"
    spans = [value] if in_seconds else _list(value.get("ranges"), f"{where}: ranges")
    regions = []
    for span in spans:
        start, end = (_number(span.get(name)) if isinstance(span, dict) else None for name in ("start", "end"))
        most = MAX_S if in_seconds else MAX_FRAME
        if start is None or end is None or not 0 <= start <= end <= most:
            raise UserError(f"{where}: start and end must be numbers from 0 in increasing order")
        if not in_seconds and not (start.is_integer() and end.is_integer()):
            raise UserError(f"{where}: frames {start:g} to {end:g} are not whole numbers")
        for label in _list(value.get(kind), f"{where}: {kind}"):
            if not isinstance(label, str):
                raise UserError(f"{where}: label {str(label)[:40]!r} is not a text")
            regions.append(replace(about, label=label, start=start, end=end, in_seconds=in_seconds))
    return regions


def _corrected(regions: Sequence[Region], path: Path, notes: list[str]) -> list[Region]:
    """Return the regions of one annotation, with frames from 1 if they count from 0, and a note on such frames.

    Label Studio's own example of a model for timelines writes frames from 0, and the first frame after the end. Only a
    frame 0 shows that.
    """
    where = f"{path.name}: {regions[0].place}" if regions else ""
    if any(not (one.in_seconds or one.start) for one in regions):
        notes.append(
            f"{where}: has a frame 0, but Label Studio counts from 1; all regions are read as from 0 and without their "
            "last frame, as its example of a model writes them"
        )
        return [one if one.in_seconds else replace(one, start=one.start + 1, end=max(one.end, 1)) for one in regions]
    starts = {(one.track, one.start) for one in regions if not one.in_seconds and one.end > one.start}
    if shared := sum((one.track, one.end) in starts for one in regions if not one.in_seconds and one.end > one.start):
        notes.append(f"{where}: {shared} region(s) end in the frame in which another one begins")
    return list(regions)


def _video_of(task: dict[str, Any], data: dict[str, Any], where: str) -> tuple[str, str | None]:
    """Return the id of a task's video and the path of its file: `data.video_id`, or else the file's name."""
    texts = [value for value in (*data.values(), task.get("file_upload")) if isinstance(value, str)]
    named = data.get("video") if isinstance(data.get("video"), str) else None
    url = named or next((text for text in texts if _VIDEO_NAME.search(text)), None)
    try:
        parts = urlsplit(url or "")
        place = parse_qs(parts.query).get("d", [unquote(parts.path)])[0].replace("\\", "/")
    except ValueError:
        place = url or ""
    name = _UPLOAD.sub("", PurePosixPath(place).name, count=1)
    media = name if place.startswith("/") else place
    if isinstance(given := data.get("video_id"), str) and given:
        return checked_video(given, where), media or None
    if not name:
        raise UserError(f"{where} names no video in its data; expected a key video (or video_id)")
    return checked_video(_VIDEO_NAME.sub("", name) or name, where), media


def _fps_of(data: dict[str, Any], where: str) -> float | None:
    given = data.get("fps")
    if given is None:
        return None
    fps = _number(float(given) if isinstance(given, str) and re.fullmatch(r"\d{1,4}(\.\d{1,9})?", given) else given)
    if fps is None or not 1e-3 <= fps <= MAX_FPS:
        raise UserError(f"{where}: fps {str(given)[:20]!r} is not a frame rate")
    return fps


def _annotator(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("email") or value.get("id")
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**53:
        return None
    return float(value)


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{where} is {type(value).__name__}, not a list")
    return value


# ---------------------------------------------------------------------------------------------- writing


def label_studio_tasks(
    videos: Sequence[VideoAnnotations], fps_of: FrameRate, losses: Losses, media: str = LOCAL_FILES
) -> list[dict[str, Any]]:
    """Return a task for each video, ready for import as JSON.

    If each of a video's intervals has a confidence, they are predictions, otherwise annotations. The video is looked
    for at `media` followed by the path of its file, or by its name only if that path is absolute. Raises UserError if
    the rate of a video's frames is not known.
    """
    tasks = []
    for one in videos:
        fps = one.fps or fps_of(one.video)
        if fps is None:
            raise UserError(f"{one.video}: Label Studio counts frames; give their rate with --fps, or --index FILE")
        place = one.media or f"{file_stem(one.video)}.mp4"
        place = PurePosixPath(place).name if place.startswith("/") or "://" in place else str(PurePosixPath(place))
        data = {
            "video": media + quote(place),
            "video_id": one.video,
            "fps": int(fps) if float(fps).is_integer() else fps,
        }
        predicted = bool(one.intervals) and all(interval.confidence is not None for interval in one.intervals)
        given = [_annotation(who, own, fps, predicted, losses) for who, own in _by_annotator(one.intervals, one.video)]
        tasks.append({"data": data, "predictions" if predicted else "annotations": given})
    return tasks


def _by_annotator(intervals: Sequence[Interval], video: str) -> list[tuple[str | None, list[tuple[str, Interval]]]]:
    """Return the intervals, each with an id of its own, by annotator."""
    groups: dict[str | None, list[tuple[str, Interval]]] = {}
    for number, one in enumerate(intervals, start=1):
        groups.setdefault(one.annotator, []).append((f"{video}-{number}", one))
    return list(groups.items())


def _annotation(
    who: str | None, own: Sequence[tuple[str, Interval]], fps: float, predicted: bool, losses: Losses
) -> dict[str, Any]:
    results = [_result(name, one, fps, losses) for name, one in own]
    if predicted:
        scores = [one.confidence for _, one in own if one.confidence is not None]
        about: dict[str, Any] = {"model_version": who} if who else {}
        return {**about, "score": round(sum(scores) / len(scores), 4), "result": results}
    if who is None:
        return {"result": results}
    return {"completed_by": int(who) if re.fullmatch(r"0|[1-9]\d{0,8}", who) else {"email": who}, "result": results}


def _result(name: str, one: Interval, fps: float, losses: Losses) -> dict[str, Any]:
    first, after = first_frame(one.start_s, fps), first_frame(one.end_s, fps)
    if after <= first:
        losses.add("interval(s) shorter than a frame made one frame long")
    moved = sum(abs(frame / fps - exact) > 5.1e-4 for frame, exact in ((first, one.start_s), (after, one.end_s)))
    losses.add("boundaries moved to the next frame", moved)
    score = {} if one.confidence is None else {"score": round(one.confidence, 4)}
    return {
        "id": name,
        "type": "timelinelabels",
        "from_name": one.track,
        "to_name": "video",
        **score,
        "value": {"ranges": [{"start": first + 1, "end": max(after, first + 1)}], "timelinelabels": [one.label]},
    }


def first_frame(time_s: float, fps: float) -> int:
    """Return the first frame, from 0, that is shown at a time, or after it."""
    exact = max(time_s - _TOLERANCE_S, 0) * fps
    return -int(-exact // 1)


def label_studio_config(tracks: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a labelling configuration: the video, and one set of labels for each track, given with its classes."""
    lines = ["<View>", '  <Video name="video" value="$video" frameRate="$fps" timelineHeight="120"/>']
    for track, labels in tracks:
        lines.append(f'  <TimelineLabels name={quoteattr(track)} toName="video">')
        lines += [f"    <Label value={quoteattr(label)}/>" for label in labels]
        lines.append("  </TimelineLabels>")
    return "\n".join([*lines, "</View>"]) + "\n"
