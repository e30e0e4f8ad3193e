"""The schema of a file for `compare-encoders`: encoders, heads, seeds and folds. `configs.load` reads the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from configs.ablation import Choice, Seed
from configs.head_settings import HeadConfig
from configs.strict import Strict

PROBE = "probe"  # the name of the frame probe, beside those of the heads
# The blocks of settings that may differ between encoders; all others must be the same for all.
_ENCODER_BLOCKS = ("preprocess", "cnn", "extract")
# Keys that the file gives in another way, and those of `extract` that concern the encoder alone.
_GIVEN = {"cnn.backbone": "backbone", "cnn.weights": "weights", "extract.encoder": "finetune"}
_OF_ENCODER = {f"extract.{key}" for key in ("engine", "precision", "calibration_frames", "storage", "compile")}

# Folders are named after encoders and heads.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


def _known_folds(value: Any) -> Any:
    if value is None or value == "leave_one_out" or (type(value) is int and 2 <= value <= 10_000):
        return value
    raise ValueError("must be leave_one_out, a number of folds from 2, or null")


Folds = Annotated[Literal["leave_one_out"] | int | None, BeforeValidator(_known_folds)]


class EncoderChoice(Strict):
    """One encoder of a comparison: a network with weights, frozen or fine-tuned by `train-cnn` in each fold."""

    backbone: str = Field(min_length=1, description="name of the network, as in cnn.backbone")
    weights: str = Field("imagenet", min_length=1, description="initial weights, as in cnn.weights")
    finetune: bool = Field(
        False, strict=True, description="fine-tune it on the tools of the training videos of each fold"
    )
    settings: dict[str, Choice | list[Choice]] = Field(
        {}, description="further settings of preprocess, cnn and extract for this encoder, by dotted key"
    )

    @model_validator(mode="after")
    def _changes_stage_one_only(self) -> EncoderChoice:
        for key in self.settings:
            if key in _GIVEN:
                raise ValueError(f"settings: {key} is given by {_GIVEN[key]}; leave it out")
            block = key.partition(".")[0]
            if block not in _ENCODER_BLOCKS or (block == "extract" and key not in _OF_ENCODER):
                blocks = f"preprocess, cnn, and {', '.join(sorted(_OF_ENCODER))}"
                raise ValueError(f"settings: {key} cannot differ between encoders; only {blocks} can")
            if key.startswith("cnn.") and not self.finetune:
                raise ValueError(f"settings: {key} has no effect on a frozen encoder; set finetune: true")
        return self


class EncoderComparison(Strict):
    """What `compare-encoders` compares: each encoder under each head, with each seed, in each fold."""

    title: str = ""
    base: str = Field(min_length=1, description="preset or file of settings that everything is based on")
    encoders: dict[Name, EncoderChoice] = Field(min_length=1)
    heads: dict[Name, HeadConfig] = Field(min_length=1, description="settings of the temporal heads, by name")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="seeds of the heads' trainings")
    folds: Folds = Field(None, description="leave_one_out, a number of folds, or null for the base settings' own split")
    reference: str | None = Field(
        None, description="encoder with which the others are compared; null: the best one under each head"
    )

    @model_validator(mode="after")
    def _says_what_to_compare(self) -> EncoderComparison:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds repeat")
        if PROBE in self.heads:
            raise ValueError(f"heads: {PROBE} is the name of the frame probe, which is always there; choose another")
        if self.reference is not None and self.reference not in self.encoders:
            raise ValueError(f"reference: {self.reference} is none of the encoders {', '.join(self.encoders)}")
        for what, values in (("encoders", self.encoders), ("heads", self.heads)):
            _require_different(what, list(values), list(values.values()))
        return self

    @property
    def split_changes(self) -> dict[str, str | int]:
        """The settings of `data.split` that the folds have in common."""
        if self.folds is None:
            return {}
        if isinstance(self.folds, int):
            return {"data.split.rule": "kfold", "data.split.folds": self.folds}
        return {"data.split.rule": self.folds}


def _require_different(what: str, names: Sequence[str], values: Sequence[object]) -> None:
    """Raise ValueError if two entries are equal, or if their names differ in case only, as some file systems do not."""
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        for other, same in zip(names[:place], values[:place], strict=True):
            if value == same:
                raise ValueError(f"{what}: {other} and {name} are identical; leave one out")
            if name.lower() == other.lower():
                raise ValueError(f"{what}: {other} and {name} differ in case only; choose another name")
