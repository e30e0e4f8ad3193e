"""Finding a data set below a root: videos, frame folders and annotations, by their names, wherever they lie.

Mirrors name their folders differently, so only file names (and the names of folders that hold images) are matched, by
the regular expressions of the data set's description. Anything that could be taken for two things is an error.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from configs.errors import UserError, listed
from configs.schema import DataConfig, DataSetSpec, FilePatterns, OmitsDefaults
from engine.files import LinkedRoot, inside, sha256_file
from engine.sniff import holds_video
from features.dataset.unmatched import (
    ImageFolder,
    is_archive,
    is_image,
    kind_of,
    looks_like_labels,
    may_be_anything,
    passed_over_folders,
    passed_over_videos,
)
from features.ids import id_key, id_problem, normal_id
from features.video.images import FrameFolder
from features.video.mp4 import MAX_FRAMES
from features.video.times import same_rate

Kind = Literal["video", "frames", "tfrecord"]
KINDS: tuple[Kind, ...] = ("video", "frames", "tfrecord")
Numbering = Literal["source", "sample"]
# What archives, file servers and disks put beside the data; some of it is unreadable, some repeats every file name.
_FOREIGN_FOLDERS = {"__macosx", "lost+found", "$recycle.bin", "system volume information", "@eadir", "#recycle"}
# Folders that are called after what they hold: their images are those of the folder above.
_UNNAMED_FOLDERS = {"frames", "images", "imgs", "img", "rgb", "jpg", "png"}


# ---------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class FoundVideo:
    """One video: its id, and the paths relative to the root of its source and annotations."""

    id: str
    kind: Kind
    source: str
    phase: str | None
    tool: str | None


@dataclass(frozen=True)
class Discovery:
    """What a root holds, in the order of video numbers, and notes on what was left over."""

    videos: tuple[FoundVideo, ...]
    notes: tuple[str, ...]
    faults: tuple[tuple[str, UserError], ...] = ()  # videos that have a file which cannot be taken, by id
    passed_over: tuple[tuple[str, str], ...] = ()  # paths of what is a video by its name and no pattern takes, and why

    @property
    def ids(self) -> list[str]:
        """Ids of all videos found, those at fault last."""
        return [video.id for video in self.videos] + [video_id for video_id, _ in self.faults]


@dataclass
class _Files:
    """Paths found, by role and by folded id (ids differ in more than case, or they are the same video)."""

    ids: dict[str, str] = field(default_factory=dict)
    by_role: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    odd_annotations: dict[str, UserError] = field(default_factory=dict)
    faults: dict[str, UserError] | None = None  # kept, by folded id, where one file must not cost the others
    numbered: dict[str, str] = field(default_factory=dict)  # frame folders that only have a number: path to id
    unmatched: list[str] = field(default_factory=list)
    image_folders: list[ImageFolder] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)

    def add(self, role: str, video_id: str, relative: str) -> None:
        key = id_key(video_id)
        self.ids.setdefault(key, video_id)
        self.by_role.setdefault(role, {}).setdefault(key, []).append(relative)

    def of(self, role: str) -> dict[str, list[str]]:
        return self.by_role.get(role, {})


def find_videos(root: Path, spec: DataSetSpec, data: DataConfig | None = None, leave_out: bool = False) -> Discovery:
    """All videos, frame folders and TFRecord files below `root` with their annotations, sorted by number (10 after 9).

    `data.sources` says which of them, and below which folder; folders that only have a number for a name count where
    nothing else is found. What `data.exclude` names by its path is not looked at. With `leave_out`, a file that leads
    out of the root, cannot be read or cannot be printed costs its own video alone.

    Hidden files and folders and what archives leave behind are passed over; links inside the root are no second copy.
    Raises UserError for a missing or unreadable folder, a link that leads out of the root, two files for one video or
    task, and when there is no video at all.
    """
    data = data or DataConfig()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {what}; set data.root (or SURGSTAGE_DATA) to the folder that holds {spec.name}")
    below = data.sources.partition(":")[2]
    if not (root / below).is_dir():
        raise UserError(f"data.sources={data.sources}: there is no folder {below} below {root}")
    files = _collect(root, spec, data, {} if leave_out else None)
    _drop_excluded(files, data)
    _place_numbered(root, files)
    faults, sources = files.faults or {}, _sources(root, files)
    faults |= {key: error for key, error in files.odd_annotations.items() if key in sources and key not in faults}
    sources = {key: source for key, source in sources.items() if key not in faults}
    if not sources and faults:
        raise next(iter(faults.values()))
    if not sources:
        raise UserError(_nothing_found(root, spec, data, files))
    roles = () if data.sources.startswith("tfrecord") else ("phase", "tool")  # these hold labels of their own
    annotations = {role: _only_ones(root, files.of(role), role) for role in roles}
    videos = tuple(
        FoundVideo(files.ids[key], kind, path, *(annotations.get(role, {}).get(key) for role in ("phase", "tool")))
        for key, (kind, path) in sorted(sources.items(), key=lambda item: natural_key(files.ids[item[0]]))
    )
    passed_over, notes = _passed_over(root, spec, files, videos)
    notes = [*_left_over(spec, videos, sources, annotations, files), *notes]
    notes += [str(error) for key, error in files.odd_annotations.items() if key not in faults]
    return Discovery(videos, tuple(notes), tuple((files.ids[key], error) for key, error in faults.items()), passed_over)


def is_chosen(kind: Kind, source: str, data: DataConfig) -> bool:
    """Whether `data.sources` takes a source of this kind at this path."""
    chosen, _, below = data.sources.partition(":")
    return chosen in ("auto", kind) and PurePosixPath(source).is_relative_to(below)


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which numbers count as numbers: video9 before video10."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple((0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts if part)


def _collect(root: Path, spec: DataSetSpec, data: DataConfig, faults: dict[str, UserError] | None) -> _Files:
    patterns = {role: spec.patterns.compiled(role) for role in FilePatterns.model_fields}
    files = _Files(faults=faults)
    for folder, entries in _walk(root):
        relative = folder.relative_to(root).as_posix()
        here = [kind for kind in KINDS if is_chosen(kind, relative, data)]
        names = [entry.name for entry in entries]
        files.endings.update(os.path.splitext(name)[1].lower() or name for name in names)
        if "frames" in here and folder != root and _add_frames(files, root, folder, names, spec):
            names = [name for name in names if not patterns["frame"].fullmatch(name)]
        roles = ("phase", *(["tool"] if spec.tools else []), *(kind for kind in here if kind != "frames"))
        for name in names:
            matches = {role: match for role in roles if (match := patterns[role].fullmatch(name))}
            for role, match in matches.items():
                _add(files, role, _video_id(match, spec, folder / name), root, folder / name)
            if not matches and kind_of(name) in (None, *here):
                files.unmatched.append((folder / name).relative_to(root).as_posix())
    return files


def _add_frames(files: _Files, root: Path, folder: Path, names: Sequence[str], spec: DataSetSpec) -> bool:
    """Whether the images in `folder` are a video's frames: by its name, or by its parent's where it has none."""
    pattern, frame = spec.patterns.compiled("frames"), spec.patterns.compiled("frame")
    above = folder.parent != root and folder.name.casefold() in _UNNAMED_FOLDERS
    name = folder.parent.name if above and not pattern.fullmatch(folder.name) else folder.name
    named = pattern.fullmatch(name)
    if any(map(frame.fullmatch, names)):
        if named:
            _add(files, "frames", _video_id(named, spec, folder), root, folder)
            return True
        if video_id := _id_of_number(name, spec):
            files.numbered[folder.relative_to(root).as_posix()] = video_id
            return True
    if len(images := list(filter(is_image, names))) > 1:
        files.image_folders.append(ImageFolder(folder.relative_to(root).as_posix(), tuple(images[:2]), bool(named)))
    return False


def _id_of_number(name: str, spec: DataSetSpec) -> str | None:
    """The id that a bare number stands for, where the data set's videos are numbered."""
    if not re.fullmatch("[0-9]{1,9}", name):
        return None
    video_id = normal_id(numbered_id(int(name), spec))
    match = spec.patterns.compiled("video").fullmatch(f"{video_id}.mp4")
    return video_id if match and match["id"].isdecimal() and int(match["id"]) == int(name) else None


def _place_numbered(root: Path, files: _Files) -> None:
    """Take folders with a number for a name as frame folders, but only where no video has a source that says more."""
    if not any(files.of(kind) for kind in KINDS):
        for path, video_id in files.numbered.items():
            _add(files, "frames", video_id, root, root / path)
        files.numbered.clear()


def _drop_excluded(files: _Files, data: DataConfig) -> None:
    """Forget the files that `data.exclude` names by their paths. Raises UserError where a video would be left bare."""
    entries = [entry for entry in map(normal_id, data.exclude) if not fnmatch.filter(files.ids.values(), entry)]
    for role, found in files.by_role.items():
        for key, paths in found.items():
            dropped = [path for path in paths if any(fnmatch.fnmatchcase(normal_id(path), entry) for entry in entries)]
            if role in KINDS and dropped and len(dropped) == len(paths):
                raise UserError(
                    f"data.exclude: {dropped[0]} is all there is of {files.ids[key]}; name the video instead"
                )
            found[key] = [path for path in paths if path not in dropped]
            files.excluded += dropped
        files.by_role[role] = {key: paths for key, paths in found.items() if paths}


def _add(files: _Files, role: str, video_id: str, root: Path, path: Path) -> None:
    """Note a file, or where faults are kept what is wrong with it. Raises UserError elsewhere."""
    try:
        files.add(role, video_id, _checked(root, path))
    except UserError as error:
        if files.faults is None:
            raise
        key = id_key(video_id)
        files.ids.setdefault(key, video_id)
        (files.odd_annotations if role in ("phase", "tool") else files.faults).setdefault(key, error)


def _walk(root: Path) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Every folder from `root` down with its visible entries that are not folders, in a fixed order, each once.

    A link to a folder inside the root is passed over, since that is found where it really is; one that leads out is
    followed where the root allows it.
    """
    waiting, seen = [root], set()
    while waiting:
        folder = waiting.pop()
        if isinstance(root, LinkedRoot):
            real = folder.resolve()
            if real in seen:  # a link that leads back, or a second one to the same place
                continue
            seen.add(real)
        files, folders = [], []
        for entry in _entries(folder):
            if entry.name.startswith(".") or entry.name.casefold() in _FOREIGN_FOLDERS:
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif entry.is_symlink() and os.path.isdir(entry.path):
                _inside(root, Path(entry.path))
                if not Path(entry.path).resolve().is_relative_to(root.resolve()):
                    folders.append(Path(entry.path))
            else:
                files.append(entry)
        yield folder, files
        waiting += reversed(folders)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be read ({error.strerror})") from error


def _inside(root: Path, path: Path) -> str:
    """`path` relative to the root. Raises UserError when it is a link that leads out."""
    relative = path.relative_to(root).as_posix()
    try:
        inside(root, relative)
    except UserError as error:
        raise UserError(
            f"{path}: is a link that leads out of the data root; set data.root to a folder that holds everything, or "
            "data.follow_links=true to allow such links"
        ) from error
    except (OSError, RuntimeError) as error:  # Path.resolve on a link that leads to itself
        raise UserError(f"{path}: is a link that leads nowhere") from error
    return relative


def _checked(root: Path, path: Path) -> str:
    """`path` relative to the root, once it is known to be an ordinary file or folder with a usable name."""
    relative = _inside(root, path)
    if not relative.isprintable():
        raise UserError(f"{relative!a}: this name holds characters that cannot be printed; rename it")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        hint = "; it is a link to a file that is not there" if path.is_symlink() else ""
        raise UserError(f"{path}: cannot be read ({error.strerror}){hint}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path}: is not an ordinary file")
    return relative


def _video_id(match: re.Match[str], spec: DataSetSpec, path: Path) -> str:
    """The video's id: the group `id`, put through the data set's format when it is a number."""
    text = match.group("id") or ""
    video_id = normal_id(numbered_id(int(text), spec) if text.isdecimal() else text)
    if (problem := id_problem(video_id)) and video_id.isprintable():
        raise UserError(f"{path}: the video id {video_id!r} {problem}; rename it")
    return video_id


def id_of_folder(name: str, spec: DataSetSpec) -> str | None:
    """The video id that a folder of frames called `name` has, a bare number included; None for any other name."""
    match = spec.patterns.compiled("frames").fullmatch(name) or re.fullmatch("(?P<id>[0-9]+)", name)
    return _video_id(match, spec, Path(name)) if match else None


def numbered_id(number: int, spec: DataSetSpec) -> str:
    """The id of the video with this number."""
    try:
        return spec.id_format.format(number=number)
    except (LookupError, ValueError, AttributeError) as error:
        raise UserError(f"data set {spec.name}: id_format {spec.id_format!r} does not take a number") from error


_WORDS = {"video": "a video", "frames": "a folder of its frames", "tfrecord": "a TFRecord file of its frames"}


def _sources(root: Path, files: _Files) -> dict[str, tuple[Kind, str]]:
    """The one source of each video, by folded id. Raises UserError where a video has two."""
    sources: dict[str, tuple[Kind, str]] = {}
    for kind in KINDS:
        for key, path in sorted(_only_ones(root, files.of(kind), kind).items()):
            if key in sources:
                other, other_path = sources[key]
                raise UserError(
                    f"{root / other_path} and {root / path}: {_WORDS[other]} and {_WORDS[kind]}; pixels may differ, "
                    f"so choose with data.sources={other} or data.sources={kind}"
                )
            sources[key] = (kind, path)
    return sources


def _only_ones(root: Path, found: dict[str, list[str]], role: str) -> dict[str, str]:
    """The one path of each id. A link beside what it points to is not a second file; anything else is an error."""
    what = {"video": "videos", "frames": "frame folders", "tfrecord": "TFRecord files"}.get(
        role, f"{role} annotation files"
    )
    chosen = {}
    for key, paths in found.items():
        real = {(root / path).resolve(): path for path in sorted(paths, key=lambda path: (root / path).is_symlink())}
        if len(real) > 1:
            first, second = sorted(paths)[:2]
            raise UserError(
                f"{root / first} and {root / second}: two {what} for one video; {_choices(role, first, second, found)}"
            )
        chosen[key] = min(paths, key=lambda path: ((root / path).is_symlink(), path))
    return chosen


def _choices(role: str, first: str, second: str, found: dict[str, list[str]]) -> str:
    """How to take one of two files or folders of one video; a folder is proposed where it loses no other video."""
    one, other = PurePosixPath(first).parent, PurePosixPath(second).parent
    folders = [folder for folder, rest in ((one, other), (other, one)) if not rest.is_relative_to(folder)]
    folders = [
        folder
        for folder in folders
        if all(any(PurePosixPath(path).is_relative_to(folder) for path in paths) for paths in found.values())
    ]
    if role in KINDS and folders:
        choices = " or ".join(f"data.sources={role}:{folder}" for folder in folders)
        return f"choose one with {choices}"
    excluded = json.dumps({second: "second copy"}, ensure_ascii=False)
    return f"remove one of them, or leave one out with --set 'data.exclude={excluded}'"


def _nothing_found(root: Path, spec: DataSetSpec, data: DataConfig, files: _Files) -> str:
    endings = sorted(files.endings.items(), key=lambda item: (-item[1], item[0]))[:5]
    seen = ", ".join(f"{count} {ending}" for ending, count in endings) or "no files"
    named = [path for path in files.unmatched if kind_of(path) or _is_unnamed_video(root, path)]
    passed = passed_over_videos(named, (), spec)
    passed |= passed_over_folders(files.image_folders, spec)
    passed |= dict.fromkeys(filter(is_archive, files.unmatched), "is an archive: unpack it")
    what = "" if data.sources == "auto" else f" (data.sources={data.sources})"
    if passed:
        (first, why), *rest = passed.items()
        more = f" and {len(rest)} more ({listed([path for path, _ in rest], 9)})" if rest else ""
        return f"{root}: no videos of {spec.name} found{what}; {first}{more}: {why}; what is there: {seen}"
    if sum(is_image(entry.name) for entry in _entries(root)) > 1:
        return f"{root}: no videos of {spec.name} found{what}, only images; set data.root to the folder above it"
    names = " or ".join(filter(None, (spec.patterns.video, spec.patterns.tfrecord)))
    return (
        f"{root}: no videos of {spec.name} found{what}: looked for files named {names} and folders of images named "
        f"{spec.patterns.frames}; what is there: {seen}"
    )


def _passed_over(
    root: Path, spec: DataSetSpec, files: _Files, videos: Sequence[FoundVideo]
) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """What looks like a video of the data set and is none of those found, with the reasons, and notes on the rest."""
    taken = [video.source for video in videos]
    places = {PurePosixPath(video.source).parent for video in videos if video.kind == "frames"}
    folders = [*files.image_folders, *(ImageFolder(path, (), False) for path in files.numbered)]
    missed = [one for one in folders if one.named or PurePosixPath(one.path).parent in places]
    others = [one.path for one in folders if one not in missed]
    called_so = [path for path in files.unmatched if kind_of(path) == "video" or _is_unnamed_video(root, path)]
    unmatched = [path for path in called_so if not _leads_inside(root, root / path)]
    reasons = {**passed_over_videos(unmatched, taken, spec), **passed_over_folders(missed, spec)}
    found = sorted(reasons.items(), key=lambda item: natural_key(item[0]))
    notes = []
    if others:
        notes.append(f"{len(others)} other folder(s) of images, not named like a video: {listed(others, 10)}")
    if numbered := [path for path in others if path in files.numbered]:
        parent = PurePosixPath(numbered[0]).parent
        notes[-1] += f" (data.sources=frames:{parent} takes those that have a number for a name)"
    return (*found, *((path, "") for path in files.excluded)), notes


def _is_unnamed_video(root: Path, path: str) -> bool:
    place = root / path
    return may_be_anything(path) and place.is_file() and not place.is_symlink() and holds_video(place)


def _leads_inside(root: Path, path: Path) -> bool:
    """Whether a file is a link to another one below the root, which is found or listed where it really is."""
    return path.is_symlink() and Path(os.path.realpath(path)).is_relative_to(root.resolve())


def _left_over(
    spec: DataSetSpec,
    videos: Sequence[FoundVideo],
    sources: dict[str, tuple[Kind, str]],
    annotations: dict[str, dict[str, str]],
    files: _Files,
) -> Iterator[str]:
    """Notes on what is left over: odd TFRecord files, archives, annotations, videos without any."""
    if odd := [path for path in files.unmatched if kind_of(path) == "tfrecord"]:
        yield f"{len(odd)} TFRecord file(s) left out, not named like a video: {listed(odd, 10)}"
    if archives := [path for path in files.unmatched if is_archive(path) and not kind_of(path)]:
        yield f"{len(archives)} archive(s), not looked into: {listed(archives, 10)}"
    for role, paths in annotations.items():
        orphans = [path for key, path in sorted(paths.items()) if key not in sources]
        if orphans:
            yield f"{len(orphans)} {role} annotation file(s) belong to no video here ({listed(orphans, 10)})"
    lacking = []
    for role, wanted in (("phase", True), ("tool", bool(spec.tools))):
        bare = [video.id for video in videos if getattr(video, role) is None and video.kind != "tfrecord"]
        if wanted and bare:
            lacking.append(role)
            yield f"{len(bare)} video(s) without {role} annotations ({listed(bare, 10)})"
    labels = [path for path in files.unmatched if looks_like_labels(path)]
    if lacking and labels:
        patterns = " or ".join(f"patterns.{role}, {getattr(spec.patterns, role)}" for role in lacking)
        yield (
            f"{len(labels)} file(s) look like annotations, but their names do not match {patterns}: "
            f"{listed(labels, 10)}; rename or convert them (tab-separated text), or describe their names there"
        )


# ---------------------------------------------------------------------------------------------- frame folders


class FolderLayout(OmitsDefaults):
    """How the images of a folder lie on the source's timeline.

    Image i (of `count`) shows source frame `first` + i * `stride`. `numbering` and `base` say what the numbers in the
    names mean: source frames or samples, and which is the video's first. `missing` has runs of images that are not
    there, each its first i and the one after its last.
    """

    OMITTED = frozenset({"missing"})
    numbering: Numbering
    base: int = Field(ge=0, lt=10**15)
    stride: int = Field(ge=1, le=10**9)
    first: int = Field(ge=0, le=10**9)
    count: int = Field(ge=1, le=MAX_FRAMES)
    missing: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _missing_lie_inside(self) -> FolderLayout:
        ends = [0, *(end for run in self.missing for end in run), self.count]  # the first and last image are there
        if any(one >= other for one, other in pairwise(ends)) and self.missing:
            raise ValueError("missing images are not runs inside the others")
        return self

    @property
    def frame_count(self) -> int:
        """Source frames that the images stand for, each for a stride."""
        return self.first + self.count * self.stride

    def frames(self) -> np.ndarray:
        """Source frame (N,) int64 of each image that is there."""
        there = np.ones(self.count, dtype=bool)
        for start, stop in self.missing:
            there[start:stop] = False
        return self.first + np.flatnonzero(there) * self.stride


@dataclass(frozen=True, eq=False)
class FolderScan:
    """The images of a folder in the order of their numbers: `numbers` (N,) int64, names, sizes, newest change."""

    path: Path
    numbers: np.ndarray
    names: tuple[str, ...]
    sizes_bytes: tuple[int, ...]
    modified_ns: int

    def identity(self) -> str:
        """SHA-256 over all names and sizes and the content of the first and the last image."""
        ends = [sha256_file(self.path / name) for name in (self.names[0], self.names[-1])]
        return sha256(json.dumps([self.names, self.sizes_bytes, ends]).encode()).hexdigest()

    def content(self) -> str:
        """SHA-256 over the names and the whole content of all images."""
        return sha256(json.dumps([(name, sha256_file(self.path / name)) for name in self.names]).encode()).hexdigest()


def scan_folder(root: Path, relative: str, spec: DataSetSpec) -> FolderScan:
    """The images of the frame folder `relative`. Raises UserError for empty images and for two with one number."""
    folder = inside(root, relative)
    pattern = spec.patterns.compiled("frame")
    images: dict[int, tuple[str, int]] = {}
    modified_ns = 0
    for entry in _entries(folder):
        match = pattern.fullmatch(entry.name)
        if match is None or entry.name.startswith(".") or entry.is_dir():
            continue
        number = _image_number(match, spec)
        if number in images:
            raise UserError(f"{entry.path} and {folder / images[number][0]}: two images with number {number}")
        images[number] = (entry.name, _image_size(root, entry))
        modified_ns = max(modified_ns, entry.stat().st_mtime_ns)
    if not images:
        raise UserError(f"{folder}: holds no image named {spec.patterns.frame}")
    numbers = sorted(images)
    names, sizes = zip(*(images[number] for number in numbers), strict=True)
    return FolderScan(folder, np.array(numbers, dtype=np.int64), names, sizes, modified_ns)


def scan_names(where: Path, names: Sequence[str], spec: DataSetSpec) -> FolderScan:
    """Images that a list names, in its order, as if they lay in the folder `where` (which is for messages alone).

    Raises UserError for a name that is no image's and for numbers that do not rise.
    """
    pattern = spec.patterns.compiled("frame")
    numbers = []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            raise UserError(f"{where}: {name[:60]!r} is not named like an image of data set {spec.name}")
        numbers.append(_image_number(match, spec))
        if len(numbers) > 1 and numbers[-1] <= numbers[-2]:
            raise UserError(f"{where}: {name} comes after {names[len(numbers) - 2]}: not in the order of time")
    return FolderScan(where, np.array(numbers, dtype=np.int64), tuple(names), (1,) * len(names), 0)


def _image_number(match: re.Match[str], spec: DataSetSpec) -> int:
    text = match.group("frame") or ""
    if not (text.isdecimal() and len(text) <= 15):
        raise UserError(f"{match.string}: {text!r} is no frame number; see patterns.frame of data set {spec.name}")
    return int(text)


def _image_size(root: Path, entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        _checked(root, Path(entry.path))
    size = entry.stat().st_size
    if size == 0:
        raise UserError(f"{entry.path}: this image is empty (0 bytes)")
    return size


@dataclass(frozen=True)
class LabelEnd:
    """How far labels run: `frame`, the first source frame after them, the coarsest stride among their rows, and the
    number of their first row."""

    frame: int
    stride: int
    first: int = 0


def infer_layout(scan: FolderScan, spec: DataSetSpec, data: DataConfig, labels: LabelEnd | None) -> FolderLayout:
    """What the numbers in a folder's image names mean.

    Settings decide where they are given. Otherwise: the first number is the base; numbers more than one apart count
    source frames; consecutive numbers count source frames or samples, whichever of the usual rates (those that divide
    the source's, and whole seconds) makes the images last as long as the labels. Raises UserError that asks for the
    setting when that is not unambiguous. Images may be missing.
    """
    spacing = _spacing(scan)
    base = _base(scan, data)
    offset = int(scan.numbers[0]) - base
    if labels and labels.first == base > 1:  # rows go on from folder to folder as images do
        labels = replace(labels, frame=labels.frame - base)
    by_sample = data.frame_numbering == "sample" or (data.frame_numbering == "auto" and data.folder_fps is not None)
    if data.frame_numbering == "source" and data.folder_fps is not None:
        raise UserError("data.folder_fps says how images numbered by sample were taken; it contradicts frame_numbering")
    if by_sample and spacing > 1:
        raise UserError(
            f"{scan.path}: numbers are {spacing} apart ({scan.names[0]}, {scan.names[1]}), so they do not count "
            "samples; set data.frame_numbering=source"
        )
    if by_sample:
        step = _step_of_rate(data.folder_fps, spec) if data.folder_fps else _step_of_length(scan, offset, spec, labels)
        return _layout("sample", base, step, offset * step, spacing, scan)
    if data.frame_numbering == "auto" and spacing == 1:
        step = _step_of_length(scan, offset, spec, labels)
        if step == 1 and labels and labels.stride == 1:
            _require_no_samples(scan, spec, data)
        return _layout("source" if step == 1 else "sample", base, step, offset * step, spacing, scan)
    layout = _layout("source", base, spacing, offset, spacing, scan)
    if data.frame_numbering == "auto" and labels and not _as_long(layout, labels, spec):
        raise UserError(
            f"{scan.path}: images numbered up to {int(scan.numbers[-1])} in steps of {spacing} do not last as long as "
            f"labels up to frame {labels.frame - 1} at {spec.annotation_fps:g} fps; set data.frame_numbering=source if "
            "they do count source frames"
        )
    return layout


def _as_long(layout: FolderLayout, labels: LabelEnd, spec: DataSetSpec) -> bool:
    """Whether labels last as long as the images, as numbers of source frames or, one apart, of images or seconds."""
    counted = [(layout.frame_count, 2 * max(layout.stride, labels.stride))]
    if labels.stride == 1:
        counted += [(layout.frame_count // layout.stride, 2), (round(layout.frame_count / spec.annotation_fps), 2)]
    return any(abs(length - labels.frame) <= slack for length, slack in counted)


def _require_no_samples(scan: FolderScan, spec: DataSetSpec, data: DataConfig) -> None:
    """Raise UserError that asks, where a row per image may as well mean samples, of which sampling would drop most."""
    used = -(-len(scan.names) * data.fps // spec.annotation_fps)
    if 2 * used < len(scan.names):
        raise UserError(
            f"{_ask(scan)} (with a row for each, they can be either; as source frames at {spec.annotation_fps:g} fps, "
            f"data.fps={data.fps:g} would use {used:.0f} of {len(scan.names)})"
        )


def _layout(numbering: Numbering, base: int, stride: int, first: int, spacing: int, scan: FolderScan) -> FolderLayout:
    """The layout of images whose numbers are multiples of their spacing apart."""
    place = (scan.numbers - scan.numbers[0]) // spacing
    gaps = np.flatnonzero(np.diff(place) > 1)
    return FolderLayout(
        numbering=numbering,
        base=base,
        stride=stride,
        first=first,
        count=int(place[-1]) + 1,
        missing=tuple((int(place[gap]) + 1, int(place[gap + 1])) for gap in gaps),
    )


def _spacing(scan: FolderScan) -> int:
    """The distance between numbers, but where some are missing. Raises UserError naming one that is out of step."""
    steps = np.diff(scan.numbers)
    if len(steps) == 0:
        return 1
    distances, counts = np.unique(steps, return_counts=True)
    spacing = int(distances[np.argmax(counts)])
    wrong = np.flatnonzero(steps % spacing)
    if len(wrong):
        at = int(wrong[0])
        raise UserError(
            f"{scan.path}: {scan.names[at + 1]} is out of step: it follows {scan.names[at]}, and numbers are {spacing} "
            "apart"
        )
    return spacing


def _base(scan: FolderScan, data: DataConfig) -> int:
    first = int(scan.numbers[0])
    if data.frame_base == "auto" and first not in (0, 1):
        raise UserError(
            f"{scan.path}: numbers start at {first} ({scan.names[0]}), neither 0 nor 1: restore the missing images, or "
            "set data.frame_base=0 or 1 where they are lost, data.frame_base=first where each folder begins at its own "
            "number"
        )
    base = data.frame_base if isinstance(data.frame_base, int) else first
    if first < base:
        raise UserError(f"{scan.path}: {scan.names[0]} is numbered below data.frame_base={base}")
    return base


def _step_of_rate(folder_fps: float, spec: DataSetSpec) -> int:
    """Source frames between samples taken at `folder_fps`."""
    ratio = spec.annotation_fps / folder_fps
    if not same_rate(round(ratio), ratio):
        raise UserError(f"data.folder_fps={folder_fps:g} does not divide the source's {spec.annotation_fps:g} fps")
    return round(ratio)


def _step_of_length(scan: FolderScan, offset: int, spec: DataSetSpec, labels: LabelEnd | None) -> int:
    """Source frames between consecutively numbered images, from the labels' length. Raises UserError if unclear."""
    if labels is None:
        raise UserError(f"{_ask(scan)} (there are no labels to infer it from)")
    positions = int(scan.numbers[-1] - scan.numbers[0]) + 1 + offset
    nominal = max(round(spec.annotation_fps), 1)
    steps = [step for step in range(1, nominal) if nominal % step == 0]
    steps += range(nominal, labels.frame + 2 * nominal, nominal)
    exact = [step for step in steps if -(-labels.frame // step) == positions]
    near = [step for step in steps if abs(positions * step - labels.frame) <= 2 * max(step, labels.stride)]
    for fitting in (exact, near):
        if len(fitting) == 1:
            return fitting[0]
    fits = "several rates fit" if exact or near else "no usual rate fits"
    raise UserError(f"{_ask(scan)} ({fits} labels of {labels.frame} frames)")


def _ask(scan: FolderScan) -> str:
    return (
        f"{scan.path}: names are numbered {int(scan.numbers[0])} to {int(scan.numbers[-1])}; source frames or samples? "
        "Set data.frame_numbering=source, or data.folder_fps to the images per second"
    )


def frame_folder(root: Path, relative: str, spec: DataSetSpec, layout: FolderLayout) -> FrameFolder:
    """The images of an indexed folder as source frames. Raises UserError when they are not what was indexed."""
    scan = scan_folder(root, relative, spec)
    indices = source_frames(scan, layout)
    return FrameFolder(files=tuple(zip(indices.tolist(), scan.names, strict=True)), fps=spec.annotation_fps)


def source_frames(scan: FolderScan, layout: FolderLayout) -> np.ndarray:
    """Source frame (N,) int64 of each image. Raises UserError when numbers and layout do not agree."""
    unit = layout.stride if layout.numbering == "sample" else 1
    indices = (scan.numbers - layout.base) * unit
    if not np.array_equal(indices, layout.frames()):
        raise UserError(f"{scan.path}: its images are not those in the index; run index again")
    return indices


def require_one_base(layouts: Sequence[tuple[str, FolderLayout]], data: DataConfig) -> None:
    """Raise UserError when folders start at different numbers: more likely a lost first image than two habits."""
    first: dict[int, str] = {}
    for path, layout in layouts:
        first.setdefault(layout.base, path)
    if len(first) > 1 and data.frame_base == "auto":
        raise UserError(
            f"{first[1]}: images are numbered from 1, those of {first[0]} from 0; restore image 0, or set "
            "data.frame_base if both are right"
        )
