"""Divide videos into training, validation and test: by counts, percentages, lists, k-fold or leave-one-out."""

from __future__ import annotations

import fnmatch
import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from configs.dataset_spec import DataSetSpec, NamedSplit
from configs.errors import UserError, did_you_mean, listed
from configs.schema import SplitConfig
from features.ids import normal_id

Split = Literal["train", "val", "test", "none"]
PARTS: tuple[Split, Split, Split] = ("train", "val", "test")
_COUNTS = re.compile(r"\d{1,6}(/\d{1,6}){1,2}")
_PERCENTAGES = re.compile(r"\d+(\.\d+)?%(/\d+(\.\d+)?%){1,2}")
_RULES = (
    "A/B/C (train/val/test) or A/B (train/test) videos, percentages such as 60%/20%/20%, lists, kfold, leave_one_out"
)


def assign_splits(ids: Sequence[str], spec: DataSetSpec, split: SplitConfig) -> dict[str, Split]:
    """Return the split of each video; `ids` are in the order of video numbers.

    If `split.rule` is set, it decides. Otherwise the lists are used if any are given, or else the data set's usual
    split; if the latter does not fit these videos, each gets "none" (`usual_split_problem` returns the reason).

    `SplitConfig` describes the rules. With percentages (`60%/20%/20%`), the numbers of videos are found by largest
    remainder, with at least one video in each part. Videos that a published split names but that were not found are
    ignored. Entries of lists are ids or shell patterns; videos in no list get "none". Raises UserError if a rule that
    the settings ask for does not fit these videos.
    """
    if usual_split_problem(ids, spec, split):
        return dict.fromkeys(ids, "none")
    return _by_rule(rule_asked_for(split) or spec.default_split, ids, spec, split)


def usual_split_problem(ids: Sequence[str], spec: DataSetSpec, split: SplitConfig) -> str | None:
    """Return why the data set's usual split does not fit; None if it does, or if the settings ask for another."""
    if rule_asked_for(split) is not None:
        return None
    try:
        _by_rule(spec.default_split, ids, spec, split)
    except UserError as error:
        return str(error)
    return None


def rule_asked_for(split: SplitConfig) -> str | None:
    """Return the rule that the settings ask for, or None if they leave it to the data set or the index.

    Raises UserError if they ask for two.
    """
    listed = any((split.train, split.val, split.test))
    if listed and split.rule not in (None, "lists"):
        raise UserError(f"data.split: lists of videos are given, but data.split.rule is {split.rule}; set it to lists")
    return "lists" if listed else split.rule


def _by_rule(rule: str, ids: Sequence[str], spec: DataSetSpec, split: SplitConfig) -> dict[str, Split]:
    if rule == "lists":
        return _by_lists(ids, NamedSplit(train=split.train, val=split.val, test=split.test), "data.split")
    if rule in spec.splits and spec.splits[rule].needs_copy:
        named = spec.splits[rule]
        patterns = listed([pattern for part in named.listed_in for pattern in named.patterns_of(part)], 3)
        raise UserError(f"split {rule!r} of {spec.name} is listed in files that are missing here: {patterns}")
    if rule in spec.splits:
        return _by_lists(ids, _present(ids, spec.splits[rule]), f"split {rule!r} of {spec.name}")
    if rule == "kfold":
        return _by_fold(ids, split.folds, split)
    if rule == "leave_one_out":
        return _by_fold(ids, len(ids), split)
    if _COUNTS.fullmatch(rule):
        return _by_counts(ids, [int(count) for count in _three(rule)], rule)
    if _PERCENTAGES.fullmatch(rule):
        return _by_percentages(ids, [float(part.rstrip("%")) for part in _three(rule)], rule)
    raise UserError(f"data.split.rule: {rule!r} is none of: {', '.join((_RULES, *spec.splits))}")


def with_lists(spec: DataSetSpec, lists: Mapping[str, NamedSplit]) -> DataSetSpec:
    """Return a description whose published splits have these lists of ids instead of what depends on a copy."""
    return spec.model_copy(update={"splits": {**spec.splits, **lists}})


def _three(rule: str) -> list[str]:
    """Return the train, validation and test part of a rule. If it has two parts, they are train and test."""
    parts = rule.split("/")
    return parts if len(parts) == 3 else [parts[0], "0", parts[1]]


def _by_counts(ids: Sequence[str], counts: Sequence[int], rule: str) -> dict[str, Split]:
    if sum(counts) != len(ids):
        raise UserError(
            f"data.split.rule: {rule} needs {sum(counts)} videos, but there are {len(ids)}{_span(ids)}; choose counts "
            f"that sum to {len(ids)}, percentages such as 60%/20%/20%, or lists"
        )
    names = [part for part, count in zip(PARTS, counts, strict=True) for _ in range(count)]
    return dict(zip(ids, names, strict=True))


def _by_percentages(ids: Sequence[str], percentages: Sequence[float], rule: str) -> dict[str, Split]:
    """Round percentages to counts by largest remainder; then give each part without a video one of the largest part."""
    if abs(sum(percentages) - 100) > 1e-6:
        raise UserError(f"data.split.rule: the percentages of {rule} sum to {sum(percentages):g} %, not 100 %")
    wanted = [i for i, percentage in enumerate(percentages) if percentage > 0]
    if len(ids) < len(wanted):
        found = f"there are {len(ids)}{_span(ids)}"
        raise UserError(f"data.split.rule: {rule} needs at least {len(wanted)} videos, but {found}")
    exact = [percentage * len(ids) / 100 for percentage in percentages]
    counts = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(wanted, key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: len(ids) - sum(counts)]:
        counts[i] += 1
    for i in wanted:
        if counts[i] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    return _by_counts(ids, counts, rule)


def _by_lists(ids: Sequence[str], lists: NamedSplit, where: str) -> dict[str, Split]:
    chosen: dict[str, Split] = {}
    for part in PARTS:
        for entry in getattr(lists, part):
            for video_id in matching_ids(ids, entry, f"{where}.{part}"):
                if video_id in chosen:
                    again = "twice in" if chosen[video_id] == part else f"in {chosen[video_id]} and"
                    raise UserError(f"{where}: {video_id} is {again} {part}")
                chosen[video_id] = part
    if not chosen:
        raise UserError(f"{where}: no video is listed; give ids for train, val and test")
    return {video_id: chosen.get(video_id, "none") for video_id in ids}


def _present(ids: Sequence[str], lists: NamedSplit) -> NamedSplit:
    """Return a published split without the videos that were not found."""
    return NamedSplit(
        **{part: tuple(one for one in getattr(lists, part) if fnmatch.filter(ids, normal_id(one))) for part in PARTS}
    )


def matching_ids(ids: Sequence[str], entry: str, where: str) -> list[str]:
    """Return the ids that an entry of a list names: the entry itself if it is an id, or those that it matches.

    Raises UserError naming the setting `where` if there is no such video.
    """
    entry = normal_id(entry)
    if entry in ids:
        return [entry]
    found = [video_id for video_id in ids if fnmatch.fnmatchcase(video_id, entry)]
    if not found:
        raise UserError(f"{where}: there is no video {entry!r}{did_you_mean(entry, ids) or _span(ids)}")
    return found


def _by_fold(ids: Sequence[str], folds: int, split: SplitConfig) -> dict[str, Split]:
    """Divide the videos into contiguous folds of nearly equal size, and use fold `split.fold` for testing.

    The `split.val_videos` videos after it (continuing at the first video after the last) are for validation, the others
    for training.
    """
    count = len(ids)
    if folds > count:
        raise UserError(f"data.split.folds: {folds} folds need {folds} videos, but there are {count}{_span(ids)}")
    if split.fold >= folds:
        raise UserError(f"data.split.fold: {split.fold} is not one of the {folds} folds 0 to {folds - 1}")
    order = list(ids)
    if split.seed is not None:
        random.Random(split.seed).shuffle(order)
    start, stop = count * split.fold // folds, count * (split.fold + 1) // folds
    rest = order[stop:] + order[:start]
    if split.val_videos >= len(rest):
        raise UserError(
            f"data.split.val_videos: with {split.val_videos} for validation, no video is left for training of the "
            f"{len(rest)} outside the test fold"
        )
    test, val = set(order[start:stop]), set(rest[: split.val_videos])
    return {video_id: "test" if video_id in test else "val" if video_id in val else "train" for video_id in ids}


def _span(ids: Sequence[str]) -> str:
    """Return the ids in brackets, for a message: all if there are few, otherwise the first and the last."""
    if not ids:
        return ""
    return f" ({', '.join(ids)})" if len(ids) <= 6 else f" ({ids[0]} to {ids[-1]})"
