"""The data set behind a configuration: where it lies, its index on disk, and whether the two still agree."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.errors import UserError, listed, printable
from configs.load import load_dataset
from configs.schema import Config, DataSetSpec
from engine.files import LinkedRoot
from engine.progress import progress_bar, say
from features.dataset.discover import find_videos, is_chosen, natural_key
from features.dataset.index import (
    Index,
    Progress,
    VideoEntry,
    build_index,
    check_index,
    count_frames,
    coverage_table,
    index_summary,
    most_fps,
)
from features.dataset.labels import rate_of_rows
from features.dataset.phase_order import describe_order, parse_phase_order
from features.dataset.splits import assign_splits, split_is_asked_for
from features.video.times import same_rate

ROOT_VARIABLE = "SURGSTAGE_DATA"


def data_root(config: Config) -> Path:
    """The folder of the videos: `data.root`, else the variable SURGSTAGE_DATA. UserError where neither is set."""
    named = config.data.root or os.environ.get(ROOT_VARIABLE)
    if not named:
        raise UserError(
            f"no data root is set: add --set data.root=DIR, or set the variable {ROOT_VARIABLE}, DIR being the folder "
            "that holds the videos and their annotations"
        )
    root = Path(named)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; data.root must be the folder that holds the videos")
    return LinkedRoot(root) if config.data.follow_links else root


def known_root(config: Config) -> Path | None:
    """As `data_root`, None where there is none: for what can be said without videos."""
    try:
        return data_root(config)
    except UserError:
        return None


def index_dataset(config: Config, replace: bool = False) -> Index:
    """Find the data set, write `data.index` and print a summary.

    Videos that cannot be read are left out, and said. An existing index that says something else is only replaced when
    asked to. Raises UserError otherwise. One that was made from older index files stays as it is.
    """
    root, path = data_root(config), config.data.index
    if path.exists() and not replace and Index.load(path).made_from:
        index, _ = open_dataset(config)
        say(f"{path}: made from {index.made_from} and left as it is; --force makes one of what is found")
        print_summary(index, root, config.data.fps)
        return index
    with _shown("index") as progress:
        found = build_index(root, load_dataset(config.data.dataset), config.data, progress, leave_out=True)
    return keep_index(found, config, root, replace)


def keep_index(found: Index, config: Config, root: Path, replace: bool) -> Index:
    """Write what was found to `data.index` and print a summary. Raises UserError where another index stands there."""
    path = config.data.index
    if path.exists() and not replace:
        if _content(Index.load(path)) != _content(found):
            raise UserError(
                f"{path}: exists and differs from what is found now; --force replaces it, "
                "--set data.index=FILE writes another"
            )
        say(f"{path}: unchanged")
    else:
        found.save(path)
        say(f"{path}: written")
    say_left_out(found)
    for line in _passed_over_lines(found):
        say(line)
    for note in _grouped(found.notes):
        say(f"note: {note}")
    for line in _order_lines(found):
        say(line)
    print_summary(found, root, config.data.fps)
    return found


def say_left_out(index: Index) -> None:
    """A line for each video left out."""
    for video in index.left_out:
        say(f"left out: {video.id}: {video.reason}")


def _content(index: Index) -> dict[str, Any]:
    """What makes two indices differ: not the patterns by which files were found, nor how a note is worded."""
    value = index.to_json()
    del value["notes"], value["dataset"]["patterns"]
    for video in value.get("left_out", ()):
        video.pop("split", None)  # older ones have none
    return value


def _passed_over_lines(index: Index) -> list[str]:
    """What was passed over, up to ten names for each reason."""
    paths: dict[str, list[str]] = {}
    for one in index.passed_over:
        paths.setdefault(one.reason, []).append(one.id)
    return [f"passed over: {listed(found, 10)}: {reason}" for reason, found in paths.items()]


@contextmanager
def _shown(description: str) -> Iterator[Progress]:
    """A bar over videos that only appears where the work takes long, as it does where files are read whole."""
    with progress_bar(None, description, "video", delay=3.0) as bar:

        def show(done: int, total: int, video_id: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _order_lines(index: Index) -> list[str]:
    """What the phase numbers in TFRecord files were taken to mean, for the user to see."""
    orders = [entry.records.phase_order for entry in index.videos if entry.records]
    return [
        f"phases in {orders.count(order)} TFRecord file(s) numbered {describe_order(order)} (data.tfrecord_phase_order)"
        for order in dict.fromkeys(orders)
    ]


def _require_same_exclusions(config: Config, index: Index) -> None:
    """Raise UserError where `data.exclude` names other videos, or gives other reasons, than the index was made with."""
    wanted = index.exclusions(config.data.exclude)
    there = {one.id: one.reason for one in (*index.left_out, *index.passed_over) if one.excluded}
    if wanted != there:
        changed = sorted(dict(wanted.items() ^ there.items()), key=natural_key)
        raise UserError(
            f"{config.data.index}: data.exclude says something else of {changed[0]} than the index was made with; "
            "run `index --force`, or choose another data.index"
        )


def _require_same_order(config: Config, index: Index) -> None:
    """Raise UserError where the settings name another order of phases than TFRecord files were indexed with."""
    given = config.data.tfrecord_phase_order
    indexed = {entry.records.phase_order for entry in index.videos if entry.records}
    if given and indexed and indexed != {parse_phase_order(given, index.dataset, "data.tfrecord_phase_order")}:
        raise UserError(
            f"{config.data.index}: {'; '.join(_order_lines(index))}, and {given} says otherwise; run `index --force`, "
            "or choose another data.index"
        )


def _require_same_numbers(config: Config, index: Index) -> None:
    """Raise UserError where the settings say that rows or images count something else than they were indexed as."""
    data = config.data
    for entry in index.videos:
        layout = entry.frames
        wrong = layout is not None and (
            (data.frame_numbering not in ("auto", layout.numbering))
            or (layout.first > 0 if data.frame_base == "first" else data.frame_base not in ("auto", layout.base))
            or (data.folder_fps is not None and not same_rate(entry.most_fps, data.folder_fps))
        )
        for file in filter(None, (entry.phase_file, entry.tool_file)):
            as_said = data.row_fps == "auto" or file.row_fps in (data.row_fps, rate_of_rows(data.row_fps, entry.fps))
            wrong = wrong or not as_said or data.row_base not in ("auto", file.row_base)
        if wrong:
            raise UserError(
                f"{data.index}: rows or images of {entry.id} were indexed as counting something else than data.row_fps,"
                " data.row_base, data.frame_numbering, data.frame_base or data.folder_fps says; run `index --force`, "
                "or choose another data.index"
            )


def _grouped(notes: Sequence[str]) -> list[str]:
    """Notes that say the same of many files, as one line each; all of them stand in the index."""
    files: dict[str, list[str]] = {}
    for note in notes:
        name, _, text = note.rpartition(": ") if note.count(": ") == 1 else ("", "", note)
        files.setdefault(text, []).append(name)
    return [_of_files(names, text) for text, names in files.items()]


def _of_files(names: Sequence[str], text: str) -> str:
    if names == [""]:
        return text
    return f"{names[0]}{f' and {len(names) - 1} more files' if len(names) > 1 else ''}: {text}"


_ABOUT = {"title", "source", "patterns"}  # what an index does not depend on, once its files are found


def _finds_more(index: Index, root: Path, spec: DataSetSpec, config: Config) -> bool:
    """Whether the present patterns find a file that is not the index's, as those of an older release did not."""
    try:
        found = find_videos(root, spec, config.data, leave_out=True).videos
    except UserError:
        return True
    known = {entry.id: entry for entry in index.videos}
    known_files = {path for entry in index.videos for path in _files_of(entry)}
    left_out = {video.id for video in index.left_out}
    return any(
        video.id not in left_out
        and not ({video.source, video.phase, video.tool} - {None} <= known_files and video.id in known)
        for video in found
    )


def _files_of(entry: VideoEntry) -> list[str]:
    return [entry.source, *(file.path for file in (entry.phase_file, entry.tool_file) if file)]


def open_dataset(config: Config) -> tuple[Index, Path]:
    """The index (made first where there is none) and the data root.

    Raises UserError when the index belongs to another data set, or holds another split than the settings ask for.
    """
    root, path = data_root(config), config.data.index
    if not path.exists():
        say(f"{path}: not there yet, indexing {root}")
        return index_dataset(config), root
    index = Index.load(path)
    spec = load_dataset(config.data.dataset)
    if index.dataset.model_dump(exclude=_ABOUT) != spec.model_dump(exclude=_ABOUT) or (
        index.dataset.patterns != spec.patterns and _finds_more(index, root, spec, config)
    ):
        raise UserError(
            f"{path}: made for data set {index.dataset.name}, the settings say {spec.name} (or its description has "
            "changed); run `index --force`, or choose another data.index"
        )
    if other := next((entry for entry in index.videos if not is_chosen(entry.kind, entry.source, config.data)), None):
        raise UserError(
            f"{path}: holds {other.source}, which data.sources={config.data.sources} does not take; run "
            "`index --force`, or choose another data.index"
        )
    _require_same_numbers(config, index)
    if index.made_from and not split_is_asked_for(config.data.split):
        _require_same_exclusions(config, index)
        return index, root
    wanted = assign_splits(index.found_ids(), spec, config.data.split)
    moved = [video.id for video in index.videos if wanted[video.id] != video.split]
    if moved:
        raise UserError(
            f"{path}: {moved[0]} is in another split than data.split says; run `index --force`, "
            "or choose another data.index"
        )
    _require_same_exclusions(config, index)
    _require_same_order(config, index)
    return index, root


def check_dataset(config: Config) -> list[str]:
    """Everything about the existing index that no decoding is needed for; a line a problem."""
    if not config.data.index.exists():
        raise UserError(f"{config.data.index}: no such index; run `index` first")
    with _shown("check") as progress:
        return check_index(Index.load(config.data.index), data_root(config), progress)


def print_summary(index: Index, root: Path, fps: float) -> None:
    """How much of each video is used and labelled; then videos, hours and sampled frames per split and class."""
    held = most_fps(index)
    if fps > held:
        say(f"note: sampled at {held:g} fps below, the most these videos hold; set data.fps={held:g} before training")
    fps = min(fps, held)
    counts = count_frames(index, root, fps)
    for rows, box in ((coverage_table(index, counts), None), (index_summary(index, counts), HEAVY_HEAD)):
        title = printable(f"{index.dataset.title or index.dataset.name}, sampled at {fps:g} fps")
        table = Table(title=Text(title, style="italic"), title_justify="left", box=box)
        for number, name in enumerate(rows[0]):
            table.add_column(Text(str(name)), justify="right" if number else "left")
        for row in rows[1:]:
            table.add_row(*(Text(str(cell)) for cell in row))  # names are no markup
        Console().print(table)
