"""Decoded labels in a common vocabulary."""

from __future__ import annotations

import numpy as np

from configs.load import load_mapping
from stage2_temporal.mapped import PhaseMapping
from stage2_temporal.scoring import Predicted


def test_decoded_labels_are_mapped_and_phases_left_out_become_the_most_probable_common_one() -> None:
    mapping = load_mapping("cholecystectomy")
    common = PhaseMapping("two", mapping, trained=(1, -1, 0, 1), tested=(0, 1))
    probabilities = np.array([[0.1, 0.5, 0.3, 0.1], [0.4, 0.1, 0.1, 0.4], [0.2, 0.4, 0.1, 0.3]], np.float32)
    decoded = {"temporal": {"a": np.array([2, 2, 1], np.int8)}}
    predicted = Predicted(
        probabilities={"temporal": {"a": probabilities}, "undecoded": {"a": probabilities}},
        tool_logits={},
        labels=decoded,
    )
    found = common.of_predicted(predicted)
    assert found.labels["temporal"]["a"].tolist() == [0, 0, 1]
    np.testing.assert_allclose(found.probabilities["temporal"]["a"][:, :2], [[0.3, 0.2], [0.1, 0.8], [0.1, 0.5]])
    assert "undecoded" not in found.labels
