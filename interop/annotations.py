"""Convert files of labelled intervals: ELAN, Label Studio, CSV, and Cholec80's text files of phases."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from configs.dataset_spec import DataSetSpec, class_ids, folded_name
from configs.errors import UserError, did_you_mean, listed
from configs.load import load_dataset
from configs.schema import MAX_FPS
from engine.progress import BAR_AFTER_S, progress_bar, say
from features.annotation_files.eaf import eaf_text, read_eaf
from features.annotation_files.intervals import (
    DEFAULT_TRACK,
    Annotations,
    Interval,
    Losses,
    VideoAnnotations,
    checked_video,
)
from features.annotation_files.label_studio import (
    LOCAL_FILES,
    first_frame,
    label_studio_config,
    label_studio_tasks,
    read_label_studio,
)
from features.annotation_files.table import csv_text, read_csv
from features.dataset.annotations import read_content
from features.dataset.formats.cholec80 import parse_phases
from features.dataset.index import Index, VideoEntry
from features.ids import file_stem, id_key, id_of_stem, natural_key
from features.video.mp4 import MAX_FRAMES
from interop.text_files import write_texts

_ENDINGS = {".eaf": "eaf", ".json": "labelstudio", ".csv": "csv", ".tsv": "csv", ".txt": "cholec80"}
MIN_FPS = 1e-3
FORMATS = ("cholec80", "csv", "eaf", "labelstudio")
_PHASE_FILE = re.compile(r"(?P<id>.+?)[-_ ]phases?", re.IGNORECASE)


@dataclass(frozen=True)
class Conversion:
    """What to convert, and what is known about the videos and their classes.

    `track` and `annotator` select intervals. `fps` is the rate of all videos, `index` knows each one's.
    """

    target: str
    source: str | None = None
    track: str | None = None
    annotator: str | None = None
    fps: float | None = None
    index: Index | None = None
    spec: DataSetSpec | None = None
    media: str = LOCAL_FILES

    def entry(self, video: str) -> VideoEntry | None:
        """Return what the index knows about a video."""
        key = id_key(video)
        return next((one for one in self.index.videos if id_key(one.id) == key), None) if self.index else None

    def fps_of(self, video: str) -> float | None:
        """Return the rate of a video's frames, if it is known."""
        entry = self.entry(video)
        return self.fps or (entry.fps if entry else None)


@dataclass(frozen=True)
class Converted:
    """The files that were written, and the files that could not be read with the reason."""

    written: list[Path]
    failed: list[tuple[str, str]]


def convert_files(
    path: Path, out: Path, target: str, *, dataset: str | None, index_file: Path | None, replace_files: bool, **ask: Any
) -> Converted:
    """Convert as `annotations convert` asks for it: `convert` with an index file and the name of a data set."""
    if ask["fps"] is not None and not MIN_FPS <= ask["fps"] <= MAX_FPS:
        raise UserError(f"--fps {ask['fps']:g}: not a frame rate; it must be from {MIN_FPS:g} to {MAX_FPS:g}")
    index = Index.load(index_file) if index_file else None
    spec = load_dataset(dataset) if dataset else index.dataset if index else None
    return convert(path, out, Conversion(target, index=index, spec=spec, **ask), replace_files)


def convert(path: Path, out: Path, ask: Conversion, replace_files: bool = False) -> Converted:
    """Read a file, or all files of a folder, and write their intervals to `out`.

    ELAN's and Cholec80's files are written as one per video into the folder `out`, or as `out` if it has their ending
    and there is a single video; the other formats as one file. A file that cannot be read is reported, and the others
    are converted. Raises UserError if none can be, if a video occurs twice, or if a file with other content exists and
    `replace_files` is false.
    """
    videos, failed, notes = _read_all(annotation_files(path, ask), ask)
    if failed and not videos:
        raise UserError(failed[0][1])
    chosen = [_chosen(video, ask, notes) for video in videos]
    chosen = [video for video in chosen if video.intervals]
    if not chosen:
        which = "".join(
            f", {name} {value}" for name, value in (("track", ask.track), ("annotator", ask.annotator)) if value
        )
        raise UserError(f"{path}: has no labelled intervals{which}; tracks: {listed(_tracks(videos), 8) or 'none'}")
    losses: dict[str, Losses] = {}
    folder, texts = converted_texts(chosen, out, ask, losses)
    written = write_texts(folder, texts, replace_files)
    notes += [f"{video}: {note}" for video, lost in losses.items() for note in lost.notes()]
    for note in notes:
        say(f"note: {note}")
    return Converted(written, failed)


# ---------------------------------------------------------------------------------------------- reading


def annotation_files(path: Path, ask: Conversion) -> list[tuple[Path, str]]:
    """Return the files to read with their formats. Raises UserError if there is none."""
    if not path.is_dir():
        found = ask.source or _ENDINGS.get(path.suffix.lower())
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if found is None:
            raise UserError(f"{path}: of which format? Its ending is none of {', '.join(_ENDINGS)}; give --from")
        return [(path, found)]
    files = []
    for one in sorted(path.rglob("*"), key=lambda one: natural_key(one.as_posix())):
        kind = _ENDINGS.get(one.suffix.lower())
        if one.name.startswith(".") or kind is None or ask.source not in (None, kind) or not one.is_file():
            continue
        if kind == "cholec80" and not _PHASE_FILE.fullmatch(one.stem):
            say(f"note: {one}: not read, since it is not named like a file of phases (video01-phase.txt)")
            continue
        files.append((one, kind))
    if not files:
        raise UserError(f"{path}: has no file ending in {', '.join(_ENDINGS)}")
    return files


def read_annotation_file(path: Path, kind: str, ask: Conversion) -> Annotations:
    """Read a file of labels in the format `kind`. Raises UserError if it cannot be read."""
    readers: dict[str, Callable[[bytes, Path], Annotations]] = {
        "eaf": read_eaf,
        "labelstudio": partial(read_label_studio, fps_of=ask.fps_of),
        "csv": read_csv,
        "cholec80": partial(_read_cholec80, ask=ask),
    }
    return readers[kind](read_content(path), path)


def _read_all(
    files: Sequence[tuple[Path, str]], ask: Conversion
) -> tuple[list[VideoAnnotations], list[tuple[str, str]], list[str]]:
    """Return the videos of all files, the files that cannot be read, and notes."""
    videos: dict[str, VideoAnnotations] = {}
    places: dict[str, Path] = {}
    failed: list[tuple[str, str]] = []
    notes: list[str] = []
    with progress_bar(len(files), "annotations", "file", iterable=files, delay=BAR_AFTER_S) as bar:
        for path, kind in bar:
            try:
                found = read_annotation_file(path, kind, ask)
            except UserError as error:
                failed.append((path.name, str(error)))
                continue
            notes += found.notes
            for video in found.videos:
                video = _completed(video, ask)
                key = id_key(video.video)
                if key in videos:
                    raise UserError(f"{places[key]} and {path}: both have labels of {video.video}; convert one of them")
                videos[key], places[key] = video, path
    return sorted(videos.values(), key=lambda video: natural_key(video.video)), failed, notes


def _completed(video: VideoAnnotations, ask: Conversion) -> VideoAnnotations:
    """Return the video with what the index knows: its id's spelling, rate and file (none for one in several files).

    A file with another name than its video is recognised by the video that it is linked to.
    """
    entry = ask.entry(video.video) or (ask.entry(PurePosixPath(video.media).stem) if video.media else None)
    if entry is None:
        return replace(video, fps=ask.fps or video.fps)
    return replace(video, fps=ask.fps or entry.fps, video=entry.id, media=None if entry.parts else entry.source)


def _read_cholec80(content: bytes, path: Path, ask: Conversion) -> Annotations:
    """Read a file of phases; its rows are numbered at the video's rate, or else at that of the data set's files."""
    spec = ask.spec or load_dataset("cholec80")
    match = _PHASE_FILE.fullmatch(path.stem)
    video = checked_video(id_of_stem(match["id"] if match else path.stem), str(path))
    track = parse_phases(content, path, spec)
    fps = ask.fps_of(video) or spec.annotation_fps
    rows, labels = track.frame_index, track.labels
    breaks = np.flatnonzero((np.diff(labels) != 0) | (np.diff(rows) > track.stride)) + 1
    intervals = []
    for first, after in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        if labels[first] >= 0:
            end = int(rows[after - 1]) + track.stride
            if after < len(rows):
                end = min(end, int(rows[after]))
            name = spec.phases[labels[first]]
            intervals.append(Interval(DEFAULT_TRACK, name, int(rows[first]) / fps, end / fps))
    return Annotations((VideoAnnotations(video, tuple(intervals), fps),))


# ---------------------------------------------------------------------------------------------- choosing


def _tracks(videos: Iterable[VideoAnnotations]) -> list[str]:
    return list(dict.fromkeys(one.track for video in videos for one in video.intervals))


def _chosen(video: VideoAnnotations, ask: Conversion, notes: list[str]) -> VideoAnnotations:
    """Return the intervals that `ask` selects, with the data set's names of classes."""
    kept = [one for one in video.intervals if ask.track in (None, one.track)]
    kept = [one for one in kept if ask.annotator in (None, one.annotator)]
    entry = ask.entry(video.video)
    if ask.index is not None and entry is None:
        notes.append(f"{video.video}: not in the index")
    if entry is not None and entry.parts and ask.target in ("labelstudio", "eaf"):
        notes.append(
            f"{video.video}: has {len(entry.parts)} files, so none is linked; join them to see video and labels "
            "together"
        )
    if entry is not None and entry.times_s is not None and ask.target in ("labelstudio", "cholec80"):
        notes.append(f"{video.video}: has no constant frame rate; frames are counted at its mean, {entry.fps:.6g} fps")
    if ask.spec is not None:
        names = dict.fromkeys((one.track, one.label) for one in kept)
        spelled = {name: _spelled(*name, video.video, ask.spec) for name in names}
        kept = [replace(one, label=spelled[one.track, one.label]) for one in kept]
    return replace(video, intervals=tuple(kept))


def _spelled(track: str, label: str, video: str, spec: DataSetSpec) -> str:
    """Return the data set's spelling of a class, if its track is one of the data set's."""
    role = {"phases": "phase", "tools": "tool"}.get(track, track)
    if role not in spec.roles:
        return label
    names, aliases = spec.classes_of(role)
    number = class_ids(names, aliases).get(folded_name(label))
    if number is None:
        hint = did_you_mean(label[:80], (*aliases, *names)) or f" (known: {listed(names, 20)})"
        raise UserError(f"{video}: unknown {role} {label[:60]!r} of data set {spec.name}{hint}")
    return names[number]


# ---------------------------------------------------------------------------------------------- writing


def converted_texts(
    videos: Sequence[VideoAnnotations], out: Path, ask: Conversion, losses: dict[str, Losses]
) -> tuple[Path, dict[str, str]]:
    """Return the folder to write to, and the texts of its files by name. What is lost is added to `losses`."""
    if ask.target in ("eaf", "cholec80"):
        ending = ".eaf" if ask.target == "eaf" else ".txt"
        single = out.suffix.lower() == ending
        if single and len(videos) > 1:
            raise UserError(f"{out}: one file for {len(videos)} videos; give a folder")
        texts = {}
        for video in videos:
            lost = losses[video.video] = Losses()
            if ask.target == "eaf":
                name, text = f"{file_stem(video.video)}.eaf", eaf_text(video, lost)
            else:
                name, text = f"{file_stem(video.video)}-phase.txt", _cholec80_text(video, ask, lost)
            texts[out.name if single else name] = text
        return (out.parent if single else out), texts
    ending, usual = (".csv", "annotations.csv") if ask.target == "csv" else (".json", "labelstudio.json")
    place = out if out.suffix.lower() == ending else out / usual
    lost = losses[place.name] = Losses()
    if ask.target == "csv":
        return place.parent, {place.name: csv_text(videos, lost)}
    tasks = label_studio_tasks(videos, ask.fps_of, lost, ask.media)
    config = place.with_suffix(".xml").name
    text = json.dumps(tasks, indent=1, ensure_ascii=False) + "\n"
    return place.parent, {place.name: text, config: label_studio_config(_classes(videos, ask.spec))}


def _classes(videos: Sequence[VideoAnnotations], spec: DataSetSpec | None) -> list[tuple[str, list[str]]]:
    """Return the tracks with their classes: those of the data set, and others in the order of their first use."""
    found: dict[str, dict[str, None]] = {}
    for video in videos:
        for one in video.intervals:
            if one.track not in found:
                role = {"phases": "phase", "tools": "tool"}.get(one.track, one.track)
                known = spec.classes_of(role)[0] if spec and role in spec.roles else ()
                found[one.track] = dict.fromkeys(known)
            found[one.track][one.label] = None
    return [(track, list(labels)) for track, labels in found.items()]


def _cholec80_text(video: VideoAnnotations, ask: Conversion, losses: Losses) -> str:
    """Return a file of phases with a row for each frame that has one; of overlapping intervals, the shortest counts."""
    fps, entry = video.fps or ask.fps_of(video.video), ask.entry(video.video)
    if fps is None:
        raise UserError(f"{video.video}: rows are numbered by frames; give their rate with --fps, or --index FILE")
    track = ask.track or _only_track(video)
    own = [one for one in video.intervals if one.track == track]
    losses.add("interval(s) of other tracks left out", len(video.intervals) - len(own))
    if len(who := {one.annotator for one in own}) > 1:
        they = listed(sorted(name or "(none)" for name in who), 5)
        raise UserError(f"{video.video}: labels of several annotators ({they}); choose one with --annotator")
    losses.add("annotators' names left out", sum(name is not None for name in who))
    losses.add("confidence(s) left out", sum(one.confidence is not None for one in own))
    bounds = [(first_frame(one.start_s, fps), first_frame(one.end_s, fps)) for one in own]
    moved = ((frame / fps, exact) for one, span in zip(own, bounds, strict=True)
             for frame, exact in zip(span, (one.start_s, one.end_s), strict=True))  # fmt: skip
    losses.add("boundaries moved to the next frame", sum(abs(at - exact) > 5.1e-4 for at, exact in moved))
    count = entry.frame_count if entry else max(after for _, after in bounds)
    losses.add("interval(s) cut at the end of the video", sum(after > count for _, after in bounds))
    if max(count, sum(after - first for first, after in bounds) // 10) > MAX_FRAMES:
        raise UserError(f"{video.video}: its labels last longer than a video can ({MAX_FRAMES:,} frames); correct them")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(one.label for one in own))}
    labels, painted = np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for one, (first, after) in sorted(zip(own, bounds, strict=True), key=lambda item: item[1][0] - item[1][1]):
        painted[first:after] += labels[first:after] != numbers[one.label]
        labels[first:after] = numbers[one.label]
    losses.add("frame(s) with several labels, of which the shortest interval's is kept", int((painted > 1).sum()))
    losses.add("frame(s) without a label have no row", int((labels < 0).sum()))
    names = list(numbers)
    rows = (f"{frame}\t{names[labels[frame]]}\n" for frame in np.flatnonzero(labels >= 0).tolist())
    return "Frame\tPhase\n" + "".join(rows)


def _only_track(video: VideoAnnotations) -> str:
    tracks = _tracks([video])
    found = next((name for name in (DEFAULT_TRACK, "phases") if name in tracks), None)
    if found is None and len(tracks) > 1:
        raise UserError(f"{video.video}: has the tracks {listed(tracks, 8)}; choose one with --track")
    return found or tracks[0]
