"""The list of operations that occur in several data sets, and what follows from it."""

from __future__ import annotations

import pytest

from configs.load import dataset_names, known_overlaps, load_dataset
from configs.overlap import Overlap
from features.dataset.overlaps import overlap_lines, shared_operations

CHOLEC80 = [f"video{number:02d}" for number in range(1, 81)]
CHOLECT50 = [f"VID{number:02d}" for number in (*range(1, 81), 92, 96, 103, 110, 111)]
M2CAI16_TOOL = [f"tool_video_{number:02d}" for number in range(1, 16)]
NOT_DESCRIBED = {"m2cai16-tool", "endoscapes"}


def test_the_list_names_data_sets_that_are_described() -> None:
    names = {name for overlap in known_overlaps() for name in overlap.datasets}
    assert names - NOT_DESCRIBED <= set(dataset_names())
    assert all(overlap.source for overlap in known_overlaps())


def test_numbers_in_the_list_name_one_video_of_each_data_set() -> None:
    for overlap in known_overlaps():
        first, second = overlap.datasets
        if overlap.possible or NOT_DESCRIBED & {first, second} or "*" in overlap.same:
            continue
        ids = [[load_dataset(name).id_format.format(number=k) for k in range(1, 112)] for name in (first, second)]
        assert len(shared_operations(first, ids[0], second, ids[1])) == len(overlap.same) + len(overlap.pairs)


def test_45_of_cholect50_are_cholec80_s_and_22_of_them_are_usual_test_videos() -> None:
    pairs = shared_operations("cholec80", CHOLEC80, "cholect50", CHOLECT50)
    assert len(pairs) == 45
    assert all(one[-2:] == other[-2:] for one, other in pairs)
    assert sum(one > "video40" for one, _ in pairs) == 22
    back = shared_operations("cholect50", CHOLECT50, "cholec80", CHOLEC80)
    assert sorted(back) == sorted((other, one) for one, other in pairs)


@pytest.mark.parametrize("other", ["cholect45", "cholect50"])
def test_what_follows_from_two_entries_of_the_list(other: str) -> None:
    """The 15 videos of m2cai16-tool are Cholec80's 61, 62, 64 to 76; eight of these are in CholecT45 and CholecT50."""
    assert len(shared_operations("m2cai16-tool", M2CAI16_TOOL, "cholec80", CHOLEC80)) == 15
    pairs = shared_operations("m2cai16-tool", M2CAI16_TOOL, other, CHOLECT50)
    assert ("tool_video_04", "VID70") in pairs
    assert sorted(two for _, two in pairs) == [f"VID{number}" for number in (62, 65, 66, 68, 70, 73, 74, 75)]
    assert any(line == "m2cai16-tool: 8 operations (through other data sets)" for line in overlap_lines(other))
    assert shared_operations("endoscapes", ["1", "4"], "m2cai16-tool", M2CAI16_TOOL) == [
        ("1", "tool_video_01"),
        ("4", "tool_video_05"),
    ]


def test_hospitals_of_one_data_set_are_not_mixed() -> None:
    """Bern's and Strasbourg's videos have the same numbers, and both are in MultiBypass140."""
    both = ["BBP01", "SBP01", "SBP02"]
    assert shared_operations("multibypass140", both, "strasbypass70", ["sbp01", "SBP03"]) == [("SBP01", "sbp01")]
    assert shared_operations("bernbypass70", ["BBP01"], "multibypass140", both) == [("BBP01", "BBP01")]
    assert shared_operations("bernbypass70", ["BBP01"], "strasbypass70", ["SBP01"]) == []


def test_a_number_is_that_of_the_data_set_s_own_ids() -> None:
    assert shared_operations("cholec80", ["video01", "op01-2"], "cholect50", ["VID01", "VID02", "case 1"]) == [
        ("video01", "VID01")
    ]
    assert shared_operations("heichole", ["hei-chole2"], "phakir", ["video_07"]) == [("hei-chole2", "video_07")]


def test_the_lines_of_a_data_set() -> None:
    lines = overlap_lines("cholec80")
    assert any(line.startswith("m2cai16-workflow: possible") for line in lines)
    assert any(line.startswith("m2cai16-tool: 15 operations (CAMMA") for line in lines)
    assert overlap_lines("jigsaws") == []


@pytest.mark.parametrize("fields", [{}, {"same": [1], "possible": "same hospital"}])
def test_an_overlap_is_either_known_or_possible(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="give same or pairs, or say why"):
        Overlap(datasets=("a", "b"), **fields)
