"""The table of (command, mode, option) in tests/options_table.py is complete, and every row is true."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel

from configs.load import load_ablation
from pipeline import cli
from tests.options_table import DOCUMENT, MODES, Mode, commands, document, options_of, spelled

PROJECT = Path(__file__).resolve().parent.parent
RUNNER = CliRunner()


class Work:
    """The arguments of the calls of the functions that do the work."""

    def __init__(self) -> None:
        self.called: list[Any] = []

    def noting(self, name: str, end: bool) -> Any:
        def note(*arguments: Any, **options: Any) -> str:
            self.called.append((name, shown(arguments), shown(options)))
            if end:
                raise SystemExit(0)
            return f"what {name} gave"

        return note


def shown(value: Any) -> Any:
    """A value in a form that can be compared: fields of objects, without addresses."""
    if isinstance(value, str | int | float | bool | Path | None):
        return repr(value)
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    if dataclasses.is_dataclass(value):
        return shown([getattr(value, field.name) for field in dataclasses.fields(value)])
    if isinstance(value, dict):
        return {key: shown(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [shown(one) for one in value]
    try:
        return shown(value())  # settings that are only read when asked for
    except TypeError:
        return type(value).__name__


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """A folder with the files that the rows name; functions that do the work are replaced by recorders of arguments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("{runs: elsewhere, seed: 9, data: {dataset: m2cai16-workflow}}")
    own = "{base: own.yaml, encoders: {a: {backbone: resnet18, weights: a.pth}}, heads: {tcn: {name: tcn}}}"
    (tmp_path / "encoders of a file.yaml").write_text(own)
    for run in ("a", "b"):
        (tmp_path / "runs" / run / "evaluate").mkdir(parents=True)
        (tmp_path / "runs" / run / "extract").mkdir()
        (tmp_path / "runs" / run / "extract/result.json").write_text("{}")
    noted = Work()
    for mode in MODES:
        if mode.command != "submit":
            note_work(monkeypatch, noted, mode)
    replace(monkeypatch, "engine.launch", "run_copies", noted.noting("run_copies", end=True))
    replace(monkeypatch, "engine.processes", "join", lambda *_: SimpleNamespace(each=lambda work: work()))
    replace(monkeypatch, "features.dataset.catalogue", "open_dataset", lambda config: (config.data, "root"))
    replace(monkeypatch, "features.store_folder", "find_feature_folder", lambda *where: where)
    replace(monkeypatch, "stage2_temporal.joint.net", "joint_checkpoint", lambda run: run / "best.pt")
    replace(monkeypatch, "stage2_temporal.joint.start", "start_weights", lambda config: None)
    replace(monkeypatch, "stage2_temporal.joint.train", "Start", lambda *runs: runs)
    replace(monkeypatch, "interop.mtrcnet_runs", "ImportRequest", lambda *said, **more: (said, more))
    replace(monkeypatch, "live.stream", "StreamFiles", lambda **said: said)
    replace(monkeypatch, "interop.feature_files.importing", "Request", lambda **said: said)
    replace(monkeypatch, "stage2_temporal.ablation.encoder_features", "Plan", lambda *said: said)
    replace(
        monkeypatch,
        "stage2_temporal.ablation.run",
        "read_ablation",
        lambda name, base: load_ablation(name).model_copy(update={"base": base or "cholec80"}),
    )
    return noted


def note_work(monkeypatch: pytest.MonkeyPatch, work: Work, mode: Mode) -> None:
    for place in mode.work:
        module, _, name = place.partition(":")
        replace(monkeypatch, module, name, work.noting(name, place == mode.work[-1]))


def replace(monkeypatch: pytest.MonkeyPatch, module: str, name: str, by: Any) -> None:
    """Put `by` into a module; modules of the stages are empty ones, so that nothing here needs torch."""
    if module.startswith(("stage", "interop", "live", "commands.run")):
        if not isinstance(sys.modules.get(module), SimpleNamespace):
            monkeypatch.setitem(sys.modules, module, SimpleNamespace())
        setattr(sys.modules[module], name, by)
    else:
        monkeypatch.setattr(importlib.import_module(module), name, by)


def outcome(work: Work, words: list[str]) -> tuple[Result, Any]:
    work.called.clear()
    done = RUNNER.invoke(cli, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    return done, (list(work.called), "" if work.called else re.sub(r"\d{8}T\d{6}Z", "now", done.output))


def words_of(mode: Mode, option: str, value: str) -> list[str]:
    given = value.split("|") if value else []
    return [*mode.command.split(), *mode.words, *([option] if option.startswith("--") else []), *given]


def test_the_table_is_complete() -> None:
    for name, command in commands():
        modes = [mode for mode in MODES if mode.command == name]
        assert modes, f"{name}: not in tests/options_table.py"
        for mode in modes:
            told = [*mode.does, *mode.refused, *(word for word in mode.words if word.startswith("--"))]
            wanted = {spelled(parameter) for parameter in options_of(command)}
            assert set(told) == wanted, f"{name} ({mode.name})"
            assert not mode.does.keys() & mode.refused.keys()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.command} ({mode.name})")
def test_every_row_is_true(work: Work, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    note_work(monkeypatch, work, mode)
    plain, before = outcome(work, [*mode.command.split(), *mode.words])
    assert plain.exit_code == 0, plain.stderr
    for option, value in mode.does.items():
        done, after = outcome(work, words_of(mode, option, value))
        assert done.exit_code == 0, f"{option}: {done.stderr}"
        assert after != before, f"{option} changes nothing"
    for option, value in mode.refused.items():
        done, after = outcome(work, words_of(mode, option, value))
        assert done.exit_code == 2, f"{option} is not refused"
        assert any(word in done.stderr for word in (option, *mode.words))
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert not work.called


def test_the_document_is_the_table() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "python -m tests.options_table"


def test_another_package_of_the_same_name_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features/__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), str(PROJECT)])
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"],
        cwd=tmp_path.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: Python finds {tmp_path.resolve() / 'features'} instead of this program's own package"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "key", "user"),
    [
        ("train-cnn", "joint.workers=1", "train-joint"),
        ("extract", "temporal.epochs=1", "train-temporal"),
        ("train-temporal", "joint.workers=1", "train-joint"),
        ("train-cnn", "cnn.epochs=1", None),
        ("train-temporal", "extract.store=there", None),
    ],
)
def test_a_setting_of_another_training_is_noted(command: str, key: str, user: str | None, tmp_path: Path) -> None:
    told = RUNNER.invoke(cli, [command, "--set", key, "--set", f"data.index={tmp_path / 'none'}"]).output
    note = f"note: --set {key.partition('=')[0]} has no effect here; {user} uses it"
    assert (note in told) if user else ("note:" not in told)
