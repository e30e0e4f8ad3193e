"""A short run of `make torture`: a few kills a place, at moments that are drawn anew each time and printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import PROJECT


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute where nothing else runs
def test_a_few_kills_recover(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", "--kills", "3", "--keep", str(tmp_path)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"seed \d+, 3 kills a place", done.stdout)
    assert done.stdout.splitlines()[-1] == "9 of 9 recovered"
