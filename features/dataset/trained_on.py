"""Which videos weights were trained on, and the refusal to test them on other copies of the same operations.

Every training writes `trained_on.json` beside its weights, and `extract` beside the features of a trained encoder. It
names the training and validation videos of the training itself, and those of all trainings whose weights it started
from or whose features it used. Wherever weights meet the videos of a data set, `require_separate` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from engine.files import read_json_object, write_json
from engine.progress import say
from engine.records import Record
from engine.runs import IDENTITY_FILE, RESULT_FILE
from features.dataset.index import Index, VideoEntry
from features.dataset.overlaps import possible_overlap, shared_operations
from features.ids import id_key

TRAINED_ON = "trained_on.json"


@dataclass(frozen=True)
class TrainedOn(Record):
    """The videos of one data set on which weights were trained, or which chose the best epoch.

    `videos` has the hash of each video's ends (`VideoEntry.sha256_ends`) by its id.
    """

    dataset: str
    videos: Mapping[str, str]


def trained_on(folder: Path) -> list[TrainedOn]:
    """Return what the weights (or the encoder of the features) in `folder` were trained on; nothing if unknown.

    Raises UserError if the record is damaged.
    """
    path = folder / TRAINED_ON
    if not path.is_file():
        return _of_older_run(folder)
    try:
        return [TrainedOn.from_json(one) for one in read_json_object(path)["data"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged; delete it, and the folder's training videos count as unknown") from error


def _of_older_run(folder: Path) -> list[TrainedOn]:
    """Return the training videos in the identity of stage two, which recorded them before there was a file for them."""
    path = folder / IDENTITY_FILE
    found: dict[str, Any] = read_json_object(path) if path.is_file() else {}
    name, split = found.get("dataset"), found.get("split")
    if not (isinstance(name, str) and isinstance(split, dict)):
        return []
    return [TrainedOn(name, {str(one): "" for part in ("train", "val") for one in split.get(part, ())})]


def record_training(folder: Path, inherited: Sequence[TrainedOn], index: Index | None) -> None:
    """Write what the weights in `folder` are trained on: the training and validation videos of `index`, and
    `inherited`."""
    own = []
    if index is not None:
        used = (*index.by_split("train"), *index.by_split("val"))
        own.append(TrainedOn(index.dataset.name, {entry.id: entry.sha256_ends for entry in used}))
    kept = list({repr(one): one for one in (*own, *inherited)}.values())
    write_json(folder / TRAINED_ON, {"data": [one.to_json() for one in kept]})


def inherited_from(folders: Iterable[Path], index: Index, allow: bool) -> list[TrainedOn]:
    """Return what the weights and features in `folders` were trained on.

    Raises UserError as `require_separate` does if test videos of `index` are among them.
    """
    found = []
    for folder in dict.fromkeys(folders):
        inherited, own = trained_on(folder), is_own_index(folder, index)
        require_separate(inherited, index.dataset.name, _hashes(index.by_split("test")), str(folder), allow, own=own)
        found += inherited
    return found


def is_own_index(folder: Path, index: Index) -> bool:
    """Whether the weights in `folder` were trained with this index: with its training and validation videos, no others.

    Videos that the training or, by now, the index leaves out do not count. It counts as own if the training's videos
    are not known.
    """
    own = next(iter(trained_on(folder)), None)  # `record_training` puts the training itself first
    if own is None:
        return True
    used = _hashes((*index.by_split("train"), *index.by_split("val")))
    missing = own.videos.keys() - used.keys() - {video.id for video in index.left_out}
    result = folder / RESULT_FILE
    unused = {one["id"] for one in read_json_object(result).get("left_out", ())} if result.is_file() else set()
    same = all(own.videos.get(one) in ("", source) for one, source in used.items() if one not in unused)
    return own.dataset == index.dataset.name and same and not missing


def require_separate_split(folder: Path, index: Index, split: str, allow: bool, *, own: bool) -> bool:
    """Raise UserError as `require_separate` does if the weights in `folder` are tested on a split of an index.

    Returns whether they are, which is allowed then. In the run's `own` index (`is_own_index`), a user may ask for
    training videos, so only the videos of the test split count.
    """
    chosen = index.videos if split == "all" else index.by_split(split)
    tested = [entry for entry in chosen if not own or entry.split == "test"]
    trained, dataset = trained_on(folder), index.dataset.name
    if not (trained or own):
        say(f"note: {folder}: does not record its training videos, so videos of {dataset} may be among them")
    return require_separate(trained, dataset, _hashes(tested), str(folder), allow, own=own)


def _hashes(entries: Iterable[VideoEntry]) -> dict[str, str]:
    return {entry.id: entry.sha256_ends for entry in entries}


def require_separate(
    trained: Sequence[TrainedOn],
    dataset: str,
    tested: Mapping[str, str],
    where: str,
    allow: bool,
    *,
    own: bool = False,
) -> bool:
    """Raise UserError if one of the `tested` videos of `dataset` is an operation that is among `trained`.

    `tested` has the hash of each video's ends by its id. Returns whether there is such an operation, which is allowed.
    Operations of two data sets are the same if the list of overlaps says so or if the recordings have equal hashes.
    Within one data set, they are if id or hash are equal: another index may use a training video for testing, and
    another copy has other bytes. With `allow`, that is a note, and so are data sets of which operations may be shared.
    With `own`, the videos are those of the run's own index, whose data set is not compared with itself. `where` names
    the weights in messages.
    """
    found = False
    for one in trained:
        pairs = [] if own and one.dataset == dataset else _same_operations(one, dataset, tested)
        if pairs:
            (theirs, ours), more = pairs[0], len(pairs) - 1
            others = f" (and {more} more operation{'s' * (more != 1)})" if more else ""
            known = one.dataset == dataset and theirs == ours
            same = "" if known else f", which is the same operation as {ours} of {dataset}"
            problem = f"trained on {theirs} of {one.dataset}{same}{others}"
            if not allow:
                raise UserError(
                    f"{where}: {problem}; test on other videos (data.split, data.exclude), or set "
                    "data.allow_overlap=true to accept results that are too good"
                )
            found = True
            say(f"note: {where}: {problem}, so results on {dataset} are too good")
        elif one.dataset != dataset and (reason := possible_overlap(one.dataset, dataset)):
            say(f"note: {where}: trained on {one.dataset}; operations of {dataset} may be among its videos: {reason}")
    return found


def _same_operations(trained: TrainedOn, dataset: str, tested: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the tested videos that are a training video's operation, each as a pair of the training video and it."""
    by_hash = {source: video_id for video_id, source in trained.videos.items() if source}
    pairs = [(by_hash[source], one) for one, source in tested.items() if source in by_hash]
    if trained.dataset == dataset:
        by_id = {id_key(video_id): video_id for video_id in trained.videos}
        pairs = [*((by_id[id_key(one)], one) for one in tested if id_key(one) in by_id), *pairs]
    else:
        pairs += shared_operations(trained.dataset, list(trained.videos), dataset, list(tested))
    return [(theirs, ours) for ours, theirs in {ours: theirs for theirs, ours in reversed(pairs)}.items()][::-1]
