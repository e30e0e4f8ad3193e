"""Explain why files and folders below a data root match no pattern of the data set, and how to include them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from configs.dataset_spec import DataSetSpec, FilePatterns
from configs.file_pattern import IMAGE_ENDINGS, VIDEO_ENDINGS, file_pattern, match_path

# Video files that are not read: streams without a container, which have no times, and containers that decode wrongly.
_STREAMS = ("h264", "264", "avc", "h265", "265", "hevc", "m1v", "m2v", "mpv")
_VIDEO = frozenset((*VIDEO_ENDINGS, *_STREAMS, "rm", "rmvb", "y4m", "ogm"))
_TFRECORD = re.compile(r"\.tfrecords?([-.]\d+-of-\d+)?$", re.IGNORECASE)
_UNFINISHED, _PACKED = ("part", "crdownload", "download"), ("gz", "bz2", "xz", "zst", "zip", "7z")
_ARCHIVES = ("zip", "tar", "gz", "tgz", "7z", "rar", "xz", "bz2")
_LABELS = frozenset(("txt", "csv", "tsv", "json", "xml", "xls", "xlsx", "mat"))
_OF_LABELS = re.compile(r"phase|tool|label|annot|workflow", re.IGNORECASE)
# Matches recordings split by a camera: `video02_part1`, `Op3-2`, `case4_B`. Without the word `part` or the like, they
# count as parts only if the first part exists too.
_PART = re.compile(
    r"(?P<whole>.*?\d.*?)[ _.-]*((?P<word>part|pt|teil|cd|clip|seg(ment)?)[ _.-]*|(?<=[ _.-]))(?P<part>\d{1,3}|[a-h])",
    re.IGNORECASE,
)
_COPY = re.compile(r"(?P<whole>.+?)( ?\((\d|copy)\)| (- )?(copy|Kopie)( \(?\d\)?)?)", re.IGNORECASE)
_EXAMPLE_ENDINGS = {"video": ".mp4", "frames": "", "frame": ".jpg", "tfrecord": ".tfrecord"}
_TAILS = {"video": r"\.{video}", "frames": "", "frame": r"\.{image}", "tfrecord": r"\.tfrecords?.*"}


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images that is not used as a frame folder: its path below the root, and its first images' names.

    `named` says that the folder's name matches a pattern, and only the names of its images do not.
    """

    path: str
    images: tuple[str, ...]
    named: bool


def ending(name: str) -> str:
    """Return a file name's extension in lower case, without the dot."""
    return PurePosixPath(name).suffix[1:].lower()


def kind_of(name: str) -> Literal["video", "tfrecord"] | None:
    """Return whether a file is named like a video or a TFRecord file, or None for neither.

    Unsupported, compressed and unfinished videos count too.
    """
    if ending(name) in (*_UNFINISHED, *_PACKED):
        name = PurePosixPath(name).stem
    if ending(name) in _VIDEO:
        return "video"
    return "tfrecord" if _TFRECORD.search(name) else None


def may_be_anything(name: str) -> bool:
    """Whether a file's extension is unknown, so that it may be a video."""
    known = (*IMAGE_ENDINGS, *_LABELS, *_ARCHIVES, *_VIDEO)
    return not kind_of(name) and ending(name) not in known


def is_archive(name: str) -> bool:
    """Whether a file is named like an archive."""
    return ending(name) in _ARCHIVES


def is_image(name: str) -> bool:
    """Whether a file is named like an image."""
    return ending(name) in IMAGE_ENDINGS


def looks_like_labels(path: str) -> bool:
    """Whether a path is named like annotations. Cholec80's files of time stamps do not count."""
    return ending(path) in _LABELS and bool(_OF_LABELS.search(path)) and "timestamp" not in path.lower()


def passed_over_videos(paths: Sequence[str], taken: Sequence[str], spec: DataSetSpec) -> dict[str, str]:
    """Return, for each of these video files, why it was passed over and how to include it.

    `taken` are the videos that are used. A copy next to its original, as browsers and desktops make it, is not
    reported.
    """
    beside = {path.casefold() for path in (*taken, *paths)}
    paths = [path for path in paths if not _copies_one_of(path, beside)]
    unnamed = [path for path in paths if kind_of(path) is None]
    reasons = dict.fromkeys(unnamed, "contains a video: give it the extension of its container, such as .mp4")
    reasons |= {
        path: f"looks like one part of a recording: join its parts into {whole} (`ffmpeg -f concat -safe 0 -i LIST.txt "
        f"-c copy {whole}`, a line such as file 'PART' in LIST.txt for each), and move the parts out of the data root; "
        f"or have them read as one video: {_pattern_with_part(path, spec)} in a copy of the data set's description"
        for path, whole in _parts(paths, taken, spec).items()
        if path not in reasons
    }
    for endings, reason in (
        (_STREAMS, "is a stream without a container: make one with `ffmpeg -framerate FPS -i FILE -crf 12 NEW.mp4`"),
        (_UNFINISHED, "is an unfinished download: finish it or delete it"),
        (_PACKED, "is compressed: unpack it"),
    ):
        reasons |= {path: reason for path in paths if path not in reasons and ending(path) in endings}
    for role in ("tfrecord", "video"):
        rest = [path for path in paths if path not in reasons and (role == "video" or _TFRECORD.search(path))]
        reasons |= dict.fromkeys(rest, _no_match(role, rest, spec))
    return reasons


def passed_over_folders(folders: Sequence[ImageFolder], spec: DataSetSpec) -> dict[str, str]:
    """Return, for each of these folders of images, why it was passed over and how to include it."""
    images = _no_match("frame", [name for folder in folders if folder.named for name in folder.images], spec)
    names = _no_match("frames", [folder.path for folder in folders if not folder.named], spec)
    return {
        folder.path: f"images such as {folder.images[0]}: {images}" if folder.named else f"a folder of images: {names}"
        for folder in folders
    }


def _copies_one_of(path: str, beside: set[str]) -> bool:
    place = PurePosixPath(path)
    match = _COPY.fullmatch(place.stem)
    return match is not None and str(place.with_name(match["whole"] + place.suffix)).casefold() in beside


def _parts(paths: Sequence[str], taken: Sequence[str], spec: DataSetSpec) -> dict[str, str]:
    """Return the files that are one part of a recording, each with a file name for the joined recording."""
    matches = {path: match for path in (*paths, *taken) if (match := _PART.fullmatch(PurePosixPath(path).stem))}
    wholes = {
        path: PurePosixPath(path).with_name(f"{m['whole']}{PurePosixPath(path).suffix}") for path, m in matches.items()
    }
    numbers: dict[PurePosixPath, set[str]] = {}
    for path, whole in wholes.items():
        numbers.setdefault(whole, set()).add(matches[path]["part"].lower().lstrip("0"))
    pattern = spec.patterns.compiled("video")

    def is_part(path: str) -> bool:
        whole = wholes[path]
        cut = len(matches[path]["part"]) == 1 and len(numbers[whole]) > 1 and bool(numbers[whole] & {"", "1", "a"})
        return bool(cut or matches[path]["word"] or match_path(pattern, whole))

    return {path: wholes[path].name for path in paths if path in wholes and is_part(path)}


def _pattern_with_part(path: str, spec: DataSetSpec) -> str:
    """Return how to change `patterns.video` so that this file is part of a recording."""
    stem, present = PurePosixPath(path).stem, spec.patterns.video
    if "part" in spec.patterns.compiled("video").groupindex:
        return "let patterns.video, which has a group (?P<part>...), match it"
    named, tail = _PART.fullmatch(stem), re.search(r"\\\.(\{video\}|\([\w|]+\)|\w+)$", present)
    if named and tail:
        digits = r"\d+" if named["part"].isdecimal() else "[a-z]"
        group = f"({re.escape(stem[named.end('whole') : named.start('part')])}(?P<part>{digits}))?"
        pattern = present[: tail.start()] + group + tail[0]
        found = match_path(file_pattern(pattern), PurePosixPath(path))
        if found and found["part"] == named["part"]:
            return f"set patterns.video to '{pattern}'"
    return "add a group (?P<part>...) to patterns.video"


def example_name(role: str, spec: DataSetSpec) -> str | None:
    """Return a name that the data set's pattern of this role matches; None if no common name does."""
    names = (f"{stem}{_EXAMPLE_ENDINGS[role]}" for stem in ("000001", "video01", "workflow_video_01", "case01", "01"))
    return next(filter(spec.patterns.compiled(role).fullmatch, names), None)


def _no_match(role: str, paths: Sequence[str], spec: DataSetSpec) -> str:
    """Explain that these names match no pattern, and suggest a name that would and a pattern that would match them."""
    if not paths:
        return ""
    if getattr(spec.patterns, role) is None:
        return f"the description of {spec.name} has no patterns.{role}"
    subject, it = ("their names do", "them") if role == "frame" else ("its name does", "it")
    example = example_name(role, spec)
    like = f"rename {it} like {example}, or " if example else ""
    pattern = suggested_pattern(role, [PurePosixPath(path).name for path in paths], spec.patterns)
    shown = "" if role == "frame" else f", {getattr(spec.patterns, role)}"
    return (
        f"{subject} not match patterns.{role} of {spec.name}{shown}; {like}set "
        f"patterns.{role} to '{pattern}' in a copy of its description that data.dataset names"
    )


def suggested_pattern(role: str, names: Sequence[str], patterns: FilePatterns) -> str:
    """Return a pattern that matches all of these names.

    It is the present pattern with more extensions, or a new pattern made from the first name.
    """
    tail, group = _TAILS[role], "frame" if role == "frame" else "id"
    widened = re.sub(r"\\\.(\([\w|]+\)|\w+)$", lambda _: tail, getattr(patterns, role)) if tail else ""
    stem = PurePosixPath(names[0]).stem if tail else names[0]
    parts = re.findall(r"\d+|\D+", stem)
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    # An image's frame number is the number in its name that differs between images. For a video, take the first number.
    others = [re.findall(r"\d+|\D+", PurePosixPath(name).stem) for name in names[1:]] if role == "frame" else []
    rising = [at for at in numbers if any(at < len(other) and other[at] != parts[at] for other in others)]
    marked = next(iter(rising or numbers), None)
    made = "".join(
        rf"(?P<{group}>\d+)"
        if at == marked
        else r"\d+"
        if part.isdecimal()
        else re.sub(r"\\([ \-#])", r"\1", re.escape(part))
        for at, part in enumerate(parts)
    )
    made = made.replace("'", ".")  # the pattern is printed between these quotes
    for pattern in (widened, made + tail):
        if group in pattern and all(file_pattern(pattern).fullmatch(name) for name in names):
            return pattern
    return rf"\D*(?P<frame>\d+).*{tail}" if role == "frame" else f"(?P<id>.+){tail}"
