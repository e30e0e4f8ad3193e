"""The numbers of `summary.json`, and its keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluation.metrics.phases import evaluate_phases
from evaluation.metrics.tools import evaluate_tools
from evaluation.reports.summary import SUMMARY_KEYS, summarise, update_summary


def test_fractions_of_the_named_conventions():
    truth = {"v1": np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1]), "v2": np.array([0, 1])}
    predicted = {"v1": np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1]), "v2": np.array([0, 1])}
    phases = evaluate_phases(truth, predicted, ("A", "B"), 1.0)
    tools = evaluate_tools({"v": np.array([[1], [0]])}, {"v": np.array([[0.2], [0.8]])}, ("Hook",))
    summary = summarise(phases, tools)
    assert summary["phase_accuracy"] == pytest.approx((0.9 + 1.0) / 2)
    # F1 of A: 6/7 and 1; of B: 12/13 and 1.
    assert summary["phase_f1"] == pytest.approx(np.mean([(6 / 7 + 1) / 2, (12 / 13 + 1) / 2]))
    assert summary["tool_map"] == pytest.approx(0.5)


def test_task_that_was_not_evaluated_is_none():
    assert summarise(None, None) == {"phase_accuracy": None, "phase_f1": None, "tool_map": None}


def test_summaries_have_the_same_keys_whatever_ran(tmp_path: Path) -> None:
    update_summary(tmp_path, {"name": "a"}, {"index": 1.234})
    summary = update_summary(tmp_path, {"tool_map": 0.5}, {"extract": 2.0})
    assert list(summary) == [*SUMMARY_KEYS, "seconds"]
    assert summary["seconds"] == {"index": 1.23, "extract": 2.0}
    assert summary["name"] == "a"
