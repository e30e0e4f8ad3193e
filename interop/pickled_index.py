"""The index pickles of the original MTRCNet programs: an index made of them, and they of an index.

`cholec80.pkl` is a list of videos, each a list of rows `[path, tool 1, ..., tool 7, phase]`. The other files hold, for
the parts train, val and test (or train and val, or test alone), first a list of paths each, then a list of labels
(`[tool 1, ..., tool 7, phase]`) each, then a list of the frames a video each. Later ones hold phases alone: rows
`[path, phase]`, labels `[phase]`. Which is which is read from the structure, never from the file's name. Paths in them
are those of another machine: only the names of an image and its folder count, and they are found below the data root.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, listed
from configs.load import load_dataset
from configs.schema import Config, DataConfig, DataSetSpec, SplitConfig
from engine.files import atomic_path, inside
from engine.progress import say
from features.dataset.annotations import (
    PhaseTrack,
    ToolTrack,
    read_phase_file,
    read_tool_file,
    write_phase_file,
    write_tool_file,
)
from features.dataset.build import build_index
from features.dataset.catalogue import data_root, keep_index, open_dataset
from features.dataset.discover import FoundVideo, find_videos, id_of_folder
from features.dataset.frame_folders import LabelEnd, frame_folder, infer_layout, scan_folder, scan_names, source_frames
from features.dataset.index import Index, VideoEntry
from features.dataset.labels import load_labels, sample_labels
from features.dataset.layouts import FolderLayout
from features.dataset.phase_order import describe_order, ids_of_order, parse_phase_order
from features.dataset.row_numbers import Extent
from features.dataset.sampling import sampled_frames
from features.dataset.splits import Split, split_is_asked_for
from features.ids import file_stem
from features.video.scan import probe_video
from interop.safe_pickle import load_plain

LAYOUTS: dict[str, tuple[Split, ...]] = {
    "cholec80": (),
    "train_val_test": ("train", "val", "test"),
    "train_val": ("train", "val"),
    "test": ("test",),
}
LABELS_FOLDER = "labels-from-pickle"
PROTOCOL = 2  # the newest that the original programs' Python 2 reads


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class PickledVideo:
    """One video of an index pickle with R rows: image paths as written there, and labels in the pickle's numbering."""

    where: str  # file and number of the video, for messages
    paths: tuple[str, ...]
    phase: NDArray[np.int64]  # (R,) numbers of the pickle
    tools: NDArray[np.int8] | None  # (R, K), None where the pickle holds phases alone
    split: Split  # "none" where the pickle has no parts

    @property
    def folder(self) -> str:
        """Name of the folder that all images lie in. Raises UserError when there are several."""
        names = {_last_two(path)[0] for path in self.paths}
        if len(names) != 1:
            raise UserError(f"{self.where}: images of several folders ({', '.join(sorted(names)[:3])}) in one video")
        return names.pop()


def _last_two(path: str) -> tuple[str, str]:
    """Names of folder and file, whichever system wrote the path."""
    parts = re.split(r"[/\\]", path)
    return (parts[-2] if len(parts) > 1 else "", parts[-1])


def read_pickled_index(path: Path, spec: DataSetSpec) -> list[PickledVideo]:
    """The videos of an index pickle, in its order. Raises UserError naming file, video and row at fault."""
    content = load_plain(path)
    groups = content if isinstance(content, (list, tuple)) else ()
    if not groups or not all(isinstance(group, (list, tuple)) for group in groups):
        raise _not_an_index(path)
    first = next((group[0] for group in groups if group), None)
    if isinstance(first, str):
        return _from_parts(path, groups, spec)
    if not isinstance(first, (list, tuple)):
        raise _not_an_index(path)
    return [_from_rows(f"{path}: video {number}", rows, spec) for number, rows in enumerate(groups, start=1)]


def _not_an_index(path: Path) -> UserError:
    return UserError(
        f"{path}: not an index: neither a list of videos with rows [path, tools..., phase] nor lists of paths, labels "
        "and frames a video"
    )


def _from_rows(where: str, rows: Sequence[Any], spec: DataSetSpec) -> PickledVideo:
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row, (list, tuple)) and row):
            raise UserError(f"{where}, row {number}: not a row [path, labels...]")
    return _video(where, [row[0] for row in rows], [row[1:] for row in rows], "none", spec)


def _from_parts(path: Path, groups: Sequence[Any], spec: DataSetSpec) -> list[PickledVideo]:
    parts = next((splits for splits in LAYOUTS.values() if splits and 3 * len(splits) == len(groups)), None)
    if parts is None:
        raise UserError(f"{path}: holds {len(groups)} lists, where 9, 6 or 3 are known (paths, labels, frames a video)")
    order = _order_of_lists(groups)
    if order != sorted(order):
        groups = [groups[k] for k in order]
        say(f"{path.name}: its lists are sorted into paths, labels and frames per video of {', '.join(parts)}")
    videos = []
    for number, split in enumerate(parts):
        paths, labels, lengths = groups[number :: len(parts)]
        if not all(type(length) is int and 0 < length <= len(paths) for length in lengths):
            raise UserError(f"{path}: part {split}: its frames a video are not whole numbers of 1 or more")
        if not len(paths) == len(labels) == sum(lengths):
            raise UserError(
                f"{path}: part {split}: {len(paths)} paths, {len(labels)} labels and {sum(lengths)} frames in "
                f"{len(lengths)} videos do not agree"
            )
        ends = list(accumulate(lengths))
        for video, (end, length) in enumerate(zip(ends, lengths, strict=True), start=1):
            span = slice(end - length, end)
            videos.append(_video(f"{path}: part {split}, video {video}", paths[span], labels[span], split, spec))
    return videos


def _order_of_lists(groups: Sequence[Any]) -> list[int]:
    """Where the paths of all parts are, then their labels, then their frames per video.

    MTRCNet writes them so; Trans-SVNet writes all three of train and val, then the three of test. What lists hold
    decides; where some are empty, or labels are numbers like frames per video, it is one of these two orders.
    """
    kinds = [
        (str, list, int).index(type(group[0])) if group and type(group[0]) in (str, list, int) else 3
        for group in groups
    ]
    if sorted(kinds) == [k for k in range(3) for _ in range(len(groups) // 3)]:
        return sorted(range(len(groups)), key=kinds.__getitem__)
    test_last = len(groups) == 9 and (kinds[6] == 0 or kinds[2] in (1, 2))
    return [0, 1, 6, 2, 3, 7, 4, 5, 8] if test_last else list(range(len(groups)))


def _video(where: str, paths: Sequence[Any], labels: Sequence[Any], split: Split, spec: DataSetSpec) -> PickledVideo:
    if not paths:
        raise UserError(f"{where}: has no rows")
    width = len(labels[0]) if isinstance(labels[0], (list, tuple)) else 1
    for number, (path, row) in enumerate(zip(paths, labels, strict=True), start=1):
        if not (isinstance(path, str) and path and path.isprintable()):
            raise UserError(f"{where}, row {number}: its path is not a name")
        _require_labels(f"{where}, row {number}", row, width, spec)
    table = np.array(labels, dtype=np.int64).reshape(len(paths), -1)  # (R, 1) or (R, K + 1)
    tools = table[:, :-1].astype(np.int8) if table.shape[1] > 1 else None
    return PickledVideo(where, tuple(paths), table[:, -1], tools, split)


def _require_labels(where: str, row: Any, width: int, spec: DataSetSpec) -> None:
    cells = row if isinstance(row, (list, tuple)) else [row]
    kinds = {1, len(spec.tools) + 1}
    if len(cells) != width or width not in kinds:
        raise UserError(
            f"{where}: {len(cells)} labels; {spec.name} has {len(spec.tools)} tools and a phase, or a phase"
        )
    if not all(type(cell) is int for cell in cells):
        raise UserError(f"{where}: a label is not a whole number")
    if not 0 <= cells[-1] < len(spec.phases):
        raise UserError(f"{where}: phase {cells[-1]}; {spec.name} has phases 0 to {len(spec.phases) - 1}")
    if not all(cell in (0, 1) for cell in cells[:-1]):
        raise UserError(f"{where}: a tool's label is neither 0 nor 1")


# ---------------------------------------------------------------------------------------------- an index of pickles


@dataclass(frozen=True, eq=False)
class _Labels:
    """A pickled video as tracks on the timeline of its source below the root."""

    phase: PhaseTrack
    tools: ToolTrack | None


def index_from_pickles(
    config: Config,
    files: Sequence[Path],
    *,
    phase_order: str | None,
    labels_to: Path | None = None,
    replace: bool = False,
) -> Index:
    """Make `data.index` of index pickles: their videos, their labels and, where they have parts and the settings name
    no split, their split.

    Videos are found below the data root by the names of their folders. Annotation files below the root must say what
    the pickle says, row by row, and are used; where there are none, they are written to `labels_to` (a folder below the
    root, by default `labels-from-pickle` there). Rows are taken to be `data.fps` apart. Raises UserError naming file,
    video and row where that cannot be, and writes nothing then.
    """
    root, spec = data_root(config), load_dataset(config.data.dataset)
    order = parse_phase_order(phase_order, spec, str(files[0]))
    pickled = _by_id([video for file in files for video in read_pickled_index(file, spec)], spec)
    say(f"phases in {', '.join(file.name for file in files)}: {describe_order(order)}")
    found = {video.id: video for video in find_videos(root, spec, config.data).videos}
    labels = {}
    for video_id, video in pickled.items():
        if video_id not in found:
            raise UserError(f"{video.where}: no {video_id} (folder {video.folder!r}) below {root}")
        labels[video_id] = _check_video(root, found[video_id], video, order, spec, config.data)
    data = config.data
    if not split_is_asked_for(data.split) and any(video.split != "none" for video in pickled.values()):
        data = data.model_copy(update={"split": _as_lists(pickled)})
    if left := sorted(found.keys() - pickled.keys()):
        say(f"{len(left)} video(s) below {root} are in none of the pickles and left out: {listed(left)}")
    with _written_labels(root, labels_to or root / LABELS_FOLDER, found, labels, spec):
        index = build_index(root, spec, data, only=pickled.keys())
        index = index.model_copy(update={"made_from": ", ".join(file.name for file in files)})
        return keep_index(index, config, root, replace)


def _by_id(videos: Sequence[PickledVideo], spec: DataSetSpec) -> dict[str, PickledVideo]:
    by_id: dict[str, PickledVideo] = {}
    shared = []
    for video in videos:
        video_id = id_of_folder(video.folder, spec)
        if video_id is None:
            raise UserError(f"{video.where}: folder {video.folder!r} is not named like a video of {spec.name}")
        if (before := by_id.get(video_id)) is not None:
            same = before.paths == video.paths and np.array_equal(before.phase, video.phase)
            if (before.split, video.split) != ("val", "test") or not same:
                raise UserError(f"{video.where}: {video_id} was there before ({before.where})")
            shared.append(video_id)
        by_id[video_id] = video
    if shared:  # the 40/40 splits of TMRNet and Trans-SVNet choose the model on videos of the test part
        say(f"in the parts val and test, taken as test: {', '.join(shared)}; data.split names another split")
    return by_id


def _as_lists(pickled: Mapping[str, PickledVideo]) -> SplitConfig:
    def part(split: str) -> tuple[str, ...]:
        return tuple(video_id for video_id, video in pickled.items() if video.split == split)

    return SplitConfig(rule="lists", train=part("train"), val=part("val"), test=part("test"))


def _check_video(
    root: Path, found: FoundVideo, video: PickledVideo, order: Sequence[str], spec: DataSetSpec, data: DataConfig
) -> _Labels:
    """The pickle's labels on the video's timeline, checked against images or frames and annotations below the root."""
    if found.kind == "video":
        info = probe_video(inside(root, found.source))
        times_s = info.times.seconds(info.frame_count) if info.times else None
        extent = Extent(found.source, info.frame_count, info.fps, info.fps, times_s=times_s)
        frames, stride = _rows_of_video(video, extent, spec.model_copy(update={"annotation_fps": info.fps}), data)
        if frames[-1] >= info.frame_count:
            raise UserError(
                f"{video.where}: {len(frames)} rows reach frame {frames[-1]}, {root / found.source} has "
                f"{info.frame_count} frames"
            )
    else:
        frames, layout = _row_frames(video, spec, data)
        stride = layout.stride
        _require_images(root, found, video, frames, stride, spec, data)
    phase = ids_of_order(order, spec.phases)[video.phase].astype(np.int8)
    labels = _Labels(
        PhaseTrack(frames, phase, stride), None if video.tools is None else ToolTrack(frames, video.tools, stride)
    )
    _require_agreement(root, found, video, labels, spec)
    return labels


def _row_frames(video: PickledVideo, spec: DataSetSpec, data: DataConfig) -> tuple[NDArray[np.int64], FolderLayout]:
    """Source frame (R,) of each row, from the numbers in the images' names, and how these lie in the source.

    Numbers one apart count rows at `data.fps`, unless the settings say otherwise.
    """
    scan = scan_names(Path(f"{video.where} ({video.folder})"), [_last_two(path)[1] for path in video.paths], spec)
    consecutive = len(scan.numbers) < 2 or scan.numbers[1] == scan.numbers[0] + 1
    if consecutive and data.frame_numbering == "auto" and data.folder_fps is None:
        data = data.model_copy(update={"folder_fps": data.fps})
    layout = infer_layout(scan, spec, data, None)
    step = round(spec.annotation_fps / data.fps)
    if layout.stride != step:
        raise UserError(
            f"{video.where}: rows are {layout.stride} frames apart where data.fps={data.fps:g} of "
            f"{spec.annotation_fps:g} makes {step}; set data.fps={spec.annotation_fps / layout.stride:g}"
        )
    return source_frames(scan, layout), layout


def _rows_of_video(
    video: PickledVideo, extent: Extent, spec: DataSetSpec, data: DataConfig
) -> tuple[NDArray[np.int64], int]:
    """Source frame (R,) of each row of a video file, and the distance between rows.

    Samples are taken by time: at 29.97 fps they are not every 30 frames, and their numbers are not evenly spaced.
    """
    rate = data.folder_fps or data.fps
    step = extent.fps / rate
    numbers = scan_names(Path(video.where), [_last_two(path)[1] for path in video.paths], spec).numbers
    if abs(step - round(step)) > 1e-6 and np.array_equal(numbers, extent.on_screen(np.rint(numbers / step) / rate)):
        return numbers, int(np.diff(numbers).max(initial=1))
    frames, layout = _row_frames(video, spec, data)
    if layout.numbering == "source":
        return frames, layout.stride
    frames = extent.on_screen(frames / layout.stride / rate)
    return frames, int(np.diff(frames).max(initial=layout.stride))


def _require_images(
    root: Path,
    found: FoundVideo,
    video: PickledVideo,
    frames: NDArray[np.int64],
    stride: int,
    spec: DataSetSpec,
    data: DataConfig,
) -> None:
    """Raise UserError where rows have no image below the root."""
    scan = scan_folder(root, found.source, spec)
    counts = f"{video.where}: {len(frames)} rows, but {root / found.source} holds {len(scan.names)} images"
    if len(scan.names) < len(frames):
        raise UserError(f"{counts}; restore the missing ones")
    layout = infer_layout(scan, spec, data, LabelEnd(int(frames[-1]) + stride, stride))
    missing = np.flatnonzero(~np.isin(frames, source_frames(scan, layout)))
    if len(missing):
        row = int(missing[0])
        raise UserError(f"{counts} and none of frame {frames[row]} (row {row + 1}, {_last_two(video.paths[row])[1]})")


def _require_agreement(root: Path, found: FoundVideo, video: PickledVideo, labels: _Labels, spec: DataSetSpec) -> None:
    """Raise UserError where an annotation file below the root says something else than the pickle."""
    frames = labels.phase.frame_index
    if found.phase is not None:
        there = read_phase_file(inside(root, found.phase), spec)
        phase, _ = sample_labels(frames, there, None, "mask", len(spec.tools))
        _require_same(root / found.phase, video, phase[:, None], labels.phase.phase[:, None], frames)
    if found.tool is not None and labels.tools is not None:
        there_tools = read_tool_file(inside(root, found.tool), spec)
        _, tools = sample_labels(frames, None, there_tools, "mask", len(spec.tools))
        _require_same(root / found.tool, video, tools, labels.tools.tools, frames)


def _require_same(
    path: Path, video: PickledVideo, there: NDArray[np.int8], here: NDArray[np.int8], frames: NDArray[np.int64]
) -> None:
    different = np.flatnonzero((there != here).any(axis=1))
    if len(different):
        row = int(different[0])
        raise UserError(
            f"{video.where}, row {row + 1}: differs from {path} at frame {frames[row]} ({len(different)} of "
            f"{len(frames)} rows do); check --phase-order, or take the annotation file out of the data root"
        )


@contextmanager
def _written_labels(
    root: Path, folder: Path, found: Mapping[str, FoundVideo], labels: Mapping[str, _Labels], spec: DataSetSpec
) -> Iterator[None]:
    """Annotation files for the videos that have none below the root; taken away again where the index fails."""
    phases = {video_id: one.phase for video_id, one in labels.items() if found[video_id].phase is None}
    tools = {
        video_id: one.tools
        for video_id, one in labels.items()
        if found[video_id].tool is None and one.tools is not None
    }
    if not phases and not tools:
        say(f"annotation files below {root} say the same; they are used")
        yield
        return
    _require_folder(root, folder)
    paths = [_label_file(folder, video_id, "phase", spec.patterns.phase, spec) for video_id in phases]
    paths += [_label_file(folder, video_id, "tool", spec.patterns.tool, spec) for video_id in tools]
    existed = folder.exists()
    try:
        for path, phase in zip(paths, phases.values(), strict=False):
            write_phase_file(path, phase, spec)
        for path, tool in zip(paths[len(phases) :], tools.values(), strict=True):
            write_tool_file(path, tool, spec)
        say(f"{folder}: {len(phases)} phase and {len(tools)} tool annotation files written")
        yield
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        if not existed and folder.exists():
            folder.rmdir()
        raise


def _require_folder(root: Path, folder: Path) -> None:
    """Raise UserError unless `folder` is a folder of its own below the root, where an index finds files."""
    below, top = folder.resolve(), root.resolve()
    if below == top or not below.is_relative_to(top):
        raise UserError(f"{folder}: --labels-to must be a folder of its own below the data root {root}")
    if any(part.startswith(".") for part in below.relative_to(top).parts):
        raise UserError(f"{folder}: --labels-to must not be hidden, for an index passes over hidden folders")


def _label_file(folder: Path, video_id: str, ending: str, pattern: str, spec: DataSetSpec) -> Path:
    """Where the labels of a video go. Raises UserError where no index would find them or something else is there."""
    path = folder / f"{file_stem(video_id)}-{ending}.txt"
    if not re.fullmatch(pattern, path.name, re.IGNORECASE):
        raise UserError(
            f"data set {spec.name}: patterns.{ending} does not find {path.name}, so labels cannot be written"
        )
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: is in the way; name another folder with --labels-to")
    return path


# ---------------------------------------------------------------------------------------------- pickles of an index


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """The sampled frames of a video that have labels: what the original programs call its frames."""

    frame_index: NDArray[np.int64]  # (R,)
    phase: NDArray[np.int8]  # (R,)
    tools: NDArray[np.int8]  # (R, K)
    left_out: int


def labelled_rows(entry: VideoEntry, root: Path, index: Index, data: DataConfig, phases_only: bool) -> LabelledRows:
    """The frames sampled at `data.fps` that have a phase and (unless `phases_only`) tools. Raises UserError when labels
    have changed."""
    frames = sampled_frames(entry, data.fps)
    phase, tools = load_labels(entry, root, index, frames, data.tools_between_rows)
    kept = phase >= 0
    if not phases_only:
        kept &= (tools >= 0).all(axis=1)
    return LabelledRows(frames[kept], phase[kept], tools[kept], int((~kept).sum()))


def pickle_from_index(
    config: Config,
    path: Path,
    *,
    layout: str,
    phase_order: str | None,
    phases_only: bool = False,
    replace: bool = False,
) -> None:
    """Write the index as one of the original programs' pickles, sampled at `data.fps`, phases numbered as asked for.

    Rows exist where both labels do; what is left out is said. Paths are those of the images below the data root; for a
    video file they are those that images numbered by its frames would have beside it. Raises UserError when another
    file stands there, and when no row is left.
    """
    index, root = open_dataset(config)
    order = parse_phase_order(phase_order, index.dataset, str(path))
    say(f"phases in {path.name}: {describe_order(order)}")
    if index.dataset.tools == () and not phases_only:
        raise UserError(f"{path}: data set {index.dataset.name} has no tools; add --phases-only")
    entries = [entry for split in LAYOUTS[layout] or (None,) for entry in _entries(index, split)]
    if not entries:
        parts = " or ".join(LAYOUTS[layout])
        raise UserError(f"{path}: not written, for the index has no video in split {parts}; set data.split or --layout")
    rows = {entry.id: labelled_rows(entry, root, index, config.data, phases_only) for entry in entries}
    numbers = np.argsort(ids_of_order(order, index.dataset.phases))  # their number of each of our phases
    videos = {entry.id: _pickled(entry, root, index, rows[entry.id], numbers, phases_only) for entry in entries}
    videos = {video_id: video for video_id, video in videos.items() if video}
    if not videos:
        raise UserError(f"{path}: not written, for no frame of the index has the labels that it wants")
    value = _arranged(index, videos, layout)
    _write(path, pickle.dumps(value, protocol=PROTOCOL), replace)
    _say_what_is_left_out(index, entries, rows, videos, path)


def _entries(index: Index, split: str | None) -> tuple[VideoEntry, ...]:
    return index.videos if split is None else index.by_split(split)


def _pickled(
    entry: VideoEntry, root: Path, index: Index, rows: LabelledRows, numbers: NDArray[np.int64], phases_only: bool
) -> list[list[Any]]:
    """Rows `[path, tool..., phase]` of plain strings and ints."""
    layout = entry.frames
    names = dict(frame_folder(root, entry.source, index.dataset, layout).files) if layout else None
    source = inside(root, entry.source)
    folder = source if names else source.parent / file_stem(entry.id)
    result = []
    for frame, phase, tools in zip(
        rows.frame_index.tolist(), numbers[rows.phase].tolist(), rows.tools.tolist(), strict=True
    ):
        name = names[frame] if names else f"{file_stem(entry.id)}_{frame:06d}.jpg"
        result.append([(folder / name).as_posix(), *([] if phases_only else tools), phase])
    return result


def _arranged(index: Index, videos: Mapping[str, list[list[Any]]], layout: str) -> list[Any]:
    """The layout's lists: videos, or paths a part, labels a part, frames a video a part."""
    if not LAYOUTS[layout]:
        return list(videos.values())
    parts = [[videos[entry.id] for entry in index.by_split(split) if entry.id in videos] for split in LAYOUTS[layout]]
    return [
        *([row[0] for video in part for row in video] for part in parts),
        *([row[1:] for video in part for row in video] for part in parts),
        *([len(video) for video in part] for part in parts),
    ]


def _write(path: Path, content: bytes, replace: bool) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    if path.exists() and not replace:
        if path.read_bytes() == content:
            say(f"{path}: unchanged")
            return
        raise UserError(f"{path}: exists and holds something else; --force replaces it")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    say(f"{path}: written")


def _say_what_is_left_out(
    index: Index,
    entries: Sequence[VideoEntry],
    rows: Mapping[str, LabelledRows],
    videos: Mapping[str, Any],
    path: Path,
) -> None:
    kept = sum(len(one.frame_index) for one in rows.values())
    say(f"{path.name}: {len(videos)} videos, {kept} rows")
    if left := sum(one.left_out for one in rows.values()):
        say(f"left out: {left} sampled frames that lack a label")
    if absent := [entry.id for entry in index.videos if entry.id not in videos]:
        say(f"left out: {len(absent)} videos in no part of it or without labels: {listed(absent)}")
    if any(entry.kind == "video" for entry in entries):
        say("images named there do not exist for video files: cut them, named by source frame from 0, where it says")
