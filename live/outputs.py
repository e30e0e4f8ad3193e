"""The files that a stream writes while it runs: lines are appended, so that others can follow them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.schema import PreprocessConfig
from engine.files import atomic_path, make_folder
from evaluation.files.predictions import prediction_columns
from features.frames.preprocess import crop_frames, normalise
from live.recogniser import Recognition, TrackRecognition

_LAST_BYTES = 1 << 20  # a line is shorter


def to_line(one: Recognition, spec: DataSetSpec, delay_s: float) -> str:
    """A recognition as one line of JSON, which ends with a line break; `delay_s` is that of the line."""
    tools = {} if one.tools is None else _named(spec.tools, one.tools)
    content: dict[str, Any] = {
        "frame": one.frame,
        "time_s": round(one.time_s, 3),
        "phase": one.phase,
        "phase_name": one.phase_name,
        "since_s": round(one.since_s, 3),
        "probabilities": _named(spec.phases, one.probabilities),
        "tools": tools,
        "delay_s": round(delay_s, 3),
    }
    if one.tracks:
        content["tracks"] = {name: _track(spec, name, found) for name, found in one.tracks.items()}
    return json.dumps(content, ensure_ascii=False) + "\n"


def _track(spec: DataSetSpec, name: str, found: TrackRecognition) -> dict[str, Any]:
    return {
        "class": found.label,
        "name": found.name,
        "since_s": round(found.since_s, 3),
        "probabilities": _named(spec.tracks[name].classes, found.probabilities),
    }


def _named(names: tuple[str, ...], values: NDArray[np.float32]) -> dict[str, float]:
    """Numbers with the fewest digits that give the same float32."""
    return {name: float(str(value)) for name, value in zip(names, values.astype(np.float32), strict=True)}


def to_row(one: Recognition) -> str:
    """The phases and tools of a recognition as a row of a prediction file (`evaluation.files.predictions`)."""
    tools = [] if one.tools is None else one.tools.astype(np.float32).tolist()
    values = np.array([*one.probabilities, *tools], dtype=np.float32).astype(str)
    return ",".join([str(one.frame), f"{one.time_s:.3f}", str(one.phase), _quoted(one.phase_name), *values]) + "\n"


def header_row(spec: DataSetSpec, tools: bool) -> str:
    """The header of such a file."""
    return ",".join(map(_quoted, prediction_columns(spec, tools))) + "\n"


def _quoted(text: str) -> str:
    """A cell as the module csv writes it."""
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


class LineFile:
    """A text file to which whole lines are appended, one per frame, each flushed at once.

    A file that exists is continued if `resumes`: an incomplete last line is removed, and lines of frames that it has
    already are not written again. `frame_of` gives the number of a line's frame. Raises UserError if the file exists
    and is not to be continued, or is no such file.
    """

    def __init__(self, path: Path, frame_of: Callable[[str], int], resumes: bool, header: str = "") -> None:
        self._path, self.last_frame = path, -1
        if path.exists() and not resumes:
            raise UserError(f"{path}: exists; name another file, or continue the stream that wrote it with its --state")
        make_folder(path.parent)
        try:
            self._file = path.open("ab")
            if self._file.tell():
                self._continue(frame_of, header)
            else:
                self._file.write(header.encode())
                self._file.flush()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error

    def _continue(self, frame_of: Callable[[str], int], header: str) -> None:
        with self._path.open("rb") as found:
            size = found.seek(0, os.SEEK_END)
            found.seek(max(0, size - _LAST_BYTES))
            whole, _, rest = found.read().rpartition(b"\n")
        self._file.truncate(size - len(rest))
        last = whole.rpartition(b"\n")[2].decode(errors="replace")
        if last and last + "\n" != header:
            try:
                self.last_frame = frame_of(last)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{self._path}: its last line is not one of a stream; name another file") from error

    def write(self, frame: int, line: str) -> None:
        """Append the line of a frame. Raises OSError if the disk is full."""
        if frame > self.last_frame:
            self._file.write(line.encode())
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def frame_of_json(line: str) -> int:
    """The frame of a line of JSON."""
    return int(json.loads(line)["frame"])


def frame_of_row(row: str) -> int:
    """The frame of a row of CSV."""
    return int(row.partition(",")[0])


class InputFile:
    """Writes the frames exactly as the encoder takes them, (N, 3, S, S) float32, to a file of NumPy (.npy).

    The file appears under its name when it is closed.
    """

    def __init__(self, path: Path, preprocess: PreprocessConfig) -> None:
        self._preprocess, self._count = preprocess, 0
        self._stack = ExitStack()
        self._file = self._stack.enter_context(self._stack.enter_context(atomic_path(path)).open("wb"))
        self._shape: tuple[int, ...] = ()

    def write(self, frames: Tensor) -> None:
        """Append frames (N, R, R, 3) uint8 that are resized."""
        crops = crop_frames(frames, self._preprocess.crop_px)[:, 0]
        values = np.ascontiguousarray(normalise(crops, self._preprocess).numpy(), dtype="<f4")
        if not self._count:
            self._shape = values.shape[1:]
            self._write_header()
        self._file.write(values.tobytes())
        self._count += len(values)

    def _write_header(self) -> None:
        """The header, with room for any number of frames, so that it can be overwritten."""
        shape = (self._count, *(self._shape or (3, 0, 0)))
        np.lib.format.write_array_header_1_0(self._file, {"descr": "<f4", "fortran_order": False, "shape": shape})

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._stack.close()
