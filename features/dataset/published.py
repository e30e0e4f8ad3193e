"""Published splits that depend on a copy of the data set: lists in its files, or the folders of its videos."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from configs.dataset_spec import DataSetSpec, NamedSplit
from configs.errors import UserError, listed
from configs.file_pattern import file_pattern
from configs.schema import SplitConfig
from engine.files import inside
from engine.progress import BAR_AFTER_S, progress_bar
from engine.safe_pickle import load_plain
from features.dataset.discover import files_matching
from features.dataset.splits import PARTS, Split, rule_asked_for
from features.ids import id_key


def published_lists(
    root: Path,
    spec: DataSetSpec,
    split: SplitConfig,
    paths: Mapping[str, Iterable[str]],
    ids: Sequence[str],
    notes: list[str],
) -> dict[str, NamedSplit]:
    """Return the lists of the split that the settings or the description choose, if they depend on the copy.

    `paths` has the paths of each video's source and files of labels, by id, and `ids` are all videos. The result is
    empty for every other split, and where all of the usual split's files for a part are missing. If some are missing,
    or videos are in no list, `notes` gets a line. Raises UserError if files that the settings ask for are missing
    although there are videos that the others do not list, or if files cannot be read.
    """
    asked = rule_asked_for(split)
    rule = asked or spec.default_split
    if rule not in spec.splits or not spec.splits[rule].needs_copy:
        return {}
    named, known = spec.splits[rule], {id_key(one): one for one in ids}
    chosen = {part: [one for entry in getattr(named, part) for one in _of_entry(entry, paths)] for part in PARTS}
    files: list[tuple[Split, str]] = []
    missing: list[str] = []
    for part in named.listed_in:
        matching = {pattern: files_matching(root, file_pattern(pattern)) for pattern in named.patterns_of(part)}
        if not any(matching.values()) and asked is None:
            return {}
        missing += [pattern for pattern, found in matching.items() if not found]
        files += [(part, file) for found in matching.values() for file in found]
    with progress_bar(None, f"split {rule}", "file", iterable=files, delay=BAR_AFTER_S) as listing:
        for part, file in listing:  # the pickles of a large data set take seconds each
            chosen[part] += [known[key] for key in _listed(inside(root, file)) if key in known]
    unlisted = [one for one in ids if not any(one in found for found in chosen.values())]
    if unlisted:
        without = f"no file matches {listed(missing, 3)}, so " if missing else ""
        problem = (
            f"split {rule} of {spec.name}: {without}{len(unlisted)} video(s) are in no list ({listed(unlisted, 6)})"
        )
        if missing and asked is not None:
            raise UserError(f"{problem}; add the files below {root}, or choose another data.split.rule")
        notes.append(f"{problem} and get split none")
    return {rule: NamedSplit.model_validate({part: tuple(dict.fromkeys(found)) for part, found in chosen.items()})}


def _of_entry(entry: str, paths: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the entry of a list itself or, if it is a pattern for paths, the ids of the videos at such paths."""
    if "/" not in entry:
        return [entry]
    return [one for one, places in paths.items() if any(fnmatch.fnmatch(f"/{path}", f"*{entry}") for path in places)]


def _listed(path: Path) -> list[str]:
    """Return the keys (`id_key`) of the videos that a file lists."""
    listed = load_plain(path, tensors=True)
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed):
        raise UserError(f"{path}: is not a mapping with the ids of videos as keys, so it does not list a split")
    return [id_key(name) for name in listed]
