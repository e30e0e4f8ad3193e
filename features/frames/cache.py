"""A cache of decoded frames: one HDF5 file per video, with uint8 pixels after the resize and before the crop.

Reading a random frame from a video decodes a whole group of pictures, which can be seconds long; reading a cached frame
takes a millisecond. Files are named `<cache.dir>/<digest12>/<video_id>.h5`. The digest covers everything that changes
the pixels (geometry, sampling rate and, if it is lossy, the codec with its quality), so different kinds of frames never
mix. Each frame is one compressed image with its own CRC-32. Nothing here imports a video decoder.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, one_line
from configs.schema import CacheConfig, PreprocessConfig, height_width
from engine.files import make_folder, remove_stale_temporaries, require_free_bytes, sha256_json
from features.frames.preprocess import Geometry, geometry_json
from features.ids import file_stem
from features.sealed_hdf5 import USER_BLOCK_BYTES, DamagedFile, Hdf5Sink, is_self_contained, open_sealed, sealed_path
from features.store import SourceIdentity
from features.video.base import FrameReader
from features.video.images import decode_image

SCHEMA_VERSION = 3  # 2: files are sealed; 3: frames are right even if the video's time stamps are misleading

_DATASETS = ("frame_index", "blobs", "crc32")

# Pillow's options for each codec. Lossless codecs preserve the pixels exactly, so they are not part of the digest.
# Measured on real frames of 250 x 250 pixels with one core (ms to encode, ms to decode, kB per frame): png at level 1:
# 4.0, 1.5, 73; png at level 6: 16, 1.4, 65; lossless webp: 3.0, 1.3, 51; jpeg 95: 0.3, 0.3, 17. Higher png levels save
# little.
_LOSSLESS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 0},
}
# Upper estimates of a compressed frame's size, as a fraction of its raw bytes, for checking the free disk space.
_FRACTION_LOSSLESS, _FRACTION_JPEG = 0.5, 0.25


@dataclass(frozen=True, eq=False)
class CacheRequest:
    """A request for frames of one video: its identity, the source frames (T,), and how to open it to read them."""

    source: SourceIdentity
    frame_index: NDArray[np.int64]
    open_reader: Callable[[], FrameReader]


class FrameCache:
    """The cache for one geometry and one sampling rate."""

    def __init__(self, config: CacheConfig, preprocess: PreprocessConfig, fps: float) -> None:
        self.config, self.preprocess, self.fps = config, preprocess, fps
        self.folder = config.dir / self.digest[:12]

    @property
    def digest(self) -> str:
        """The SHA-256 of everything that changes the pixels."""
        lossy = None if self.config.codec in _LOSSLESS else {"codec": "jpeg", "quality": self.config.jpeg_quality}
        what = {"schema_version": SCHEMA_VERSION, "geometry": geometry_json(self.preprocess)}
        return sha256_json({**what, "fps": self.fps, "lossy": lossy})

    def path(self, video_id: str) -> Path:
        """Return the path of a video's cache file."""
        return self.folder / f"{file_stem(video_id)}.h5"

    def estimate_bytes(self, frame_count: int) -> int:
        """Return an upper estimate of the bytes of `frame_count` frames, for videos like those of Cholec80."""
        fraction = _FRACTION_LOSSLESS if self.config.codec in _LOSSLESS else _FRACTION_JPEG
        height, width = height_width(self.preprocess.resize_px)
        return int(frame_count * (3 * height * width * fraction + 32)) + 64_000

    def find(self, request: CacheRequest, deep: bool = False) -> CachedFrames | None:
        """Return the requested frames if the cache contains all of them, made from this source; otherwise None."""
        return CachedFrames(self.path(request.source.video_id)) if self.problem(request, deep) is None else None

    def problem(self, request: CacheRequest, deep: bool = False, path: Path | None = None) -> str | None:
        """Return why a video's cache file cannot be used, or None if it can.

        `path` is given if the file does not have its final name yet. With `deep`, each frame's CRC is verified too.
        """
        frame_index = request.frame_index
        try:
            with open_sealed(path or self.path(request.source.video_id)) as file:
                for name, value in self._attributes(request).items():
                    if file.attrs.get(name) != value:
                        return f"{name} is {file.attrs.get(name)}, not {value}"
                if not all(is_self_contained(file, name) and file[name].chunks is None for name in _DATASETS):
                    return "is not in the form that this project writes"
                if not all(file[name].shape == frame_index.shape for name in _DATASETS):
                    return "contains another number of frames"
                if not np.array_equal(file["frame_index"][...], frame_index):
                    return "contains other frames"
                if deep:
                    for number, blob, checksum in zip(frame_index, file["blobs"], file["crc32"][...], strict=True):
                        if zlib.crc32(blob) != checksum:
                            return f"frame {number} is damaged"
        except DamagedFile as error:
            return str(error)
        return None

    def ensure(self, request: CacheRequest, on_frame: Callable[[int], None] | None = None) -> CachedFrames:
        """Return the requested frames; those of a video that is not in the cache are decoded into it first.

        Memory does not grow with the video's length. After each decoded frame, `on_frame` is called with the number of
        frames done. Raises ReaderError if the source cannot be read, and UserError if the disk is full or not writable.
        After an error, as after Ctrl-C, no unfinished file is left.
        """
        found = self.find(request)
        if found is not None:
            return found
        path = self.path(request.source.video_id)
        make_folder(self.folder)
        remove_stale_temporaries(self.folder)
        require_free_bytes(self.folder, self.estimate_bytes(len(request.frame_index)), "caching these frames")
        with sealed_path(path, partial(self.problem, request, True)) as temporary:
            self._write(temporary, request, on_frame)
        return CachedFrames(path)

    def _attributes(self, request: CacheRequest) -> dict[str, Any]:
        """Return the attributes that the cache file for this request must have."""
        own = {"schema_version": SCHEMA_VERSION, "digest": self.digest}
        return {**own, **vars(request.source), "fps": self.fps}

    def _write(self, temporary: Path, request: CacheRequest, on_frame: Callable[[int], None] | None) -> None:
        count = len(request.frame_index)
        checksums = np.zeros(count, dtype=np.uint32)
        options = {"libver": ("earliest", "v110"), "userblock_size": USER_BLOCK_BYTES}
        with Hdf5Sink(temporary) as sink, h5py.File(sink, "w", **options) as file:
            file.attrs.update(self._attributes(request))
            blobs = file.create_dataset("blobs", (count,), dtype=h5py.vlen_dtype(np.uint8))
            with request.open_reader() as reader:
                geometry = Geometry.of_video(self.preprocess, reader)
                file.attrs.update(self._provenance(geometry, reader))
                for n, rgb in enumerate(reader.read(request.frame_index.tolist())):
                    blob = self._encoded(geometry.resize_frame(rgb))
                    blobs[n] = np.frombuffer(blob, dtype=np.uint8)
                    checksums[n] = zlib.crc32(blob)
                    sink.check()
                    if on_frame is not None:
                        on_frame(n + 1)
            file["crc32"] = checksums
            file["frame_index"] = request.frame_index.astype(np.int64)
            file.attrs["complete"] = True

    def _provenance(self, geometry: Geometry, reader: FrameReader) -> dict[str, Any]:
        """Return attributes that are recorded for information, and not compared with a request."""
        return {
            "geometry": json.dumps({**geometry_json(self.preprocess), **geometry.to_json()}, sort_keys=True),
            "codec": self.config.codec,
            "jpeg_quality": self.config.jpeg_quality if self.config.codec not in _LOSSLESS else -1,
            "reader": reader.name,
            "reader_version": reader.version,
        }

    def _encoded(self, rgb: np.ndarray) -> bytes:
        from PIL import Image

        options = _LOSSLESS.get(self.config.codec, {"format": "JPEG", "quality": self.config.jpeg_quality})
        stream = io.BytesIO()
        Image.fromarray(rgb).save(stream, **options)
        return stream.getvalue()


@dataclass
class CachedFrames:
    """A video's cached frames, accessed by position. It can be pickled; each process opens the file when it first
    reads.
    """

    path: Path
    _file: h5py.File | None = field(default=None, init=False, repr=False, compare=False)

    @cached_property
    def frame_index(self) -> NDArray[np.int64]:
        """The numbers of the source frames, (T,)."""
        index: NDArray[np.int64] = self._read("frame_index", ...)
        return index

    @cached_property
    def _checksums(self) -> NDArray[np.uint32]:
        checksums: NDArray[np.uint32] = self._read("crc32", ...)
        return checksums

    def __len__(self) -> int:
        return len(self.frame_index)

    def __getitem__(self, position: int) -> np.ndarray:
        """Return the frame at `position`, (R, R, 3) uint8. Raises UserError naming the file if it is damaged."""
        if not 0 <= position < len(self):
            raise IndexError(f"{self.path}: position {position} of {len(self)}")
        blob = np.asarray(self._read("blobs", position)).tobytes()
        if zlib.crc32(blob) != self._checksums[position]:
            raise self._damaged(f"frame {self.frame_index[position]} fails its checksum")
        return decode_image(io.BytesIO(blob), f"{self.path}: cached frame", int(self.frame_index[position]))

    def close(self) -> None:
        """Close the file; reading another frame opens it again."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def __reduce__(self) -> tuple[type[CachedFrames], tuple[Path]]:
        return CachedFrames, (self.path,)

    def _read(self, name: str, selection: Any) -> Any:
        try:
            if self._file is None:
                self._file = h5py.File(self.path, "r", locking=False)
            return self._file[name][selection]
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise self._damaged(one_line(error, most=120)) from error

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: damaged or missing ({what}); delete it, and it will be created again")
