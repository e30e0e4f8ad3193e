"""Registries find this project's entries, those of plug-in files, and say what is wrong with either."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.registry import PLUGINS_VARIABLE, Registry

SHAPES: Registry[int] = Registry("shape", "surgstage.tests")


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Registry[int]:
    registry: Registry[int] = Registry("shape", "surgstage.tests")
    monkeypatch.setitem(globals(), "SHAPES", registry)
    registry.register("square", 4)
    registry.register("triangle", 3)
    return registry


def test_registered_entries_are_found(shapes: Registry[int]) -> None:
    assert shapes.find("square") == 4
    assert shapes.names() == ["square", "triangle"]


def test_an_unknown_name_is_refused_with_the_nearest(shapes: Registry[int]) -> None:
    with pytest.raises(UserError, match=r"unknown shape sqare; did you mean square\?"):
        shapes.find("sqare")
    with pytest.raises(UserError, match=r"unknown shape xyz \(known: square, triangle\)"):
        shapes.find("xyz")


def test_two_entries_of_one_name_are_refused(shapes: Registry[int]) -> None:
    with pytest.raises(UserError, match="shape square is registered twice"):
        shapes.register("square", 5)


def test_files_of_the_environment_are_imported_once(
    shapes: Registry[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("pentagon", 5), ("hexagon", 6)):
        (tmp_path / f"{name}.py").write_text(
            f"import sys\nsys.modules[{__name__!r}].SHAPES.register({name!r}, {value})\n", encoding="utf-8"
        )

    monkeypatch.setenv(PLUGINS_VARIABLE, os.pathsep.join(str(path) for path in sorted(tmp_path.iterdir())))
    assert shapes.find("hexagon") == 6
    assert shapes.names() == ["square", "triangle", "hexagon", "pentagon"]


@pytest.mark.parametrize(
    ("text", "message"), [(None, "not a Python file"), ("1 / 0", "division by zero"), ("if", "invalid syntax")]
)
def test_a_file_that_cannot_be_imported_is_named(
    shapes: Registry[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    path = tmp_path / "plugin.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    monkeypatch.setenv(PLUGINS_VARIABLE, str(path))
    for _ in range(2):  # a caller that carries on after the error does not lose the plug-in silently
        with pytest.raises(UserError, match=f"plugin.py.*{message}"):
            shapes.find("octagon")


class Point:
    """An entry point of an installed package, as `importlib.metadata` gives it."""

    def __init__(self, name: str, load: Callable[[], object]) -> None:
        self.name, self.value, self.load = name, f"package.{name}", load


def test_entry_points_are_loaded_once_a_name_is_unknown(shapes: Registry[int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def installed(group: str) -> list[Point]:
        asked.append(group)
        return [Point("heptagon", lambda: shapes.register("heptagon", 7))]

    monkeypatch.setattr("configs.registry.entry_points", installed)
    assert shapes.find("square") == 4
    assert asked == []
    assert shapes.find("heptagon") == 7
    assert asked == ["surgstage.tests"]


def test_a_plugin_that_fails_halfway_keeps_its_reason(shapes: Registry[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        shapes.register("nonagon", 9)
        raise ValueError("no such file")

    monkeypatch.setattr("configs.registry.entry_points", lambda group: [Point("nonagon", load)])
    for _ in range(2):
        with pytest.raises(UserError, match=r"entry point nonagon of surgstage.tests .*: no such file"):
            shapes.find("decagon")


@pytest.mark.parametrize("name", ["a/b", "..", "", "two words", "frames"])
def test_names_that_files_and_folders_could_not_take_are_refused(name: str) -> None:
    registry: Registry[int] = Registry("shape", "surgstage.tests", reserved={"frames"})
    with pytest.raises(UserError, match="cannot be used"):
        registry.register(name, 1)
