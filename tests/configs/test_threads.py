"""Idle threads do not spin: libgomp's variable is set before torch loads it, unless the user has set it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli import PROJECT

ROOMS = ("configs", "engine", "features", "evaluation", "stage1_cnn", "stage2_temporal", "pipeline")
# The variables that the first module with libgomp would find; no such module is imported, since that takes seconds.
FIRST = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "sklearn"):
            print(name, os.environ.get("GOMP_SPINCOUNT"))
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Watch())
"""


def run(code: str, **variables: str) -> str:
    """The output of a fresh process with only these of OpenMP's variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    environment = {**kept, "PYTHONPATH": str(PROJECT), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("room", ROOMS)
def test_every_package_sets_the_spin_count(room: str) -> None:
    code = f"import {room}, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    assert run(code) == "1000 False"


@pytest.mark.parametrize(
    "module", ["stage2_temporal.train", "stage1_cnn.extract", "engine.device", "evaluation.metrics.tools"]
)
def test_the_spin_count_is_set_before_torch_is_imported(module: str) -> None:
    found = run(FIRST + f"import {module}\nimport sklearn")
    assert found.split()[1] == "1000"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"GOMP_SPINCOUNT": ""}, " None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
        ({"OMP_NUM_THREADS": "2"}, "1000 None"),
    ],
)
def test_the_user_s_value_has_precedence(variables: dict[str, str], expected: str) -> None:
    code = "import pipeline, os; print(*map(os.environ.get, ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')))"
    assert run(code, **variables) == expected.strip()


def test_child_processes_inherit_the_spin_count() -> None:
    code = "import subprocess, pipeline; subprocess.run(['printenv', 'GOMP_SPINCOUNT'], check=True)"
    assert run(code) == "1000"


def test_the_tests_run_with_the_spin_count() -> None:
    assert {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
