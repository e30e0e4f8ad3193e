"""Freed memory stays with the process if the C library supports that, and nothing breaks if it does not."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from engine import memory

# 30 tensors of 64 MiB, one after the other; every page that the kernel must map again is counted.
FAULTS = """
import resource
from engine.memory import keep_freed_memory
import torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        torch.zeros(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
assert keep_freed_memory()
print(faults(), default)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_pages_are_mapped_once() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, default = map(int, done.stdout.split())
    assert kept * 2 < default


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
    memory.give_back_freed_memory()
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert not memory.keep_freed_memory()


def test_memory_is_returned() -> None:
    memory.give_back_freed_memory()
    assert not memory.sys.platform.startswith("linux") or memory._glibc("free") is not None
