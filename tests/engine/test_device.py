"""Precision: supported ones are used, others are refused with alternatives; global switches are restored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from engine import device
from engine.device import (
    choose_device,
    choose_precision,
    cpu_threads,
    lower_precision,
    make_accelerator,
    say_few_cores,
    start_stage,
)
from engine.runs import StageFolder, StageIdentity
from tests.gpu import Gpu
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
        assert choose_precision("x.precision", "bf16", MPS, training) == "bf16"
        with pytest.raises(UserError) as caught:
            choose_precision("x.precision", "bf16", CPU, training)
        for instead in ("fp32", "auto"):
            assert f"set x.precision={' or '.join(('fp32', 'auto'))}" in str(caught.value)
            assert choose_precision("x.precision", instead, CPU, training) == "fp32"


OLDER, NEWER = [(6, 0), (7, 0), (7, 5)], [(8, 0), (8, 6), (9, 0), (12, 0)]


@pytest.mark.parametrize(
    ("capability", "expected"), [(one, "fp16") for one in OLDER] + [(one, "bf16") for one in NEWER]
)
@pytest.mark.parametrize("training", [True, False])
def test_a_gpu_computes_bf16_where_it_has_it_and_fp16_otherwise(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str, training: bool
) -> None:
    Gpu(monkeypatch, capability)
    for name in ("auto", "native"):
        assert choose_precision("x.precision", name, CUDA, training) == expected
    assert choose_precision("x.precision", "fp16", CUDA, training) == "fp16"
    if expected == "bf16":
        assert choose_precision("x.precision", "bf16", CUDA, training) == "bf16"
        return
    with pytest.raises(UserError, match=r"^x\.precision=bf16: this GPU .* set x\.precision=auto$"):
        choose_precision("x.precision", "bf16", CUDA, training)


def test_fp16_is_trained_with_a_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate makes one for fp16, none for bf16."""
    scalers = []
    for capability in ((7, 5), (8, 0)):
        Gpu(monkeypatch, capability)
        accelerator, _ = make_accelerator("cuda", "auto")
        scalers.append(accelerator.scaler is not None)
    monkeypatch.undo()
    make_accelerator("cpu", "fp32")  # Accelerate's state is one of the process
    assert scalers == [True, False]


def test_accelerate_s_refusal_of_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the driver about pairs of RTX 40xx, though this process uses one of them."""
    with monkeypatch.context() as patch:
        Gpu(patch, (8, 9))
        patch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: False)
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            patch.delenv(name, raising=False)
        with pytest.raises(UserError, match=r"^accelerate: Using RTX 4000 series .*export NCCL_P2P_DISABLE=1 NCCL_IB"):
            make_accelerator("cuda", "fp32")
    make_accelerator("cpu", "fp32")  # Accelerate's state is one of the process


# ---------------------------------------------------------------------------------------------- a GPU out of reach


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """A machine whose NVIDIA driver says something; torch finds no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def says(text: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{text}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        device.driver_lists_gpu.cache_clear()

    device.driver_lists_gpu.cache_clear()
    yield says
    device.driver_lists_gpu.cache_clear()


@pytest.mark.parametrize(
    ("build", "said", "words"),
    [
        (None, "GPU 0: Tesla T4 (UUID: GPU-1)", "this torch is built for CPUs; install a torch for its CUDA"),
        ("13.0", "GPU 0: Tesla T4 (UUID: GPU-1)", "cannot use it (the driver is too old); update the driver, or"),
        ("13.0", "Failed to initialize NVML: Driver/library version mismatch", "cannot use it"),
    ],
)
def test_auto_does_not_pass_over_a_gpu_that_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch, driver: Callable[[str], None], build: str | None, said: str, words: str
) -> None:
    def too_old() -> None:
        raise RuntimeError("the driver\nis too old")

    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    driver(said)
    for name in ("auto", "cuda"):
        with pytest.raises(UserError) as caught:
            choose_device(name)
        assert words in str(caught.value)
        assert str(caught.value).startswith(f"device={name}: there is an NVIDIA GPU, ")
        assert str(caught.value).endswith("or set device=cpu")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("said", ["No devices found.", ""])
def test_a_driver_without_a_gpu_for_this_process_is_no_gpu(driver: Callable[[str], None], said: str) -> None:
    """As in a job on a node with GPUs that has asked for none."""
    driver(said)
    assert choose_device("auto").type == "cpu"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_who_hides_the_gpus_wants_the_cpu(
    monkeypatch: pytest.MonkeyPatch, driver: Callable[[str], None], hidden: str
) -> None:
    driver("GPU 0: Tesla T4 (UUID: GPU-1)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device("auto").type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused_with_one_that_is(driver: Callable[[str], None]) -> None:
    driver("")
    with pytest.raises(UserError, match=r"^device=cuda: .*; present: cpu.*; set device=cpu or device=auto$"):
        choose_device("cuda")


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


def test_bf16_is_autocast() -> None:
    with lower_precision(CPU, "bf16"):
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


SWITCHES = {
    "cudnn.deterministic": torch.backends.cudnn,
    "cudnn.benchmark": torch.backends.cudnn,
    "cudnn.allow_tf32": torch.backends.cudnn,
    "matmul.allow_tf32": torch.backends.cuda.matmul,
}


def switches() -> dict[str, bool]:
    return {name: getattr(place, name.partition(".")[2]) for name, place in SWITCHES.items()}


def switch(values: dict[str, bool]) -> None:
    for name, value in values.items():
        setattr(SWITCHES[name], name.partition(".")[2], value)


@pytest.fixture
def switched() -> Iterator[None]:
    """Every switch the other way round than by default; put back after the test."""
    before = switches()
    switch({name: name != "cudnn.deterministic" for name in SWITCHES})
    yield
    switch(before)


def start(monkeypatch: pytest.MonkeyPatch, name: str, *changes: str) -> None:
    """Start a stage on a GPU that computes."""
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.zeros(size))
    start_stage("a stage", load_config("mini", changes), torch.device(name), "fp32", "3 loader process(es)")


@pytest.mark.usefixtures("switched")
def test_every_stage_has_the_same_kernels_and_true_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, (8, 0))
    before, expected = switches(), {name: name == "cudnn.deterministic" for name in SWITCHES}
    start(monkeypatch, "cpu")
    assert switches() == before
    start(monkeypatch, "cuda")
    assert switches() == expected
    with lower_precision(CUDA, "fp32"):
        assert switches() == expected


@pytest.mark.usefixtures("switched")
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("cuda.deterministic=false", []),
        ("cuda.benchmark=true", ["cudnn.deterministic", "cudnn.benchmark"]),
        ("cuda.tf32=true", ["cudnn.deterministic", "cudnn.allow_tf32", "matmul.allow_tf32"]),
    ],
)
def test_each_switch_has_its_setting(monkeypatch: pytest.MonkeyPatch, setting: str, expected: list[str]) -> None:
    Gpu(monkeypatch, (8, 0))
    start(monkeypatch, "cuda", setting)
    assert [name for name, on in switches().items() if on] == expected


@pytest.mark.usefixtures("switched")
def test_a_stage_says_what_it_computes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Gpu(monkeypatch, (7, 5), "Tesla T4")
    for name, expected in (("cpu", "cpu"), ("cuda:1", "cuda:1 (Tesla T4)"), ("mps", "mps")):
        start(monkeypatch, name)
        assert capsys.readouterr().err == f"a stage: {expected}, fp32, 3 loader process(es)\n"
    for variable, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(variable, value)
    start(monkeypatch, "cpu")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("switched")
def test_a_gpu_that_torch_was_not_built_for_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    Gpu(monkeypatch, (6, 0), "Tesla P100")
    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(UserError, match=r"^cuda: this torch \(.*\) has no code for sm_60, Tesla P100; install a torch"):
        start_stage("a stage", load_config("mini"), CUDA, "fp32")


def test_what_computes_on_the_cpu_asks_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its name would be asked from a context of its own, hundreds of megabytes a process."""

    def context(*_: object) -> None:
        raise AssertionError("a context is opened")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_lazy_init", context)
    config = load_config("mini", ["device=cpu"])
    start_stage("a stage", config, choose_device("cpu"), "fp32")
    make_accelerator("cpu", "auto")
    StageFolder(tmp_path, "cnn", config, StageIdentity({})).open()
    assert "gpus" not in json.loads((tmp_path / "cnn/environment.json").read_text())


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
