"""Every private interface of another library has one place, a fallback and a test that runs it.

The table "Private interfaces" of docs/decisions.md names them; tests that are next to the code are named there only.
"""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.schema import OptimConfig
from engine.checkpoints import load_external_state, save_external_weights
from engine.files import NoRoomError, as_user_error
from engine.logs import MetricLog, read_metrics
from engine.optim import build_optimizer
from engine.stopping import StopRequest
from pipeline import PACKAGES
from stage1_cnn.data import FrameLoader
from stage1_cnn.encoders.openvino_net import openvino

PROJECT = Path(__file__).resolve().parent.parent
TABLE = (PROJECT / "docs" / "decisions.md").read_text(encoding="utf-8").partition("## Private interfaces")[2]
CPU = torch.device("cpu")
# What an interface looks like in code, and the one file that may contain it.
PRIVATE = {
    r"torch\.ops\.": "engine/onednn.py",
    r"__wrapped__": "engine/optim.py",
    r"_reset_state|_shared_state": "engine/device.py",
    r"_use_new_zipfile": "engine/checkpoints.py",
    r"GLOBAL \(|unexpected EOF": "engine/checkpoints.py",
    r"errno = \{": "engine/files.py",
    r"tensorboard\.(compat|summary)": "engine/logs.py",
    r"openvino_telemetry": "stage1_cnn/encoders/openvino_net.py",
    r"gloo/": "engine/processes.py",
    r"ACCELERATE_BYPASS": "engine/processes.py",
    r"TORCHELASTIC_USE": "engine/launch.py",
    r"ForkingPickler": "engine/pool.py",
    r"_shutdown_workers": "stage1_cnn/decoding.py",
    r"decord\.libs": "features/video/decord.py",
    r"_make_submission|_submitit_command": "commands/slurm.py",
}
# Others that were used once, or might be.
NOWHERE = (
    r"subprocess_handlers|_BatchNorm\b|HASH_REGEX|torch\._(?!_)(?!utils _rebuild)|torch\.distributed\.elastic"
    r"|def _apply\(self, fn|['\"]_extra_state"
)


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The product's files."""
    files = [PROJECT / "pipeline.py", *(path for room in PACKAGES for path in (PROJECT / room).rglob("*.py"))]
    return {path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8") for path in files}


@pytest.mark.parametrize("pattern", PRIVATE)
def test_each_is_used_in_one_file_that_the_table_names(sources: dict[str, str], pattern: str) -> None:
    assert [name for name, text in sources.items() if re.search(pattern, text)] == [PRIVATE[pattern]]
    assert f"`{PRIVATE[pattern]}`" in TABLE


def test_there_are_no_others(sources: dict[str, str]) -> None:
    found = {name: match.group() for name, text in sources.items() if (match := re.search(NOWHERE, text))}
    assert not found


# ---------------------------------------------------------------------------------------------- fallbacks


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimisers_without_wrappers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps, whether torch wraps the methods or not."""
    found = []
    for wrapped in (True, False):
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        if not wrapped:
            kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
            for method in ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict"):
                whole = getattr(kind, method)
                monkeypatch.setattr(kind, method, lambda *given, whole=whole, **more: whole(*given, **more))
        optimizer = build_optimizer([{"params": [weight]}], OptimConfig(name=name, lr=0.1))
        for _ in range(3):
            weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(weight.detach())
    assert torch.equal(*found)


ACCELERATE = """
from accelerate.state import AcceleratorState
from configs.errors import UserError
from engine.device import cpu_has_bf16, make_accelerator
import engine.device
engine.device.cpu_has_bf16 = lambda: True
make_accelerator("cpu", "fp32")
make_accelerator("cpu", "fp32")
make_accelerator("cpu", "bf16")
del AcceleratorState._reset_state
make_accelerator("cpu", "bf16")
try:
    make_accelerator("cpu", "fp32", "cnn.precision")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_accelerate_that_cannot_be_reset() -> None:
    done = subprocess.run([sys.executable, "-c", ACCELERATE], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert re.fullmatch(
        r"cnn\.precision: this release of accelerate keeps .*; run each training as a command of its own\n", done.stdout
    )


def test_a_torch_without_the_old_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def without(content: Any, path: Path) -> None:
        save(content, path)

    monkeypatch.setattr(torch, "save", without)
    save_external_weights(tmp_path / "net.pth", {"weight": torch.arange(3.0)})
    assert load_external_state(tmp_path / "net.pth", trusted=True)["weight"].tolist() == [0.0, 1.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_a_torch_that_words_its_errors_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "net.pth")

    def refuse(*_: Any, **__: Any) -> None:
        raise pickle.UnpicklingError("refused")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match=r"^\S*net\.pth: damaged .* plain containers; nothing in it was run; "):
        load_external_state(tmp_path / "net.pth", trusted=True)


def test_an_h5py_that_does_not_name_the_error_number(tmp_path: Path) -> None:
    known, unknown = OSError("Unable to write (errno = 28, no space)"), OSError("Unable to write (no space)")
    assert isinstance(as_user_error(known, tmp_path), NoRoomError)
    assert as_user_error(unknown, tmp_path) is unknown


@pytest.mark.parametrize("missing", ["compat.proto.event_pb2", "summary.writer.record_writer"])
def test_a_tensorboard_without_its_own_modules(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, f"tensorboard.{missing}", None)
    log = MetricLog(tmp_path)
    for step in (1, 2):
        log.log("step", step, {"loss": 0.5})
        log.sync()
    log.close()
    assert "".join(capsys.readouterr()).count("note: no TensorBoard events") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_an_openvino_that_needs_its_telemetry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_telemetry.py").write_text("import openvino_telemetry\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"extract\.engine=openvino: needs_telemetry cannot be imported"):
        openvino("needs_telemetry")


def test_a_loader_without_a_private_shutdown() -> None:
    with FrameLoader(torch.utils.data.TensorDataset(torch.zeros(1)), 0, CPU, StopRequest()) as loader:
        loader._loader._iterator = SimpleNamespace()


def test_a_loader_that_fails_with_another_message() -> None:
    dataset = torch.utils.data.TensorDataset(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"^a worker ended$"), FrameLoader(dataset, 0, CPU, StopRequest()):
        raise RuntimeError("a worker ended")
    with pytest.raises(UserError, match="frames died"), FrameLoader(dataset, 0, CPU, StopRequest()):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
