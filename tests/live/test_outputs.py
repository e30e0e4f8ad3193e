"""Files of a stream that others follow: whole lines, continued after a crash."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from evaluation.files.predictions import prediction_columns
from live.outputs import InputFile, LineFile, frame_of_json, frame_of_row, header_row, to_line, to_row
from live.recogniser import Recognition, TrackRecognition
from tests.live.material import SPEC, settings


def recognition(frame: int, probability: float = 0.25) -> Recognition:
    values = np.full(len(SPEC.phases), probability, np.float32)
    main = TrackRecognition(2, SPEC.phases[2], 1.5, values)
    return Recognition(frame, frame / 25, main, np.full(len(SPEC.tools), 1 / 3, np.float32), 0.0, {})


@pytest.mark.parametrize("rest", [b"", b'{"frame": 2, "ti', b"\xff\xfe"])
def test_a_file_is_continued_after_its_last_whole_line(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"frame": 0}\n{"frame": 1}\n' + rest)
    file = LineFile(path, frame_of_json, resumes=True)
    assert file.last_frame == 1
    for frame in (0, 1, 2):  # of which the first two are there
        file.write(frame, f'{{"frame": {frame}}}\n')
    file.close()
    assert path.read_bytes() == b'{"frame": 0}\n{"frame": 1}\n{"frame": 2}\n'


@pytest.mark.parametrize(
    "content", ["notes\n", "[1]\n", "{}\n", '{"frame": "x"}\n', "[" * 100_000 + "\n", '{"frame": null}\n']
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl: its last line is not one of a stream"):
        LineFile(path, frame_of_json, resumes=True)
    with pytest.raises(UserError, match=r"a\.jsonl: exists; name another file"):
        LineFile(path, frame_of_json, resumes=False)
    assert path.read_text() == content


def test_a_table_that_has_only_its_header_is_continued(tmp_path: Path) -> None:
    path, header = tmp_path / "a.csv", header_row(SPEC, tools=True)
    for _ in range(2):
        LineFile(path, frame_of_row, resumes=True, header=header).close()
    file = LineFile(path, frame_of_row, resumes=True, header=header)
    file.write(7, to_row(recognition(7)))
    file.close()
    assert LineFile(path, frame_of_row, resumes=True, header=header).last_frame == 7
    rows = list(csv.reader(io.StringIO(path.read_text())))
    assert rows[0] == prediction_columns(SPEC, tools=True)
    assert rows[1][:4] == ["7", "0.280", "2", SPEC.phases[2]]


def test_numbers_have_the_fewest_digits_that_give_the_same_float32() -> None:
    line = to_line(recognition(0, 0.1), SPEC, 0.0)
    assert '"Preparation": 0.1,' in line
    assert '"Grasper": 0.33333334' in line


def test_input_is_readable_whatever_its_number_of_frames(tmp_path: Path) -> None:
    preprocess = settings(tmp_path).preprocess
    for count in (0, 1, 12):
        file = InputFile(tmp_path / f"{count}.npy", preprocess)
        for number in range(count):
            file.write(torch.full((1, 36, 36, 3), number, dtype=torch.uint8))
        assert not (tmp_path / f"{count}.npy").exists()
        file.close()
        assert len(np.load(tmp_path / f"{count}.npy")) == count
    assert np.load(tmp_path / "12.npy").shape == (12, 3, 32, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npy", "1.npy", "12.npy"]
