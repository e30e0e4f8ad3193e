"""Run folders: resume, skip, refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.schema import Config
from engine.runs import (
    ABSENT,
    StageFolder,
    StageIdentity,
    environment,
    git_revision,
    require_same_classes,
    run_folder,
)


def test_the_same_name_with_other_settings_is_refused_by_name_of_the_difference(tmp_path: Path) -> None:
    StageFolder(tmp_path, "temporal", Config(), StageIdentity({"head": {"hidden": 512}, "seed": (1, 2)})).open()
    StageFolder(tmp_path, "temporal", Config(), StageIdentity({"head": {"hidden": 512}, "seed": [1, 2]})).open()
    with pytest.raises(UserError, match=r"head\.hidden: 512 there, 256 now.*--name"):
        StageFolder(tmp_path, "temporal", Config(), StageIdentity({"head": {"hidden": 256}, "seed": [1, 2]})).open()
    assert json.loads((tmp_path / "temporal" / "identity.json").read_text())["head"]["hidden"] == 512


def test_a_result_counts_only_for_the_identity_it_was_made_with(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "cnn", Config(), StageIdentity({"seed": 1}))
    stage.open()
    assert stage.result is None
    stage.finish({"map": 0.5})
    assert stage.result is not None
    assert stage.result["map"] == 0.5
    assert StageFolder(tmp_path, "cnn", Config(), StageIdentity({"seed": 2})).result is None


def test_a_field_that_came_later_changes_no_identity_that_it_does_not_concern(tmp_path: Path) -> None:
    before = StageIdentity({"seed": 1})
    assert StageIdentity({"seed": 1, "sampled": ABSENT}).digest == before.digest
    StageFolder(tmp_path, "cnn", Config(), before).open()
    now = StageIdentity({"seed": 1, "sources": "a"}, later={"sources"})
    older, newer = StageFolder(tmp_path, "cnn", Config(), now), StageFolder(tmp_path, "new", Config(), now)
    older.open()
    newer.open()
    assert (older.digest, newer.digest) == (before.digest, now.digest)
    other = StageFolder(tmp_path, "new", Config(), StageIdentity({"seed": 1, "sources": "b"}, later={"sources"}))
    with pytest.raises(UserError, match=r"sources: a there, b now"):
        other.check()


@pytest.mark.parametrize(
    ("found", "message"),
    [(["b", "a"], "its tools are b, a; the index has a, b"), (None, "its tools are none; the index has a, b")],
)
def test_classes_must_be_the_same_in_the_same_order(found: list[str] | None, message: str) -> None:
    require_same_classes(Path("x.h5"), "tools", ["a", "b"], ("a", "b"))
    with pytest.raises(UserError, match=rf"^x\.h5: {message}: names and order must be the same$"):
        require_same_classes(Path("x.h5"), "tools", found, ("a", "b"))


def test_a_stage_folder_holds_settings_and_environment(tmp_path: Path) -> None:
    StageFolder(tmp_path, "cnn", Config(), StageIdentity({})).open()
    assert sorted(path.name for path in (tmp_path / "cnn").iterdir()) == [
        "config.yaml",
        "environment.json",
        "identity.json",
    ]
    assert environment()["packages"]["torch"]


@pytest.mark.parametrize("name", ["first", "runs/first", "runs/first/", "./runs/first"])
def test_a_run_may_be_given_with_the_folder_of_runs(name: str) -> None:
    assert run_folder(Config(), name) == Path("runs/first")


@pytest.mark.parametrize(
    "name", ["", "..", "runs/..", "runs/a/b", "other/first", "../x", "a/b", ".hidden", "a b", "a\nb"]
)
def test_run_names_are_plain(name: str) -> None:
    with pytest.raises(UserError, match="run name"):
        run_folder(Config(), name)


def test_reading_the_revision_leaves_the_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill during `git status` would leave a lock in the user's checkout, in which commits would then fail."""
    fake, log = tmp_path / "git", tmp_path / "log"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {log}\npwd\n', encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    git_revision.cache_clear()
    git_revision()
    git_revision.cache_clear()
    commands = log.read_text(encoding="utf-8").splitlines()
    assert commands
    assert all(command.startswith("--no-optional-locks ") for command in commands)
