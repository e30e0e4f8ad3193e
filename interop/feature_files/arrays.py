"""Read the arrays in a file of another program: NumPy, PyTorch, pickle or HDF5. Nothing in a file is executed.

Every reader gives named arrays, of which `Content` chooses the features and, if the file has them, labels. A file that
claims to hold more than is stored in it is refused before its values are read.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, listed, one_line
from engine.safe_pickle import load_arrays

Named = Mapping[str, Any]  # arrays by name: NumPy arrays, memory maps or HDF5 data sets
MAX_BYTES = 16 << 30
# Features hardly compress. The bound allows arrays of zeros, and keeps a small file from expanding without limit.
MOST_COMPRESSED, SPARE_BYTES = 200, 64 << 20
MAX_MEMBERS = 1000
MAX_CHUNK_BYTES = 256 << 20
FEATURE_NAME = "features"
PHASE_NAMES = ("phase", "phases", "labels", "label")
TECNO = ("stem features", "phase logits", "labels")  # the three arrays in a pickle of TeCNO, in this order
_FILTERS = frozenset(
    {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
)


@dataclass(frozen=True, eq=False)
class Content:
    """What a file of features holds: `features` of two dimensions, and perhaps labels.

    `labels` has one dimension, with a number per frame; `names` says which phase each number means if the file does.
    `tools` is (T, K).
    """

    path: Path
    format: str
    features: Any  # an array, a memory map or an HDF5 data set
    labels: NDArray[Any] | None = None
    tools: NDArray[Any] | None = None
    names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the features, either (T, D) or (D, T)."""
        rows, columns = self.features.shape
        return int(rows), int(columns)

    def frames(self, layout: str, frames: slice) -> NDArray[Any]:
        """Return some frames' features (N, D); `layout` is `TD` or `DT`. Raises UserError if the file is damaged."""
        with _readable(self.path, self.format):
            values = self.features[frames] if layout == "TD" else self.features[:, frames].T
            return np.ascontiguousarray(values)


@contextmanager
def open_features(path: Path, format: str, key: str | None = None, rows: slice | None = None) -> Iterator[Content]:
    """Yield what a file of features in one of `FORMATS` holds; it is closed afterwards.

    `rows` are those of one video in a file of several. `key` names the array with the features, or else it is the one
    called `features` or the only one with two dimensions of real numbers. Raises UserError naming the file if it is
    missing, unreadable or damaged, if it holds objects, or if the features cannot be told from other arrays.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with ExitStack() as stack:
        with _readable(path, format):
            content = _content(stack.enter_context(FORMATS[format](path)), path, format, key)
        yield content if rows is None else replace(content, features=content.features[rows])


@contextmanager
def _readable(path: Path, format: str) -> Iterator[None]:
    """Turn every exception of the body, which reads a file, into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RecursionError) as error:
        raise UserError(f"{path}: too large or too deeply nested to load") from error
    except Exception as error:  # libraries raise exceptions of many types on damaged files
        raise UserError(f"{path}: damaged, or not {_WORDS[format]} ({one_line(error)})") from error


_WORDS = {
    "tecno": "a pickle of TeCNO",
    "lfb": "a pickle of Trans-SVNet",
    "npy": "a NumPy file",
    "npz": "a NumPy archive",
    "pt": "a tensor file of PyTorch",
    "h5": "an HDF5 file",
}


def _content(arrays: Named, path: Path, format: str, key: str | None) -> Content:
    if key is not None and format in ("tecno", "lfb", "npy"):
        raise UserError(f"--key: the arrays in {path.name} have no names; leave it out")
    if format == "tecno":
        return Content(path, format, arrays[TECNO[0]], np.asarray(arrays[TECNO[2]]))
    chosen = _features_name(arrays, path, key)
    others = {name: array for name, array in arrays.items() if name != chosen}
    length = set(arrays[chosen].shape)
    labels = next((others[name] for name in PHASE_NAMES if _is_numbers(others.get(name), 1)), None)
    tools = others.get("tools")
    tools = np.asarray(tools) if _is_numbers(tools, 2) and tools is not None and len(tools) in length else None
    names = others.get("phase_names")
    known = tuple(map(str, names[:128])) if names is not None and names.ndim == 1 and names.dtype.kind == "U" else ()
    return Content(path, format, arrays[chosen], None if labels is None else np.asarray(labels), tools, known)


def _is_numbers(array: Any, dimensions: int, kinds: str = "iufb") -> bool:
    return array is not None and array.ndim == dimensions and array.dtype.kind in kinds


def _features_name(arrays: Named, path: Path, key: str | None) -> str:
    """The name of the array with the features. Raises UserError listing the arrays if it cannot be told."""
    shapes = [
        f"{name[:60] or 'the array'} {'x'.join(map(str, array.shape))} {one_line(str(array.dtype), 20)}"
        for name, array in arrays.items()
    ]
    held = f"holds {listed(shapes, 6)}" if shapes else "holds no arrays"
    if key is not None:
        if not _is_numbers(arrays.get(key), 2, "f"):
            raise UserError(f"{path}: {held}; --key {key} names no array of two dimensions of real numbers")
        return key
    fitting = [name for name, array in arrays.items() if _is_numbers(array, 2, "f")]
    if FEATURE_NAME in fitting:
        return FEATURE_NAME
    if len(fitting) != 1:
        what = "choose the features with --key NAME" if fitting else "features are real numbers, (T, D) or (D, T)"
        raise UserError(f"{path}: {held}; {what}")
    return fitting[0]


# ---------------------------------------------------------------------------------------------- NumPy


@contextmanager
def _numpy_array(path: Path) -> Iterator[Named]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f"{path}: a NumPy archive, not an array; rename it to .npz")
    yield {"": array}


@contextmanager
def _numpy_archive(path: Path) -> Iterator[Named]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        most = min(MAX_BYTES, SPARE_BYTES + MOST_COMPRESSED * path.stat().st_size)
        if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > most:
            raise UserError(f"{path}: claims to hold far more than its size explains; not read")
        yield {
            member.filename.removesuffix(".npy"): _numpy_member(archive, member, path)
            for member in members
            if member.filename.endswith(".npy")
        }


def _numpy_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> NDArray[Any]:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        if dtype.hasobject:
            raise UserError(f"{path}: {member.filename[:60]} holds Python objects, which are not loaded")
        if math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
            raise UserError(f"{path}: {member.filename[:60]} does not have the size that its header claims")
    with archive.open(member) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return array


# ---------------------------------------------------------------------------------------------- PyTorch and pickles


@contextmanager
def _torch_file(path: Path) -> Iterator[Named]:
    """The tensors in a file of `torch.save`: one tensor, or a list or dictionary of some."""
    from engine.checkpoints import load_external_content

    try:
        content = load_external_content(path)
    except UserError as error:
        if "numpy" not in str(error):
            raise
        raise UserError(
            f"{path}: holds a NumPy array in a pickle, which could run code, so nothing was loaded; convert it where "
            "it was made: numpy.save('a.npy', torch.load('a.pt', weights_only=False)), and import the .npy files"
        ) from error
    yield _by_name(content, path, lambda value: _from_tensor(value, path))


def _from_tensor(value: Any, path: Path) -> NDArray[Any] | None:
    import torch

    if not isinstance(value, torch.Tensor):
        return None
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise UserError(f"{path}: holds a tensor of an unusual kind (sparse, quantised, or without values)")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{path}: a tensor claims to be larger than what is stored; not read")
    value = value.detach()
    array: NDArray[Any] = (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    return array


@contextmanager
def _pickle_file(path: Path) -> Iterator[Named]:
    """The arrays that TeCNO pickles for one video."""
    content = load_arrays(path)
    arrays = content if isinstance(content, list) else []
    if isinstance(content, np.ndarray):
        raise UserError(
            f"{path}: one array {'x'.join(map(str, content.shape))}, not a list of three as TeCNO writes; if it holds "
            "all videos of a part one after the other, import its folder with --format transsvnet"
        )
    shapes = [array.shape if isinstance(array, np.ndarray) else None for array in arrays]
    if [shape and len(shape) for shape in shapes] != [2, 2, 1] or len({shape[0] for shape in shapes if shape}) != 1:
        raise UserError(f"{path}: not a pickle of TeCNO: a list of stem features (T, D), logits (T, C) and labels (T,)")
    yield dict(zip(TECNO, arrays, strict=True))


@contextmanager
def _concatenated_file(path: Path) -> Iterator[Named]:
    """The array that Trans-SVNet pickles for all videos of a part, one after the other."""
    state = path.stat()
    yield {"": _one_array(path, state.st_size, state.st_mtime_ns)}


@lru_cache(maxsize=1)  # which is read for one video after the other
def _one_array(path: Path, size_bytes: int, modified_ns: int) -> NDArray[Any]:
    content = load_arrays(path)
    if not isinstance(content, np.ndarray):
        raise UserError(f"{path}: not a pickle of Trans-SVNet: one array (N, D) for all videos of a part")
    return content


def _by_name(content: Any, path: Path, convert: Callable[[Any], NDArray[Any] | None]) -> Named:
    items: list[tuple[str, Any]] = [("", content)]
    if isinstance(content, dict | list | tuple):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        items = [(str(name), value) for name, value in pairs]
    if len(items) > MAX_MEMBERS:
        raise UserError(f"{path}: holds {len(items):,} values instead of features")
    return {name: array for name, value in items if (array := convert(value)) is not None}


# ---------------------------------------------------------------------------------------------- HDF5


@contextmanager
def _hdf5_file(path: Path) -> Iterator[Named]:
    """The data sets directly in the root of an HDF5 file that are stored in this very file."""
    with h5py.File(path, "r", locking=False) as file:
        names = [name for name, _ in zip(file, range(MAX_MEMBERS), strict=False)]
        links = {name: file.get(name, getlink=True) for name in names}
        named = {name: file[name] for name, link in links.items() if isinstance(link, h5py.HardLink)}
        datasets = {name: found for name, found in named.items() if isinstance(found, h5py.Dataset)}
        for name in (FEATURE_NAME, *PHASE_NAMES):
            if name in links and name not in datasets:
                raise UserError(f"{path}: {name} is a link or a group; write it as a data set into this file")
        for name, found in datasets.items():
            _require_stored_here(found, name, path)
        yield datasets


def _require_stored_here(found: h5py.Dataset, name: str, path: Path) -> None:
    """Raise UserError unless a data set is stored in its file, in a known form, and is not larger than it can be."""
    creation = found.id.get_create_plist()
    filters = {creation.get_filter(number)[0] for number in range(creation.get_nfilters())}
    if creation.get_external_count() or found.is_virtual:
        raise UserError(f"{path}: {name!r} is stored in another file; write it into this one")
    if not filters <= _FILTERS:
        raise UserError(f"{path}: {name!r} is compressed by a plug-in; write it with gzip, lzf or without compression")
    stored = found.id.get_storage_size()
    factor = MOST_COMPRESSED if filters - {h5py.h5z.FILTER_FLETCHER32} else 1
    most = min(MAX_BYTES, SPARE_BYTES + factor * stored)  # parts that were never written are not stored
    chunk = math.prod(found.chunks) * found.dtype.itemsize if found.chunks else 0
    if found.nbytes > most or chunk > MAX_CHUNK_BYTES or stored > path.stat().st_size:
        raise UserError(f"{path}: {name!r} claims to be larger than what is stored; not read")


Reader = Callable[[Path], AbstractContextManager[Named]]
FORMATS: Mapping[str, Reader] = {
    "tecno": _pickle_file,
    "lfb": _concatenated_file,
    "npy": _numpy_array,
    "npz": _numpy_archive,
    "pt": _torch_file,
    "h5": _hdf5_file,
}
SUFFIXES: Mapping[str, Sequence[str]] = {
    "tecno": (".pkl", ".pickle"),
    "npy": (".npy",),
    "npz": (".npz",),
    "pt": (".pt", ".pth"),
    "h5": (".h5", ".hdf5"),
}
