"""Files of annotation tools converted into each other, through the command line and in chains."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.load import load_dataset
from configs.schema import DataConfig
from features.annotation_files.intervals import Interval
from features.annotation_files.table import read_csv
from features.dataset.build import build_index
from features.dataset.formats.cholec80 import read_phase_file
from interop.annotations import FORMATS, Conversion, convert
from tests.cli import run, succeed
from tests.videos import VideoSpec, write_video

SPEC = load_dataset("cholec80")
TABLE = """\
video,track,label,start,end,confidence,annotator
video01,phase,Preparation,0,2,,
video01,phase,calot triangle dissection,2,3.48,,
video01,step,Trocars,0.48,2.52,,
video02,phase,Clipping & cutting,1,2.04,0.75,model
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.csv").write_text(TABLE, encoding="utf-8")
    return tmp_path


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@st.composite
def tables(draw: st.DrawFn) -> list[str]:
    """A table of phases that do not overlap, on frames at 25 fps, with gaps; neighbours differ."""
    rows = []
    for video in range(draw(st.integers(1, 3))):
        at, last = 0, ""
        for _ in range(draw(st.integers(1, 5))):
            at += draw(st.sampled_from([0, 0, 7]))
            phase = draw(st.sampled_from([name for name in SPEC.phases if name != last]))
            end, last = at + draw(st.integers(1, 60)), phase
            rows.append(f"video{video + 1:02},phase,{phase},{at / 25:.3f},{end / 25:.3f}")
            at = end
    return ["video,track,label,start,end", *rows]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=tables(), chain=st.permutations(FORMATS))
def test_chains_of_formats_lead_back_to_the_table(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], chain: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    place = folder / "given.csv"
    place.write_text("\n".join(rows) + "\n", encoding="utf-8")
    for target in chain:
        convert(place, folder / target, Conversion(target, fps=25.0))
        place = folder / target
    convert(place, folder / "back.csv", Conversion("csv"))
    assert lines(folder / "back.csv") == rows


def test_confidences_and_annotators_survive_elan_and_label_studio(folder: Path) -> None:
    succeed(["annotations", "convert", "a.csv", "elan", "--to", "eaf"], folder)
    succeed(["annotations", "convert", "elan", "tasks", "--to", "labelstudio", "--fps", "25"], folder)
    output = succeed(["annotations", "convert", "tasks", "back.csv", "--to", "csv"], folder)
    assert "note: labelstudio.json: video02 has no annotations; its predictions are read" in output
    back = read_csv((folder / "back.csv").read_bytes(), folder / "back.csv")
    assert back == read_csv(TABLE.encode(), Path("a.csv"))


def test_label_studio_gets_tasks_and_a_labelling_configuration(folder: Path) -> None:
    words = [
        "annotations",
        "convert",
        "a.csv",
        "all.json",
        "--to",
        "labelstudio",
        "--fps",
        "29.97",
        "--dataset",
        "cholec80",
    ]
    output = succeed([*words, "--media", "https://example.org/"], folder)
    assert "note: all.json: 7 boundaries moved to the next frame" in output
    first, second = json.loads((folder / "all.json").read_text(encoding="utf-8"))
    assert first["data"] == {"video": "https://example.org/video01.mp4", "video_id": "video01", "fps": 29.97}
    assert first["annotations"][0]["result"][0]["value"]["timelinelabels"] == ["Preparation"]
    assert (second["predictions"][0]["model_version"], second["predictions"][0]["score"]) == ("model", 0.75)
    text = (folder / "all.xml").read_text(encoding="utf-8")
    assert [name for name in SPEC.phases if f'<Label value="{name}"/>' in text] == list(SPEC.phases)


def test_cholec80_gets_a_row_per_frame_and_notes_on_what_is_lost(folder: Path) -> None:
    words = ["annotations", "convert", "a.csv", "text", "--to", "cholec80", "--fps", "25", "--dataset", "cholec80"]
    output = succeed(words, folder)
    assert "note: video01: 1 interval(s) of other tracks left out" in output
    assert "note: video02: 25 frame(s) without a label have no row" in output
    assert "note: video02: 1 confidence(s) left out" in output
    track = read_phase_file(folder / "text" / "video01-phase.txt", SPEC)
    assert track.frame_index.tolist() == list(range(87))
    assert track.labels.tolist() == [0] * 50 + [1] * 37


def test_of_overlapping_intervals_the_shortest_has_the_frame(tmp_path: Path) -> None:
    rows = "label,start,end\nPreparation,0,4\nClippingCutting,1,2\n"
    (tmp_path / "video05.csv").write_text(rows, encoding="utf-8")
    output = succeed(["annotations", "convert", "video05.csv", "out", "--to", "cholec80", "--fps", "1"], tmp_path)
    assert "note: video05: 1 frame(s) with several labels, of which the shortest interval's is kept" in output
    assert lines(tmp_path / "out" / "video05-phase.txt") == [
        "Frame\tPhase",
        "0\tPreparation",
        "1\tClippingCutting",
        "2\tPreparation",
        "3\tPreparation",
    ]


def test_a_recording_in_several_files_is_linked_to_none_of_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = r"video(?P<id>\d+)_part(?P<part>\d)\.mp4"
    spec = SPEC.model_copy(update={"patterns": SPEC.patterns.model_copy(update={"video": pattern})})
    (folder / "data").mkdir()
    for part, fps in ((1, 25), (2, 30)):
        write_video(folder / f"data/video01_part{part}.mp4", VideoSpec(count=50, fps=Fraction(fps)))
    index = build_index(folder / "data", spec, DataConfig())
    convert(folder / "a.csv", folder / "elan", Conversion("eaf", index=index))
    notes = capsys.readouterr().err
    assert "note: video01: has 2 files, so none is linked; join them to see video and labels together" in notes
    assert "part1" not in (folder / "elan/video01.eaf").read_text(encoding="utf-8")
    convert(folder / "a.csv", folder / "all.json", Conversion("labelstudio", index=index, fps=25))
    assert "note: video01: has no constant frame rate" in capsys.readouterr().err


def test_one_bad_file_is_reported_and_the_others_are_converted(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "a.csv").rename(folder / "in" / "a.csv")
    (folder / "in" / "video09.eaf").write_text("<a/>", encoding="utf-8")
    (folder / "in" / "notes.txt").write_text("x", encoding="utf-8")
    done = run(["annotations", "convert", "in", "out", "--to", "eaf"], folder)
    assert done.returncode == 1
    assert "failed: video09.eaf: in/video09.eaf: is not an ELAN file: its root is 'a'" in done.stderr
    assert "in/notes.txt: not read, since it is not named like a file of phases" in done.stderr
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["video01.eaf", "video02.eaf"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.csv", "x", "--to", "cholec80"], "error: video01: rows are numbered by frames; give their rate with --fps"),
        (
            ["a.csv", "x", "--to", "labelstudio"],
            "error: video01: Label Studio counts frames; give their rate with --fps",
        ),
        (["a.csv", "x", "--to", "csv", "--track", "no"], "has no labelled intervals, track no; tracks: phase, step"),
        (["b.csv", "x", "--to", "csv"], "error: b.csv: no such file"),
        (["a.csv", "a.csv", "--to", "csv", "--track", "step"], "a.csv: exists with other content; --force replaces it"),
        (["a.csv", "x.eaf", "--to", "eaf"], "error: x.eaf: one file for 2 videos; give a folder"),
        (["a.csv", "x", "--to", "eaf", "--media", "m"], "--media: cannot be combined with --to eaf"),
        (
            ["a.csv", "x", "--to", "csv", "--dataset", "autolaparo"],
            "unknown phase 'calot triangle dissection' of data set",
        ),
        (["a.csv", "x", "--to", "csv", "--fps", "5", "--index", "i.json"], "--fps: cannot be combined with --index"),
    ],
)
def test_mistakes_end_in_one_line(folder: Path, words: list[str], message: str) -> None:
    done = run(["annotations", "convert", *words], folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "x").exists()


def test_a_video_in_two_files_and_several_annotators_are_refused(folder: Path) -> None:
    (folder / "in").mkdir()
    for name in ("a.csv", "b.csv"):
        (folder / "in" / name).write_text("video,label,start,end,annotator\nV1,A,0,1,x\nV1,A,0,1,y\n", encoding="utf-8")
    done = run(["annotations", "convert", "in", "x", "--to", "csv"], folder)
    assert "in/a.csv and in/b.csv: both have labels of V1" in done.stderr
    done = run(["annotations", "convert", "in/a.csv", "x", "--to", "cholec80", "--fps", "1"], folder)
    assert "V1: labels of several annotators (x, y); choose one with --annotator" in done.stderr
    succeed(["annotations", "convert", "in/a.csv", "x", "--to", "cholec80", "--fps", "1", "--annotator", "y"], folder)


def test_labels_far_beyond_any_video_take_no_memory(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("label,start,end\nA,0,999999999\n", encoding="utf-8")
    done = run(["annotations", "convert", "v.csv", "x", "--to", "cholec80", "--fps", "25"], tmp_path)
    assert done.returncode == 2
    assert "longer than a video can" in done.stderr


def test_intervals_are_those_of_the_file() -> None:
    [first, second] = read_csv(TABLE.encode(), Path("a.csv")).videos
    assert first.intervals[-1] == Interval("step", "Trocars", 0.48, 2.52)
    assert second.intervals == (Interval("phase", "Clipping & cutting", 1.0, 2.04, 0.75, "model"),)
