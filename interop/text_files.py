"""Predictions as the original MTRCNet programs write them: `videoNN-phase.txt` and `videoNN-tool.txt`.

Phases: the header `Frame Phase`, then `frame<TAB>name` a row. Tools: the header `Frame Tool1 ... Tool7`, then
`frame<TAB>` and seven logits (probabilities in the pytorch1.2.0 programs), a tab after each. Frames are numbered at the
rate of the data set's annotation files: 0, 25, 50, ... for Cholec80 at one frame a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import Config, DataSetSpec
from engine.files import inside, make_folder, write_text
from engine.progress import say
from evaluation.files.predictions import TOOLS_ALONE, read_prediction_csv, read_tool_csv
from evaluation.metrics.tools import logit, sigmoid
from features.dataset.catalogue import open_dataset
from features.dataset.index import Index, VideoEntry
from features.dataset.phase_order import describe_order, parse_phase_order
from features.dataset.sampling import frame_times_s, sampled_frames
from features.ids import file_stem, natural_key
from interop.pickled_index import labelled_rows
from interop.safe_pickle import load_plain

# Which sampled frames a prediction pickle is about: the original index holds those with both labels, the later one
# those with a phase. Each is part of the next, so equal totals mean equal frames.
_FRAME_RULES = ("phase and tool labels", "phase labels", "no regard to labels")


def phase_text(frames: NDArray[Any], names: Sequence[str]) -> str:
    """The text of a phase file: frame numbers (T,) and phase names (T)."""
    rows = (f"{frame}\t{name}\n" for frame, name in zip(frames.tolist(), names, strict=True))
    return "Frame Phase\n" + "".join(rows)


def tool_text(frames: NDArray[Any], values: NDArray[Any]) -> str:
    """The text of a tool file: frame numbers (T,) and logits or probabilities (T, K), in the fewest exact digits."""
    header = " ".join(["Frame", *(f"Tool{number + 1}" for number in range(values.shape[1]))])
    rows = zip(frames.tolist(), values.astype(str).tolist(), strict=True)
    return f"{header}\n" + "".join(
        f"{frame}\t" + "".join(f"{cell}\t" for cell in cells) + "\n" for frame, cells in rows
    )


# ---------------------------------------------------------------------------------------------- of a run


def export_run(
    config: Config,
    run: Path,
    out: Path | None,
    *,
    split: str = "test",
    probabilities: bool = False,
    replace: bool = False,
) -> list[Path]:
    """Write the predictions in `RUN/evaluate/<split>/` as text files to `out` (`RUN/export/<split>`).

    Evaluation gives every frame a prediction from itself and its past alone; the first frames of a video have shorter
    pasts. Logits are computed from the stored float32 probabilities, and so end at +-16.6. Returns the files' paths.
    Raises UserError when the run is not evaluated, and where a file says something else.
    """
    spec = load_dataset(config.data.dataset)
    folder = inside(run / "evaluate", split)
    files = [_csv_files(folder / "predictions"), _csv_files(folder / TOOLS_ALONE)]
    if not any(files):
        raise UserError(f"{folder}: no predictions here; run `evaluate` first, or name another evaluation with --split")
    texts: dict[str, str] = {}
    bare = 0
    for file in files[0]:
        prediction = read_prediction_csv(file, spec)
        frames = _annotation_frames(prediction.time_s, spec)
        texts[f"{file.stem}-phase.txt"] = phase_text(frames, [spec.phases[phase] for phase in prediction.phase])
        if prediction.tool_probabilities is None:
            bare += 1
        else:
            texts[f"{file.stem}-tool.txt"] = _tools(frames, prediction.tool_probabilities, probabilities)
    for file in files[1]:
        time_s, tools = read_tool_csv(file, spec)
        texts[f"{file.stem}-tool.txt"] = _tools(_annotation_frames(time_s, spec), tools, probabilities)
    if probabilities and not any(name.endswith("-tool.txt") for name in texts):
        raise UserError(f"--probabilities: there are no tools in {folder}; leave it out")
    written = _write_texts(out or run / "export" / split, texts, replace)
    if bare and spec.tools:
        say(f"note: {bare} prediction file(s) without tools, so no tool file for them")
    return written


def _csv_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.csv"), key=lambda path: natural_key(path.name))


def _annotation_frames(time_s: NDArray[np.float64], spec: DataSetSpec) -> NDArray[np.int64]:
    """Times as the data set's annotation files number frames."""
    return np.rint(time_s * spec.annotation_fps).astype(np.int64)


def _tools(frames: NDArray[np.int64], values: NDArray[np.float32], probabilities: bool) -> str:
    return tool_text(frames, values if probabilities else logit(values).astype(np.float32))


def _write_texts(out: Path, texts: Mapping[str, str], replace: bool) -> list[Path]:
    """Write all or, where a file says something else and `replace` is not given, none. Raises UserError then."""
    for name, text in texts.items():
        path = out / name
        if path.exists() and not replace and path.read_bytes() != text.encode():
            raise UserError(f"{path}: exists and says something else; --force replaces it, --out names another folder")
    make_folder(out)
    for name, text in texts.items():
        write_text(out / name, text)
    say(f"{out}: {len(texts)} files written")
    return [out / name for name in texts]


# ---------------------------------------------------------------------------------------------- of a pickle


@dataclass(frozen=True, eq=False)
class PickledPredictions:
    """What a test program left: phase ids (N,) in the program's numbering, or tool values (N, K)."""

    path: Path
    phases: NDArray[np.int64] | None
    tools: NDArray[np.float64] | None

    def __len__(self) -> int:
        values = self.phases if self.phases is not None else self.tools
        assert values is not None
        return len(values)


def read_predictions(path: Path, spec: DataSetSpec) -> PickledPredictions:
    """A prediction pickle: a list of phase ids a clip, or of K tool values a frame, as numbers or as tensors.

    Nothing in it is run. Raises UserError naming the entry at fault.
    """
    content = load_plain(path, tensors=True)
    if not (isinstance(content, (list, tuple)) and content):
        raise UserError(f"{path}: not a list of predictions")
    if isinstance(content[0], (list, tuple)):
        return PickledPredictions(path, None, _tool_values(path, content, spec))
    for number, phase in enumerate(content, start=1):
        if type(phase) is not int or not 0 <= phase < len(spec.phases):
            raise UserError(
                f"{path}: prediction {number} is {str(phase)[:40]!r}, neither a phase from 0 to {len(spec.phases) - 1} "
                f"nor a list of {len(spec.tools)} numbers (scores are not predictions)"
            )
    return PickledPredictions(path, np.array(content, dtype=np.int64), None)


def _tool_values(path: Path, content: Sequence[Any], spec: DataSetSpec) -> NDArray[np.float64]:
    for number, row in enumerate(content, start=1):
        if not (isinstance(row, (list, tuple)) and len(row) == len(spec.tools) and all(map(_is_number, row))):
            raise UserError(f"{path}: prediction {number} is not a list of {len(spec.tools)} numbers, one a tool")
    return np.array(content, dtype=np.float64)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def export_predictions(
    config: Config,
    files: Sequence[Path],
    out: Path | None,
    *,
    split: str = "test",
    sequence: int | None = None,
    phase_order: str | None = None,
    fill_first: bool = False,
    probabilities: bool = False,
    replace: bool = False,
) -> list[Path]:
    """Write the text files of prediction pickles over the videos of one split of `data.index`, in its order.

    A clip of `sequence` frames has one prediction, that of its last frame; the first `sequence` - 1 frames of a video
    have none and are left out, or take the video's first prediction (`fill_first`), which has seen frames after them.
    Raises UserError naming both counts where a pickle's length is not that of the split.
    """
    if out is None:
        raise UserError("export --from-predictions: name the folder of the text files with --out")
    index, root = open_dataset(config)
    spec = index.dataset
    entries = index.entries_of(split, config.data.index)
    pickles = [read_predictions(file, spec) for file in files]
    if phase_order is not None and all(predictions.phases is None for predictions in pickles):
        raise UserError(f"--phase-order: {files[0]} holds tools, not phases; leave it out")
    if probabilities and all(predictions.phases is not None for predictions in pickles):
        raise UserError(f"--probabilities: {files[0]} holds phases, not tools; leave it out, or add --tools-from")
    if fill_first and sequence is None:
        raise UserError("--fill-first: say how many frames a clip had with --sequence")
    frames = _frames_by_rule(config, index, root, entries)
    texts: dict[str, str] = {}
    for predictions in pickles:
        videos = _by_video(predictions, frames, sequence, split)
        order = _order(predictions, phase_order, spec)
        for entry, video in zip(entries, videos, strict=True):
            rows, values = _filled(*video) if fill_first else (video[0][video[1] :], video[2])
            stem, shown = file_stem(entry.id), _annotation_frames(frame_times_s(entry, rows), spec)
            if order is not None:
                texts[f"{stem}-phase.txt"] = phase_text(shown, [order[phase] for phase in values.tolist()])
            else:
                texts[f"{stem}-tool.txt"] = tool_text(shown, sigmoid(values) if probabilities else values)
        _say_first_frames(predictions, videos, fill_first)
    return _write_texts(out, texts, replace)


def _order(predictions: PickledPredictions, phase_order: str | None, spec: DataSetSpec) -> tuple[str, ...] | None:
    """The names of the pickle's phases, shown; None for tools."""
    if predictions.phases is None:
        return None
    order = parse_phase_order(phase_order, spec, str(predictions.path))
    say(f"phases in {predictions.path.name}: {describe_order(order)}")
    return order


def _filled(rows: NDArray[np.int64], missing: int, values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The first frames with the first prediction; a video too short for any has no frames."""
    if not len(values):
        return rows[:0], values
    return rows, np.concatenate([np.repeat(values[:1], missing, axis=0), values])


def _say_first_frames(predictions: PickledPredictions, videos: Sequence[Any], fill_first: bool) -> None:
    if missing := sum(count for _, count, _ in videos):
        what = "take the next prediction, which has seen later frames" if fill_first else "have no prediction: left out"
        say(f"{predictions.path.name}: the first frames of {len(videos)} videos ({missing} in all) {what}")


def _frames_by_rule(
    config: Config, index: Index, root: Path, entries: Sequence[VideoEntry]
) -> dict[str, list[NDArray[np.int64]]]:
    """The frames of each video, by `_FRAME_RULES`."""
    both, phases, none = _FRAME_RULES
    return {
        both: [labelled_rows(entry, root, index, config.data, phases_only=False).frame_index for entry in entries],
        phases: [labelled_rows(entry, root, index, config.data, phases_only=True).frame_index for entry in entries],
        none: [sampled_frames(entry, config.data.fps) for entry in entries],
    }


def _by_video(
    predictions: PickledPredictions, frames: Mapping[str, list[NDArray[np.int64]]], sequence: int | None, split: str
) -> list[tuple[NDArray[np.int64], int, NDArray[Any]]]:
    """Of each video its frames, how many of the first have no prediction, and its values.

    Phases have a prediction a clip; tools a frame, or a clip too.
    """
    path, total = predictions.path, len(predictions)
    if predictions.phases is not None and sequence is None:
        raise UserError(f"{path}: say how many frames a clip had with --sequence (`length_` in the model's file name)")
    lost = [sequence - 1] if predictions.phases is not None and sequence else [0, *([sequence - 1] if sequence else [])]
    for videos in frames.values():
        for first in lost:
            counts = [max(len(rows) - first, 0) for rows in videos]
            if sum(counts) == total:
                return _cut(predictions, videos, first, counts)
    rule, videos = next(iter(frames.items()))
    wanted = sum(max(len(rows) - lost[-1], 0) for rows in videos)
    clips = f", that is {wanted} at --sequence {sequence}" if sequence else ""
    raise UserError(
        f"{path}: holds {total} predictions, but the {len(videos)} videos of split {split} have "
        f"{sum(map(len, videos))} frames (with {rule}){clips}; check --index, --split, --sequence and data.fps"
    )


def _cut(
    predictions: PickledPredictions, videos: Sequence[NDArray[np.int64]], first: int, counts: Sequence[int]
) -> list[tuple[NDArray[np.int64], int, NDArray[Any]]]:
    values: Any = predictions.phases if predictions.phases is not None else predictions.tools
    ends = np.cumsum(counts)
    return [
        (rows, min(first, len(rows)), values[end - count : end])
        for rows, count, end in zip(videos, counts, ends, strict=True)
    ]
