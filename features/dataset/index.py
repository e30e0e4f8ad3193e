"""The index of a data set: which videos there are, what they are made of, how long, which split, which labels.

`index.json` holds paths relative to the data root and never the root itself, so a data set can move. It is written from
what names, containers and annotation files say; of each video the first few frames are decoded, to check that they
have the times that the container says. The same files give the same bytes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from configs.errors import UserError, printable
from configs.schema import MAX_FPS, DataConfig, DataSetSpec, OmitsDefaults
from engine.files import below_root, inside, read_json, sha256_ends, sha256_file, sha256_json, write_json
from engine.sniff import what_it_is
from features.dataset.annotations import PhaseTrack, ToolTrack, parse_phases, parse_tools, read_content
from features.dataset.discover import (
    Discovery,
    FolderLayout,
    FolderScan,
    FoundVideo,
    LabelEnd,
    find_videos,
    frame_folder,
    infer_layout,
    natural_key,
    require_one_base,
    scan_folder,
    source_frames,
)
from features.dataset.labels import (
    BetweenRows,
    Extent,
    Reading,
    Track,
    fit_tracks,
    labelled_fractions,
    read_numbers,
    sample_labels,
    track_end,
)
from features.dataset.phase_order import parse_phase_order
from features.dataset.splits import Split, assign_splits, matching_ids, usual_split_problem
from features.dataset.tfrecord import FPS as TFRECORD_FPS
from features.dataset.tfrecord import RecordLayout, require_one_numbering, scan_records
from features.ids import id_key, id_problem, normal_id
from features.store import INDEX_FILE, recorded_fault
from features.video.images import FrameFolder
from features.video.mp4 import MAX_FRAMES
from features.video.scan import count_packets, probe_video
from features.video.times import FrameTimes, on_screen, require_held

FORMAT_VERSION = 1
SPLITS: tuple[Split, ...] = ("train", "val", "test", "none")
Progress = Callable[[int, int, str], None]  # videos done, videos in all, the one at work


def _relative(path: str) -> str:
    """Lexical part of the check; `engine.files.inside` makes the rest, links included, at every use."""
    if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\x00" in path:
        raise ValueError("must be a path below the data root")
    return path


def _usable_id(video_id: str) -> str:
    if problem := id_problem(video_id):
        raise ValueError(f"a video id that {problem}")
    return normal_id(video_id)


RelativePath = Annotated[str, AfterValidator(_relative)]
VideoId = Annotated[str, Field(min_length=1), AfterValidator(_usable_id)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class AnnotationFile(OmitsDefaults):
    """An annotation file as it was indexed; what its rows' numbers mean is a `features.dataset.labels.Reading`."""

    OMITTED = frozenset({"row_fps", "row_base"})
    path: RelativePath
    sha256: Sha256
    rows: int = Field(ge=1)
    row_fps: float | None = Field(None, ge=1e-3, le=MAX_FPS, allow_inf_nan=False)
    row_base: int = Field(0, ge=0)

    @property
    def reading(self) -> Reading:
        return Reading(self.row_fps, self.row_base)


class VideoEntry(OmitsDefaults):
    """One video. For a folder of frames (`frames` says how its images lie on the source's timeline), `fps` and
    `frame_count` are those of the source, `size_bytes` is the sum of its images, `modified_ns` the newest of them and
    `sha256_ends` covers their names, their sizes and the content of the first and last. A TFRecord file holds its own
    labels (`records`), and has no annotation files. A video without a constant rate has the times of its frames
    (`times`), and `fps` is its mean rate.
    """

    OMITTED = frozenset({"times"})
    id: VideoId
    kind: Literal["video", "frames", "tfrecord"]
    source: RelativePath
    size_bytes: int = Field(ge=1, lt=2**63)
    modified_ns: int
    sha256_ends: Sha256
    sha256: Sha256 | None = None
    fps: float = Field(gt=0, le=MAX_FPS, allow_inf_nan=False)
    frame_count: int = Field(ge=1, le=MAX_FRAMES)
    split: Split
    phase_file: AnnotationFile | None = None
    tool_file: AnnotationFile | None = None
    frames: FolderLayout | None = None
    records: RecordLayout | None = None
    times: FrameTimes | None = None

    @model_validator(mode="after")
    def _layout_for_folders(self) -> VideoEntry:
        if (self.kind == "frames") != (self.frames is not None):
            raise ValueError("frames must be given for folders of frames and for nothing else")
        if (self.kind == "tfrecord") != (self.records is not None):
            raise ValueError("records must be given for TFRecord files and for nothing else")
        if self.records and (self.records.frame_count != self.frame_count or self.phase_file or self.tool_file):
            raise ValueError("the labels in records are not those of its frames")
        if self.times is not None:
            if self.kind != "video":
                raise ValueError("times must be given for video files and for nothing else")
            self.times.seconds(self.frame_count)
        return self

    @property
    def image_stride(self) -> int:
        """Source frames from one image to the next."""
        return self.frames.stride if self.frames else 1

    @property
    def image_frames(self) -> np.ndarray:
        """Source frames (N,) int64 that there are images of."""
        return self.frames.frames() if self.frames else np.arange(self.frame_count, dtype=np.int64)

    @property
    def most_fps(self) -> float:
        """The highest rate that this video can be sampled at."""
        if self.times is not None:  # recorded at a higher rate than the mean, with pauses
            usual_s = float(np.median(np.diff(self.times.seconds(self.frame_count))))
            return max(self.fps, 1.0 / usual_s if usual_s > 0 else 0.0)
        return self.fps / self.image_stride


class LeftOut(OmitsDefaults):
    """A video that was found and is not used; `reason` is one line, with paths below the data root.

    `split` is the one that it would be in, None where that is not known. `excluded`: the settings ask for it. `source`
    is the hash of its ends where it was indexed and a later stage could not use it.
    """

    OMITTED = frozenset({"split", "excluded", "source"})
    id: str = Field(min_length=1)
    reason: str
    split: Split | None = None
    excluded: bool = False
    source: Sha256 | None = None


class Index(OmitsDefaults):
    """A data set as found below a root. Videos `left_out` keep their places in the order that splits count in.

    One list for all who leave videos out: discovery and probing, the setting `data.exclude`, and later stages, which
    read what an earlier one recorded beside its files (`without`).
    """

    OMITTED = frozenset({"left_out", "passed_over"})
    format_version: Literal[1] = 1
    dataset: DataSetSpec
    videos: tuple[VideoEntry, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    made_from: str | None = None  # the older index files that videos and splits were taken from
    left_out: tuple[LeftOut, ...] = ()
    passed_over: tuple[LeftOut, ...] = ()  # files and folders that no pattern takes, by path; not in the splits' order

    @model_validator(mode="after")
    def _ids_differ(self) -> Index:
        ids = [id_key(video_id) for video_id in self.found_ids()]
        if len(set(ids)) != len(ids):
            raise ValueError("two videos have the same id")
        return self

    @model_validator(mode="after")
    def _records_fit(self) -> Index:
        for entry in self.videos:
            if entry.records and (problem := entry.records.problem(self.dataset)):
                raise ValueError(f"{entry.id}: {problem}")
        return self

    def found_ids(self) -> list[str]:
        """Ids of all videos that were found, those left out among them, in the order of their numbers."""
        if not self.left_out:
            return [entry.id for entry in self.videos]
        return sorted([entry.id for entry in self.videos] + [video.id for video in self.left_out], key=natural_key)

    def by_split(self, split: str) -> tuple[VideoEntry, ...]:
        """The videos of one split, in order."""
        return tuple(entry for entry in self.videos if entry.split == split)

    def without(self, faults: Iterable[tuple[str, str]]) -> Index:
        """The index of the other videos, with these (ids and reasons) among those left out; no split moves."""
        reasons = dict(faults)
        if not reasons:
            return self
        moved = [
            LeftOut(id=entry.id, reason=reasons[entry.id], split=entry.split, source=entry.sha256_ends)
            for entry in self.videos
            if entry.id in reasons
        ]
        kept = tuple(entry for entry in self.videos if entry.id not in reasons)
        return self.model_copy(update={"videos": kept, "left_out": (*self.left_out, *moved)})

    def left_out_records(self) -> list[dict[str, Any]]:
        """Videos left out, for results and reports: id, reason, and where known split and `excluded`."""
        return [video.model_dump(mode="json", exclude={"source"}) for video in self.left_out]

    @property
    def is_partial(self) -> bool:
        """Whether something that was found, or looks like a video, is missing without the settings asking for it."""
        return any(not video.excluded for video in (*self.left_out, *self.passed_over))

    def exclusions(self, exclude: Mapping[str, str]) -> dict[str, str]:
        """What `data.exclude` names of all that was found (`exclusions`)."""
        return exclusions(self.found_ids(), exclude, [one.id for one in self.passed_over])

    def require_excluded(self, exclude: Collection[str], where: Path) -> None:
        """Raise UserError where this index, of a feature folder, holds a video that `data.exclude` names."""
        names = [normal_id(name) for name in exclude]
        kept = [v.id for v in self.videos if v.id in names or any(fnmatch.fnmatchcase(v.id, name) for name in names)]
        if kept:
            raise UserError(
                f"{where}: holds {kept[0]}, which data.exclude leaves out; run `index --force`, then extract"
            )

    @property
    def missing(self) -> tuple[LeftOut, ...]:
        """Videos left out of a split without the settings asking for it."""
        return tuple(video for video in self.left_out if not video.excluded and video.split != "none")

    def require_videos(self, *splits: Split) -> None:
        """Raise UserError where videos left out were all that one of these splits had."""
        for split in splits:
            lost = [video for video in self.left_out if video.split == split]
            if lost and not self.by_split(split):
                others = f" (and {len(lost) - 1} more)" if lost[1:] else ""
                raise UserError(
                    f"no video is left in split {split}, since {lost[0].id}{others} is left out: {lost[0].reason}; "
                    f"{'keep' if lost[0].excluded else 'repair'} it, or choose another data.split, then run "
                    "`index --force`"
                )

    def entries_of(self, split: str, where: Path) -> tuple[VideoEntry, ...]:
        """The videos of a split, or of `all`. Raises UserError where there are none (left); `where` the index is."""
        self.require_videos(*(part for part in SPLITS if part == split))
        entries = tuple(entry for entry in self.videos if split in ("all", entry.split))
        if not entries:
            raise UserError(f"{where}: no video in split {split}; choose another --split or data.split.rule")
        return entries

    def entry(self, video_id: str) -> VideoEntry:
        """The video with this id. Raises UserError when there is none."""
        for entry in self.videos:
            if entry.id == normal_id(video_id):
                return entry
        raise UserError(f"{video_id}: no such video in the index ({self.videos[0].id} to {self.videos[-1].id})")

    def digest(self) -> str:
        """SHA-256 over what frames, labels and splits depend on; paths, times, whole-file hashes and notes are not."""
        moving: Any = {
            "source": True,
            "modified_ns": True,
            "sha256": True,
            "phase_file": {"path"},
            "tool_file": {"path"},
        }
        videos = [entry.model_dump(mode="json", exclude=moving) for entry in self.videos]
        for video in videos:
            if video["records"] is None:
                del video["records"]  # so that other indices keep the digest that they had before there were any
        described: Any = {"name", "annotation_fps", "phases", "tools", "phase_aliases", "tool_aliases"}
        return sha256_json(
            {
                "format_version": self.format_version,
                "dataset": self.dataset.model_dump(mode="json", include=described),
                "videos": videos,
            }
        )

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: Any, name: str = "index") -> Index:
        """The index that `to_json` gave. Raises UserError for anything else; `name` is for its message."""
        version = value.get("format_version") if isinstance(value, dict) else None
        if not isinstance(version, int) or "videos" not in value:
            raise UserError(f"{name}: not an index; make one with the command index")
        if version != FORMAT_VERSION:
            raise UserError(f"{name}: index format {version}, this program reads {FORMAT_VERSION}; run index again")
        try:
            return cls.model_validate(value)
        except (ValidationError, RecursionError) as error:
            raise UserError(f"{name}: damaged index: {_first_fault(error)}; run index again") from error

    def save(self, path: Path) -> None:
        """Write the index as JSON, atomically. Equal indices give equal bytes."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read an index. Raises UserError when the file is missing, damaged or something else."""
        return cls.from_json(read_json(path), str(path))


def _first_fault(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "nested too deeply"
    fault = error.errors(include_url=False)[0]
    place = ".".join(map(str, fault["loc"])) or "whole file"
    return f"{place if place.isprintable() else ascii(place)}: {fault['msg']}"


# ---------------------------------------------------------------------------------------------- building


def build_index(
    root: Path,
    spec: DataSetSpec,
    data: DataConfig,
    progress: Progress | None = None,
    only: Collection[str] | None = None,
    leave_out: bool = False,
) -> Index:
    """The index of the data set below `root` (or of the videos `only`), with splits. Nothing is written.

    With `leave_out`, a video that cannot be read, or whose annotations cannot, is left out and costs no other; the
    others' splits are those that they would have with it. So are videos that `data.exclude` names, unread.

    Where `data.split` asks for nothing and the data set's usual split does not fit the videos that are here, no split
    is assigned ("none") and a note says so. Raises UserError naming the file and row at fault; when several videos
    are, the message is that of the first and names the others.
    """
    found = find_videos(root, spec, data, leave_out)
    if only is not None:
        found = replace(_kept(found, only.__contains__), passed_over=())
    ids = [printable(name) for name in found.ids]
    paths = {printable(path): printable(reason) for path, reason in found.passed_over}
    named = exclusions(ids, data.exclude, tuple(paths))
    excluded = {name: reason for name, reason in named.items() if name in ids}
    found = _kept(found, lambda name: printable(name) not in excluded)
    if not found.ids:
        raise UserError(f"{root}: data.exclude leaves out all {len(excluded)} videos; keep some")
    entries, notes, faults = _build_entries(root, found, spec, data, leave_out, progress)
    passed_over = tuple(
        LeftOut(id=path, reason=named.get(path, reason), excluded=path in named) for path, reason in paths.items()
    )
    reasons = {printable(name): below_root(str(error), root) for name, error in faults} | excluded
    splits = _splits([*(entry.id for entry in entries), *reasons], spec, data, passed_over, notes)
    left_out = [
        LeftOut(id=name, reason=reason, split=splits[name], excluded=name in excluded)
        for name, reason in reasons.items()
    ]
    return Index(
        dataset=spec,
        videos=tuple(entry.model_copy(update={"split": splits[entry.id]}) for entry in entries),
        notes=tuple(map(printable, notes)),  # file names may be no text
        left_out=tuple(left_out),
        passed_over=passed_over,
    )


def _kept(found: Discovery, keep: Callable[[str], bool]) -> Discovery:
    """What was found of the videos whose ids are to be kept."""
    return replace(
        found,
        videos=tuple(video for video in found.videos if keep(video.id)),
        faults=tuple(fault for fault in found.faults if keep(fault[0])),
    )


def _build_entries(
    root: Path, found: Discovery, spec: DataSetSpec, data: DataConfig, leave_out: bool, progress: Progress | None
) -> tuple[list[VideoEntry], list[str], list[tuple[str, UserError]]]:
    """Entries without a split, notes, and the videos at fault. Raises UserError as `build_index` does."""
    order = _phase_order(root, found, spec, data)
    entries: list[VideoEntry] = []
    notes, faults = list(found.notes), list(found.faults)
    for done, video in enumerate(found.videos):
        if progress:
            progress(done, len(found.videos), video.id)
        try:
            entry, entry_notes = _build_entry(root, video, spec, data, order, leave_out)
        except UserError as error:
            faults.append((video.id, error))
            continue
        entries.append(entry)
        notes += entry_notes
    if faults and not (leave_out and entries):
        others = f" (also at fault: {', '.join(video_id for video_id, _ in faults[1:])})" if faults[1:] else ""
        raise UserError(f"{faults[0][1]}{others}") from faults[0][1]
    require_one_base([(str(root / entry.source), entry.frames) for entry in entries if entry.frames], data)
    require_one_numbering([(str(root / entry.source), entry.records) for entry in entries if entry.records])
    return entries, notes, faults


def _splits(
    ids: Sequence[str], spec: DataSetSpec, data: DataConfig, passed_over: Sequence[LeftOut], notes: list[str]
) -> dict[str, Split]:
    """The split of each video; a note is added where the usual one does not fit. Raises UserError."""
    ids = sorted(ids, key=natural_key)
    if problem := usual_split_problem(ids, spec, data.split):
        notes.append(f"no splits assigned, since the usual one of {spec.name} does not fit: {problem}")
    try:
        return assign_splits(ids, spec, data.split)
    except UserError as error:
        lost = next((f"; passed over: {one.id}: {one.reason}" for one in passed_over if not one.excluded), "")
        raise UserError(f"{error}{lost}") from error


def exclusions(ids: Sequence[str], exclude: Mapping[str, str], paths: Sequence[str] = ()) -> dict[str, str]:
    """Which of these videos the setting `data.exclude` leaves out, and why: the first entry that names a video counts.

    An entry that names no video may name `paths` of what was passed over. Raises UserError for one that names neither.
    """
    found: dict[str, str] = {}
    for entry, reason in exclude.items():
        named = [path for path in paths if fnmatch.fnmatchcase(normal_id(path), normal_id(entry))]
        videos = bool(fnmatch.filter(ids, normal_id(entry))) or not named
        for video_id in matching_ids(ids, entry, "data.exclude") if videos else named:
            found.setdefault(
                video_id, f"excluded: {' '.join(reason.split())}" if reason else "excluded by data.exclude"
            )
    return found


def _phase_order(root: Path, found: Discovery, spec: DataSetSpec, data: DataConfig) -> tuple[str, ...]:
    """The names of the phase numbers in TFRecord files; none where there are no such files."""
    sources = [video.source for video in found.videos if video.kind == "tfrecord"]
    if not sources:
        return ()
    try:
        return parse_phase_order(data.tfrecord_phase_order, spec, str(root / sources[0]))
    except UserError as error:
        raise UserError(f"{error} (the setting data.tfrecord_phase_order)") from error


def _build_entry(
    root: Path, video: FoundVideo, spec: DataSetSpec, data: DataConfig, order: tuple[str, ...], leave_out: bool
) -> tuple[VideoEntry, tuple[str, ...]]:
    """One video's entry, without a split, and notes. With `leave_out`, one with few labels is at fault (UserError)."""
    annotation = video.phase or video.tool
    if video.kind == "tfrecord" and annotation:
        raise UserError(
            f"{root / annotation} and {root / video.source}: both hold labels of {video.id}; keep only one of them "
            "below the data root, or take the TFRecord files' own with data.sources=tfrecord"
        )
    phase = _read_annotation(root, video.phase, parse_phases, spec)
    tools = _read_annotation(root, video.tool, parse_tools, spec)
    lists = [(root / read.file.path, read.track) for read in (phase, tools) if read is not None]
    source, source_notes = _describe_source(root, video, spec, data, order, [track for _, track in lists])
    try:
        entry = VideoEntry(
            id=video.id,
            kind=video.kind,
            source=video.source,
            split="none",
            phase_file=phase.file if phase else None,
            tool_file=tools.file if tools else None,
            **source,
        )
    except ValidationError as error:  # a header may claim any rate and any number of frames
        what = what_it_is(root / video.source) if video.kind == "video" else None
        problem = f"is {what}" if what else f"{_first_fault(error)}; re-encode it or leave it out"
        raise UserError(f"{root / video.source}: {problem}") from error
    extent = _extent(entry, spec)
    read = read_numbers(lists, extent, data)
    readings = dict(zip([path for path, _ in lists], read, strict=True))
    phase, tools = (one and one.read_as(readings[root / one.file.path]) for one in (phase, tools))
    entry = entry.model_copy(
        update={"phase_file": phase.file if phase else None, "tool_file": tools.file if tools else None}
    )
    fitted_phase, fitted_tools, fit_notes = _fitted(entry, root, spec, phase, tools)
    if leave_out:
        fractions = labelled_fractions(entry.image_frames, fitted_phase, fitted_tools)
        _require_labelled([path for path, _ in lists], fractions, video.source, data)
    notes = [note for path, reading in readings.items() for note in reading.notes(path, extent)]
    return entry, (*source_notes, *_missing_images(entry), *notes, *fit_notes)


def _describe_source(
    root: Path, video: FoundVideo, spec: DataSetSpec, data: DataConfig, order: tuple[str, ...], tracks: Sequence[Track]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the index says about a source, whatever its kind, and notes on it."""
    if video.kind == "video":
        return _probe(root, video.source, data.full_hash)
    if video.kind == "tfrecord":
        return _read_records(root, video.source, video.id, spec, order, data.full_hash), ()
    ends = [track_end(track) - int(track.frame_index[0] == 1) for track in tracks]
    first = min((int(track.frame_index[0]) for track in tracks), default=0)
    labels = LabelEnd(max(ends), max(track.stride for track in tracks), first) if tracks else None
    return _measure(root, video.source, spec, data, labels), ()


def _require_labelled(lists: Sequence[Path], fractions: Sequence[float], source: str, data: DataConfig) -> None:
    """Raise UserError for a list that labels too small a fraction of a video's frames."""
    for path, labelled in zip(lists, fractions, strict=True):
        if labelled < data.min_labelled:
            raise UserError(
                f"{path}: has labels for {labelled:.1%} of {source}, less than data.min_labelled="
                f"{data.min_labelled:g}; complete them, set data.row_fps if rows count something else than they are "
                "taken for, or lower data.min_labelled"
            )


def _missing_images(entry: VideoEntry) -> list[str]:
    """A note on the images that a folder lacks."""
    if entry.frames is None or not entry.frames.missing:
        return []
    start = entry.frames.missing[0][0]
    unit = entry.frames.stride if entry.frames.numbering == "sample" else 1
    first = (entry.frames.first + start * entry.frames.stride) // unit + entry.frames.base
    lost = entry.frames.count - len(entry.image_frames)
    return [f"{entry.source}: {lost} of {entry.frames.count} images are missing, the first of them number {first}"]


@dataclass(frozen=True)
class _Annotation:
    """An annotation file just read: what goes into the index, and its rows as they are numbered."""

    file: AnnotationFile
    track: Any  # PhaseTrack or ToolTrack, as the parser given gives

    def read_as(self, reading: Reading) -> _Annotation:
        update = {"row_fps": reading.fps, "row_base": reading.base}
        return replace(self, file=self.file.model_copy(update=update))

    def placed(self, root: Path, extent: Extent) -> tuple[Path, Any]:
        """The file's path and its rows on the video's timeline."""
        path = root / self.file.path
        return path, self.file.reading.place(path, self.track, extent)


def _read_annotation(root: Path, relative: str | None, parse: Callable, spec: DataSetSpec) -> _Annotation | None:
    if relative is None:
        return None
    path = inside(root, relative)
    content = read_content(path)
    track = parse(content, path, spec)
    file = AnnotationFile(path=relative, sha256=sha256(content).hexdigest(), rows=len(track.frame_index))
    return _Annotation(file, track)


def _probe(root: Path, relative: str, full_hash: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the index says about a video file, and notes on it."""
    path = inside(root, relative)
    info = probe_video(path)
    if info.frame_count < 1:
        raise UserError(f"{path}: holds no frames")
    found = {"fps": info.fps, "frame_count": info.frame_count, "times": info.times}
    return {**_file_state(path, full_hash), **found}, info.notes


def _read_records(
    root: Path, relative: str, video_id: str, spec: DataSetSpec, order: tuple[str, ...], full_hash: bool
) -> dict[str, Any]:
    """What the index says about a TFRecord file, labels included; every byte of it is read and checked."""
    path = inside(root, relative)
    scan = scan_records(path, video_id, spec)
    return {
        **_file_state(path, full_hash),
        "fps": TFRECORD_FPS,
        "frame_count": len(scan.phase),
        "records": RecordLayout.of_scan(scan, order),
    }


def _file_state(path: Path, full_hash: bool) -> dict[str, Any]:
    try:
        state = path.stat()
        return {
            "size_bytes": state.st_size,
            "modified_ns": state.st_mtime_ns,
            "sha256_ends": sha256_ends(path),
            "sha256": sha256_file(path) if full_hash else None,
        }
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _measure(root: Path, relative: str, spec: DataSetSpec, data: DataConfig, labels: LabelEnd | None) -> dict[str, Any]:
    """What the index says about a folder of frames."""
    scan = scan_folder(root, relative, spec)
    layout = infer_layout(scan, spec, data, labels)
    return {
        **_folder_state(scan, data.full_hash),
        "fps": spec.annotation_fps,
        "frame_count": layout.frame_count,
        "frames": layout,
    }


def _folder_state(scan: FolderScan, full_hash: bool) -> dict[str, Any]:
    return {
        "size_bytes": sum(scan.sizes_bytes),
        "modified_ns": scan.modified_ns,
        "sha256_ends": scan.identity(),
        "sha256": scan.content() if full_hash else None,
    }


def index_of_source(path: Path, spec: DataSetSpec, data: DataConfig) -> tuple[Index, Path]:
    """The index of one video file or folder of frames without annotations, whatever its name, and the root it is below.

    The id is the file's name without ending. Raises UserError naming the file when it is missing or no such thing.
    """
    if not path.exists():
        raise UserError(f"{path}: no such video or folder of frames")
    place = path.resolve()
    kind: Literal["video", "frames"] = "frames" if place.is_dir() else "video"
    notes: tuple[str, ...] = ()
    if kind == "frames":
        described = _measure(place.parent, place.name, spec, data, None)
    else:
        described, notes = _probe(place.parent, place.name, data.full_hash)
    try:
        entry = VideoEntry(
            id=path.name if kind == "frames" else path.stem, kind=kind, source=place.name, split="none", **described
        )
    except ValidationError as error:
        raise UserError(f"{path}: {_first_fault(error)}; rename it") from error
    return Index(dataset=spec, videos=(entry,), notes=tuple(map(printable, notes))), place.parent


# ---------------------------------------------------------------------------------------------- using


def sampled_frames(entry: VideoEntry, fps: float) -> np.ndarray:
    """Source frames (T,) int64 of this video that sampling at `fps` keeps, rising.

    They are those on screen at the first frame's time and every 1 / fps seconds after it; a frame that is on screen at
    several of these times is kept once. Raises UserError where `fps` asks for more than there is.
    """
    stride = entry.image_stride
    held = f"{entry.fps:.4g} fps" if stride == 1 else f"images of one in {stride} frames at {entry.fps:g} fps"
    held += " on average" * (entry.times is not None)
    try:
        require_held(fps, entry.most_fps, held)
    except UserError as error:
        raise UserError(f"{entry.id}: {error}") from error
    first = entry.frames.first if entry.frames else 0
    shown = np.arange(first, entry.frame_count, stride, dtype=np.int64)
    time_s = frame_times_s(entry, shown)
    sampled = shown[on_screen(time_s, float(time_s[-1]) + stride / entry.fps, fps)]
    return sampled[np.isin(sampled, entry.image_frames)] if entry.frames else sampled  # images may be missing


def in_whole_steps(entry: VideoEntry, fps: float, frame_index: np.ndarray) -> bool:
    """Whether these sampled frames (T,) are every n-th, as earlier versions took them at all rates.

    What was made of other frames is told apart by this: it never resumes what an earlier version began.
    """
    first = entry.frames.first if entry.frames else 0
    return np.array_equal(frame_index, np.arange(first, entry.frame_count, max(round(entry.fps / fps), 1)))


def frame_times_s(entry: VideoEntry, frame_index: np.ndarray | Sequence[int]) -> np.ndarray:
    """(T,) float64 seconds from the first frame of the source at which its frames `frame_index` (T,) are shown."""
    frames = np.asarray(frame_index, dtype=np.int64)
    if entry.times is None:
        return frames / entry.fps
    return entry.times.seconds(entry.frame_count)[frames]


def usable_index(folder: Path) -> Index:
    """The index of a feature folder without the videos that extract could not read.

    A video that has not been extracted yet stays. Raises UserError where there is no index.
    """
    where = folder / INDEX_FILE
    if not where.is_file():
        raise UserError(f"{folder}: holds no {INDEX_FILE}; name the folder that extract wrote with --features DIR")
    return with_recorded_faults(Index.load(where), folder)


def with_recorded_faults(index: Index, folder: Path) -> Index:
    """An index without the videos that extract could not read into this feature folder."""
    reasons = ((entry.id, recorded_fault(folder, entry.id, entry.sha256_ends)) for entry in index.videos)
    return index.without((video_id, reason) for video_id, reason in reasons if reason is not None)


def most_fps(index: Index) -> float:
    """The highest rate that every video of the index can be sampled at, as far as their images go."""
    return min(entry.most_fps for entry in index.videos)


def open_folder(entry: VideoEntry, root: Path, index: Index) -> FrameFolder:
    """The images of a folder of frames, for `FolderReader`. Raises UserError if they have changed."""
    if entry.frames is None:
        raise ValueError(f"{entry.id} is a video file")
    return frame_folder(root, entry.source, index.dataset, entry.frames)


def load_labels(
    entry: VideoEntry,
    root: Path,
    index: Index,
    frame_index: np.ndarray | Sequence[int],
    between_rows: BetweenRows = "mask",
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of source frames `frame_index` (T,): phase (T,) int8 and tools (T, K) int8, -1 where there is none.

    Raises UserError when an annotation file is missing or is not the one that was indexed.
    """
    phase, tools, _ = _load_tracks(entry, root, index.dataset)
    return sample_labels(frame_index, phase, tools, between_rows, len(index.dataset.tools))


def _load_tracks(
    entry: VideoEntry, root: Path, spec: DataSetSpec
) -> tuple[PhaseTrack | None, ToolTrack | None, tuple[str, ...]]:
    """The video's tracks, fitted to it, from the files that were indexed and no others."""
    if entry.records is not None:
        return (*entry.records.tracks(spec), ())
    phase = _reread_annotation(root, entry.phase_file, parse_phases, spec)
    tools = _reread_annotation(root, entry.tool_file, parse_tools, spec)
    return _fitted(entry, root, spec, phase, tools)


def _reread_annotation(
    root: Path, file: AnnotationFile | None, parse: Callable, spec: DataSetSpec
) -> _Annotation | None:
    if file is None:
        return None
    if not (root / file.path).exists():
        raise UserError(
            f"{root / file.path}: no such file; restore it, or run `index --force` to go on without its labels"
        )
    read = _read_annotation(root, file.path, parse, spec)
    if read is None:
        return None
    if read.file.sha256 != file.sha256:
        raise UserError(f"{root / file.path}: has changed since it was indexed; run `index --force`, then this again")
    return read.read_as(file.reading)


def _fitted(
    entry: VideoEntry, root: Path, spec: DataSetSpec, phase: _Annotation | None, tools: _Annotation | None
) -> tuple[PhaseTrack | None, ToolTrack | None, tuple[str, ...]]:
    extent = _extent(entry, spec)
    return fit_tracks(
        phase.placed(root, extent) if phase else None, tools.placed(root, extent) if tools else None, extent
    )


def _extent(entry: VideoEntry, spec: DataSetSpec) -> Extent:
    base = entry.frames.base if entry.frames else 0
    times_s = frame_times_s(entry, np.arange(entry.frame_count)) if entry.times else None
    return Extent(entry.source, entry.frame_count, entry.fps, spec.annotation_fps, entry.image_stride, base, times_s)


# ---------------------------------------------------------------------------------------------- checking


def check_index(index: Index, root: Path, progress: Progress | None = None) -> list[str]:
    """What is no longer as indexed, one line per problem; empty when all is well.

    Sources: present, same size, time and hash of the ends (and of the whole, where recorded), same rate, as many
    packets as frames; of TFRecord files every checksum. Annotations: present, same hash, readable, fitting their video.
    Raises UserError when the root is missing.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set data.root (or SURGSTAGE_DATA) to where the indexed videos lie")
    problems = [f"{video.id}: left out of the index: {video.reason}" for video in index.left_out if not video.excluded]
    problems += [f"{one.id}: passed over: {one.reason}" for one in index.passed_over if not one.excluded]
    for done, entry in enumerate(index.videos):
        if progress:
            progress(done, len(index.videos), entry.id)
        for check in (_check_source, _check_annotations):
            problem: object
            try:
                problem = check(entry, root, index.dataset)
            except UserError as error:
                problem = error
            if problem is not None:
                problems.append(f"{entry.id}: {problem}")
    return problems


def _check_source(entry: VideoEntry, root: Path, spec: DataSetSpec) -> str | None:
    path = inside(root, entry.source)
    if entry.frames is not None:
        scan = scan_folder(root, entry.source, spec)
        source_frames(scan, entry.frames)
        return _difference(entry, _folder_state(scan, entry.sha256 is not None), path)
    if entry.records is not None:
        order = entry.records.phase_order
        now = _read_records(root, entry.source, entry.id, spec, order, entry.sha256 is not None)
        relabelled = now.pop("records") != entry.records
        difference = f"{path}: its labels are not those that were indexed; run index again" if relabelled else None
        return difference or _difference(entry, now, path)
    now, _ = _probe(root, entry.source, entry.sha256 is not None)
    other_times = now.pop("times") != entry.times
    difference = _difference(entry, now, path)
    if other_times and difference is None:
        return f"{path}: its frames are shown at other times than were indexed; run index again"
    packets = entry.frame_count if difference else count_packets(path)
    if packets != entry.frame_count:
        return f"{path}: holds {packets} frames where its header says {entry.frame_count}; re-encode it"
    return difference


def _difference(entry: VideoEntry, now: dict[str, Any], path: Path) -> str | None:
    """What tells a source from its entry first; a time alone counts where nothing better is recorded."""
    for name, value in now.items():
        was = getattr(entry, name)
        if name != "modified_ns" and value != was:
            return f"{path}: {name} is {value}, indexed as {was}; run index again"
    if now["modified_ns"] == entry.modified_ns or entry.sha256 is not None:
        return None
    return (
        f"{path}: was written anew since it was indexed, with the same size and ends; run index again "
        "(data.full_hash=true tells a copy from a change)"
    )


def _check_annotations(entry: VideoEntry, root: Path, spec: DataSetSpec) -> None:
    _load_tracks(entry, root, spec)


# ---------------------------------------------------------------------------------------------- summary


Counts = dict[str, list[int]]  # by video id, in the order of the summary's rows; see `count_frames`


def count_frames(index: Index, root: Path, fps: float, between_rows: BetweenRows = "mask") -> Counts:
    """Frames of each video sampled at `fps`: all, those of each phase, of none, showing each tool, without any label.

    Raises UserError when a video cannot be sampled at `fps` (see `most_fps`) or its annotations have changed.
    """
    return {entry.id: _count_frames(entry, root, index, fps, between_rows) for entry in index.videos}


def coverage_table(index: Index, counts: Counts) -> list[list[str]]:
    """A table: the header, then one row per video: its images, how many of them are used, and how many labelled."""
    rows = [["video", "images", "used", "with a phase", *(["with tools"] if index.dataset.tools else [])]]
    for entry in index.videos:
        count = counts[entry.id]
        without = (count[1 + len(index.dataset.phases)], *(count[-1:] if index.dataset.tools else ()))
        labelled = (f"{(count[0] - bare) / count[0]:.1%}" if count[0] else "-" for bare in without)
        rows.append([entry.id, f"{len(entry.image_frames):,}", f"{count[0]:,}", *labelled])
    return rows


def index_summary(index: Index, counts: Counts) -> list[list[str | int | float]]:
    """A table: the header, then a row each for videos, hours, sampled frames, and frames per phase and per tool.

    Columns are the splits that have videos, and all videos together. Frames without labels have rows of their own; a
    frame may show several tools.
    """
    spec = index.dataset
    groups: list[tuple[str, tuple[VideoEntry, ...]]] = [(split, index.by_split(split)) for split in SPLITS]
    groups = [(name, videos) for name, videos in groups if videos]
    if len(groups) > 1 or groups[0][0] != "none":
        groups.append(("all", index.videos))
    names = ["frames", *spec.phases, "no phase label", *spec.tools, *(["no tool labels"] if spec.tools else [])]
    columns = [np.sum([counts[entry.id] for entry in videos], axis=0).tolist() for _, videos in groups]
    hours = [sum(entry.frame_count / entry.fps for entry in videos) / 3600 for _, videos in groups]
    return [
        ["", *(name for name, _ in groups)],
        ["videos", *(len(videos) for _, videos in groups)],
        ["hours", *(round(value, 2) for value in hours)],
        *([name, *cells] for name, cells in zip(names, zip(*columns, strict=True), strict=True)),
    ]


def _count_frames(entry: VideoEntry, root: Path, index: Index, fps: float, between_rows: BetweenRows) -> list[int]:
    """Sampled frames of one video in the order of the summary's rows: all, a phase each, none, a tool each, none."""
    phase, tools = load_labels(entry, root, index, sampled_frames(entry, fps), between_rows)
    counts = [len(phase), *np.bincount(phase[phase >= 0], minlength=len(index.dataset.phases)), (phase < 0).sum()]
    if index.dataset.tools:
        counts += [*(tools > 0).sum(axis=0), (tools < 0).all(axis=1).sum()]
    return [int(count) for count in counts]
