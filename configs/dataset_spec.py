"""The schema of a data set's description: class names, file name patterns, annotation rate and published splits.

`configs.load` reads the description from YAML.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from pydantic import Field, ValidationInfo, field_validator, model_validator

from configs.schema import MAX_FPS, OmitsDefaults, Strict

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet evaluates CSV cells that start with one of these
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_BREAK = re.compile(r"[\s_\-\u2010-\u2015/,.]+")


def folded_name(name: str) -> str:
    """Return a form of a class name that is the same for all its spellings.

    Case, blanks, hyphens, underscores, "and" and "&" make no difference: "clipping & cutting", "Clipping-and-cutting"
    and "ClippingCutting" are equal. Separated numbers stay separate: "Step 1-1" and "Step 11" differ.
    """
    text = _HUMP.sub(" ", unicodedata.normalize("NFKC", name).replace("&", " and ")).casefold()
    words = [word for word in _BREAK.split(text) if word]
    kept = [word for word in words if word != "and"] or words
    return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(kept))


def class_ids(names: Sequence[str], aliases: Mapping[str, str]) -> dict[str, int]:
    """Return the number of each class, with the `folded_name` of each name and alias as keys."""
    numbers = {name: number for number, name in enumerate(names)}
    spellings = [*numbers.items(), *((alias, numbers[name]) for alias, name in aliases.items())]
    return {folded_name(spelling): number for spelling, number in spellings}


# File name extensions of the video containers that can be read completely.
VIDEO_ENDINGS = (
    *("mp4", "m4v", "mov", "qt", "f4v", "3gp", "3g2", "avi", "divx", "mkv", "webm", "ogv", "flv", "mxf", "dv"),
    *("mpg", "mpeg", "mod", "vob", "ts", "mts", "m2ts", "m2t", "wmv", "asf"),
)
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff")


def file_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern for file names, in which `{video}` and `{image}` stand for any extension that can be read."""
    for name, endings in (("{video}", VIDEO_ENDINGS), ("{image}", IMAGE_ENDINGS)):
        pattern = pattern.replace(name, f"({'|'.join(endings)})")
    return re.compile(pattern, re.IGNORECASE)


class FilePatterns(Strict):
    """Regular expressions by which the files of a data set are found.

    A pattern must match the whole file name (not the path), ignoring case. Folder names differ between copies of a data
    set, so files are found in any folder below the root. `video`, `frames`, `phase`, `tool` and `tfrecord` need a named
    group `id`; `frame` (an image in a frame folder) needs a named group `frame`. `{video}` and `{image}` stand for
    every extension that can be read (`file_pattern`).
    """

    video: str
    frames: str
    # video01_000025.jpg, 25.png, img00001.jpg, frame0.jpg; (1).jpg and frame (1).jpg, but not the copy 000001 (1).jpg
    frame: str = (
        r"((.*[_-])?(frame|image|img|im|picture|pic|output|out|f|i)? ?|(?P<bracket>\D*\())"
        r"(?P<frame>\d+)(?(bracket)\))\.{image}"
    )
    phase: str
    tool: str
    tfrecord: str | None = None

    @field_validator("video", "frames", "frame", "phase", "tool", "tfrecord")
    @classmethod
    def _compiles(cls, pattern: str | None, info: ValidationInfo) -> str | None:
        if pattern is None:
            return None
        group = "frame" if info.field_name == "frame" else "id"
        try:
            names = file_pattern(pattern).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if group not in names:
            raise ValueError(f"needs a named group (?P<{group}>...)")
        return pattern

    def compiled(self, role: str) -> re.Pattern[str]:
        """Return the compiled pattern of a role (`video`, `frames`, ...); a missing pattern matches nothing."""
        return file_pattern(getattr(self, role) or "(?!)")


class NamedSplit(Strict):
    """A published split: lists of video ids or shell patterns (`workflow_video_*`), which must match a whole id."""

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


class DataSetSpec(OmitsDefaults):
    """The description of a data set. Adding a data set takes one such YAML file and no code."""

    OMITTED = frozenset({"background"})
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    title: str = ""
    source: str = ""
    annotation_fps: float = Field(gt=0, le=MAX_FPS, description="rate at which annotation files number frames")
    phases: tuple[str, ...] = Field(min_length=2, max_length=127)  # ids are int8
    tools: tuple[str, ...] = Field((), max_length=127)
    phase_aliases: dict[str, str] = Field({})
    tool_aliases: dict[str, str] = Field({})
    background: tuple[str, ...] = Field(
        (),
        description="phases in which nothing happens; excluded from segmental metrics (edit score, F1 at an overlap)",
    )
    phase_orders: dict[str, tuple[str, ...]] = Field(
        {}, description="orders of the phases that are in use, by name, for files with phase numbers instead of names"
    )
    id_format: str = Field("video{number:02d}", description="format of a video id, if the file name has a number")
    patterns: FilePatterns
    splits: dict[str, NamedSplit] = Field({}, description="published splits that `data.split.rule` can name")
    default_split: str = "60%/20%/20%"

    @model_validator(mode="after")
    def _names_are_consistent(self) -> DataSetSpec:
        for kind, names, aliases in (
            ("phases", self.phases, self.phase_aliases),
            ("tools", self.tools, self.tool_aliases),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"a name occurs twice in {kind}")
            for name in names:
                if name.startswith(FORMULA_STARTS):
                    raise ValueError(
                        f"{kind}: a spreadsheet would read the name {name[:40]!r} as a formula; start it with a letter"
                    )
            for alias, target in aliases.items():
                if target not in names:
                    raise ValueError(f"alias {alias!r} points to {target!r}, which is not one of the {kind}")
            meant: dict[str, str] = {}
            for spelling, name in [*((name, name) for name in names), *aliases.items()]:
                if meant.setdefault(folded_name(spelling), name) != name:
                    raise ValueError(
                        f"{spelling!r} of the {kind} cannot be told apart from {meant[folded_name(spelling)]!r}"
                    )
        for name, order in self.phase_orders.items():
            if sorted(order) != sorted(self.phases):
                raise ValueError(f"phase_orders.{name} does not contain each phase exactly once")
        if unknown := [name for name in self.background if name not in self.phases]:
            raise ValueError(f"background {unknown[0]!r} is not one of the phases")
        return self
