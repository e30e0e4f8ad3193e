"""Registries: one name per head, encoder, metric or convention, open to code outside this project.

A registry knows what this project's own files register when they are imported. A name that it does not know makes it
import what others bring, once per process: the entry points of the registry's group (`surgstage.heads`, ...) of
every installed package, and the Python files that the environment variable SURGSTAGE_PLUGINS lists, separated as in
PATH. Importing runs code, so neither settings nor run folders can name such files. docs/extending.md has an example
of each kind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

from configs.errors import UserError, did_you_mean, listed, one_line

PLUGINS_VARIABLE = "SURGSTAGE_PLUGINS"

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries of type T by name. `kind` is the word for one entry in messages, `group` that of its entry points."""

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, T] = {}
        self._complete = False

    def register(self, name: str, entry: T) -> T:
        """Add `entry`, and return it. Raises UserError where another entry has the name."""
        known = self._entries.setdefault(name, entry)
        if known is not entry:
            raise UserError(f"{self.kind} {name} is registered twice; give one of the two another name")
        return entry

    def find(self, name: str) -> T:
        """The entry of that name. Raises UserError naming the nearest known name."""
        if name not in self._entries:
            self._load_plugins()
        if name not in self._entries:
            hint = did_you_mean(name, self._entries) or f" (known: {listed(list(self._entries), 12)})"
            raise UserError(f"unknown {self.kind} {name}{hint}")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, this project's first."""
        self._load_plugins()
        return list(self._entries)

    def _load_plugins(self) -> None:
        """Import what others bring; their modules call `register`, as this project's do."""
        if self._complete:
            return
        for point in entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:
                raise UserError(
                    f"entry point {point.name} of {self.group} ({point.value}): {one_line(error)}"
                ) from error
        for place in filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep)):
            import_file(Path(place))
        self._complete = True


def import_file(path: Path) -> None:
    """Import a Python file as a module, once per process. Raises UserError naming it where it cannot be imported."""
    name = f"surgstage_plugin_{path.stem}_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{PLUGINS_VARIABLE}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{PLUGINS_VARIABLE}: {path}: {one_line(error)}") from error
