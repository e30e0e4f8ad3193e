"""The shipped mappings and overlaps fit the shipped descriptions of data sets."""

from __future__ import annotations

import pytest

from configs.load import PRESETS, dataset_names, known_overlaps, load_dataset, load_mapping

MAPPINGS = sorted(path.stem for path in (PRESETS / "mappings").glob("*.yaml"))
CHOLECYSTECTOMY = ["cholec80", "cholect45", "cholect50", "heichole", "m2cai16-workflow", "phakir", "simulated"]
# in the list, but without a description here
NOT_DESCRIBED = {"m2cai16-tool"}


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


def test_overlaps_name_data_sets_that_are_described() -> None:
    names = {name for overlap in known_overlaps() for name in overlap.datasets}
    assert names - NOT_DESCRIBED <= set(dataset_names())
    assert all(overlap.source for overlap in known_overlaps())


def test_numbers_of_overlaps_are_those_of_the_ids() -> None:
    """The id of video N of each data set ends in N, so that numbers in the list name one video."""
    for overlap in known_overlaps():
        for first, second in (overlap.datasets, overlap.datasets[::-1]):
            if overlap.possible or NOT_DESCRIBED & {first, second} or not overlap.pairs + overlap.same:
                continue
            ids = [[load_dataset(name).id_format.format(number=k) for k in range(1, 112)] for name in (first, second)]
            shared = overlap.shared(first, *ids)
            numbers = [one for one in overlap.same if isinstance(one, int)]
            assert len(shared) == len(numbers) + len(overlap.pairs) or "*" in overlap.same, (first, second)
