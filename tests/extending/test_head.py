"""A plug-in head, `head_example.py`, works everywhere that the project's own heads work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from configs.load import load_dataset
from configs.registry import PLUGINS_VARIABLE
from evaluation.files.predictions import read_prediction_csv
from tests.cli import ONE_THREAD, PROJECT, Forks, run

EXAMPLE = Path(__file__).with_name("head_example.py")
SETTINGS = """
device: cpu
data: {root: data, fps: 1.0, index: index.json, split: {rule: 2/1/1}}
preprocess: {resize_px: 36, crop_px: 32}
cnn: {backbone: mobilenet_v3_small, weights: random}
extract: {encoder: initial, precision: fp32, workers: 1}
temporal:
  head: {name: average, decay: 0.5}
  sequence: {mode: chunked, frames: 16, batch: 2}
  epochs: 2
  baseline: false
"""
ABLATION = """
base: settings.yaml
space: {temporal.head.decay: [0.5, 0.8]}
seeds: [0]
"""
# What no command of this test does: other processes get the settings, the joint net takes the head, frames come singly.
ELSEWHERE = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import numpy as np
from configs.load import load_config
from configs.schema import JointNetConfig
from features.store_folder import load_feature_set
from stage1_cnn.model import build_backbone
from stage2_temporal.joint.net import build_joint
from stage2_temporal.predict import OnlinePredictor, load_temporal, predict_phases

if __name__ == "__main__":
    config = load_config("settings.yaml")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(repr, config.temporal.head).result() == "AverageSettings(name='average', decay=0.5)"
    backbone = build_backbone("resnet18", "random", 0)
    net = build_joint(backbone, JointNetConfig(mapping=True), config.temporal.head, tools=2, phases=7)
    assert net.phase.head.decay == 0.5
    model, about = load_temporal(Path("runs/outside/temporal"))
    videos = load_feature_set(Path("features"), ["video04"])
    whole = predict_phases(model, videos, "carried", 1, "cpu")["video04"]
    online = OnlinePredictor(model, "carried", 1, "cpu")
    single = np.stack([online.step(frame) for frame in videos["video04"].features])
    np.testing.assert_allclose(single, whole, atol=1e-6)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Commands where a package is installed that declares the head as its entry point."""
    site = tmp_path_factory.mktemp("site")
    shutil.copyfile(EXAMPLE, site / "average_head.py")
    about = site / "average-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: average\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[surgstage.heads]\naverage = average_head\n")
    server = Forks(PYTHONPATH=os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))
    yield server
    server.close()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """Four short simulated operations and their features, and settings that name the head."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "settings.yaml").write_text(SETTINGS)
    (folder / "ablation.yaml").write_text(ABLATION)
    size = ["--fps", "2", "--width", "48", "--height", "48", "--speed-up", "60"]
    for words in (
        ["simulate", "data", "--videos", "4", "--seed", "1", *size],
        ["index", "--config", "settings.yaml"],
        ["extract", "--config", "settings.yaml", "--name", "outside"],
    ):
        done = forks.run(words, folder)
        assert done.code == 0, done.output
    next((folder / "artifacts/features").iterdir()).rename(folder / "features")
    return folder


@pytest.fixture
def succeed(workplace: Path, forks: Forks) -> Callable[..., str]:
    def command(*words: str) -> str:
        done = forks.run(words, workplace)
        assert done.code == 0, done.output
        return done.output

    return command


@pytest.mark.slow
def test_it_trains_resumes_is_evaluated_and_predicts(workplace: Path, succeed: Callable[..., str]) -> None:
    words = ["--config", "settings.yaml", "--name", "outside"]
    succeed("train-temporal", *words, "--features", "features")
    recorded = json.loads((workplace / "runs/outside/temporal/identity.json").read_text())
    assert recorded["temporal"]["head"] == {"name": "average", "decay": 0.5}
    succeed("train-temporal", *words, "--features", "features")  # the same settings: finished before
    succeed("evaluate", *words, "--features", "features")
    succeed("predict", *words, "data/videos/video04.mp4")
    found, known = (
        read_prediction_csv(workplace / "runs/outside" / place / "video04.csv", load_dataset("cholec80"))
        for place in ("predict", "evaluate/test/predictions")
    )
    np.testing.assert_allclose(found.probabilities, known.probabilities, atol=2e-5)


@pytest.mark.slow
def test_it_runs_in_other_processes_in_the_joint_net_and_frame_by_frame(workplace: Path) -> None:
    (workplace / "elsewhere.py").write_text(ELSEWHERE)
    variables = {**os.environ, PLUGINS_VARIABLE: str(EXAMPLE), "PYTHONPATH": str(PROJECT), **ONE_THREAD}
    command = [sys.executable, "elsewhere.py"]
    done = subprocess.run(command, cwd=workplace, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_workers_of_an_ablation_know_it(workplace: Path, succeed: Callable[..., str]) -> None:
    succeed("ablate", "ablation.yaml", "--features", "features", "--name", "space", "--workers", "2")
    assert (workplace / "runs/space/ablation.csv").read_text().count("decay") > 2


@pytest.mark.slow
def test_its_settings_are_checked(workplace: Path, forks: Forks, succeed: Callable[..., str]) -> None:
    show = ["config", "show", "--config", "settings.yaml"]
    assert "decay: 0.25" in succeed(*show, "--set", "temporal.head.decay=0.25")
    wrong = forks.complete([*show, "--set", "temporal.head.deacy=0.25"], workplace)
    assert wrong.stderr.strip() == "error: --set: unknown key temporal.head.deacy; did you mean temporal.head.decay?"


def test_without_the_file_its_name_is_unknown(workplace: Path) -> None:
    missing = run(["config", "show", "--config", "settings.yaml"], workplace)
    assert missing.returncode == 2
    assert "temporal.head: unknown head average (known: lstm, gru, tcn, " in missing.stderr
