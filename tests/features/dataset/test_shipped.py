"""The data sets described in `configs/datasets`: files of the form of each give the labels that were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs.load import PRESETS, load_dataset
from configs.schema import DataConfig
from features.dataset.build import build_index
from features.dataset.index import Dataset
from features.dataset.labels import sampled_labels
from tests.shipped_sets import WRITERS, make

NAMES = sorted(path.stem for path in (PRESETS / "datasets").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_has_the_label_that_was_written(name: str, tmp_path: Path) -> None:
    truth, spec = make(name, tmp_path), load_dataset(name)
    index = build_index(tmp_path, spec, DataConfig(unverified=bool(spec.unverified)))
    assert not index.is_partial
    assert {entry.id for entry in index.videos} == set(truth)
    for entry in index.videos:
        found = sampled_labels(Dataset(index, tmp_path), entry, DataConfig(fps=entry.most_fps))
        labels = {"phase": found.phase, "tool": found.tools, **found.tracks}
        assert truth[entry.id].keys() == set(spec.roles)
        for role, expected in truth[entry.id].items():
            np.testing.assert_array_equal(labels[role], expected, err_msg=f"{entry.id} {role}")


def test_every_description_is_tried() -> None:
    assert sorted(WRITERS) == NAMES
    assert all(load_dataset(name).name == name for name in NAMES)
