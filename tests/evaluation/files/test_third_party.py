"""Phase files in every common form give the same result, and everything else is one line that names file and row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import load_dataset
from evaluation.files.predictions import PredictionFile, write_prediction_csv
from evaluation.files.third_party import find_phase_files, read_external_phases
from features.dataset.formats.cholec80 import read_phase_file
from features.dataset.phase_order import parse_phase_order

CHOLEC80 = load_dataset("cholec80")
PHASES = CHOLEC80.phases


def read(path: Path, order=PHASES, **options):
    return read_external_phases(path, CHOLEC80, order, **options)


def text_file(folder: Path, text: str | bytes, name: str = "video41.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "0\t0\n25\t0\n50\t3\n",
        "0 0\n25 0\n50 3\n",
        "0,0\n25,0\n50,3\n",
        "0;0\n25;0\n50;3",
        "0\n0\n3\n",
        "0.0\n0.0\n3.0\n",
        "0.000000000000000000e+00\n0.000000000000000000e+00\n3.000000000000000000e+00\n",
        "Frame\tPhase\n0\tPreparation\n1\tPreparation\n2\tGallbladderDissection\n",
        "Frame Phase\n0\tPreparation\n25\tPreparation\n50\tGallbladderDissection\n",  # as MTRCNet's programs export
        "Frame Phase\n1 Preparation\n2 Preparation\n3 GallbladderDissection\n",
        "Preparation\nPreparation\nGallbladderDissection\n",
        "Phase\npreparation\npreparation\ngallbladder dissection\n",
        "0 Preparation\n1 preparation\n2 Gallbladder Dissection\n",
        "\ufeffFrame,Phase\r\n0,Preparation\r\n1,Preparation\r\n2,gallbladder_dissection\r\n\r\n",
        '"frame","phase"\n"0","Preparation"\n"1","Preparation"\n"2","GallbladderDissection"\n',
        "time,label\n0.04,0\n0.08,0\n0.12,3\n",
        "frame,confidence,phase\n0,0.5,0\n1,0.25,0\n2,0.1,3\n",
        "frame,phase,phase_name\n0,0,Preparation\n1,0,Preparation\n2,3,GallbladderDissection\n",
    ],
)
def test_every_form_in_use_reads_the_same(text, tmp_path):
    assert read(text_file(tmp_path, text)).phase.tolist() == [0, 0, 3]


FORMS = {
    "mark": st.sampled_from(["\t", " ", ",", ";", ", "]),
    "header": st.sampled_from([None, "mark", " "]),
    "names": st.booleans(),
    "with_frame": st.booleans(),
    "first": st.sampled_from([0, 1, 25, 1000]),
    "step": st.sampled_from([1, 2, 25, 0.04, 1 / 3]),
    "end": st.sampled_from(["\n", "\r\n"]),
    "bom": st.booleans(),
    "order": st.permutations(PHASES),
}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.fixed_dictionaries(FORMS))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_written_in_any_form_and_read_back(tmp_path, phases, form):
    order = tuple(form["order"])
    frames = [f"{form['first'] + k * form['step']:.6g}" for k in range(len(phases))]
    cells = [PHASES[p] if form["names"] else str(order.index(PHASES[p])) for p in phases]
    rows = [form["mark"].join(row) for row in zip(frames, cells, strict=True)] if form["with_frame"] else cells
    if form["header"]:
        words = ["Frame", "Phase"] if form["with_frame"] else ["Phase"]
        rows.insert(0, (form["mark"] if form["header"] == "mark" else form["header"]).join(words))
    text = form["end"].join([*rows, ""])
    found = read(text_file(tmp_path, ("\ufeff" if form["bom"] else "") + text), order)
    assert found.phase.tolist() == phases
    assert found.numbered == (not form["names"])
    assert (found.frame is not None) == form["with_frame"]


def test_real_annotations_read_as_the_strict_reader_does(shared_data):
    for path in sorted((shared_data / "clips/phase_annotations").iterdir()):
        strict = read_phase_file(path, CHOLEC80)
        found = read(path)
        assert np.array_equal(found.phase, strict.labels)
        assert np.array_equal(found.frame, strict.frame_index)
        assert not found.numbered


def test_our_prediction_files_determine_the_rate_and_ignore_the_order(tmp_path):
    path = tmp_path / "video07.csv"
    phase = np.array([0, 4, 6], np.int8)
    write_prediction_csv(
        path, PredictionFile(np.arange(3) * 25, np.arange(3) / 2, phase, np.eye(7)[phase], None), CHOLEC80
    )
    found = read(path)
    assert found.phase.tolist() == [0, 4, 6]
    assert found.fps == pytest.approx(2)
    assert not found.numbered
    path.write_text(path.read_text().replace("50,1.000,6,GallbladderRetraction", "50,1.000,6,GallbladderPackaging"))
    with pytest.raises(
        UserError, match=r"video07\.csv: row 3 \(line 4\).*'GallbladderPackaging'; id and name must agree"
    ):
        read(path)


def test_another_numbering_is_translated(tmp_path):
    path = text_file(tmp_path, "4\n5\n6\n")
    order = parse_phase_order("tf-cholec80", CHOLEC80, str(path))
    assert read(path, order).phase.tolist() == [6, 5, 4]


@pytest.mark.parametrize(
    ("text", "phases"),
    [
        ("-1\n0\n", [-1, 0]),
        ("-1\n-1.0\n", [-1, -1]),
        ("0\t-1\n1\tPreparation\n2\t-1\n", [-1, 0, -1]),
        ("Frame\tPhase\r\n0\tPreparation\r\n25\t\r\n50\tClippingCutting\r\n75\t\r\n", [0, -1, 2, -1]),
        ("0\t\n1\t\n", [-1, -1]),
        ("0,3\n1,\n2,3\n", [3, -1, 3]),
        ("Preparation\n\nPreparation\n", [0, -1, 0]),
        ("Frame,Phase\n0,0\n25,1\n100,2\n", [0, 1, -1, -1, 2]),
        ("0 Preparation\n1 Preparation\n3 Preparation\n", [0, 0, -1, 0]),
        ("0 0\n1 0\n3 0\n4 0\n6 0\n7 1\n", [0, 0, 0, 0, 0, 1]),  # 30 fps sampled at 20
        ("0 0\n2 0\n5 0\n7 0\n10 0\n15 1\n17 1\n", [0, 0, 0, 0, 0, -1, 1, 1]),  # 25 fps sampled at 10, one row missing
    ],
)
def test_minus_one_empty_cells_and_missing_rows_are_no_label(text, phases, tmp_path):
    found = read(text_file(tmp_path, text))
    assert found.phase.tolist() == phases
    assert found.frame is None or len(found.frame) == len(phases)
    assert found.missing == len(phases) - len([line for line in text.split("\n")[:-1] if not line.startswith("Frame")])


def test_rows_are_filled_in_at_their_own_numbers(tmp_path):
    found = read(text_file(tmp_path, "10\t0\n35\t0\n110\t1\n135\t1\n"))
    assert found.frame.tolist() == [10, 35, 60, 85, 110, 135]
    assert found.step == 25


def test_frames_of_a_variable_rate_are_rows_of_their_own(tmp_path):
    """Like our prediction files of such videos: times give the rate, and a row is missing only if both columns skip
    it.
    """
    frame = np.array(
        [0, 24, 50, 74, 75, 100, 126, 175]
    )  # a pause of five seconds before 75, then a lost row before 175
    time_s = np.array([0, 1.01, 1.98, 2.99, 8, 9, 10, 12])
    path = tmp_path / "video41.csv"
    write_prediction_csv(
        path, PredictionFile(frame, time_s, np.zeros(8, np.int8), np.eye(7)[np.zeros(8, int)], None), CHOLEC80
    )
    found = read(path)
    assert found.phase.tolist() == [0] * 7 + [-1, 0]
    assert found.frame.tolist() == [*frame[:7], 150.5, 175]
    assert found.fps == pytest.approx(1, rel=0.02)


ONE_HOT = "1 0 0 0 0 0 0\n0 0 0 0 0 0 1\n0 0 0 0 1 0 0\n"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (ONE_HOT, "one-hot rows"),
        (ONE_HOT.replace(" ", ","), "one-hot rows"),
        (ONE_HOT.replace("1", "1e0").replace("0 ", "0.0 ").replace("e0.0", "e0"), "one-hot rows"),
        (
            "".join(f"{25 * k}\t" + line.replace(" ", "\t") + "\n" for k, line in enumerate(ONE_HOT.splitlines())),
            "one-hot rows",
        ),
        (
            ",0,1,2,3,4,5,6\n" + "".join(f"{k},{line}\n" for k, line in enumerate(ONE_HOT.replace(" ", ",").split())),
            "one-hot rows",
        ),
        ("0 1 2 3 4 5 6\n" + ONE_HOT, "one-hot rows"),
        (".9,.1,0,0,0,0,0\n.1,.1,0,0,0,.2,.6\n.1,.1,0,0,.5,.1,.2\n", "probabilities or scores"),
        ("-1e1 -11 -12 -13 -14 -15 -16\n-3 -3 -3 -3 -3 -3 2.5\n0 1 2 3 9 -5 -6\n", "probabilities or scores"),
    ],
)
def test_one_hot_rows_and_scores_are_read_once_their_columns_are_named(text, kind, tmp_path):
    path = text_file(tmp_path, text)
    with pytest.raises(UserError, match=f"{kind}, one column for each of 7 phases; say which column .* --phase-order"):
        read(path, None)
    assert read(path).phase.tolist() == [0, 6, 4]
    order = parse_phase_order("tf-cholec80", CHOLEC80, str(path))
    assert read(path, order).phase.tolist() == [0, 4, 6]
    assert read(path).numbered


def test_a_header_that_names_a_column_for_every_phase_is_enough(tmp_path):
    names = [*PHASES[1:], PHASES[0]]
    path = text_file(
        tmp_path, ",".join(["frame", *(f"p_{name}" for name in names)]) + "\n0,0,0,0,0,0,0,1\n25,1,0,0,0,0,0,0\n"
    )
    assert read(path, None).phase.tolist() == [0, 1]
    path = text_file(tmp_path, " ".join(names) + "\n0 0 0 0 0 .5 .5\n1 0 0 0 0 0 0\n0 0 0 0 0 0 0\n")
    assert read(path, None).phase.tolist() == [0, 1, 0]  # not one-hot: the first of equals


def test_a_one_hot_row_without_a_one_is_no_label(tmp_path):
    assert read(text_file(tmp_path, "0 0 0 0 0 0 0\n0 1 0 0 0 0 0\n")).phase.tolist() == [-1, 1]


def test_recognition_files_of_ms_tcn(tmp_path):
    path = text_file(tmp_path, "### Frame level recognition: ###\nPreparation Preparation clipping_cutting", "video41")
    assert read(path).phase.tolist() == [0, 0, 2]
    assert find_phase_files(tmp_path, CHOLEC80)[0] == {"video41": path}
    path = text_file(tmp_path, "### Frame level recognition: ###\nPreparation SIL", "video41")
    with pytest.raises(UserError, match=r"video41: row 2 has the unknown phase 'SIL'"):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no rows"),
        ("Frame\tPhase\n", "contains no rows"),
        ("\n\n", "contains no rows"),
        (b"\xff\xfe0\x00\n", "UTF-16; save it as UTF-8"),
        ("0\t0\n1\t7\n", r"row 2 \(line 2\) has phase '7'; ids of cholec80 are 0 to 6, and -1 for no label$"),
        ("0 499 Preparation\n500 999 CalotTriangleDissection\n", r"line 1 looks like a segment .*one row per frame"),
        ("Preparation\t0\t499\n", r"line 1 looks like a segment"),
        ("start,end,phase\n0,499,Preparation\n", r"the header names segments \(start,end,phase\)"),
        ("[1. 0. 0. 0. 0. 0. 0.]\n", "contains JSON or lists in brackets"),
        ('[{"frame": 0, "phase": 1}]\n', "contains JSON or lists in brackets, which"),
        ("0 video41 0 [0.1, 0.9] 1\n1 video41 1 [0.1, 0.9] 1\n", "contains JSON or lists in brackets"),
        ("0,0,0,1,1,0,0\n", r"row 1 .*has several ones, like tool labels"),
        ("0.1,nan,0,1,1,0,0\n", r"row 1 .*has score 'nan'"),
        ("0\t1\t2\t3\n", r"has 4 columns and no header .*a column for each of the 7 phases"),
        (
            "0\t0\n1\t0\n900\t0\n",
            "has frame 900 after 1, but rows are usually 450 apart|more rows are missing than present",
        ),
        ("### Frame level recognition: ###\n", "contains no rows"),
        ("1\n2\n7\n", r"row 3 .*seems to count from 1: write Preparation as 0"),
        (
            "Frame\tPhase\n0\tPreparation\n1\tPreperation\n",
            r"row 2 \(line 3\) has the unknown phase 'Preperation'; .*Preparation.*phase_aliases",
        ),
        ("0\tPreparation\n1\t3\n", r"row 2 .*ids and names are mixed"),
        ("0\t0\n\n1\t0\n", r"row 2 \(line 2\) is blank"),
        ("0\t0\n1\n", r"row 2 .*has 1 column\(s\), not 2"),
        ("0,0\n1,0\n2", r"row 3 .*has 1 column\(s\), not 2"),
        ("0\t0\t1\n", r"3 columns and no header"),
        ("0\t0\n2\t0\n4\t0\n9\t0\n", r"row 4 .*has frame 9 after 4, but rows are usually 2 apart"),
        ("0\t0\n25\t0\n25\t0\n", r"row 3 .*has frame 25 after 25"),
        ("a\t0\nb\t0\n", r"row 1 .*has frame 'a', which is not a number"),
        ("frame,gt,pred\n0,0,0\n", "names 2 columns that could be the phase"),
        ("frame,score,other\n0,0,0\n", "names no column of phases"),
        ("0\t1.5\n", r"has phase '1\.5'"),
        ("0\tnan\n", "unknown phase 'nan'"),
        ("x" * 5000, r"unknown phase 'x{57}\.\.\.'"),
        (b"\x00\x01\x02", "unknown phase"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_file_and_row(text, message, tmp_path):
    path = text_file(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path, content):
    path = text_file(tmp_path, content)
    message = ""
    try:
        phase = read(path).phase
    except UserError as error:
        message, phase = str(error), np.zeros(1)
    assert message == "" or message.startswith(str(path))
    assert "\n" not in message
    assert ((phase >= -1) & (phase < 7)).all()


def test_files_are_found_by_the_number_of_the_video(tmp_path):
    names = ["video41-phase.txt", "42.txt", "video_43.csv", "Video 44 epoch25.txt", "cholec80_045.tsv", "046-phase.TXT"]
    for name in [*names, "readme.txt", "video41-tool.txt", "video41-timestamp.txt", ".47.txt", "48.pkl"]:
        text_file(tmp_path, "0\n", name)
    (tmp_path / "video49.txt").mkdir()
    found, without = find_phase_files(tmp_path, CHOLEC80)
    assert {video: path.name for video, path in found.items()} == {
        f"video{number}": name for number, name in zip(range(41, 47), names, strict=True)
    }
    assert without == ["48.pkl", "readme.txt"]


def test_files_named_like_the_videos_of_a_data_set_without_numbers_are_found_by_their_ids(tmp_path):
    spec = CHOLEC80.model_copy(update={"patterns": CHOLEC80.patterns.model_copy(update={"phase": r"(?P<id>.+)\.txt"})})
    names = {"病例 一号": "病例 一号.txt", "case#3 100%": "case#3 100%25.csv", "Größe": "Gro\u0308\u00dfe.txt"}
    for name in names.values():
        text_file(tmp_path, "0\n", name)
    found, without = find_phase_files(tmp_path, spec)
    assert ({video: path.name for video, path in found.items()}, without) == (names, [])


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="not a folder that can be read"):
        find_phase_files(tmp_path / "no", CHOLEC80)
    with pytest.raises(UserError, match="contains no file with a video number"):
        find_phase_files(tmp_path, CHOLEC80)
    text_file(tmp_path, "0\n", "1-2.txt")
    with pytest.raises(UserError, match=r"1-2\.txt: the name has several numbers"):
        find_phase_files(tmp_path, CHOLEC80)
    (tmp_path / "1-2.txt").rename(tmp_path / "video41.txt")
    text_file(tmp_path, "0\n", "41.txt")
    with pytest.raises(UserError, match=r"video41\.txt and .*41\.txt: two files for video 41"):
        find_phase_files(tmp_path, CHOLEC80)
