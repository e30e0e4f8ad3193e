"""Find a data set below a root: videos, frame folders, TFRecord files and annotations, by their names.

The names of files, and of folders of images, are matched with the regular expressions in the data set's description.
The names of other folders do not matter, since they differ between copies of a data set. Anything ambiguous is an
error. For files that match no pattern, `features.dataset.unmatched` explains why.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from configs.dataset_spec import DataSetSpec, FilePatterns
from configs.errors import UserError, listed
from configs.file_pattern import file_pattern, match_path, part_number
from configs.schema import DataConfig
from engine.files import LinkedRoot, inside
from engine.sniff import holds_video
from features.dataset.unmatched import (
    ImageFolder,
    example_name,
    is_archive,
    is_image,
    kind_of,
    looks_like_labels,
    may_be_anything,
    passed_over_folders,
    passed_over_videos,
)
from features.ids import id_key, id_problem, natural_key, normal_id, numbered_id

Kind = Literal["video", "frames", "tfrecord"]
KINDS: tuple[Kind, ...] = ("video", "frames", "tfrecord")
# Folders that archives, file servers and disks create. They are skipped: some are unreadable, some repeat all file
# names.
_FOREIGN_FOLDERS = {"__macosx", "lost+found", "$recycle.bin", "system volume information", "@eadir", "#recycle"}
# Folder names that only describe the content: the video is then named by the folder above.
_UNNAMED_FOLDERS = {"frames", "images", "imgs", "img", "rgb", "jpg", "png"}
_WORDS = {"video": "a video", "frames": "a folder of its frames", "tfrecord": "a TFRecord file of its frames"}
# A file's part of a recording if it is not one part but for the whole. The smallest number, so that it comes first.
WHOLE = -1
Paths = dict[int, str]  # paths by part
_PLURALS = {"video": "videos", "frames": "frame folders", "tfrecord": "TFRecord files"}


@dataclass(frozen=True)
class FoundVideo:
    """One video: its id, and the paths of its source and of its own files of labels by role, relative to the root.

    A recording in several files has `parts` in their order, each with the files of labels that are for it alone, and
    `source` is the first part's.
    """

    id: str
    kind: Kind
    source: str
    labels: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[FoundVideo, ...] = ()

    @property
    def paths(self) -> set[str]:
        """The paths of all files of the video: sources and labels."""
        return {self.source, *self.labels.values()}.union(*(part.paths for part in self.parts))

    def has_labels(self, role: str) -> bool:
        """Whether the video or one of its parts has a file of labels with this role."""
        return role in self.labels or any(role in part.labels for part in self.parts)


@dataclass(frozen=True)
class Discovery:
    """What was found below a root, in the order of video numbers, with notes on files that were not used."""

    videos: tuple[FoundVideo, ...]
    notes: tuple[str, ...]
    faults: tuple[tuple[str, UserError], ...] = ()  # (id, error) of videos with an unusable file
    passed_over: tuple[tuple[str, str], ...] = ()  # (path, reason) of videos that match no pattern
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by role: files with labels of many videos

    @property
    def ids(self) -> list[str]:
        """The ids of all videos found, with those that have errors last."""
        return [video.id for video in self.videos] + [video_id for video_id, _ in self.faults]


def find_videos(root: Path, spec: DataSetSpec, data: DataConfig | None = None, leave_out: bool = False) -> Discovery:
    """Find all videos, frame folders and TFRecord files below `root`, with their annotations.

    They are sorted by number (10 after 9). `data.sources` selects the kind, and a folder below the root. A folder of
    images whose name is only a number is used only if there are no other videos. Paths that `data.exclude` names are
    skipped. With `leave_out`, a file that leads out of the root, is unreadable or has an unprintable name excludes only
    its own video.

    Hidden files and folders, and leftovers of archives, are ignored; a link to a file inside the root does not count as
    a second copy. Raises UserError if a folder is missing or unreadable, if a link leads out of the root, if a video
    has two files of one kind, or if there is no video.
    """
    data = data or DataConfig()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {what}; set data.root (or SURGSTAGE_DATA) to the folder that holds {spec.name}")
    below = data.sources.partition(":")[2]
    if not (root / below).is_dir():
        raise UserError(f"data.sources={data.sources}: there is no folder {below} below {root}")
    files = _Files(root, spec, data, leave_out)
    files.collect()
    files.drop_excluded()
    files.place_numbered()
    sources = files.sources()
    roles = () if data.sources.startswith("tfrecord") else spec.roles  # TFRecord files contain their labels
    annotations = {role: files.only_ones(role) for role in roles if sources and role not in files.shared}
    files.check_parts(sources, annotations)
    odd = {key: error for key, error in files.odd_annotations.items() if key in sources and key not in files.faults}
    faults = files.faults | odd
    sources = {key: source for key, source in sources.items() if key not in faults}
    if not sources and faults:
        raise next(iter(faults.values()))
    if not sources:
        raise UserError(_nothing_found(files))
    videos = tuple(
        _found_video(files.ids[key], kind, paths, {role: of[key] for role, of in annotations.items() if key in of})
        for key, (kind, paths) in sorted(sources.items(), key=lambda item: natural_key(files.ids[item[0]]))
    )
    passed_over, notes = _passed_over(files, videos)
    notes = [*_left_over(files, videos, sources, annotations), *notes]
    notes += [str(error) for key, error in files.odd_annotations.items() if key not in faults]
    failed = tuple((files.ids[key], error) for key, error in faults.items())
    shared = {role: tuple(sorted(paths)) for role, paths in files.shared.items() if role in roles}
    return Discovery(videos, tuple(notes), failed, passed_over, shared)


def _found_video(video_id: str, kind: Kind, sources: Paths, labels: Mapping[str, Paths]) -> FoundVideo:
    """Return a video of these files. A recording of which there is one part only is an ordinary video."""
    parts = [
        FoundVideo(video_id, kind, path, {role: paths[part] for role, paths in labels.items() if part in paths})
        for part, path in sorted(sources.items())
    ]
    whole = {role: paths[WHOLE] for role, paths in labels.items() if WHOLE in paths}
    if len(parts) == 1:
        return replace(parts[0], labels={**parts[0].labels, **whole})
    return FoundVideo(video_id, kind, parts[0].source, whole, tuple(parts))


def is_chosen(kind: str, source: str, data: DataConfig) -> bool:
    """Whether `data.sources` selects a source of this kind at this path."""
    chosen, _, below = data.sources.partition(":")
    return chosen in ("auto", kind) and PurePosixPath(source).is_relative_to(below)


@dataclass
class _Files:
    """The files below `root`, by role and by the key of their video (`id_key`, which ignores case)."""

    root: Path
    spec: DataSetSpec
    data: DataConfig
    keep_faults: bool  # whether a bad file excludes only its own video; otherwise the first error is raised
    ids: dict[str, str] = field(default_factory=dict)
    by_role: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    faults: dict[str, UserError] = field(default_factory=dict)  # errors of sources
    odd_annotations: dict[str, UserError] = field(default_factory=dict)
    numbered: dict[str, str] = field(default_factory=dict)  # id by path, for frame folders whose name is only a number
    unmatched: list[str] = field(default_factory=list)
    image_folders: list[ImageFolder] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    shared: dict[str, list[str]] = field(default_factory=dict)  # by role: files with the labels of several videos
    parts: dict[tuple[str, str], int] = field(default_factory=dict)  # number by role and path, for parts of recordings

    def of(self, role: str) -> dict[str, list[str]]:
        """Return the paths with this role, by the key of their video."""
        return self.by_role.get(role, {})

    def relative(self, path: Path) -> str:
        """Return a path below the root as a relative path."""
        return path.relative_to(self.root).as_posix()

    def collect(self) -> None:
        """Examine every file and folder below the root."""
        patterns = {role: self.spec.patterns.compiled(role) for role in FilePatterns.model_fields}
        labels = {role: file_pattern(self.spec.label_pattern(role) or "(?!)") for role in self.spec.roles}
        sources = {role: self.spec.label_source(role) for role in self.spec.roles}
        self.shared = {role: [] for role, source in sources.items() if source and source.is_shared}
        for folder, entries in _walk(self.root):
            here = [kind for kind in KINDS if is_chosen(kind, self.relative(folder), self.data)]
            names = [entry.name for entry in entries]
            if self.spec.patterns.ignore:
                names = [one for one in names if not self._match(patterns["ignore"], folder / one)]
            self.endings.update(os.path.splitext(name)[1].lower() or name for name in names)
            if "frames" in here and folder != self.root and self._add_frames(folder, names):
                names = [name for name in names if not patterns["frame"].fullmatch(name)]
            kinds = [kind for kind in here if kind != "frames"]
            for name in names:
                path = folder / name
                matches: dict[str, re.Match[str]] = {
                    kind: match for kind in kinds if (match := self._match(patterns[kind], path))
                }
                matches |= {role: match for role, one in labels.items() if (match := self._match(one, path))}
                for role, match in matches.items():
                    if role in self.shared:
                        self.shared[role].append(checked_path(self.root, path))
                    else:
                        self.add(role, _video_id(match, self.spec, path), path, match.groupdict().get("part"))
                if not matches and kind_of(name) in (None, *here):
                    self.unmatched.append(self.relative(path))

    def _match(self, pattern: re.Pattern[str], path: Path) -> re.Match[str] | None:
        return match_path(pattern, PurePosixPath(self.relative(path)))

    def add(self, role: str, video_id: str, path: Path, part: str | None = None) -> None:
        """Add a file or folder. If something is wrong with it, raise UserError, or record that with `keep_faults`."""
        key = id_key(video_id)
        try:
            relative = checked_path(self.root, path)
            if part is not None:
                self.parts[role, relative] = _part_number(part, path)
        except UserError as error:
            if not self.keep_faults:
                raise
            (self.faults if role in KINDS else self.odd_annotations).setdefault(key, error)
        else:
            self.by_role.setdefault(role, {}).setdefault(key, []).append(relative)
        self.ids.setdefault(key, video_id)

    def _add_frames(self, folder: Path, names: Sequence[str]) -> bool:
        """Add `folder` if it contains a video's frames; returns whether it does.

        The folder's name decides, or its parent's name if the folder is called `frames` or the like.
        """
        pattern, frame = self.spec.patterns.compiled("frames"), self.spec.patterns.compiled("frame")
        above = folder.parent != self.root and folder.name.casefold() in _UNNAMED_FOLDERS
        place = folder.parent if above and not self._match(pattern, folder) else folder
        named, name = self._match(pattern, place), place.name
        if any(map(frame.fullmatch, names)):
            if named:
                self.add("frames", _video_id(named, self.spec, folder), folder)
                return True
            if video_id := _id_of_number(name, self.spec):
                self.numbered[self.relative(folder)] = video_id
                return True
        if len(images := list(filter(is_image, names))) > 1:
            self.image_folders.append(ImageFolder(self.relative(folder), tuple(images[:2]), bool(named)))
        return False

    def place_numbered(self) -> None:
        """Use folders whose name is only a number as frame folders, but only if there is no other source at all."""
        if not any(self.of(kind) for kind in KINDS):
            for path, video_id in self.numbered.items():
                self.add("frames", video_id, self.root / path)
            self.numbered.clear()

    def drop_excluded(self) -> None:
        """Drop the files whose paths `data.exclude` names. Raises UserError if a video would lose its only source."""
        entries = [one for one in map(normal_id, self.data.exclude) if not fnmatch.filter(self.ids.values(), one)]
        for role, found in self.by_role.items():
            for key, paths in found.items():
                dropped = [path for path in paths if any(fnmatch.fnmatchcase(normal_id(path), one) for one in entries)]
                if role in KINDS and dropped and len(dropped) == len(paths):
                    raise UserError(
                        f"data.exclude: {dropped[0]} is the only source of {self.ids[key]}; give the video's id instead"
                    )
                found[key] = [path for path in paths if path not in dropped]
                self.excluded += dropped
            self.by_role[role] = {key: paths for key, paths in found.items() if paths}

    def sources(self) -> dict[str, tuple[Kind, Paths]]:
        """Return the source of each video, or of its parts, by its key. Raises UserError if a video has two sources."""
        sources: dict[str, tuple[Kind, Paths]] = {}
        for kind in KINDS:
            for key, paths in sorted(self.only_ones(kind).items()):
                if key in sources:
                    other, other_paths = sources[key]
                    first, second = min(other_paths.values()), min(paths.values())
                    raise UserError(
                        f"{self.root / first} and {self.root / second}: {_WORDS[other]} and {_WORDS[kind]}; pixels "
                        f"may differ, so choose with data.sources={other} or data.sources={kind}"
                    )
                sources[key] = (kind, paths)
        return sources

    def only_ones(self, role: str) -> dict[str, Paths]:
        """Return the path with this role of each video, or of each of its parts, by its key.

        Raises UserError if there are two paths for one, or if one is for the whole and another for a part. A link and
        its target count as one.
        """
        chosen: dict[str, Paths] = {}
        for key, paths in self.of(role).items():
            by_part: dict[int, list[str]] = {}
            for path in paths:
                by_part.setdefault(self.parts.get((role, path), WHOLE), []).append(path)
            for part, several in by_part.items():
                if len({(self.root / path).resolve() for path in several}) > 1:
                    first, second = sorted(several)[:2]
                    of = "one video" if part == WHOLE else f"part {part} of one video"
                    raise self._two(role, first, second, of)
            chosen[key] = {
                part: min(several, key=lambda path: ((self.root / path).is_symlink(), path))
                for part, several in by_part.items()
            }
            if WHOLE in by_part and len(by_part) > 1:
                other = chosen[key][max(by_part)]
                raise self._two(role, chosen[key][WHOLE], other, "one video, the whole and a part of it")
        return chosen

    def _two(self, role: str, first: str, second: str, of: str) -> UserError:
        what = _PLURALS.get(role, f"{role} annotation files")
        by_part: dict[tuple[str, int], list[str]] = {}
        for key, paths in self.of(role).items():
            for path in paths:
                by_part.setdefault((key, self.parts.get((role, path), WHOLE)), []).append(path)
        advice = _choices(role, first, second, by_part.values())
        return UserError(f"{self.root / first} and {self.root / second}: two {what} for {of}; {advice}")

    def check_parts(
        self, sources: Mapping[str, tuple[Kind, Paths]], annotations: Mapping[str, Mapping[str, Paths]]
    ) -> None:
        """Raise UserError, or record it with `keep_faults`, if a part is missing, or labels are for no part."""
        for key, (_, paths) in sources.items():
            labels = {role: of[key] for role, of in annotations.items() if key in of}
            problem = self._problem_of_parts(paths, labels)
            if problem and not self.keep_faults:
                raise UserError(problem)
            if problem:
                self.faults.setdefault(key, UserError(problem))

    def _problem_of_parts(self, sources: Paths, labels: Mapping[str, Paths]) -> str | None:
        numbers = sorted(sources)
        expected = range(min(numbers[0], 1), numbers[-1] + 1)
        if numbers[0] != WHOLE and (missing := [number for number in expected if number not in sources]):
            return (
                f"{self.root / sources[numbers[-1]]}: is part {numbers[-1]} of a recording, but there is no part "
                f"{listed([str(number) for number in missing], 5)}; complete it, or leave it out with data.exclude"
            )
        for role, paths in labels.items():
            for part, path in paths.items():
                if part != WHOLE and part not in sources:
                    has = "is one file" if WHOLE in sources else f"has {len(sources)} part(s)"
                    return (
                        f"{self.root / path}: has {role} labels of part {part}, but the video {has}, "
                        f"{sources[numbers[0]]}; remove it, or leave it out with data.exclude"
                    )
        return None


def _id_of_number(name: str, spec: DataSetSpec) -> str | None:
    """Return the id of the video with this number, or None if the data set's videos are not numbered."""
    if not re.fullmatch("[0-9]{1,9}", name):
        return None
    video_id = normal_id(numbered_id(int(name), spec))
    match = spec.patterns.compiled("video").fullmatch(f"{video_id}.mp4")
    return video_id if match and match["id"].isdecimal() and int(match["id"]) == int(name) else None


def _walk(root: Path) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Yield every folder below `root` once, with its visible files, in a fixed order.

    A link to a folder inside the root is skipped, since that folder is visited itself. A link to a folder outside is
    followed if the root allows it (`LinkedRoot`), and otherwise raises UserError.
    """
    waiting, seen = [root], set()
    while waiting:
        folder = waiting.pop()
        if isinstance(root, LinkedRoot):
            real = folder.resolve()
            if real in seen:  # reached again through a link
                continue
            seen.add(real)
        files, folders = [], []
        for entry in sorted_entries(folder):
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


def files_matching(root: Path, pattern: re.Pattern[str]) -> list[str]:
    """Return the files below a root that a pattern matches as it would match files of labels, as relative paths."""
    paths = [folder / entry.name for folder, entries in _walk(root) for entry in entries]
    found = [path for path in paths if match_path(pattern, PurePosixPath(path.relative_to(root)))]
    return sorted(checked_path(root, path) for path in found)


def sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be read ({error.strerror})") from error


def _inside(root: Path, path: Path) -> str:
    """Return `path` relative to the root. Raises UserError for a link that leads out of the root, or to itself."""
    relative = path.relative_to(root).as_posix()
    try:
        inside(root, relative)
    except UserError as error:
        raise UserError(
            f"{path}: is a link that leads out of the data root; set data.root to a folder that holds everything, or "
            "data.follow_links=true to allow such links"
        ) from error
    return relative


def checked_path(root: Path, path: Path) -> str:
    """Return `path` relative to the root.

    Raises UserError unless it is an ordinary file or folder inside the root, with a printable name.
    """
    relative = _inside(root, path)
    if not relative.isprintable():
        raise UserError(f"{relative!a}: this name has characters that cannot be printed; rename it")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        hint = "; it is a link to a file that does not exist" if path.is_symlink() else ""
        raise UserError(f"{path}: cannot be read ({error.strerror}){hint}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path}: is not an ordinary file")
    return relative


def _video_id(match: re.Match[str], spec: DataSetSpec, path: Path) -> str:
    """Return the video's id: the group `id` of the match, formatted with `id_format` if it is a number.

    Raises UserError if that cannot be an id.
    """
    text = match.group("id") or ""
    video_id = normal_id(numbered_id(int(text), spec) if text.isdecimal() else text)
    if (problem := id_problem(video_id)) and video_id.isprintable():
        raise UserError(f"{path}: the video id {video_id!r} {problem}; rename it")
    return video_id


def _part_number(text: str, path: Path) -> int:
    number = part_number(text)
    if number is None:
        raise UserError(f"{path}: {text!r} is not the number or letter of a part; rename it, or change the pattern")
    return number


def id_of_folder(name: str, spec: DataSetSpec) -> str | None:
    """Return the video id of a folder of frames called `name`, which may be just a number.

    Returns None for a name of another form.
    """
    match = spec.patterns.compiled("frames").fullmatch(name) or re.fullmatch("(?P<id>[0-9]+)", name)
    return _video_id(match, spec, Path(name)) if match else None


def id_of_name(name: str, spec: DataSetSpec) -> str | None:
    """Return the id of the video whose file, without its ending, or whose folder of frames is called `name`.

    Returns None for a name of another form.
    """
    match = spec.patterns.compiled("video").fullmatch(f"{name}.mp4")
    return _video_id(match, spec, Path(name)) if match else id_of_folder(name, spec)


def _choices(role: str, first: str, second: str, found: Collection[list[str]]) -> str:
    """Return advice on how to choose one of two files of one video. `found` has all paths of each video or part.

    Choosing by folder is suggested only if no other video or part would be lost.
    """
    one, other = PurePosixPath(first).parent, PurePosixPath(second).parent
    folders = [
        folder
        for folder, rest in ((one, other), (other, one))
        if not rest.is_relative_to(folder)
        and all(any(PurePosixPath(path).is_relative_to(folder) for path in paths) for paths in found)
    ]
    if role in KINDS and folders:
        return "choose one with " + " or ".join(f"data.sources={role}:{folder}" for folder in folders)
    excluded = json.dumps({second: "second copy"}, ensure_ascii=False)
    return f"remove one of them, or leave one out with --set 'data.exclude={excluded}'"


def _nothing_found(files: _Files) -> str:
    """Return the message for a root without videos, with the most likely reason and with what was found instead."""
    root, spec, data = files.root, files.spec, files.data
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
        return f"{root}: no videos of {spec.name} found{what}; {first}{more}: {why}; files found: {seen}"
    if sum(is_image(entry.name) for entry in sorted_entries(root)) > 1:
        return f"{root}: no videos of {spec.name} found{what}, only images; set data.root to the folder above this one"
    roles = ("video", "tfrecord", "frames")
    video, record, frames = (example_name(role, spec) or getattr(spec.patterns, role) for role in roles)
    names = " or ".join(filter(None, (video, record)))
    return (
        f"{root}: no videos of {spec.name} found{what}: looked for files named like {names} and folders of images "
        f"named like {frames}; files found: {seen}"
    )


def _passed_over(files: _Files, videos: Sequence[FoundVideo]) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """Return (path, reason) of files and folders that look like videos but were not used, and notes.

    The notes are about other folders of images.
    """
    root, spec = files.root, files.spec
    taken = [one.source for video in videos for one in (video.parts or (video,))]
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
        notes[-1] += f" (with data.sources=frames:{parent}, folders named by a number are used)"
    return (*found, *((path, "") for path in files.excluded)), notes


def _is_unnamed_video(root: Path, path: str) -> bool:
    place = root / path
    return may_be_anything(path) and place.is_file() and not place.is_symlink() and holds_video(place)


def _leads_inside(root: Path, path: Path) -> bool:
    """Whether a file is a link to another file below the root, which is found or reported itself."""
    return path.is_symlink() and Path(os.path.realpath(path)).is_relative_to(root.resolve())


def _left_over(
    files: _Files, videos: Sequence[FoundVideo], sources: Collection[str], annotations: Mapping[str, dict[str, Paths]]
) -> Iterator[str]:
    """Yield notes on unused TFRecord files, archives and annotations, and on videos without annotations."""
    spec = files.spec
    if odd := [path for path in files.unmatched if kind_of(path) == "tfrecord"]:
        yield f"{len(odd)} TFRecord file(s) not used, since they are not named like a video: {listed(odd, 10)}"
    if archives := [path for path in files.unmatched if is_archive(path) and not kind_of(path)]:
        yield f"{len(archives)} archive(s), not searched: {listed(archives, 10)}"
    for role, paths in annotations.items():
        orphans = [path for key, found in sorted(paths.items()) if key not in sources for path in found.values()]
        if orphans:
            yield f"{len(orphans)} {role} annotation file(s) belong to no video here ({listed(orphans, 10)})"
    lacking = []
    for role in spec.roles:
        bare = [video.id for video in videos if not video.has_labels(role) and video.kind != "tfrecord"]
        if bare and not files.shared.get(role):
            lacking.append(role)
            yield f"{len(bare)} video(s) without {role} annotations ({listed(bare, 10)})"
    labels = [path for path in files.unmatched if looks_like_labels(path)]
    if lacking and labels:
        patterns = " or ".join(
            f"{spec.name_of_pattern(role)}, {spec.label_pattern(role) or 'which is not set'}" for role in lacking
        )
        yield (
            f"{len(labels)} file(s) look like annotations, but their names do not match {patterns}: "
            f"{listed(labels, 10)}; rename them or convert them to tab-separated text, or change these patterns"
        )
