"""Write predictions as text files of the original MTRCNet programs: `videoNN-phase.txt` and `videoNN-tool.txt`.

A phase file has the header `Frame Phase` and then rows `frame<TAB>name`. A tool file has the header
`Frame Tool1 ... Tool7` and then rows of `frame<TAB>` and seven logits (probabilities in the pytorch1.2.0 programs),
each followed by a tab. Frames are numbered at the rate of the data set's annotation files: 0, 25, 50, ... for Cholec80
at one frame per second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import Config
from engine.files import inside, make_folder, write_text
from engine.progress import say
from engine.safe_pickle import load_plain
from evaluation.files.predictions import TOOLS_ALONE, read_prediction_csv
from evaluation.metrics.tools import logit, sigmoid
from features.dataset.catalogue import open_dataset
from features.dataset.index import Dataset, VideoEntry
from features.dataset.phase_order import describe_order, parse_phase_order
from features.dataset.sampling import frame_times_s, sampled_frames
from features.ids import file_stem, natural_key
from interop.pickled_index import labelled_rows


def phase_text(frames: NDArray[Any], names: Sequence[str]) -> str:
    """The text of a phase file, from frame numbers (T,) and T phase names."""
    rows = (f"{frame}\t{name}\n" for frame, name in zip(frames.tolist(), names, strict=True))
    return "Frame Phase\n" + "".join(rows)


def tool_text(frames: NDArray[Any], values: NDArray[Any]) -> str:
    """The text of a tool file, from frame numbers (T,) and logits or probabilities (T, K), with all their digits."""
    header = " ".join(["Frame", *(f"Tool{number + 1}" for number in range(values.shape[1]))])
    rows = zip(frames.tolist(), values.astype(str).tolist(), strict=True)
    return f"{header}\n" + "".join(
        f"{frame}\t" + "".join(f"{cell}\t" for cell in cells) + "\n" for frame, cells in rows
    )


# ---------------------------------------------------------------------------------------------- from a run


def export_run(
    config: Config,
    run: Path,
    out: Path | None,
    *,
    split: str = "test",
    probabilities: bool = False,
    replace: bool = False,
) -> list[Path]:
    """Write the predictions in `RUN/evaluate/<split>/` as text files to `out` (default: `RUN/export/<split>`).

    Every frame has a prediction, which depends on this frame and earlier ones; the first frames of a video simply have
    fewer earlier ones. Logits are computed from the stored float32 probabilities and are therefore limited to +-16.6.
    Returns the paths. Raises UserError if the run is not evaluated, or if a file with other content exists and
    `replace` is false.
    """
    spec = load_dataset(config.data.dataset)
    folder = inside(run / "evaluate", split)
    files = [*_csv_files(folder / "predictions"), *_csv_files(folder / TOOLS_ALONE)]
    if not files:
        raise UserError(f"{folder}: no predictions; run `evaluate` first, or choose another evaluation with --split")
    texts: dict[str, str] = {}
    bare = 0
    for file in files:
        phases = file.parent.name != TOOLS_ALONE
        prediction = read_prediction_csv(file, spec, phases)
        frames = _annotation_frames(prediction.time_s, spec)
        if phases:
            texts[f"{file.stem}-phase.txt"] = phase_text(frames, [spec.phases[phase] for phase in prediction.phase])
        if prediction.tool_probabilities is None:
            bare += 1
        else:
            texts[f"{file.stem}-tool.txt"] = _tools(frames, prediction.tool_probabilities, probabilities)
    if probabilities and not any(name.endswith("-tool.txt") for name in texts):
        raise UserError(f"--probabilities: there are no tools in {folder}; omit this option")
    written = write_texts(out or run / "export" / split, texts, replace)
    if others := sorted(path.name for path in (folder / "predictions").glob("*/") if path.name in spec.tracks):
        say(f"note: no file is written for {' and '.join(others)}: the original programs know phases and tools only")
    if bare and spec.tools:
        say(f"note: {bare} prediction file(s) without tools, for which no tool file is written")
    return written


def _csv_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.csv"), key=lambda path: natural_key(path.name))


def _annotation_frames(time_s: NDArray[np.float64], spec: DataSetSpec) -> NDArray[np.int64]:
    """The frame numbers (T,) that the data set's annotation files have for the times (T,)."""
    return np.rint(time_s * spec.annotation_fps).astype(np.int64)


def _tools(frames: NDArray[np.int64], values: NDArray[np.float32], probabilities: bool) -> str:
    return tool_text(frames, values if probabilities else logit(values).astype(np.float32))


def write_texts(out: Path, texts: Mapping[str, str], replace: bool) -> list[Path]:
    """Write all texts. Raises UserError, and writes none, if a file has other content and `replace` is false."""
    for name, text in texts.items():
        path = out / name
        if path.exists() and not replace and path.read_bytes() != text.encode():
            raise UserError(f"{path}: exists with other content; --force replaces it, or choose another folder")
    make_folder(out)
    for name, text in texts.items():
        write_text(out / name, text)
    say(f"{out}: {len(texts)} file{'s' * (len(texts) != 1)} written")
    return [out / name for name in texts]


# ---------------------------------------------------------------------------------------------- from pickles


def read_predictions(path: Path, spec: DataSetSpec) -> NDArray[Any]:
    """The content of a prediction pickle: phases (N,) int64, one per clip, or tool scores (N, K) float64.

    Phases have the program's own numbering. The file is a list of numbers or tensors; nothing in it is executed. Raises
    UserError naming the entry at fault, or if the file is missing, unreadable or not a list of such predictions.
    """
    content = load_plain(path, tensors=True)
    if not (isinstance(content, (list, tuple)) and content):
        raise UserError(f"{path}: not a list of predictions")
    tools = isinstance(content[0], (list, tuple))
    for number, entry in enumerate(content, start=1):
        if tools and not (
            isinstance(entry, (list, tuple)) and len(entry) == len(spec.tools) and all(map(_is_number, entry))
        ):
            raise UserError(f"{path}: prediction {number} is not a list of {len(spec.tools)} numbers, one per tool")
        if not tools and not (type(entry) is int and 0 <= entry < len(spec.phases)):
            raise UserError(
                f"{path}: prediction {number} is {str(entry)[:40]!r}, neither a phase from 0 to {len(spec.phases) - 1} "
                f"nor a list of {len(spec.tools)} numbers (scores are not predictions)"
            )
    return np.array(content, dtype=np.float64 if tools else np.int64)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class _VideoPredictions(NamedTuple):
    """The predictions of one video with T sampled frames, of which the first `missing` have none."""

    frames: NDArray[np.int64]  # (T,)
    missing: int
    values: NDArray[Any]  # (T - missing, ...)

    def filled(self) -> _VideoPredictions:
        """The same predictions with the first one repeated for the missing ones; no frames if there are none at all."""
        if not len(self.values):
            return _VideoPredictions(self.frames[:0], 0, self.values)
        values = np.concatenate([np.repeat(self.values[:1], self.missing, axis=0), self.values])
        return _VideoPredictions(self.frames, 0, values)


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
    """Write prediction pickles as text files. They must cover the videos of one split of `data.index`, in its order.

    A clip of `sequence` frames has one prediction, for its last frame. The first `sequence` - 1 frames of a video have
    no prediction. They are left out or, with `fill_first`, get the first prediction of the video, which depends on
    later frames. Returns the paths. Raises UserError naming both numbers if a pickle has not as many predictions as the
    split needs.
    """
    if out is None:
        raise UserError("export --from-predictions: give the folder for the text files with --out")
    dataset = open_dataset(config)
    spec = dataset.spec
    entries = dataset.index.entries_of(split, config.data.index)
    pickles = {file: read_predictions(file, spec) for file in files}
    of_phases = [values.ndim == 1 for values in pickles.values()]
    if phase_order is not None and not any(of_phases):
        raise UserError(f"--phase-order: {files[0]} contains tools, not phases; omit this option")
    if probabilities and all(of_phases):
        raise UserError(f"--probabilities: {files[0]} contains phases, not tools; omit this, or add --tools-from")
    if fill_first and sequence is None:
        raise UserError("--fill-first: give the number of frames per clip with --sequence")
    frames = _frames_by_rule(config, dataset, entries)
    texts: dict[str, str] = {}
    for file, predictions in pickles.items():
        videos = _by_video(file, predictions, frames, sequence, split)
        order: Sequence[str] = ()
        if predictions.ndim == 1:
            order = parse_phase_order(phase_order, spec, str(file))
            say(f"phases in {file.name}: {describe_order(order)}")
        for entry, video in zip(entries, videos, strict=True):
            rows, missing, values = video.filled() if fill_first else video
            stem, shown = file_stem(entry.id), _annotation_frames(frame_times_s(entry, rows[missing:]), spec)
            if predictions.ndim == 1:
                texts[f"{stem}-phase.txt"] = phase_text(shown, [order[phase] for phase in values.tolist()])
            else:
                texts[f"{stem}-tool.txt"] = tool_text(shown, sigmoid(values) if probabilities else values)
        if missing := sum(video.missing for video in videos):
            what = "get the next prediction, which depends on later frames" if fill_first else "have no prediction"
            say(f"{file.name}: the first frames of {len(videos)} videos ({missing} in total) {what}")
    return write_texts(out, texts, replace)


FramesByRule = dict[str, list[NDArray[np.int64]]]  # rule that selects frames -> frames (T,) of each video


def _frames_by_rule(config: Config, dataset: Dataset, entries: Sequence[VideoEntry]) -> FramesByRule:
    """The sampled frames of each video that a prediction pickle may cover, by rule.

    The original index contains the frames with both labels, a newer one those with a phase. Each rule selects at least
    the frames of the rule before it. So if two rules select equally many frames, they select the same ones.
    """

    def labelled(phases_only: bool) -> list[NDArray[np.int64]]:
        return [labelled_rows(dataset, entry, config.data, phases_only).frame_index for entry in entries]

    return {
        "with phase and tool labels": labelled(phases_only=False),
        "with phase labels": labelled(phases_only=True),
        "with or without labels": [sampled_frames(entry, config.data.fps) for entry in entries],
    }


def _by_video(
    path: Path, predictions: NDArray[Any], frames: FramesByRule, sequence: int | None, split: str
) -> list[_VideoPredictions]:
    """Divide predictions among videos. There is one phase prediction per clip; tools have one per frame or per clip."""
    total, of_phases = len(predictions), predictions.ndim == 1
    if of_phases and sequence is None:
        raise UserError(f"{path}: give the number of frames per clip with --sequence (`length_` in the model's name)")
    clip_losses = [] if sequence is None else [sequence - 1]
    losses = clip_losses if of_phases else [0, *clip_losses]
    for videos in frames.values():
        for missing in losses:
            counts = [max(len(rows) - missing, 0) for rows in videos]
            if sum(counts) == total:
                parts = zip(videos, np.split(predictions, np.cumsum(counts)[:-1]), strict=True)
                return [_VideoPredictions(rows, min(missing, len(rows)), values) for rows, values in parts]
    rule, videos = next(iter(frames.items()))
    wanted = sum(max(len(rows) - losses[-1], 0) for rows in videos)
    clips = f", that is {wanted} with --sequence {sequence}" if sequence else ""
    raise UserError(
        f"{path}: contains {total} predictions, but the {len(videos)} videos of split {split} have "
        f"{sum(map(len, videos))} frames {rule}{clips}; check --index, --split, --sequence and data.fps"
    )
