"""Benchmarks keep working: every name that they import exists, and the check for GPUs runs on a CPU."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pipeline import PACKAGES, cli
from tests.cli import ONE_THREAD, PROJECT

BENCHMARKS = sorted((PROJECT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_from_the_product_exists(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("path", sorted((PROJECT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_names_a_run_only_for_commands_that_have_one(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "pipeline":
            continue
        if isinstance(node.args[0], ast.Constant):
            command = cli.get_command(click.Context(cli), node.args[0].value)
            assert command is not None
            named = any("--name" in option.opts for option in command.params)
            without = isinstance(node.args[2], ast.Constant) and node.args[2].value is None
            assert named != without, ast.unparse(node)


def test_the_benchmark_of_heads_measures_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal head and one without state, at tiny sizes, in this process."""
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)  # which would hold for later tests as well
    heads = importlib.import_module("heads")
    given = heads.parser().parse_args([])
    vars(given).update(videos=2, frames=6, width=5, early=3, late=7, steps=2, repeat=1)
    tcn, linear = (heads.measured(name, given) for name in ("tcn", "linear"))
    assert tcn["step_ratio"] > 0
    assert tcn["state_bytes"] == tcn["state_bytes_early"] == 2 * 32 * 2 * 255 * 4
    assert linear["state_bytes"] == 0
    assert heads.line("tcn", tcn).split()[0] == "tcn"
    assert heads.line("ahead", {"offline": True, "parameters": 3}).split()[-2:] == ["offline", "offline"]


@pytest.mark.slow
def test_the_check_for_gpus_runs_on_a_cpu(tmp_path: Path) -> None:
    """Steps that use the command line, the LSTM and the wrapper that times every step."""
    steps = ["lstm", "material", "waits"]
    variables = {"GPU_CHECK_REHEARSE": "1", "OUT": str(tmp_path / "out"), "GPU_CHECK_WORK": str(tmp_path / "work")}
    done = subprocess.run(
        [str(PROJECT / "benchmarks/gpu/gpu_check.sh"), *steps],
        env={**os.environ, **ONE_THREAD, **variables, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = [json.loads(line) for line in (tmp_path / "out/figures.jsonl").read_text().splitlines()]
    ended = {line["step"]: line["outcome"] for line in figures if line["figure"] == "seconds of the step"}
    assert ended == dict.fromkeys(steps, 0), (tmp_path / "out/log.txt").read_text()[-3000:]
    assert {line["step"] for line in figures if line["figure"] != "seconds of the step"} == set(steps)
