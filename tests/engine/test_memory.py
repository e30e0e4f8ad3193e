"""Freed memory stays with the process if the C library supports that, and nothing breaks if it does not."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
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


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."), RuntimeError("MPS backend out of memory (1)")],
)
def test_too_little_memory_on_a_gpu_is_one_line_that_says_what_to_lower(error: Exception) -> None:
    expected = r"^the GPU has too little memory: lower x\.batch \(.*out of memory"
    with pytest.raises(UserError, match=expected), memory.needs_gpu_memory("x.batch"):
        raise error
    with pytest.raises(RuntimeError, match="shapes differ"), memory.needs_gpu_memory("x.batch"):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (type("AcceleratorError", (RuntimeError,), {})("an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("shapes differ"), False),
        (UserError("CUDA error.mp4: damaged"), False),
        (MemoryError(), False),
    ],
)
def test_errors_of_a_gpu_are_told_from_those_of_a_video(error: Exception, expected: bool) -> None:
    assert memory.is_gpu_error(error) == expected


def test_memory_is_returned() -> None:
    memory.give_back_freed_memory()
    assert not memory.sys.platform.startswith("linux") or memory._glibc("free") is not None


def _group(folder: Path, names: tuple[str, str, str], limit: str, used: int, of_files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, str(used), f"{PREFIX[names[0]]}inactive_file {of_files}\n"), strict=True):
        (folder / name).write_text(value)
    with (folder / names[2]).open("a") as stream:
        stream.write(f"{PREFIX[names[0]]}active_file 0\n")


V2 = ("memory.max", "memory.current", "memory.stat")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
PREFIX = {V2[0]: "", V1[0]: "total_"}


def test_available_memory_is_that_of_the_machine_and_of_every_group_above(tmp_path: Path) -> None:
    """A Slurm job's limit lies above its step's group, which has none."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    groups = tmp_path / "proc/self/cgroup"
    groups.write_text("0::/\n")
    assert memory.available_bytes(tmp_path) == 8000 * 1024
    groups.write_text("0::/job_1/step_0\n")
    top = tmp_path / "sys/fs/cgroup"
    _group(top / "job_1/step_0", V2, "max", 2_000, 0)
    _group(top / "job_1", V2, "1000000", 700_000, 200_000)
    assert memory.available_bytes(tmp_path) == 500_000
    groups.write_text("5:cpu,memory:/slurm/job_1\n1:name=systemd:/\n")
    _group(top / "memory/slurm/job_1", V1, "900000", 100_000, 0)
    assert memory.available_bytes(tmp_path) == 800_000


def test_available_memory_without_proc(tmp_path: Path) -> None:
    assert memory.available_bytes(tmp_path) > 0
