"""Frames from the indexed source, or from the cache made from it; both give the same pixels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import Config
from engine.device import choose_device
from engine.files import (
    below_root,
    inside,
    read_json_object,
    remove_stale_temporaries,
    require_free_bytes,
    sha256_ends,
    sha256_file,
)
from engine.pool import Advance, VideoFault, choose_processes, work_through
from engine.processes import Processes
from engine.progress import say
from engine.runs import ABSENT, IDENTITY_FILE
from engine.stopping import StopRequest
from features.dataset.frame_folders import frame_folder, scan_folder
from features.dataset.index import Index, VideoEntry
from features.dataset.sampling import in_whole_steps, sampled_frames
from features.dataset.tfrecord import TfrecordReader
from features.frames.cache import CacheRequest, FrameCache
from features.frames.preprocess import Geometry
from features.store import SourceIdentity
from features.video.base import FrameReader
from features.video.images import FolderReader
from features.video.open import open_video
from features.video.scan import has_many_starts

# A CPU's caches hold the activations of a small batch per core; a GPU needs many frames at once.
_CPU_BATCH_FRAMES, _GPU_BATCH_FRAMES = 8, 64


def encoded_at_once(config: Config) -> int:
    """Frames per batch in inference: `extract.batch_frames`, or a size that suits the device."""
    on_cpu = choose_device(config.device).type == "cpu"
    return config.extract.batch_frames or (_CPU_BATCH_FRAMES if on_cpu else _GPU_BATCH_FRAMES)


def source_identity(entry: VideoEntry) -> SourceIdentity:
    """What files made from a video record about it."""
    return SourceIdentity(entry.id, entry.sha256_ends, entry.size_bytes, entry.fps)


class ChangedSource(UserError):
    """A source that differs from the one that was indexed: the index is out of date, but the video is not faulty."""


def require_indexed_source(entry: VideoEntry, root: Path, index: Index) -> None:
    """Raise ChangedSource if a source differs from the indexed one, by size and time, then by the hash of its ends.

    A missing source passes: files made from it remain usable without it, and reading it reports that it is missing.
    Raises UserError for one that cannot be read.
    """
    path = inside(root, entry.source)
    try:
        if not path.exists():
            return
        if entry.kind == "frames":
            same = scan_folder(root, entry.source, index.dataset).identity() == entry.sha256_ends
        else:
            state = path.stat()
            same = (state.st_size, state.st_mtime_ns) == (entry.size_bytes, entry.modified_ns)
            same = same or sha256_ends(path) == entry.sha256_ends
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not same:
        raise ChangedSource(f"{path}: has changed since it was indexed; run `index --force`, then this again")


def require_indexed_annotations(entry: VideoEntry, root: Path) -> None:
    """Raise UserError if an annotation file differs from the indexed one; a missing one passes."""
    for file in (entry.phase_file, entry.tool_file):
        path = inside(root, file.path) if file else None
        if file is not None and path is not None and path.is_file() and sha256_file(path) != file.sha256:
            raise UserError(f"{path}: has changed since it was indexed; run `index --force`, then this again")


def open_source(
    config: Config, entry: VideoEntry, root: Path, index: Index, hardware: str | None = None
) -> FrameReader:
    """Open an indexed source of frames: a video file, a folder of images, or a TFRecord file.

    Open it in the process that reads it. `hardware` is a kind of device that decodes video files (cuda, qsv, ...).
    Raises UserError if the source has changed since it was indexed, and ReaderError if it cannot be read.
    """
    require_indexed_source(entry, root, index)
    path = inside(root, entry.source)
    if entry.frames is not None:
        return FolderReader(path, frame_folder(root, entry.source, index.dataset, entry.frames))
    if entry.records is not None:
        return TfrecordReader(path, entry.records)
    reader = open_video(path, config.data.reader, hardware)
    if (reader.frame_count, reader.times) != (entry.frame_count, entry.times):
        reader.close()
        raise UserError(
            f"{path}: its frames or their times are not as an earlier version indexed them; run `index --force`, "
            "then this again"
        )
    return reader


def can_start_inside(entry: VideoEntry, root: Path) -> bool:
    """Whether reading a part of a source costs less than reading all of it; False for one that cannot be read."""
    try:
        return entry.kind != "video" or has_many_starts(inside(root, entry.source))
    except (UserError, OSError):
        return False  # reading it reports why


def frame_cache(config: Config) -> FrameCache:
    """The frame cache for these settings."""
    return FrameCache(config.cache, config.preprocess, config.data.fps)


def cache_request(config: Config, entry: VideoEntry, root: Path, index: Index) -> CacheRequest:
    """The request for a video's sampled frames to the cache."""
    frame_index = sampled_frames(entry, config.data.fps)
    return CacheRequest(source_identity(entry), frame_index, partial(open_source, config, entry, root, index))


@dataclass(frozen=True)
class SampledFrames:
    """A video's sampled frames in order, resized but not cropped, and where they come from."""

    frames: Iterator[NDArray[np.uint8]]  # (R, R, 3) each
    provenance: dict[str, str]


@contextmanager
def open_frames(
    config: Config, entry: VideoEntry, root: Path, index: Index, samples: slice = slice(None)
) -> Iterator[SampledFrames]:
    """Sampled frames for extraction: from the cache if it holds them without loss, otherwise from the source.

    Both give the same pixels. `samples` selects a part of them by sample number. A JPEG cache is for training only, so
    that features never depend on it.
    """
    request = cache_request(config, entry, root, index)
    lossless = config.cache.use_for_extract and config.cache.codec != "jpeg"
    cached = frame_cache(config).find(request, deep=True) if lossless else None
    if cached is not None:
        with closing(cached):
            numbers = range(len(cached))[samples]
            yield SampledFrames((cached[number] for number in numbers), _provenance_of_cache(cached.path))
        return
    with source_frames(config, entry, root, index, samples) as frames:
        yield frames


@contextmanager
def source_frames(
    config: Config, entry: VideoEntry, root: Path, index: Index, samples: slice = slice(None)
) -> Iterator[SampledFrames]:
    """Sampled frames directly from the source, or a part of them by sample number."""
    with open_source(config, entry, root, index, config.extract.hardware_decoding) as reader:
        geometry = Geometry.of_video(config.preprocess, reader)
        wanted = sampled_frames(entry, config.data.fps)[samples].tolist()
        frames = (geometry.resize_frame(rgb) for rgb in reader.read(wanted))
        yield SampledFrames(frames, {"reader": reader.name, "reader_version": reader.version, "frames_from": "source"})


def frame_batches(frames: Iterable[NDArray[np.uint8]], batch_frames: int) -> Iterator[NDArray[np.uint8]]:
    """Frames (R, R, 3) in batches (N, R, R, 3) of `batch_frames`; the last may be smaller."""
    remaining = iter(frames)
    while batch := list(itertools.islice(remaining, batch_frames)):
        yield np.stack(batch)


def frames_identity(config: Config, index: Index) -> dict[str, Any]:
    """What training on frames depends on besides its net: settings, labels, sources and splits of the videos used.

    Fields of a `StageIdentity`. Paths, the reader (readers are bit-identical) and a lossless cache's codec are not part
    of it. Videos that this training could not read are (`recorded_faults` reads them back); those that were never
    indexed are not.
    """
    used = index.model_copy(update={"videos": (*index.by_split("train"), *index.by_split("val"))})
    fps = config.data.fps
    by_time = not all(in_whole_steps(video, fps, sampled_frames(video, fps)) for video in used.videos)
    faults = {video.id: {"reason": video.reason, "source": video.source} for video in index.left_out if video.source}
    return {
        "left_out": faults or ABSENT,
        "sampled": "by time" if by_time else ABSENT,  # earlier versions sampled other frames there
        "seed": config.seed,
        "videos_sha256": used.digest(),
        "fps": fps,
        "tools_between_rows": config.data.tools_between_rows,
        "preprocess": config.preprocess.model_dump(mode="json"),
        "frames": f"jpeg {config.cache.jpeg_quality}" if config.cache.codec == "jpeg" else "lossless",
    }


def _provenance_of_cache(path: Path) -> dict[str, str]:
    with h5py.File(path, "r", locking=False) as file:
        made_by = {name: str(file.attrs[name]) for name in ("reader", "reader_version")}
    return {**made_by, "frames_from": "cache"}


@dataclass(frozen=True)
class _CacheJob:
    """One video to decode into the cache."""

    entry: VideoEntry
    frames: int


def _decode_into_cache(config: Config, root: Path, index: Index, job: _CacheJob, advance: Advance) -> None:
    request = cache_request(config, job.entry, root, index)
    frame_cache(config).ensure(request, lambda done: advance(1))


def recorded_faults(folder: Path, index: Index) -> list[tuple[str, str]]:
    """Unreadable videos that the training in `folder` has left out, with reasons; changed sources are tried again."""
    path = folder / IDENTITY_FILE
    left_out = read_json_object(path).get("left_out", {}) if path.exists() else {}
    found = [
        (entry.id, left_out[entry.id]["reason"])
        for entry in index.videos
        if entry.id in left_out and left_out[entry.id]["source"] == entry.sha256_ends
    ]
    if found:
        say(f"{folder}: was started without {len(found)} of these videos; another --name tries them again")
    return found


def cache_readable(config: Config, index: Index, root: Path, processes: Processes, stop: StopRequest) -> Index:
    """Decode training and validation videos into the cache; the index without those that cannot be read.

    Raises UserError if that leaves a split without videos, and for what `fill_cache` raises it.
    """
    videos = processes.share([*index.by_split("train"), *index.by_split("val")])
    parts = processes.together(lambda: fill_cache(config, index, root, videos, stop))
    index = index.without(fault for part in parts for fault in part)
    index.require_videos("train", "val")
    return index


def fill_cache(
    config: Config, index: Index, root: Path, entries: Sequence[VideoEntry], stop: StopRequest
) -> list[tuple[str, str]]:
    """Decode those of `entries` that the cache does not hold, several videos at once, with progress.

    Returns the videos that cannot be read, and why. Raises UserError if a video could not be decoded for a reason
    that does not lie in its files, and before any work when the disk is too full or a source has changed; Stopped when
    asked to stop. Videos that were finished by then are kept.
    """
    cache = frame_cache(config)
    jobs = []
    for entry in entries:
        request = cache_request(config, entry, root, index)
        if cache.problem(request) is not None:
            try:
                require_indexed_source(entry, root, index)
            except ChangedSource:
                raise
            except UserError:
                pass  # the job reports it, and leaves out this video only
            jobs.append(_CacheJob(entry, len(request.frame_index)))
    if not jobs:
        return []
    needed = sum(cache.estimate_bytes(job.frames) for job in jobs)
    require_free_bytes(cache.folder, needed, f"caching frames of {len(jobs)} video(s)")
    task = partial(_decode_into_cache, config, root, index)
    work = work_through(task, jobs, choose_processes(-1, jobs), "decode frames", stop)
    failed = [(job.entry.id, reason) for job, reason in work if reason is not None]
    remove_stale_temporaries(cache.folder)  # of processes that died
    if lost := [fault for fault in failed if not isinstance(fault[1], VideoFault)]:
        others = f" (and {len(lost) - 1} more video{'s' * (len(lost) > 2)})" if len(lost) > 1 else ""
        raise UserError(f"{lost[0][0]}: {lost[0][1]}{others}; start again: it resumes where it stopped")
    return [(video_id, below_root(reason, root)) for video_id, reason in failed]
