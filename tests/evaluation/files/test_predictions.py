"""Prediction files: the exact text, the round trip, and every kind of damage named with file and row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from evaluation.files.predictions import PredictionFile, prediction_columns, read_prediction_csv, write_prediction_csv

PATTERNS = {
    "video": r"v(?P<id>\d+)\.mp4",
    "frames": r"v(?P<id>\d+)",
    "frame": r"(?P<frame>\d+)\.png",
    "phase": r"v(?P<id>\d+)-phase\.txt",
    "tool": r"v(?P<id>\d+)-tool\.txt",
}


def data_set(phases=("Open", "Close"), tools=("Hook",)) -> DataSetSpec:
    return DataSetSpec(name="toy", annotation_fps=25, phases=phases, tools=tools, patterns=PATTERNS)


SPEC = data_set()
TEXT = """frame,time_s,phase,phase_name,p_Open,p_Close,p_Hook
0,0.000,0,Open,0.9,0.1,0.25
25,1.000,1,Close,1e-04,0.9999,1.0
"""


def write(path, spec=SPEC, tools=True, frames=2):
    rng = np.random.default_rng(0)
    probabilities = rng.random((frames, len(spec.phases))).astype(np.float32)
    tool_probabilities = rng.random((frames, len(spec.tools))).astype(np.float32) if tools else None
    frame_index = np.arange(frames) * 25
    write_prediction_csv(
        path,
        PredictionFile(frame_index, frame_index / 25, probabilities.argmax(1), probabilities, tool_probabilities),
        spec,
    )
    return probabilities, tool_probabilities


def test_exact_text(tmp_path):
    path = tmp_path / "new" / "video01.csv"
    write_prediction_csv(
        path,
        PredictionFile(
            np.array([0, 25]),
            np.array([0.0, 1.0]),
            np.array([0, 1], dtype=np.int8),
            np.array([[0.9, 0.1], [0.0001, 0.9999]]),
            np.array([[0.25], [1.0]]),
        ),
        SPEC,
    )
    assert path.read_bytes() == TEXT.encode()
    assert [p.name for p in path.parent.iterdir()] == ["video01.csv"]


def test_header_follows_the_data_set():
    assert prediction_columns(SPEC, tools=False) == ["frame", "time_s", "phase", "phase_name", "p_Open", "p_Close"]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_round_trip_is_exact(tmp_path_factory, data):
    frames = data.draw(st.integers(1, 12))
    tools = data.draw(st.booleans())
    spec = data_set(("Open, then", 'say "close"', "Klammer ü"), ("Hook", "Clip"))
    unit = st.floats(0, 1, width=32)
    frame_index = np.cumsum(data.draw(st.lists(st.integers(1, 10**6), min_size=frames, max_size=frames)))
    time_s = np.array(data.draw(st.lists(st.integers(0, 10**8), min_size=frames, max_size=frames))) / 1000
    phase = data.draw(hnp.arrays(np.int8, frames, elements=st.integers(0, 2)))
    probabilities = data.draw(hnp.arrays(np.float32, (frames, 3), elements=unit))
    tool_probabilities = data.draw(hnp.arrays(np.float32, (frames, 2), elements=unit)) if tools else None
    folder = tmp_path_factory.mktemp("csv")
    write_prediction_csv(
        folder / "a.csv", PredictionFile(frame_index, time_s, phase, probabilities, tool_probabilities), spec
    )
    read = read_prediction_csv(folder / "a.csv", spec)
    np.testing.assert_array_equal(read.frame_index, frame_index)
    np.testing.assert_array_equal(read.time_s, time_s)
    np.testing.assert_array_equal(read.phase, phase)
    np.testing.assert_array_equal(read.probabilities, probabilities)
    if tools:
        np.testing.assert_array_equal(read.tool_probabilities, tool_probabilities)
    else:
        assert read.tool_probabilities is None
    write_prediction_csv(
        folder / "b.csv",
        PredictionFile(read.frame_index, read.time_s, read.phase, read.probabilities, read.tool_probabilities),
        spec,
    )
    assert (folder / "a.csv").read_bytes() == (folder / "b.csv").read_bytes()


def test_data_set_without_tools(tmp_path):
    spec = data_set(tools=())
    write(tmp_path / "v.csv", spec, tools=False)
    assert read_prediction_csv(tmp_path / "v.csv", spec).tool_probabilities is None


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "v.csv"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    read = read_prediction_csv(path, SPEC)
    assert read.phase.tolist() == [0, 1]
    assert read.tool_probabilities.tolist() == [[0.25], [1.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no predictions"),
        (TEXT.splitlines()[0] + "\n", "contains no predictions"),
        (TEXT[:-5], r"row 3 is cut off"),
        (TEXT.replace("p_Open,p_Close", "p_Close,p_Open"), r"row 1: column 5 is 'p_Close'.*'p_Open'"),
        (TEXT.replace(",p_Hook", ",p_Clip"), r"row 1: column 7 is 'p_Clip'.*'p_Hook'"),
        (TEXT.replace(",p_Hook", ",p_Hook,p_Clip"), r"row 1: there are 8 columns, but data set toy has 7"),
        (TEXT.replace("1,Close,", "1,Close,0.5,"), r"row 3: 8 columns instead of 7"),
        (TEXT.replace("25,1.000", "25.5,1.000"), r"row 3: invalid literal"),
        (TEXT.replace("0.9999", "high"), r"row 3: could not convert string to float: 'high'"),
        (TEXT.replace("0.9999", "nan"), r"row 3: a probability is outside 0 to 1"),
        (TEXT.replace("0.9999", "1.5"), r"row 3: a probability is outside 0 to 1"),
        (TEXT.replace("1,Close", "2,Close"), r"row 3: phase 2, but data set toy has ids 0 to 1"),
        (TEXT.replace("1,Close", "1,Open"), r"row 3: phase 1 is called 'Open'.*another order of phases"),
        (TEXT.replace("25,1.000", "0,1.000"), r"row 3: frame numbers must rise"),
        (TEXT.replace("25,1.000", "-25,1.000"), r"row 3: frame -25"),
        (TEXT.replace("25,1.000", "25,inf"), r"row 3: frame 25 at inf s"),
        (TEXT.replace("25,1.000", "9" * 30 + ",1.000"), r"row 3: frame 9"),
        (TEXT.replace("Close,1e-04", 'Cl"ose",1e-04').replace("1,Cl", '1,"Cl'), r"not a CSV file"),
    ],
)
def test_damage_is_named_with_file_and_row(tmp_path, text, message):
    path = tmp_path / "video07.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_prediction_csv(path, SPEC)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_binary_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        read_prediction_csv(tmp_path / "none.csv", SPEC)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.csv: not a text file"):
        read_prediction_csv(tmp_path / "binary.csv", SPEC)
    with pytest.raises(UserError, match="cannot be read"):
        read_prediction_csv(tmp_path, SPEC)


def test_model_that_has_diverged_writes_nothing_and_rounding_is_forgiven(tmp_path):
    def attempt(value: float) -> None:
        probabilities = np.array([[value, 0.0]], dtype=np.float32)
        write_prediction_csv(
            tmp_path / "v.csv", PredictionFile(np.array([0]), np.array([0.0]), np.array([0]), probabilities, None), SPEC
        )

    for value in (np.nan, np.inf, 1.01, -0.5):
        with pytest.raises(UserError, match=r"v\.csv: not written.*diverged"):
            attempt(value)
    assert list(tmp_path.iterdir()) == []
    attempt(np.nextafter(np.float32(1), np.float32(2)))
    assert read_prediction_csv(tmp_path / "v.csv", SPEC).probabilities[0, 0] > 1


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "v.csv"
    path.write_text("old")
    with pytest.raises(ValueError, match="shapes do not agree"):
        write_prediction_csv(
            path, PredictionFile(np.arange(2), np.arange(3), np.zeros(2), np.zeros((2, 2)), np.zeros((2, 1))), SPEC
        )

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.files.os.replace", full)
    with pytest.raises(UserError, match=r"v\.csv: no room left"):
        write(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("v.csv", "old")]
