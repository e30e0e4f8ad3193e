"""The feature store: one HDF5 file a video, and a folder name that says exactly which encoder made it.

A folder `<store>/<encoder>-<digest12>/` holds `videoNN.h5` files and the `index.json` they were made from; it is all
that stage two needs; `videoNN.left_out.json` says why a video has no features. Nothing here imports torch, an image
library or a decoder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from engine.files import (
    as_user_error,
    atomic_path,
    read_json_object,
    remove_stale_temporaries,
    require_free_bytes,
    sha256_json,
    write_json,
)
from engine.runs import package_version
from features.hdf5 import USER_BLOCK_BYTES, Hdf5Sink, broken_seal, holds_itself, seal
from features.ids import file_stem, id_of_stem

SCHEMA_VERSION = 1
CHUNK_FRAMES = 256
INDEX_FILE = "index.json"
ENCODER_FILE = "encoder.json"
# A damaged file may claim any shape; nothing larger than this is allocated for one data set.
MAX_DATASET_BYTES = 16 << 30
MAX_ATTRIBUTE_BYTES = 1 << 16


class FeatureFileError(UserError):
    """A feature file that is missing, cut short, damaged, of another schema or of another encoder."""


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that changes a video's features besides its pixels.

    `weights_sha256` is over the encoder's tensors, head included. `preprocess` is the whole preprocessing as JSON, crop
    included. `arithmetic` says how the net is computed in that precision: `folded` (no batch norm left, weights in the
    precision too) or `plain` (as it was trained, under autocast), and whether fused (ReLU) or compiled. The reader is
    not part of it: readers are bit-identical. Nor are device and `extract.batch_frames`: they change how sums are
    rounded, and nothing else.
    """

    backbone: str
    weights_sha256: str
    preprocess: Mapping[str, Any]
    fps: float
    precision: str
    storage: str
    embedding_dim: int
    arithmetic: str = "plain"

    def to_json(self) -> dict[str, Any]:
        """The spec as plain values, with the schema version that reads it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "backbone": self.backbone,
            "weights_sha256": self.weights_sha256,
            "preprocess": dict(self.preprocess),
            "fps": self.fps,
            "precision": self.precision,
            "storage": self.storage,
            "embedding_dim": self.embedding_dim,
            "arithmetic": self.arithmetic,
        }

    @property
    def digest(self) -> str:
        """SHA-256 over the whole spec."""
        return sha256_json(self.to_json())

    @property
    def folder_name(self) -> str:
        """`<backbone>-<first 12 digits of the digest>`."""
        return f"{self.backbone}-{self.digest[:12]}"


@dataclass(frozen=True)
class SourceIdentity:
    """The video a feature file was made from; decides whether a file is still the right one."""

    video_id: str
    sha256_ends: str
    size_bytes: int
    fps: float


@dataclass
class VideoFeatures:
    """One video's features and labels. -1 in `phase` and `tools` means no label; NaN in `tool_logits`, no tool head."""

    features: NDArray[Any]  # (T, D) float16 or float32
    frame_index: NDArray[np.int64]  # (T,) frame of the source video
    time_s: NDArray[np.float64]  # (T,)
    phase: NDArray[np.int8]  # (T,)
    tools: NDArray[np.int8]  # (T, K)
    tool_logits: NDArray[np.float32]  # (T, K)
    attributes: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frame_index)


@contextmanager
def write_features(
    path: Path,
    encoder: EncoderSpec,
    source: SourceIdentity,
    frame_index: NDArray[np.int64],
    phase: NDArray[np.int8],
    tools: NDArray[np.int8],
    attributes: Mapping[str, Any],
    time_s: NDArray[np.float64] | None = None,
) -> Iterator[FeatureWriter]:
    """Write one feature file block by block, so that memory does not grow with the video's length.

    `time_s` (T,) says when frames are shown; None where that follows from the source's rate.

    The file appears under its name only when the body ended without an exception, all T rows were appended and the
    reopened file verifies; otherwise nothing is left. Raises UserError when the disk is full.
    """
    with atomic_path(path) as temporary:
        options = {"libver": ("v110", "v110"), "userblock_size": USER_BLOCK_BYTES}
        with Hdf5Sink(temporary) as sink, h5py.File(sink, "w", **options) as file:
            writer = FeatureWriter(file, sink, encoder, source, frame_index, tools.shape[1])
            times = frame_index / source.fps if time_s is None else time_s
            _create(file, "time_s", times.shape, "float64", (min(CHUNK_FRAMES, len(times)),))[...] = times
            write_labels(file, phase, tools)
            file.attrs.update({**_provenance(encoder, source), **attributes})
            yield writer
            if writer.rows != len(frame_index):
                raise UserError(f"{source.video_id}: {writer.rows} of {len(frame_index)} frames were computed")
            file.attrs["complete"] = True
        seal(temporary)
        problem = verify_file(temporary, encoder, source)
        if problem:
            raise UserError(f"{path}: what was written does not read back ({problem}); is the disk sound?")


class FeatureWriter:
    """The data sets of an open feature file, filled from the first row on; `rows` counts those that are there."""

    def __init__(
        self,
        file: h5py.File,
        sink: Hdf5Sink,
        encoder: EncoderSpec,
        source: SourceIdentity,
        frame_index: NDArray[np.int64],
        tools: int,
    ) -> None:
        self.rows = 0
        self._file, self._sink = file, sink
        self._encoder, self._source, self._frame_index = encoder, source, frame_index
        count, dim = len(frame_index), encoder.embedding_dim
        chunk = min(CHUNK_FRAMES, count)
        _create(file, "features", (count, dim), encoder.storage, (chunk, dim))
        _create(file, "tool_logits", (count, tools), "float32", (chunk, tools))
        _create(file, "frame_index", (count,), "int64", (chunk,))[...] = frame_index

    def append(self, features: NDArray[Any], tool_logits: NDArray[np.float32]) -> None:
        """The next rows: features (N, D) in any float type, tool logits (N, K). UserError for what does not fit."""
        stop = self.rows + len(features)
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused by name below
            stored = features.astype(self._encoder.storage)
        unfit = np.flatnonzero(~np.isfinite(stored).all(axis=1))
        if len(unfit):
            row = self.rows + int(unfit[0])
            raise UserError(
                f"{self._source.video_id}: features of sample {row} (frame {self._frame_index[row]}) do not fit "
                f"{self._encoder.storage}; use extract.storage=float32 or look at the weights"
            )
        self._file["features"][self.rows : stop] = stored
        self._file["tool_logits"][self.rows : stop] = tool_logits
        self._sink.check()  # a full disk stops the work here and not at the end
        self.rows = stop


def _provenance(encoder: EncoderSpec, source: SourceIdentity) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "video_id": source.video_id,
        "source_sha256_ends": source.sha256_ends,
        "source_size_bytes": source.size_bytes,
        "source_fps": source.fps,
        "fps": encoder.fps,
        "backbone": encoder.backbone,
        "weights_sha256": encoder.weights_sha256,
        "preprocess": json.dumps(dict(encoder.preprocess), sort_keys=True),
        "precision": encoder.precision,
        "storage": encoder.storage,
        "arithmetic": encoder.arithmetic,
        "encoder_digest": encoder.digest,
        "package_version": package_version("surgstage") or "",
    }


def _create(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> h5py.Dataset:
    """A data set with a checksum a chunk. An empty one (no tools) has no chunks, and so nothing to check."""
    filled = all(shape)
    return file.create_dataset(name, shape, dtype, chunks=chunk if filled else None, fletcher32=filled)


def write_labels(file: h5py.File, phase: NDArray[np.int8], tools: NDArray[np.int8]) -> None:
    """Write the label data sets of an open feature file: phase (T,), tools (T, K), -1 = no label."""
    for name, values in (("phase", phase), ("tools", tools)):
        if name in file:
            del file[name]
        chunk = (min(CHUNK_FRAMES, len(values)), *values.shape[1:])
        _create(file, name, values.shape, "int8", chunk)[...] = values


def read_features(path: Path, with_features: bool = True) -> VideoFeatures:
    """Read one feature file whole; its seal and every chunk's checksum are checked on the way.

    Raises FeatureFileError naming the file and what is wrong with it.
    """
    with _sound(path) as (file, attributes):
        values = {name: _read(file, name, path) for name in _DATASETS if with_features or name != "features"}
    features = values.pop("features", np.zeros((len(values["frame_index"]), 0), np.float16))
    _require_one_length({"features": features, **values}, path)
    return VideoFeatures(features=features, **values, attributes=attributes)


@contextmanager
def _sound(path: Path) -> Iterator[tuple[h5py.File, dict[str, Any]]]:
    """A complete feature file and its attributes; what goes wrong in the body is FeatureFileError."""
    try:
        with _open(path) as file:
            attributes = _attributes(file)
            if attributes.get("schema_version") != SCHEMA_VERSION:
                raise FeatureFileError(
                    f"{path}: schema version {attributes.get('schema_version')}, this program reads {SCHEMA_VERSION}"
                )
            if not attributes.get("complete"):
                raise FeatureFileError(f"{path}: not complete; run extract again")
            yield file, attributes
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise FeatureFileError(f"{path}: damaged or cut short ({_short(error)}); run extract again") from error


def _require_one_length(values: Mapping[str, Any], path: Path) -> None:
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) != 1:
        raise FeatureFileError(f"{path}: damaged (lengths differ: {lengths}); run extract again")


def _read_through(path: Path) -> dict[str, Any]:
    """Check a feature file as `read_features` does, a chunk at a time, and return its attributes."""
    with _sound(path) as (file, attributes):
        nodes = {name: _node(file, name, path) for name in _DATASETS}
        for node in nodes.values():
            for start in range(0, len(node), CHUNK_FRAMES):
                node[start : start + CHUNK_FRAMES]
        _require_one_length(nodes, path)
    return attributes


_DATASETS: dict[str, tuple[int, str]] = {
    "features": (2, "f"),
    "frame_index": (1, "i"),
    "time_s": (1, "f"),
    "phase": (1, "i"),
    "tools": (2, "i"),
    "tool_logits": (2, "f"),
}


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise FeatureFileError(f"{path}: no such feature file; run extract")
    problem = broken_seal(path)
    if problem is not None:
        raise FeatureFileError(f"{path}: {problem}; run extract again")
    return h5py.File(path, "r", locking=False)


def _read(file: h5py.File, name: str, path: Path) -> NDArray[Any]:
    value: NDArray[Any] = _node(file, name, path)[...]
    return value


def _node(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    """A data set that is what its name says. Raises FeatureFileError for any other."""
    node = file[name]
    dimensions, kind = _DATASETS[name]
    if not isinstance(node, h5py.Dataset) or node.ndim != dimensions or node.dtype.kind != kind:
        raise FeatureFileError(f"{path}: {name} is not a data set of {dimensions} dimension(s); run extract again")
    # Ours are stored as they are, so a claim of more than is stored is damage or a bomb; and in the file itself.
    if node.nbytes > min(MAX_DATASET_BYTES, node.id.get_storage_size()):
        raise FeatureFileError(f"{path}: {name} claims {node.nbytes:,} bytes; not a feature file of this project")
    if not holds_itself(file, name):
        raise FeatureFileError(f"{path}: {name} lies elsewhere or is compressed; not a feature file of this project")
    return node


def _attributes(file: h5py.File) -> dict[str, Any]:
    """The root's attributes as plain values. Raises ValueError for what is not ours: more than single values, and
    values that are not what their name says."""
    found = {}
    for name in file.attrs:
        attribute = file.attrs.get_id(name)
        if attribute.shape != () or attribute.dtype.itemsize > MAX_ATTRIBUTE_BYTES:
            raise ValueError(f"attribute {name[:60]!r} is no single value")
        found[name] = _plain(file.attrs[name])
    _from_json(found, "preprocess")
    phases = _from_json(found, "phases")
    if phases is not None and not (isinstance(phases, list) and all(isinstance(name, str) for name in phases)):
        raise ValueError("phases is no list of names")
    float(found.get("fps", 0.0))
    return found


def _from_json(attributes: Mapping[str, Any], name: str) -> Any:
    """What a text among attributes stands for, or the value itself. Raises ValueError for a text that is no JSON."""
    value = attributes.get(name)
    try:
        return json.loads(value) if isinstance(value, str) else value
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value.decode() if isinstance(value, bytes) else value


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def verify_file(
    path: Path, encoder: EncoderSpec | None = None, source: SourceIdentity | None = None, deep: bool = True
) -> str | None:
    """What is wrong with a feature file, or None. `deep` reads every chunk (checksums); otherwise only the header.

    With `encoder` and `source` the file must also be of that encoder and of that very video.
    """
    try:
        attributes = _read_through(path) if deep else read_attributes(path)
    except FeatureFileError as error:
        return str(error).removeprefix(f"{path}: ")
    if encoder is not None and attributes.get("encoder_digest") != encoder.digest:
        return "made by another encoder"
    if source is not None:
        if attributes.get("video_id") != source.video_id:
            return f"holds video {attributes.get('video_id')}"
        if attributes.get("source_sha256_ends") != source.sha256_ends:
            return "the source has changed since"
    return None


def read_attributes(path: Path) -> dict[str, Any]:
    """A feature file's root attributes. Raises FeatureFileError when it is not complete or not readable."""
    try:
        with _open(path) as file:
            attributes = _attributes(file)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise FeatureFileError(f"{path}: damaged or cut short ({_short(error)}); run extract again") from error
    if not attributes.get("complete"):
        raise FeatureFileError(f"{path}: not complete; run extract again")
    return attributes


def recorded_encoder(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What a feature file says of the encoder that made it, in plain values (`EncoderSpec.to_json` without schema)."""
    found = {name: attributes.get(name) for name in ("backbone", "weights_sha256", "fps", "precision", "storage")}
    found["arithmetic"] = attributes.get("arithmetic", "plain")  # files that do not say are older than folding
    return {**found, "preprocess": _from_json(attributes, "preprocess")}


def rewrite_labels(path: Path, phase: NDArray[np.int8], tools: NDArray[np.int8], attributes: Mapping[str, Any]) -> None:
    """Replace the labels of a feature file and keep its features: phase (T,), tools (T, K).

    The file is copied, changed and renamed, so a reader sees the old labels or the new ones, never half of each.
    """
    if len(phase) != len(read_features(path, with_features=False)):
        raise FeatureFileError(f"{path}: new labels have another length; run extract again")
    with atomic_path(path) as temporary:
        shutil.copyfile(path, temporary)
        with Hdf5Sink(temporary, "r+b") as sink, h5py.File(sink, "r+") as file:
            write_labels(file, phase, tools)
            file.attrs.update(dict(attributes))
        seal(temporary)
        problem = verify_file(temporary)
        if problem:
            raise FeatureFileError(f"{path}: {problem}")


# ---------------------------------------------------------------------------------------------- folders


def feature_path(folder: Path, video_id: str) -> Path:
    """Where a video's features are."""
    return folder / f"{file_stem(video_id)}.h5"


def _fault_path(folder: Path, video_id: str) -> Path:
    return feature_path(folder, video_id).with_suffix(".left_out.json")


def record_fault(folder: Path, video_id: str, source: str, reason: str) -> None:
    """Say beside the features why a video has none; `source` is the hash of its ends.

    One file per video, so that shards never write the same one.
    """
    write_json(_fault_path(folder, video_id), {"id": video_id, "reason": reason, "source_sha256_ends": source})


def clear_fault(folder: Path, video_id: str) -> None:
    """The video has features now."""
    _fault_path(folder, video_id).unlink(missing_ok=True)


def recorded_fault(folder: Path, video_id: str, source: str) -> str | None:
    """Why this very source has no features; None where extract has not failed on it, perhaps since it did not try."""
    path = _fault_path(folder, video_id)
    found = read_json_object(path) if path.exists() else {}
    return str(found.get("reason")) if found.get("source_sha256_ends") == source else None


def feature_files(folder: Path) -> list[Path]:
    """The feature files of a folder, by name. Raises UserError when there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such feature folder; run extract, or name another with --features")
    files = sorted(path for path in folder.glob("*.h5") if not path.name.startswith("."))
    if not files:
        inside = sorted(path.parent for path in folder.glob("*/*.h5"))
        instead = f"but {inside[0]} does: name that one" if inside else "run extract first"
        raise UserError(f"{folder}: holds no feature files; {instead}")
    return files


def load_feature_set(folder: Path, video_ids: Sequence[str]) -> dict[str, VideoFeatures]:
    """The named videos' features in memory, checksums checked; all of one encoder.

    Raises UserError naming the videos that are missing, and FeatureFileError for a damaged file or a second encoder.
    """
    missing = [video_id for video_id in video_ids if not feature_path(folder, video_id).is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(f"{folder}: no features of {shown}; run extract to make them")
    loaded = {video_id: read_features(feature_path(folder, video_id)) for video_id in video_ids}
    require_one_encoder({feature_path(folder, name): video.attributes for name, video in loaded.items()})
    return loaded


def require_one_encoder(attributes: Mapping[Path, Mapping[str, Any]]) -> str | None:
    """The common encoder digest of feature files. Raises FeatureFileError naming two that differ."""
    first: tuple[Path, str] | None = None
    for path, found in attributes.items():
        digest = str(found.get("encoder_digest"))
        if first is None:
            first = (path, digest)
        elif digest != first[1]:
            raise FeatureFileError(
                f"{path}: made by encoder {digest[:12]}, but {first[0].name} by {first[1][:12]}; "
                "features of two encoders do not mix: delete one kind or extract again"
            )
    return first[1] if first else None


def verify_folder(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Every feature file with what is wrong with it (None: nothing); one encoder's digest must be in all of them."""
    expected: str | None = None
    for path in feature_files(folder):
        problem = verify_file(path)
        if problem is None:
            digest = str(read_attributes(path)["encoder_digest"])
            expected = expected or digest
            if digest != expected:
                problem = f"made by another encoder ({digest[:12]}, the first file's is {expected[:12]})"
        yield path, problem


def estimate_bytes(lengths: Iterable[int], encoder: EncoderSpec) -> int:
    """Disk space that features of videos with `lengths` sampled frames take, rounded up."""
    item = np.dtype(encoder.storage).itemsize
    return sum(length * (encoder.embedding_dim * item + 64) + 64_000 for length in lengths)


def prepare_folder(folder: Path, missing_lengths: Sequence[int], encoder: EncoderSpec) -> None:
    """Make the folder, sweep what killed writers left, and see that the disk has room for what is missing."""
    folder.mkdir(parents=True, exist_ok=True) if os.access(_nearest_existing(folder), os.W_OK) else _refuse(folder)
    remove_stale_temporaries(folder)
    require_free_bytes(folder, estimate_bytes(missing_lengths, encoder), "the features")


def _nearest_existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _refuse(folder: Path) -> None:
    raise as_user_error(PermissionError(13, "Permission denied"), folder)


def write_encoder(folder: Path, encoder: EncoderSpec) -> None:
    """Say in `encoder.json` what made the folder's features."""
    write_json(folder / ENCODER_FILE, encoder.to_json())


def find_feature_folder(named: Path | None, run: Path, store: Path) -> Path:
    """The feature folder to use: the one named, the one the run's `extract` made, or the store's only one.

    Raises UserError naming the choices where that leaves none or several.
    """
    if named is not None:
        feature_files(named)
        return named
    pointer = run / "extract" / "result.json"
    if pointer.exists():
        named = read_json_object(pointer).get("folder")
        if not isinstance(named, str):
            raise UserError(f"{pointer}: names no feature folder; run extract again, or name one with --features DIR")
        folder = Path(named)
        feature_files(folder)
        return folder
    found = sorted(path.parent for path in store.glob(f"*/{INDEX_FILE}")) if store.is_dir() else []
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{store}: holds no features; run extract first, or name a folder with --features DIR")
    shown = ", ".join(str(path) for path in found[:4])
    raise UserError(f"{store}: holds features of several encoders ({shown}); choose one with --features DIR")


def describe_folder(folder: Path) -> list[str]:
    """Lines for `features info`: the encoder, then a line a video. Damaged files are named, not hidden."""
    lines: list[str] = []
    total = 0
    for path in feature_files(folder):
        try:
            video = read_features(path, with_features=False)
        except FeatureFileError as error:
            lines.append(str(error))
            continue
        if not total:
            lines[:0] = _encoder_lines(folder, video.attributes)
        total += len(video)
        labelled = int((video.phase >= 0).sum())
        with_tools = int((video.tools >= 0).any(axis=1).sum()) if video.tools.size else 0
        lines.append(f"{id_of_stem(path.stem)}: {len(video)} frames, {labelled} with a phase, {with_tools} with tools")
    return [*lines, f"{total} frames in all"]


def _encoder_lines(folder: Path, attributes: Mapping[str, Any]) -> list[str]:
    names = ("backbone", "weights_sha256", "fps", "precision", "storage", "preprocess", "encoder_digest")
    return [str(folder), *(f"  {name}: {attributes.get(name)}" for name in names)]
