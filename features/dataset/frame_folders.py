"""Folders of frames: the images in them, and what the numbers in their names count."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.schema import DataConfig
from engine.files import inside, sha256_file
from features.dataset.annotations import LabelTrack
from features.dataset.discover import checked_path, sorted_entries
from features.dataset.layouts import FolderLayout, Numbering
from features.video.times import same_rate

_SOURCE_FPS = (24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60000 / 1001, 60.0)


@dataclass(frozen=True, eq=False)
class FolderScan:
    """The images of a folder in the order of their numbers: `numbers` (N,) int64, names, sizes, newest change."""

    path: Path
    numbers: NDArray[np.int64]
    names: tuple[str, ...]
    sizes_bytes: tuple[int, ...]
    modified_ns: int

    def identity(self) -> str:
        """SHA-256 over all names and sizes and the content of the first and the last image."""
        ends = [sha256_file(self.path / name) for name in (self.names[0], self.names[-1])]
        return sha256(json.dumps([self.names, self.sizes_bytes, ends]).encode()).hexdigest()

    def content(self) -> str:
        """SHA-256 over the names and the whole content of all images."""
        return sha256(json.dumps([(name, sha256_file(self.path / name)) for name in self.names]).encode()).hexdigest()


def scan_folder(root: Path, relative: str, spec: DataSetSpec) -> FolderScan:
    """The images of the frame folder `relative`.

    Raises UserError for a folder without images, an empty image and two images with one number.
    """
    folder = inside(root, relative)
    pattern = spec.patterns.compiled("frame")
    images: dict[int, tuple[str, int]] = {}
    modified_ns = 0
    for entry in sorted_entries(folder):
        match = pattern.fullmatch(entry.name)
        if match is None or entry.name.startswith(".") or entry.is_dir():
            continue
        number = _image_number(match, spec)
        if number in images:
            raise UserError(f"{entry.path} and {folder / images[number][0]}: two images with number {number}")
        images[number] = (entry.name, _image_size(root, entry))
        modified_ns = max(modified_ns, entry.stat().st_mtime_ns)
    if not images:
        raise UserError(f"{folder}: holds no image named {spec.patterns.frame}")
    numbers = sorted(images)
    names, sizes = zip(*(images[number] for number in numbers), strict=True)
    return FolderScan(folder, np.array(numbers, dtype=np.int64), names, sizes, modified_ns)


def scan_names(where: Path, names: Sequence[str], spec: DataSetSpec) -> FolderScan:
    """The images named in a list, in its order, as if scanned from a folder; `where` is used in messages only.

    Raises UserError for a name that is not an image's and for numbers that do not increase.
    """
    pattern = spec.patterns.compiled("frame")
    numbers = []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            raise UserError(f"{where}: {name[:60]!r} is not named like an image of data set {spec.name}")
        numbers.append(_image_number(match, spec))
        if len(numbers) > 1 and numbers[-1] <= numbers[-2]:
            raise UserError(f"{where}: {name} comes after {names[len(numbers) - 2]}: not in the order of time")
    return FolderScan(where, np.array(numbers, dtype=np.int64), tuple(names), (1,) * len(names), 0)


def _image_number(match: re.Match[str], spec: DataSetSpec) -> int:
    text = match.group("frame") or ""
    if not (text.isdecimal() and len(text) <= 15):
        raise UserError(f"{match.string}: {text!r} is no frame number; see patterns.frame of data set {spec.name}")
    return int(text)


def _image_size(root: Path, entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        checked_path(root, Path(entry.path))
    size = entry.stat().st_size
    if size == 0:
        raise UserError(f"{entry.path}: this image is empty (0 bytes)")
    return size


@dataclass(frozen=True)
class LabelEnd:
    """How far labels extend: the first source frame after them, the coarsest stride among their rows, and the number of
    their first row."""

    frame: int
    stride: int
    first: int = 0

    @classmethod
    def of_tracks(cls, tracks: Sequence[LabelTrack]) -> LabelEnd | None:
        """The end of the longest of a video's annotations, as they are numbered; None if there are none."""
        if not tracks:
            return None
        end = max(track.end - int(track.frame_index[0] == 1) for track in tracks)
        return cls(end, max(track.stride for track in tracks), min(int(track.frame_index[0]) for track in tracks))


def infer_layout(scan: FolderScan, spec: DataSetSpec, data: DataConfig, labels: LabelEnd | None) -> FolderLayout:
    """What the numbers in a folder's image names count.

    Settings take precedence. Without them: the first number is the base; numbers more than one apart count
    source frames; consecutive numbers count source frames or samples, by the one usual rate (divisors of the source's,
    and whole seconds) at which the images last as long as the labels. Images may be missing. Raises UserError asking
    for the setting if this is ambiguous.
    """
    spacing = _spacing(scan)
    base = _base(scan, data)
    offset = int(scan.numbers[0]) - base
    if labels and labels.first == base > 1:  # rows, like images, are numbered across folders
        labels = replace(labels, frame=labels.frame - base)
    by_sample = data.frame_numbering == "sample" or (data.frame_numbering == "auto" and data.folder_fps is not None)
    if data.frame_numbering == "source" and data.folder_fps is not None:
        raise UserError(
            "data.folder_fps is the rate of images numbered by sample; it contradicts data.frame_numbering=source"
        )
    if by_sample and spacing > 1:
        raise UserError(
            f"{scan.path}: numbers are {spacing} apart ({scan.names[0]}, {scan.names[1]}), so they do not count "
            "samples; set data.frame_numbering=source"
        )
    if by_sample:
        step = _step_of_rate(data.folder_fps, spec) if data.folder_fps else _step_of_length(scan, offset, spec, labels)
        return _layout("sample", base, step, offset * step, spacing, scan)
    if data.frame_numbering == "auto" and spacing == 1:
        step = _step_of_length(scan, offset, spec, labels)
        if step == 1 and labels and labels.stride == 1:
            _require_no_samples(scan, spec, data)
        return _layout("source" if step == 1 else "sample", base, step, offset * step, spacing, scan)
    layout = _layout("source", base, spacing, offset, spacing, scan)
    if labels is None or _as_long(layout, labels, spec):
        return layout
    if data.row_fps == "auto":
        _refuse_common_rate(scan, layout, labels, spec)
    if data.frame_numbering == "auto":
        raise UserError(
            f"{scan.path}: images numbered up to {int(scan.numbers[-1])} in steps of {spacing} do not last as long as "
            f"labels up to frame {labels.frame - 1} at {spec.annotation_fps:g} fps; set data.frame_numbering=source if "
            "they do count source frames"
        )
    return layout


def _as_long(layout: FolderLayout, labels: LabelEnd, spec: DataSetSpec) -> bool:
    """Whether labels last as long as the images, numbered by source frames or, one apart, by images or seconds."""
    counted = [(layout.frame_count, 2 * max(layout.stride, labels.stride))]
    if labels.stride == 1:
        counted += [(layout.frame_count // layout.stride, 2), (round(layout.frame_count / spec.annotation_fps), 2)]
    return any(abs(length - labels.frame) <= slack for length, slack in counted)


def _refuse_common_rate(scan: FolderScan, layout: FolderLayout, labels: LabelEnd, spec: DataSetSpec) -> None:
    """Raise UserError if the images last as long as the labels at another common rate of videos.

    As long means within a second, or a row or an image and a half. That is evidence only if it is small against the
    difference that the rate makes.
    """
    frames, labelled_s = layout.frame_count, labels.frame / spec.annotation_fps
    rate = min(_SOURCE_FPS, key=lambda fps: abs(frames / fps - labelled_s))
    tolerance_s = max(1.0, 1.5 * layout.stride / rate, 1.5 * labels.stride / spec.annotation_fps)
    difference_s = abs(frames / spec.annotation_fps - frames / rate)
    if abs(frames / rate - labelled_s) <= tolerance_s and difference_s >= 10 * tolerance_s:
        raise UserError(
            f"{scan.path}: as source frames, images numbered up to {int(scan.numbers[-1])} last as long as the labels "
            f"at {rate:.4g} fps, not at {spec.annotation_fps:g} fps; set data.row_fps={spec.annotation_fps:g}, and "
            f"annotation_fps to {rate:.4g} in a copy of the description that data.dataset names if that is their rate"
        )


def _require_no_samples(scan: FolderScan, spec: DataSetSpec, data: DataConfig) -> None:
    """Raise UserError asking for the setting if sampling would use less than half of images that have one row each."""
    used = -(-len(scan.names) * data.fps // spec.annotation_fps)
    if 2 * used < len(scan.names):
        raise UserError(
            f"{_ask(scan)} (with a row for each, they can be either; as source frames at {spec.annotation_fps:g} fps, "
            f"data.fps={data.fps:g} would use {used:.0f} of {len(scan.names)})"
        )


def _layout(numbering: Numbering, base: int, stride: int, first: int, spacing: int, scan: FolderScan) -> FolderLayout:
    """The layout of images whose numbers are multiples of their spacing apart."""
    place = (scan.numbers - scan.numbers[0]) // spacing
    gaps = np.flatnonzero(np.diff(place) > 1)
    return FolderLayout(
        numbering=numbering,
        base=base,
        stride=stride,
        first=first,
        count=int(place[-1]) + 1,
        missing=tuple((int(place[gap]) + 1, int(place[gap + 1])) for gap in gaps),
    )


def _spacing(scan: FolderScan) -> int:
    """The usual distance between numbers; some may be missing. Raises UserError naming one that is out of step."""
    steps = np.diff(scan.numbers)
    if len(steps) == 0:
        return 1
    distances, counts = np.unique(steps, return_counts=True)
    spacing = int(distances[np.argmax(counts)])
    wrong = np.flatnonzero(steps % spacing)
    if len(wrong):
        at = int(wrong[0])
        raise UserError(
            f"{scan.path}: {scan.names[at + 1]} is out of step: it follows {scan.names[at]}, and numbers are {spacing} "
            "apart"
        )
    return spacing


def _base(scan: FolderScan, data: DataConfig) -> int:
    first = int(scan.numbers[0])
    if data.frame_base == "auto" and first not in (0, 1):
        raise UserError(
            f"{scan.path}: numbers start at {first} ({scan.names[0]}), neither 0 nor 1: restore the missing images, or "
            "set data.frame_base=0 or 1 where they are lost, data.frame_base=first where each folder begins at its own "
            "number"
        )
    base = data.frame_base if isinstance(data.frame_base, int) else first
    if first < base:
        raise UserError(f"{scan.path}: {scan.names[0]} is numbered below data.frame_base={base}")
    return base


def _step_of_rate(folder_fps: float, spec: DataSetSpec) -> int:
    """Source frames between samples taken at `folder_fps`."""
    ratio = spec.annotation_fps / folder_fps
    if not same_rate(round(ratio), ratio):
        raise UserError(f"data.folder_fps={folder_fps:g} does not divide the source's {spec.annotation_fps:g} fps")
    return round(ratio)


def _step_of_length(scan: FolderScan, offset: int, spec: DataSetSpec, labels: LabelEnd | None) -> int:
    """Source frames between consecutively numbered images, from the labels' length. Raises UserError if unclear."""
    if labels is None:
        raise UserError(f"{_ask(scan)} (there are no labels to infer it from)")
    positions = int(scan.numbers[-1] - scan.numbers[0]) + 1 + offset
    nominal = max(round(spec.annotation_fps), 1)
    steps = [step for step in range(1, nominal) if nominal % step == 0]
    steps += range(nominal, labels.frame + 2 * nominal, nominal)
    exact = [step for step in steps if -(-labels.frame // step) == positions]
    near = [step for step in steps if abs(positions * step - labels.frame) <= 2 * max(step, labels.stride)]
    for fitting in (exact, near):
        if len(fitting) == 1:
            return fitting[0]
    fits = "several rates fit" if exact or near else "no usual rate fits"
    raise UserError(f"{_ask(scan)} ({fits} labels of {labels.frame} frames)")


def _ask(scan: FolderScan) -> str:
    return (
        f"{scan.path}: names are numbered {int(scan.numbers[0])} to {int(scan.numbers[-1])}; source frames or samples? "
        "Set data.frame_numbering=source, or data.folder_fps to the images per second"
    )


def source_frames(scan: FolderScan, layout: FolderLayout) -> NDArray[np.int64]:
    """Source frame (N,) int64 of each image. Raises UserError if numbers and layout do not agree."""
    unit = layout.stride if layout.numbering == "sample" else 1
    indices = (scan.numbers - layout.base) * unit
    if not np.array_equal(indices, layout.frames()):
        raise UserError(f"{scan.path}: its images are not those in the index; run index again")
    return indices


def require_one_base(layouts: Sequence[tuple[str, FolderLayout]], data: DataConfig) -> None:
    """Raise UserError if folders start at different numbers: more likely a lost first image than two conventions."""
    first: dict[int, str] = {}
    for path, layout in layouts:
        first.setdefault(layout.base, path)
    if len(first) > 1 and data.frame_base == "auto":
        raise UserError(
            f"{first[1]}: images are numbered from 1, those of {first[0]} from 0; restore image 0, or set "
            "data.frame_base if both are right"
        )


def frame_folder(root: Path, relative: str, spec: DataSetSpec, layout: FolderLayout) -> dict[int, str]:
    """File names of an indexed folder's images by source frame. Raises UserError if they are not those indexed."""
    scan = scan_folder(root, relative, spec)
    indices = source_frames(scan, layout)
    return dict(zip(indices.tolist(), scan.names, strict=True))
