"""Manage run folders `runs/<name>/<stage>/`: their files, and whether a new start resumes, is skipped or refused."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from configs.errors import UserError
from configs.load import differences, to_yaml
from configs.schema import Config
from engine.files import make_folder, read_json_object, remove_stale_temporaries, sha256_json, write_json, write_text
from engine.launch import permitted_cores

IDENTITY_FILE = "identity.json"
RESULT_FILE = "result.json"
BEST_FILE = "best.pt"  # the checkpoint of the best epoch
PACKAGES = (
    "surgstage",
    "torch",
    "torchvision",
    "accelerate",
    "h5py",
    "numpy",
    "scikit-learn",
    "av",
    "decord",
    "Pillow",
)


def run_folder(config: Config, name: str) -> Path:
    """Return the folder `<runs>/<name>` of a run; `name` may also be that whole path.

    Raises UserError if the name is not a plain folder name.
    """
    if os.path.abspath(Path(name).parent) == os.path.abspath(config.runs):
        name = Path(name).name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"run name {name!r}: give the name of a folder below {config.runs}, of letters, digits, '.', '_' and '-'"
        )
    return config.runs / name


ABSENT: Any = object()


@dataclass(frozen=True)
class StageIdentity:
    """Everything that a stage's numbers depend on: settings, seeds and digests of inputs, as plain values in `fields`.

    A later release can add a field without changing the identity of runs that the field does not affect. A field whose
    value is `ABSENT` is not recorded, so give it another value only where it changes the numbers. A field named in
    `later` is ignored in the comparison with a run that was started before the field existed.
    """

    fields: Mapping[str, Any]
    later: Collection[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", {key: value for key, value in self.fields.items() if value is not ABSENT})

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the fields, independent of their order."""
        return sha256_json(self.fields)

    def compared_with(self, recorded: Mapping[str, Any]) -> StageIdentity:
        """Return this identity without those fields of `later` that an earlier run did not record.

        `recorded` are the fields of the earlier run.
        """
        kept = {key: value for key, value in self.fields.items() if key in recorded or key not in self.later}
        return replace(self, fields=kept)

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """Describe each field in which `recorded` (as read from JSON) differs, as `key: OLD there, NEW now`."""
        return differences(recorded, json.loads(json.dumps(self.fields, default=str)))


def settings_without(settings: BaseModel, *names: str) -> dict[str, Any]:
    """Return settings as plain values for a `StageIdentity`, without those in `names`, which change no number."""
    return settings.model_dump(mode="json", exclude=set(names))


def require_same_classes(
    where: Path, what: str, found: Sequence[str] | None, expected: Sequence[str], other: str | Path = "the index"
) -> None:
    """Raise UserError unless `where` has the same classes in the same order as `other`.

    `what` is "tools" or "phases". `found` are the classes of `where`, `expected` those of `other`.
    """
    if list(found or ()) != list(expected):
        raise UserError(
            f"{where}: its {what} are {', '.join(found or ()) or 'none'}; {other} has {', '.join(expected) or 'none'}: "
            "names and order must be the same"
        )


class StageFolder:
    """The folder of one stage of a run.

    The first start writes the stage's identity into the folder, and every later start compares it. If it is equal, the
    stage resumes, or is skipped if its result exists. If it differs, the start is refused with an error that names the
    difference, since nothing is ever overwritten silently.
    """

    def __init__(self, run: Path, stage: str, config: Config, identity: StageIdentity) -> None:
        self.path = run / stage
        known = self.path / IDENTITY_FILE
        self.identity = identity.compared_with(read_json_object(known)) if known.exists() else identity
        self._config = config

    @property
    def digest(self) -> str:
        """The digest of the stage's identity."""
        return self.identity.digest

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of the finished stage; None if there is no result, or if it belongs to another identity."""
        path = self.path / RESULT_FILE
        if not path.exists():
            return None
        found: dict[str, Any] = read_json_object(path)
        return found if found.get("identity_sha256") == self.digest else None

    def check(self) -> None:
        """Raise UserError naming the differences if the folder belongs to a run with other settings."""
        known = self.path / IDENTITY_FILE
        if known.exists():
            changed = self.identity.differences(read_json_object(known))
            if changed:
                shown = "; ".join(changed[:4]) + (f" (and {len(changed) - 4} more)" if len(changed) > 4 else "")
                raise UserError(
                    f"{self.path}: this run exists with other settings ({shown}); "
                    "choose another --name, or delete the folder to start over"
                )

    def open(self) -> None:
        """Create the folder, or prepare an existing one for resuming. Raises UserError as `check` does."""
        self.check()
        known = self.path / IDENTITY_FILE
        make_folder(self.path)
        remove_stale_temporaries(self.path)
        if not known.exists():
            write_text(self.path / "config.yaml", to_yaml(self._config))
            write_json(self.path / "environment.json", environment(self._config.device))
            write_json(known, self.identity.fields)

    def begin(self) -> dict[str, Any] | None:
        """Return the result if the stage is finished; otherwise call `open` and return None."""
        found = self.result
        if found is None:
            self.open()
        return found

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the stage's result, which marks the stage as finished, and return it."""
        complete = {"identity_sha256": self.digest, **result}
        write_json(self.path / RESULT_FILE, complete)
        return complete


def environment(device: str = "auto") -> dict[str, Any]:
    """Return package versions, git revision and machine, which are recorded with every result.

    With `device` "cpu", no GPU is queried.
    """
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": permitted_cores(),
        "git_revision": git_revision(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }
    torch = sys.modules.get("torch")
    if torch is not None and device != "cpu" and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def package_version(name: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def git_revision() -> str | None:
    """Return the commit of the checkout that the program runs from, or None outside a checkout.

    A `+` is appended if tracked files have been changed since.
    """
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        # Without this option, `git status` would rewrite git's index, and leave its lock file behind when killed.
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None  # the program is installed inside another repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
