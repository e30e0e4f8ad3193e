"""Figures: right file, right pixels, readable colours; their appearance was checked by eye."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from evaluation.metrics.relaxed import CHOLEC80
from evaluation.reports.paper_figures import (
    PALETTE,
    UNLABELLED,
    confusion_counts,
    phase_colours,
    phase_ribbons,
)


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def pixels(path: Path, colour: str) -> int:
    """How many pixels have exactly this colour."""
    return int((np.asarray(Image.open(path).convert("RGB")) == rgb(colour)).all(axis=2).sum())


def ribbon_rows(path: Path, colour: str) -> int:
    """How many pixel rows hold a long stretch of this colour."""
    image = np.asarray(Image.open(path).convert("RGB"))
    return int(((image == rgb(colour)).all(axis=2).sum(axis=1) > 400).sum())


def test_ribbons_show_truth_and_each_prediction(tmp_path):
    truth, predicted = np.zeros(600, int), {"lstm": np.zeros(600, int), "majority": np.ones(600, int)}
    phase_ribbons(tmp_path / "one.png", [("video01", truth, predicted)], 1.0, CHOLEC80.phases, "One video")
    first, second = (ribbon_rows(tmp_path / "one.png", PALETTE[k]) for k in (0, 1))
    assert first == pytest.approx(2 * second, abs=2)  # truth and lstm in the first colour, majority in the second
    assert second > 20
    assert all(pixels(tmp_path / "one.png", colour) > 400 for colour in PALETTE[:7])  # the legend has all phases
    assert [p.name for p in tmp_path.iterdir()] == ["one.png"]


def test_unlabelled_frames_are_marked_and_a_new_video_has_no_truth(tmp_path):
    truth = np.where(np.arange(600) < 450, -1, 0)
    phase_ribbons(tmp_path / "part.png", [("v", truth, {"lstm": np.ones(600, int)})], 1.0, ("A", "B"))
    assert pixels(tmp_path / "part.png", UNLABELLED["facecolor"]) > 5000
    phase_ribbons(tmp_path / "new.png", [("v", np.full(600, -1), {"lstm": np.ones(600, int)})], 1.0, ("A", "B"))
    assert pixels(tmp_path / "new.png", UNLABELLED["facecolor"]) < 100


def test_height_grows_with_videos_and_width_stays(tmp_path):
    sizes = []
    for count in (1, 5, 40):
        videos = [(f"video{k:02d}", np.arange(300) // 50, {"lstm": np.arange(300) // 50}) for k in range(count)]
        path = tmp_path / f"{count}.png"
        phase_ribbons(path, videos, 1.0, CHOLEC80.phases)
        sizes.append(Image.open(path).size)
    assert len({width for width, _ in sizes}) == 1
    per_video = (sizes[1][1] - sizes[0][1]) / 4
    assert per_video > 2 * 30  # two ribbons of at least 30 pixels
    assert (sizes[2][1] - sizes[1][1]) / 35 == pytest.approx(per_video, abs=2)


def test_equal_input_gives_equal_bytes_and_pdf_follows_the_suffix(tmp_path):
    video = [("v", np.arange(60) // 10, {"lstm": np.arange(60) // 12})]
    for name in ("a.png", "b.png", "a.pdf", "b.pdf"):
        phase_ribbons(tmp_path / name, video, 1.0, CHOLEC80.phases)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_names_are_drawn_literally(tmp_path):
    """A lone dollar sign or a broken formula would raise if it were read as mathematics."""
    names = (r"a$\frac$", "b$b$", "c^{")
    track = np.array([0, 1, 2] * 20)
    phase_ribbons(tmp_path / "r.png", [(r"$\bad$", track, {r"$\worse$": track})], 1.0, names, r"$\title$")


def test_wrong_suffix_and_empty_videos_write_nothing(tmp_path):
    video = ("v", np.zeros(5, int), {"lstm": np.zeros(5, int)})
    with pytest.raises(UserError, match=r"ribbons\.jpg: figures are written as \.png or \.pdf"):
        phase_ribbons(tmp_path / "ribbons.jpg", [video], 1.0, ("A",))
    with pytest.raises(UserError, match=r"r\.png: a ribbon figure needs"):
        phase_ribbons(tmp_path / "r.png", [], 1.0, ("A",))
    with pytest.raises(UserError, match=r"r\.png: a ribbon figure needs"):
        phase_ribbons(tmp_path / "r.png", [("v", np.empty(0, int), {})], 1.0, ("A",))
    assert list(tmp_path.iterdir()) == []


def test_confusion_counts():
    truth, predicted = (
        {"a": np.array([0, 0, 1, -1]), "b": np.array([1])},
        {"a": np.array([0, 1, 1, 1]), "b": np.array([0])},
    )
    counts = confusion_counts(truth, predicted, 3)
    assert counts.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(linear, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISIONS)
def test_palette_is_distinguishable_under_colour_blindness(vision):
    """A CIE76 distance of 15 is far above what is just noticeable (2.3)."""
    channels = [np.array(rgb(colour)) / 255 for colour in PALETTE]
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in channels]
    seen = [lab(np.array(VISIONS[vision]) @ colour) for colour in linear]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


def test_a_phase_keeps_its_colour_and_many_phases_all_differ():
    assert phase_colours(3) == phase_colours(7)[:3]
    assert len(set(phase_colours(14))) == 14


def test_nothing_global_and_nothing_heavy_is_imported():
    program = """
import sys, tempfile, pathlib, numpy as np
import evaluation.reports.paper_figures, evaluation.reports.tables
import evaluation.metrics.tools, evaluation.files.predictions, evaluation.metrics.statistics
heavy = {"matplotlib", "sklearn", "scipy", "torch", "rich", "PIL"} & set(sys.modules)
assert not heavy, heavy
with tempfile.TemporaryDirectory() as folder:
    video = ("v", np.zeros(9, int), {"lstm": np.zeros(9, int)})
    evaluation.reports.paper_figures.phase_ribbons(pathlib.Path(folder) / "r.png", [video], 1.0, ("A", "B"))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[3])
