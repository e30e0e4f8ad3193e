"""The schema of a data set's description: class names, file name patterns, annotation rate and published splits.

`configs.load` reads the description from YAML.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from configs.errors import UserError
from configs.file_pattern import file_pattern
from configs.label_source import LabelSource, TrackSpec, is_track_name
from configs.schema import MAIN_TRACK, MAX_FPS
from configs.strict import OmitsDefaults

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet evaluates CSV cells that start with one of these
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_BREAK = re.compile(r"[\s_\-\u2010-\u2015/,.]+")
_SIGNED = re.compile(r"\s*[-\u2010-\u2015.]\s*(\d[\d.,]*)\s*")  # -1, -1.0, .5


def folded_name(name: str) -> str:
    """Return a form of a class name that is the same for all its spellings.

    Case, blanks, hyphens, underscores, "and" and "&" make no difference: "clipping & cutting", "Clipping-and-cutting"
    and "ClippingCutting" are equal. Separated numbers stay separate: "Step 1-1" and "Step 11" differ. So do "-1" and
    "1", since -1 often means "no label".
    """
    if _SIGNED.fullmatch(name):
        return re.sub(r"\s", "", name).replace("\u2013", "-")
    text = _HUMP.sub(" ", unicodedata.normalize("NFKC", name).replace("&", " and ")).casefold()
    words = [word for word in _BREAK.split(text) if word]
    kept = [word for word in words if word != "and"] or words
    return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(kept))


def class_ids(names: Sequence[str], aliases: Mapping[str, str]) -> dict[str, int]:
    """Return the number of each class, with the `folded_name` of each name and alias as keys."""
    numbers = {name: number for number, name in enumerate(names)}
    spellings = [*numbers.items(), *((alias, numbers[name]) for alias, name in aliases.items())]
    return {folded_name(spelling): number for spelling, number in spellings}


class FilePatterns(OmitsDefaults):
    """Regular expressions by which the files of a data set are found.

    A pattern must match the whole file name (not the path), ignoring case. Folder names differ between copies of a data
    set, so files are found in any folder below the root; a pattern with slashes is matched against as many parts at the
    end of the path. `video`, `frames`, `phase`, `tool` and `tfrecord` need a named group `id`; `frame` (an image in a
    frame folder) needs a named group `frame`. `{video}` and `{image}` stand for every extension that can be read
    (`file_pattern`). Files that `ignore` matches are no part of the data set as it is described, such as those of a
    second camera.

    With an additional group `part` in `video` (digits or a letter), the files of one id are one recording, in the order
    of their parts. With a group `part`, files of labels (`phase`, `tool`, and `files` in `labels`) are for one part.
    """

    OMITTED = frozenset({"ignore"})
    video: str
    frames: str
    # video01_000025.jpg, 25.png, img00001.jpg, frame0.jpg; (1).jpg and frame (1).jpg, but not the copy 000001 (1).jpg
    frame: str = (
        r"((.*[_-])?(frame|image|img|im|picture|pic|output|out|f|i)? ?|(?P<bracket>\D*\())"
        r"(?P<frame>\d+)(?(bracket)\))\.{image}"
    )
    phase: str | None = None  # not needed where `labels` says which files hold the labels
    tool: str | None = None
    tfrecord: str | None = None
    ignore: str | None = None

    @field_validator("video", "frames", "frame", "phase", "tool", "tfrecord", "ignore")
    @classmethod
    def _compiles(cls, pattern: str | None, info: ValidationInfo) -> str | None:
        if pattern is None:
            return None
        group = "frame" if info.field_name == "frame" else "id"
        try:
            names = file_pattern(pattern).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if group not in names and info.field_name != "ignore":
            raise ValueError(f"needs a named group (?P<{group}>...)")
        if "part" in names and info.field_name not in ("video", "phase", "tool"):
            raise ValueError("a group (?P<part>...) is for video files and their labels only")
        return pattern

    def compiled(self, role: str) -> re.Pattern[str]:
        """Return the compiled pattern of a role (`video`, `frames`, ...); a missing pattern matches nothing."""
        return file_pattern(getattr(self, role) or "(?!)")


_LABELS_OF = {"phase": MAIN_TRACK, "tool": "tools"}  # key in `labels` of a role; tracks have the same name in both


class NamedSplit(OmitsDefaults):
    """A published split: lists of video ids or shell patterns (`workflow_video_*`), which must match a whole id.

    An entry with slashes (`*/train_gt/*`) is a shell pattern for the path, below the root, of a video or of one of its
    files of labels. `listed_in` gives for each part one or several regular expressions for the files of the user's copy
    that list the part's videos: pickles of a mapping whose keys are the ids. Each expression must match a file if there
    are videos that the others do not list.
    """

    OMITTED = frozenset({"listed_in"})
    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    listed_in: dict[Literal["train", "val", "test"], str | tuple[str, ...]] = Field({})

    @model_validator(mode="after")
    def _compile(self) -> NamedSplit:
        for part, pattern in ((one, pattern) for one in self.listed_in for pattern in self.patterns_of(one)):
            try:
                file_pattern(pattern)
            except re.error as error:
                raise ValueError(f"{part} is not a regular expression: {error}") from error
        return self

    def patterns_of(self, part: Literal["train", "val", "test"]) -> tuple[str, ...]:
        """The expressions of `listed_in` for a part."""
        patterns = self.listed_in[part]
        return (patterns,) if isinstance(patterns, str) else patterns

    @property
    def needs_copy(self) -> bool:
        """Whether the ids follow from paths or files of a copy of the data set."""
        return bool(self.listed_in) or any("/" in entry for entry in (*self.train, *self.val, *self.test))


class DataSetSpec(OmitsDefaults):
    """The description of a data set. Adding a data set takes one such YAML file and no code."""

    OMITTED = frozenset({"background", "labels", "tracks", "unverified"})
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    title: str = ""
    source: str = ""
    # About the published data set, for `datasets list` and `datasets show`; not recorded in an index.
    videos: int | None = Field(None, ge=1, exclude=True, description="number of videos of the published data set")
    licence: str = Field("", exclude=True)
    homepage: str = Field("", exclude=True)
    request: str = Field("", exclude=True, description="how to get the data")
    unverified: str = Field(
        "", description="what was not checked against the data set's documentation or a program that reads it"
    )
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
    labels: dict[str, LabelSource] = Field(
        {},
        description="where the labels of `phases`, `tools` and each of `tracks` are; without it: files in Cholec80's "
        "format, which `patterns` name",
    )
    tracks: dict[str, TrackSpec] = Field({}, description="additional label tracks, such as steps, by name")
    splits: dict[str, NamedSplit] = Field({}, description="published splits that `data.split.rule` can name")
    default_split: str = "60%/20%/20%"

    def __eq__(self, other: object) -> bool:
        """Whether an index of one is an index of the other: what is not recorded makes no difference."""
        return isinstance(other, DataSetSpec) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @property
    def roles(self) -> tuple[str, ...]:
        """What files of labels can hold: `phase`, `tool` if the data set has tools, and the additional tracks."""
        return ("phase", *(("tool",) if self.tools else ()), *self.tracks)

    @property
    def counts_from_container(self) -> bool:
        """Whether times in files of labels count from the container's start, so that videos must be measured for it."""
        return any(source.zero == "container" for source in self.labels.values())

    def label_source(self, role: str) -> LabelSource | None:
        """Return where the labels of a role are; None for Cholec80's format in files named by `patterns`."""
        return self.labels.get(_LABELS_OF.get(role, role))

    def classes_of(self, role: str) -> tuple[tuple[str, ...], dict[str, str]]:
        """Return the class names of a role, and other spellings of them."""
        if role in _LABELS_OF:
            return (self.phases, self.phase_aliases) if role == "phase" else (self.tools, self.tool_aliases)
        return self.tracks[role].classes, self.tracks[role].aliases

    def track_classes(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return the classes of the tracks that `data.tracks` names, phases first and then in this description's order.

        Raises UserError for a name that is not a track of this data set.
        """
        known = {MAIN_TRACK: self.phases, **{name: track.classes for name, track in self.tracks.items()}}
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"data.tracks: {self.name} has no track {unknown[0]!r}; choose from {', '.join(known)}")
        return {name: classes for name, classes in known.items() if name in names}

    def as_track(self, name: str) -> DataSetSpec:
        """Return the description of one additional track: with its classes in place of the phases, without tools.

        Whatever scores and shows phases thus does the same for the classes of any track.
        """
        track = self.tracks[name]
        update = {
            "title": f"{self.title or self.name}, {name}",
            "phases": track.classes,
            "phase_aliases": track.aliases,
            "background": track.background,
            **{key: {} for key in ("phase_orders", "tool_aliases", "labels", "tracks")},
            "tools": (),
        }
        return self.model_copy(update=update)

    def label_pattern(self, role: str) -> str | None:
        """Return the pattern of the files that hold a role's labels, or None if there are none."""
        source = self.label_source(role)
        return source.files if source else getattr(self.patterns, role, None)

    def name_of_pattern(self, role: str) -> str:
        """Return the key of a role's `label_pattern`, for messages."""
        return f"labels.{_LABELS_OF.get(role, role)}.files" if self.label_source(role) else f"patterns.{role}"

    @field_validator("id_format")
    @classmethod
    def _has_few_digits(cls, text: str) -> str:
        if re.search(r"\{[^}]*:[^}]*(\d{3}|\{)", text):
            raise ValueError("gives numbers more than 99 digits; write {number:02d}")
        return text

    @model_validator(mode="after")
    def _labels_of_parts_need_parts(self) -> DataSetSpec:
        if "part" not in self.patterns.compiled("video").groupindex:
            for role in self.roles:
                if "part" in file_pattern(self.label_pattern(role) or "").groupindex:
                    raise ValueError(f"{self.name_of_pattern(role)} has a group part, but patterns.video has none")
        return self

    @model_validator(mode="after")
    def _names_are_consistent(self) -> DataSetSpec:
        for kind, names, aliases in (
            ("phases", self.phases, self.phase_aliases),
            ("tools", self.tools, self.tool_aliases),
            *((f"tracks.{name}", track.classes, track.aliases) for name, track in self.tracks.items()),
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
        for background, classes in (
            (self.background, self.phases),
            *((track.background, track.classes) for track in self.tracks.values()),
        ):
            if unknown := [name for name in background if name not in classes]:
                raise ValueError(f"background {unknown[0]!r} is not one of {', '.join(classes)}")
        return self

    @model_validator(mode="after")
    def _labels_are_consistent(self) -> DataSetSpec:
        if odd := [name for name in self.tracks if not is_track_name(name)]:
            raise ValueError(f"tracks: {odd[0]!r} is not a name of lower-case letters, digits and _ other than phases")
        for name, source in self.labels.items():
            role = next((role for role in self.roles if _LABELS_OF.get(role, role) == name), None)
            if role is None:
                raise ValueError(f"labels.{name} is neither phases nor tools of this data set nor one of tracks")
            known = class_ids(*self.classes_of(role))
            priorities = () if isinstance(source.overlaps, str) else source.overlaps
            for given in (*source.meaning.values(), *filter(None, (source.gaps,)), *priorities):
                if folded_name(given) not in known:
                    raise ValueError(f"labels.{name}: {given!r} is not one of the classes")
            if role == "tool" and (source.gaps or source.overlaps != "refuse"):
                raise ValueError(
                    "labels.tools: gaps and overlaps are not for tools, of which there may be several or none"
                )
            if role != "tool" and (
                source.separator or source.no_tool or source.columns.labels or isinstance(source.columns.label, tuple)
            ):
                raise ValueError(f"labels.{name}: separator, no_tool and several columns of labels are for tools")
        if missing := [name for name in self.tracks if name not in self.labels]:
            raise ValueError(f"labels.{missing[0]} must say where the labels of track {missing[0]} are")
        return self
