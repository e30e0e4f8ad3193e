"""Which videos of two data sets are the same operation, from the list in `configs/overlaps`.

The list has pairs of data sets. What follows from several of them is found here: video 4 of m2cai16-tool is Cholec80's
70, and so is CholecT50's VID70.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator, Sequence

from configs.dataset_spec import DataSetSpec
from configs.encoder_spec import find_description
from configs.load import dataset_names, known_overlaps, load_dataset
from configs.overlap import Video
from features.ids import id_key, numbered_id

Place = tuple[str, Video]  # a data set, and a video in it: its number, or its id as `id_key` returns it


def shared_operations(first: str, ids: Sequence[str], second: str, others: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of one of the `ids` of data set `first` and one of `others`, of data set `second`."""
    by_name: dict[Video, list[str]] = {}
    for other in others:
        for name in _names(second, other):
            by_name.setdefault(name, []).append(other)
    pairs = (
        (one, other)
        for one in ids
        for name in _names(first, one)
        for place, reached in _same_as((first, name))
        if place == second
        for other in by_name.get(reached, ())
    )
    return list(dict.fromkeys(pairs))


def possible_overlap(first: str, second: str) -> str:
    """Return why two data sets may share operations although no pairs are known; an empty text if they do not."""
    return next((one.possible for one in known_overlaps() if one.possible and one.joins(first, second)), "")


def pretraining_phrases(encoder: str, dataset: str) -> list[str]:
    """Return phrases such as `pretrained on NAME (videos)` for data sets that have operations of `dataset`.

    They are those on which the encoder's release was pretrained, `dataset` itself first.
    """
    description = find_description(encoder)
    lines: list[str] = []
    for name, videos in (description.pretrained_on if description else {}).items():
        if name == dataset:
            lines.insert(0, f"pretrained on {name} ({videos})")
        elif any(one.joins(name, dataset) for one in known_overlaps()):
            lines.append(f"pretrained on {name} ({videos}), which may share operations with {dataset}")
    return lines


def overlap_lines(dataset: str) -> list[str]:
    """Return a line for each data set that shares operations with this one, or may do so."""
    lines, joined = [], {dataset}
    for one in known_overlaps():
        if dataset not in one.datasets:
            continue
        (other,) = set(one.datasets) - {dataset}
        joined.add(other)
        count = len(one.same) + len(one.pairs)
        known = "all videos with the same id" if one.same == ("*",) else _operations(count)
        known = f"possible, pairs unknown: {one.possible}" if one.possible else known
        lines.append(f"{other}: {known} ({one.source})")
    listed = (video for one in known_overlaps() for video in one.videos_of(dataset) if isinstance(video, int))
    reached = {place for video in dict.fromkeys(listed) for place in _same_as((dataset, video))}
    others = [name for name, _ in reached if name not in joined]
    return lines + [f"{one}: {_operations(others.count(one))} (through other data sets)" for one in sorted(set(others))]


def _operations(count: int) -> str:
    return f"{count} operation{'s' * (count != 1)}"


def _names(dataset: str, video_id: str) -> list[Video]:
    """Return the key of an id and, if the id is a number in the form of the data set's ids, this number."""
    key, numbers = id_key(video_id), [int(digits) for digits in re.findall("[0-9]{1,18}", video_id)]
    spec = _described(dataset)
    if spec is None:  # ids of data sets that are not described end in their number
        return [key, *numbers[-1:]]
    return [key, *(one for one in dict.fromkeys(numbers) if id_key(numbered_id(one, spec)) == key)]


@functools.cache
def _described(dataset: str) -> DataSetSpec | None:
    return load_dataset(dataset) if dataset in dataset_names() else None


@functools.cache
def _same_as(place: Place) -> tuple[Place, ...]:
    """Return all videos that are the same operation, the given one included."""
    found = [place]
    for one in found:  # which grows
        found += [other for other in dict.fromkeys(_listed_with(one)) if other not in found]
    return tuple(found)


def _listed_with(place: Place) -> Iterator[Place]:
    """Yield what the list says of a video in each other data set."""
    dataset, video = place
    for overlap in known_overlaps():
        if dataset not in overlap.datasets:
            continue
        (other,) = set(overlap.datasets) - {dataset}
        first = dataset == overlap.datasets[0]
        for pair in overlap.pairs:
            here, there = pair if first else pair[::-1]
            if _is(here, video):
                yield other, id_key(there) if isinstance(there, str) else there
        if any(_is(one, video) for one in overlap.same):
            yield other, video


def _is(listed: Video, video: Video) -> bool:
    """Whether an entry of the list, which is a number or a pattern of ids, names a video."""
    if isinstance(listed, str) and isinstance(video, str):
        return fnmatch.fnmatchcase(video, id_key(listed))
    return listed == video
