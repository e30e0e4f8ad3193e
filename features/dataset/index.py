"""The index of a data set, `index.json`: its videos with their sources, lengths, splits and annotation files.

Paths are relative to the data root, and the root itself is never recorded, so that a data set can be moved. The same
files always give the same bytes. `features.dataset.build` makes an index and `features.dataset.check` compares it with
the files. This module only reads and writes it, without opening a video or importing a decoder.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationError, model_validator

from configs.dataset_spec import DataSetSpec, NamedSplit
from configs.errors import UserError
from configs.load import GivenKeys
from configs.schema import MAX_FPS, SplitConfig
from configs.strict import OmitsDefaults
from engine.files import read_json, sha256_json, write_json
from features.dataset.layouts import FolderLayout, RecordLayout
from features.dataset.row_numbers import RowNumbering
from features.dataset.splits import Split, assign_splits, matching_ids, rule_asked_for, with_lists
from features.ids import id_key, id_problem, natural_key, normal_id
from features.video.mp4 import MAX_FRAMES
from features.video.times import FrameTimes

FORMAT_VERSION = 1
SPLITS: tuple[Split, ...] = ("train", "val", "test", "none")


def _relative(path: str) -> str:
    """Check that a path is relative and does not contain `..`; links are checked by `engine.files.inside` on use."""
    if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\x00" in path:
        raise ValueError("must be a path below the data root")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError("contains characters that no file name has") from error
    return path


def _usable_id(video_id: str) -> str:
    if problem := id_problem(video_id):
        raise ValueError(f"a video id that {problem}")
    return normal_id(video_id)


RelativePath = Annotated[str, AfterValidator(_relative)]
VideoId = Annotated[str, Field(min_length=1), AfterValidator(_usable_id)]
StartTime = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class AnnotationFile(OmitsDefaults):
    """What the index records about an annotation file.

    `row_fps` and `row_base` say what the numbers of its rows count (`features.dataset.row_numbers.RowNumbering`).
    """

    OMITTED = frozenset({"row_fps", "row_base"})
    path: RelativePath
    sha256: Sha256
    rows: int = Field(ge=1)
    row_fps: float | None = Field(None, ge=1e-3, le=MAX_FPS, allow_inf_nan=False)
    row_base: int = Field(0, ge=0)

    @property
    def numbering(self) -> RowNumbering:
        """What the numbers of the file's rows count."""
        return RowNumbering(self.row_fps, self.row_base)


class VideoPart(OmitsDefaults):
    """One file of a recording in parts. The fields are those of `VideoEntry`.

    Files of labels are recorded here if they are for this part alone, so that their numbers start again in it.
    """

    OMITTED = frozenset({"sha256", "times", "start_s", "phase_file", "tool_file", "track_files"})
    source: RelativePath
    size_bytes: int = Field(ge=1, lt=2**63)
    modified_ns: int
    sha256_ends: Sha256
    sha256: Sha256 | None = None
    fps: float = Field(gt=0, le=MAX_FPS, allow_inf_nan=False)
    frame_count: int = Field(ge=1, le=MAX_FRAMES)
    times: FrameTimes | None = None
    start_s: StartTime = 0.0
    phase_file: AnnotationFile | None = None
    tool_file: AnnotationFile | None = None
    track_files: dict[str, AnnotationFile] = Field({})

    @model_validator(mode="after")
    def _times_fit(self) -> VideoPart:
        if self.times is not None:
            self.times.seconds(self.frame_count)
        return self


class VideoEntry(OmitsDefaults):
    """One video: its source, its split and its annotation files.

    For a folder of frames, `frames` says which source frames the images are. `fps` and `frame_count` are those of the
    source video, `size_bytes` is the sum over the images, `modified_ns` is the newest image's, and `sha256_ends` covers
    the images' names and sizes and the content of the first and the last image. A TFRecord file contains its own labels
    (`records`) and has no annotation files. Of imported features (kind `features`), the source is the other program's
    file, whose rows are the frames. For a video without a constant rate, `times` contains the times of its frames, and
    `fps` is the mean rate. If labels count from the container's start, `start_s` is when the first frame is shown, in
    seconds from there.

    For a recording in several files, `parts` describes each, in their order. Frames are numbered through all parts, and
    each part begins where the one before it ends. `source` is the first part's, sizes and frames are added, the hashes
    are those of the parts' hashes, and `fps` is the mean rate if the parts' rates are not the same. A file of labels
    with all labels of one part is recorded there; here, their hash represents them.
    """

    OMITTED = frozenset({"times", "start_s", "track_files", "parts"})
    id: VideoId
    kind: Literal["video", "frames", "tfrecord", "features"]
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
    track_files: dict[str, AnnotationFile] = Field({})  # of additional label tracks, by name
    frames: FolderLayout | None = None
    records: RecordLayout | None = None
    times: FrameTimes | None = None
    start_s: StartTime = 0.0
    parts: tuple[VideoPart, ...] = Field(())

    @model_validator(mode="after")
    def _parts_are_a_video(self) -> VideoEntry:
        if self.parts and (
            (self.kind, self.times, self.source) != ("video", None, self.parts[0].source)
            or self.frame_count != sum(part.frame_count for part in self.parts)
        ):
            raise ValueError("parts do not fit the video")
        return self

    @model_validator(mode="after")
    def _layout_fits_kind(self) -> VideoEntry:
        if (self.kind == "frames") != (self.frames is not None):
            raise ValueError("frames must be given for folders of frames, and only for them")
        if (self.kind == "tfrecord") != (self.records is not None):
            raise ValueError("records must be given for TFRecord files, and only for them")
        if self.records and (self.records.frame_count != self.frame_count or self.phase_file or self.tool_file):
            raise ValueError("the labels in records do not fit the frames")
        if self.times is not None:
            if self.kind != "video":
                raise ValueError("times can be given for video files only")
            self.times.seconds(self.frame_count)
        return self

    @property
    def files_by_role(self) -> dict[str, AnnotationFile]:
        """The video's files of labels by role: `phase`, `tool` and additional tracks, in this order."""
        files = {"phase": self.phase_file, "tool": self.tool_file, **self.track_files}
        return {role: file for role, file in files.items() if file}

    @property
    def annotation_files(self) -> list[AnnotationFile]:
        """The video's annotation files, phases first."""
        return list(self.files_by_role.values())

    @property
    def sources(self) -> tuple[VideoEntry, ...]:
        """The files of a recording in parts, each as a video of its own; otherwise the video itself."""
        if not self.parts:
            return (self,)
        return tuple(VideoEntry(id=self.id, kind="video", split=self.split, **dict(part)) for part in self.parts)

    @property
    def annotated(self) -> tuple[VideoEntry, ...]:
        """The videos to which the numbers in files of labels refer: this one or, where a part has labels, the part."""
        of_parts = {role for part in self.sources if self.parts for role in part.files_by_role}
        if not of_parts:
            return (self,)
        own: dict[str, Any] = {f"{role}_file": None for role in of_parts if role in ("phase", "tool")}
        own["track_files"] = {role: file for role, file in self.track_files.items() if role not in of_parts}
        return (self.model_copy(update=own), *self.sources)

    @property
    def paths(self) -> set[str]:
        """The paths of all files of the video: sources and labels."""
        labels = {file.path for one in self.annotated for file in one.annotation_files}
        return labels.union(one.source for one in self.sources)

    @property
    def duration_s(self) -> float:
        """How long the video is shown, with the last frame."""
        if self.times is None:
            return self.frame_count / self.fps
        return float(self.times.seconds(self.frame_count)[-1]) + 1 / self.fps

    @property
    def times_s(self) -> NDArray[np.float64] | None:
        """When each frame is shown, (F,) float64, in seconds from the first; None for a constant rate."""
        if self.times is not None:
            return self.times.seconds(self.frame_count)
        if all((part.fps, part.times) == (self.fps, None) for part in self.parts):
            return None
        files = self.sources
        starts_s = itertools.accumulate((file.duration_s for file in files), initial=0.0)
        times_s = ((file.times_s, np.arange(file.frame_count) / file.fps) for file in files)
        own_s = [even_s if own_s is None else own_s for own_s, even_s in times_s]
        return np.concatenate([start_s + time_s for start_s, time_s in zip(starts_s, own_s, strict=False)])

    @property
    def image_stride(self) -> int:
        """The number of source frames from one image to the next (1 for a video)."""
        return self.frames.stride if self.frames else 1

    @property
    def image_frames(self) -> NDArray[np.int64]:
        """The source frames (N,) int64 for which there is an image."""
        return self.frames.frames() if self.frames else np.arange(self.frame_count, dtype=np.int64)

    @property
    def most_fps(self) -> float:
        """The highest rate at which this video can be sampled."""
        if self.times_s is not None:  # recorded with pauses, at a higher rate than the mean
            usual_s = float(np.median(np.diff(self.times_s)))
            return max(self.fps, 1.0 / usual_s if usual_s > 0 else 0.0)
        return self.fps / self.image_stride


class LeftOut(OmitsDefaults):
    """A video that was found but is not used, with the reason in one line (its paths are relative to the data root).

    `split` is the split that the video would be in, or None if that is unknown. `excluded` says whether the settings
    exclude it. If it was indexed and a later stage could not use it, `source` is the hash of its ends.
    """

    OMITTED = frozenset({"split", "excluded", "source"})
    id: str = Field(min_length=1)
    reason: str
    split: Split | None = None
    excluded: bool = False
    source: Sha256 | None = None


class Index(OmitsDefaults):
    """A data set as it was found below a root.

    `left_out` contains the videos that indexing or the setting `data.exclude` left out, and those that a later stage
    could not use (`without`). They still count as videos when splits are assigned by number. `published` has the lists
    of a published split that were read from the copy.
    """

    OMITTED = frozenset({"left_out", "passed_over", "published"})
    format_version: Literal[1] = 1
    dataset: DataSetSpec
    videos: tuple[VideoEntry, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    made_from: str | None = None  # the older index files (pickles) from which videos and splits were read
    left_out: tuple[LeftOut, ...] = ()
    passed_over: tuple[LeftOut, ...] = ()  # files and folders that look like videos but match no pattern, by path
    published: dict[str, NamedSplit] = Field({})

    @model_validator(mode="after")
    def _videos_are_sound(self) -> Index:
        ids = [id_key(video_id) for video_id in self.found_ids()]
        if len(set(ids)) != len(ids):
            raise ValueError("two videos have the same id")
        for entry in self.videos:
            if entry.records and (problem := entry.records.problem(self.dataset)):
                raise ValueError(f"{entry.id}: {problem}")
        return self

    def found_ids(self) -> list[str]:
        """Return the ids of all videos that were found, including those left out, in the order of their numbers."""
        if not self.left_out:
            return [entry.id for entry in self.videos]
        return sorted([entry.id for entry in self.videos] + [video.id for video in self.left_out], key=natural_key)

    def by_split(self, split: str) -> tuple[VideoEntry, ...]:
        """Return the videos of one split, in order."""
        return tuple(entry for entry in self.videos if entry.split == split)

    def without(self, faults: Iterable[tuple[str, str]]) -> Index:
        """Return the index with these videos (ids and reasons) moved to `left_out`; no split changes."""
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
        """Return the videos left out as JSON values for results and reports.

        Each has its id and reason, its split if that is known, and `excluded` if that is true.
        """
        return [video.model_dump(mode="json", exclude={"source"}) for video in self.left_out]

    @property
    def is_partial(self) -> bool:
        """Whether a video, or a file that looks like one, is missing in the index but not excluded by the settings."""
        return any(not video.excluded for video in (*self.left_out, *self.passed_over))

    def require_excluded(self, exclude: Collection[str], where: Path) -> None:
        """Raise UserError if this index, from feature folder `where`, contains a video that `data.exclude` names."""
        names = [normal_id(name) for name in exclude]
        kept = [v.id for v in self.videos if v.id in names or any(fnmatch.fnmatchcase(v.id, name) for name in names)]
        if kept:
            raise UserError(
                f"{where}: contains {kept[0]}, which data.exclude leaves out; run `index --force`, then extract"
            )

    def require_split(self, split: SplitConfig, given: GivenKeys, where: Path) -> None:
        """Raise UserError if `--set` asks for other splits than those of this index, from feature folder `where`."""
        asked = rule_asked_for(split)
        if asked is None or not any(key.startswith("data.split.") for key in given.by_set):
            return
        wanted = assign_splits(self.found_ids(), with_lists(self.dataset, self.published), split)
        if other := next((one for one in self.videos if wanted[one.id] != one.split), None):
            raise UserError(
                f"{where}: {other.id} is in split {other.split} of these features, but data.split says "
                f"{wanted[other.id]}; leave data.split out, or run index and extract with it"
            )

    @property
    def missing(self) -> tuple[LeftOut, ...]:
        """The videos left out of a split, without those that the settings exclude."""
        return tuple(video for video in self.left_out if not video.excluded and video.split != "none")

    def require_videos(self, *splits: Split) -> None:
        """Raise UserError if one of these splits has no video left because its videos were left out."""
        for split in splits:
            lost = [video for video in self.left_out if video.split == split]
            if lost and not self.by_split(split):
                others = f" and {len(lost) - 1} more were" if lost[1:] else " was"
                remedy = "keep the video" if lost[0].excluded else "repair the file"
                raise UserError(
                    f"{split} split has no videos left: {lost[0].id}{others} left out ({lost[0].reason}); {remedy}, or "
                    "choose another data.split, then run `index --force`"
                )

    def entries_of(self, split: str, where: Path) -> tuple[VideoEntry, ...]:
        """Return the videos of a split, or of all splits (`all`). Raises UserError if there are none.

        `where` is the index file, for the message.
        """
        self.require_videos(*(part for part in SPLITS if part == split))
        entries = tuple(entry for entry in self.videos if split in ("all", entry.split))
        if not entries:
            raise UserError(f"{where}: no video in split {split}; choose another --split or data.split.rule")
        return entries

    def entry(self, video_id: str) -> VideoEntry:
        """Return the video with this id. Raises UserError if there is none."""
        wanted = normal_id(video_id)
        for entry in self.videos:
            if entry.id == wanted:
                return entry
        raise UserError(f"{video_id}: no such video in the index ({self.videos[0].id} to {self.videos[-1].id})")

    def digest(self) -> str:
        """Return the SHA-256 of everything that frames, labels and splits depend on.

        Paths, times of change, whole-file hashes and notes are not included.
        """
        moving: Any = {
            "source": True,
            "modified_ns": True,
            "sha256": True,
            "phase_file": {"path"},
            "tool_file": {"path"},
            "track_files": {"__all__": {"path"}},
        }
        moving["parts"] = {"__all__": dict(moving)}
        videos = [entry.model_dump(mode="json", exclude=moving) for entry in self.videos]
        for video in videos:
            if video["records"] is None:
                del video["records"]  # so that indices without TFRecord files keep the digest of earlier versions
        described: Any = {"name", "annotation_fps", "phases", "tools", "phase_aliases", "tool_aliases"}
        described |= {"labels", "tracks"}  # left out of the values where the description has none
        return sha256_json(
            {
                "format_version": self.format_version,
                "dataset": self.dataset.model_dump(mode="json", include=described),
                "videos": videos,
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return the index as JSON values, which `from_json` reads."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: Any, name: str = "index") -> Index:
        """Build the index from JSON values that `to_json` made. Raises UserError naming `name` for other values."""
        version = value.get("format_version") if isinstance(value, dict) else None
        if not isinstance(version, int) or "videos" not in value:
            raise UserError(f"{name}: not an index; make one with the command index")
        if version != FORMAT_VERSION:
            raise UserError(f"{name}: index format {version}, but this program reads {FORMAT_VERSION}; run index again")
        try:
            return cls.model_validate(value)
        except (ValidationError, RecursionError) as error:
            raise UserError(f"{name}: damaged index: {first_fault(error)}; run index again") from error

    def save(self, path: Path) -> None:
        """Write the index as JSON, atomically. Equal indices give equal bytes."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read an index. Raises UserError if the file is missing, unreadable, damaged or not an index."""
        return cls.from_json(read_json(path), str(path))


@dataclass(frozen=True)
class Dataset:
    """An index, together with the data root to which its paths are relative."""

    index: Index
    root: Path

    @property
    def spec(self) -> DataSetSpec:
        """The description of the data set."""
        return self.index.dataset

    def without(self, faults: Iterable[tuple[str, str]]) -> Dataset:
        """Return the data set without these videos, given as ids and reasons (see `Index.without`)."""
        return Dataset(self.index.without(faults), self.root)


def first_fault(error: Exception) -> str:
    """Describe the first error of a failed validation, and where it is."""
    if not isinstance(error, ValidationError):
        return "nested too deeply"
    fault = error.errors(include_url=False)[0]
    place = ".".join(map(str, fault["loc"])) or "whole file"
    return f"{place if place.isprintable() else ascii(place)}: {fault['msg']}"


def exclusions(ids: Sequence[str], exclude: Mapping[str, str], paths: Sequence[str] = ()) -> dict[str, str]:
    """Return the videos that the setting `data.exclude` leaves out, each with its reason.

    If several entries name a video, the first counts. An entry that names no video may name one of `paths`, which were
    passed over. Raises UserError for an entry that names neither a video nor a path.
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
