"""Precision: supported ones are used, others are refused with alternatives; global switches are restored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from engine import device
from engine.device import (
    choose_device,
    choose_precision,
    cpu_threads,
    lower_precision,
    say_few_cores,
    seed_everything,
)
from tests.onednn import cpu_with_bf16

PROJECT = Path(__file__).resolve().parents[2]
CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    ("name", "training", "with_bf16", "without"),
    [
        ("auto", True, "fp32", "fp32"),
        ("auto", False, "bf16", "fp32"),
        ("native", True, "bf16", "fp32"),
        ("native", False, "bf16", "fp32"),
        ("fp32", True, "fp32", "fp32"),
    ],
)
def test_on_a_cpu(name: str, training: bool, with_bf16: str, without: str) -> None:
    for there, expected in ((True, with_bf16), (False, without)):
        with cpu_with_bf16(there):
            assert choose_precision("x.precision", name, CPU, training) == expected


@pytest.mark.parametrize("training", [True, False])
def test_bf16_on_request(training: bool) -> None:
    with cpu_with_bf16(True):
        assert choose_precision("x.precision", "bf16", CPU, training) == "bf16"
    with cpu_with_bf16(False):
        for other in (CUDA, MPS):
            assert choose_precision("x.precision", "bf16", other, training) == "bf16"
        with pytest.raises(UserError) as caught:
            choose_precision("x.precision", "bf16", CPU, training)
        for instead in ("fp32", "auto"):
            assert f"set x.precision={' or '.join(('fp32', 'auto'))}" in str(caught.value)
            assert choose_precision("x.precision", instead, CPU, training) == "fp32"


@pytest.mark.parametrize(("major", "auto", "native"), [(8, "bf16", "bf16"), (7, "fp16", "fp32")])
def test_on_a_gpu_emulated_bf16_does_not_count(
    monkeypatch: pytest.MonkeyPatch, major: int, auto: str, native: str
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or major > 7
    )
    assert choose_precision("x.precision", "auto", CUDA, training=True) == auto
    assert choose_precision("x.precision", "native", CUDA, training=True) == native


def test_fp16_is_refused_on_a_cpu_with_values_that_work() -> None:
    with cpu_with_bf16(False), pytest.raises(UserError, match=r"^x\.precision=fp16 .* set x\.precision=auto or fp32$"):
        choose_precision("x.precision", "fp16", CPU, training=True)


def probed(**variables: str) -> str:
    code = "import torch, engine.device; state = torch.get_rng_state(); print(engine.device.cpu_has_bf16(), end=' ')\n"
    code += "print(torch.equal(state, torch.get_rng_state()))"
    kept = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    environment = {**kept, "PYTHONPATH": str(PROJECT), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280)
    return done.stdout.strip()


def test_a_cpu_with_limited_onednn_counts_as_one_without_bf16() -> None:
    assert probed(ONEDNN_MAX_CPU_ISA="AVX2") == "False True"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16\nbugs\t: x\n", True),
        ("processor : 0\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw\nbugs\t\t: avx512_bf16\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("", False),
        (None, False),
    ],
)
def test_bf16_support_is_read_from_the_kernel(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, expected: bool
) -> None:
    def read(path: Path, **_: Any) -> str:
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(torch.nn.LSTM, "forward", lambda self, x: (x, None))  # an oneDNN that computes it
    assert device.cpu_has_bf16.__wrapped__() is expected

    def refuse(self: torch.nn.LSTM, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("could not create a primitive descriptor for the LSTM forward propagation primitive")

    monkeypatch.setattr(torch.nn.LSTM, "forward", refuse)
    assert device.cpu_has_bf16.__wrapped__() is False


def switches() -> dict[str, Any]:
    cudnn = torch.backends.cudnn
    return {name: getattr(cudnn, name) for name in ("allow_tf32", "benchmark", "deterministic", "enabled")}


@pytest.mark.parametrize("allowed", [True, False])
def test_fp32_on_a_gpu_is_no_tf32_and_the_switch_is_put_back(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    before = switches()
    with lower_precision(CUDA, "fp32"):
        assert not torch.backends.cudnn.allow_tf32
        assert switches() | {"allow_tf32": allowed} == before
    assert switches() == before
    with pytest.raises(ZeroDivisionError), lower_precision(CUDA, "fp32"):
        1 / 0  # noqa: B018
    assert switches() == before
    with lower_precision(CPU, "fp32"):
        assert switches() == before


def test_bf16_is_autocast() -> None:
    with lower_precision(CPU, "bf16"):
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_every_command_that_takes_a_gpu_asks_for_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, name == "benchmark")
    seed_everything(0)
    choose_device("cpu")
    assert torch.backends.cudnn.benchmark
    choose_device("auto")
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("kind", "cores", "said"), [(CUDA, 1, True), (CUDA, 3, True), (CUDA, 4, False), (CPU, 1, False)]
)
def test_a_gpu_with_few_cores_is_pointed_out(
    kind: torch.device, cores: int, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "available_cores", lambda: cores)
    say_few_cores(kind)
    found = capsys.readouterr().err
    assert ("--cpus-per-task" in found) == said
    assert found.count("\n") == said
