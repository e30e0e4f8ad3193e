"""A short run of `make torture`: a few kills a place, at moments that are drawn anew each time and printed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.commands import PROJECT
from tests.torture import PLACES


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_few_kills_recover(place: str) -> None:
    options = ["--kills", "3", "--place", place]
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", *options],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"seed \d+, 3 kills a place", done.stdout)
    assert done.stdout.splitlines()[-1] == "3 of 3 recovered"
