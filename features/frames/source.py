"""Read frames from the indexed source, or from the cache made from it. Both give the same pixels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import Config, PreprocessConfig
from engine.files import inside, sha256_ends, sha256_file
from features.dataset.frame_folders import frame_folder, scan_folder
from features.dataset.index import Dataset, VideoEntry
from features.dataset.labels import reread_annotation
from features.dataset.tfrecord import TfrecordReader
from features.frames.cache import CacheRequest, FrameCache
from features.frames.preprocess import Geometry, resize_each
from features.store import SourceIdentity
from features.video.base import FrameReader
from features.video.images import FolderReader
from features.video.open import open_video
from features.video.parts import PartsReader
from features.video.scan import has_many_starts


def source_identity(entry: VideoEntry) -> SourceIdentity:
    """Return what files made from a video record about the video."""
    return SourceIdentity(entry.id, entry.sha256_ends, entry.size_bytes, entry.fps)


class ChangedSource(UserError):
    """A source differs from the one that was indexed. The index is out of date, but the video itself may be intact."""


def require_indexed_source(dataset: Dataset, entry: VideoEntry) -> None:
    """Raise ChangedSource if a source differs from the indexed one.

    Size and time are compared and, if they differ, the hash of the ends. A missing source is accepted here: files made
    from it can be used without it, and reading it will report that it is missing. Raises UserError if it cannot be
    read.
    """
    if entry.kind == "features":
        raise UserError(f"{entry.id}: its features were imported, so there are no frames to read; index its video")
    if entry.parts:
        for part in entry.sources:
            require_indexed_source(dataset, part)
        return
    path = inside(dataset.root, entry.source)
    try:
        if not path.exists():
            return
        if entry.kind == "frames":
            same = scan_folder(dataset.root, entry.source, dataset.spec).identity() == entry.sha256_ends
        else:
            state = path.stat()
            same = (state.st_size, state.st_mtime_ns) == (entry.size_bytes, entry.modified_ns)
            same = same or sha256_ends(path) == entry.sha256_ends
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not same:
        raise ChangedSource(f"{path}: has changed since it was indexed; run `index --force`, then this again")


def require_indexed_annotations(dataset: Dataset, entry: VideoEntry) -> None:
    """Raise UserError if an annotation file differs from the indexed one. A missing file is accepted."""
    for one in entry.annotated:
        for role, file in one.files_by_role.items():
            path, source = inside(dataset.root, file.path), dataset.spec.label_source(role)
            if source and source.is_shared and path.is_file():
                reread_annotation(dataset, file, role, entry.id)
            elif path.is_file() and sha256_file(path) != file.sha256:
                raise UserError(f"{path}: has changed since it was indexed; run `index --force`, then this again")


def open_source(config: Config, dataset: Dataset, entry: VideoEntry, hardware: str | None = None) -> FrameReader:
    """Open an indexed source of frames: a video file, the files of a recording, a folder of images, or a TFRecord file.

    Call this in the process that reads the frames. `hardware` is a kind of device that decodes video files (cuda, qsv,
    ...). Raises UserError if the source has changed since it was indexed, and ReaderError if it cannot be read.
    """
    if entry.parts:
        files = [partial(open_source, config, dataset, part, hardware) for part in entry.sources]
        return PartsReader(files, same_size=config.preprocess.cut_margin)
    require_indexed_source(dataset, entry)
    path = inside(dataset.root, entry.source)
    if entry.frames is not None:
        return FolderReader(path, frame_folder(dataset.root, entry.source, dataset.spec, entry.frames))
    if entry.records is not None:
        return TfrecordReader(path, entry.records)
    reader = open_video(path, config.data.reader, hardware)
    if (reader.frame_count, reader.times) != (entry.frame_count, entry.times):
        reader.close()
        raise UserError(
            f"{path}: an earlier version indexed other frames or other times of frames; run `index --force`, then this "
            "again"
        )
    return reader


def can_start_inside(entry: VideoEntry, root: Path) -> bool:
    """Whether reading a part of a source takes less time than reading all of it; False if it cannot be read."""
    try:
        return entry.kind != "video" or has_many_starts([inside(root, file.source) for file in entry.sources])
    except (UserError, OSError):
        return False  # reading the source will report the error


def frame_cache(config: Config) -> FrameCache:
    """Return the frame cache for these settings."""
    return FrameCache(config.cache, config.preprocess, config.data.fps)


def cache_request(config: Config, dataset: Dataset, entry: VideoEntry, frame_index: NDArray[np.int64]) -> CacheRequest:
    """Return the request to the cache for a video's sampled frames `frame_index` (T,)."""
    return CacheRequest(source_identity(entry), frame_index, partial(open_source, config, dataset, entry))


@dataclass(frozen=True)
class SampledFrames:
    """A video's sampled frames in order, resized but not cropped, and a record of where they come from."""

    frames: Iterator[NDArray[np.uint8]]  # (R, R, 3) each; in several sizes, those of `resize_each`
    provenance: dict[str, str]


def lossless_cache(config: Config) -> FrameCache | None:
    """Return the cache whose frames extraction may use instead of the source, or None.

    A JPEG cache is used for training only, so that features never depend on it.
    """
    return frame_cache(config) if config.cache.use_for_extract and config.cache.codec != "jpeg" else None


@contextmanager
def open_frames(
    config: Config, dataset: Dataset, entry: VideoEntry, frame_index: NDArray[np.int64], samples: slice = slice(None)
) -> Iterator[SampledFrames]:
    """Yield sampled frames for extraction, from the cache if it contains them without loss, otherwise from the source.

    Both give the same pixels. `frame_index` (T,) are all of the video's sampled frames, as `sampled_frames` returns
    them, and `samples` selects a part of them.
    """
    cache = lossless_cache(config)
    cached = cache.find(cache_request(config, dataset, entry, frame_index), deep=True) if cache else None
    if cached is not None:
        with closing(cached):
            numbers = range(len(cached))[samples]
            yield SampledFrames((cached[number] for number in numbers), _provenance_of_cache(cached.path))
        return
    with source_frames(config, dataset, entry, frame_index[samples]) as frames:
        yield frames


@contextmanager
def source_frames(
    config: Config,
    dataset: Dataset,
    entry: VideoEntry,
    frame_index: NDArray[np.int64],
    sizes: Sequence[PreprocessConfig] = (),
) -> Iterator[SampledFrames]:
    """Yield the frames `frame_index` (N,), read directly from the source.

    They are resized as `config.preprocess` says or, from one decode, as each of `sizes` says (`resize_each`).
    """
    with open_source(config, dataset, entry, config.extract.hardware_decoding) as reader:
        geometries = Geometry.each_of_video(sizes or [config.preprocess], reader)
        frames = (resize_each(geometries, rgb) for rgb in reader.read(frame_index.tolist()))
        yield SampledFrames(frames, {"reader": reader.name, "reader_version": reader.version, "frames_from": "source"})


def frame_batches(frames: Iterable[NDArray[np.uint8]], batch_frames: int) -> Iterator[NDArray[np.uint8]]:
    """Group frames, for example (R, R, 3), into batches (N, R, R, 3) of `batch_frames`; the last one may be smaller."""
    remaining = iter(frames)
    while batch := list(itertools.islice(remaining, batch_frames)):
        yield np.stack(batch)


def _provenance_of_cache(path: Path) -> dict[str, str]:
    with h5py.File(path, "r", locking=False) as file:
        made_by = {name: str(file.attrs[name]) for name in ("reader", "reader_version")}
    return {**made_by, "frames_from": "cache"}
