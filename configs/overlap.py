"""The schema of the list of operations that occur in several data sets (`configs/overlaps`)."""

from __future__ import annotations

from pydantic import Field, model_validator

from configs.strict import Strict

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

    def videos_of(self, dataset: str) -> list[Video]:
        """Return the videos of a data set that are listed."""
        if dataset not in self.datasets:
            return []
        return [*self.same, *(pair[self.datasets.index(dataset)] for pair in self.pairs)]


class OverlapList(Strict):
    """The content of a file in `configs/overlaps`."""

    overlaps: tuple[Overlap, ...]
