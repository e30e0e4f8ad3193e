"""The labels of an annotation file, whatever its format, and what the parsers of `features.dataset.formats` share.

What the frame numbers of its rows count is decided in `features.dataset.row_numbers`. Class names are compared by
`configs.dataset_spec.folded_name`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, did_you_mean
from engine.files import read_bounded
from engine.sniff import recognise_start

MAX_FILE_BYTES = 64 << 20  # enough for twenty hours of phases with one row per frame
_ROUNDED_STRIDE = 8  # from this stride on, steps may differ from it by one, because of rounding
UNLABELLED_CELLS = ("-1", "")  # cells that mean "no label"


@dataclass(frozen=True, eq=False)
class LabelTrack:
    """The R rows of one video's annotation file: their frame numbers and their labels (-1: no label).

    `frame_index` is (R,) int64. `labels` is int8, with shape (R,) for phases and (R, K) for tools, numbered in the data
    set's order. `stride` is the usual distance between rows in frames, 1 if there is a single row. A row is valid until
    the next row, but for at most a stride. If the data set's description says what the file means, `places` says where
    each row is; otherwise row 0 is the line below the header.
    """

    frame_index: NDArray[np.int64]
    labels: NDArray[np.int8]
    stride: int
    places: Sequence[str] | None = None

    @property
    def end(self) -> int:
        """The first frame for which the last row is no longer valid."""
        return int(self.frame_index[-1]) + self.stride

    def head(self, rows: int) -> LabelTrack:
        """Return the track with only its first `rows` rows."""
        return replace(self, frame_index=self.frame_index[:rows], labels=self.labels[:rows])

    def set_rate(self, per_s: float | Literal["source"] | None = None) -> str:
        """Return the setting of what the rows' numbers count, for messages, with the value `per_s` if it is given."""
        if self.places is None:
            return "data.row_fps" + ("" if per_s is None else f"={per_s if per_s == 'source' else f'{per_s:g}'}")
        value = "unit and rate" if per_s is None else f"unit: sample and rate: {per_s:g}" if per_s != "source" else ""
        return f"{value or 'unit: source'} in `labels` of the data set's description"

    def set_base(self, base: int) -> str:
        """Return the setting of the first frame's number with the value `base`, for messages."""
        return f"data.row_base={base}" if self.places is None else f"origin: {base} in `labels` of the description"


def read_content(path: Path, most_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Read a file's bytes. Raises UserError if it cannot be read, is not text, or is too large for annotations."""
    content = read_bounded(path, most_bytes)
    if what := recognise_start(content):
        raise UserError(f"{path}: is {what}")
    return content


def text_lines(content: bytes, path: Path) -> list[str]:
    """Split a UTF-8 text into lines, without blank lines at the end. Raises UserError for other encodings."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as plain UTF-8 text") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def row_error(path: Path, row: int, problem: str, places: Sequence[str] | None = None) -> UserError:
    """Return an error about the row with index `row`, at `places[row]` or (0) on the first line below the header."""
    place = f"row {row + 1} (line {row + 2})" if places is None else places[row]
    return UserError(f"{path}: {place} {problem}")


def stride_of_rows(frame_index: NDArray[np.int64], path: Path, places: Sequence[str] | None = None) -> int:
    """Return the usual distance between rows (the stride).

    Raises UserError naming the first row whose distance from the row before is not a multiple of the stride. Multiples
    are accepted since rows may be missing, and so are differences that come from rounding (29 among 30s).
    """
    steps = np.diff(frame_index)
    distances, counts = np.unique(steps[steps > 0], return_counts=True)
    stride = int(distances[np.argmax(counts)]) if len(distances) else 1
    rows = np.rint(steps / stride)
    wrong = np.flatnonzero((rows < 1) | (np.abs(steps - rows * stride) > rows * (stride >= _ROUNDED_STRIDE)))
    if len(wrong):
        row = int(wrong[0]) + 1
        before, here = int(frame_index[row - 1]), int(frame_index[row])
        if here == before:
            problem = "comes twice"
        elif here < before:
            problem = f"comes after {before}: frame numbers must increase"
        else:
            problem = f"follows {before}, where {before + stride} was due (rows are {stride} apart)"
        raise row_error(path, row, f"frame {here} {problem}", places)
    return int(steps[rows == 1].max(initial=stride))


def unknown_class(kind: Literal["phase", "tool"], name: str, spec: DataSetSpec) -> str:
    """Return a message about a class name that the data set does not have.

    It suggests the most similar known name, or lists all names, and mentions aliases.
    """
    names, aliases = (spec.phases, spec.phase_aliases) if kind == "phase" else (spec.tools, spec.tool_aliases)
    hint = did_you_mean(name[:80], (*aliases, *names)) or f" (known: {', '.join(names)})"
    return f"unknown {kind} {shown_cell(name)}{hint}; or add it to {kind}_aliases in the description of {spec.name}"


def shown_cell(cell: str) -> str:
    """Return a cell for a one-line message: quoted, with control characters escaped, and shortened if it is long."""
    return repr(cell if len(cell) <= 60 else cell[:57] + "...")
