"""Files of weights of other programs: safetensors, Lightning checkpoints and what else is offered as weights."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import functools
import json
import pickle
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from configs.errors import UserError
from engine.checkpoints import load_external_state


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_external_state(path, trusted=True)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------- safetensors


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, end: int, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_files_are_recognised_by_their_content(tmp_path: Path) -> None:
    weights = {"conv1.weight": torch.ones(2)}
    save_file(weights, tmp_path / "net.pth")
    torch.save(weights, tmp_path / "new.safetensors")
    torch.save(weights, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("net.pth", "new.safetensors", "old.safetensors"):
        assert list(load_external_state(tmp_path / name, trusted=True)) == ["conv1.weight"], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_every_type_of_numbers_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.ones(3).to(dtype)}, tmp_path / "net.safetensors", metadata={"format": "pt"})
    assert load_external_state(tmp_path / "net.safetensors")["w"].dtype == dtype


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        header(b"{" * 1000),
        header({"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(6)),
        header({"a": tensor(0, 4, (1000, 1000))}, bytes(4)),
        header({"a": tensor(0, 4, (2**62, 2**62))}, bytes(4)),
        header({"a": tensor(0, 4, dtype="F99")}, bytes(4)),
        header({"a": tensor(-4, 0)}, bytes(4)),
        header({"a": tensor(4, 0)}, bytes(4)),
        header({"a": tensor(0, 4)}),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}', bytes(4)),
        header({"a": 3}),
        header([1, 2]),
        b"\x08",
        b"not weights at all",
        bytes(100),
    ],
)
def test_damaged_or_hostile_files_give_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.safetensors").write_bytes(content)
    assert "not a safetensors file" in refusal(tmp_path / "net.safetensors")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_no_bytes_end_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: bytes, framed: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(header(b"{" + content) if framed else content)
    refusal(path)


def test_files_without_tensors_and_with_strange_names(tmp_path: Path) -> None:
    (tmp_path / "none.safetensors").write_bytes(header({}))
    assert "holds no named tensors" in refusal(tmp_path / "none.safetensors")
    save_file({"a\x1b[31m": torch.ones(1)}, tmp_path / "names.safetensors")
    assert "holds no named tensors" in refusal(tmp_path / "names.safetensors")
    (tmp_path / "empty.safetensors").touch()
    assert "an empty file" in refusal(tmp_path / "empty.safetensors")
    (tmp_path / "page.safetensors").write_text("<!doctype html><html>log in</html>")
    assert "not a safetensors file but a web page" in refusal(tmp_path / "page.safetensors")
    assert "no such checkpoint" in refusal(tmp_path / "missing.safetensors")


# ---------------------------------------------------------------------------------------------- other frameworks


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("net.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x90\x01" + bytes(range(200)), "an ONNX model; convert it"),
        ("saved_model.pb", b"\x08\x01\x12\x9a\xf1\x05\x0a" + bytes(range(200)), "a file of TensorFlow; convert it"),
        ("net.tflite", b"\x1c\0\0\0TFL3" + bytes(range(200)), "a file of TensorFlow; convert it"),
        ("model.ckpt-1000.data-00000-of-00001", bytes(range(256)), "a file of TensorFlow; convert it"),
        ("net.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
        ("net.gguf", b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file of a language model"),
        ("net.zip", b"PK\x03\x04" + bytes(64), "damaged: its end is missing"),
        ("error.pth", b'{"message": "not found"}', "a text that begins with"),
    ],
)
def test_weights_of_other_frameworks_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name)


# ---------------------------------------------------------------------------------------------- Lightning


class Kind(enum.Enum):
    FROZEN = 1


@dataclasses.dataclass
class Options:
    lr: float = 0.1
    folder: Path = dataclasses.field(default_factory=lambda: Path("runs"))


class AttributeDict(dict):  # type: ignore[type-arg]
    """As Lightning saves hyperparameters."""


def omegaconf_like(name: str, **state: Any) -> Any:
    """An object whose class belongs to a package that is not installed here; its state refers to types."""
    module = sys.modules.setdefault("configuration_package", types.ModuleType("configuration_package"))
    kind = type(name, (), {"__module__": "configuration_package"})
    setattr(module, name, kind)
    made = kind()
    made.__dict__.update(state)
    return made


def lightning(state: dict[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    """What Lightning 2 writes: loops, callbacks, optimizers, and hyperparameters of any type."""
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    metadata = omegaconf_like("Metadata", ref_type=Any, object_type=dict, optional=True, key_type=str)
    parameters = AttributeDict(
        config=omegaconf_like("DictConfig", _metadata=metadata, _content={"lr": 0.1, "layers": [1, 2]}),
        arguments=argparse.Namespace(lr=0.1, out=Path("x")),
        kind=Kind.FROZEN,
        options=Options(),
        optimizer=functools.partial(torch.optim.AdamW, lr=0.1),
        activation=torch.nn.ReLU,
        recent=collections.deque([1, 2], maxlen=3),
        counts=collections.defaultdict(list, a=[1]),
        steps=range(3),
        dtype=torch.float32,
    )
    return {
        "epoch": 3,
        "global_step": 400,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"{prefix}{name}": value for name, value in state.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4, "completed": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'map'}": {"best_model_score": torch.tensor(0.5), "dirpath": "/x"}},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [{"_step_count": 1, "base_lrs": [0.1]}],
        "hparams_name": "kwargs",
        "hyper_parameters": parameters,
    }


@pytest.mark.parametrize("prefix", ["model.", "encoder.", "net.", "model.encoder."])
def test_a_lightning_checkpoint_gives_its_tensors_and_nothing_is_executed(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(lightning({"conv1.weight": torch.ones(2)}, prefix), tmp_path / "last.ckpt")
    found = load_external_state(tmp_path / "last.ckpt", trusted=True)
    assert next(iter(found)) == f"state_dict.{prefix}conv1.weight"
    assert {name.partition(".")[0] for name in found} == {"state_dict", "callbacks", "optimizer_states"}
    assert "were ignored; none was executed" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["eval", "exec", "getattr", "__import__", "compile"])
def test_functions_of_python_are_refused_with_the_file(tmp_path: Path, word: str) -> None:
    class Calls:
        def __reduce__(self) -> Any:
            return getattr(__builtins__, word, None) or __builtins__[word], ("1",)  # type: ignore[index]

    (tmp_path / "net.ckpt").write_bytes(pickle.dumps({"state_dict": Calls()}, protocol=2))
    assert "nothing in it was run" in refusal(tmp_path / "net.ckpt")
