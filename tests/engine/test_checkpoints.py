"""Checkpoints survive damage, and reading them never runs their content."""

from __future__ import annotations

import argparse
import errno
import gzip
import os
import pickle
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import engine.checkpoints
import engine.files
from configs.errors import UserError
from engine.checkpoints import (
    RollingCheckpoint,
    load_checkpoint,
    load_external_state,
    random_states,
    restore_random_states,
    save_checkpoint,
    save_external_weights,
)


def test_round_trip_and_the_previous_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    rolling = RollingCheckpoint(path)
    for step in (1, 2):
        rolling.save({"model": {"w": torch.full((2,), float(step))}, "step": step})
    assert load_checkpoint(path)["step"] == 2
    assert load_checkpoint(rolling.previous)["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "last.pt.previous"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "zero", "missing"])
def test_a_damaged_last_checkpoint_falls_back_with_a_warning(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.pt"
    rolling = RollingCheckpoint(path)
    for step in (1, 2):
        rolling.save({"w": torch.arange(5000.0), "step": step})
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "zero":
        path.write_bytes(b"")
    else:
        path.unlink()
    if damage == "missing":
        latest = rolling.load()
    else:
        with pytest.warns(UserWarning, match=r"last\.pt: damaged.*previous"):
            latest = rolling.load()
    assert latest is not None
    assert latest["step"] == 1


def test_both_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    rolling = RollingCheckpoint(tmp_path / "last.pt")
    assert rolling.load() is None
    rolling.path.write_bytes(b"junk")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        rolling.load()


def test_a_damaged_checkpoint_never_replaces_a_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of the first save after a fall-back, there must still be one to resume from."""
    path = tmp_path / "last.pt"
    rolling = RollingCheckpoint(path)
    for step in (1, 2):
        rolling.save({"step": step})
    path.write_bytes(path.read_bytes()[:100])
    rolling = RollingCheckpoint(path)  # as in a new process
    with pytest.warns(UserWarning, match="resuming from"):
        rolling.load()

    def killed(source: Path, target: Path) -> None:
        if target == path:
            raise KeyboardInterrupt
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        rolling.save({"step": 3})
    with pytest.warns(UserWarning, match="resuming from"):
        latest = rolling.load()
    assert latest is not None
    assert latest["step"] == 1


def test_the_one_before_gives_way_only_to_one_that_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    rolling = RollingCheckpoint(path)
    for step in (1, 2):
        rolling.save({"step": step})

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine.files, "fsync_file", full)  # where a network file system says that the disk is full
    monkeypatch.setattr(engine.checkpoints, "fsync_file", full)
    with pytest.raises(UserError, match="no room left"):
        rolling.save({"step": 3})
    assert [load_checkpoint(name)["step"] for name in (path, rolling.previous)] == [2, 1]


def test_both_damaged_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    rolling = RollingCheckpoint(path)
    for name in (path, rolling.previous):
        name.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"last\.pt: damaged"), pytest.raises(UserError) as caught:
        rolling.load()
    assert re.fullmatch(
        r".*last\.pt\.previous: damaged.*; last\.pt is damaged too: delete both to train from the start",
        str(caught.value),
    )


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("writer", ["torch", "torch before 1.6", "pickle"])
def test_a_harmful_pickle_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "pwned"
    if writer == "torch":
        torch.save({"w": Payload(target)}, path)
    elif writer == "torch before 1.6":
        torch.save({"w": Payload(target)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps({"w": Payload(target)}))
    for load in (load_checkpoint, lambda file: load_external_state(file, trusted=True)):
        with pytest.raises(UserError) as caught:
            load(path)
        assert "evil.pth" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not target.exists()


def test_third_party_tensors_are_named_by_their_place(tmp_path: Path) -> None:
    held: dict = {"module.conv1.weight": torch.ones(2), 3: [torch.zeros(1)]}
    held["self"] = held
    torch.save({"state_dict": held, "epoch": 4}, tmp_path / "a.pth")
    found = load_external_state(tmp_path / "a.pth", trusted=True)
    assert list(found) == ["state_dict.module.conv1.weight", "state_dict.3.0"]
    torch.save([1, 2], tmp_path / "b.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    for name in ("b.pth", "page.pth", "missing.pth"):
        with pytest.raises(UserError, match=name):
            load_external_state(tmp_path / name, trusted=True)


@pytest.mark.parametrize("new_form", [True, False])
def test_python_objects_next_to_tensors_are_named_and_left_out(
    tmp_path: Path, new_form: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = {
        "best": np.float64(0.5),
        "curve": np.arange(3),
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "config": Settings(lr=1),
        **({"net": torch.nn.Linear(2, 2)} if new_form else {}),
    }
    content = {"state_dict": {"w": torch.ones(2)}, **beside}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new_form)
    assert list(load_external_state(tmp_path / "a.pth", trusted=True)) == ["state_dict.w"]
    said = capsys.readouterr().err
    assert re.search(r"a\.pth: other Python objects \(numpy\S+, .* and \d+ more\) were ignored", said)
    with pytest.raises(UserError, match=r"it asks for numpy\S+\); nothing in it was run"):
        load_checkpoint(tmp_path / "a.pth")  # in a checkpoint of ours there are none


class Settings(dict):
    """Like configurations in checkpoints: a mapping with its own class."""


@pytest.mark.parametrize("new_form", [True, False])
def test_a_whole_module_is_identified_and_the_remedy_works(tmp_path: Path, new_form: bool) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.save({"model": net}, tmp_path / "net.pth", _use_new_zipfile_serialization=new_form)
    with pytest.raises(UserError, match=r"net\.pth: .* nothing in it was run") as error:
        load_external_state(tmp_path / "net.pth", trusted=True)
    if new_form:
        assert "a whole model or other Python objects (torch.nn.modules.container.Sequential, " in str(error.value)
    assert str(error.value).endswith("load it where it was made and save model.state_dict()")
    made = torch.load(tmp_path / "net.pth", weights_only=False)["model"]  # made above, as the message advises
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    assert list(load_external_state(tmp_path / "weights.pth", trusted=True)) == ["0.weight", "0.bias"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_files_of_other_kinds_are_called_what_they_are(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    np.savez(tmp_path / "arrays.npz", w=np.ones(2))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("net.pth", b"x" * 100)
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    (tmp_path / "packed.pth").write_bytes(gzip.compress(b"x" * 1000))
    for name, what in {
        "script.pt": r"script\.pt: a TorchScript archive, .* torch\.jit\.load where it was made",
        "arrays.npz": r"arrays\.npz: a zip archive that is not a checkpoint \(it contains w\.npy\)",
        "packed.zip": r"packed\.zip: a zip archive that is not a checkpoint \(it contains net\.pth\); unpack it",
        "pointer.pth": r"pointer\.pth: not a checkpoint but a Git LFS pointer",
        "packed.pth": r"packed\.pth: not a checkpoint but gzip-compressed",
    }.items():
        for load in (load_checkpoint, lambda path: load_external_state(path, trusted=True)):
            with pytest.raises(UserError, match=what) as error:
                load(tmp_path / name)
            assert "\n" not in str(error.value)
    safe = pytest.importorskip("safetensors.torch")
    safe.save_file({"conv1.weight": torch.ones(2)}, tmp_path / "net.safetensors")
    assert list(load_external_state(tmp_path / "net.safetensors", trusted=True)) == ["conv1.weight"]


@pytest.mark.parametrize("before_1_6", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_off_file_is_called_damaged(tmp_path: Path, before_1_6: bool, share: float) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"w": torch.ones(5000)}, path, _use_new_zipfile_serialization=not before_1_6)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"cut\.pth: damaged") as caught:
        load_external_state(path, trusted=True)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_of_the_older_format_gives_one_line(tmp_path: Path) -> None:
    """Earlier, the line contained torch's own messages (`index out of range`, `expected 15973 more bytes`)."""
    path = tmp_path / "old.pth"
    torch.save({f"layer{k}.w": torch.ones(50) for k in range(5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for cut in range(1, len(content), 7):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError) as caught:
            load_external_state(path, trusted=True)
        early = str(caught.value).endswith("damaged or not a checkpoint: it ends too early; copy or download it again")
        # If a file is cut off inside a name, the remaining name may be one that is not allowed.
        assert early or re.search(r"\(it asks for [\w.]+\w\); nothing in it was run", str(caught.value))


@pytest.mark.parametrize("page", ["<!DOCTYPE html><html>", "\n <HTML lang='en'>", "\ufeff<!doctype html>"])
def test_a_web_page_is_called_one(tmp_path: Path, page: str) -> None:
    (tmp_path / "net.pth").write_text(page + "<body>sign in</body></html>")
    with pytest.raises(UserError, match=r"net\.pth: not a checkpoint but a web page"):
        load_external_state(tmp_path / "net.pth", trusted=True)


def test_third_party_tensors_hold_numbers(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, device="meta")}, tmp_path / "meta.pth")
    with pytest.raises(UserError, match=r"meta\.pth"):
        load_external_state(tmp_path / "meta.pth", trusted=True)
    torch.save({"two\nlines": torch.ones(2)}, tmp_path / "names.pth")
    with pytest.raises(UserError, match=r"names\.pth: .* keys are not names"):
        load_external_state(tmp_path / "names.pth", trusted=True)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_for_other_programs_come_back(tmp_path: Path, prefix: str) -> None:
    state = {f"{prefix}w": torch.randn(3), f"{prefix}n": torch.tensor(4)}
    save_external_weights(tmp_path / "out" / "net.pth", state)
    assert not (tmp_path / "out" / "net.pth").read_bytes().startswith(b"PK")  # PyTorch 1.2 reads no zip archives
    back = load_external_state(tmp_path / "out" / "net.pth", trusted=True)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_old_torch_needs_the_users_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu118")
    with pytest.raises(UserError, match="--trusted"):
        load_external_state(tmp_path / "a.pth")
    assert load_external_state(tmp_path / "a.pth", trusted=True)["w"].item() == 1


CPU = torch.device("cpu")


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "r.pt", {"random": random_states(CPU)})
    first = (torch.rand(3), np.random.rand(3), random.random())
    restore_random_states(load_checkpoint(tmp_path / "r.pt")["random"], CPU)
    again = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert first[2] == again[2]


class FakeGpus:
    """The random states of some GPUs, of which the process uses one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, current: int = 0) -> None:
        self.states = [torch.tensor([number], dtype=torch.uint8) for number in range(count)]
        self.current = current
        for name in ("get_rng_state", "set_rng_state"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return self.states[self.current if device.index is None else device.index]

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.states[self.current if device.index is None else device.index] = state


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_of_several_gpus_only_the_process_s_own_has_its_random_state_kept(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own = random_states(FakeGpus(monkeypatch, 3, current=1) and torch.device(name))
    assert own["cuda"].tolist() == [1]
    fewer = FakeGpus(monkeypatch, 1)
    restore_random_states(own, torch.device("cuda"))
    assert [state.tolist() for state in fewer.states] == [[1]]


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", 11), ("cuda", 10), ("cuda:2", 2)])
def test_a_checkpoint_with_the_random_states_of_all_gpus_gives_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str, expected: int
) -> None:
    """As earlier versions wrote them, on a machine with more GPUs or fewer."""
    gpus = FakeGpus(monkeypatch, 3)
    older = random_states(CPU) | {"cuda": [torch.tensor([10 + number], dtype=torch.uint8) for number in range(2)]}
    where = torch.device(device)
    restore_random_states(older, where)
    assert gpus.get_rng_state(where).tolist() == [expected]
    assert ("no random state of cuda:2; training continues" in capsys.readouterr().err) == (device == "cuda:2")


def test_a_process_on_the_cpu_leaves_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a GPU for its random state opens a context on it: hundreds of megabytes for each of several trainings."""

    def context(*_: object) -> None:
        raise AssertionError("a context is opened")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", context)
    states = random_states(CPU)
    assert "cuda" not in states
    restore_random_states(states | {"cuda": [torch.zeros(1, dtype=torch.uint8)]}, CPU)


def test_the_random_state_of_apple_s_gpu_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    restore_random_states(random_states(torch.device("mps")), torch.device("mps"))
    assert [state.tolist() for state in restored] == [[7]]


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    import subprocess
    import sys

    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    program = (
        "import resource, signal, sys, torch\nfrom pathlib import Path\n"
        "from engine.checkpoints import RollingCheckpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "RollingCheckpoint(Path(sys.argv[1])).save({'step': 2, 'w': torch.zeros(1_000_000)})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "last.pt")], capture_output=True, text=True, check=False
    )
    assert "UserError" in done.stderr.strip().splitlines()[-1]
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]
