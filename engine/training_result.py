"""The outcome of a training, which `result.json` records, and the score that chooses the best epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.logs import METRICS_LOG, read_metrics
from engine.records import FLAT, Record
from engine.runs import StageFolder

Choices = Sequence[Sequence[str]]  # of the scores that choose the best epoch


@dataclass(frozen=True, kw_only=True)
class TrainingResult(Record):
    """The outcome of a training; the fields are the keys of `result.json`, in their order.

    In a result that was read back, the scores are in `about`, among what only one kind of training records.
    """

    step: str | None = None  # of the joint net's schedule
    score: str | None = None  # what stage two's accuracy is
    scores: Mapping[str, float | None] = field(default_factory=dict, metadata=FLAT)  # of the best epoch, by key
    best_epoch: int  # counted from 1, in stage two from 0
    epochs: int
    steps: int | None = None
    parameters: int | None = None
    frames_per_s: float | None = None
    chosen_by: str | None = None
    seconds: float
    about: Mapping[str, Any] = field(default_factory=dict, metadata=FLAT)  # the data, the weights
    left_out: Sequence[dict[str, Any]] | None = None  # videos that cannot be read, with the reasons
    sentence: str | None = None  # the result in one line

    def write(self, stage: StageFolder) -> TrainingResult:
        """Finish the stage with this result; returns it as it is read back."""
        return self.from_json(stage.finish(self.to_json()))


def result_on_frames(
    folder: Path,
    best: Mapping[str, Any],
    titles: Mapping[str, str],
    choices: Choices,
    about: Mapping[str, Any],
    *,
    step: str | None = None,
    left_out: Sequence[dict[str, Any]] | None = None,
) -> TrainingResult:
    """The result of a training on frames, from its log in `folder` and the scores of its best epoch.

    `titles` has the keys of its scores and what they are called; `choices` is as for `deciding_score`. `about` has
    `train_frames` and `checkpoint`.
    """
    rows = read_metrics(folder / METRICS_LOG, "epoch")
    scores = {name: best.get(name) for name in titles}
    seconds = round(sum(row["seconds"] for row in rows), 2)
    chosen_by, _ = deciding_score(best, choices)
    shown = ", ".join(f"{titles[name]} {value:.3f}" for name, value in scores.items() if value is not None)
    sentence = (
        f"{shown or 'no validation score'} at epoch {best['epoch'] + 1} of {len(rows)}; "
        f"{about['train_frames']:,} training frames, {seconds:.0f} s; {about['checkpoint']}"
    )
    return TrainingResult(
        step=step,
        scores=scores,
        best_epoch=best["epoch"] + 1,
        epochs=len(rows),
        chosen_by=" and ".join(titles[name] for name in chosen_by) or "no validation score, so the last epoch",
        seconds=seconds,
        about=about,
        left_out=left_out,
        sentence=f"{step}: {sentence}" if step else sentence,
    )


def deciding_score(scores: Mapping[str, Any], choices: Choices) -> tuple[list[str], float | None]:
    """The keys of the scores that choose the best epoch, and their mean; no keys and None if there are none.

    They are those scores of the first choice that exist; if none does, of the next choice.
    """
    for names in choices:
        found = {name: value for name in names if (value := scores.get(name)) is not None}
        if found:
            return list(found), sum(found.values()) / len(found)
    return [], None
