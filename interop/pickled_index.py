"""Convert index pickles of the original MTRCNet programs to an index, and an index to such a pickle.

`interop.pickled_videos` describes the files. A pickled video is found below the data root by its folder's name.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, listed
from configs.load import load_dataset
from configs.schema import Config, DataConfig, SplitConfig
from engine.files import atomic_path, inside
from engine.progress import say
from features.dataset.annotations import LabelTrack
from features.dataset.build import build_index
from features.dataset.catalogue import data_root, keep_index, open_dataset
from features.dataset.discover import FoundVideo, find_videos, id_of_folder
from features.dataset.formats.cholec80 import read_phase_file, read_tool_file, write_label_file
from features.dataset.frame_folders import LabelEnd, frame_folder, infer_layout, scan_folder, scan_names, source_frames
from features.dataset.index import Dataset, Index, VideoEntry
from features.dataset.labels import sample_labels, sampled_labels
from features.dataset.layouts import FolderLayout
from features.dataset.phase_order import describe_order, ids_of_order, parse_phase_order
from features.dataset.row_numbers import Extent
from features.dataset.sampling import sampled_frames
from features.dataset.splits import rule_asked_for
from features.ids import file_stem
from features.video.scan import probe_video
from features.video_labels import VideoLabels
from interop.pickled_videos import LAYOUTS, PickledVideo, read_pickled_index

LABELS_FOLDER = "labels-from-pickle"
PROTOCOL = 2  # the newest pickle protocol of Python 2, which the original programs use


# ---------------------------------------------------------------------------------------------- pickles to an index


_Labels = dict[str, LabelTrack]  # the keys are `phase` and perhaps `tool`; the rows are source frames of the video
_READERS = {"phase": read_phase_file, "tool": read_tool_file}


def index_from_pickles(
    config: Config,
    files: Sequence[Path],
    *,
    phase_order: str | None,
    labels_to: Path | None = None,
    replace: bool = False,
) -> Index:
    """Write `data.index` with the videos and labels of index pickles, and their split unless the settings name one.

    If there are annotation files below the data root, they are used, and they must agree with the pickle in every row.
    For videos without them, they are written to `labels_to`, a folder below the root (default: `labels-from-pickle`).
    The rows of a pickle must be sampled at `data.fps`. Returns the index. Raises UserError naming file, video and row,
    and writes nothing, if a pickle cannot be read, a video is not found, or labels disagree.
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
    if rule_asked_for(data.split) is None and any(video.split != "none" for video in pickled.values()):
        data = data.model_copy(update={"split": _as_lists(pickled)})
    if left := sorted(found.keys() - pickled.keys()):
        say(f"{len(left)} video(s) below {root} are in none of the pickles and left out: {listed(left)}")
    with _written_labels(root, labels_to or root / LABELS_FOLDER, found, labels, spec):
        index = build_index(root, spec, data, only=pickled.keys())
        index = index.model_copy(update={"made_from": ", ".join(file.name for file in files)})
        return keep_index(config, Dataset(index, root), replace)


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
                raise UserError(f"{video.where}: {video_id} occurs twice (also {before.where})")
            shared.append(video_id)
        by_id[video_id] = video
    if shared:  # the 40/40 splits of TMRNet and Trans-SVNet validate on videos of the test part
        say(f"videos in both val and test are used for test: {', '.join(shared)}; choose another split with data.split")
    return by_id


def _as_lists(pickled: Mapping[str, PickledVideo]) -> SplitConfig:
    def part(split: str) -> tuple[str, ...]:
        return tuple(video_id for video_id, video in pickled.items() if video.split == split)

    return SplitConfig(rule="lists", train=part("train"), val=part("val"), test=part("test"))


def _check_video(
    root: Path, found: FoundVideo, video: PickledVideo, order: Sequence[str], spec: DataSetSpec, data: DataConfig
) -> _Labels:
    """The labels of a pickled video by source frame. Raises UserError if the video's source or annotations disagree."""
    if found.parts:
        raise UserError(f"{root / found.source}: {video.folder} has {len(found.parts)} files; join them for a pickle")
    rows_of = _rows_of_video if found.kind == "video" else _rows_of_folder
    frames, stride = rows_of(root, found.source, video, spec, data)
    phase = ids_of_order(order, spec.phases)[video.phase].astype(np.int8)
    labels = {"phase": LabelTrack(frames, phase, stride)}
    if video.tools is not None:
        labels["tool"] = LabelTrack(frames, video.tools, stride)
    _require_agreement(root, found, video, labels, spec)
    return labels


def _row_frames(video: PickledVideo, spec: DataSetSpec, data: DataConfig) -> tuple[NDArray[np.int64], FolderLayout]:
    """The source frame (R,) of each row, derived from the numbers in image names, and the numbering of the images.

    If the numbers are consecutive, they count the samples at `data.fps`, unless the settings specify another numbering.
    """
    scan = scan_names(Path(f"{video.where} ({video.folder})"), video.file_names, spec)
    consecutive = len(scan.numbers) < 2 or scan.numbers[1] == scan.numbers[0] + 1
    if consecutive and data.frame_numbering == "auto" and data.folder_fps is None:
        data = data.model_copy(update={"folder_fps": data.fps})
    layout = infer_layout(scan, spec, data, None)
    step = round(spec.annotation_fps / data.fps)
    if layout.stride != step:
        raise UserError(
            f"{video.where}: rows are {layout.stride} frames apart, but data.fps={data.fps:g} at "
            f"{spec.annotation_fps:g} fps means {step}; set data.fps={spec.annotation_fps / layout.stride:g}"
        )
    return source_frames(scan, layout), layout


def _rows_of_video(
    root: Path, source: str, video: PickledVideo, spec: DataSetSpec, data: DataConfig
) -> tuple[NDArray[np.int64], int]:
    """The source frame (R,) of each row of a video file, and the largest distance between rows, in frames.

    Videos are sampled by time. At 29.97 fps, for example, samples are not always 30 frames apart. Raises UserError if
    rows lie beyond the end of the video.
    """
    info = probe_video(inside(root, source))
    times_s = info.times.seconds(info.frame_count) if info.times else None
    extent = Extent(source, info.frame_count, info.fps, info.fps, times_s=times_s)
    rate = data.folder_fps or data.fps
    step = extent.fps / rate
    frames = scan_names(Path(video.where), video.file_names, spec).numbers
    if abs(step - round(step)) > 1e-6 and np.array_equal(frames, extent.on_screen(np.rint(frames / step) / rate)):
        stride = int(np.diff(frames).max(initial=1))
    else:
        frames, layout = _row_frames(video, spec.model_copy(update={"annotation_fps": info.fps}), data)
        stride = layout.stride
        if layout.numbering == "sample":
            frames = extent.on_screen(frames / stride / rate)
            stride = int(np.diff(frames).max(initial=stride))
    if frames[-1] >= info.frame_count:
        raise UserError(
            f"{video.where}: its {len(frames)} rows end at frame {frames[-1]}, but {root / source} has "
            f"{info.frame_count} frames"
        )
    return frames, stride


def _rows_of_folder(
    root: Path, source: str, video: PickledVideo, spec: DataSetSpec, data: DataConfig
) -> tuple[NDArray[np.int64], int]:
    """The source frame (R,) of each row of a folder of images, and the distance between rows, in frames.

    Raises UserError if a row has no image.
    """
    frames, layout = _row_frames(video, spec, data)
    scan = scan_folder(root, source, spec)
    counts = f"{video.where}: {len(frames)} rows, but {root / source} contains {len(scan.names)} images"
    if len(scan.names) < len(frames):
        raise UserError(f"{counts}; restore the missing ones")
    images = infer_layout(scan, spec, data, LabelEnd(int(frames[-1]) + layout.stride, layout.stride))
    missing = np.flatnonzero(~np.isin(frames, source_frames(scan, images)))
    if len(missing):
        row = int(missing[0])
        raise UserError(f"{counts}, none of them for frame {frames[row]} (row {row + 1}, {video.file_names[row]})")
    return frames, layout.stride


def _require_agreement(root: Path, found: FoundVideo, video: PickledVideo, labels: _Labels, spec: DataSetSpec) -> None:
    """Raise UserError if an annotation file below the root disagrees with the pickle."""
    frames = labels["phase"].frame_index
    files = {role: name for role in labels if (name := found.labels.get(role))}
    tracks = {role: _READERS[role](inside(root, name), spec) for role, name in files.items()}
    sampled = sample_labels(frames, tracks.get("phase"), tracks.get("tool"), "mask", len(spec.tools))
    for role, here in zip(("phase", "tool"), sampled, strict=True):
        if role not in files:
            continue
        rows = (here != labels[role].labels).reshape(len(frames), -1).any(axis=1)
        if rows.any():
            row, name = int(rows.argmax()), files[role]
            raise UserError(
                f"{video.where}, row {row + 1}: differs from {root / name} at frame {frames[row]} ({rows.sum()} of "
                f"{len(frames)} rows do); check --phase-order, or move the annotation file out of the data root"
            )


@contextmanager
def _written_labels(
    root: Path, folder: Path, found: Mapping[str, FoundVideo], labels: Mapping[str, _Labels], spec: DataSetSpec
) -> Iterator[None]:
    """A context that writes annotation files for the videos that have none below the root.

    The files are deleted again if an exception leaves the context.
    """
    files = {
        _label_file(folder, video_id, role, spec): track
        for video_id, tracks in labels.items()
        for role, track in tracks.items()
        if role not in found[video_id].labels
    }
    if not files:
        say(f"annotation files below {root} agree with the pickles and are used")
        yield
        return
    _require_folder(root, folder)
    existed = folder.exists()
    try:
        for path, track in files.items():
            write_label_file(path, track, spec)
        phases = sum(track.labels.ndim == 1 for track in files.values())
        say(f"{folder}: {phases} phase and {len(files) - phases} tool annotation files written")
        yield
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        if not existed and folder.exists():
            folder.rmdir()
        raise


def _require_folder(root: Path, folder: Path) -> None:
    """Raise UserError unless `folder` is a subfolder of the root that is searched for files."""
    below, top = folder.resolve(), root.resolve()
    if below == top or not below.is_relative_to(top):
        raise UserError(f"{folder}: --labels-to must be a subfolder of the data root {root}")
    if any(part.startswith(".") for part in below.relative_to(top).parts):
        raise UserError(f"{folder}: --labels-to must not be hidden, since hidden folders are not searched")


def _label_file(folder: Path, video_id: str, kind: str, spec: DataSetSpec) -> Path:
    """The path to which a video's labels are written.

    Raises UserError if the pattern of the data set does not match it, or if it exists.
    """
    path = folder / f"{file_stem(video_id)}-{kind}.txt"
    if not spec.patterns.compiled(kind).fullmatch(path.name):
        raise UserError(
            f"data set {spec.name}: patterns.{kind} does not match {path.name}, so labels cannot be written"
        )
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: exists already; choose another folder with --labels-to")
    return path


# ---------------------------------------------------------------------------------------------- an index to a pickle


def labelled_rows(dataset: Dataset, entry: VideoEntry, data: DataConfig, phases_only: bool) -> VideoLabels:
    """The labels of the frames that the original programs use.

    These are the frames sampled at `data.fps` that have a phase label and, unless `phases_only`, tool labels. Raises
    UserError if annotation files have changed since the index was written.
    """
    labels = sampled_labels(dataset, entry, data)
    kept = labels.phase >= 0
    if not phases_only:
        kept &= (labels.tools >= 0).all(axis=1)
    return VideoLabels(labels.frame_index[kept], labels.time_s[kept], labels.phase[kept], labels.tools[kept])


def pickle_from_index(
    config: Config,
    path: Path,
    *,
    layout: str,
    phase_order: str | None,
    phases_only: bool = False,
    replace: bool = False,
) -> None:
    """Write the index as a pickle of the original programs, sampled at `data.fps`, phases numbered by `phase_order`.

    A frame that lacks one of the labels has no row; the number of such frames is reported. The paths are those of the
    images below the data root. For a video file, they are paths of images beside it, numbered by source frame, which do
    not exist yet. Raises UserError if there would be no rows, or if another file exists at `path` and `replace` is
    false.
    """
    dataset = open_dataset(config)
    index = dataset.index
    order = parse_phase_order(phase_order, index.dataset, str(path))
    say(f"phases in {path.name}: {describe_order(order)}")
    if index.dataset.tools == () and not phases_only:
        raise UserError(f"{path}: data set {index.dataset.name} has no tools; add --phases-only")
    splits = LAYOUTS[layout]
    entries = [entry for split in splits for entry in index.by_split(split)] if splits else list(index.videos)
    if not entries:
        parts = " or ".join(splits)
        raise UserError(f"{path}: not written: the index has no video in split {parts}; set data.split or --layout")
    numbers = np.argsort(ids_of_order(order, index.dataset.phases))  # phase id -> number in the pickle
    videos = {entry.id: _pickled(dataset, entry, config.data, numbers, phases_only) for entry in entries}
    videos = {video_id: video for video_id, video in videos.items() if video}
    if not videos:
        raise UserError(f"{path}: not written: no frame of the index has all the labels that the pickle needs")
    value = _arranged(index, videos, layout)
    _write(path, pickle.dumps(value, protocol=PROTOCOL), replace)
    _say_what_is_left_out(index, entries, config.data.fps, videos, path)
    if index.dataset.tracks:
        others = " and ".join(index.dataset.tracks)
        say(f"note: {path.name} has no {others}: the original programs know phases and tools only")


def _pickled(
    dataset: Dataset, entry: VideoEntry, data: DataConfig, numbers: NDArray[np.int64], phases_only: bool
) -> list[list[Any]]:
    """The rows `[path, tool..., phase]` of one video, as strings and integers."""
    rows = labelled_rows(dataset, entry, data, phases_only)
    frames, source = rows.frame_index.tolist(), inside(dataset.root, entry.source)
    if entry.frames is not None:
        names = frame_folder(dataset.root, entry.source, dataset.spec, entry.frames)
        images = [source / names[frame] for frame in frames]
    else:
        stem = file_stem(entry.id)
        images = [source.parent / stem / f"{stem}_{frame:06d}.jpg" for frame in frames]
    labels = np.column_stack([*([] if phases_only else [rows.tools]), numbers[rows.phase]])
    return [[image.as_posix(), *row] for image, row in zip(images, labels.tolist(), strict=True)]


def _arranged(index: Index, videos: Mapping[str, list[list[Any]]], layout: str) -> list[Any]:
    """The content of the pickle in the given layout.

    It is a list of videos, or it consists of a list of paths for every part, then a list of labels for every part, and
    then a list of frames per video for every part.
    """
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
        raise UserError(f"{path}: is a folder; give a file")
    if path.exists() and not replace:
        if path.read_bytes() == content:
            say(f"{path}: unchanged")
            return
        raise UserError(f"{path}: exists with other content; --force replaces it")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    say(f"{path}: written")


def _say_what_is_left_out(
    index: Index, entries: Sequence[VideoEntry], fps: float, videos: Mapping[str, list[Any]], path: Path
) -> None:
    kept = sum(map(len, videos.values()))
    say(f"{path.name}: {len(videos)} videos, {kept} rows")
    if left := sum(len(sampled_frames(entry, fps)) for entry in entries) - kept:
        say(f"left out: {left} sampled frames that lack a label")
    if absent := [entry.id for entry in index.videos if entry.id not in videos]:
        say(f"left out: {len(absent)} videos that are not in this layout's splits, or without labels: {listed(absent)}")
    if any(entry.kind == "video" for entry in entries):
        say("images of video files do not exist yet: extract them to the paths in the pickle, numbered from frame 0")
