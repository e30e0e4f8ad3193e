"""The schema of a mapping of classes (`configs/mappings`): phases of several data sets in one common vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator

from configs.dataset_spec import class_ids, folded_name
from configs.errors import UserError, did_you_mean
from configs.strict import Strict


class ClassMapping(Strict):
    """A common vocabulary, and for each data set what its phases are in it.

    A phase that is not listed is the common phase of the same name (`folded_name`). None leaves a phase out. Several
    phases may become one.
    """

    title: str = ""
    phases: tuple[str, ...] = Field(min_length=2, max_length=127, description="the common phases, in the order of ids")
    background: tuple[str, ...] = ()
    datasets: dict[str, dict[str, str | None]] = Field(
        {}, description="by data set: its phases, each with a common phase or null"
    )

    @model_validator(mode="after")
    def _targets_exist(self) -> ClassMapping:
        if len(class_ids(self.phases, {})) != len(self.phases):
            raise ValueError("phases: two names cannot be told apart")
        for where, names in {"background": self.background, **self.datasets}.items():
            targets = names.values() if isinstance(names, Mapping) else names
            if unknown := [name for name in targets if name is not None and name not in self.phases]:
                raise ValueError(f"{where}: {unknown[0]!r} is not one of phases{did_you_mean(unknown[0], self.phases)}")
        return self

    def common_ids(self, dataset: str, phases: Sequence[str], where: str) -> list[int]:
        """Return the common phase of each of a data set's `phases`, -1 for those that are left out.

        Raises UserError, which names the mapping `where`, for a phase that is neither listed nor a common one, and for
        a listed phase that the data set does not have.
        """
        common, own = class_ids(self.phases, {}), class_ids(phases, {})
        listed = {folded_name(name): target for name, target in self.datasets.get(dataset, {}).items()}
        if unknown := [name for name in self.datasets.get(dataset, {}) if folded_name(name) not in own]:
            raise UserError(f"{where}: datasets.{dataset}: {unknown[0]!r} is not one of {', '.join(phases)}")
        found = []
        for name in phases:
            key = folded_name(name)
            if key not in listed and key not in common:
                raise UserError(
                    f"{where}: phase {name!r} of {dataset} is none of the common phases; list it in datasets.{dataset} "
                    "with the one that it is, or with null to leave it out"
                )
            target = listed.get(key, name)
            found.append(-1 if target is None else common[folded_name(target)])
        if max(found) < 0:
            raise UserError(f"{where}: leaves out every phase of {dataset}")
        return found
