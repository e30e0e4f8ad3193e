"""Features of other programs through the real command line: stage two gives the numbers of features extracted here."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from features.store import read_features
from interop.feature_files.labels import TECNO_ORDER
from tests.cli import run, succeed
from tests.test_cli import SETTINGS, feature_folder, refuse

IDS = [f"video{number:02d}" for number in range(1, 6)]
RULE = ["--set", "data.split.rule=3/1/1"]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five simulated operations, their features and a trained and evaluated stage two."""
    folder = tmp_path_factory.mktemp("extracted")
    options = ["--videos", "5", "--seed", "1", "--fps", "5", "--width", "64", "--height", "64", "--speed-up", "60"]
    succeed(["simulate", "data", *options], folder)
    tree = json.loads(json.dumps(SETTINGS))
    tree["data"]["root"] = str(folder / "data")
    tree["extract"]["encoder"] = "initial"
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    succeed(["index", "--config", "tiny.yaml"], folder)
    succeed(["extract", "--config", "tiny.yaml"], folder)
    trained(folder, "here", feature_folder(folder))
    return folder


def trained(folder: Path, name: str, features: Path) -> tuple[object, np.ndarray]:
    """Train and evaluate stage two; returns the metrics of its phases, and the probabilities of the test video."""
    common = ["--config", "tiny.yaml", "--name", name, "--features", str(features)]
    succeed(["train-temporal", *common], folder)
    succeed(["evaluate", *common], folder)
    return results(folder, name)


def results(folder: Path, name: str) -> tuple[object, np.ndarray]:
    place = folder / "runs" / name / "evaluate/test"
    with (place / "predictions/video05.csv").open() as stream:
        rows = [[float(row[key]) for key in row if key.startswith("p_")] for row in csv.DictReader(stream)]
    return json.loads((place / "metrics.json").read_text())["phases"], np.array(rows)


def tecno(folder: Path, features: Path) -> list[str]:
    """What TeCNO writes at 25 fps, of which every 25th row is a frame of the features."""
    for number, name in enumerate(IDS, start=1):
        video = read_features(features / f"{name}.h5")
        stems = np.repeat(np.asarray(video.features, np.float32), 25, axis=0)
        labels = np.asarray(np.repeat(video.phase, 25).tolist())
        content = [stems, np.zeros((len(stems), 7), np.float32), labels]
        (folder / f"video_{number}_25.0fps.pkl").write_bytes(pickle.dumps(content))
    return ["--dataset", "cholec80", "--every", "25", *RULE]


def clam(folder: Path, features: Path) -> list[str]:
    """`features` and `coords` as in a file of CLAM; the labels are those of the index."""
    for name in IDS:
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["features"] = np.asarray(read_features(features / f"{name}.h5").features, np.float32)
            file["coords"] = np.zeros((len(file["features"]), 2), np.int32)
    return ["--fps", "1", "--index", "artifacts/index.json", "--config", "tiny.yaml"]


def tensors(folder: Path, features: Path) -> list[str]:
    for name in IDS:
        video = read_features(features / f"{name}.h5")
        content = {
            "features": torch.from_numpy(np.asarray(video.features, np.float32)),
            "labels": torch.tensor(video.phase),
        }
        torch.save(content, folder / f"{name}.pt")
    return ["--dataset", "cholec80", "--fps", "1", "--phase-order", ",".join(TECNO_ORDER), *RULE]


def exported(folder: Path, features: Path) -> list[str]:
    shutil.rmtree(folder)
    succeed(["features", "export", str(features), str(folder), "--to", "npz"], features.parent)
    return ["--index", "artifacts/index.json", "--config", "tiny.yaml"]


@pytest.mark.parametrize("write", [tecno, clam, tensors, exported])
def test_imported_features_are_those_extracted_here(extracted: Path, tmp_path: Path, write: object) -> None:
    assert callable(write)
    (tmp_path / "theirs").mkdir()
    here = feature_folder(extracted)
    options = write(tmp_path / "theirs", here)
    succeed(["features", "import", str(tmp_path / "theirs"), "--out", str(tmp_path / "out"), *options], extracted)
    for name in IDS:
        ours, imported = (read_features(folder / f"{name}.h5") for folder in (here, tmp_path / "out"))
        assert np.array_equal(np.asarray(ours.features), np.asarray(imported.features))
        assert np.array_equal(ours.phase, imported.phase)
        assert np.array_equal(ours.time_s, imported.time_s)
        if "--index" in options:
            assert np.array_equal(ours.frame_index, imported.frame_index)
            assert np.array_equal(ours.tools, imported.tools)
    if write is tecno:
        line = refuse(["extract", "--config", "tiny.yaml", "--index", f"{tmp_path}/out/index.json"], extracted)
        assert "its features were imported, so there are no frames to read" in line
        metrics, rows = trained(extracted, "tecno", tmp_path / "out")
        assert metrics == results(extracted, "here")[0]
        assert np.allclose(rows, results(extracted, "here")[1], rtol=0, atol=1e-6)


def test_to_mstcn_and_back(extracted: Path, tmp_path: Path) -> None:
    here, folder = feature_folder(extracted), tmp_path / "mstcn"
    assert "5 video(s) written as mstcn" in succeed(
        ["features", "export", str(here), str(folder), "--to", "mstcn"], tmp_path
    )
    names = {
        int(n): name for n, name in (line.split() for line in (folder / "mapping.txt").read_text().split("\n")[:-1])
    }
    for video in IDS:  # as ms-tcn's batch_gen.py reads them
        features = np.load(folder / "features" / f"{video}.npy")
        content = (folder / "groundTruth" / f"{video}.txt").read_text().split("\n")[:-1]
        ours = read_features(here / f"{video}.h5")
        assert features.dtype == np.float32
        assert np.array_equal(features.T, np.asarray(ours.features, np.float32))
        assert content == [names[phase] for phase in ours.phase.tolist()]
    assert (folder / "splits/test.split1.bundle").read_text() == "video05.txt\n"
    out = str(tmp_path / "out")
    succeed(["features", "import", str(folder), "--out", out], tmp_path)  # the rate is in surgstage.json
    metrics, rows = trained(extracted, "mstcn", Path(out))
    assert metrics == results(extracted, "here")[0]
    assert np.allclose(rows, results(extracted, "here")[1], rtol=0, atol=1e-6)
    assert succeed(["features", "verify", out], tmp_path).endswith("all files are intact\n")
    assert "backbone: imported-mstcn" in succeed(["features", "info", out], tmp_path)
    line = refuse(["predict", "--config", "tiny.yaml", "--name", "mstcn", "data/videos/video05.mp4"], extracted)
    assert "trained on imported features" in line
    line = refuse(
        ["evaluate", "--config", "tiny.yaml", "--name", "mstcn", "--index", "artifacts/index.json"], extracted
    )
    assert "trained on imported features" in line
    line = refuse(["features", "export", out, str(folder), "--to", "npz"], tmp_path)
    assert "exists and is not empty; choose another folder" in line
    line = refuse(["features", "import", str(folder), "--out", out, "--index", "x", "--split", "a"], tmp_path)
    assert "--split: cannot be combined with --index" in line
    unused = ["--set", "data.tracks=[phases,steps]", "--encoder", ""]
    done = run(["features", "import", str(folder), "--out", out, *unused], tmp_path)
    assert "note: --set data.tracks has no effect here; train-temporal uses it" in done.stderr
    assert "--encoder: the name is empty" in done.stderr
    for inside in (folder, folder / "more", tmp_path / "link"):
        if inside.name == "link":
            inside.symlink_to(folder)
        line = refuse(["features", "import", str(folder), "--out", str(inside), "--fps", "1"], tmp_path)
        assert f"--out {inside}: is where the files at {folder} are; name a folder outside of it" in line
