"""A head from outside, `head_example.py`, goes everywhere that the project's own heads go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.registry import PLUGINS_VARIABLE
from tests.cli import run
from tests.stage2_temporal.toy import cue_video, write_folder

EXAMPLE = Path(__file__).with_name("head_example.py")
SETTINGS = """
device: cpu
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


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of four short videos, and settings that name the head."""
    folder = tmp_path_factory.mktemp("head")
    rng = np.random.default_rng(0)
    videos = {f"video0{n}": cue_video(rng, split, 60) for n, split in enumerate(("train", "train", "val", "test"), 1)}
    write_folder(folder / "features", videos)
    (folder / "settings.yaml").write_text(SETTINGS)
    (folder / "ablation.yaml").write_text(ABLATION)
    return folder


def succeed(folder: Path, *words: str) -> str:
    done = run(words, folder, **{PLUGINS_VARIABLE: str(EXAMPLE)})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_it_trains_resumes_and_is_evaluated(workplace: Path) -> None:
    words = ["--config", "settings.yaml", "--name", "outside"]
    succeed(workplace, "train-temporal", *words, "--features", "features")
    recorded = json.loads((workplace / "runs/outside/temporal/identity.json").read_text())
    assert recorded["temporal"]["head"] == {"name": "average", "decay": 0.5}
    succeed(workplace, "train-temporal", *words, "--features", "features")  # the same settings: finished before
    succeed(workplace, "evaluate", *words, "--features", "features")
    assert (workplace / "runs/outside/evaluate/test/metrics.json").is_file()


def test_workers_of_an_ablation_know_it(workplace: Path) -> None:
    succeed(workplace, "ablate", "ablation.yaml", "--features", "features", "--name", "space", "--workers", "2")
    assert (workplace / "runs/space/ablation.csv").read_text().count("decay") > 2


def test_its_settings_are_checked(workplace: Path) -> None:
    show = ["config", "show", "--config", "settings.yaml"]
    assert "decay: 0.25" in succeed(workplace, *show, "--set", "temporal.head.decay=0.25")
    wrong = run([*show, "--set", "temporal.head.deacy=0.25"], workplace, **{PLUGINS_VARIABLE: str(EXAMPLE)})
    assert wrong.stderr.strip() == "error: --set: unknown key temporal.head.deacy; did you mean temporal.head.decay?"


def test_without_the_file_its_name_is_unknown(workplace: Path) -> None:
    missing = run(["config", "show", "--config", "settings.yaml"], workplace)
    assert missing.returncode == 2
    assert "temporal.head: unknown head average (known: lstm, gru, tcn, linear)" in missing.stderr
