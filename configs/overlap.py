"""The schema of the list of operations that occur in several data sets (`configs/overlaps`)."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from pydantic import Field, model_validator

from configs.schema import Strict

Video = int | str  # a video's number, or a pattern of its id


class Overlap(Strict):
    """Operations that two data sets share: by number or id, or `possible` ones whose pairs are not known."""

    datasets: tuple[str, str]
    same: tuple[Video, ...] = Field((), description="numbers, or patterns of ids, that mean the same in both data sets")
    pairs: tuple[tuple[Video, Video], ...] = ()
    possible: str = Field("", description="why operations may be shared although no pairs are known")
    source: str = ""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Overlap:
        if bool(self.same or self.pairs) == bool(self.possible):
            raise ValueError(f"{' and '.join(self.datasets)}: give same or pairs, or say why sharing is possible")
        return self

    def joins(self, first: str, second: str) -> bool:
        """Whether it is about these two data sets, in any order."""
        return {first, second} == set(self.datasets)

    def shared(self, first: str, ids: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
        """Return the pairs of one of the `ids` of data set `first` and one of `others`, of the other data set."""
        pairs = self.pairs if first == self.datasets[0] else tuple((two, one) for one, two in self.pairs)
        pairs += tuple((number, number) for number in self.same if isinstance(number, int))
        found = [(one, two) for a, b in pairs for one in _named(ids, a) for two in _named(others, b)]
        alike = (pattern for pattern in self.same if isinstance(pattern, str))
        return found + [(one, one) for pattern in alike for one in _named(ids, pattern) if one in others]


class OverlapList(Strict):
    """The content of a file in `configs/overlaps`."""

    overlaps: tuple[Overlap, ...]


def _named(ids: Sequence[str], video: Video) -> list[str]:
    """Return the ids with this number, which is the last number in an id, or those that a pattern matches."""
    if isinstance(video, str):
        return fnmatch.filter(ids, video)
    return [one for one in ids if (numbers := re.findall("[0-9]+", one)) and int(numbers[-1]) == video]
