"""The schema of an ablation file, which says what settings `ablate` tries. `configs.load` reads the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, FiniteFloat, model_validator

from configs.strict import Strict


class RangeConfig(Strict):
    """A range from which `ablate` draws values of a setting. They are integers if both ends are integers."""

    low: int | FiniteFloat
    high: int | FiniteFloat
    log: bool = Field(False, description="draw uniformly on a logarithmic scale")

    @model_validator(mode="after")
    def _is_range(self) -> RangeConfig:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low {self.low} must be below high {self.high}, and above 0 if log is true")
        return self


Choice = None | bool | int | FiniteFloat | str
# Keys of an ablation that select features other than those of its base: a folder, or the run that extracted them.
FEATURE_KEYS = ("features", "features_of_run")
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class BudgetConfig(Strict):
    trials: int | None = Field(
        None,
        ge=1,
        description="number of trainings, which is the number of settings (with the base) times that of seeds",
    )
    minutes: float | None = Field(None, gt=0, description="time after which no further setting is tried")


class AblationConfig(Strict):
    """What `ablate` tries: all combinations of the lists in `space` or, if it has ranges, draws within the budget."""

    title: str = ""
    base: str = Field(description="preset or file of settings that all trials are based on")
    space: dict[str, list[Choice] | RangeConfig] = Field(
        {}, description="the values to try of each setting, by dotted key"
    )
    settings: dict[str, dict[str, Choice]] = Field(
        {}, description="named sets of changes, each combined with every point of the space"
    )
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    budget: BudgetConfig = BudgetConfig()

    @model_validator(mode="after")
    def _says_what_to_try(self) -> AblationConfig:
        if not (self.space or self.settings):
            raise ValueError("nothing to try: give space or settings")
        if any(isinstance(values, list) and not values for values in self.space.values()):
            raise ValueError("space: a list is empty")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds repeat")
        tried: list[Sequence[object]] = [values for values in self.space.values() if isinstance(values, list)]
        tried.append([*self.settings.values()])
        if any(value in values[:place] for values in tried for place, value in enumerate(values)):
            raise ValueError("space or settings: two trials are identical")
        keys = [*self.space, *(key for changes in self.settings.values() for key in changes)]
        if other := [key for key in keys if not key.startswith("temporal.") and key not in FEATURE_KEYS]:
            raise ValueError(
                f"{other[0]}: only settings of stage two (temporal) can be compared, and {' or '.join(FEATURE_KEYS)}"
            )
        if decodings := [key for key in keys if key.startswith("temporal.decoding")]:
            raise ValueError(
                f"{decodings[0]}: trainings are scored without decoding; compare decodings of one run with evaluate "
                "--decoding"
            )
        self._names_features()
        for name, changes in self.settings.items():
            if twice := [key for key in changes if key in self.space]:
                raise ValueError(f"settings.{name}: {twice[0]} is also in space; give it in one of them")
        if self.has_ranges and self.budget.trials is None and self.budget.minutes is None:
            raise ValueError("ranges need a limit: give budget.trials or budget.minutes")
        return self

    def _names_features(self) -> None:
        """Raise ValueError if one trial names its features twice, or if the value is not a name."""
        for changes in (*self.settings.values(), {}):
            named = [key for place in (changes, self.space) for key in FEATURE_KEYS if key in place]
            if len(named) > 1:
                raise ValueError(f"{' and '.join(dict.fromkeys(named))}: features are given twice; give only one")
        for key in FEATURE_KEYS:
            values: list[object] = [changes[key] for changes in self.settings.values() if key in changes]
            space = self.space.get(key, [])
            values += space if isinstance(space, list) else [space]
            if wrong := [value for value in values if not (isinstance(value, str) and value)]:
                raise ValueError(f"{key}: expected a name, got {wrong[0]!r}")

    @property
    def has_ranges(self) -> bool:
        """Whether values are drawn from ranges, rather than all listed combinations being tried."""
        return any(isinstance(values, RangeConfig) for values in self.space.values())
