"""Terminal tables: their content, and that nothing is cut at 80 columns."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from configs.errors import UserError
from evaluation.metrics.phases import evaluate_phases
from evaluation.metrics.relaxed import CHOLEC80
from evaluation.metrics.tools import evaluate_tools
from evaluation.reports.tables import (
    comparison_table,
    conventions_table,
    events_table,
    others_table,
    phase_table,
    tool_table,
)


def shown(table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    return text


@pytest.fixture(scope="module")
def results():
    rng = np.random.default_rng(0)
    truth = {f"v{k}": np.sort(rng.integers(0, 7, 300)) for k in range(4)}
    predicted = {k: np.where(rng.random(300) < 0.3, rng.integers(0, 7, 300), track) for k, track in truth.items()}
    return evaluate_phases(truth, predicted, CHOLEC80.phases, 1.0, split="test")


@pytest.mark.parametrize("convention", ["phase_mean", "video_macro", "pooled", "relaxed_matlab", "relaxed_fixed"])
def test_phase_table_names_its_convention_and_fits(results, convention):
    text = shown(phase_table(results, convention))
    assert f"[{convention}]" in text
    assert "Split test, 4 videos, 1 fps" in " ".join(text.split())
    assert "…" not in text
    for phase, entry in results[convention].per_phase.items():
        row = next(line for line in text.splitlines() if line.startswith(phase))
        assert f"{entry.scores['jaccard'].mean:.1f}" in row
        assert row.split()[-1] == "4"
    total = next(line for line in text.splitlines() if line.startswith("all"))
    recall = results[convention].scores["recall"]
    assert f"{recall.mean:.1f} ± {recall.std:.1f}" in total


def test_long_names_shrink_and_numbers_do_not():
    names = [
        "A phase with a very long descriptive name indeed",
        "Supercalifragilisticexpialidociousdissection",
        "[red]c",
    ]
    truth = {f"v{k}": np.array([0, 0, 1, 1, 2, 2] * 20) for k in range(3)}
    predicted = {name: np.roll(track, k) for k, (name, track) in enumerate(truth.items())}
    text = shown(phase_table(evaluate_phases(truth, predicted, names, 1.0)))
    assert "Supercalifragilistic" in text
    assert "[red]c" in text
    assert text.count(" ± ") >= 4 * 4
    model = "a very long name of a model in a very long series of experiments"
    text = shown(comparison_table({model: evaluate_phases(truth, predicted, names, 1.0)}))
    assert text.count(" ± ") == 5


def test_absent_phase_shows_a_dash():
    result = evaluate_phases({"v": np.array([0, 0])}, {"v": np.array([0, 0])}, ("A", "B"), 1.0)
    text = shown(phase_table(result))
    assert next(line for line in text.splitlines() if line.startswith("B")).split() == ["B", "-", "-", "-", "-", "0"]
    assert "1 video," in " ".join(text.split())


def test_comparison_has_one_row_per_model(results):
    text = shown(comparison_table({"lstm": results, "per-frame linear": results, "majority phase": results}))
    accuracy = results["phase_mean"].scores["accuracy"]
    rows = [line for line in text.splitlines() if f"{accuracy.mean:.1f} ± {accuracy.std:.1f}" in line]
    assert [row.split()[0] for row in rows] == ["lstm", "per-frame", "majority"]


def test_other_scores_of_one_prediction(results):
    text = shown(others_table(results))
    assert f"{results['segmental'].scores['f1@25'].pooled:.1f}" in text
    for row in ("F1@50 [segmental]", "Edit score [segmental]", "False/h [transitions]", "AUROC [phakir]"):
        assert row in text


def test_events_have_one_row_per_model(results):
    text = shown(events_table({"temporal": results, "majority": {"transitions": results["transitions"]}}))
    rate = results["transitions"].scores["false_per_hour"].pooled
    assert [line.split()[0] for line in text.splitlines() if f" {rate:.1f}" in line] == ["temporal", "majority"]
    assert "PhaKIR: Balanced accuracy" in text
    assert "ECE" not in text  # these have labels only


def test_a_conventions_own_score_is_below_the_table(results):
    text = " ".join(shown(conventions_table(results)).split())
    score = results["relaxed_matlab"].scores["f1_surgformer"]
    assert f"F1 as Surgformer's copy of relaxed_matlab has it: {score.mean:.1f} ± {score.std:.1f}." in text
    assert text.count("Surgformer") == 1


def test_tool_table_with_and_without_thresholds():
    rng = np.random.default_rng(0)
    truth = {f"v{k}": rng.integers(0, 2, (50, 2)) * [1, 0] for k in range(3)}
    scores = {name: rng.random(labels.shape) for name, labels in truth.items()}
    plain = evaluate_tools(truth, scores, ("Grasper", "Hook"))
    text = shown(tool_table(plain))
    assert f"{plain.map_pooled:.1f}" in next(line for line in text.splitlines() if line.startswith("mean (mAP)"))
    assert next(line for line in text.splitlines() if line.startswith("Hook")).split() == ["Hook", "-", "-", "0"]
    assert "F1" not in text
    text = shown(tool_table(evaluate_tools(truth, scores, ("Grasper", "Hook"), {"Grasper": 0.5, "Hook": 0.5})))
    assert "F1" in text


def test_unknown_convention_is_one_clear_line(results):
    with pytest.raises(UserError, match="'strict'; these results have phase_mean"):
        phase_table(results, "strict")
    with pytest.raises(UserError, match="'segmental'"):
        comparison_table({"lstm": results}, "segmental")
    with pytest.raises(UserError, match="no results of segments"):
        others_table({})
