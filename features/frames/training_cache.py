"""What a training on frames depends on, and its cached frames: filled before it starts, without unreadable videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import Config
from engine.files import below_root, read_json_object, remove_stale_temporaries, require_free_bytes
from engine.pool import Advance, VideoFault, choose_processes, work_through
from engine.processes import Processes
from engine.progress import say
from engine.runs import ABSENT, IDENTITY_FILE
from engine.stopping import StopRequest
from features.dataset.index import Dataset, Index, VideoEntry
from features.dataset.sampling import in_whole_steps, sampled_frames
from features.frames.source import ChangedSource, cache_request, frame_cache, require_indexed_source


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


@dataclass(frozen=True)
class _CacheJob:
    """One video to decode into the cache."""

    entry: VideoEntry
    frames: int


def _decode_into_cache(config: Config, dataset: Dataset, job: _CacheJob, advance: Advance) -> None:
    request = cache_request(config, dataset, job.entry, sampled_frames(job.entry, config.data.fps))
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


def cache_readable(config: Config, dataset: Dataset, processes: Processes) -> Dataset:
    """Decode training and validation videos into the cache; the data set without those that cannot be read.

    Raises UserError if that leaves a split without videos, and for what `fill_cache` raises it.
    """
    videos = processes.share([*dataset.index.by_split("train"), *dataset.index.by_split("val")])
    parts = processes.together(lambda: fill_cache(config, dataset, videos, processes.stop))
    readable = dataset.without(fault for part in parts for fault in part)
    readable.index.require_videos("train", "val")
    return readable


def fill_cache(
    config: Config, dataset: Dataset, entries: Sequence[VideoEntry], stop: StopRequest
) -> list[tuple[str, str]]:
    """Decode those of `entries` that the cache does not hold, several videos at once, with progress.

    Returns the videos that cannot be read, and why. Raises UserError if a video could not be decoded for a reason
    that does not lie in its files, and before any work when the disk is too full or a source has changed; Stopped when
    asked to stop. Videos that were finished by then are kept.
    """
    cache = frame_cache(config)
    jobs = []
    for entry in entries:
        request = cache_request(config, dataset, entry, sampled_frames(entry, config.data.fps))
        if cache.problem(request) is not None:
            try:
                require_indexed_source(dataset, entry)
            except ChangedSource:
                raise
            except UserError:
                pass  # the job reports it, and leaves out this video only
            jobs.append(_CacheJob(entry, len(request.frame_index)))
    if not jobs:
        return []
    needed = sum(cache.estimate_bytes(job.frames) for job in jobs)
    require_free_bytes(cache.folder, needed, f"caching frames of {len(jobs)} video(s)")
    task = partial(_decode_into_cache, config, dataset)
    work = work_through(task, jobs, choose_processes(-1, jobs), "decode frames", stop)
    failed = [(job.entry.id, reason) for job, reason in work if reason is not None]
    remove_stale_temporaries(cache.folder)  # of processes that died
    if lost := [fault for fault in failed if not isinstance(fault[1], VideoFault)]:
        others = f" (and {len(lost) - 1} more video{'s' * (len(lost) > 2)})" if len(lost) > 1 else ""
        raise UserError(f"{lost[0][0]}: {lost[0][1]}{others}; start again: it resumes where it stopped")
    return [(video_id, below_root(reason, dataset.root)) for video_id, reason in failed]
