"""`evaluate --predictions` through the real command line, on published predictions and on bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.metrics.conventions import CONVENTIONS
from tests.cli import PROJECT, run


def phase_files(folder: Path, *texts: str) -> Path:
    folder.mkdir()
    for number, text in enumerate(texts, start=1):
        (folder / f"video{number:02d}-phase.txt").write_text(text)
    return folder


@pytest.mark.parametrize(("rows", "options"), [("all_rows", []), ("skip_first_row", ["--skip-first-row"])])
def test_published_predictions_give_the_official_numbers(shared_data, rows, options, tmp_path):
    published = shared_data / "predictions/tmrnet"
    folders = ["--predictions", published / "phase", "--ground-truth", published / "gt-phase"]
    done = run(["evaluate", *folders, "--fps", "1", *options, "--json", "out.json"], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == set(CONVENTIONS.names()) - {"calibration"}  # these files have no probabilities
    for convention, metrics in json.loads((published / "expected.json").read_text())[rows].items():
        for metric, (mean, std) in metrics.items():
            assert found[convention][metric]["mean"] == pytest.approx(mean, abs=0.01), (convention, metric)
            assert found[convention][metric]["std"] == pytest.approx(std, abs=0.01), (convention, metric)
    assert len(found["pooled"]["per_video"]) == 40
    assert set(found["relaxed_matlab"]["per_phase"]) == set(found["phase_mean"]["per_phase"])
    assert {"mean", "std"} == set(found["pooled"]["video_accuracy"]) == set(found["pooled"]["video_balanced_accuracy"])
    assert "ids are numbered as in the data set cholec80" in done.stderr
    assert "relaxed_matlab" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("convention", ["pooled", "segmental"])
def test_one_convention_alone(convention, tmp_path):
    files = phase_files(tmp_path / "t", "0\n1\n")
    options = ["--convention", convention, "--json", "out.json", "--split", "val"]
    done = run(["evaluate", "--predictions", files, "--ground-truth", files, *options], tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out.json").read_text()).values()
    assert result["accuracy"]["mean"] == 100
    assert (result["about"]["convention"], result["about"]["split"]) == (convention, "val")


def test_annotations_at_25_fps_and_predictions_at_1_fps(tmp_path):
    """By sample number: refused with the option that helps, which then gives the rate too."""
    truth = [phase for phase in (0, 1, 2, 3) for _ in range(500)]
    phase_files(tmp_path / "t", "Frame\tPhase\n" + "".join(f"{k}\t{phase}\n" for k, phase in enumerate(truth)))
    late = truth[::25][:1] * 10 + truth[::25][:-10]  # each transition ten seconds late
    phase_files(tmp_path / "p", "".join(f"{k}\t{phase}\n" for k, phase in enumerate(late)))
    folders = ["evaluate", "--predictions", "p", "--ground-truth", "t", "--json", "out.json"]
    done = run(folders, tmp_path)
    assert done.returncode == 2
    assert "80 rows, but t/video01-phase.txt has 2000" in done.stderr
    assert "if the prediction has 1 row per second, add --prediction-fps 1" in done.stderr
    done = run([*folders, "--prediction-fps", "1", "--background", "Preparation"], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["relaxed_fixed"]["accuracy"]["mean"] == 100
    assert found["phase_mean"]["accuracy"]["mean"] == 62.5
    about = found["segmental"]["about"]
    assert (about["fps"], about["fps_from"], about["background"]) == (1, "--prediction-fps", ["Preparation"])
    assert "Left out as background: Preparation" in " ".join(done.stdout.split())
    assert "rows are matched by rate" in done.stderr


def test_relaxed_conventions_wait_for_a_rate(tmp_path):
    """Rows numbered one by one are source frames or samples: the window is computed for neither until --fps."""
    files = phase_files(tmp_path / "t", "Frame\tPhase\n0\tPreparation\n1\tPreparation\n2\tClippingCutting\n")
    folders = ["evaluate", "--predictions", files, "--ground-truth", files]
    done = run(folders, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "relaxed_matlab and relaxed_fixed: left out, for its window of 10 s needs the rate" in done.stderr
    assert "relaxed" not in done.stdout
    done = run([*folders, "--convention", "relaxed_matlab"], tmp_path)
    assert done.returncode == 2
    assert "add --fps" in done.stderr
    assert "relaxed_matlab" in run([*folders, "--fps", "25"], tmp_path).stdout


def test_another_data_set(tmp_path):
    text = "Frame Phase\n0 TrocarPlacement\n1 Preparation\n"
    files = phase_files(tmp_path / "t", text)
    arguments = ["evaluate", "--predictions", files, "--ground-truth", files]
    assert run([*arguments, "--set", "data.dataset=m2cai16-workflow"], tmp_path).returncode == 0
    done = run(arguments, tmp_path)
    assert done.returncode == 2
    assert "video01-phase.txt: row 1 (line 2) has the unknown phase 'TrocarPlacement'" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs --ground-truth DIR"),
        (["--ground-truth", "no"], "no: not a folder"),
        (["--ground-truth", "short"], "1 rows, but short/video01-phase.txt has 2"),
        (["--ground-truth", "many"], "many/video02-phase.txt: good has no file for this video"),
        (
            ["--ground-truth", "good", "--name", "a", "--model", "joint"],
            "--name, --model: cannot be combined with --pred",
        ),
        (["--ground-truth", "good", "--convention", "x"], "unknown convention 'x'; choose from phase_mean"),
        (["--ground-truth", "good", "--phase-order", "x"], "--phase-order x: no such order or file"),
        (["--ground-truth", "good", "--fps", "inf"], "fps inf"),
        (["--ground-truth", "good", "--fps", "0"], "--fps"),
        (["--ground-truth", "good", "--json", "good"], "is a directory"),
        (["--ground-truth", "good", "--json", "good/video01-phase.txt/a.json"], "cannot create this folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message, tmp_path):
    phase_files(tmp_path / "good", "1\n" if "short" in options else "0\n0\n")
    phase_files(tmp_path / "short", "0\n1\n")
    phase_files(tmp_path / "many", "0\n1\n", "0\n")
    before = sorted(tmp_path.rglob("*"))
    more = [] if "--json" in options else ["--json", "out.json"]
    done = run(["evaluate", "--predictions", "good", *options, *more], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr.replace("\n", " ")
    assert before == sorted(tmp_path.rglob("*"))


def test_options_for_folders_mean_nothing_to_a_run(tmp_path):
    done = run(["evaluate", "--ground-truth", "x", "--skip-first-row"], tmp_path)
    assert done.returncode == 2
    assert "--ground-truth, --skip-first-row: cannot be combined with a run (no --predictions)" in done.stderr


def test_neither_torch_nor_a_decoder_is_imported(tmp_path):
    files = phase_files(tmp_path / "t", "0\n1\n")
    program = (
        "import sys; from click.testing import CliRunner; import pipeline\n"
        f"done = CliRunner().invoke(pipeline.cli, ['evaluate', '--predictions', {str(files)!r}, '--ground-truth', "
        f"{str(files)!r}])\n"
        "assert done.exit_code == 0, done.output\n"
        "print(sorted({'torch', 'torchvision', 'decord', 'av', 'h5py', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_compare_folders_of_predictions(shared_data, tmp_path):
    published = shared_data / "predictions/tmrnet"
    folders = [published / "phase", published / "gt-phase", "--ground-truth", published / "gt-phase"]
    options = ["--metric", "accuracy", "--json", "out.json"]
    done = run(["compare", *folders, *options], tmp_path)
    assert done.returncode == 0, done.stderr
    (pair,) = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    entry = pair["metrics"]["accuracy"]
    assert entry["first"]["mean"] == pytest.approx(86.94, abs=0.01)
    assert entry["difference"] == pytest.approx(86.94 - 100, abs=0.01)
    assert entry["p_value"] == pytest.approx(1 / 10_001)
    assert len(entry["per_video"]) == 40
    assert "A - B" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "needs two models or more"),
        (["a", "b"], "runs/a: no such run or folder"),
        (["runs/a", "b"], "error: runs/a: no such run or folder"),
        (["a", "b", "--skip-first-row"], "--skip-first-row: cannot be combined with runs (no --ground-truth)"),
        (["t", "t", "--ground-truth", "no"], "no: not a folder that can be read"),
    ],
)
def test_what_cannot_be_compared(arguments, message, tmp_path):
    phase_files(tmp_path / "t", "0\n")
    done = run(["compare", *arguments], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr


def test_help_refers_to_the_document_that_names_every_convention(tmp_path):
    done = run(["evaluate", "--help"], tmp_path)
    assert "docs/evaluation.md" in " ".join(done.stdout.split())
    document = (PROJECT / "docs/evaluation.md").read_text(encoding="utf-8")
    for name in CONVENTIONS.names():
        assert f"`{name}`" in document, name
