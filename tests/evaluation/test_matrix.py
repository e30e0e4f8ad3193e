"""The matrix of training sets and test sets: which evaluations are its cells, their numbers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.load import load_dataset
from engine.files import write_json
from evaluation.files.truth import Truth, VideoTruth, write_truth
from evaluation.matrix import MatrixPlace, make_matrix
from evaluation.metrics.phases import evaluate_phases
from evaluation.metrics.results import Evaluation
from evaluation.metrics.statistics import paired_interval
from evaluation.reports.matrix import matrix_tables, write_matrix_csv, write_matrix_page

SPEC = load_dataset("cholec80")
RNG = np.random.default_rng(0)
TRUTH = {name: {f"{name}{k}": np.sort(RNG.integers(0, 7, 60)) for k in range(4)} for name in ("a", "b")}


def save(
    runs: Path, run: str, folder: str, dataset: str, noise: float, mapping: str | None = None, cut: int = 60
) -> None:
    """An evaluation of a run on a data set whose predictions are wrong in a fraction `noise` of the frames."""
    rng = np.random.default_rng(sum(map(ord, run + folder)))
    truth = {name: track[:cut].astype(np.int8) for name, track in TRUTH[dataset].items()}
    predicted = {n: np.where(rng.random(cut) < noise, rng.integers(0, 7, cut), track) for n, track in truth.items()}
    results = evaluate_phases(truth, predicted, SPEC.phases, 1.0, ["video_macro", "phase_mean"], split="test")
    evaluation = Evaluation(
        split="test",
        fps=1.0,
        videos=list(truth),
        phases={"temporal": results},
        tools=None,
        mapping=None if mapping is None else {"name": mapping},
    )
    path = runs / run / "evaluate" / folder
    path.mkdir(parents=True)
    write_json(path / "metrics.json", evaluation.to_json())
    spec = SPEC.model_copy(update={"name": dataset})
    none = np.zeros((cut, 0), np.int8)
    write_truth(path / "truth.json", Truth(spec, "test", 1.0, {n: VideoTruth(t, none, n) for n, t in truth.items()}))


def trained(runs: Path, run: str, dataset: str, *videos: str) -> None:
    write_json(
        runs / run / "temporal" / "trained_on.json",
        {"data": [{"dataset": dataset, "videos": {one: f"hash of {one}" for one in videos}}]},
    )
    (runs / run / "temporal" / "config.yaml").write_text("{}")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in (0, 1):
        save(tmp_path, f"on-a-{seed}", "test", "a", 0.1)
        save(tmp_path, f"on-a-{seed}", "other-test", "b", 0.4)
    save(tmp_path, "on-b", "test", "b", 0.2)
    save(tmp_path, "on-b", "test-clip", "b", 0.9)  # another inference, which is not taken
    save(tmp_path, "on-b", "m-test-seven", "a", 0.3, mapping="seven")
    return tmp_path


def place(runs: Path, mapping: str | None = None, allow: bool = False) -> MatrixPlace:
    return MatrixPlace(runs, "test", mapping, allow)


def test_cells_are_means_over_videos_of_means_over_seeds(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = make_matrix(["on-a-0, on-a-1", "on-b"], place(runs), "video_macro", ["f1"])
    assert matrix.tested_on == ["a", "b"]
    assert [row.title for row in matrix.rows] == ["a: on-a-0 (2 seeds)", "b: on-b"]
    files = [runs / f"on-a-{seed}/evaluate/other-test/metrics.json" for seed in (0, 1)]
    per_video = [json.loads(f.read_text())["phases"]["temporal"]["video_macro"]["per_video"] for f in files]
    expected = paired_interval([np.mean([one[f"b{k}"]["f1"] for one in per_video]) for k in range(4)])
    cell = matrix.rows[0].cells["b"]
    assert cell.metrics["f1"] == expected
    assert (cell.videos, cell.own, cell.overlap) == (4, False, False)
    assert "a" not in matrix.rows[1].cells
    assert "on-b: not evaluated on a; run `evaluate --index`" in capsys.readouterr().err
    (table,) = matrix_tables(matrix)
    assert table.columns == ["on a", "on b"]
    assert table.rows[1][1][0] == "-"
    assert make_matrix(["on-b"], place(runs, "seven"), "video_macro").tested_on == ["a"]


def test_what_cannot_be_one_matrix_is_refused(runs: Path) -> None:
    for names, convention, metrics, message in (
        (["nobody"], "video_macro", None, "no such run"),
        (["on-b,on-b"], "video_macro", None, "name each seed's run once"),
        (["on-b"], "pooled", None, "contains no results of phases under the convention pooled"),
        (["on-b"], "none", None, "unknown convention"),
        (["on-b"], "video_macro", ["edit"], "--metric edit: video_macro has accuracy"),
    ):
        with pytest.raises(UserError, match=message):
            make_matrix(names, place(runs), convention, metrics)
    save(runs, "short", "test", "b", 0.2, cut=50)
    with pytest.raises(UserError, match="other videos, labels or phases of b; evaluate all"):
        make_matrix(["on-b", "short"], place(runs), "video_macro")
    save(runs, "on-b", "again-test", "b", 0.2)
    with pytest.raises(UserError, match="two evaluations on b; delete one"):
        make_matrix(["on-b"], place(runs), "video_macro")


def test_a_cell_with_operations_of_the_training_is_marked_or_refused(runs: Path, tmp_path: Path) -> None:
    trained(runs, "on-b", "cholec80", "video05")
    save(runs, "on-b", "more-test", "a", 0.2)
    path = runs / "on-b/evaluate/more-test/truth.json"
    tree = json.loads(path.read_text())
    tree["dataset"]["name"] = "cholect50"
    tree["videos"]["VID05"] = tree["videos"].pop("a0")
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="trained on video05 of cholec80, which is the same operation as VID05"):
        make_matrix(["on-b"], place(runs), "video_macro")
    matrix = make_matrix(["on-b"], place(runs, allow=True), "video_macro")
    assert {name: cell.overlap for name, cell in matrix.rows[0].cells.items()} == {"b": False, "cholect50": True}
    assert matrix.rows[0].trained_on == ["cholec80"]
    cells = dict(zip(matrix.tested_on, matrix_tables(matrix)[0].rows[0][1], strict=True))
    assert {name: "*" in cell for name, cell in cells.items()} == {"b": False, "cholect50": True}


def test_names_are_data_in_csv_and_page(runs: Path) -> None:
    """A spreadsheet does not evaluate a name, and a browser does not read it as HTML."""
    save(runs, "odd", "test", "a", 0.2)
    trained(runs, "odd", "=<script>")
    matrix = make_matrix(["odd"], place(runs), "video_macro")
    write_matrix_csv(runs / "m.csv", matrix)
    write_matrix_page(runs / "m.html", matrix)
    assert "accuracy,'=<script>,odd,a," in (runs / "m.csv").read_text()
    page = (runs / "m.html").read_text()
    assert "<script>" not in page
    assert "=&lt;script&gt;: odd" in page
