"""The parameters of a decoding are fitted on validation videos, the graph on training labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from configs.errors import UserError
from engine.files import sha256_file
from stage2_temporal.decoding.calibration import fit_temperature, log_probabilities, scaled
from stage2_temporal.decoding.fit import USUAL_KAPPA, USUAL_MIN_DURATION_S, fit_track
from stage2_temporal.decoding.fitted import FittedDecoding, load_decoding

CLASSES = ("a", "b", "c")


def operation(seed: int, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Labels (T,) of three phases in order, and noisy probabilities (T, 3)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], rng.integers(40, 80, 3))
    logits = 2 * np.eye(3)[labels] + rng.normal(0, noise, (len(labels), 3))
    return labels, softmax(2 * logits, axis=1).astype(np.float32)


def test_the_temperature_of_overconfident_logits_is_found_and_bounded() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2000, 3))
    labels = np.array([rng.choice(3, p=one) for one in softmax(logits, axis=1)])
    for factor in (0.7, 1.0, 3.0):
        assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.1)
    assert fit_temperature(1000 * logits, labels) == pytest.approx(5, abs=0.01)
    assert fit_temperature(logits[:0], labels[:0]) == 1
    np.testing.assert_allclose(scaled(log_probabilities(softmax(3 * logits, axis=1)), 3.0), softmax(logits, axis=1))


def test_parameters_are_chosen_on_validation_and_scores_recorded() -> None:
    train, val = [operation(seed)[0] for seed in range(4)], [operation(seed) for seed in (10, 11)]
    labels, probabilities = zip(*val, strict=True)
    found = fit_track(CLASSES, train, probabilities, labels, 1.0)
    assert found.undecoded
    for one in (found.filter, found.causal):
        assert one
        assert one.accuracy > found.undecoded.accuracy
        assert one.false_transitions_per_h < found.undecoded.false_transitions_per_h / 4
    assert found.temperature > 1.2
    mean = np.mean([(p.argmax(axis=1) == y).mean() for y, p in val])
    assert found.undecoded.accuracy == pytest.approx(100 * mean)
    assert found.graph == fit_track(CLASSES, train, probabilities[:1], labels[:1], 1.0).graph  # of training alone
    unlabelled = [np.full(len(labels[0]), -1), labels[1]]
    assert fit_track(CLASSES, train, probabilities, unlabelled, 1.0).undecoded.accuracy > 0  # type: ignore[union-attr]


def test_one_validation_video_that_is_recognised_badly_makes_no_other_one_useless() -> None:
    train, val = [operation(0)[0]], [operation(seed) for seed in (10, 11)]
    labels, probabilities = zip(*((np.roll(one, len(one) // 2), p) for one, p in val), strict=True)
    one, two = (fit_track(CLASSES, train, probabilities[:n], labels[:n], 1.0) for n in (1, 2))
    assert one.temperature == pytest.approx(2, abs=0.01)
    assert one.filter_temperature == pytest.approx(4, abs=0.01)
    assert two.temperature > 2.5
    assert two.filter_temperature > 5


def test_one_validation_video_makes_no_probability_more_certain() -> None:
    train, val = [operation(0)[0]], [operation(seed, 0.3) for seed in (10, 11)]  # nearly always right, less certain
    labels, probabilities = zip(*((one, 0.6 * p + 0.4 / 3) for one, p in val), strict=True)
    assert fit_track(CLASSES, train, probabilities[:1], labels[:1], 1.0).temperature == pytest.approx(1, abs=0.01)
    assert fit_track(CLASSES, train, probabilities, labels, 1.0).temperature == pytest.approx(0.5, abs=0.01)


def test_without_validation_labels_usual_parameters_are_taken() -> None:
    train = [operation(seed)[0] for seed in range(2)]
    labels, probabilities = operation(9)
    for given in (([], []), ([probabilities], [np.full(len(labels), -1)])):
        found = fit_track(CLASSES, train, *given, 1.0)
        assert found.filter_kappa == found.viterbi_kappa == USUAL_KAPPA
        assert found.min_duration_s == USUAL_MIN_DURATION_S
        assert (found.temperature, found.filter_temperature, found.smoother_temperature) == (1, 2, 3)
        assert found.undecoded is found.filter is found.causal is None


def test_a_higher_rate_gives_the_same_parameters_per_second() -> None:
    train, (labels, probabilities) = [operation(seed)[0] for seed in range(2)], operation(10)
    slow = fit_track(CLASSES, train, [probabilities], [labels], 1.0)
    fast = fit_track(
        CLASSES, [one.repeat(5) for one in train], [probabilities.repeat(5, axis=0)], [labels.repeat(5)], 5.0
    )
    assert fast == slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "best.pt").write_bytes(b"weights")
    labels, probabilities = operation(1)
    track = fit_track(CLASSES, [labels], [probabilities], [labels], 1.0)
    sha256 = sha256_file(tmp_path / "best.pt")
    FittedDecoding(weights_sha256=sha256, fps=1.0, train=("t",), val=("v",), tracks={"phases": track}).write(tmp_path)
    return tmp_path


def test_a_file_is_read_as_written(folder: Path) -> None:
    found = load_decoding(folder, {"phases": CLASSES})
    assert found.to_json() == json.loads((folder / "decoding.json").read_text())
    assert found.tracks["phases"].graph.following[0][0] == 0


def test_a_missing_or_foreign_file_is_refused_with_what_to_do(folder: Path) -> None:
    for tracks in ({"phases": ("a", "b", "z")}, {"phases": CLASSES, "steps": ("x",)}):
        with pytest.raises(UserError, match=r"decoding.json: damaged \(its .*train-temporal again"):
            load_decoding(folder, tracks)
    (folder / "best.pt").write_bytes(b"other")
    with pytest.raises(UserError, match="fitted to another checkpoint"):
        load_decoding(folder, {"phases": CLASSES})
    (folder / "decoding.json").write_text("{")
    with pytest.raises(UserError, match=r"not a JSON file .*; run train-temporal again"):
        load_decoding(folder, {"phases": CLASSES})
    (folder / "decoding.json").unlink()
    with pytest.raises(UserError, match="no such file, so there is no decoding; run train-temporal again"):
        load_decoding(folder, {"phases": CLASSES})


@pytest.mark.parametrize(
    "damage",
    [
        {"filter_kappa": float("nan")},
        {"viterbi_kappa": -1},
        {"temperature": 0},
        {"viterbi_kappa": "much"},
        {"min_duration_s": 1e12},
        {"graph": None},
        {"graph": {"initial": [1, 0]}},
        {"classes": 3},
        {"viterbi_kappa": "0.1"},
        {"unknown": 1},
        {"graph": {"following": [[0] * 3] * 3}},
        {"graph": {"following": np.eye(3).tolist()}},
        {"graph": {"following": [[0, 5, 5], [5, 0, 5], [5, 5, 0]]}},
        {"graph": {"initial": [1e308, 0.1, 0.1]}},
        {"graph": {"initial": [1, 0, 0]}},
    ],
)
def test_damaged_values_are_refused(folder: Path, damage: dict) -> None:
    tree = json.loads((folder / "decoding.json").read_text())
    track = tree["tracks"]["phases"]
    graph = {**track["graph"], **damage["graph"]} if damage.get("graph") else damage.get("graph", track["graph"])
    track |= damage | {"graph": graph}
    (folder / "decoding.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"decoding.json: damaged"):
        load_decoding(folder, {"phases": CLASSES})
