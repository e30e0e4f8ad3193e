"""Read folders of frames: list their images, and infer what the numbers in the images' names count."""

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
from features.dataset.discover import checked_path, sorted_entries
from features.dataset.layouts import FolderLayout, Numbering
from features.video.times import same_rate

_SOURCE_FPS = (24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60000 / 1001, 60.0)


@dataclass(frozen=True, eq=False)
class FolderScan:
    """The N images of a folder in the order of their numbers: `numbers` (N,) int64, names and sizes.

    `modified_ns` is the time of the newest change.
    """

    path: Path
    numbers: NDArray[np.int64]
    names: tuple[str, ...]
    sizes_bytes: tuple[int, ...]
    modified_ns: int

    def identity(self) -> str:
        """Return the SHA-256 of all names and sizes, and of the content of the first and the last image."""
        ends = [sha256_file(self.path / name) for name in (self.names[0], self.names[-1])]
        return sha256(json.dumps([self.names, self.sizes_bytes, ends]).encode()).hexdigest()

    def content(self) -> str:
        """Return the SHA-256 of the names and the whole content of all images."""
        return sha256(json.dumps([(name, sha256_file(self.path / name)) for name in self.names]).encode()).hexdigest()


def scan_folder(root: Path, relative: str, spec: DataSetSpec) -> FolderScan:
    """List the images of the frame folder `relative`.

    Raises UserError if the folder has no images, an image is empty, or two images have the same number.
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
    """Return the images named in a list, in the same form as `scan_folder`; `where` is used in messages only.

    Raises UserError if a name is not that of an image, or if the numbers do not increase.
    """
    pattern = spec.patterns.compiled("frame")
    numbers = []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            raise UserError(f"{where}: {name[:60]!r} is not named like an image of data set {spec.name}")
        numbers.append(_image_number(match, spec))
        if len(numbers) > 1 and numbers[-1] <= numbers[-2]:
            raise UserError(
                f"{where}: {name} comes after {names[len(numbers) - 2]}, so they are not in the order of time"
            )
    return FolderScan(where, np.array(numbers, dtype=np.int64), tuple(names), (1,) * len(names), 0)


def _image_number(match: re.Match[str], spec: DataSetSpec) -> int:
    text = match.group("frame") or ""
    if not (text.isdecimal() and len(text) <= 15):
        raise UserError(f"{match.string}: {text!r} is not a frame number; see patterns.frame of data set {spec.name}")
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
    """How far a video's labels extend.

    `frame` is the first source frame after the last row, `stride` the largest stride among the annotation files, and
    `first` the number of the first row. With `is_least`, labels need not reach the end of the video: a start does not
    tell how long its label lasts, and there may be nothing to label after the last interval.
    """

    frame: int
    stride: int
    first: int = 0
    is_least: bool = False

    @classmethod
    def longest(cls, ends: Sequence[LabelEnd]) -> LabelEnd | None:
        """Return the end of all of a video's labels; None if there are none."""
        ends = [one for one in ends if not one.is_least] or ends
        if not ends:
            return None
        frame, stride = max(one.frame for one in ends), max(one.stride for one in ends)
        return cls(frame, stride, min(one.first for one in ends), ends[0].is_least)


def infer_layout(scan: FolderScan, spec: DataSetSpec, data: DataConfig, labels: LabelEnd | None) -> FolderLayout:
    """Infer what the numbers in a folder's image names count. Images may be missing.

    Settings take precedence. Otherwise, the first number is the base. Numbers that are more than one apart count source
    frames. Consecutive numbers count source frames or samples: of the usual rates (divisors of the source's rate, and
    whole numbers of seconds), the one is chosen at which the images last as long as the labels. Raises UserError asking
    for a setting if this is ambiguous.
    """
    spacing = _spacing(scan)
    base = _base(scan, data)
    offset = int(scan.numbers[0]) - base
    if labels and labels.first == base > 1:  # rows and images are numbered continuously over several folders
        labels = replace(labels, frame=labels.frame - base)
    by_sample = data.frame_numbering == "sample" or (data.frame_numbering == "auto" and data.folder_fps is not None)
    if data.frame_numbering == "source" and data.folder_fps is not None:
        raise UserError(
            "data.folder_fps is the rate of images numbered by sample; it contradicts data.frame_numbering=source"
        )
    if by_sample and spacing > 1:
        raise UserError(
            f"{scan.path}: numbers are {spacing} apart ({scan.names[0]}, {scan.names[1]}), so they cannot count "
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
    if data.row_fps == "auto" and not labels.is_least:
        _refuse_common_rate(scan, layout, labels, spec)
    if data.frame_numbering == "auto":
        raise UserError(
            f"{scan.path}: the images (numbers up to {int(scan.numbers[-1])} in steps of {spacing}) do not last as "
            f"long as the labels (up to frame {labels.frame - 1} at {spec.annotation_fps:g} fps); set "
            "data.frame_numbering=source if the numbers do count source frames"
        )
    return layout


def _as_long(layout: FolderLayout, labels: LabelEnd, spec: DataSetSpec) -> bool:
    """Whether labels last as long as the images.

    The labels' rows may count source frames or, if their numbers are one apart, images or seconds.
    """
    slack = 2 * max(layout.stride, labels.stride)
    if labels.is_least:
        return labels.frame <= layout.frame_count + slack
    counted = [(layout.frame_count, slack)]
    if labels.stride == 1:
        counted += [(layout.frame_count // layout.stride, 2), (round(layout.frame_count / spec.annotation_fps), 2)]
    return any(abs(length - labels.frame) <= slack for length, slack in counted)


def _refuse_common_rate(scan: FolderScan, layout: FolderLayout, labels: LabelEnd, spec: DataSetSpec) -> None:
    """Raise UserError if the images would last as long as the labels at another common frame rate.

    "As long" means a difference of at most a second, or of 1.5 rows or images. This is taken as evidence only if the
    change of rate makes a difference at least ten times as large.
    """
    frames, labelled_s = layout.frame_count, labels.frame / spec.annotation_fps
    rate = min(_SOURCE_FPS, key=lambda fps: abs(frames / fps - labelled_s))
    tolerance_s = max(1.0, 1.5 * layout.stride / rate, 1.5 * labels.stride / spec.annotation_fps)
    difference_s = abs(frames / spec.annotation_fps - frames / rate)
    if abs(frames / rate - labelled_s) <= tolerance_s and difference_s >= 10 * tolerance_s:
        raise UserError(
            f"{scan.path}: as source frames, images numbered up to {int(scan.numbers[-1])} last as long as the labels "
            f"at {rate:.4g} fps, not at {spec.annotation_fps:g} fps; set data.row_fps={spec.annotation_fps:g}; if "
            f"{rate:.4g} fps is right, also set annotation_fps to it in a copy of the description of {spec.name} that "
            "data.dataset names"
        )


def _require_no_samples(scan: FolderScan, spec: DataSetSpec, data: DataConfig) -> None:
    """Raise UserError asking for a setting if sampling would use less than half of the images, which all have a row."""
    used = -(-len(scan.names) * data.fps // spec.annotation_fps)
    if 2 * used < len(scan.names):
        raise UserError(
            f"{_ask(scan)} (with one row per image, both are possible; if they are source frames at "
            f"{spec.annotation_fps:g} fps, data.fps={data.fps:g} uses only {used:.0f} of {len(scan.names)})"
        )


def _layout(numbering: Numbering, base: int, stride: int, first: int, spacing: int, scan: FolderScan) -> FolderLayout:
    """Return the layout of images whose numbers are a `spacing`, or a multiple of it, apart."""
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
    """Return the usual distance between numbers, of which some may be missing.

    Raises UserError naming an image whose number does not fit this distance.
    """
    steps = np.diff(scan.numbers)
    if len(steps) == 0:
        return 1
    distances, counts = np.unique(steps, return_counts=True)
    spacing = int(distances[np.argmax(counts)])
    wrong = np.flatnonzero(steps % spacing)
    if len(wrong):
        at = int(wrong[0])
        raise UserError(
            f"{scan.path}: {scan.names[at + 1]} follows {scan.names[at]}, but numbers should be {spacing} apart"
        )
    return spacing


def _base(scan: FolderScan, data: DataConfig) -> int:
    first = int(scan.numbers[0])
    if data.frame_base == "auto" and first not in (0, 1):
        raise UserError(
            f"{scan.path}: numbers start at {first} ({scan.names[0]}), not at 0 or 1: restore the missing images; or "
            "set data.frame_base=0 or 1 if they are lost, or data.frame_base=first if each folder has its own first "
            "number"
        )
    base = data.frame_base if isinstance(data.frame_base, int) else first
    if first < base:
        raise UserError(f"{scan.path}: {scan.names[0]} is numbered below data.frame_base={base}")
    return base


def _step_of_rate(folder_fps: float, spec: DataSetSpec) -> int:
    """Return the number of source frames from one sample to the next, for samples at `folder_fps`."""
    ratio = spec.annotation_fps / folder_fps
    if not same_rate(round(ratio), ratio):
        every = sorted({max(int(ratio), 1), int(ratio) + 1})
        possible = ", ".join(f"{spec.annotation_fps / step:.6g} (one image per {step} frames)" for step in every)
        raise UserError(
            f"data.folder_fps={folder_fps:g} does not divide the source's {spec.annotation_fps:g} fps; the nearest "
            f"that do are {possible}: extract images so, or index the videos"
        )
    return round(ratio)


def _step_of_length(scan: FolderScan, offset: int, spec: DataSetSpec, labels: LabelEnd | None) -> int:
    """Infer from the labels' length how many source frames lie between two consecutively numbered images.

    Raises UserError if that is ambiguous.
    """
    if labels is None:
        raise UserError(f"{_ask(scan)} (there are no labels from which to infer this)")
    if labels.is_least:
        raise UserError(f"{_ask(scan)} (starts and intervals of labels do not tell how long the video is)")
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
    raise UserError(f"{_ask(scan)} ({fits} the labels' length of {labels.frame} frames)")


def _ask(scan: FolderScan) -> str:
    return (
        f"{scan.path}: do numbers {int(scan.numbers[0])} to {int(scan.numbers[-1])} count source frames or samples? "
        "Set data.frame_numbering=source, or data.folder_fps to the samples per second"
    )


def source_frames(scan: FolderScan, layout: FolderLayout) -> NDArray[np.int64]:
    """Return the source frame (N,) int64 of each image. Raises UserError if the numbers do not fit the layout."""
    unit = layout.stride if layout.numbering == "sample" else 1
    indices = (scan.numbers - layout.base) * unit
    if not np.array_equal(indices, layout.frames()):
        raise UserError(f"{scan.path}: contains other images than were indexed; run index again")
    return indices


def require_one_base(layouts: Sequence[tuple[str, FolderLayout]], data: DataConfig) -> None:
    """Raise UserError if some folders start at 0 and others at 1: a lost image is more likely than two conventions."""
    first: dict[int, str] = {}
    for path, layout in layouts:
        first.setdefault(layout.base, path)
    if len(first) > 1 and data.frame_base == "auto":
        raise UserError(
            f"{first[1]}: images are numbered from 1, but those of {first[0]} from 0; restore image 0, or set "
            "data.frame_base if both are right"
        )


def require_one_rate(layouts: Sequence[tuple[str, FolderLayout]], spec: DataSetSpec, data: DataConfig) -> None:
    """Raise UserError if folders are sampled at several rates by labels that number their videos' own frames.

    Such labels last twice as long if a video has twice the frames per second, as some of HeiChole's have, and so do
    not tell the rate of its images.
    """
    first: dict[int, str] = {}
    for path, layout in layouts:
        if layout.numbering == "sample" and data.folder_fps is None:
            first.setdefault(layout.stride, path)
    if len(first) > 1 and any(source.unit in ("auto", "source") for source in spec.labels.values()):
        (step, one), (other_step, other), *_ = first.items()
        raise UserError(
            f"{other}: by its labels, which count the video's own frames, there is one image per {other_step} frames, "
            f"but in {one} one per {step}; if the videos have different rates, index the videos instead; if all have "
            f"{spec.annotation_fps:g} fps, set data.folder_fps"
        )


def frame_folder(root: Path, relative: str, spec: DataSetSpec, layout: FolderLayout) -> dict[int, str]:
    """Return the file names of an indexed folder's images, by source frame.

    Raises UserError if they are not the images that were indexed.
    """
    scan = scan_folder(root, relative, spec)
    indices = source_frames(scan, layout)
    return dict(zip(indices.tolist(), scan.names, strict=True))
