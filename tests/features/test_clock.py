"""Times written as on a clock, which two programs' files may write in different ways."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from features.annotation_files.table import read_csv
from features.clock import clock_seconds


@pytest.mark.parametrize(
    ("text", "time_s"),
    [
        ("1:02:03.5", 3723.5),
        ("02:03,25", 123.25),
        ("100000:00:00", 3.6e8),
        ("90:00", 5400.0),
        ("00:00:59.9999999999", 60),
    ],
)
def test_a_time_is_read_in_seconds(text: str, time_s: float) -> None:
    assert clock_seconds(text) == pytest.approx(time_s, abs=1e-9)
    content = f"label;start;end\nA;0;{text}\n".encode()
    assert read_csv(content, Path("v.csv")).videos[0].intervals[0].end_s == pytest.approx(time_s, abs=1e-9)


@pytest.mark.parametrize("text", ["", "12", "0:60", "1:2:3:4", "-0:01", "٠:٠١", "0:01.", "0:0١"])
def test_other_texts_are_no_times(text: str) -> None:
    assert math.isnan(clock_seconds(text))
