"""Prepare a training on frames: fill the frame cache, leave out unreadable videos, and compute the identity."""

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
    """Return what a training on frames depends on besides its net, as fields of a `StageIdentity`.

    These are settings, and the labels, sources and splits of the videos used. Videos that this training could not read
    are included (`recorded_faults` reads them back), but not videos that were never indexed. Paths, the reader (all
    give identical frames) and the codec of a lossless cache are not included either.
    """
    used = index.model_copy(update={"videos": (*index.by_split("train"), *index.by_split("val"))})
    fps = config.data.fps
    by_time = not all(in_whole_steps(video, fps, sampled_frames(video, fps)) for video in used.videos)
    faults = {video.id: {"reason": video.reason, "source": video.source} for video in index.left_out if video.source}
    return {
        "left_out": faults or ABSENT,
        "sampled": "by time" if by_time else ABSENT,  # earlier versions sampled other frames of such videos
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
    """Return the unreadable videos that the training in `folder` has left out, with reasons.

    Videos whose sources have changed since are not returned, so that they are tried again.
    """
    path = folder / IDENTITY_FILE
    left_out = read_json_object(path).get("left_out", {}) if path.exists() else {}
    found = [
        (entry.id, left_out[entry.id]["reason"])
        for entry in index.videos
        if entry.id in left_out and left_out[entry.id]["source"] == entry.sha256_ends
    ]
    if found:
        say(f"{folder}: was started without {len(found)} of these videos; use another --name to try them again")
    return found


def cache_readable(config: Config, dataset: Dataset, processes: Processes) -> Dataset:
    """Decode training and validation videos into the cache, and return the data set without unreadable ones.

    Raises UserError if this leaves a split without videos, and as `fill_cache` does.
    """
    videos = processes.share([*dataset.index.by_split("train"), *dataset.index.by_split("val")])
    parts = processes.together(lambda: fill_cache(config, dataset, videos, processes.stop))
    readable = dataset.without(fault for part in parts for fault in part)
    readable.index.require_videos("train", "val")
    return readable


def fill_cache(
    config: Config, dataset: Dataset, entries: Sequence[VideoEntry], stop: StopRequest
) -> list[tuple[str, str]]:
    """Decode those of `entries` that are not in the cache, several videos at once, with a progress bar.

    Returns the videos that cannot be read, with reasons. Before any work, raises UserError if the disk is too full or a
    source has changed. Later, raises UserError if a video could not be decoded although its files are not the cause,
    and Stopped when asked to stop; videos that are finished by then are kept.
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
                pass  # the job will report the error, and only this video is left out
            jobs.append(_CacheJob(entry, len(request.frame_index)))
    if not jobs:
        return []
    needed = sum(cache.estimate_bytes(job.frames) for job in jobs)
    require_free_bytes(cache.folder, needed, f"caching frames of {len(jobs)} video(s)")
    task = partial(_decode_into_cache, config, dataset)
    work = work_through(task, jobs, choose_processes(-1, jobs), "decode frames", stop)
    failed = [(job.entry.id, reason) for job, reason in work if reason is not None]
    remove_stale_temporaries(cache.folder)  # left by processes that died
    if lost := [fault for fault in failed if not isinstance(fault[1], VideoFault)]:
        others = f" (and {len(lost) - 1} more video{'s' * (len(lost) > 2)})" if len(lost) > 1 else ""
        raise UserError(f"{lost[0][0]}: {lost[0][1]}{others}; start the command again: it resumes where it stopped")
    return [(video_id, below_root(reason, dataset.root)) for video_id, reason in failed]
