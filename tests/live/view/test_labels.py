"""The folder of labels: nothing that was saved is ever lost, whoever writes at the same time."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from features.annotation_files.intervals import Interval
from live.view.labels import NO_FILE, Conflict, LabelFolder


def phase(label: str, start_s: float, end_s: float, who: str | None = None) -> Interval:
    return Interval("phase", label, start_s, end_s, None, who)


def test_every_state_stays_in_the_history_and_can_be_saved_again(tmp_path: Path) -> None:
    folder = LabelFolder(tmp_path / "labels")
    states = [[phase("A", 0, 5)], [phase("A", 0, 3), phase("B", 3, 5)], []]
    state = NO_FILE
    for intervals in states:
        state = folder.save("op", state, None, intervals).state
    assert folder.read("op").intervals == ()
    assert [entry["intervals"] for entry in folder.history("op")] == states
    folder.save("op", state, None, folder.history("op")[1]["intervals"])
    assert list(folder.read("op").intervals) == states[1]


def test_a_file_that_was_there_before_is_kept_in_the_history(tmp_path: Path) -> None:
    (tmp_path / "op.csv").write_text("label,start,end\nold,0,1\n")
    folder = LabelFolder(tmp_path)
    before = folder.read("op")
    after = folder.save("op", before.state, None, [phase("new", 0, 1)])
    (tmp_path / "op.csv").write_text("label,start,end\nby hand,0,1\n")  # with an editor, while the viewer runs
    with pytest.raises(Conflict) as refused:
        folder.save("op", after.state, None, [])
    assert [one.label for one in refused.value.current.intervals] == ["by hand"]
    folder.save("op", refused.value.current.state, None, [])
    labels = [[one.label for one in entry["intervals"]] for entry in folder.history("op")]
    assert labels == [["old"], ["new"], ["by hand"], []]


def test_a_history_cut_off_by_a_crash_keeps_its_other_lines(tmp_path: Path) -> None:
    folder = LabelFolder(tmp_path)
    state = folder.save("op", NO_FILE, None, [phase("A", 0, 1)]).state
    path = tmp_path / "history/op.jsonl"
    path.write_bytes(path.read_bytes() + b'\n{"saved": "2026-01-01", "state": "x", "interv')
    hostile = [
        b"null",
        b"[]",
        b'{"intervals": 3}',
        b'{"saved": 1, "state": 2, "intervals": [{"track": 1}]}',
        b"\xff\xfe",
    ]
    path.write_bytes(b"\n".join([path.read_bytes(), *hostile]))
    folder.save("op", state, None, [phase("B", 0, 1)])
    assert [entry["intervals"][0].label for entry in folder.history("op")] == ["A", "B"]


def test_what_a_table_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = LabelFolder(tmp_path)
    for bad in (
        phase("=cmd()", 0, 1),
        phase("A", 2, 1),
        phase("A", -1, 1),
        phase("A", 0, float("nan")),
        phase("\0", 0, 1),
    ):
        with pytest.raises(UserError):
            folder.save("op", NO_FILE, None, [bad])
    assert folder.read("op").state == NO_FILE
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        LabelFolder(tmp_path / "file")


def test_of_writers_at_the_same_time_each_is_told_or_saved(tmp_path: Path) -> None:
    saved: list[str] = []

    def write(name: str) -> None:
        folder, done = LabelFolder(tmp_path), 0  # as another process would
        state = NO_FILE
        while done < 4:
            label = f"{name}{done}"
            try:
                before = folder.read("op")
                intervals = [*before.intervals, phase(label, len(before.intervals), len(before.intervals) + 1)]
                folder.save("op", before.state, None, intervals)
            except Conflict:
                continue
            saved.append(label)
            done += 1
        assert state == NO_FILE

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(one.label for one in LabelFolder(tmp_path).read("op").intervals) == sorted(saved)
    assert len(saved) == 8


TEXTS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=5)
SPANS = st.tuples(st.integers(0, 10**7), st.integers(1, 10**6))


@settings(max_examples=12)
@given(st.lists(st.tuples(TEXTS, TEXTS, SPANS, st.sampled_from([None, "anna", "ben"])), max_size=6), TEXTS)
def test_what_is_saved_is_read_back_to_the_millisecond(given_intervals: list, video: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = LabelFolder(Path(place))
        state, wanted = NO_FILE, []
        for who in (None, "anna", "ben"):
            own = [
                Interval(track, label, start / 1000, (start + length) / 1000, None, who)
                for track, label, (start, length), annotator in given_intervals
                if annotator == who
            ]
            wanted += own
            state = folder.save(video, state, who, own).state
        key = json.dumps
        found = [(one.track, one.label, one.start_s, one.end_s, one.annotator) for one in folder.read(video).intervals]
        expected = [(one.track, one.label, one.start_s, one.end_s, one.annotator) for one in wanted]
        assert sorted(map(key, found)) == sorted(map(key, expected))
