"""Following the lines of `stream`: each frame once, in order, whatever else is in the file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.label_source import LabelSource, TrackSpec
from configs.load import load_dataset
from live.outputs import to_line
from live.recogniser import Recognition, TrackRecognition
from live.view.following import MAX_LINE_BYTES, Follower


def line(at_s: float, name: str = "A", **more: Any) -> str:
    """A line as `stream` writes it."""
    value = {"frame": round(25 * at_s), "time_s": at_s, "phase": 0, "phase_name": name, "since_s": 0.0,
             "probabilities": {"A": 0.75, "B": 0.25}, "tools": {"Hook": 0.5}, "delay_s": 0.01}  # fmt: skip
    return json.dumps({**value, **more}) + "\n"


def test_lines_are_told_once_and_only_when_they_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    follower = Follower(path)
    assert follower.read() is None  # not there yet
    path.write_text(line(0) + line(1, "B")[:20])
    news = follower.read()
    assert news is not None
    assert news.rows == [[0.0, 0.0, 0.01, 0, 0.75, [0.5], {}]]
    assert (news.classes, news.tools, news.reset) == ({"phase": ["A", "B"]}, ["Hook"], False)
    assert follower.read() is None
    with path.open("a") as stream:
        stream.write(
            line(1, "B")[20:] + line(2, "C", tracks={"step": {"class": 1, "name": "s", "probabilities": {"s": 1}}})
        )
    news = follower.read()
    assert news is not None
    assert [(row[0], row[3], row[6]) for row in news.rows] == [(1.0, 1, {}), (2.0, 2, {"step": [0, 1.0]})]
    assert news.classes == {"phase": ["A", "B", "C"], "step": ["s"]}


def test_what_stream_writes_is_read_with_all_its_tracks(tmp_path: Path) -> None:
    steps = {"steps": TrackSpec(classes=("cut", "sew"))}
    described = {"tracks": steps, "labels": {"steps": LabelSource(files="(?P<id>x)")}}
    spec = load_dataset("cholec80").model_copy(update=described)
    chosen = np.array([0.5, 0.5, *[0.0] * 5], np.float32)
    phase = TrackRecognition(1, spec.phases[1], 3.0, chosen)
    step = TrackRecognition(1, "sew", 4.0, np.array([0.25, 0.75], np.float32))
    found = Recognition(100, 4.0, phase, np.full(7, 0.125, np.float32), 0.0, {"steps": step})
    path = tmp_path / "live.jsonl"
    path.write_text(to_line(found, spec, 0.25), encoding="utf-8")
    news = Follower(path).read()
    assert news is not None
    assert news.rows == [[4.0, 3.0, 0.25, 1, 0.5, [0.125] * 7, {"steps": [1, 0.75]}]]
    assert news.classes == {"phase": list(spec.phases), "steps": ["cut", "sew"]}
    assert (news.tools, news.skipped) == (list(spec.tools), 0)


def test_an_operation_that_starts_again_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    path.write_text(line(0) + line(5))
    follower = Follower(path)
    follower.read()
    path.write_text(line(0, "B"))  # shorter: a new file under the same name
    news = follower.read()
    assert news is not None
    assert (news.reset, [row[0] for row in news.rows]) == (True, [0.0])
    with path.open("a") as stream:
        stream.write(line(9) + line(0.5) + line(1))  # appended to by a second start
    news = follower.read()
    assert news is not None
    assert (news.reset, [row[0] for row in news.rows]) == (True, [0.5, 1.0])
    path.write_text("")
    news = follower.read()
    assert news is not None
    assert (news.reset, news.rows) == (True, [])


HOSTILE = ["", "{}", "null", "[1]", "{", '{"time_s": 1e999}', line(1, name="x" * 300), line(1, time_s=True),
           line(1, probabilities=[1]), line(1, tools={"a": "b"}), line(1, tracks={"s": 3}), "\x00", "[" * 5000,
           line(1, time_s=float("nan")), line(1, delay_s=None), line(1, probabilities={"A": float("inf")})]  # fmt: skip


@pytest.mark.parametrize("bad", HOSTILE)
def test_a_line_that_is_none_of_streams_is_counted_and_the_others_are_told(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "live.jsonl"
    path.write_text(line(0) + bad.rstrip("\n") + "\n" + line(2), encoding="utf-8")
    news = Follower(path).read()
    assert news is not None
    assert [row[0] for row in news.rows] == [0.0, 2.0]
    assert news.skipped == (1 if bad else 0)
    json.dumps(news.to_json(), allow_nan=False)


def test_a_line_without_an_end_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    path.write_bytes(b"x" * (3 * MAX_LINE_BYTES) + b"\n" + line(4).encode())
    follower, rows = Follower(path), []
    while (news := follower.read()) is not None:
        rows += news.rows
    assert [row[0] for row in rows] == [4.0]
    with pytest.raises(UserError, match="folder"):
        Follower(tmp_path)


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=60) | st.sampled_from([line(1).encode(), line(2).encode()]), max_size=5))
def test_any_bytes_are_survived(chunks: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "live"
        follower = Follower(path)
        for chunk in chunks:
            with path.open("ab") as stream:
                stream.write(chunk)
            if (news := follower.read()) is not None:
                json.dumps(news.to_json(), allow_nan=False)
