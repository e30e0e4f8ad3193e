"""Read pickles of unknown origin without executing them.

A pickle is a program for a small stack machine, and Python's `pickle.load` executes it. Here the instructions are first
read without executing them: only those that build lists, tuples, dictionaries, strings and numbers are allowed, and
their number is limited. Only then is the file unpickled, by an `Unpickler` that knows no classes. With `tensors`, it
knows the few names under which single numbers of PyTorch and NumPy are stored, and `load_arrays` those of whole NumPy
arrays. Code in this file rebuilds numbers and arrays from their bytes; no function that a file names is called.

An `Unpickler` with its own `find_class` would keep code out, but not files made to exhaust memory: it does not see memo
slots, declared lengths, nested tuples as dictionary keys, or shared parts. `torch.load(weights_only=True)` allows
numbers, but has no limits.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from configs.errors import UserError, one_line
from engine.files import read_bounded
from engine.sniff import HEAD_BYTES, PICKLE, recognise_start

MAX_FILE_BYTES = 512 << 20
MAX_ARRAYS_BYTES = 4 << 30  # 2048 values of float32 per frame, at 25 fps: five hours; loading takes three times that
MAX_INSTRUCTIONS = 16_000_000  # five times an index of all of Cholec80 at one frame per second
MAX_CONTAINERS = 4_000_000
MAX_VALUES = 16_000_000  # shared parts are counted at each reference
MAX_INT_BYTES = 8
# Tuples can be dictionary keys, and hashing deeply nested tuples exhausts the interpreter's stack.
MAX_TUPLES_BESIDE_KEYS = 1000
MAX_TENSOR_VALUES = 1024  # the tensor of one prediction holds one number, or one row of logits


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
_SCALARS: frozenset[type] = frozenset({str, int, float, bool, bytes, type(None)})


def load_plain(path: Path, *, tensors: bool = False) -> Any:
    """The lists, tuples, dictionaries, strings and numbers in a pickle of any protocol, including those of Python 2.

    With `tensors`, single numbers of PyTorch and NumPy are returned as numbers, and short rows of them as lists.
    Nothing in the file is executed. Raises UserError if the file is missing, unreadable, not a pickle or cut off, if it
    contains anything else, or if it exceeds the limits of this module.
    """
    content = _pickle_content(path, MAX_FILE_BYTES)
    with _one_line_errors(path):
        _scan(content, _PLAIN | _REBUILDING if tensors else _PLAIN)
        value = _Reader(content, _classes(_Budget(4 * len(content) + _SPARE_BYTES)) if tensors else {}).load()
        _expanded_size(value, {})
    return value


def load_arrays(path: Path) -> Any:
    """What `load_plain` reads with `tensors`, with NumPy arrays as well, which cannot be written to.

    Arrays may be the whole content, or entries of a list, tuple or dictionary. Raises UserError as `load_plain` does,
    and for arrays of other things than numbers.
    """
    content = _pickle_content(path, MAX_ARRAYS_BYTES)
    with _one_line_errors(path):
        _scan(content, _PLAIN | _REBUILDING | {"BYTEARRAY8"})
        budget = _Budget(4 * len(content) + _SPARE_BYTES)
        value = _with_arrays(_Reader(content, _classes(budget) | _array_classes()).load())
        _expanded_size(value, {}, leaves=_SCALARS | {np.ndarray})
    return value


def _pickle_content(path: Path, most_bytes: int) -> bytes:
    size = path.stat().st_size if path.is_file() else 0
    if size > most_bytes:
        raise UserError(f"{path}: larger than {most_bytes:,} bytes, the limit for such files; choose another")
    content = read_bounded(path, min(most_bytes, size + 1))  # reading allocates all that it may read
    if (what := recognise_start(content[:HEAD_BYTES]) if content else "an empty file") not in (None, PICKLE):
        raise UserError(f"{path}: not a pickle but {what}")
    return content


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turn every exception of the body into a UserError that names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (MemoryError, RecursionError) as error:
        raise UserError(f"{path}: too large or too deeply nested to load") from error
    except Exception as error:  # the unpickler raises exceptions of many types on damaged files
        raise UserError(f"{path}: damaged pickle ({one_line(error)}); copy or download it again") from error


# ---------------------------------------------------------------------------------------------- before unpickling


def _scan(content: bytes, allowed: frozenset[str]) -> int:
    """Read a pickle's instructions without executing them; returns its length in bytes.

    Raises UserError at the first instruction that is not in `allowed`, and if executing them would take more memory
    than the length of the pickle explains.
    """
    count = containers = tuples = end = 0
    names: list[str] = ["?", "?"]  # the last two strings: module and name for STACK_GLOBAL
    instructions: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(content)
    while True:
        try:
            code, argument, place = next(instructions)
        except StopIteration:
            return end
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            raise UserError(f"not a pickle, or cut off ({one_line(error)}); copy or download it again") from error
        count, end = count + 1, (place or 0) + 1
        if code.name in _STRINGS:
            names = [names[1], str(argument)]
        if code.name not in allowed:
            _refuse(code.name, argument, names)
        containers += code.name in _CONTAINERS
        tuples += code.name.startswith("TUPLE")
        if code.name in _KEYS and tuples > MAX_TUPLES_BESIDE_KEYS:
            raise UserError("contains dictionaries after more tuples than any such file has; not loaded")
        if count > MAX_INSTRUCTIONS or containers > MAX_CONTAINERS:
            raise UserError("contains more values than any index or list of predictions; not loaded")
        if code.name in ("PUT", "LONG_BINPUT") and not 0 <= argument <= 4 * count + 1024:
            raise UserError(f"damaged or made to exhaust memory (slot {argument}); not loaded")
        if code.name in ("INT", "LONG", "LONG1", "LONG4") and int(argument).bit_length() > 8 * MAX_INT_BYTES:
            raise UserError("contains an integer of more than 64 bits, which no index or list of predictions does")


def _refuse(code: str, argument: Any, names: list[str]) -> NoReturn:
    asked = str(argument) if code in ("GLOBAL", "INST") else " ".join(names) if code == "STACK_GLOBAL" else ""
    what = f"refers to {_shown(asked)}" if asked else f"contains the instruction {code}"
    raise UserError(f"{what}: more than lists, strings and numbers, so it was not loaded and nothing in it was run")


def _shown(name: str) -> str:
    text = ".".join(name.split(" ", 1))
    return repr(text if len(text) <= 80 else text[:77] + "...")


# ---------------------------------------------------------------------------------------------- after unpickling


def _expanded_size(value: Any, sizes: dict[int, int], leaves: frozenset[type] = _SCALARS) -> int:
    """The number of values in a container; a part to which several references exist is counted at each of them.

    `sizes` holds the sizes of the containers counted so far; a container has size 0 while it is being counted. Raises
    UserError if a part is neither a container nor one of `leaves` (it may be a class that is named but never called),
    if a container contains itself, or if there are more than MAX_VALUES values.
    """
    if type(value) in leaves:
        return 1
    if type(value) not in (list, tuple, dict):
        raise UserError("contains something that is not a list, string or number")
    if id(value) in sizes:
        if not sizes[id(value)]:
            raise UserError("contains a list that contains itself; not an index or a list of predictions")
        return sizes[id(value)]
    sizes[id(value)], size = 0, 1
    for part in (*value, *value.values()) if isinstance(value, dict) else value:
        size += 1 if type(part) in leaves else _expanded_size(part, sizes, leaves)
    if size > MAX_VALUES:
        raise UserError("repeats parts of itself into more values than any index or list of predictions; not loaded")
    sizes[id(value)] = size
    return size


# ---------------------------------------------------------------------------------------------- the unpickler


class _Reader(pickle.Unpickler):
    """An unpickler that knows the given classes and no others."""

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
    """A function that a pickle may call but not modify: its attributes cannot be set."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise UserError("sets attributes of a function; not loaded")


class _NumberType(_Rebuilder):
    """A numeric type, identified by its NumPy name; called with a list, it rebuilds a legacy storage of PyTorch."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        super().__init__(self._storage)
        self.kind = kind

    def _storage(self, values: Any) -> np.ndarray:
        flat = type(values) in (list, tuple) and len(values) <= MAX_TENSOR_VALUES
        if not (flat and all(type(value) in (int, float, bool) for value in values)):
            _damaged()
        return np.array(values, dtype=self.kind)


class _DType(_NumberType):
    """What `numpy.dtype("f8", ...)` in a pickle is rebuilt as; its state contains the byte order."""

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|")):
            raise UserError("contains an unknown type of NumPy")
        self.kind = f"{state[1]}{self.kind}"


class _Budget:
    """The number of bytes that rebuilding may still allocate.

    It is limited because a pickle can refer to the same part of itself a thousand times.
    """

    def __init__(self, left: int) -> None:
        self._left = left

    def spend(self, count: int) -> None:
        """Raise UserError once more is allocated than the length of the pickle explains."""
        self._left -= count
        if self._left < 0:
            raise UserError("expands to far more numbers than its length explains; not loaded")


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
_STORAGE_HEADER_BYTES = 4096  # the three pickles before the numbers are far shorter
# The start of a file of `torch.save` in its legacy format: a magic number, and the version of the format.
_STORAGE_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


def _classes(budget: _Budget) -> dict[str, Any]:
    """Everything to which a pickle with single numbers of PyTorch and NumPy may refer, by "module name"."""
    functions: dict[str, Callable[..., Any]] = {
        "torch._utils _rebuild_tensor": partial(_tensor, budget),
        "torch._utils _rebuild_tensor_v2": partial(_tensor, budget),
        "torch.storage _load_from_bytes": partial(_storage_from_bytes, budget),
        "collections OrderedDict": _no_hooks,
        "_codecs encode": partial(_latin1, budget),
        "numpy dtype": _dtype,
        "numpy.core.multiarray scalar": _numpy_scalar,
        "numpy._core.multiarray scalar": _numpy_scalar,
    }
    return {name: _Rebuilder(build) for name, build in functions.items()} | _storage_types()


def _storage_types() -> dict[str, Any]:
    return {
        f"{place} {name}": _NumberType(kind) for place in ("torch", "torch.cuda") for name, kind in _STORAGES.items()
    }


def _no_hooks(*entries: Any) -> dict[Any, Any]:
    """The backward hooks of a tensor, which must be empty."""
    if entries not in ((), ([],)):
        raise UserError("contains a tensor with hooks; not loaded")
    return {}


def _latin1(budget: _Budget, text: Any, encoding: Any) -> bytes:
    """The bytes in a string: protocols 0 to 2 store bytes as text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UserError("contains bytes in an unknown encoding")
    budget.spend(len(text))
    return text.encode("latin1")


def _bytes(data: Any) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data) if isinstance(data, bytes) else _damaged()


def _damaged() -> NoReturn:
    raise UserError("contains a damaged number of PyTorch or NumPy")


def _dtype(name: Any, *_: Any) -> _DType:
    if name not in _DTYPES:
        raise UserError(f"contains numbers of the unknown type {str(name)[:20]!r}")
    return _DType(name)


def _numpy_scalar(kind: Any, data: Any) -> int | float | bool:
    if not isinstance(kind, _DType):
        _damaged()
    return _numbers(_bytes(data), kind.kind, 1)[0].item()


def _numbers(data: bytes, kind: str, count: int) -> np.ndarray:
    dtype = np.dtype(kind)
    if len(data) != count * dtype.itemsize:
        _damaged()
    return np.frombuffer(data, dtype=dtype)


def _storage_from_bytes(budget: _Budget, data: Any) -> np.ndarray:
    """The numbers (N,) of a storage that PyTorch has embedded in a pickle as a file in its legacy format.

    Such a file consists of a fixed start, three pickles (about the machine; with the type and length of the storage;
    with its key) and the numbers.
    """
    budget.spend(len(data) if isinstance(data, str | bytes) else 0)
    content = _bytes(data)
    if not content.startswith(_STORAGE_START):
        raise UserError("contains a tensor in an unknown format")
    at = len(_STORAGE_START)
    kinds: list[tuple[str, int]] = []
    of_storage = _PLAIN | {"GLOBAL", "BINPERSID"}, _storage_types()
    for allowed, classes in ((_PLAIN, {}), of_storage, (_PLAIN, {})):
        part = content[at : at + _STORAGE_HEADER_BYTES]
        at += _scan(part, allowed)
        _Reader(part, classes, lambda reference: kinds.append(_storage_kind(reference))).load()
    if len(kinds) != 1:
        _damaged()
    kind, count = kinds[0]
    if content[at : at + 8] != struct.pack("<q", count):
        _damaged()
    return _numbers(content[at + 8 :], kind, count)


def _storage_kind(reference: Any) -> tuple[str, int]:
    """The type and length of a storage, taken from ("storage", type, key, device, length, view)."""
    if not (isinstance(reference, tuple) and len(reference) in (5, 6) and reference[0] == "storage"):
        _damaged()
    kind, count = reference[1], reference[4]
    if not isinstance(kind, _NumberType) or type(count) is not int or reference[5:] not in ((), (None,)):
        _damaged()
    return kind.kind, count


def _tensor(budget: _Budget, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    """The number in a tensor without dimensions, or the list of numbers in a tensor of one dimension."""
    whole = all(type(part) is tuple and all(type(n) is int for n in part) for part in (size, stride))
    if not (isinstance(storage, np.ndarray) and whole and type(offset) is int and len(size) == len(stride)):
        _damaged()
    if len(size) > 1 or math.prod(size) > MAX_TENSOR_VALUES:
        raise UserError("contains whole tensors; only single numbers and rows of them are read")
    count, step = (size[0], stride[0]) if size else (1, 1)
    if min(count, step, offset) < 0 or (count and offset + (count - 1) * step >= len(storage)):
        _damaged()
    budget.spend(8 * count)
    values = [storage[offset + place * step].item() for place in range(count)]
    return values if size else values[0]


# ---------------------------------------------------------------------------------------------- arrays


class _Array:
    """A NumPy array that is being rebuilt: its state is a version, its shape, its type, its order and its bytes."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            _damaged()
        _, shape, dtype, fortran, data = state
        self.values = _shaped(_bytes(data), dtype, shape, "F" if fortran else "C")


_NDARRAY = _Rebuilder(lambda *_: _damaged())  # the class, which files name as an argument only


def _array_classes() -> dict[str, Any]:
    """What a pickle with NumPy arrays may refer to, by "module name": protocol 5 has another way than those before."""
    functions: dict[str, Callable[..., Any]] = {"__builtin__ bytes": lambda: b""}  # of an empty array
    for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        functions[f"{core}.multiarray _reconstruct"] = _empty_array
        functions[f"{core}.numeric _frombuffer"] = _array_from_buffer
    return {name: _Rebuilder(build) for name, build in functions.items()} | {"numpy ndarray": _NDARRAY}


def _empty_array(kind: Any, *_: Any) -> _Array:
    if kind is not _NDARRAY:
        raise UserError("contains a kind of NumPy array that only the program that wrote it can read")
    return _Array()


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.values = _shaped(bytes(data) if isinstance(data, bytearray) else data, dtype, shape, order)
    return array


def _shaped(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    whole = type(shape) is tuple and len(shape) <= 8 and all(type(size) is int and size >= 0 for size in shape)
    if not (whole and isinstance(data, bytes) and isinstance(dtype, _DType) and order in ("C", "F")):
        _damaged()
    return _numbers(data, dtype.kind, math.prod(shape)).reshape(shape, order=order)


def _with_arrays(value: Any) -> Any:
    """The value with the finished arrays in place of those that were being rebuilt, at its top two levels."""
    if isinstance(value, _Array):
        return _damaged() if value.values is None else value.values
    if isinstance(value, (list, tuple)):
        return [_with_arrays(part) if isinstance(part, _Array) else part for part in value]
    if isinstance(value, dict):
        return {key: _with_arrays(part) if isinstance(part, _Array) else part for key, part in value.items()}
    return value
