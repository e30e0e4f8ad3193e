"""The jobs of an extraction: what is missing, how it is divided among processes, and doing it."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from engine.device import start_stage
from engine.pool import VideoFault, work_through
from engine.progress import say
from engine.stopping import StopRequest
from features.dataset.index import VideoEntry
from features.dataset.sampling import frame_times_s, sampled_frames
from features.frames.preprocess import different_geometries
from features.frames.settings_match import say_frames_note
from features.frames.source import lossless_cache, require_indexed_annotations, require_indexed_source, source_identity
from features.store import feature_path, read_features, verify_file
from stage1_cnn.decode_ahead import decoders_for, decodes_ahead, work_ahead
from stage1_cnn.encoders.encoder import encoded_at_once
from stage1_cnn.extract_report import ExtractReport
from stage1_cnn.segments import Assembly, VideoJob, split_among
from stage1_cnn.shared_decode import ExtractTask, SharedJob, reason_of
from stage1_cnn.video_features import EncoderTask, label_attributes

STAGE = "extract"


def plan(encoders: Sequence[EncoderTask], reports: Sequence[ExtractReport], shard: tuple[int, int]) -> list[VideoJob]:
    """The jobs of the shard. Videos that are complete or cannot be read get no job and are noted in the reports."""
    first, of = shard
    if not 0 <= first < of:
        raise UserError(f"shard {first}/{of}: expected I/N with I from 0 to N-1")
    config, dataset = encoders[0].config, encoders[0].dataset
    jobs = []
    for entry in dataset.index.videos[first::of]:
        try:
            frames = sampled_frames(entry, config.data.fps)
            require_indexed_source(dataset, entry)
            require_indexed_annotations(dataset, entry)
            labels = label_attributes(config, dataset.spec, entry)
            states = [_state(encoder, entry, frames, labels) for encoder in encoders]
        except UserError as error:
            for report in reports:
                report.failed.append((entry.id, VideoFault(error)))
            continue
        for report, state in zip(reports, states, strict=True):
            if state == "current":
                report.skipped.append(entry.id)
        new, old = ([number for number, state in enumerate(states) if state == kind] for kind in ("new", "relabel"))
        groups = _read_together({number: encoders[number] for number in new}, entry)
        jobs += [VideoJob(entry.id, len(frames), encoders=group) for group in groups]
        if old:
            jobs.append(VideoJob(entry.id, 0, labels_only=True, encoders=tuple(old)))
    return jobs


def _read_together(encoders: Mapping[int, EncoderTask], entry: VideoEntry) -> list[tuple[int, ...]]:
    """The numbers of the encoders in groups that read a video's frames once each.

    Those whose frames seem to be in the cache do not wait for the others' decode; reading checks the cache. In a
    recording of several files, cutting the margin requires that all are of one size, so encoders that do not cut it
    must not fail with those that do.
    """
    if len(different_geometries([encoder.config.preprocess for encoder in encoders.values()])[0]) < 2:
        return [tuple(encoders)] if encoders else []
    groups: dict[tuple[str, bool], list[int]] = {}
    for number, encoder in encoders.items():
        cache = lossless_cache(encoder.config)
        cached = str(cache.path(entry.id)) if cache and os.path.isfile(cache.path(entry.id)) else ""
        cut = bool(entry.parts) and encoder.config.preprocess.cut_margin
        groups.setdefault((cached, cut), []).append(number)
    return [tuple(group) for group in groups.values()]


def _state(encoder: EncoderTask, entry: VideoEntry, frame_index: NDArray[np.int64], labels: Mapping[str, str]) -> str:
    """What a video's feature file needs: `new`, `relabel` or `current`.

    The answer is `new` unless the file is complete and was made by this encoder from these frames of this source. It is
    `relabel` if only the labels differ.
    """
    path = feature_path(encoder.folder, entry.id)
    if not path.exists():
        return "new"
    problem = verify_file(path, encoder.spec, source_identity(entry))
    if problem is None:
        video = read_features(path, with_features=False)
        times = frame_times_s(entry, frame_index)
        same = np.array_equal(video.frame_index, frame_index) and np.array_equal(video.time_s, times)
        problem = None if same else "holds other frames, or other times of them"
    if problem is not None:
        say(f"{path.name}: {problem}; extracted again", every_rank=True)
        return "new"
    return "current" if all(video.attributes.get(key) == value for key, value in labels.items()) else "relabel"


@dataclass(frozen=True)
class Division:
    """How jobs are divided: the videos and parts of them, the processes that take them, and those that compute."""

    pieces: list[VideoJob]
    processes: int
    computing: int
    ahead: bool


def divide(encoders: Sequence[EncoderTask], jobs: Sequence[VideoJob]) -> Division:
    """Divide the jobs among processes, as `extract.workers`, `segments` and `decode_ahead` say."""
    first = encoders[0]
    config, chosen, device = first.config, first.config.extract, first.loaded_encoder().device
    ahead = decodes_ahead(config, device)
    processes = decoders_for(config, sum(job.frames * len(job.encoders) for job in jobs))
    pieces = list(jobs)
    if chosen.segments and processes > 1:
        pieces = split_among(jobs, processes, encoded_at_once(config), chosen.segment_frames, first.may_split)
    count = min(processes, max(1, len(pieces)))
    computing = 1 if ahead or (device.type != "cpu" and chosen.workers <= 0) else count
    return Division(pieces, count, computing, ahead)


def work(task: ExtractTask, division: Division, stop: StopRequest) -> Iterator[tuple[int, VideoJob, str | None]]:
    """Do the jobs in parallel processes.

    Yields each encoder's number with each of its videos when it is finished, and the reason if it failed.
    """
    with ExitStack() as opened:
        assemblies = []
        for number, encoder in enumerate(task.encoders):
            own = [piece for piece in division.pieces if number in piece.encoders]
            assemblies.append(opened.enter_context(Assembly(encoder.folder, own, encoder.assemble)))
        with closing(_outcomes(task, _shared_jobs(division.pieces, assemblies), division, stop)) as outcomes:
            for shared, reason in outcomes:
                for number, piece in shared.by_encoder:
                    video = assemblies[number].ended(piece, reason_of(reason, number))
                    if video is not None:
                        yield number, *video


def _outcomes(
    task: ExtractTask, jobs: Sequence[SharedJob], division: Division, stop: StopRequest
) -> Generator[tuple[SharedJob, str | None], None, None]:
    others = f"{division.processes} decoding process(es)" if division.ahead else f"{division.computing} process(es)"
    precisions = ", ".join(dict.fromkeys(encoder.spec.precision for encoder in task.encoders))
    others += f", {len(task.encoders)} encoders" if len(task.encoders) > 1 else ""
    start_stage(STAGE, task.config, task.encoders[0].loaded_encoder().device, precisions, others)
    say_frames_note(*(encoder.config for encoder in task.encoders))
    if division.ahead:
        return work_ahead(task, jobs, division.processes, STAGE, stop)
    return work_through(task, jobs, division.computing, STAGE, stop)


def _shared_jobs(pieces: Sequence[VideoJob], assemblies: Sequence[Assembly]) -> list[SharedJob]:
    """Each piece with the jobs of its encoders, which have files of their own for the rows of a part."""
    own = [{(job.video_id, job.first): job for job in assembly.pieces} for assembly in assemblies]
    return [
        SharedJob(at, tuple((number, own[number][piece.video_id, piece.first]) for number in piece.encoders))
        for at, piece in enumerate(pieces)
    ]
