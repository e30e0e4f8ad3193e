"""The tool metric of docs/extending.md: one file outside the package, and results and tables have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import roc_auc_score

from configs.registry import PLUGINS_VARIABLE
from tests.cli import ONE_THREAD, PROJECT

EXAMPLE = Path(__file__).with_name("tool_metric_example.py")
TRUTH = {"v1": [[1, 0], [0, 0], [1, 0], [0, 0]], "v2": [[0, 0], [1, 0], [-1, -1], [0, 1]]}
SCORES = {
    "v1": [[0.9, 0.1], [0.4, 0.2], [0.3, 0.3], [0.2, 0.4]],
    "v2": [[0.1, 0.5], [0.8, 0.6], [0.7, 0.7], [0.85, 0.8]],
}
PROGRAM = """
import json, sys
import numpy as np
from evaluation.metrics import plugin_names
from evaluation.metrics.results import ToolResults
from evaluation.metrics.tools import evaluate_tools
from evaluation.reports.tables import tool_cells, tool_table

truth, scores = ({name: np.array(rows) for name, rows in one.items()} for one in json.loads(sys.argv[1]))
found = evaluate_tools(truth, scores, ["Grasper", "Hook"])
tree = json.loads(json.dumps(found.to_json()))
assert ToolResults.from_json(tree) == found
table = tool_table(found)
shown = {"columns": list(table.columns), "rows": {name: list(cells) for name, cells in table.rows}}
print(json.dumps({"results": tree, "plugins": plugin_names(), "table": shown}))
"""


def evaluate(**plugins: str) -> dict[str, Any]:
    variables = {**os.environ, "PYTHONPATH": str(PROJECT), **ONE_THREAD, **plugins}
    command = [sys.executable, "-c", PROGRAM, json.dumps([TRUTH, SCORES])]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_tool_metric_is_one_file() -> None:
    without, found = evaluate(), evaluate(**{PLUGINS_VARIABLE: str(EXAMPLE)})
    assert (without["plugins"], found["plugins"]) == ([], ["auroc"])
    metric = found["results"].pop("metrics")["auroc"]
    assert found["results"] == without["results"]
    labels, values = [[row[0] for name in TRUTH for row in one[name]] for one in (TRUTH, SCORES)]
    kept = [k for k, label in enumerate(labels) if label >= 0]
    pooled = 100 * roc_auc_score([labels[k] for k in kept], [values[k] for k in kept])
    grasper = metric["per_tool"]["Grasper"]
    assert grasper["pooled"] == pytest.approx(pooled)
    assert grasper["mean"] == pytest.approx((75 + 50) / 2)  # v1: three of four pairs are in order; v2: one of two
    assert metric["per_tool"]["Hook"]["mean"] == pytest.approx(100)  # v1 does not have it
    assert metric["pooled"] == pytest.approx((pooled + metric["per_tool"]["Hook"]["pooled"]) / 2)
    assert "AUROC pooled" not in without["table"]["columns"]
    column = found["table"]["columns"].index("AUROC pooled")
    assert found["table"]["rows"]["Grasper"][column] == f"{pooled:.1f}"
    assert found["table"]["rows"]["mean (mAP)"][column] == f"{metric['pooled']:.1f}"
