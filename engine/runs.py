"""Run folders `runs/<name>/<stage>/`: their contents, and whether a second start resumes, is skipped or is refused."""

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
    """`<runs>/<name>`; `name` may also be that path. Raises UserError if the name is no plain folder name."""
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
    """Everything that a stage's numbers depend on: settings, seeds, digests of inputs; plain values in `fields`.

    A later release can add a field without changing the identity of runs that it does not affect: a field with the
    value `ABSENT` is not recorded (another value is recorded only if it changes the numbers), and runs that were
    started without a field in `later` are compared without it.
    """

    fields: Mapping[str, Any]
    later: Collection[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", {key: value for key, value in self.fields.items() if value is not ABSENT})

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the fields, independent of their order."""
        return sha256_json(self.fields)

    def compared_with(self, recorded: Mapping[str, Any]) -> StageIdentity:
        """This identity without the fields of `later` that `recorded`, an earlier run's fields, does not have."""
        kept = {key: value for key, value in self.fields.items() if key in recorded or key not in self.later}
        return replace(self, fields=kept)

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """Texts `key: OLD there, NEW now`, one for each field in which `recorded` (as read from JSON) differs."""
        return differences(recorded, json.loads(json.dumps(self.fields, default=str)))


def settings_without(settings: BaseModel, *names: str) -> dict[str, Any]:
    """Settings as plain values for a `StageIdentity`, without those that change no number."""
    return settings.model_dump(mode="json", exclude=set(names))


def require_same_classes(
    where: Path, what: str, found: Sequence[str] | None, expected: Sequence[str], other: str | Path = "the index"
) -> None:
    """Raise UserError unless the classes (`what`: tools or phases) of `where` are those of `other`, in order."""
    if list(found or ()) != list(expected):
        raise UserError(
            f"{where}: its {what} are {', '.join(found or ()) or 'none'}; {other} has {', '.join(expected) or 'none'}: "
            "names and order must be the same"
        )


class StageFolder:
    """One stage of one run.

    Its identity is written on the first start and compared on every later one: an equal one means resuming, or nothing
    to do if there is a result; a different one is an error that names the difference, since nothing is ever overwritten
    silently.
    """

    def __init__(self, run: Path, stage: str, config: Config, identity: StageIdentity) -> None:
        self.path = run / stage
        known = self.path / IDENTITY_FILE
        self.identity = identity.compared_with(read_json_object(known)) if known.exists() else identity
        self._config = config

    @property
    def digest(self) -> str:
        """The digest of the identity."""
        return self.identity.digest

    @property
    def result(self) -> dict[str, Any] | None:
        """The finished stage's result; None if there is none, or one of another identity."""
        path = self.path / RESULT_FILE
        if not path.exists():
            return None
        found: dict[str, Any] = read_json_object(path)
        return found if found.get("identity_sha256") == self.digest else None

    def check(self) -> None:
        """Raise UserError if the folder contains another configuration."""
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
        """Create the folder, or accept it for resuming. Raises UserError if it contains another configuration."""
        self.check()
        known = self.path / IDENTITY_FILE
        make_folder(self.path)
        remove_stale_temporaries(self.path)
        if not known.exists():
            write_text(self.path / "config.yaml", to_yaml(self._config))
            write_json(self.path / "environment.json", environment(self._config.device))
            write_json(known, self.identity.fields)

    def begin(self) -> dict[str, Any] | None:
        """The result of a finished stage; otherwise None, after opening the folder."""
        found = self.result
        if found is None:
            self.open()
        return found

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the stage's result, the last of its files, and return it."""
        complete = {"identity_sha256": self.digest, **result}
        write_json(self.path / RESULT_FILE, complete)
        return complete


def update_summary(run: Path, values: Mapping[str, Any], seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Merge `values` into `RUN/summary.json`, a run's outcome in one place; returns the whole summary."""
    path = run / "summary.json"
    summary: dict[str, Any] = dict.fromkeys(SUMMARY_KEYS) | {"seconds": {}}
    if path.exists():
        summary |= read_json_object(path)
    summary |= values
    summary["seconds"] = summary.get("seconds", {}) | {key: round(value, 2) for key, value in (seconds or {}).items()}
    write_json(path, summary)
    return summary


# Fractions, on the test videos; phase_f1 under the convention that summary["convention"] names.
SUMMARY_KEYS = (
    "name",
    "dataset",
    "split",
    "fps",
    "test_videos",
    "convention",
    "tool_map",
    "phase_accuracy_majority",
    "phase_accuracy_frame",
    "phase_accuracy_temporal",
    "phase_f1_frame",
    "phase_f1_temporal",
)


def environment(device: str = "auto") -> dict[str, Any]:
    """Package versions, revision and machine, recorded with every result; with `device=cpu` no GPU is queried."""
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
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def git_revision() -> str | None:
    """Commit of the checkout that the program runs from (with `+` if files differ), or None outside a checkout."""
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        # `git status` would refresh the index otherwise, and a kill would leave its lock behind.
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None  # installed inside another repository
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
