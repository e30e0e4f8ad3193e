"""Open, make and check the index that a configuration names, and print what it contains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, listed, printable
from configs.load import load_dataset
from configs.schema import Config, DataConfig
from engine.files import LinkedRoot
from engine.progress import say
from features.dataset.build import build_index
from features.dataset.check import check_index
from features.dataset.discover import find_videos, is_chosen
from features.dataset.index import Dataset, Index, VideoEntry, exclusions
from features.dataset.phase_order import describe_order, parse_phase_order
from features.dataset.row_numbers import rate_of_rows
from features.dataset.sampling import most_fps
from features.dataset.splits import assign_splits, rule_asked_for, with_lists
from features.dataset.summary import count_frames, coverage_table, index_summary
from features.ids import natural_key
from features.video.times import same_rate

ROOT_VARIABLE = "SURGSTAGE_DATA"
# Fields of a description that do not matter once the files are found.
_ABOUT = {"title", "source", "patterns", "unverified"}


# ---------------------------------------------------------------------------------------------- using


def data_root(config: Config) -> Path:
    """Return the folder of the videos: `data.root`, or else the environment variable SURGSTAGE_DATA.

    Raises UserError if neither is set or there is no such folder.
    """
    named = config.data.root or os.environ.get(ROOT_VARIABLE)
    if not named:
        raise UserError(
            f"no data root is set: add --set data.root=DIR (or set the variable {ROOT_VARIABLE}), where DIR is the "
            "folder with the videos and their annotations"
        )
    root = Path(named)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; data.root must be the folder that contains the videos")
    return LinkedRoot(root) if config.data.follow_links else root


def known_root(config: Config) -> Path | None:
    """Return `data_root`, or None if there is none, for commands that can run without videos."""
    try:
        return data_root(config)
    except UserError:
        return None


def open_dataset(config: Config) -> Dataset:
    """The data set of these settings. If there is no index yet, it is made.

    Raises UserError if the index was made for another data set, or with other sources, row numbers, splits or
    exclusions than the settings ask for.
    """
    root, path = data_root(config), config.data.index
    if not path.exists():
        say(f"{path}: does not exist yet; indexing {root}")
        return Dataset(index_dataset(config), root)
    dataset = Dataset(Index.load(path), root)
    if problem := _disagreement(config, dataset):
        raise UserError(f"{path}: {problem}; run `index --force`, or choose another data.index")
    return dataset


def _disagreement(config: Config, dataset: Dataset) -> str | None:
    """Return the first difference between an index and the settings, or None."""
    data, spec, index, indexed = config.data, load_dataset(config.data.dataset), dataset.index, dataset.spec
    if indexed.model_dump(exclude=_ABOUT) != spec.model_dump(exclude=_ABOUT) or (
        indexed.patterns != spec.patterns and _finds_more(config, dataset, spec)
    ):
        return f"made for data set {indexed.name}, but the settings name {spec.name} (or its description has changed)"
    for entry in index.videos:
        if other := [one.source for one in entry.sources if not is_chosen(entry.kind, one.source, data)]:
            return f"contains {other[0]}, which data.sources={data.sources} does not select"
        if _is_numbered_differently(entry, data):
            return (
                f"the numbers of {entry.id}'s rows or images were read in another way than data.row_fps, "
                "data.row_base, data.frame_numbering, data.frame_base and data.folder_fps say"
            )
    keeps_splits = index.made_from and rule_asked_for(data.split) is None  # those of older index files
    if not keeps_splits:
        spec = with_lists(spec, index.published)
        if (rule := rule_asked_for(data.split)) in spec.splits and spec.splits[rule].needs_copy:
            return f"made without the lists of split {rule}, which are read from the copy of {spec.name}"
        wanted = assign_splits(index.found_ids(), spec, data.split)
        for video in index.videos:
            if wanted[video.id] != video.split:
                return f"{video.id} is in another split than data.split says"
    asked = exclusions(index.found_ids(), data.exclude, [one.id for one in index.passed_over])
    made = {one.id: one.reason for one in (*index.left_out, *index.passed_over) if one.excluded}
    if asked != made:
        changed = min(dict(asked.items() ^ made.items()), key=natural_key)
        return f"data.exclude now treats {changed} differently from when the index was made"
    given, orders = data.tfrecord_phase_order, set(_phase_orders(index))
    if orders and given and not keeps_splits:
        order = parse_phase_order(given, spec, "data.tfrecord_phase_order")
        return f"{'; '.join(_order_lines(index))}, but the settings give {given}" if orders != {order} else None
    return None


def _is_numbered_differently(entry: VideoEntry, data: DataConfig) -> bool:
    """Whether the settings say that rows or images are numbered in another way than this entry records."""
    layout = entry.frames
    if layout is not None and (
        (data.frame_numbering not in ("auto", layout.numbering))
        or (layout.first > 0 if data.frame_base == "first" else data.frame_base not in ("auto", layout.base))
        or (data.folder_fps is not None and not same_rate(entry.most_fps, data.folder_fps))
    ):
        return True
    return any(
        (data.row_fps != "auto" and file.row_fps not in (data.row_fps, rate_of_rows(data.row_fps, one.fps)))
        or data.row_base not in ("auto", file.row_base)
        for one in entry.annotated
        for file in one.annotation_files
    )


def _finds_more(config: Config, dataset: Dataset, spec: DataSetSpec) -> bool:
    """Whether the current patterns find a file that the patterns of an older release did not find."""
    try:
        found = find_videos(dataset.root, spec, config.data, leave_out=True).videos
    except UserError:
        return True
    index = dataset.index
    files = {path for entry in index.videos for path in entry.paths}
    known, left_out = {entry.id for entry in index.videos}, {video.id for video in index.left_out}
    return any(video.id not in left_out and not (video.paths <= files and video.id in known) for video in found)


def check_dataset(config: Config) -> list[str]:
    """Check the existing index without decoding (see `check_index`), and return one line per problem.

    Raises UserError if there is no index.
    """
    if not config.data.index.exists():
        raise UserError(f"{config.data.index}: no such index; run `index` first")
    return check_index(Dataset(Index.load(config.data.index), data_root(config)))


# ---------------------------------------------------------------------------------------------- making


def index_dataset(config: Config, replace: bool = False) -> Index:
    """Index the data set, write `data.index` and print a summary.

    Videos that cannot be read are left out and reported. Without `replace`, an existing index that was made from older
    index files is kept, and any other existing index that differs from what is found now raises UserError.
    """
    root, path = data_root(config), config.data.index
    if path.exists() and not replace and Index.load(path).made_from:
        dataset = open_dataset(config)
        say(f"{path}: made from {dataset.index.made_from}, and kept as it is; --force indexes the files instead")
        print_summary(dataset, config.data.fps)
        return dataset.index
    found = build_index(root, load_dataset(config.data.dataset), config.data, leave_out=True)
    return keep_index(config, Dataset(found, root), replace)


def keep_index(config: Config, dataset: Dataset, replace: bool) -> Index:
    """Write the index of `found` to `data.index`, and print a summary.

    Raises UserError if the file is a different index, without `replace`.
    """
    path, found = config.data.index, dataset.index
    if path.exists() and not replace:
        if _content(Index.load(path)) != _content(found):
            raise UserError(
                f"{path}: exists and differs from what is found now; replace it with --force, or write another file "
                "with --set data.index=FILE"
            )
        say(f"{path}: unchanged")
    else:
        found.save(path)
        say(f"{path}: written")
    say_left_out(found)
    passed_over = passed_over_lines([(one.id, one.reason) for one in found.passed_over])
    for line in (*passed_over, *note_lines(found.notes), *_order_lines(found)):
        say(line)
    print_summary(dataset, config.data.fps)
    return found


def _content(index: Index) -> dict[str, Any]:
    """Return the part of an index by which two are compared: not patterns, notes and what is said to be unverified."""
    value = index.to_json()
    del value["notes"], value["dataset"]["patterns"]
    value["dataset"].pop("unverified", None)
    for video in value.get("left_out", ()):
        video.pop("split", None)  # older indices do not record it
    return value


# ---------------------------------------------------------------------------------------------- printing


def say_left_out(index: Index) -> None:
    """Print one line for each video that was left out."""
    for video in index.left_out:
        say(f"left out: {video.id}: {video.reason}")


def passed_over_lines(passed_over: Sequence[tuple[str, str]]) -> list[str]:
    """Return one line for each reason why files and folders were passed over, with up to ten names.

    `passed_over` has pairs of path and reason.
    """
    paths: dict[str, list[str]] = {}
    for path, reason in passed_over:
        paths.setdefault(reason, []).append(path)
    return [f"passed over: {listed(found, 10)}: {reason}" for reason, found in paths.items()]


def note_lines(notes: Sequence[str]) -> list[str]:
    """Return lines for the user in which notes that differ only in the file's name are merged."""
    files: dict[str, list[str]] = {}
    for note in notes:
        name, _, text = note.rpartition(": ") if note.count(": ") == 1 else ("", "", note)
        files.setdefault(text, []).append(name)
    lines = []
    for text, (name, *others) in files.items():
        more = f" and {len(others)} more files" if others else ""
        lines.append(f"note: {name}{more}: {text}" if name else f"note: {text}")
    return lines


def _phase_orders(index: Index) -> list[tuple[str, ...]]:
    """Return the phase order recorded for each TFRecord file."""
    return [entry.records.phase_order for entry in index.videos if entry.records]


def _order_lines(index: Index) -> list[str]:
    """Return lines with the phase orders of TFRecord files, for the user to check."""
    orders = _phase_orders(index)
    return [
        f"phase numbers in {orders.count(order)} TFRecord file(s): {describe_order(order)} (data.tfrecord_phase_order)"
        for order in dict.fromkeys(orders)
    ]


def print_summary(dataset: Dataset, fps: float) -> None:
    """Print how much of each video is used and labelled, then videos, hours and sampled frames per split and class."""
    index = dataset.index
    held = most_fps(index)
    if fps > held:
        say(f"note: the videos have at most {held:g} fps, used in the tables below; set data.fps={held:g} to train")
    fps = min(fps, held)
    counts = count_frames(dataset, fps)
    for rows, box in ((coverage_table(index, counts), None), (index_summary(index, counts), HEAVY_HEAD)):
        title = printable(f"{index.dataset.title or index.dataset.name}, sampled at {fps:g} fps")
        table = Table(title=Text(title, style="italic"), title_justify="left", box=box)
        for number, name in enumerate(rows[0]):
            table.add_column(Text(str(name)), justify="right" if number else "left")
        for row in rows[1:]:
            table.add_row(*(Text(str(cell)) for cell in row))  # Text prevents names from being read as markup
        Console().print(table)
