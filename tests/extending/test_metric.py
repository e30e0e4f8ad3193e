"""The metric of docs/extending.md: one file outside the package, and every table and file of results has it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli import run, run_fresh

EXAMPLE = Path(__file__).with_name("metric_example.py")
CONVENTION = """
from evaluation.metrics.conventions import CONVENTIONS, FrameConvention
from evaluation.metrics.results import Score

CONVENTIONS.register("lenient", FrameConvention(
    title="every labelled frame is right", order="pooled", absent_phase="left out", std="over phases", source="a test",
    right=lambda video, fps: video.labelled, titles={"leniency": "Leniency"},
    extra=lambda table: {"leniency": Score(table.right.sum() / table.frames.sum(), None)},
))
"""
TRUTH = {"video01": "0011", "video02": "0222"}
PREDICTED = {"video01": "0111", "video02": "0222"}
FOLDERS = ["--predictions", "predicted", "--ground-truth", "truth"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, tracks in (("truth", TRUTH), ("predicted", PREDICTED)):
        (tmp_path / name).mkdir()
        for video, phases in tracks.items():
            (tmp_path / name / f"{video}.txt").write_text("\n".join(phases) + "\n", encoding="utf-8")
    return tmp_path


def test_a_metric_is_one_file(folder: Path) -> None:
    plugins = {"SURGSTAGE_PLUGINS": str(EXAMPLE)}
    done = run_fresh(["evaluate", *FOLDERS, "--json", "results.json"], folder, **plugins)
    assert done.returncode == 0, done.stderr
    assert "Specificity" in done.stdout
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    frames = {name: result for name, result in results.items() if "per_phase" in result}
    assert all({"specificity", "f1"} <= set(result) & set(result["intervals"]) for result in frames.values())
    pooled = results["pooled"]["per_phase"]
    # Of the eight frames three are of phase 0, two of phase 1; one of the six that are not of phase 1 is taken for it.
    assert [pooled[phase]["specificity"]["mean"] for phase in ("Preparation", "CalotTriangleDissection")] == [
        100, pytest.approx(100 * 5 / 6)
    ]  # fmt: skip
    options = ["--metric", "specificity"]
    done = run_fresh(["compare", "results.json", "predicted", *FOLDERS[2:], *options], folder, **plugins)
    assert done.returncode == 0, done.stderr
    assert "Specificity" in done.stdout
    without = run(["evaluate", *FOLDERS], folder)
    assert "Specificity" not in without.stdout


def test_a_convention_is_one_file(folder: Path) -> None:
    (folder / "lenient.py").write_text(CONVENTION, encoding="utf-8")
    plugins = {"SURGSTAGE_PLUGINS": os.pathsep.join([str(folder / "lenient.py"), str(EXAMPLE)])}
    options = ["--convention", "lenient", "--json", "results.json"]
    done = run_fresh(["evaluate", *FOLDERS, *options], folder, **plugins)
    assert done.returncode == 0, done.stderr
    assert list(json.loads((folder / "results.json").read_text(encoding="utf-8"))) == ["lenient"]
    assert "lenient" in done.stdout
    assert "Leniency: 1.0." in " ".join(done.stdout.split())
    unknown = run(["evaluate", *FOLDERS, *options], folder)
    assert unknown.returncode == 2
    assert "unknown convention 'lenient'; choose from phase_mean" in unknown.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise ValueError('broken')", "SURGSTAGE_PLUGINS: bad.py: broken"),
        (
            EXAMPLE.read_text(encoding="utf-8").replace(
                "percent(frames - table.union, frames - table.truth)", "table.frames"
            ),
            "metric specificity: returns shape (2,) instead of",
        ),
        (EXAMPLE.read_text(encoding="utf-8").replace('"specificity"', '"f1"'), "metric f1 is registered twice"),
    ],
)
def test_a_file_that_does_not_work_is_named_in_one_line(folder: Path, text: str, message: str) -> None:
    (folder / "bad.py").write_text(text, encoding="utf-8")
    done = run_fresh(["evaluate", *FOLDERS], folder, SURGSTAGE_PLUGINS="bad.py")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
