"""Evaluate a net on data sets with other classes: labels and predictions are mapped to a common vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.load import load_mapping
from configs.mapping import ClassMapping
from evaluation.metrics.counts import NO_PREDICTION
from features.dataset.index import Index
from stage2_temporal.scoring import GroundTruth, Predicted


@dataclass(frozen=True)
class PhaseMapping:
    """A mapping of classes for one evaluation.

    `trained` and `tested` are the common phase of each phase of the net and of the labels; -1 leaves a phase out.
    Labels of a phase that is left out become frames without a label. Of the net's probabilities, those of the phases
    that become one are added, and those of phases that are left out are ignored: the net predicts the most probable
    common phase. Tools are not scored.
    """

    name: str
    mapping: ClassMapping
    trained: Sequence[int]
    tested: Sequence[int]

    @classmethod
    def read(cls, source: Path | str, trained_on: str, phases: Sequence[str], index: Index) -> PhaseMapping:
        """Load a mapping, for a net that was trained on `phases` of data set `trained_on`.

        Raises UserError naming a phase of one of the two data sets that the mapping does not have.
        """
        mapping, tested = load_mapping(source), index.dataset
        return cls(
            name=Path(source).stem,
            mapping=mapping,
            trained=mapping.common_ids(trained_on, phases, str(source)),
            tested=mapping.common_ids(tested.name, tested.phases, str(source)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what results depend on, and the mapping's name."""
        phases = {"phases": list(self.mapping.phases), "background": list(self.mapping.background)}
        return {"name": self.name, **phases, "trained": list(self.trained), "tested": list(self.tested)}

    def of_truth(self, truth: GroundTruth) -> GroundTruth:
        """Return the labels in the common vocabulary, without tools."""
        spec = truth.index.dataset
        common = spec.model_copy(
            update={
                "title": f"{spec.title or spec.name}, phases of {self.name}",
                "phases": self.mapping.phases,
                "background": self.mapping.background,
                "tools": (),
                **{field: {} for field in ("phase_aliases", "tool_aliases", "phase_orders", "labels", "tracks")},
            }
        )
        numbers = np.array([*self.tested, -1], dtype=np.int8)  # the last one is for frames without a label
        videos = {
            name: replace(video, phase=numbers[video.phase], tools=np.zeros((len(video.phase), 0), np.int8))
            for name, video in truth.videos.items()
        }
        return replace(truth, index=truth.index.model_copy(update={"dataset": common}), videos=videos)

    def of_predicted(self, predicted: Predicted) -> Predicted:
        """Return the predictions in the common vocabulary."""
        matrix = np.zeros((len(self.trained), len(self.mapping.phases)), np.float32)  # (C, common C)
        for own, common in enumerate(self.trained):
            matrix[own, common] = common >= 0
        numbers = np.array(self.trained, dtype=np.int8)
        mapped = {head: _mapped(videos, matrix) for head, videos in predicted.probabilities.items()}
        majority = predicted.majority
        if majority is not None:
            majority = self.trained[majority] if self.trained[majority] >= 0 else NO_PREDICTION
        return Predicted(
            probabilities=mapped,
            tool_logits={},
            majority=majority,
            labels={
                head: {
                    name: np.where(numbers[one] >= 0, numbers[one], mapped[head][name].argmax(axis=1)).astype(np.int8)
                    for name, one in videos.items()
                }
                for head, videos in predicted.labels.items()
            },
        )


def _mapped(videos: Mapping[str, NDArray[np.float32]], matrix: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    return {name: (values @ matrix).clip(0, 1) for name, values in videos.items()}
