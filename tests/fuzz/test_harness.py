"""The harness itself finds each kind of broken promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.cli import PROJECT

GLUTTON = """
import json, multiprocessing, os, sys, threading
from tests.fuzz import harness
from tests.fuzz.parsers import PARSERS, Parser

def eat(path):
    return len(b"x" * (int(path.read_text()) << 20))

PARSERS["glutton"] = Parser("a.txt", lambda folder: eat, lambda: [b"1"])
ours, theirs = multiprocessing.Pipe()
threading.Thread(target=harness._serve, args=("glutton", theirs, sys.argv[1]), daemon=True).start()
assert ours.recv_bytes() == b"ready"
answers = []
for size_mib in map(int, sys.argv[2:]):
    ours.send_bytes(str(size_mib).encode())
    answers.append(ours.recv_bytes().decode())
print(json.dumps(answers), flush=True)
os._exit(0)
"""


def test_memory_of_one_input_does_not_hide_that_of_the_next(tmp_path: Path) -> None:
    """A process's peak never falls by itself: after 450 MiB, a peak of 900 MiB would count as 450, and the next as
    0.
    """
    words = [sys.executable, "-c", GLUTTON, str(tmp_path), "450", "900", "900", "1"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=280, check=True)
    small, large, again, none = json.loads(done.stdout)
    assert (small, none) == ("read", "read")
    for answer in (large, again):
        assert int(re.fullmatch(r"took (\d+) MiB of memory", answer)[1]) > 850  # type: ignore[index]
