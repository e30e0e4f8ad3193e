"""A short run of `make torture`: a few kills per target, at the same random moments each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import PROJECT


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute where nothing else runs
def test_a_few_kills_recover(tmp_path: Path) -> None:
    words = ["--kills", "3", "--seed", "4", "--stops-within", "120"]  # a busy machine takes its time
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", *words, "--keep", str(tmp_path)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 4, 3 kills a place")
    assert done.stdout.splitlines()[-1] == "9 of 9 recovered"
