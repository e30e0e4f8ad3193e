"""The schema of `labels` in a data set's description: which files hold labels, and what their content means."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from configs.file_pattern import file_pattern, quick_pattern
from configs.schema import MAX_FPS
from configs.strict import OmitsDefaults, Strict

TOOL_FORMATS = ("eaf", "labelstudio")  # files of annotation tools, whose content is always intervals
TIME_UNITS = ("second", "millisecond", "clock")
_TRACK_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")


def _texts(value: Any) -> Any:
    """Convert the numbers that YAML reads as keys and values of a mapping to texts."""
    if isinstance(value, dict):
        return {str(key): entry if isinstance(entry, str) else str(entry) for key, entry in value.items()}
    return value


Column = Annotated[int, Field(ge=1, strict=True)] | Annotated[str, Field(min_length=1)]
Texts = Annotated[dict[str, str], BeforeValidator(_texts)]


class Columns(OmitsDefaults):
    """The columns of a table, or fields of JSON records: by name, or by number from 1.

    `start` is the number of a row (`form: rows`), or where a label starts. `label` is the column of the label. For
    tools it is one column with a name, an id or a list of them; or a list of columns, one per tool in the order of
    `tools`; or it is left out, and the columns are named like the tools. `labels` is for tools too: columns that each
    have the name or id of one tool.
    """

    OMITTED = frozenset({"video", "end", "label", "labels"})
    video: Column | None = None
    start: Column = "start"
    end: Column | None = None
    label: Column | tuple[Column, ...] | None = None
    labels: tuple[Column, ...] | None = None

    @model_validator(mode="after")
    def _names_no_column_twice(self) -> Columns:
        for key, names in (("label", self.label), ("labels", self.labels)):
            if isinstance(names, tuple) and len(set(names)) < len(names):
                raise ValueError(f"{key} names a column twice")
        return self

    @property
    def most_number(self) -> int:
        """The largest number by which a column is named; 0 if all are named by name."""
        label = self.label if isinstance(self.label, tuple) else (self.label,)
        named = (self.video, self.start, self.end, *label, *(self.labels or ()))
        return max((column for column in named if isinstance(column, int)), default=0)


class Categories(Strict):
    """JSON: the list, in the same file, of the classes that the ids of labels mean, as in COCO's format."""

    records: str
    key: str = "id"
    name: str = "name"


class Join(Strict):
    """JSON: add to each record the fields of the record of another list that its field `by` names by `key`."""

    records: str
    by: str  # not `on`, which YAML reads as a boolean
    key: str = "id"


class LabelSource(OmitsDefaults):
    """Where the labels of one track are, and what they mean."""

    files: str = Field(
        description="regular expression for the files. With a named group `id`, there is one file per video; without, "
        "one file has the labels of several videos, told apart by the column `video`. With a named group `part` as "
        "in `patterns.video`, there is one file per part of a recording, with numbers or times that start again in "
        "each part. A pattern with slashes is matched against as many parts of the path"
    )
    format: str = Field("table", description="table, json, eaf, labelstudio, or the name of a plug-in's format")
    delimiter: Literal["tab", "comma", "semicolon", "blank"] = Field("tab", description="of a table's columns")
    header: bool = Field(True, description="whether a table's first line names the columns")
    records: str | None = Field(
        None,
        description="json: path to the records, such as `phases` or `annotations.{frame}.*`; `*` means every entry of "
        "a list or mapping, and {NAME} does too and adds the entry's key or number to the record as field NAME",
    )
    join: Join | None = None
    categories: Categories | None = Field(None, description="json: where the file says which class each id means")
    parse: dict[str, str] = Field(
        {},
        description="a regular expression for the values of a column, whose named groups become columns: "
        "`file_name: '(?P<video>[^/]+)/(?P<frame>.*)[.]jpg'`",
    )
    columns: Columns = Columns()
    where: Texts = Field({}, description="use only records with these values, by column: `annotator: 1`")
    form: Literal["rows", "starts", "intervals"] = Field(
        "rows",
        description="rows: one record per labelled frame, valid until the next, but at most for the usual distance of "
        "rows; starts: each lasts until the next; intervals: with start and end",
    )
    end: Literal["exclusive", "inclusive"] = Field(
        "exclusive",
        description="intervals: whether the frame at `end` is the first one after the interval, or its last",
    )
    unit: Literal["auto", "source", "sample", "second", "millisecond", "clock"] = Field(
        "auto",
        description="source: number of the video's frame; sample: number at `rate` per second; clock: hh:mm:ss.mmm; "
        "auto: inferred from the lengths of video and file (only for form rows)",
    )
    rate: float | None = Field(None, ge=1e-3, le=MAX_FPS, description="unit sample: numbers per second")
    origin: Literal["auto", 0, 1] = Field(0, description="units source and sample: the number of the first frame")
    zero: Literal["first_frame", "container"] = Field(
        "first_frame", description="time units: whether times count from the first frame, or from the container's start"
    )
    offset_s: float = Field(0.0, ge=-1e6, le=1e6, description="seconds to add to all times")
    numbers_from: Literal[0, 1] | None = Field(
        None, description="if labels are numbers: the number of the first class; otherwise labels are names"
    )
    meaning: Texts = Field({}, description="class by label, for labels that are neither names nor plain numbers")
    no_label: tuple[Annotated[str, BeforeValidator(str)], ...] = Field((), description="labels that mean: not labelled")
    no_tool: tuple[Annotated[str, BeforeValidator(str)], ...] = Field((), description="tools: names that mean: no tool")
    separator: str | None = Field(None, min_length=1, description="tools: what separates the names in a cell")
    gaps: str | None = Field(None, description="the class of frames without any label; otherwise they have none")
    overlaps: Literal["refuse", "inner", "outer", "first", "last"] | tuple[str, ...] = Field(
        "refuse",
        description="intervals of different labels that overlap: an error (refuse), or the shorter (inner), the longer "
        "(outer), the earlier (first) or the later one (last) counts; or a list of classes, whose first counts most, "
        "before all others",
    )

    @field_validator("files")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            names = file_pattern(pattern).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if "part" in names and "id" not in names:
            raise ValueError("a group (?P<part>...) needs a group (?P<id>...) beside it")
        return pattern

    @model_validator(mode="before")
    @classmethod
    def _fill_in_for_tools(cls, given: Any) -> Any:
        """Files of annotation tools say themselves what most other formats leave to the description."""
        if not isinstance(given, dict) or given.get("format") not in TOOL_FORMATS:
            return given
        columns = given.get("columns", {})
        if isinstance(columns, dict):
            columns = {"video": "video", "start": "start", "end": "end", "label": "label"} | columns
        frames = {"origin": 1, "end": "inclusive"} if given.get("unit") in ("source", "sample") else {}
        return {"form": "intervals", "unit": "second", **frames, **given, "columns": columns}

    @field_validator("parse")
    @classmethod
    def _compile(cls, patterns: dict[str, str]) -> dict[str, str]:
        for column, pattern in patterns.items():
            try:
                quick_pattern(pattern)
            except re.error as error:
                raise ValueError(f"{column} is not a regular expression: {error}") from error
        return patterns

    @model_validator(mode="after")
    def _options_fit(self) -> LabelSource:
        if self.unit == "auto" and (self.form != "rows" or self.offset_s):
            raise ValueError(f"unit must be given for {'offset_s' if self.form == 'rows' else f'form {self.form}'}")
        if (self.unit == "sample") != (self.rate is not None):
            raise ValueError("rate belongs to unit sample, which needs it")
        if self.zero == "container" and self.unit not in TIME_UNITS:
            raise ValueError(f"zero container needs a unit of time: {', '.join(TIME_UNITS)}")
        if self.form != "rows" and self.origin == "auto":
            raise ValueError(f"origin must be 0 or 1 for form {self.form}")
        if self.form == "rows" and self.gaps:
            raise ValueError("gaps is for form starts and intervals; frames of missing rows have no label")
        if self.form == "intervals" and self.columns.end is None and self.format in ("table", "json"):
            raise ValueError("form intervals needs columns.end")
        if self.format == "json" and not self.records:
            raise ValueError("format json needs records, the path to the list of labels")
        if self.categories and (self.format != "json" or self.numbers_from is not None):
            raise ValueError("categories is for format json, and gives ids names, so numbers_from must be left out")
        if self.is_shared and self.columns.video is None and self.format in ("table", "json"):
            raise ValueError("files has no named group (?P<id>...), so columns.video must say whose labels they are")
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> LabelSource:
        """Refuse options that would be ignored, since they show that something else was meant."""
        useless: dict[str, tuple[bool, tuple[str, ...]]] = {
            "is for form intervals": (self.form != "intervals", ("end", "overlaps")),
            "is for numbers of frames or samples; times count from 0": (self.unit in TIME_UNITS, ("origin",)),
            "is for format json": (self.format == "table", ("records", "join")),
            "is for format table": (self.format == "json", ("delimiter", "header")),
        }
        for why, (is_ignored, names) in useless.items():
            for name in names:
                if is_ignored and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} {why}")
        if self.overlaps == ():
            raise ValueError("overlaps is an empty list; name the classes that count most, or one of the words")
        return self

    @property
    def is_shared(self) -> bool:
        """Whether one file has the labels of several videos."""
        return "id" not in file_pattern(self.files).groupindex


class TrackSpec(OmitsDefaults):
    """The classes of an additional label track, such as the steps within phases."""

    OMITTED = frozenset({"aliases", "background"})
    classes: tuple[str, ...] = Field(min_length=2, max_length=127)  # ids are int8
    aliases: Texts = Field({})
    background: tuple[str, ...] = ()


LabelSource.OMITTED = frozenset(LabelSource.model_fields) - {"files"}


def is_track_name(name: str) -> bool:
    """Whether a text can name an additional label track."""
    return bool(_TRACK_NAME.fullmatch(name)) and name not in ("phase", "phases", "tool", "tools")
