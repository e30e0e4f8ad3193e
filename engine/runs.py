"""Run folders: `runs/<name>/<stage>/`, what is in them, and when a second start resumes, is skipped or is refused."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.load import differences, to_yaml
from configs.schema import Config
from engine.files import make_folder, read_json_object, remove_stale_temporaries, sha256_json, write_json, write_text
from engine.processes import permitted_cores

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
    """`<runs>/<name>`. Raises UserError for a name that is no plain folder name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"run name {name!r}: use letters, digits, '.', '_' and '-' only")
    return config.runs / name


class StageFolder:
    """One stage of one run.

    `identity` is everything the stage's numbers depend on (settings, inputs' digests). It is written on the first start
    and compared on every later one: equal means resume, or nothing to do where a result stands; different is an error
    that names the difference, since nothing is ever overwritten silently. Keys that came `later` than runs without them
    are not asked of those.
    """

    def __init__(
        self, run: Path, stage: str, config: Config, identity: Mapping[str, Any], later: Collection[str] = ()
    ) -> None:
        self.run, self.stage = run, stage
        self.path = run / stage
        known = read_json_object(self.path / IDENTITY_FILE) if (self.path / IDENTITY_FILE).exists() else identity
        self.identity = {key: value for key, value in identity.items() if key in known or key not in later}
        self.digest = sha256_json(self.identity)
        self._config = config

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished stage wrote, or None. A result of another identity is not a result."""
        path = self.path / RESULT_FILE
        if not path.exists():
            return None
        found: dict[str, Any] = read_json_object(path)
        return found if found.get("identity_sha256") == self.digest else None

    def check(self) -> None:
        """Raise UserError when the folder holds another configuration."""
        known = self.path / IDENTITY_FILE
        if known.exists():
            changed = differences(read_json_object(known), _plain_tree(self.identity))
            if changed:
                shown = "; ".join(changed[:4]) + (f" (and {len(changed) - 4} more)" if len(changed) > 4 else "")
                raise UserError(
                    f"{self.path}: this run exists with other settings ({shown}); "
                    "choose another --name, or delete the folder to start over"
                )

    def open(self) -> None:
        """Create the folder or accept it for resuming. Raises UserError when it holds another configuration."""
        self.check()
        known = self.path / IDENTITY_FILE
        make_folder(self.path)
        remove_stale_temporaries(self.path)
        if not known.exists():
            write_text(self.path / "config.yaml", to_yaml(self._config))
            write_json(self.path / "environment.json", environment())
            write_json(known, self.identity)

    def begin(self) -> dict[str, Any] | None:
        """The result of a finished stage; otherwise None, with the folder open."""
        found = self.result
        if found is None:
            self.open()
        return found

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the stage's result, last of all its files, and return it."""
        complete = {"identity_sha256": self.digest, **result}
        write_json(self.path / RESULT_FILE, complete)
        return complete


def _plain_tree(tree: Mapping[str, Any]) -> Any:
    """`tree` as it comes back from JSON (tuples become lists, paths text), so that comparing is fair."""
    import json

    return json.loads(json.dumps(tree, default=str))


def update_summary(run: Path, values: Mapping[str, Any], seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Merge `values` into `RUN/summary.json`, the one place to read a run's outcome; returns the whole summary."""
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


def environment() -> dict[str, Any]:
    """Versions, revision and machine: what a number needs beside it."""
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": permitted_cores(),
        "git_revision": git_revision(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
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
    """Commit of the checkout the program runs from (`+` when files differ from it), or None outside a checkout."""
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None  # installed inside somebody else's repository
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
