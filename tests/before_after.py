"""Do two checkouts compute the same, byte for byte? `python -m tests.before_after BEFORE AFTER [--keep DIR]`.

Both checkouts run the same fixed small commands on the same simulated videos; their output is compared as in
`tests.sameness` (except times, and settings in YAML files that BEFORE does not have), and `encoder.json`,
`identity.json` and the feature folders' names byte by byte. Then
AFTER runs on a copy of the output of BEFORE: finished stages are skipped, an interrupted one resumes to the same
weights, features verify and are not extracted again, evaluation gives the same numbers.

It needs a checkout of the other version, so it is a command for a refactoring and not one of the tests; what released
versions wrote is in `tests/released`. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.sameness import differences

SETTINGS = Path(__file__).resolve().parent / "released" / "7ce8cba" / "old.yaml"
SPACE = """title: heads
base: old.yaml
settings:
  GRU: {temporal.head.name: gru, temporal.head.hidden: 8}
  TCN: {temporal.head.name: tcn}
  linear: {temporal.head.name: linear}
  LSTM backwards too: {temporal.head.hidden: 8, temporal.head.bidirectional: true}
  LSTM in bf16: {temporal.head.hidden: 8, temporal.precision: bf16}
seeds: [0]
"""
FEATURES = "artifacts/features/shufflenet_v2_x0_5-*"  # their name ends in a digest of the weights
OLD = ["--config", "old.yaml", "--name", "old"]
COMMANDS: list[list[str]] = [
    ["run", *OLD],
    ["train-temporal", *OLD[:2], "--name", "clips", "--features", FEATURES, "--set",
     "temporal.sequence={mode: clips, frames: 8, batch: 2}"],
    ["extract", *OLD[:2], "--name", "bf16", "--set", "extract.precision=bf16", "--set", "extract.encoder=initial"],
    ["ablate", "abl.yaml", "--run", "old", "--name", "ablation"],
    ["train-joint", *OLD[:2], "--name", "joint", "--from-cnn", "old", "--from-temporal", "old",
     "--set", "joint={multitask: {epochs: 1}, net: {mapping: true}, mapping: {epochs: 1}, correlation: {epochs: 1}}"],
    ["evaluate", *OLD[:2], "--name", "joint", "--model", "joint"],
    ["predict", *OLD, "videos/videos/video04.mp4"],
    ["export", "old", "--out", "exported"],
    ["evaluate", "--predictions", "exported", "--ground-truth", "videos/phase_annotations",
     "--allow-missing", "--prediction-fps", "12.5",
     *OLD[:2], "--json", "theirs.json"],
]  # fmt: skip

# Checkpoints contain times, so files that name a checkpoint by its hash differ between two trainings; the identities of
# these stages are compared when AFTER runs on the output of BEFORE. Tables of ablations contain times, and older ones
# had a journal. Model cards are prose; their numbers are those of metrics.json.
HASHES_OF_CHECKPOINTS = re.compile(
    r"runs/joint/joint/\w+/identity\.json: (start\.(cnn|temporal)|other bytes)"
    r"|.*/result\.json: (features|identity_sha256)"
    r"|runs/(old|joint)/MODEL_CARD\.md: : another value"
    r"|runs/old/predict/.*made_by\.temporal|runs/ablation/(ablation\.csv: other content|study\.journal: )"
)
# Conventions that an older version may not have.
NEW_CONVENTIONS = re.compile(
    r"(carried on: )?(.*/metrics|theirs)\.json: (\w+\.)*(transitions|calibration|phakir): only in one of them$"
)
# An index keeps the notes that `index` printed; their number is compared, their wording may change.
# Files and a key that older versions do not write; the key is that of heads that look into the future.
NEW_FILES = re.compile(
    r"(carried on: )?.*(/trained_on\.json|/temporal/decoding\.json): a stray file$"
    r"|.*/temporal/result\.json: offline: only in one of them$"
)
NOTES_OF_AN_INDEX = re.compile(r"index\.json: notes\.\d+: another value$")


def main() -> None:
    """Run both, compare, say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the working folders here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        before, after, carried = folder / "before", folder / "after", folder / "carried"
        prepare(before, given.before)
        shutil.copytree(before, after)
        for checkout, work in ((given.before, before), (given.after, after)):
            commands(checkout, work, COMMANDS)
        found = compare(before, after)
        shutil.copytree(before, carried)
        found += [f"carried on: {line}" for line in carry_on(given.after, before, carried)]
    print("\n".join(found) or "no difference")
    sys.exit(bool(found))


def prepare(work: Path, checkout: Path) -> None:
    """Videos, and the stages that the rest builds on, by the older checkout."""
    work.mkdir(parents=True)
    shutil.copy(SETTINGS, work / "old.yaml")
    (work / "abl.yaml").write_text(SPACE, encoding="utf-8")
    simulate = ["simulate", "videos", "--videos", "4", "--seed", "7", "--fps", "2", "--speed-up", "40"]
    commands(checkout, work, [[*simulate, "--width", "64", "--height", "64"]])


def commands(checkout: Path, work: Path, words: Sequence[Sequence[str]]) -> list[str]:
    """Run them in `work` with the checkout's pipeline.py; their standard outputs."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    said = []
    for one in words:
        one = [str(fp32_features(work, FEATURES)) if word == FEATURES else word for word in one]
        done = subprocess.run(
            [sys.executable, str(checkout / "pipeline.py"), *one],
            cwd=work, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{checkout.name}: {' '.join(one)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        said.append(done.stdout)
    return said


def fp32_features(work: Path, pattern: str) -> Path:
    """The folder of that pattern that holds fp32 features."""
    return next(one for one in work.glob(pattern) if "fp32" in (one / "encoder.json").read_text())


def compare(before: Path, after: Path) -> list[str]:
    """What differs between the two working folders."""
    found = differences(before, after)
    for name in ("encoder.json", "identity.json"):
        for path in before.rglob(name):
            other = after / path.relative_to(before)
            if not other.is_file() or other.read_bytes() != path.read_bytes():
                found.append(f"{path.relative_to(before)}: other bytes")
    return [
        line
        for line in found
        if not HASHES_OF_CHECKPOINTS.match(line)
        and not NOTES_OF_AN_INDEX.search(line)
        and not NEW_FILES.match(line)
        and not NEW_CONVENTIONS.match(line)
        and not only_adds_settings(before, after, line.split(":")[0])
    ]


def only_adds_settings(before: Path, after: Path, name: str) -> bool:
    """Whether a YAML file of settings differs only in settings that the older version does not have."""
    if not name.endswith(".yaml") or not (after / name).is_file():
        return False
    old, new = (yaml.safe_load((top / name).read_text(encoding="utf-8")) for top in (before, after))
    return bool(old == _known_to(old, new))


def _known_to(old: Any, new: Any) -> Any:
    """`new` without the keys that `old` lacks, at any depth."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: _known_to(old[key], value) for key, value in new.items() if key in old}
    return new


def carry_on(checkout: Path, before: Path, work: Path) -> list[str]:
    """Run the newer checkout on the output of the older one: nothing is repeated, and the interrupted stage resumes."""
    found = []
    features = {path: path.stat().st_mtime_ns for path in work.rglob("*.h5")}
    stage = work / "runs/old/temporal"
    (stage / "result.json").unlink()
    commands(checkout, work, [["features", "verify", str(path.parent)] for path in work.rglob("encoder.json")])
    commands(checkout, work, COMMANDS)
    if {path: path.stat().st_mtime_ns for path in work.rglob("*.h5")} != features:
        found.append("features were written again")
    shutil.rmtree(work / "runs/old/evaluate")
    commands(checkout, work, [["evaluate", *OLD]])
    metrics = [json.loads((top / "runs/old/evaluate/test/metrics.json").read_text()) for top in (before, work)]
    if any(metrics[0][task] != _known_to(metrics[0][task], metrics[1][task]) for task in ("phases", "tools")):
        found.append("evaluation gives other numbers")
    return found + compare(before, work)


if __name__ == "__main__":
    main()
