"""Read and write feature files: one HDF5 file per video, with its features, its labels and where they come from.

Stage one writes these files and stage two reads them. A file `<folder>/videoNN.h5` (`features.store_folder` describes
the folder) contains the following data sets, with T sampled frames, D embedding dimensions and K tools:

| data set      | shape  | type               | content                                                        |
|---------------|--------|--------------------|----------------------------------------------------------------|
| `features`    | (T, D) | float16 or float32 | one embedding per frame; chunks of 256 frames                  |
| `tool_logits` | (T, K) | float32            | logits of stage one's tool head; NaN if it has none            |
| `frame_index` | (T,)   | int64              | number of the frame in the source video                        |
| `time_s`      | (T,)   | float64            | time at which the frame is shown, counted from the first frame |
| `phase`       | (T,)   | int8               | -1 = no label                                                  |
| `tools`       | (T, K) | int8               | 1 = present, 0 = absent, -1 = no label                         |
| `tracks/NAME` | (T,)   | int8               | an additional label track, if there is any; -1 = no label       |

Chunks have a checksum (fletcher32) and are not compressed. The root attributes are: schema version; video id; the
source (hash of its ends, size, rate); the encoder (backbone, SHA-256 of the weights, preprocessing as JSON, sampled
fps, precision, storage, arithmetic, and a digest of all of these); attributes that the caller adds (reader, hashes of
the labels, class names); package version; and, written last, `complete`. The file is sealed (`features.sealed_hdf5`)
and written atomically: a file without `.tmp` in its name is complete.

Nothing here imports torch, an image library or a decoder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.label_source import is_track_name
from engine.files import sha256_json
from engine.runs import package_version
from features.ids import file_stem
from features.sealed_hdf5 import USER_BLOCK_BYTES, DamagedFile, Hdf5Sink, is_self_contained, open_sealed, sealed_path
from features.video_labels import VideoLabels

SCHEMA_VERSION = 1
CHUNK_FRAMES = 256
# The largest data set that is read: a damaged file may claim to have any shape.
MAX_DATASET_BYTES = 16 << 30
MAX_ATTRIBUTE_BYTES = 1 << 16
IMPORTED = "imported"  # arithmetic of features that another program computed; also a key of what is recorded about them
_DATASETS = {  # number of dimensions, and NumPy's code for the kind of data type
    "features": (2, "f"),
    "frame_index": (1, "i"),
    "time_s": (1, "f"),
    "phase": (1, "i"),
    "tools": (2, "i"),
    "tool_logits": (2, "f"),
}
_TRACKS = "tracks"  # group of the additional label tracks, and attribute with their classes
_NO_TRACKS: Mapping[str, NDArray[np.int8]] = {}


def feature_path(folder: Path, video_id: str) -> Path:
    """Return the path of a video's feature file."""
    return folder / f"{file_stem(video_id)}.h5"


class FeatureFileError(UserError):
    """A feature file is missing, truncated or damaged, or has another schema version or another encoder."""


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that a video's features depend on, apart from its pixels.

    `weights_sha256` is the hash of the encoder's tensors, including the head. `preprocess` is the whole preprocessing
    as JSON values, including the crop. `arithmetic` says how the net is computed: `folded` (batch norm is folded into
    the convolutions, whose weights have the precision too) or `plain` (as trained, under autocast), followed by whether
    ReLUs are fused and whether the net is compiled; or `openvino`, for int8 with the hash of the net (`openvino, int8
    net 0123456789ab`); or `imported`, for features of another program, whose encoder is not known.

    The reader is not part of the spec, since all readers give identical frames. Neither are the device and
    `extract.batch_frames`, which change only the rounding of sums.
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
        """Return the spec as plain values, together with the schema version of feature files."""
        return {"schema_version": SCHEMA_VERSION, **vars(self), "preprocess": dict(self.preprocess)}

    @property
    def digest(self) -> str:
        """The SHA-256 of the whole spec."""
        return sha256_json(self.to_json())

    @property
    def folder_name(self) -> str:
        """The name of the encoder's feature folder: `<backbone>-<first 12 digits of the digest>`.

        A colon, which rsync and scp take as the end of a host's name, becomes a hyphen.
        """
        return f"{self.backbone.replace(':', '-')}-{self.digest[:12]}"


@dataclass(frozen=True)
class SourceIdentity:
    """Identifies the source video of an HDF5 file. If it has changed, the file is out of date.

    The fields are attributes of the file. `source_sha256_ends` is the hash of the source's size, first MiB and last
    MiB.
    """

    video_id: str
    source_sha256_ends: str
    source_size_bytes: int
    source_fps: float


@dataclass(frozen=True)
class StoredFeatures:
    """Features (T, D) that stay in their file until they are used; NumPy's `asarray` reads all of them.

    The file's seal was checked before. Each read verifies the checksums of the chunks it reads, and that the file has
    not been replaced in the meantime.
    """

    path: Path
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    state: tuple[int, int, int]  # see `_state`

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = np.empty(self.shape, self.dtype)
        self.read([(0, values)])
        return values if dtype is None else values.astype(dtype, copy=False)

    def read(self, parts: Iterable[tuple[int, NDArray[Any]]]) -> None:
        """Fill arrays with features; `parts` are pairs of a first row and an array (N, D) of the stored type.

        Each array gets the N rows from its first row on. Raises FeatureFileError if the file is damaged or was
        replaced.
        """
        with _readable(self.path, check_seal=False) as file:
            if _state(self.path) != self.state:
                raise DamagedFile("replaced since this command opened it")
            rows = _dataset(file, "features")
            for first, values in parts:
                rows.read_direct(values, np.s_[first : first + len(values)])


def _state(path: Path) -> tuple[int, int, int]:
    """Return inode, size and modification time of a file, of which one changes if it is replaced or written to."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True, eq=False)
class VideoFeatures(VideoLabels):
    """One video's features and labels. If the encoder has no tool head, `tool_logits` is NaN."""

    features: NDArray[Any] | StoredFeatures  # (T, D) float16 or float32
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
    tracks: Mapping[str, NDArray[np.int8]] = _NO_TRACKS,
) -> Iterator[FeatureWriter]:
    """Write a feature file block by block, so that memory does not grow with the video's length.

    The body appends rows with the yielded `FeatureWriter`. `frame_index`, `phase` and each of `tracks` are (T,), and
    `tools` is (T, K).
    `time_s` (T,) contains the times at which frames are shown; with None they follow from the source's constant rate.

    The file gets its name only if the body ends without an exception, all T rows were appended, and the reopened file
    passes verification. Otherwise no file is left. Raises UserError if the disk is full.
    """
    with sealed_path(path, lambda written: verify_file(written, encoder, source)) as temporary:
        options = {"libver": ("v110", "v110"), "userblock_size": USER_BLOCK_BYTES}
        with Hdf5Sink(temporary) as sink, h5py.File(sink, "w", **options) as file:
            _create(file, "features", (len(frame_index), encoder.embedding_dim), encoder.storage)
            _create(file, "tool_logits", tools.shape, "float32")
            _create(file, "frame_index", frame_index.shape, "int64")[...] = frame_index
            times = frame_index / source.source_fps if time_s is None else time_s
            _create(file, "time_s", times.shape, "float64")[...] = times
            _write_labels(file, phase, tools, tracks)
            file.attrs.update({**_provenance(encoder, source), **attributes})
            writer = FeatureWriter(file, sink, encoder.storage, source.video_id, frame_index)
            yield writer
            if writer.rows != len(frame_index):
                raise UserError(f"{source.video_id}: {writer.rows} of {len(frame_index)} frames were computed")
            file.attrs["complete"] = True


@dataclass
class FeatureWriter:
    """Appends rows to the data sets of an open feature file. `rows` is the number of rows written so far."""

    file: h5py.File
    sink: Hdf5Sink
    storage: str
    video_id: str
    frame_index: NDArray[np.int64]  # (T,)
    rows: int = 0

    def append(self, features: NDArray[Any], tool_logits: NDArray[np.float32]) -> None:
        """Write the next rows: features (N, D) of any float type, tool logits (N, K).

        Raises UserError naming the frame whose features are not finite or overflow the stored type.
        """
        stop = self.rows + len(features)
        with np.errstate(over="ignore"):  # values that overflow become infinite and are refused below
            stored = features.astype(self.storage)
        unfit = np.flatnonzero(~np.isfinite(stored).all(axis=1))
        if len(unfit):
            row = self.rows + int(unfit[0])
            raise UserError(
                f"{self.video_id}: features of sample {row} (frame {self.frame_index[row]}) do not fit "
                f"{self.storage}; use extract.storage=float32 or look at the weights"
            )
        self.file["features"][self.rows : stop] = stored
        self.file["tool_logits"][self.rows : stop] = tool_logits
        self.sink.check()  # raise the error of a full disk here, not only at the end
        self.rows = stop


def _provenance(encoder: EncoderSpec, source: SourceIdentity) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        **vars(source),
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


def _create(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> h5py.Dataset:
    """Create a data set with a checksum per chunk. An empty data set (no tools) has no chunks, and so no checksum."""
    chunks = (min(CHUNK_FRAMES, shape[0]), *shape[1:]) if all(shape) else None
    return file.create_dataset(name, shape, dtype, chunks=chunks, fletcher32=chunks is not None)


def _write_labels(
    file: h5py.File, phase: NDArray[np.int8], tools: NDArray[np.int8], tracks: Mapping[str, NDArray[np.int8]]
) -> None:
    """Write the label data sets of an open feature file: phase (T,), tools (T, K), tracks (T,) each; -1 = no label."""
    for name in ("phase", "tools", _TRACKS):
        if name in file:
            del file[name]
    for name, values in {"phase": phase, "tools": tools, **_with_group(tracks)}.items():
        _create(file, name, values.shape, "int8")[...] = values


def read_features(path: Path, with_features: bool = True) -> VideoFeatures:
    """Read a feature file. Without `with_features`, the features stay in the file, as `StoredFeatures`.

    The seal and the checksums of all chunks that are read are verified. Raises FeatureFileError naming the file and
    what is wrong with it.
    """
    with _sound(path) as (file, attributes):
        values = {name: _dataset(file, name)[...] for name in _DATASETS if with_features or name != "features"}
        rows = _dataset(file, "features")
        features = values.pop("features", StoredFeatures(path, rows.shape, rows.dtype, _state(path)))
        tracks = {name: dataset[...] for name, dataset in _tracks(file).items()}
        _require_one_length({"features": features, **values, **_with_group(tracks)})
    return VideoFeatures(features=features, **values, attributes=attributes, tracks=tracks)


def verify_file(path: Path, encoder: EncoderSpec | None = None, source: SourceIdentity | None = None) -> str | None:
    """Return what is wrong with a feature file, or None. Every chunk is read and its checksum verified.

    If `encoder` and `source` are given, the file must also have been made by that encoder from that video.
    """
    try:
        attributes = read_every_chunk(path)
    except FeatureFileError as error:
        return str(error).removeprefix(f"{path}: ")
    if encoder is not None and attributes.get("encoder_digest") != encoder.digest:
        return "made by another encoder"
    if source is not None and attributes.get("video_id") != source.video_id:
        return f"contains the features of video {attributes.get('video_id')}"
    if source is not None and attributes.get("source_sha256_ends") != source.source_sha256_ends:
        return "the source video has changed since"
    return None


def read_every_chunk(path: Path) -> dict[str, Any]:
    """Verify a feature file by reading all its chunks, one at a time, and return its attributes.

    Raises FeatureFileError naming the file and what is wrong with it.
    """
    with _sound(path) as (file, attributes):
        datasets = {name: _dataset(file, name) for name in _DATASETS} | _with_group(_tracks(file))
        for dataset in datasets.values():
            for start in range(0, len(dataset), CHUNK_FRAMES):
                dataset[start : start + CHUNK_FRAMES]
        _require_one_length(datasets)
    return attributes


def recorded_encoder(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoder recorded in a feature file's attributes, as `EncoderSpec.to_json` without schema version."""
    found = {name: attributes.get(name) for name in ("backbone", "weights_sha256", "fps", "precision", "storage")}
    found["arithmetic"] = attributes.get("arithmetic", "plain")  # missing in files from before folding was introduced
    return {**found, "preprocess": _from_json(attributes, "preprocess")}


def rewrite_labels(
    path: Path,
    phase: NDArray[np.int8],
    tools: NDArray[np.int8],
    attributes: Mapping[str, Any],
    tracks: Mapping[str, NDArray[np.int8]] = _NO_TRACKS,
) -> None:
    """Replace the labels in a feature file by phase (T,), tools (T, K) and tracks (T,), and keep its features.

    A copy of the file is changed and then replaces the file, so that readers see either the old or the new labels.
    Raises FeatureFileError if the file is damaged or has another number of frames.
    """
    if len(phase) != len(read_features(path, with_features=False)):
        raise FeatureFileError(f"{path}: has another number of frames than the new labels; run extract again")
    with sealed_path(path, verify_file) as temporary:
        shutil.copyfile(path, temporary)
        with Hdf5Sink(temporary, "r+b") as sink, h5py.File(sink, "r+") as file:
            _write_labels(file, phase, tools, tracks)
            file.attrs.pop(_TRACKS, None)
            file.attrs.update(dict(attributes))


@contextmanager
def _sound(path: Path) -> Iterator[tuple[h5py.File, dict[str, Any]]]:
    """Open a complete feature file, and yield it with its attributes. Raises FeatureFileError if it is damaged."""
    with _readable(path) as file:
        attributes = _attributes(file)
        version = attributes.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DamagedFile(f"has schema version {version}, but this program reads {SCHEMA_VERSION}")
        yield file, attributes


@contextmanager
def _readable(path: Path, check_seal: bool = True) -> Iterator[h5py.File]:
    """Open a feature file for reading, and turn DamagedFile, also from the body, into FeatureFileError."""
    try:
        with open_sealed(path, check_seal) as file:
            yield file
    except DamagedFile as error:
        raise FeatureFileError(f"{path}: {error}; run extract again") from error


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a data set of a feature file. Raises DamagedFile, before reading, if it is not as the format requires."""
    found = file[name]
    dimensions, kind = _DATASETS.get(name, (1, "i"))
    if not isinstance(found, h5py.Dataset) or found.ndim != dimensions or found.dtype.kind != kind:
        raise DamagedFile(f"{name} is not a data set of {dimensions} dimension(s)")
    # Values are stored uncompressed in this file, so a data set that claims more bytes than are stored is damaged, or
    # made to exhaust the memory.
    if found.nbytes > min(MAX_DATASET_BYTES, found.id.get_storage_size()):
        raise DamagedFile(f"{name} claims to have {found.nbytes:,} bytes, more than are stored")
    if not is_self_contained(file, name):
        raise DamagedFile(f"{name} is compressed or stored in another file, which this project never does")
    return found


def _tracks(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Return the data sets of the additional label tracks, by name. Raises DamagedFile as `_dataset` does."""
    link = file.get(_TRACKS, getlink=True)
    if link is None:
        return {}
    if not isinstance(link, h5py.HardLink) or not isinstance(file[_TRACKS], h5py.Group):
        raise DamagedFile(f"{_TRACKS} is not a group of label tracks")
    if odd := [name for name in file[_TRACKS] if not is_track_name(name)]:
        raise DamagedFile(f"{_TRACKS} has a data set {odd[0][:60]!r}, which is not the name of a label track")
    return {name: _dataset(file, f"{_TRACKS}/{name}") for name in file[_TRACKS]}


def _with_group(tracks: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{_TRACKS}/{name}": values for name, values in tracks.items()}


def _require_one_length(values: Mapping[str, Any]) -> None:
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) != 1:
        raise DamagedFile(f"damaged (lengths differ: {lengths})")


def _attributes(file: h5py.File) -> dict[str, Any]:
    """Return the root attributes as plain values. Raises ValueError if one is of a wrong shape or type."""
    found: dict[str, Any] = {}
    attributes = file.attrs  # stored in a variable, since each access to `file.attrs` opens the root again
    for name in attributes:
        attribute = attributes.get_id(name)
        if attribute.shape != () or attribute.dtype.itemsize > MAX_ATTRIBUTE_BYTES:
            raise ValueError(f"attribute {name[:60]!r} is not a single value")
        value = attributes[name]
        value = value.item() if isinstance(value, np.generic) else value
        found[name] = value.decode() if isinstance(value, bytes) else value
    _from_json(found, "preprocess")
    phases = _from_json(found, "phases")
    if phases is not None and not (isinstance(phases, list) and all(isinstance(name, str) for name in phases)):
        raise ValueError("phases is not a list of names")
    if not isinstance(_from_json(found, _TRACKS) or {}, dict):
        raise ValueError(f"{_TRACKS} is not a list of classes for each track")
    float(found.get("fps", 0.0))
    return found


def _from_json(attributes: Mapping[str, Any], name: str) -> Any:
    """Return an attribute, parsed if it is a JSON text. Raises ValueError for invalid JSON."""
    value = attributes.get(name)
    try:
        return json.loads(value) if isinstance(value, str) else value
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
