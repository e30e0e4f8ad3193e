"""Which videos train, validate and test: by counts, percentages, lists, k-fold or leave-one-out."""

from __future__ import annotations

import fnmatch
import random
import re
from collections.abc import Sequence
from typing import Literal

from configs.dataset_spec import DataSetSpec, NamedSplit
from configs.errors import UserError, did_you_mean
from configs.schema import SplitConfig
from features.ids import normal_id

Split = Literal["train", "val", "test", "none"]
_PARTS: tuple[Split, Split, Split] = ("train", "val", "test")
_COUNTS = re.compile(r"\d{1,6}(/\d{1,6}){1,2}")
_PERCENTAGES = re.compile(r"\d+(\.\d+)?%(/\d+(\.\d+)?%){1,2}")
_RULES = (
    "A/B/C (train/val/test) or A/B (train/test) videos, percentages such as 60%/20%/20%, lists, kfold, leave_one_out"
)


def assign_splits(ids: Sequence[str], spec: DataSetSpec, split: SplitConfig) -> dict[str, Split]:
    """The split of each video; `ids` are in the order of video numbers.

    `split.rule` decides. Without one, the lists are used if any are given, otherwise the data set's usual split; if
    that does not fit these videos, each gets "none" (`usual_split_problem` has the reason). Besides the rules of
    `SplitConfig` there are percentages (`60%/20%/20%`, by largest remainder, at least one video each) and the names of
    published splits in the data set's description, whose missing videos are ignored. Entries of lists are ids or shell
    patterns; videos in no list get "none". Raises UserError if a rule that was asked for does not fit these videos.
    """
    if usual_split_problem(ids, spec, split):
        return dict.fromkeys(ids, "none")
    return _by_rule(rule_asked_for(split) or spec.default_split, ids, spec, split)


def usual_split_problem(ids: Sequence[str], spec: DataSetSpec, split: SplitConfig) -> str | None:
    """Why the data set's usual split does not fit; None when it does, or when the settings ask for another."""
    if rule_asked_for(split) is not None:
        return None
    try:
        _by_rule(spec.default_split, ids, spec, split)
    except UserError as error:
        return str(error)
    return None


def rule_asked_for(split: SplitConfig) -> str | None:
    """The rule that the settings ask for; None where the data set or the index decides.

    Raises UserError if they ask for two.
    """
    listed = any((split.train, split.val, split.test))
    if listed and split.rule not in (None, "lists"):
        raise UserError(f"data.split: lists of videos are given, but data.split.rule is {split.rule}; set it to lists")
    return "lists" if listed else split.rule


def _by_rule(rule: str, ids: Sequence[str], spec: DataSetSpec, split: SplitConfig) -> dict[str, Split]:
    if rule == "lists":
        return _by_lists(ids, NamedSplit(train=split.train, val=split.val, test=split.test), "data.split")
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


def _three(rule: str) -> list[str]:
    """Train, validation and test part of a rule; two parts are train and test."""
    parts = rule.split("/")
    return parts if len(parts) == 3 else [parts[0], "0", parts[1]]


def _by_counts(ids: Sequence[str], counts: Sequence[int], rule: str) -> dict[str, Split]:
    if sum(counts) != len(ids):
        raise UserError(
            f"data.split.rule: {rule} needs {sum(counts)} videos, here are {len(ids)}{_span(ids)}; choose counts that "
            f"sum to {len(ids)}, percentages such as 60%/20%/20%, or lists"
        )
    names = [part for part, count in zip(_PARTS, counts, strict=True) for _ in range(count)]
    return dict(zip(ids, names, strict=True))


def _by_percentages(ids: Sequence[str], percentages: Sequence[float], rule: str) -> dict[str, Split]:
    """Counts by largest remainder, then one video from the largest part to each part that got none."""
    if abs(sum(percentages) - 100) > 1e-6:
        raise UserError(f"data.split.rule: the percentages of {rule} sum to {sum(percentages):g} %, not 100 %")
    wanted = [i for i, percentage in enumerate(percentages) if percentage > 0]
    if len(ids) < len(wanted):
        raise UserError(f"data.split.rule: {rule} needs at least {len(wanted)} videos, here are {len(ids)}{_span(ids)}")
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
    for part in _PARTS:
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
    """A published split without the videos that were not found."""
    return NamedSplit(
        **{part: tuple(one for one in getattr(lists, part) if fnmatch.filter(ids, normal_id(one))) for part in _PARTS}
    )


def matching_ids(ids: Sequence[str], entry: str, where: str) -> list[str]:
    """The ids that a list's entry names: itself, or those its shell pattern matches.

    Raises UserError, naming the setting `where`, when there is none.
    """
    entry = normal_id(entry)
    if entry in ids:
        return [entry]
    found = [video_id for video_id in ids if fnmatch.fnmatchcase(video_id, entry)]
    if not found:
        raise UserError(f"{where}: there is no video {entry!r}{did_you_mean(entry, ids) or _span(ids)}")
    return found


def _by_fold(ids: Sequence[str], folds: int, split: SplitConfig) -> dict[str, Split]:
    """Fold `split.fold` of near-equal contiguous blocks is the test set; the `val_videos` after it (cyclically) are
    the validation set, the rest trains."""
    count = len(ids)
    if folds > count:
        raise UserError(f"data.split.folds: {folds} folds need at least as many videos, here are {count}{_span(ids)}")
    if split.fold >= folds:
        raise UserError(f"data.split.fold: {split.fold} is not one of the {folds} folds 0 to {folds - 1}")
    order = list(ids)
    if split.seed is not None:
        random.Random(split.seed).shuffle(order)
    start, stop = count * split.fold // folds, count * (split.fold + 1) // folds
    rest = order[stop:] + order[:start]
    if split.val_videos >= len(rest):
        raise UserError(
            f"data.split.val_videos: with {split.val_videos} for validation, none of the {len(rest)} videos outside "
            "the test fold is left for training"
        )
    test, val = set(order[start:stop]), set(rest[: split.val_videos])
    return {video_id: "test" if video_id in test else "val" if video_id in val else "train" for video_id in ids}


def _span(ids: Sequence[str]) -> str:
    """The ids in brackets, for a message: all of a few, otherwise the first and the last."""
    if not ids:
        return ""
    return f" ({', '.join(ids)})" if len(ids) <= 6 else f" ({ids[0]} to {ids[-1]})"
