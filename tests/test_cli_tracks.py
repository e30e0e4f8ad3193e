"""Phases and steps through the real command line: a data set with two label tracks, from its files to the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from configs.load import load_dataset
from features.annotation_files.eaf import read_eaf
from features.store import read_features
from tests.cli import run, succeed

STEPS = ["enter", "expose", "cut", "leave"]
NAMED = ["--config", "tiny.yaml", "--name", "two"]
BOTH = ["--set", "data.tracks=[phases, steps]"]
SETTINGS = {
    "device": "cpu",
    "data": {"dataset": "two-tracks.yaml", "root": "videos", "index": "index.json", "split": {"rule": "2/1/1"}},
    "preprocess": {"resize_px": 36, "crop_px": 32},
    "cnn": {"backbone": "shufflenet_v2_x0_5", "weights": "random"},
    "extract": {"encoder": "initial", "precision": "fp32", "workers": 1},
    "temporal": {"head": {"name": "lstm", "hidden": 8}, "sequence": {"batch": 2}, "epochs": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four simulated operations with files of steps, which begin late."""
    folder = tmp_path_factory.mktemp("two")
    options = ["--videos", "4", "--seed", "7", "--fps", "2", "--speed-up", "40", "--width", "64", "--height", "64"]
    succeed(["simulate", "videos", *options], folder)
    (folder / "videos/steps").mkdir()
    for number in range(1, 5):
        rows = "".join(f"{5 + 7 * i}\t{STEPS[(i + number) % 4]}\n" for i in range(4))
        (folder / f"videos/steps/video{number:02d}-steps.tsv").write_text(f"second\tstep\n{rows}")
    described = load_dataset("simulated").model_dump(mode="json", exclude_defaults=True)
    described["tracks"] = {"steps": {"classes": STEPS}}
    described["labels"] = {
        "steps": {
            "files": r"video(?P<id>\d+)-steps\.tsv",
            "form": "starts",
            "unit": "second",
            "columns": {"start": "second", "label": "step"},
        }
    }
    (folder / "two-tracks.yaml").write_text(yaml.safe_dump(described))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    for command in ("index", "extract"):
        succeed([command, *(NAMED[:2] if command == "index" else NAMED)], folder)
    succeed(["train-temporal", *NAMED, *BOTH], folder)
    succeed(["evaluate", *NAMED], folder)
    return folder


def features(place: Path) -> Path:
    (found,) = (place / "artifacts/features").iterdir()
    return found


def test_features_hold_the_steps_at_the_sampled_times(place: Path) -> None:
    found = read_features(features(place) / "video02.h5")
    expected = np.where(found.time_s < 5, -1, (np.minimum((found.time_s - 5) // 7, 3) + 2) % 4)
    assert found.tracks["steps"].tolist() == expected.tolist()
    info = succeed(["features", "info", str(features(place))], place)
    assert f"video02: {len(found)} frames, " in info
    assert f", {int((expected >= 0).sum())} with steps" in info
    assert "all files are intact" in succeed(["features", "verify", str(features(place))], place)


def test_every_file_of_the_evaluation_has_both_tracks(place: Path) -> None:
    out = place / "runs/two/evaluate/test"
    metrics = json.loads((out / "metrics.json").read_text())
    conventions = set(metrics["tracks"]["steps"]["temporal"])
    assert conventions == set(metrics["phases"]["temporal"]) - {"relaxed_matlab", "relaxed_fixed"}
    assert set(metrics["tracks"]["steps"]) == {"temporal", "frame", "majority"}
    header = (out / "predictions/steps/video04.csv").read_text().splitlines()[0]
    assert header == "frame,time_s,steps,steps_name,p_enter,p_expose,p_cut,p_leave"
    assert (out / "predictions/video04.csv").read_text().startswith("frame,time_s,phase,phase_name,p_Preparation")
    assert {"phase", "tools", "tracks"} <= json.loads((out / "truth.json").read_text())["videos"]["video04"].keys()
    card = (place / "runs/two/MODEL_CARD.md").read_text()
    assert "for phases and steps of" in card
    assert "Steps (conventions as above):" in card


def test_new_videos_get_the_same_predictions_frame_by_frame(place: Path) -> None:
    succeed(["predict", *NAMED, "videos/videos/video04.mp4", "--as", "csv"], place)
    known = place / "runs/two/evaluate/test/predictions/steps/video04.csv"
    tables = [
        np.genfromtxt(path, delimiter=",", skip_header=1, usecols=(0, 2, 4, 5, 6, 7))
        for path in (place / "runs/two/predict/steps/video04.csv", known)
    ]
    np.testing.assert_allclose(*tables, atol=1e-4)
    assert (place / "runs/two/predict/steps/video04.png").is_file()
    intervals = (place / "runs/two/predict/video04.intervals.csv").read_text()
    assert {line.split(",")[1] for line in intervals.splitlines()[1:]} == {"phase", "steps"}
    assert "1 unchanged" in succeed(["predict", *NAMED, "videos/videos/video04.mp4"], place)


def test_predictions_of_new_videos_are_decoded_and_say_how_far_ahead_they_look(place: Path) -> None:
    arguments = ["videos/videos/video04.mp4", "--decoding", "offline", "--out", "decoded"]
    succeed(["predict", *NAMED, *arguments], place)
    made_by = json.loads((place / "decoded/video04.json").read_text())["made_by"]
    assert (made_by["decoding"]["mode"], made_by["decoding"]["offline"]) == ("offline", True)
    succeed(["evaluate", *NAMED, "--decoding", "offline"], place)
    for csv in ("video04.csv", "steps/video04.csv"):
        one, other = (
            np.genfromtxt(folder / csv, delimiter=",", skip_header=1, usecols=(0, 2, 4, 5, 6, 7))
            for folder in (place / "decoded", place / "runs/two/evaluate/test-offline/predictions")
        )
        np.testing.assert_allclose(one, other, atol=1e-3)
    done = run(["predict", *NAMED, *arguments, "--set", "temporal.decoding.lag_s=2"], place)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "lag_s: has no effect with mode=offline" in done.stderr


def test_labels_of_both_tracks_are_reviewed(place: Path) -> None:
    words = ["annotations", "review", "two", "--min-confidence", "0", "--as", "eaf", "--as", "labelstudio"]
    succeed(words, place)
    out = place / "runs/two/evaluate/test/review"
    lines = (out / "review.csv").read_text().splitlines()
    found = {line.split(",")[1] for line in lines[1:]}
    assert found
    assert found <= {"phase", "steps"}
    config = (out / "labelstudio.xml").read_text()
    assert [name for name in ("phase", "steps", "model", "model steps") if f'name="{name}"' in config] == [
        "phase", "steps", "model", "model steps",
    ]  # fmt: skip
    [file, *_] = sorted(out.glob("*.eaf"))
    [video] = read_eaf(file.read_bytes(), file).videos
    assert {"phase", "steps"} <= {one.track for one in video.intervals} <= {"phase", "steps", "model", "model steps"}


def test_report_and_comparison_of_steps(place: Path) -> None:
    tcn = [
        "--set",
        "temporal.head={name: tcn, layers: 3, maps: 6}",
        "--set",
        "temporal.class_weighting=inverse_frequency",
    ]
    other = ["--config", "tiny.yaml", "--name", "tcn"]
    succeed(["train-temporal", *other, *BOTH, *tcn, "--features", str(features(place))], place)
    succeed(["evaluate", *other, "--features", str(features(place))], place)
    succeed(["report", "two", "tcn"], place)
    page = (place / "runs/two/report.html").read_text()
    for text in ("<h3>Steps</h3>", "Steps over all, phase_mean", "track-steps-ribbon-0", "track-steps-confusion-1"):
        assert text in page
    succeed(["compare", "two", "tcn", "--track", "steps", "--json", "steps.json"], place)
    compared = json.loads((place / "steps.json").read_text())["comparisons"][0]["metrics"]["accuracy"]
    metrics = json.loads((place / "runs/two/evaluate/test/metrics.json").read_text())
    expected = metrics["tracks"]["steps"]["temporal"]["video_macro"]["accuracy"]["mean"]
    assert compared["first"]["mean"] == pytest.approx(expected)
    done = run(["compare", "two", "tcn", "--track", "stages"], place)
    assert (done.returncode, "has no results of the track 'stages', only of phases, steps" in done.stderr) == (2, True)


def test_an_ablation_ranks_by_the_mean_of_the_tracks(place: Path) -> None:
    space = {"base": "tiny.yaml", "space": {"temporal.head.hidden": [4, 8]}, "seeds": [0]}
    (place / "sizes.yaml").write_text(yaml.safe_dump(space))
    printed = succeed(["ablate", "sizes.yaml", "--features", str(features(place)), *BOTH, "--workers", "1"], place)
    assert "phases and" in " ".join(printed.split())
    header, *rows = (place / "runs/sizes/ablation.csv").read_text().splitlines()
    columns = header.split(",")
    for row in rows:
        cells = dict(zip(columns, row.split(","), strict=True))
        each = [float(cells[f"val_accuracy_{track}"]) for track in ("phases", "steps")]
        assert float(cells["val_accuracy"]) == pytest.approx(sum(each) / 2)


def test_changed_steps_are_extracted_again_without_the_features(place: Path) -> None:
    path = place / "videos/steps/video01-steps.tsv"
    before = path.read_text()
    try:
        path.write_text(before.replace("\texpose", "\tcut"))
        succeed(["index", *NAMED[:2], "--force"], place)
        assert "labels" in succeed(["extract", *NAMED], place)
        assert 1 not in read_features(features(place) / "video01.h5").tracks["steps"]
        assert "labels_sha256" in run(["train-temporal", *NAMED, *BOTH], place).stderr
    finally:
        path.write_text(before)
        succeed(["index", *NAMED[:2], "--force"], place)
        succeed(["extract", *NAMED], place)


def test_exported_features_have_the_steps_and_imported_ones_those_of_the_index(place: Path) -> None:
    note = "mstcn holds labels of the phases only, so those of steps are left out"
    options = ["--to", "mstcn", "--unlabelled", "none"]
    assert note in " ".join(succeed(["features", "export", str(features(place)), "mstcn", *options], place).split())
    succeed(["features", "export", str(features(place)), "npz", "--to", "npz"], place)
    ours = read_features(features(place) / "video01.h5")
    with np.load(place / "npz/video01.npz") as archive:
        assert archive["track_steps"].tolist() == ours.tracks["steps"].tolist()
        assert archive["track_steps_names"].tolist() == STEPS
    indexed = ["--config", "tiny.yaml", "--fps", "1", "--index", "index.json", "--labels", "index"]
    succeed(["features", "import", "npz", "--out", "imported", *indexed], place)
    theirs = read_features(place / "imported/video01.h5")
    assert theirs.tracks["steps"].tolist() == ours.tracks["steps"].tolist()
    assert theirs.attributes["tracks"] == ours.attributes["tracks"]
    succeed(["train-temporal", "--config", "tiny.yaml", "--name", "imported", *BOTH, "--features", "imported"], place)


def test_nets_of_the_phases_alone_are_refused_in_one_line(place: Path) -> None:
    joint = run(["train-joint", *NAMED, *BOTH], place)
    assert "data.tracks=phases, steps: the joint net recognises the phases only" in joint.stderr.splitlines()[-1]
    attached = run(["train-joint", *NAMED, "--from-temporal", "two"], place)
    assert "recognises steps besides the phases" in attached.stderr.splitlines()[-1]
    unknown = run(["train-temporal", *NAMED[:2], "--name", "new", "--set", "data.tracks=[phases, stages]",
                   "--features", str(features(place))], place)  # fmt: skip
    assert "data.tracks: simulated has no track 'stages'; choose from phases, steps" in unknown.stderr
    assert {done.returncode for done in (joint, attached, unknown)} == {2}
