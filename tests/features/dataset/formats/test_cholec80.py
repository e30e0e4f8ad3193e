"""Annotation files: what is read, what is tolerated, what is refused, and the messages."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import load_dataset
from features.dataset.annotations import LabelTrack
from features.dataset.formats.cholec80 import (
    parse_phases,
    parse_tools,
    read_phase_file,
    read_tool_file,
    write_label_file,
)

SPEC = load_dataset("cholec80")
PHASE_FILE = Path("video01-phase.txt")
TOOL_FILE = Path("video01-tool.txt")
TOOL_HEADER = "Frame\t" + "\t".join(SPEC.tools)


def phases(text: str, spec: DataSetSpec = SPEC) -> LabelTrack:
    return parse_phases(text.encode(), PHASE_FILE, spec)


def tools(text: str, spec: DataSetSpec = SPEC) -> LabelTrack:
    return parse_tools(text.encode(), TOOL_FILE, spec)


# ---------------------------------------------------------------------------------------------- round trip


@settings(deadline=None, max_examples=60)
@given(
    phase=st.lists(st.integers(0, 6), min_size=2, max_size=40),
    stride=st.integers(1, 3000),
    late=st.integers(0, 5),
)
def test_phases_survive_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, phase: list[int], stride: int, late: int
) -> None:
    first = 0 if late == 0 else late * stride + 1
    track = LabelTrack(first + stride * np.arange(len(phase)), np.array(phase, dtype=np.int8), stride)
    path = tmp_path_factory.mktemp("round") / "video01-phase.txt"
    write_label_file(path, track, SPEC)
    back = read_phase_file(path, SPEC)
    assert back.frame_index.tolist() == track.frame_index.tolist()
    assert back.frame_index.dtype == np.int64
    assert back.labels.tolist() == phase
    assert back.labels.dtype == np.int8
    assert back.stride == stride


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(0, 1), min_size=7, max_size=7), min_size=2, max_size=30),
    stride=st.integers(1, 100),
    order=st.permutations(range(7)),
)
def test_tools_survive_writing_and_are_found_by_name(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], stride: int, order: list[int]
) -> None:
    path = tmp_path_factory.mktemp("round") / "video01-tool.txt"
    track = LabelTrack(stride * np.arange(len(rows)), np.array(rows, dtype=np.int8), stride)
    shuffled = SPEC.model_copy(update={"tools": tuple(SPEC.tools[i] for i in order)})
    write_label_file(path, LabelTrack(track.frame_index, track.labels[:, order], stride), shuffled)
    back = read_tool_file(path, SPEC)
    assert back.labels.tolist() == rows
    assert back.labels.dtype == np.int8
    assert (back.frame_index.tolist(), back.stride) == (track.frame_index.tolist(), stride)


def test_files_are_written_as_cholec80_has_them(tmp_path: Path) -> None:
    write_label_file(tmp_path / "p.txt", LabelTrack(np.array([0, 1]), np.array([0, 6]), 1), SPEC)
    assert (tmp_path / "p.txt").read_bytes() == b"Frame\tPhase\n0\tPreparation\n1\tGallbladderRetraction\n"
    write_label_file(tmp_path / "t.txt", LabelTrack(np.array([0, 25]), np.eye(2, 7, dtype=np.int8), 25), SPEC)
    rows = b"0\t1\t0\t0\t0\t0\t0\t0\n25\t0\t1\t0\t0\t0\t0\t0\n"
    assert (tmp_path / "t.txt").read_bytes() == TOOL_HEADER.encode() + b"\n" + rows


@pytest.mark.parametrize("part", ["clips", "mini-cholec80"])
def test_real_files_are_rewritten_to_the_byte(shared_data: Path, tmp_path: Path, part: str) -> None:
    phase_files = sorted((shared_data / part / "phase_annotations").iterdir())
    assert len(phase_files) == 5
    for path in phase_files:
        track = read_phase_file(path, SPEC)
        assert track.stride == 1
        write_label_file(tmp_path / path.name, track, SPEC)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    for path in sorted((shared_data / part / "tool_annotations").iterdir()):
        tool_track = read_tool_file(path, SPEC)
        assert tool_track.stride == 25
        write_label_file(tmp_path / path.name, tool_track, SPEC)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_long_video_is_parsed_with_little_work_a_row(shared_data: Path) -> None:
    path = shared_data / "mini-cholec80" / "phase_annotations" / "video03-phase.txt"
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        track = read_phase_file(path, SPEC)
    finally:
        sys.setprofile(None)
    assert len(track.frame_index) == 145_700
    assert len(calls) < 2 * len(track.frame_index)  # Python functions, which take the time


# ---------------------------------------------------------------------------------------------- tolerated


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffFrame\tPhase\n0\tPreparation\n25\tClippingCutting\n",
        "Frame\tPhase\r\n0\tPreparation\r\n25\tClippingCutting\r\n",
        "\ufeffFrame\tPhase\r\n0\tPreparation\r\n25\tClippingCutting\r\n\r\n",
        "Frame\tPhase\r0\tPreparation\r25\tClippingCutting",
        "Frame\tPhase\n0\tPreparation\n25\tClippingCutting\n\n \n\t\t\n",
        "Frame\tPhase\t\t\n0\tPreparation\t\n25\tClippingCutting \t \n",
        "frame\tPHASE\n 0\t Preparation\n025\tClippingCutting",
    ],
)
def test_what_editors_add_changes_nothing(text: str) -> None:
    track = phases(text)
    assert track.frame_index.tolist() == [0, 25]
    assert track.labels.tolist() == [0, 2]
    assert track.stride == 25


def test_a_single_row_counts_as_stride_one() -> None:
    assert phases("Frame\tPhase\n0\tPreparation\n").stride == 1


def test_every_third_frame_is_stride_three() -> None:
    assert tools(TOOL_HEADER + "".join(f"\n{frame}" + "\t0" * 7 for frame in (0, 3, 6))).stride == 3


def test_other_spellings_are_read_where_the_data_set_names_them() -> None:
    spec = SPEC.model_copy(
        update={"phase_aliases": {"Trocar placement": "Preparation"}, "tool_aliases": {"Bag": "SpecimenBag"}}
    )
    assert phases("Frame\tPhase\n0\tTrocar placement\n", spec).labels.tolist() == [0]
    header = TOOL_HEADER.replace("SpecimenBag", "Bag")
    assert tools(f"{header}\n0\t0\t0\t0\t0\t0\t0\t1\n", spec).labels.tolist() == [[0, 0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("spelled", "phase"),
    [
        ("Calot triangle dissection", 1),
        ("calot-triangle_DISSECTION", 1),
        ("Clipping and cutting", 2),
        ("clipping-and-cutting", 2),
        ("Clipping & Cutting", 2),
        ("clipping&cutting", 2),
        ("ClippingAndCutting", 2),
        ("clipping\u2013cutting", 2),
        ("gallbladder\u00a0packaging", 4),
    ],
)
def test_class_names_are_known_however_they_are_spelled(spelled: str, phase: int) -> None:
    assert phases(f"Frame\tPhase\n0\t{spelled}\n").labels.tolist() == [phase]


def test_tool_names_are_known_however_they_are_spelled() -> None:
    header = TOOL_HEADER.replace("SpecimenBag", "specimen bag").replace("Hook", "HOOK")
    assert tools(f"{header}\n0\t0\t0\t1\t0\t0\t0\t1\n").labels.tolist() == [[0, 0, 1, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    "text",
    [
        "Frame\tPhase\n0\tPreparation\n1\t-1\n2\t\n",
        "Frame\tPhase\n0\tPreparation\n1\t\n2\t-1\n",
        "Frame\tPhase\t\n0\tPreparation\t\n1\t \t\n2\t\t\n\n",
    ],
)
def test_minus_one_and_an_empty_cell_are_no_label(text: str, tmp_path: Path) -> None:
    track = phases(text)
    assert track.labels.tolist() == [0, -1, -1]
    write_label_file(tmp_path / "video01-phase.txt", track, SPEC)
    assert read_phase_file(tmp_path / "video01-phase.txt", SPEC).labels.tolist() == [0, -1, -1]


def test_missing_values_as_pandas_and_r_write_them_are_no_label() -> None:
    assert phases("Frame\tPhase\n0\tPreparation\n1\tnan\n2\tNA\n").labels.tolist() == [0, -1, -1]
    rows = "\n0\t1.0\tNaN\t0.0\t0\t0\t0\t0\n"
    assert tools(TOOL_HEADER + rows).labels.tolist() == [[1, -1, 0, 0, 0, 0, 0]]


def test_a_missing_label_of_one_tool_does_not_affect_the_others() -> None:
    rows = "\n0\t1\t-1\t0\t0\t0\t0\t0\n25\t1\t0\t0\t0\t0\t0\t\n"
    assert tools(TOOL_HEADER + rows).labels.tolist() == [[1, -1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, -1]]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"phases": ("Clip and cut", "ClipCut")}, "'ClipCut' of the phases cannot be told apart from 'Clip and cut'"),
        ({"tools": ("Hook", "hook")}, "'hook' of the tools cannot be told apart from 'Hook'"),
        (
            {"phase_aliases": {"preparation": "ClippingCutting"}},
            "'preparation' of the phases cannot be told apart from 'Prep",
        ),
    ],
)
def test_a_description_whose_names_are_one_is_refused(changes: dict, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        DataSetSpec.model_validate(SPEC.model_dump() | changes)


def test_numbers_in_names_stay_apart() -> None:
    names = ("Step 1-1", "Step 11", "Step 1", "Band", "B")
    spec = SPEC.model_copy(update={"phases": names})
    assert phases("Frame\tPhase\n0\tstep_1_1\n1\tSTEP 11\n2\tband\n", spec).labels.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("numbers", "stride"),
    [
        ([0, 1, 2, 4, 5, 9], 1),
        ([0, 25, 50, 125, 150], 25),
        ([1, 26, 51], 25),
        ([0, 30, 60, 90, 119, 149, 179, 239], 30),  # one row per second of 29.97 fps, one missing
        ([0, 12, 25, 37, 50, 62], 13),  # two a second of 25 fps
        ([7], 1),
    ],
)
def test_rows_may_be_missing_and_distances_rounded(numbers: list[int], stride: int) -> None:
    track = phases("Frame\tPhase\n" + "".join(f"{number}\tPreparation\n" for number in numbers))
    assert (track.frame_index.tolist(), track.stride) == (numbers, stride)


def test_a_late_start_is_read_as_it_stands() -> None:
    track = phases("Frame\tPhase\n100\tPreparation\n125\tPreparation\n")
    assert (track.frame_index[0], track.stride) == (100, 25)


# ---------------------------------------------------------------------------------------------- refused

BAD_PHASES = {
    "": "is empty",
    "\ufeff": "is empty",
    "\n\n\t\n": "is empty",
    "Frame\tPhase\n": "has no row below the header",
    "0\tPreparation\n1\tPreparation\n": "line 1 has no header; expected Frame<TAB>Phase",
    "Frame\n0\n": "line 1 has the header 'Frame'; expected Frame<TAB>Phase",
    "Frame Phase\n0 Preparation\n": "line 1 has the header 'Frame Phase'; expected Frame<TAB>Phase, separated by tabs",
    "Frame\tPhase\tX\n0\tPreparation\t1\n": "line 1 has the header 'Frame Phase X'",
    "\n\nFrame\tPhase\n0\tPreparation\n": "line 1 has the header ''",
    "Frame\tPhase\n0\tPreparation\n1\n": "row 2 (line 3) has 1 column; expected 2",
    "Frame\tPhase\n0\tPreparation\n1\n\n": "row 2 (line 3) has 1 column; expected 2",
    "Frame\tPhase\n0\tPreparation\n1\tPreparation\t7\n": "row 2 (line 3) has 3 columns; expected 2",
    "Frame\tPhase\n0\tPreparation\n\n1\tPreparation\n": "row 2 (line 3) is blank; expected 2, separated by tabs",
    "Frame\tPhase\n0\tPreparation\nx\tPreparation\n": "row 2 (line 3) frame 'x' is not a whole number",
    "Frame\tPhase\n\tPreparation\n": "row 1 (line 2) frame '' is not a whole number",
    "Frame\tPhase\n-1\tPreparation\n": "row 1 (line 2) frame '-1' is not a whole number of 0 or more",
    "Frame\tPhase\n0\tPreparation\n1.0\tPreparation\n": "row 2 (line 3) frame '1.0'",
    "Frame\tPhase\n0\tPreparation\n1e3\tPreparation\n": "row 2 (line 3) frame '1e3'",
    "Frame\tPhase\n0\tPreparation\n1_0\tPreparation\n": "row 2 (line 3) frame '1_0'",
    "Frame\tPhase\n0\tPreparation\n٢\tPreparation\n": "row 2 (line 3) frame '٢'",
    f"Frame\tPhase\n0\tPreparation\n{'9' * 5000}\tPreparation\n": "row 2 (line 3) frame '9999",
    "Frame\tPhase\n0\tPrepration\n": "row 1 (line 2) unknown phase 'Prepration'; did you mean Preparation?",
    "Frame\tPhase\n0\tCutting\n": "; or add it to phase_aliases in the description of cholec80",
    "Frame\tPhase\n0\tPreparation\n1\t3\n": "row 2 (line 3) unknown phase '3' (known: Preparation, CalotTri",
    "Frame\tPhase\n0\tPreparation\n1\tPreparation\n1\tPreparation\n": "row 3 (line 4) frame 1 comes twice",
    "Frame\tPhase\n0\tPreparation\n1\tPreparation\n0\tPreparation\n": "row 3 (line 4) frame 0 comes after 1",
    "Frame\tPhase\n0\tPreparation\n2\tPreparation\n4\tPreparation\n5\tPreparation\n": (
        "row 4 (line 5) frame 5 follows 4, where 6 was due (rows are 2 apart)"
    ),
    "Frame\tPhase\n0\tPreparation\n25\tPreparation\n50\tPreparation\n60\tPreparation\n": (
        "row 4 (line 5) frame 60 follows 50, where 75 was due"
    ),
}


@pytest.mark.parametrize(("text", "problem"), BAD_PHASES.items())
def test_a_faulty_phase_file_is_refused_naming_file_and_row(text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        phases(text)
    message = str(caught.value)
    assert message.startswith("video01-phase.txt: ")
    assert problem in message
    assert "\n" not in message


ROW = "\t0" * 7
BAD_TOOLS = {
    f"0{ROW}\n": "line 1 has no header; expected Frame<TAB>Grasper<TAB>Bipolar",
    f"{TOOL_HEADER}\n0{ROW}\n25\t0\t0\n": "row 2 (line 3) has 3 columns; expected 8",
    f"{TOOL_HEADER}\n0{ROW}\t0\n": "row 1 (line 2) has 9 columns; expected 8",
    f"{TOOL_HEADER}\n0\t0\t2\t0\t0\t0\t0\t0\n": "row 1 (line 2) Bipolar is '2', not 0 or 1",
    f"{TOOL_HEADER}\n0{ROW}\n25\t0\t0\t0\t0\t0\tx\t0\n": "row 2 (line 3) Irrigator is 'x', not 0 or 1",
    f"{TOOL_HEADER}\n0\t0\t-2\t0\t0\t0\t0\t0\n": "Bipolar is '-2', not 0 or 1 (-1 or empty: no label)",
    TOOL_HEADER.replace("Hook", "Hok") + f"\n0{ROW}\n": "line 1 has the unknown tool 'Hok'; did you mean Hook?",
    TOOL_HEADER.replace("\tHook", "") + "\n0\t0\t0\t0\t0\t0\t0\n": "line 1 lacks the tool Hook",
    "Frame\tGrasper\n0\t0\n": "line 1 lacks the tools Bipolar, Hook, Scissors, Clipper, Irrigator, SpecimenBag",
    f"{TOOL_HEADER}\tHook\n0{ROW}\t0\n": "line 1 has the tool Hook twice",
    f"{TOOL_HEADER}\tStapler\n0{ROW}\t0\n": "line 1 has the unknown tool 'Stapler'",
}


@pytest.mark.parametrize(("text", "problem"), BAD_TOOLS.items())
def test_a_faulty_tool_file_is_refused_naming_file_and_row(text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        tools(text)
    assert str(caught.value).startswith("video01-tool.txt: ")
    assert problem in str(caught.value)


def test_tools_of_a_data_set_without_tools_are_refused() -> None:
    with pytest.raises(UserError, match=r"video01-tool\.txt: data set m2cai16-workflow has no tools"):
        tools(f"{TOOL_HEADER}\n0{ROW}\n", load_dataset("m2cai16-workflow"))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone-phase\.txt: no such file"):
        read_phase_file(tmp_path / "gone-phase.txt", SPEC)
    with pytest.raises(UserError, match="cannot be read"):
        read_tool_file(tmp_path, SPEC)
    wide = tmp_path / "video01-phase.txt"
    wide.write_bytes("Frame\tPhase\n0\tPreparation\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"video01-phase\.txt: is text in UTF-16; save it as UTF-8"):
        read_phase_file(wide, SPEC)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
@example(b"\xff\xfe")
@example(b"Frame\tPhase\n" + b"\x00" * 10)
def test_random_bytes_raise_nothing_but_user_errors(content: bytes) -> None:
    for parse in (parse_phases, parse_tools):
        with pytest.raises(UserError):
            parse(content, PHASE_FILE, SPEC)


VALID = b"Frame\tPhase\n0\tPreparation\n25\tClippingCutting\n50\tClippingCutting\n"


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 3), st.binary(max_size=4)), max_size=3))
def test_damaged_files_parse_to_valid_values_or_raise_user_errors(damage: list[tuple[int, int, bytes]]) -> None:
    content = VALID
    for at, removed, inserted in damage:
        content = content[:at] + inserted + content[at + removed :]
    try:
        track = parse_phases(content, PHASE_FILE, SPEC)
    except UserError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith(f"{PHASE_FILE}: ")
        assert len(refusal.splitlines()) == 1
        return
    assert len(track.frame_index) == len(track.labels) >= 1
    assert (np.diff(track.frame_index) > 0).all()
    assert ((track.labels >= -1) & (track.labels < 7)).all()
