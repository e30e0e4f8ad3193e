"""Reading pickles that somebody else made without running what they say.

A pickle is a program, and Python's own reader runs it. Here the program is read through first, without being run: only
instructions that put together lists, tuples, dictionaries, strings and numbers are allowed, in bounded number. Only
then is it unpickled, by a reader that knows no class at all, or (`tensors`) those few names that single numbers of
PyTorch and NumPy are written with, each rebuilt by code of this file: no function of theirs is called.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from configs.errors import UserError

MAX_FILE_BYTES = 512 << 20
MAX_INSTRUCTIONS = 16_000_000  # five times an index of all of Cholec80 at one frame a second
MAX_CONTAINERS = 4_000_000
MAX_VALUES = 16_000_000  # after shared parts are counted as often as they are referred to
MAX_INT_BYTES = 8
# Tuples may be keys, and the hash of one inside another inside another takes the interpreter's stack.
MAX_TUPLES_BESIDE_KEYS = 1000
MAX_TENSOR_VALUES = 1024  # a prediction's tensor is one number, or one row of logits


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STRINGS = _names("STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8")
_NUMBERS = _names("NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT")
_CONTAINERS = _names("EMPTY_LIST LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT")
_PLAIN = (
    _STRINGS
    | _NUMBERS
    | _CONTAINERS
    | _names("BINBYTES SHORT_BINBYTES BINBYTES8 APPEND APPENDS SETITEM SETITEMS")
    | _names("PROTO FRAME STOP MARK POP POP_MARK GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE")
)
_KEYS = _names("DICT SETITEM SETITEMS")
_REBUILDING = _names("GLOBAL STACK_GLOBAL REDUCE BUILD")
_SCALARS = (str, int, float, bool, bytes, type(None))


def load_plain(path: Path, *, tensors: bool = False) -> Any:
    """The lists, tuples, dictionaries, strings and numbers that a pickle of any protocol (Python 2's too) holds.

    With `tensors`, single numbers and short rows of PyTorch and NumPy count as numbers and lists of numbers. Raises
    UserError for a file that is no pickle, is cut off, asks for anything else (nothing of it is run), or is larger than
    such files are.
    """
    content = _read(path)
    try:
        _scan(content, _PLAIN | _REBUILDING if tensors else _PLAIN)
        value = _Reader(content, _classes(_Budget(4 * len(content) + _SPARE_BYTES)) if tensors else {}).load()
        _require_plain(value)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{path}: too large to load") from error
    except Exception as error:  # whatever a damaged file makes the reader say
        raise UserError(f"{path}: damaged pickle ({_first_line(error)}); copy or download it again") from error
    return value


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, which no index or list of predictions is")
    if problem := _no_pickle(content):
        raise UserError(f"{path}: not a pickle but {problem}")
    return content


def _no_pickle(content: bytes) -> str | None:
    """What a file that starts like this is, where it is one of the usual mistakes."""
    start = content[:200].lstrip().lower()
    if not start:
        return "an empty file; copy or download it again"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page; download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if start.startswith(b"pk\x03\x04"):
        return "a zip archive or a PyTorch checkpoint"
    return None


# ---------------------------------------------------------------------------------------------- before it is run


def _scan(content: bytes, allowed: frozenset[str]) -> int:
    """Read the program through without running it; its length in bytes. Raises UserError at the first instruction that
    is not allowed, and where it asks for more memory than its length explains."""
    count = containers = tuples = end = 0
    names: list[str] = ["?", "?"]  # the last two strings: what STACK_GLOBAL is about to ask for
    for code, argument, place in _instructions(content):
        count, end = count + 1, (place or 0) + 1
        if code.name in _STRINGS:
            names = [names[1], str(argument)]
        if code.name not in allowed:
            _refuse(code.name, argument, names)
        containers += code.name in _CONTAINERS
        tuples += code.name.startswith("TUPLE")
        if code.name in _KEYS and tuples > MAX_TUPLES_BESIDE_KEYS:
            raise UserError("holds dictionaries after very many tuples, which no such file does; not loaded")
        if count > MAX_INSTRUCTIONS or containers > MAX_CONTAINERS:
            raise UserError("holds more values than any index or list of predictions; not loaded")
        if code.name in ("PUT", "LONG_BINPUT") and not 0 <= argument <= 4 * count + 1024:
            raise UserError(f"damaged or made to exhaust memory (slot {argument}); not loaded")
        if code.name in ("INT", "LONG", "LONG1", "LONG4") and int(argument).bit_length() > 8 * MAX_INT_BYTES:
            raise UserError("holds a whole number of more than 64 bits, which no index or list of predictions does")
    return end


def _instructions(content: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    try:
        yield from pickletools.genops(content)
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"not a pickle, or cut off ({_first_line(error)}); copy or download it again") from error


def _refuse(code: str, argument: Any, names: list[str]) -> NoReturn:
    asked = str(argument) if code in ("GLOBAL", "INST") else " ".join(names) if code == "STACK_GLOBAL" else ""
    what = f"asks for {_shown(asked)}" if asked else f"holds an instruction {code}"
    raise UserError(
        f"{what}: more than plain lists, strings and numbers, so it was not loaded and nothing in it was run"
    )


def _shown(name: str) -> str:
    text = ".".join(name.split(" ", 1))
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__


# ---------------------------------------------------------------------------------------------- afterwards


def _require_plain(value: Any) -> None:
    """Raise UserError where something else is left (a class that was named and not used), where a container holds
    itself, and where shared parts make the whole larger than the file could hold written out."""
    sizes: dict[int, int] = {}  # written out; 0 while a container's contents are being counted
    waiting = [value]
    while waiting:
        item = waiting[-1]
        if sizes.get(id(item)):
            waiting.pop()
            continue
        inner = _inner(item)
        if id(item) not in sizes:
            sizes[id(item)] = 0
            for part in inner:
                if sizes.get(id(part)) == 0:
                    raise UserError("a list in it holds itself; not an index or a list of predictions")
            waiting += (part for part in inner if id(part) not in sizes)
            continue
        waiting.pop()
        sizes[id(item)] = 1 + _length(item) + sum(sizes[id(part)] for part in inner)
        if sizes[id(item)] > MAX_VALUES:
            raise UserError(
                "repeats parts of itself into more values than any index or list of predictions; not loaded"
            )


def _inner(item: Any) -> list[Any]:
    """The containers directly inside. Raises UserError for anything that is neither container nor plain."""
    if type(item) not in (list, tuple, dict):
        if type(item) in _SCALARS:
            return []
        raise UserError("holds something that is not a list, string or number")
    parts: Any = [*item.keys(), *item.values()] if type(item) is dict else item
    found = []
    for part in parts:
        if type(part) not in _SCALARS:
            if type(part) not in (list, tuple, dict):
                raise UserError("holds something that is not a list, string or number")
            found.append(part)
    return found


def _length(item: Any) -> int:
    return len(item) if type(item) in (list, tuple, dict) else 0


# ---------------------------------------------------------------------------------------------- the reader


class _Reader(pickle.Unpickler):
    """An unpickler for which there are no classes but the given ones."""

    def __init__(self, content: bytes, classes: dict[str, Any], storage: Any = None) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._classes, self._storage = classes, storage

    def find_class(self, module: str, name: str) -> Any:
        found = self._classes.get(f"{module} {name}")
        if found is None:
            _refuse("GLOBAL", f"{module} {name}", [])
        return found

    def persistent_load(self, reference: Any) -> Any:
        if self._storage is None:
            raise UserError("refers to something outside the file")
        return self._storage(reference)


class _Rebuilder:
    """A function that a pickle may call, and do nothing else with: no attribute of it can be set."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setstate__(self, state: Any) -> NoReturn:
        raise UserError("sets what must not be set; not loaded")


class _Budget:
    """Bytes that rebuilding may still make: a file can name one part of itself a thousand times."""

    def __init__(self, left: int) -> None:
        self._left = left

    def spend(self, count: int) -> None:
        """Raise UserError when more is made than a file of that length explains."""
        self._left -= count
        if self._left < 0:
            raise UserError("makes far more numbers than its length explains; not loaded")


class _NumberType(_Rebuilder):
    """A type of numbers as NumPy spells it; called with a flat list it is PyTorch's older storage of that type."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        super().__init__(self._storage)
        self.kind = kind

    def _storage(self, values: Any) -> np.ndarray:
        flat = type(values) in (list, tuple) and len(values) <= MAX_TENSOR_VALUES
        if not (flat and all(type(value) in (int, float, bool) for value in values)):
            _no_number()
        return np.array(values, dtype=self.kind)


class _DType(_NumberType):
    """`numpy.dtype("f8", ...)`: its state holds the byte order."""

    def __setstate__(self, state: Any) -> None:  # type: ignore[override]
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|")):
            raise UserError("holds an unknown type of NumPy")
        self.kind = f"{state[1]}{self.kind}"


_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
_DTYPES = _names("f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1")
_SPARE_BYTES = 1 << 20
_STORAGE_HEADER_BYTES = 4096  # far more than the three pickles before the numbers take
# What `torch.save` of the older format starts with: a number, and the version of the format.
_STORAGE_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


def _classes(budget: _Budget) -> dict[str, Any]:
    """By module and name, what a pickle with single numbers of PyTorch and NumPy asks for."""
    found: dict[str, Any] = {
        "torch._utils _rebuild_tensor": _Rebuilder(partial(_tensor, budget)),
        "torch._utils _rebuild_tensor_v2": _Rebuilder(partial(_tensor, budget)),
        "torch.storage _load_from_bytes": _Rebuilder(partial(_storage_from_bytes, budget)),
        "collections OrderedDict": _Rebuilder(_no_hooks),
        "_codecs encode": _Rebuilder(partial(_latin1, budget)),
        "numpy dtype": _Rebuilder(_dtype),
        "numpy.core.multiarray scalar": _Rebuilder(_numpy_scalar),
        "numpy._core.multiarray scalar": _Rebuilder(_numpy_scalar),
    }
    return found | _storage_types()


def _storage_types() -> dict[str, Any]:
    return {
        f"{place} {name}": _NumberType(kind) for place in ("torch", "torch.cuda") for name, kind in _STORAGES.items()
    }


def _no_hooks(*entries: Any) -> dict[Any, Any]:
    """A tensor's backward hooks: none."""
    if entries not in ((), ([],)):
        raise UserError("holds a tensor with hooks; not loaded")
    return {}


def _latin1(budget: _Budget, text: Any, encoding: Any) -> bytes:
    """How bytes are written below protocol 3."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UserError("holds bytes in an unknown spelling")
    budget.spend(len(text))
    return text.encode("latin1")


def _bytes(data: Any) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data) if isinstance(data, bytes) else _no_number()


def _no_number() -> NoReturn:
    raise UserError("holds a damaged number of PyTorch or NumPy")


def _dtype(name: Any, *_: Any) -> _DType:
    if name not in _DTYPES:
        raise UserError(f"holds numbers of the unknown type {str(name)[:20]!r}")
    return _DType(name)


def _numpy_scalar(kind: Any, data: Any) -> int | float | bool:
    if not isinstance(kind, _DType):
        _no_number()
    return _numbers(_bytes(data), kind.kind, 1)[0].item()


def _numbers(data: bytes, kind: str, count: int) -> np.ndarray:
    dtype = np.dtype(kind)
    if len(data) != count * dtype.itemsize:
        _no_number()
    return np.frombuffer(data, dtype=dtype)


def _storage_from_bytes(budget: _Budget, data: Any) -> np.ndarray:
    """The numbers (N,) of a storage as PyTorch writes it into a pickle: a file of the older format.

    That is the start, three pickles (the machine, the storage's type and length, its key) and the numbers.
    """
    budget.spend(len(data) if isinstance(data, str | bytes) else 0)
    content = _bytes(data)
    if not content.startswith(_STORAGE_START):
        raise UserError("holds a tensor in an unknown format")
    at = len(_STORAGE_START)
    kinds: list[tuple[str, int]] = []
    for allowed, classes in (
        (_PLAIN, {}),
        (_PLAIN | {"GLOBAL", "BINPERSID"}, _storage_types()),
        (_PLAIN, {}),
    ):
        part = content[at : at + _STORAGE_HEADER_BYTES]
        at += _scan(part, allowed)
        _Reader(part, classes, lambda reference: kinds.append(_storage_kind(reference))).load()
    if len(kinds) != 1:
        _no_number()
    kind, count = kinds[0]
    if content[at : at + 8] != struct.pack("<q", count):
        _no_number()
    return _numbers(content[at + 8 :], kind, count)


def _storage_kind(reference: Any) -> tuple[str, int]:
    """Type and length from ("storage", type, key, device, length, view)."""
    if not (isinstance(reference, tuple) and len(reference) in (5, 6) and reference[0] == "storage"):
        _no_number()
    kind, count = reference[1], reference[4]
    if not isinstance(kind, _NumberType) or type(count) is not int or reference[5:] not in ((), (None,)):
        _no_number()
    return kind.kind, count


def _tensor(budget: _Budget, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    """The number, or list of numbers, that a tensor of no or one dimension holds."""
    whole = all(type(part) is tuple and all(type(n) is int for n in part) for part in (size, stride))
    if not (isinstance(storage, np.ndarray) and whole and type(offset) is int and len(size) == len(stride)):
        _no_number()
    if len(size) > 1 or math.prod(size) > MAX_TENSOR_VALUES:
        raise UserError("holds whole tensors; only single numbers and rows of them are read")
    steps, step = (size[0], stride[0]) if size else (1, 1)
    last = offset + (steps - 1) * step
    if steps < 0 or step < 0 or offset < 0 or (steps and last >= len(storage)):
        _no_number()
    if not steps:
        return []
    budget.spend(8 * steps)
    values = storage[offset : last + 1 : step].tolist() if step else [storage[offset].item()] * steps
    return values if size else values[0]
