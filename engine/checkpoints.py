"""Write and read checkpoints.

Writing is atomic, and an old checkpoint is kept until the new one is complete. Reading a file never executes code in
it.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import UserError, listed, type_and_line
from engine.files import atomic_path, fsync_file
from engine.progress import say
from engine.sniff import PICKLE, SAFETENSORS, TORCH, recognise_weights

FORMAT = 1
# `weights_only=True` could be bypassed before this release (CVE-2025-32434, CVE-2026-24747): with an older torch, files
# of unknown origin are loaded only if the user says that they can be trusted.
SAFE_TORCH = (2, 10)
_ZIP_MAGIC = b"PK\x03\x04"
_FORBIDDEN_NAME = re.compile(r"GLOBAL ([\w.]{1,80})")
_MAX_OBJECT_TYPES = 64  # a third-party file with more types of Python objects is refused
# Types that configurations refer to, as those of OmegaConf do. Functions such as `eval` are refused with the file.
_BUILTIN_TYPES = frozenset(
    {"dict", "list", "tuple", "int", "float", "str", "bool", "bytes", "frozenset", "object", "type", "range", "slice"}
)
_TUPLE_STATES = ("numpy.", "functools.partial")  # beginnings of names, see `_InertValue`
_REMEDY = "load it where it was made and save model.state_dict()"
_NOT_RUN = f"that could run any code; nothing in it was run: {_REMEDY}"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors and plain containers) to `path`.

    Raises UserError if the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        _save({"format": FORMAT, **content}, temporary, path)


def save_external_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a plain state dict for other programs, in the layout that PyTorch before 1.6 can also read.

    Raises UserError if the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            _save(state, temporary, path, _use_new_zipfile_serialization=False)
        except TypeError:  # raised by a torch that can no longer write the old layout
            _save(state, temporary, path)


def _save(content: Any, temporary: Path, path: Path, **options: Any) -> None:
    try:
        torch.save(content, temporary, **options)
    except RuntimeError as error:  # torch's zip writer hides the system's error number
        raise UserError(f"{path}: cannot be written (is the disk full?): {type_and_line(error)}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one of the project's checkpoints onto the CPU.

    Raises UserError if it is missing, damaged (every entry's CRC is checked) or not a checkpoint of this project.
    """
    content = _load(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project (format {FORMAT})")
    return content


class RollingCheckpoint:
    """A checkpoint file that is overwritten regularly. The checkpoint before the last is kept as `<name>.previous`."""

    def __init__(self, path: Path) -> None:
        self.path, self.previous = path, path.with_name(path.name + ".previous")
        self._verified = False  # True once this object has written or read `path`, which is then known to be complete

    def save(self, content: dict[str, Any]) -> None:
        """Write `content` to `path`, so that a complete checkpoint exists at every moment.

        The old file becomes `<name>.previous` only after the new one is on the disk, and only if the old file is
        intact. Raises UserError if the disk is full or the folder cannot be written.
        """
        with atomic_path(self.path) as temporary:
            _save({"format": FORMAT, **content}, temporary, self.path)
            if self.path.exists():
                fsync_file(temporary)
                if self._verified or self._is_whole():
                    os.replace(self.path, self.previous)
        self._verified = True

    def load(self) -> dict[str, Any] | None:
        """Return the checkpoint, or the previous one (with a warning) if it is damaged or missing.

        Returns None if neither file exists. Raises UserError if every file that exists is damaged.
        """
        candidates = [path for path in (self.path, self.previous) if path.exists()]
        for path in candidates:
            try:
                content = load_checkpoint(path)
            except UserError as error:
                if path == candidates[-1]:
                    others = f"{self.path.name} is damaged too: delete both" if len(candidates) > 1 else "delete it"
                    raise UserError(f"{error}; {others} to train from the start") from error
                warnings.warn(f"{error}; resuming from {self.previous.name}", stacklevel=2)
            else:
                self._verified = path == self.path
                return content
        return None

    def _is_whole(self) -> bool:
        try:
            load_checkpoint(self.path)
        except UserError:
            return False
        return True


class _Inert(OrderedDict[str, Any]):
    """Stands in for a Python object in a third-party file that is neither a tensor nor a plain container.

    Creating it executes nothing from the file.
    """

    def __new__(cls, *_: object, **__: object) -> Any:
        return OrderedDict()  # torch's reader sets items and attributes of these


class _InertValue:
    """Stands in for a NumPy scalar, array or dtype and for others whose state is a tuple, as `_Inert` for objects."""

    def __new__(cls, *_: object) -> _InertValue:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class _InertList(list[Any]):
    """Stands in for a list of another class."""

    def __new__(cls, *_: object) -> _InertList:
        return list.__new__(cls)

    def __init__(self, *_: object) -> None:
        super().__init__()


def _inert(name: str) -> type:
    if name == "collections.deque":
        return _InertList
    return _InertValue if name.startswith(_TUPLE_STATES) else _Inert


def load_external_state(path: Path, trusted: bool = False) -> dict[str, torch.Tensor]:
    """Read all tensors of a file of unknown origin.

    The keys are the tensors' paths in the file, for example `state_dict.module.conv1.weight`. Other Python objects are
    reported and left out; none of them is executed. Raises UserError if the file contains no named tensor. Also raises
    UserError if this version of torch cannot load third-party files safely, unless the file is `trusted`.
    """
    what = recognise_weights(path)
    if what == SAFETENSORS or (path.suffix == ".safetensors" and what not in (TORCH, PICKLE)):
        return _load_safetensors(path)
    if not trusted:
        _require_safe_torch(path, "upgrade to 2.10 or newer, or pass --trusted if you know where the file comes from")
    content, objects = _load_without_objects(path)
    tensors = dict(_named_tensors(content))
    named = listed(objects)
    if not tensors and objects:
        raise UserError(f"{path}: a whole model or other Python objects ({named}) {_NOT_RUN}")
    if not tensors:
        raise UserError(f"{path}: not a state dict (a mapping from names to tensors); {_REMEDY}")
    if not all(name.isprintable() for name in tensors):  # they appear in messages
        raise UserError(f"{path}: not a state dict: some of its keys are not names")
    if objects:
        say(f"{path}: other Python objects ({named}) were ignored; none was executed")
    return tensors


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of safetensors, which holds nothing but named tensors. Raises UserError if it is damaged."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except MemoryError as error:
        raise UserError(f"{path}: too large to load") from error
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        what = recognise_weights(path)
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint") from error
        if what is not None and what != SAFETENSORS:
            raise UserError(f"{path}: not a safetensors file but {what}") from error
        raise UserError(
            f"{path}: not a safetensors file, or damaged ({type_and_line(error)}); copy or download it again"
        ) from error
    if not tensors or not all(name.isprintable() for name in tensors):
        raise UserError(f"{path}: holds no named tensors; choose another file of weights")
    return tensors


def load_external_content(path: Path) -> Any:
    """Read a file of `torch.save` of unknown origin: tensors and plain containers, onto the CPU.

    Raises UserError if it is missing or damaged, if it holds anything else, or if this version of torch cannot load
    third-party files safely.
    """
    _require_safe_torch(path, "upgrade to 2.10 or newer")
    return _load(path)


def _require_safe_torch(path: Path, remedy: str) -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < SAFE_TORCH:
        raise UserError(
            f"{path}: torch {torch.__version__} cannot load third-party files safely (CVE-2026-24747); {remedy}"
        )


def _load_without_objects(path: Path) -> tuple[Any, list[str]]:
    """Return a file's content, with each Python object replaced by an inert one, and the names of the replaced types.

    Raises UserError if the file uses what torch never allows: Python's built-in functions and operating system calls.
    """
    objects: dict[str, type] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(what, name) for name, what in objects.items()]):
                return _load(path, checked=bool(objects)), list(objects)
        except UserError as error:
            found = _FORBIDDEN_NAME.search(str(error.__cause__))
            name = f"builtins.{found[1]}" if found and found[1] in _BUILTIN_TYPES else found and found[1]
            if name is None or name in objects or len(objects) == _MAX_OBJECT_TYPES:
                raise
            objects[name] = _inert(name)


def _named_tensors(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in mappings and lists at any depth, with their paths.

    Each container is visited only once, since files may contain cycles.
    """
    waiting, seen = [("", content)], set()
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if place and value.device.type == "cpu":  # a tensor on the device `meta` has a shape but no data
                yield place[1:], value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = dict.items(value) if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{place}.{key}", below) for key, below in items][::-1]


def _load(path: Path, checked: bool = False) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        if not checked and _is_whole_archive(path):
            with zipfile.ZipFile(path) as archive:
                _refuse_programs(archive, path)
                _refuse_bombs(archive, path)
                broken = archive.testzip()
            if broken:
                raise UserError(f"{path}: damaged (checksum of {broken} is wrong)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the pickle's protocol; the errors below are clearer
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True)
            with path.open("rb") as stream:  # given the path, torch 2.14 would take it for what its name says
                return torch.load(stream, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path}: too large to load") from error
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        if _ends_early(error):
            raise UserError(
                f"{path}: damaged or not a checkpoint: it ends too early; copy or download it again"
            ) from error
        what = recognise_weights(path)
        if what not in (None, PICKLE, TORCH):
            raise UserError(f"{path}: not a checkpoint but {what}") from error
        if isinstance(error, pickle.UnpicklingError):
            found = _FORBIDDEN_NAME.search(str(error))
            named = f" (it asks for {found.group(1)})" if found else ""
            raise UserError(
                f"{path}: damaged or not a checkpoint, or it holds more than tensors and plain containers{named}; "
                f"nothing in it was run; if the file is intact, {_REMEDY}"
            ) from error
        raise UserError(f"{path}: damaged or not a checkpoint ({type_and_line(error)})") from error


def _ends_early(error: Exception) -> bool:
    """Whether this is an error that torch raises for a truncated file in its older format, which is not a zip archive.

    The error depends on where the file ends: inside a tensor's storage, a number, a pickle instruction or a name.
    """
    if isinstance(error, EOFError | IndexError | struct.error):
        return True
    return "unexpected EOF" in str(error) or re.search(r"GLOBAL [\w.]*\. ", str(error)) is not None


def _refuse_programs(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise UserError if a zip archive has no pickle written by torch.save, or contains a TorchScript program."""
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(
            f"{path}: a TorchScript archive, which is a program; nothing in it was run: open it with torch.jit.load "
            "where it was made and save its state_dict()"
        )
    if not any(name.endswith("data.pkl") for name in names):
        first = names[0][:60] if names and names[0].isprintable() else "nothing"
        raise UserError(f"{path}: a zip archive that is not a checkpoint (it contains {first}); unpack it or {_REMEDY}")


def _refuse_bombs(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise UserError for a zip bomb: torch writes uncompressed entries, which cannot be larger than the file."""
    entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{path}: compressed, or claims to be larger than it is; PyTorch writes no such files")


def _is_whole_archive(path: Path) -> bool:
    """Whether the file is a zip archive, the format of torch.save since 1.6.

    Raises UserError if the file is empty or a truncated archive.
    """
    with path.open("rb") as stream:
        head = stream.read(len(_ZIP_MAGIC))
    if not head:
        raise UserError(f"{path}: damaged: the file is empty; copy or download it again")
    whole = zipfile.is_zipfile(path)
    if head.startswith(_ZIP_MAGIC) and not whole:
        raise UserError(f"{path}: damaged: its end is missing; copy or download it again")
    return whole


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all random generators that a training step on `device` may use.

    They consist of plain containers and tensors. Only the GPU that this process computes on is included; a process that
    computes on the CPU does not query any GPU.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), [int(key) for key in np.asarray(keys)], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore all random generators from the `states` that `random_states` returned.

    If `states` come from another kind of device, the generator of `device` keeps its seed, and a note is printed.
    """
    torch.set_rng_state(states["torch"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if device.type == "cpu":
        return
    own = states.get(device.type)
    if isinstance(own, list):  # earlier versions saved the state of every visible GPU
        place = torch.cuda.current_device() if device.index is None else device.index
        own = own[place] if place < len(own) else None
    if own is None:
        say(f"note: the checkpoint has no random state of {device}; training continues with other dropout masks")
    elif device.type == "cuda":
        torch.cuda.set_rng_state(own, device)
    else:
        torch.mps.set_rng_state(own)
