"""Look up heads, encoders, metrics and other entries by name, including those of code outside this project.

This project's own files register their entries when they are imported. If a name is unknown, plug-ins are imported,
once per process: the entry points of the registry's group (`surgstage.heads`, ...) in all installed packages, and the
Python files listed in the environment variable SURGSTAGE_PLUGINS (separated as in PATH). Since importing runs code,
neither settings nor run folders can name plug-in files. docs/extending.md has an example of each kind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Collection, Iterable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

from configs.errors import UserError, did_you_mean, listed, one_line

PLUGINS_VARIABLE = "SURGSTAGE_PLUGINS"

T = TypeVar("T")


# Allowed names, which become parts of folder names and keys in files.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._+-]*")
# Errors of plug-ins that failed to import. They are not imported again, since some entries may be registered already.
_failed: dict[str, UserError] = {}


class Registry(Generic[T]):
    """Entries of type T by name.

    `kind` is the word for an entry in messages, and `group` is the group of its entry points. Names in `reserved`
    cannot be registered.
    """

    def __init__(self, kind: str, group: str, reserved: Collection[str] = ()) -> None:
        self.kind, self.group, self.reserved = kind, group, reserved
        self._entries: dict[str, T] = {}
        self._loading = self._complete = False

    def register(self, name: str, entry: T) -> T:
        """Add `entry`, and return it. Raises UserError if the name is taken, reserved or malformed."""
        if not _NAME.fullmatch(name) or name in self.reserved:
            raise UserError(f"{self.kind} name {name!r} cannot be used; choose another, of letters, digits and @._+-")
        known = self._entries.setdefault(name, entry)
        if known is not entry:
            raise UserError(f"{self.kind} {name} is registered twice; rename one of the two")
        return entry

    def find(self, name: str) -> T:
        """Return the entry with this name. Raises UserError naming the most similar known name."""
        if name not in self._entries:
            self._load_plugins()
        if name not in self._entries:
            hint = did_you_mean(name, self._entries) or f" (known: {listed(list(self._entries), 12)})"
            raise UserError(f"unknown {self.kind} {name}{hint}")
        return self._entries[name]

    def names(self, plugins: bool = True) -> list[str]:
        """Return all names, this project's first. Without `plugins`, return only those registered so far."""
        if plugins:
            self._load_plugins()
        return list(self._entries)

    def _load_plugins(self) -> None:
        """Import the plug-ins, whose modules call `register` like this project's own modules."""
        if self._complete or self._loading:
            return
        self._loading = True
        try:
            for point in entry_points(group=self.group):
                _import_once(f"entry point {point.name} of {self.group} ({point.value})", point.load)
            for place in filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep)):
                _import_once(f"{PLUGINS_VARIABLE}: {place}", partial(import_file, Path(place)))
        finally:
            self._loading = False
        self._complete = True


def _import_once(what: str, load: Callable[[], object]) -> None:
    """Import a plug-in with `load`. Raises UserError saying what failed and why, again in each later call."""
    if what not in _failed:
        try:
            load()
            return
        except Exception as error:
            _failed[what] = UserError(f"{what}: {one_line(error)}")
    raise _failed[what]


def import_each_file(package: str, folders: Iterable[str]) -> None:
    """Import all modules of one of this project's packages, so that they register their entries."""
    for name in sorted(module.name for module in pkgutil.iter_modules(folders)):
        importlib.import_module(f"{package}.{name}")


def import_file(path: Path) -> None:
    """Import a file as a module, once per process.

    Raises UserError if it is not a Python file, and any exception that the file's code raises.
    """
    name = f"surgstage_plugin_{path.stem}_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
