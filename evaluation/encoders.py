"""Compare encoders under the same heads: means and spread over seeds, paired differences over videos, and rankings.

A test video counts once, with the predictions of the fold in which it is for testing. The frame probe, a logistic
regression on single frames, is one more head, without seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.encoder_comparison import PROBE
from engine.records import Record
from evaluation.comparison import DEFAULT_CONVENTION, Model, ModelPair, compare_results, over_seeds
from evaluation.metrics.phases import evaluate_phases
from evaluation.metrics.results import PhaseResults, Score, ToolResults, json_number

METRICS = ("accuracy", "f1", "jaccard")
MAIN_METRIC = METRICS[0]  # ranks encoders, and is plotted
TOOL_HEAD = "head"  # tools recognised by the head that was trained with the encoder, beside those by a probe

Labels = Mapping[str, NDArray[np.int8]]  # phases (T,) of each video


@dataclass(frozen=True)
class Training:
    """One training, of a head or the frame probe, and its predictions for the test videos of its fold.

    `seed` is None for the probe. `result` has what the table of trainings shows of it.
    """

    encoder: str
    head: str
    fold: int
    seed: int | None
    predicted: Labels
    result: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class EncoderFacts(Record):
    """What an encoder is and costs.

    `crop_px` is the size of its images: of a square, or height and width.
    `size_bytes` are those of the feature files of all videos. `frames_per_s` is the speed at which this comparison
    extracted features with this encoder alone, and `encoded_per_s` that without reading frames; both are None if the
    features were there before. `finetuning_s` is the time of fine-tuning in all folds. `note`
    says if the encoder's weights were trained on the data set.
    """

    backbone: str
    weights: str
    finetuned: bool
    crop_px: int | Sequence[int]
    embedding_dim: int
    parameters: int
    size_bytes: int | None = None
    frames_per_s: float | None = None
    encoded_per_s: float | None = None
    finetuning_s: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class HeadScores(Record):
    """The scores of one encoder under one head, and the seeds that have a prediction for every test video."""

    seeds: int
    metrics: Mapping[str, Score] = field(metadata={"flat": True})


@dataclass(frozen=True, kw_only=True)
class EncoderRow(Record):
    """One encoder: facts, scores by head (the probe first), and tool mAP on pooled frames by what recognises tools."""

    name: str
    facts: EncoderFacts
    scores: Mapping[str, HeadScores]
    tool_map: Mapping[str, float | None]

    def accuracy(self, head: str) -> float | None:
        """The mean accuracy under a head, by which encoders are ranked."""
        return self.scores[head].metrics[MAIN_METRIC].mean


@dataclass(frozen=True, kw_only=True)
class Ranking(Record):
    """The encoders by accuracy under a head, best first, and Kendall's tau-b between this order and the probe's."""

    order: Sequence[str]
    probe_order: Sequence[str]
    kendall_tau: float | None

    @property
    def is_the_probes(self) -> bool:
        """Whether both orders are the same."""
        return list(self.order) == list(self.probe_order)


@dataclass(frozen=True, kw_only=True)
class EncodersAbout(Record):
    """How the numbers of a comparison of encoders were computed."""

    title: str
    dataset: str
    simulated: bool
    fps: float
    folds: str
    videos: Sequence[str]
    frames: int
    seeds: Sequence[int]
    reference: str | None
    offline: Sequence[str] | None = None  # the heads that look into the future
    convention: str = DEFAULT_CONVENTION
    unit: str = "percent"
    mean: str = "over test videos, of each video's own number, then over seeds"
    std: str = "over seeds (n - 1), of each seed's mean over test videos; the probe has no seeds"
    interval: str = "95 %, percentile bootstrap of the paired difference, over test videos"
    tool_map: str = "average precision of each tool over the frames of all test videos, then the mean over tools"


@dataclass(frozen=True)
class Encoders(Record):
    """The content of `encoders.json`.

    `comparisons` has the pairs (reference, other encoder) under each head; differences are reference - other, in
    percentage points. `trainings` is the number of trainings behind the table.
    """

    about: EncodersAbout
    encoders: Sequence[EncoderRow]
    comparisons: Mapping[str, Sequence[ModelPair]]
    rankings: Mapping[str, Ranking]
    trainings: int

    @property
    def heads(self) -> list[str]:
        """The heads in the order of the file, the probe first."""
        return list(self.encoders[0].scores)


def compare_encoders(
    about: EncodersAbout,
    truth: Labels,
    spec: DataSetSpec,
    trainings: Sequence[Training],
    facts: Mapping[str, EncoderFacts],
    tools: Mapping[str, Mapping[str, ToolResults | None]],
    heads: Sequence[str],
) -> Encoders:
    """Score the test videos `truth` under the convention in `about`, and compare encoders under each of `heads`.

    `tools` has the results by encoder, and by `PROBE` or `TOOL_HEAD`. Each encoder is compared with `about.reference`
    or, if that is None, with the best one under each head. A seed for which a fold is missing does not count.
    """
    models = {head: _models(head, truth, spec, trainings, about, list(facts)) for head in (PROBE, *heads)}
    rows = [
        EncoderRow(
            name=name,
            facts=known,
            scores={head: _scores(of_head.get(name)) for head, of_head in models.items()},
            tool_map={by: results.map_pooled if results else None for by, results in tools.get(name, {}).items()},
        )
        for name, known in facts.items()
    ]
    compared = {head: _compared(list(of_head.values()), about) for head, of_head in models.items()}
    rankings = {head: ranking for head in heads if (ranking := _ranking(rows, head)) is not None}
    return Encoders(about, rows, compared, rankings, len(trainings))


def score_labels(truth: Labels, predicted: Labels, spec: DataSetSpec, about: EncodersAbout) -> PhaseResults:
    """The results of one set of predictions, for the videos that it has."""
    shown = {video: truth[video] for video in predicted}
    return evaluate_phases(shown, predicted, spec.phases, about.fps, [about.convention], split="test")[about.convention]


def _models(
    head: str,
    truth: Labels,
    spec: DataSetSpec,
    trainings: Sequence[Training],
    about: EncodersAbout,
    encoders: Sequence[str],
) -> dict[str, Model]:
    """The encoders under one head, each with the results of its complete seeds; without those that have none."""
    found = {}
    for encoder in encoders:
        of_seeds: dict[int | None, dict[str, NDArray[np.int8]]] = {}
        for one in trainings:
            if (one.encoder, one.head) == (encoder, head):
                of_seeds.setdefault(one.seed, {}).update(one.predicted)
        complete = {seed: of_seeds[seed] for seed in of_seeds if of_seeds[seed].keys() == truth.keys()}
        if complete:
            results = [score_labels(truth, one, spec, about) for one in complete.values()]
            found[encoder] = Model(encoder, [str(seed) for seed in complete], results)
    return found


def _scores(model: Model | None) -> HeadScores:
    if model is None:
        return HeadScores(0, {metric: Score(None, None) for metric in METRICS})
    return HeadScores(len(model.results), {metric: over_seeds(model, metric) for metric in METRICS})


def _compared(models: Sequence[Model], about: EncodersAbout) -> list[ModelPair]:
    """The pairs of the reference and each other model; none if a reference is named that has no scores."""
    if about.reference is None:
        first = max(models, key=lambda model: over_seeds(model, MAIN_METRIC).mean or 0.0, default=None)
    else:
        first = next((model for model in models if model.name == about.reference), None)
    others = [model for model in models if model is not first]
    if first is None or not others:
        return []
    return list(compare_results([first, *others], about.convention, METRICS).comparisons)


def _ranking(rows: Sequence[EncoderRow], head: str) -> Ranking | None:
    """The encoders that have a score under both the head and the probe, ranked; None if there are fewer than two."""
    from scipy.stats import kendalltau

    pairs = ((row.name, row.accuracy(head), row.accuracy(PROBE)) for row in rows)
    known = [(name, own, probe) for name, own, probe in pairs if own is not None and probe is not None]
    if len(known) < 2:
        return None
    order = [name for name, _, _ in sorted(known, key=lambda one: -one[1])]
    probe_order = [name for name, _, _ in sorted(known, key=lambda one: -one[2])]
    found = kendalltau([own for _, own, _ in known], [probe for _, _, probe in known])
    tau = json_number(float(found.statistic))
    return Ranking(order=order, probe_order=probe_order, kendall_tau=tau)
