"""Text files of the original programs: their exact text, from a run and from the pickles of the test programs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import Config, DataConfig
from evaluation.files.predictions import TOOLS_ALONE, PredictionFile, read_prediction_csv, write_prediction_csv
from evaluation.metrics.tools import logit, sigmoid
from features.dataset.catalogue import index_dataset
from interop.pickled_index import index_from_pickles
from interop.text_files import export_predictions, export_run, phase_text, tool_text

SPEC = load_dataset("cholec80")
FRAMES = {"video01": 40, "video02": 31, "video03": 36}  # at one per second


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def read_rows(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def test_exact_text() -> None:
    frames = np.array([0, 25])
    assert (
        phase_text(frames, ["Preparation", "ClippingCutting"]) == "Frame Phase\n0\tPreparation\n25\tClippingCutting\n"
    )
    values = np.array([[0.5, -2.0, 1e-7], [1, 2, 3]], np.float32)
    assert tool_text(frames, values) == "Frame Tool1 Tool2 Tool3\n0\t0.5\t-2.0\t1e-07\t\n25\t1.0\t2.0\t3.0\t\n"


def test_logits_and_probabilities() -> None:
    values = np.linspace(-14, 14, 101)
    assert np.allclose(logit(sigmoid(values)), values, atol=1e-6)
    assert np.isfinite(logit(np.array([0.0, 1.0], np.float32))).all()
    assert logit(np.array([0.0, 1.0])).round(1).tolist() == [-16.6, 16.6]
    assert np.isfinite(sigmoid(np.array([-1e4, 1e4]))).all()


# ---------------------------------------------------------------------------------------------- of a run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, frames in FRAMES.items():
        frame_index = np.arange(frames) * 30  # a video at 30 fps; annotation files count at 25
        phases = rng.dirichlet(np.ones(7), frames).astype(np.float32)
        tools = None if name == "video03" else rng.random((frames, 7)).astype(np.float32)
        write_prediction_csv(
            tmp_path / f"run/evaluate/test/predictions/{name}.csv",
            PredictionFile(frame_index, frame_index / 30, phases.argmax(axis=1), phases, tools),
            SPEC,
        )
    return tmp_path / "run"


def test_a_run_becomes_text_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = export_run(Config(), run, None)
    assert [path.name for path in written] == [
        "video01-phase.txt",
        "video01-tool.txt",
        "video02-phase.txt",
        "video02-tool.txt",
        "video03-phase.txt",
    ]
    assert "1 prediction file(s) without tools" in capsys.readouterr().err
    folder = run / "export/test"
    table = np.genfromtxt(run / "evaluate/test/predictions/video01.csv", delimiter=",", names=True, dtype=None)
    rows = read_rows(folder / "video01-phase.txt")
    assert [int(row[0]) for row in rows] == list(range(0, 1000, 25))
    assert [row[1] for row in rows] == [SPEC.phases[label] for label in table["phase"]]
    tools = np.array([[float(cell) for cell in row[1:8]] for row in read_rows(folder / "video01-tool.txt")])
    expected = np.stack([table[f"p_{name}"] for name in SPEC.tools], axis=1)
    assert np.allclose(sigmoid(tools), expected, atol=1e-6)
    export_run(Config(), run, run / "p", probabilities=True)
    tools = np.array([[float(cell) for cell in row[1:8]] for row in read_rows(run / "p/video01-tool.txt")])
    assert np.array_equal(tools.astype(np.float32), expected.astype(np.float32))


def test_existing_files_are_replaced_only_on_request(run: Path) -> None:
    export_run(Config(), run, run / "out")
    export_run(Config(), run, run / "out")
    (run / "out/video02-phase.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (run / "out").iterdir()}
    assert "video02-phase.txt: exists" in refusal(lambda: export_run(Config(), run, run / "out"))
    assert before == {path: path.read_bytes() for path in (run / "out").iterdir()}
    export_run(Config(), run, run / "out", replace=True)
    assert (run / "out/video02-phase.txt").read_text().startswith("Frame Phase\n")


def test_a_run_without_predictions_is_one_line(run: Path, tmp_path: Path) -> None:
    assert "run `evaluate` first" in refusal(lambda: export_run(Config(), tmp_path / "other", None))
    assert "--split" in refusal(lambda: export_run(Config(), run, None, split="val"))
    assert "leads out" in refusal(lambda: export_run(Config(), run, None, split="../.."))


def test_a_tool_only_net_gives_tool_files_only(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((5, 7)).astype(np.float32)
    for name in ("video09", "video10"):
        path = tmp_path / f"run/evaluate/test/{TOOLS_ALONE}/{name}.csv"
        write_prediction_csv(
            path, PredictionFile(np.arange(5) * 25, np.arange(5.0), np.full(5, -1), np.zeros((5, 0)), values), SPEC
        )
        assert np.array_equal(read_prediction_csv(path, SPEC, phases=False).tool_probabilities, values)
    written = export_run(Config(), tmp_path / "run", None, probabilities=True)
    assert [path.name for path in written] == ["video09-tool.txt", "video10-tool.txt"]
    assert written[0].read_text().splitlines()[1] == "0\t" + "".join(f"{cell}\t" for cell in values[0].astype(str))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("p_Hook", "p_Hock"), "row 1: column 5 is 'p_Hock'"),
        (lambda text: text.replace("25,1.000", "25,1.000,0.5"), "row 3: 10 columns instead of 9"),
        (lambda text: text.replace("25,1.000", "25,x"), "row 3: could not convert string to float: 'x'"),
        (lambda text: text.replace("0.5", "1.5"), "outside 0 to 1"),
        (lambda text: text.replace("0.5", "nan"), "outside 0 to 1"),
        (lambda text: text[:-1], "cut off"),
    ],
)
def test_damaged_tool_predictions(tmp_path: Path, change: Callable[[str], str], expected: str) -> None:
    path = tmp_path / "a.csv"
    write_prediction_csv(
        path,
        PredictionFile(np.arange(3) * 25, np.arange(3.0), np.full(3, -1), np.zeros((3, 0)), np.full((3, 7), 0.5)),
        SPEC,
    )
    path.write_text(change(path.read_text()))
    assert expected in refusal(lambda: read_prediction_csv(path, SPEC, phases=False))


# ---------------------------------------------------------------------------------------------- of pickles


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Three videos of frames at one per second, the last two for testing."""
    root = tmp_path / "data"
    videos = []
    for name, frames in FRAMES.items():
        (root / name).mkdir(parents=True)
        for number in range(1, frames + 1):
            (root / name / f"{name}-{number}.jpg").write_bytes(b"image")
        videos.append([[f"{name}/{name}-{n}.jpg", *[0] * 7, n % 7] for n in range(1, frames + 1)])
    (tmp_path / "all.pkl").write_bytes(pickle.dumps(videos))
    made = Config(data=DataConfig(root=root, index=tmp_path / "index.json", split={"rule": "1/0/2"}))
    index_from_pickles(made, [tmp_path / "all.pkl"], phase_order="mtrcnet")
    return made


def write(path: Path, value: Any) -> Path:
    path.write_bytes(pickle.dumps(value, 2))
    return path


def clip_predictions(sequence: int) -> list[list[int]]:
    """One prediction per clip for the two test videos."""
    return [[(frame + 1) % 7 for frame in range(sequence - 1, FRAMES[name])] for name in ("video02", "video03")]


@pytest.mark.parametrize("sequence", [1, 4, 10])
@pytest.mark.parametrize("tensors", [False, True])
def test_phases_per_clip(
    config: Config, tmp_path: Path, sequence: int, tensors: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    values: list[Any] = [*chain(*clip_predictions(sequence))]
    file = write(tmp_path / "p.pkl", list(torch.tensor(values)) if tensors else values)
    export_predictions(config, [file], tmp_path / "out", sequence=sequence, phase_order="tf-cholec80")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["video02-phase.txt", "video03-phase.txt"]
    names = SPEC.phase_orders["tf-cholec80"]
    for name in ("video02", "video03"):
        expected = [[str(25 * frame), names[(frame + 1) % 7]] for frame in range(sequence - 1, FRAMES[name])]
        assert read_rows(tmp_path / f"out/{name}-phase.txt") == expected
    assert ("have no prediction" in capsys.readouterr().err) == (sequence > 1)


def test_first_frames_are_filled_only_on_request(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "p.pkl", [*chain(*clip_predictions(4))])
    export_predictions(config, [file], tmp_path / "out", sequence=4, phase_order="mtrcnet", fill_first=True)
    rows = read_rows(tmp_path / "out/video02-phase.txt")
    assert [int(row[0]) for row in rows] == [25 * frame for frame in range(31)]
    assert {row[1] for row in rows[:4]} == {SPEC.phases[4]}
    assert "which depends on later frames" in capsys.readouterr().err


def test_a_video_shorter_than_a_clip_has_no_prediction(config: Config, tmp_path: Path) -> None:
    file = write(tmp_path / "p.pkl", [3] * 2)
    for number, fill in enumerate((False, True)):
        out = tmp_path / f"out{number}"
        export_predictions(config, [file], out, sequence=35, phase_order="mtrcnet", fill_first=fill)
        assert (out / "video02-phase.txt").read_text() == "Frame Phase\n"
        assert len(read_rows(out / "video03-phase.txt")) == (36 if fill else 2)


@pytest.mark.parametrize("first", [0, 3])
def test_tools_per_frame_or_per_clip_beside_phases(config: Config, tmp_path: Path, first: int) -> None:
    count = sum(FRAMES[name] - first for name in ("video02", "video03"))
    logits = np.random.default_rng(0).normal(size=(count, 7))
    files = [write(tmp_path / "p.pkl", [*chain(*clip_predictions(4))]), write(tmp_path / "t.pkl", logits.tolist())]
    export_predictions(config, files, tmp_path / "out", sequence=4, phase_order="mtrcnet")
    rows = read_rows(tmp_path / "out/video02-tool.txt") + read_rows(tmp_path / "out/video03-tool.txt")
    assert np.array_equal([[float(cell) for cell in row[1:8]] for row in rows], logits)
    assert rows[0][0] == str(25 * first)
    assert len(list((tmp_path / "out").iterdir())) == 4
    export_predictions(config, files[1:], tmp_path / "p", sequence=4, probabilities=True)
    rows = read_rows(tmp_path / "p/video02-tool.txt")
    assert np.allclose([[float(cell) for cell in row[1:8]] for row in rows], sigmoid(logits[: len(rows)]))


def test_frames_without_tools_do_not_count_if_the_original_left_them_out(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "data/labels-from-pickle"
    text = (folder / "video02-tool.txt").read_text().splitlines(True)
    (folder / "video02-tool.txt").write_text("".join(text[:-1]))
    (folder / "video02-phase.txt").write_text("".join((folder / "video02-phase.txt").read_text().splitlines(True)))
    index_dataset(config, replace=True)
    both = write(tmp_path / "both.pkl", [0] * (30 + 36))
    export_predictions(config, [both], tmp_path / "out", sequence=1, phase_order="mtrcnet")
    assert len(read_rows(tmp_path / "out/video02-phase.txt")) == 30
    everything = write(tmp_path / "every.pkl", [0] * (31 + 36))
    export_predictions(config, [everything], tmp_path / "out2", sequence=1, phase_order="mtrcnet")
    assert len(read_rows(tmp_path / "out2/video02-phase.txt")) == 31


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        ([0] * 61, {"sequence": 4, "phase_order": None}, "--phase-order"),
        ([0] * 61, {"sequence": None}, "--sequence"),
        ([0] * 60, {"sequence": 4}, "contains 60 predictions, but the 2 videos of split test have 67 frames"),
        ([0] * 60, {"sequence": 4}, "that is 61 with --sequence 4"),
        ([0] * 61, {"sequence": 4, "split": "val"}, "no video in split val"),
        ([0] * 60 + [7], {"sequence": 4}, "prediction 61 is '7', neither a phase from 0 to 6"),
        ([0] * 60 + [True], {"sequence": 4}, "prediction 61"),
        ([0.25] * 61, {"sequence": 4}, "scores are not predictions"),
        ([[0.0] * 6] * 67, {}, "prediction 1 is not a list of 7 numbers"),
        ([[0.0] * 7] * 66 + [[float("nan")] * 7], {}, "prediction 67"),
        ([[0.0] * 7] * 66, {"phase_order": None}, "contains 66 predictions"),
        ([[0.0] * 7] * 67, {}, "--phase-order"),
        ([0] * 61, {"sequence": 4, "probabilities": True}, "--probabilities"),
        ([[0.0] * 7] * 67, {"phase_order": None, "fill_first": True}, "--fill-first: give the number of frames"),
        ([[[0.0] * 7] * 67], {}, "prediction 1"),
        ({"a": 1}, {}, "not a list of predictions"),
        ([], {}, "not a list of predictions"),
        (b"<html>", {}, "web page"),
    ],
)
def test_pickles_that_do_not_fit(
    config: Config, tmp_path: Path, value: Any, options: dict[str, Any], expected: str
) -> None:
    file = tmp_path / "p.pkl"
    file.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, 2))
    asked = {"phase_order": "mtrcnet", **options}
    assert expected in refusal(lambda: export_predictions(config, [file], tmp_path / "out", **asked))
    assert not (tmp_path / "out").exists()
    assert "--out" in refusal(lambda: export_predictions(config, [file], None, **asked))
