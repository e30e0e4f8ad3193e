"""The shipped mappings fit the shipped descriptions of data sets."""

from __future__ import annotations

import pytest

from configs.load import PRESETS, load_dataset, load_mapping

MAPPINGS = sorted(path.stem for path in (PRESETS / "mappings").glob("*.yaml"))
CHOLECYSTECTOMY = ["cholec80", "cholect45", "cholect50", "heichole", "m2cai16-workflow", "phakir", "simulated"]


@pytest.mark.parametrize("name", MAPPINGS)
def test_every_data_set_of_a_mapping_has_the_phases_that_it_lists(name: str) -> None:
    mapping = load_mapping(name)
    for dataset in mapping.datasets:
        mapping.common_ids(dataset, load_dataset(dataset).phases, name)


@pytest.mark.parametrize("name", CHOLECYSTECTOMY)
def test_the_seven_phases_of_gallbladder_removals(name: str) -> None:
    """Every common phase is one phase of the data set; only M2CAI16 has another one, which is left out."""
    spec = load_dataset(name)
    ids = load_mapping("cholecystectomy").common_ids(name, spec.phases, "cholecystectomy")
    assert sorted(one for one in ids if one >= 0) == list(range(7))
    left_out = [phase for phase, one in zip(spec.phases, ids, strict=True) if one < 0]
    assert left_out == (["TrocarPlacement"] if name == "m2cai16-workflow" else [])


def test_both_cataract_data_sets_have_all_ten_common_phases() -> None:
    mapping = load_mapping("cataract")
    for name in ("cataract-101", "cataract-1k"):
        ids = mapping.common_ids(name, load_dataset(name).phases, "cataract")
        assert {one for one in ids if one >= 0} == set(range(10))
