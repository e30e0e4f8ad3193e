"""Extraction: apply the encoder to the sampled frames of every video, and write one feature file per video.

On a CPU one process per core decodes and computes, with one thread each. On a GPU several processes decode for the one
process that computes. The features depend neither on the number of processes nor on whether a video is split among
them, because batches always begin at the same sample numbers and a CPU always adds sums in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.load import differences
from configs.schema import CNN_FOLDER, EXTRACT_FOLDER, Config
from engine.device import say_few_cores, start_stage
from engine.files import (
    below_root,
    read_json_object,
    remove_stale_temporaries,
    require_free_bytes,
    sha256_file,
    write_json,
)
from engine.memory import needs_gpu_memory
from engine.pool import VideoFault, require_one_usable, work_through
from engine.progress import say
from engine.runs import StageFolder, StageIdentity, settings_without
from engine.stopping import StopRequest
from features.dataset.catalogue import say_left_out
from features.dataset.index import Dataset, Index, VideoEntry
from features.dataset.sampling import frame_times_s, sampled_frames
from features.dataset.trained_on import inherited_from, record_training
from features.frames.preprocess import different_geometries
from features.frames.source import find_lossless, require_indexed_annotations, require_indexed_source, source_identity
from features.store import EncoderSpec, feature_path, read_features, verify_file
from features.store_folder import ENCODER_FILE, INDEX_FILE, clear_fault, estimate_bytes, prepare_folder, record_fault
from stage1_cnn.decode_ahead import decoders_for, decodes_ahead, work_ahead
from stage1_cnn.encoders.calibration import FromTrainingFrames
from stage1_cnn.encoders.encoder import encoded_at_once, load_encoder
from stage1_cnn.encoders.pretrained import weights_folders, weights_identity
from stage1_cnn.segments import Assembly, VideoJob, split_among
from stage1_cnn.shared_decode import ExtractTask, Seconds, SharedJob, reason_of
from stage1_cnn.video_features import EncoderTask, label_attributes

STAGE = "extract"
SHARDS = "shards"  # folder with the report of each shard


@dataclass
class ExtractReport:
    """What one call of `extract` did: video ids by outcome, frames computed, and seconds.

    `left_out` lists the videos that the index leaves out. `decode_seconds` and `encode_seconds` are those of
    getting the frames that this encoder used, and of encoding them and writing the features, added up over the
    `processes` that compute. With decoding ahead, only the time of waiting for frames counts as `decode_seconds`.
    """

    folder: Path
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    processes: int = 1

    @property
    def frames_per_s(self) -> float | None:
        """Frames per second of this encoder as if it had been the only one of the call; None if it computed nothing.

        Without loading the encoder and starting processes, which count in `seconds`.
        """
        work = self.decode_seconds + self.encode_seconds
        return self.processes * self.frames / work if self.frames and work > 0 else None

    def require_one_usable(self, waiting: int, shard: tuple[int, int]) -> None:
        """Raise UserError if every video of this shard has failed and none is `waiting` to be extracted.

        With several shards nothing is raised, since other shards may have videos that can be used.
        """
        if shard[1] == 1:
            require_one_usable(self.failed, waiting + len(self.done) + len(self.skipped) + len(self.relabelled))

    def require_others_done(self) -> None:
        """Raise UserError if a video failed for a reason other than its own files, so that a retry may succeed."""
        lost = [(video_id, reason) for video_id, reason in self.failed if not isinstance(reason, VideoFault)]
        if lost:
            raise UserError(
                f"extract: {len(lost)} video(s) were not done, first {lost[0][0]}: {lost[0][1]}; start again: finished "
                "videos are kept"
            )

    def sentence(self) -> str:
        """The outcome in one line."""
        rate = f" ({self.frames:,} frames, {self.frames / self.seconds:.1f} frames/s)" if self.frames else ""
        counts = {
            "unchanged": len(self.skipped),
            "with new labels only": len(self.relabelled),
            "failed": len(self.failed),
        }
        others = "".join(f", {count} {word}" for word, count in counts.items() if count)
        return f"{len(self.done)} video(s) extracted{rate}{others}; {self.folder}"

    def add(self, job: VideoJob, reason: str | None) -> None:
        """Count a job that has ended, with the reason if it failed."""
        if reason is not None:
            self.failed.append((job.video_id, reason))
        elif job.labels_only:
            self.relabelled.append(job.video_id)
        else:
            self.done.append(job.video_id)
            self.frames += job.frames

    def sort(self, index: Index) -> None:
        """Put the videos into the order of the index, in whatever order they were finished."""
        order = {entry.id: number for number, entry in enumerate(index.videos)}
        for videos in (self.done, self.skipped, self.relabelled):
            videos.sort(key=order.__getitem__)
        self.failed.sort(key=lambda pair: order[pair[0]])

    def to_json(self, shard: str, made_by: Mapping[str, Any]) -> dict[str, Any]:
        """The content of `result.json`; `made_by` holds the encoder's digest, precision and device."""
        return {
            "folder": str(self.folder),
            **{key: made_by[key] for key in ("encoder_digest", "precision", "device")},
            "shard": shard,
            **{key: getattr(self, key) for key in ("done", "skipped", "relabelled")},
            "failed": [list(pair) for pair in self.failed],
            "frames": self.frames,
            "seconds": self.seconds,
            "decode_seconds": self.decode_seconds,
            "encode_seconds": self.encode_seconds,
            "processes": self.processes,
            "sentence": self.sentence(),
        }


@dataclass(frozen=True)
class ExtractRequest:
    """One encoder to extract features with: its settings, and the run whose encoder it is or that uses the features.

    `folder` is where the features go, by default `<extract.store>/<backbone>-<digest12>`.
    """

    config: Config
    run: Path | None = None
    folder: Path | None = None


def extract(
    config: Config,
    run: Path | None,
    dataset: Dataset,
    *,
    shard: tuple[int, int] = (0, 1),
    folder: Path | None = None,
    stop: StopRequest,
    trusted: bool = False,
) -> ExtractReport:
    """Write the features of every video of the index with one encoder; see `extract_each`."""
    request = ExtractRequest(config, run, folder)
    return extract_each([request], dataset, shard=shard, stop=stop, trusted=trusted)[0]


@needs_gpu_memory("extract.batch_frames")
def extract_each(
    requests: Sequence[ExtractRequest],
    dataset: Dataset,
    *,
    shard: tuple[int, int] = (0, 1),
    stop: StopRequest,
    trusted: bool = False,
) -> list[ExtractReport]:
    """Write the features of every video of the index, or of every `shard[1]`-th one from `shard[0]`, for each encoder.

    Each video is decoded once for all encoders that have no features of it yet, and encoders that resize frames in the
    same way share the resized frames. The files are those that a call for one encoder alone writes. They go to the
    request's folder, together with the index and the encoder's description. An existing file is kept if it passes its
    checks and was made from the same source; if only annotations have changed, only the labels in it are rewritten. A
    video that cannot be read is reported, and the others are extracted. The reason is stored beside the features, so
    that stage two leaves the video out as well, until a later call can read it. If a video fails for one encoder only,
    the others are not affected. For a request with a run and no `folder`, `RUN/extract/result.json` names the folder of
    the features.

    Returns the reports in the order of the requests. All encoders are loaded before the first frame is read. Raises
    UserError if there are no weights, the disk has too little space, an encoder can use no video, a folder belongs to
    another data set or encoder, or the requests differ in a setting that concerns all of them, such as `data.fps`.
    """
    if not requests:
        return []
    started = time.monotonic()
    _require_shared_settings(requests)
    each = [_Extraction(request, dataset, trusted) for request in requests]
    _require_own_folders(each)
    say_left_out(dataset.index)
    jobs = _plan(each, dataset, shard)
    for number, one in enumerate(each):
        one.report.require_one_usable(sum(number in job.encoders for job in jobs), shard)
    if jobs:
        say_few_cores(each[0].encoder.device)
    _prepare(each, jobs)
    encoders = [one.task for one in each]
    division = _divide(encoders, jobs)
    task = ExtractTask(encoders, Seconds(len(division.pieces), len(each)))
    for number, job, reason in _work(task, division, stop):
        each[number].report.add(job, reason)
    problems = []
    for number, one in enumerate(each):
        one.report.processes = division.computing
        one.report.decode_seconds, one.report.encode_seconds = (round(s, 3) for s in task.seconds.of(number))
        try:
            one.finish(shard, started)
        except UserError as error:  # the other encoders' results are written all the same
            problems.append(error)
    if problems:
        raise problems[0]
    return [one.report for one in each]


# Settings that concern all encoders of a call.
_SHARED: Any = {
    "device": ...,
    "cuda": ...,
    "cache": ...,
    "data": {"fps", "reader", "tools_between_rows"},
    "extract": {"store", "batch_frames", "workers", "segments", "segment_frames", "decode_ahead", "hardware_decoding"},
}


def _require_shared_settings(requests: Sequence[ExtractRequest]) -> None:
    """Raise UserError if the encoders differ in settings that concern the decoding, which they share."""
    first, *others = requests
    expected = first.config.model_dump(include=_SHARED)
    for other in others:
        changed = differences(expected, other.config.model_dump(include=_SHARED))
        if changed:
            raise UserError(
                f"{first.config.cnn.backbone} (there) and {other.config.cnn.backbone} (now) cannot share one decode: "
                f"{'; '.join(changed)}; give both the same value, or extract them one after the other"
            )


class _Extraction:
    """The extraction with one of the encoders: its encoder, which is loaded, its folder and its report."""

    def __init__(self, request: ExtractRequest, dataset: Dataset, trusted: bool) -> None:
        config, run, self.index = request.config, request.run, dataset.index
        needs_result = run is not None and request.folder is None
        identity = _identity(config, self.index)
        self.stage = StageFolder(run, EXTRACT_FOLDER, config, identity) if run and needs_result else None
        self.encoder = load_encoder(config, run, dataset.spec.tools, trusted, FromTrainingFrames(config, dataset))
        self.inherited = inherited_from(_folders_of_weights(config, run), self.index, config.data.allow_overlap)
        self.folder = request.folder or config.extract.store / self.encoder.spec.folder_name
        _require_compatible(self.folder, self.index, self.encoder.spec)
        self.report = ExtractReport(self.folder, left_out=self.index.left_out_records())
        self.task = EncoderTask(config, run, dataset, self.folder, self.encoder.spec, trusted, self.encoder)

    def prepare(self, frames: Sequence[int]) -> None:
        """Create the folder, with the encoder's description, for videos of so many frames."""
        prepare_folder(self.folder, frames, self.encoder.spec)
        self.index.save(self.folder / INDEX_FILE)
        if self.inherited:
            record_training(self.folder, self.inherited, None)
        spec = self.encoder.spec
        write_json(self.folder / ENCODER_FILE, {**spec.to_json(), "digest": spec.digest})

    def finish(self, shard: tuple[int, int], started: float) -> None:
        """Record the faults of videos, and the run's result. Raises UserError if all videos have failed."""
        remove_stale_temporaries(self.folder)  # those of processes that died
        self.report.sort(self.index)
        self.report.require_one_usable(0, shard)
        _record_faults(self.report, self.task.dataset)
        self.report.seconds = round(time.monotonic() - started, 3)
        if self.stage:
            spec = self.encoder.spec
            made_by = {
                "encoder_digest": spec.digest,
                "precision": spec.precision,
                "device": self.encoder.device_name,
            }
            _finish(self.stage, self.report.to_json(f"{shard[0]}/{shard[1]}", made_by), shard, self.index)


def _require_own_folders(each: Sequence[_Extraction]) -> None:
    """Raise UserError if two encoders have the same folder of features, or the same folder of a run."""
    for folders in ([one.folder for one in each], [one.stage.path for one in each if one.stage]):
        again = next((path for path in folders if folders.count(path) > 1), None)
        if again is not None:
            raise UserError(f"{again}: two of the encoders would write to it; name each encoder (and each run) once")


def _prepare(each: Sequence[_Extraction], jobs: Sequence[VideoJob]) -> None:
    """Open the runs' folders and create those of the features, if the disk has room for all features."""
    for one in each:
        if one.stage:
            one.stage.check()  # all of them, before anything is written
    frames = [[job.frames for job in jobs if number in job.encoders and job.frames] for number in range(len(each))]
    if len(each) > 1:
        needed = sum(estimate_bytes(lengths, one.encoder.spec) for lengths, one in zip(frames, each, strict=True))
        require_free_bytes(each[0].folder, needed, "the features")
    for one, lengths in zip(each, frames, strict=True):
        if one.stage:
            one.stage.open()
        one.prepare(lengths)


def _folders_of_weights(config: Config, run: Path | None) -> list[Path]:
    """The folder of the training that made the encoder, if it is known to be one."""
    if config.extract.checkpoint is not None:
        return [config.extract.checkpoint.parent]
    if config.extract.encoder == "initial":
        return weights_folders(config.cnn, config.runs)
    return [] if run is None else [run / CNN_FOLDER]


def _record_faults(report: ExtractReport, dataset: Dataset) -> None:
    """Record beside the features why a video has none, and delete the record of a video that has features now."""
    for video_id, reason in report.failed:
        if isinstance(reason, VideoFault):
            source = dataset.index.entry(video_id).sha256_ends
            record_fault(report.folder, video_id, source, below_root(reason, dataset.root))
    for video_id in (*report.done, *report.skipped, *report.relabelled):
        clear_fault(report.folder, video_id)


def _finish(stage: StageFolder, result: dict[str, Any], shard: tuple[int, int], index: Index) -> None:
    """Write the result for all videos. With several shards, the last one to end merges the results of all."""
    number, count = shard
    if count == 1:
        stage.finish(result)
        return
    folder = stage.path / SHARDS
    own = {"identity_sha256": stage.digest, "index": index.digest(), **result}
    write_json(folder / f"{number}-of-{count}.json", own)
    files = [folder / f"{one}-of-{count}.json" for one in range(count)]
    parts = [read_json_object(path) for path in files if path.exists()]
    same = ("identity_sha256", "index", "folder", "encoder_digest")
    if len(parts) == count and all(part[key] == own[key] for part in parts for key in same):
        stage.finish(_merged(parts, index))


def _merged(parts: Sequence[Mapping[str, Any]], index: Index) -> dict[str, Any]:
    """The results of all shards merged into one; its `seconds` are those of the slowest shard."""
    whole = ExtractReport(Path(parts[0]["folder"]))
    for part in parts:
        whole.done += part["done"]
        whole.skipped += part["skipped"]
        whole.relabelled += part["relabelled"]
        whole.failed += [(video_id, reason) for video_id, reason in part["failed"]]
        whole.frames += part["frames"]
        whole.seconds = max(whole.seconds, part["seconds"])
        whole.decode_seconds += part.get("decode_seconds", 0.0)  # parts of an earlier version have none
        whole.encode_seconds += part.get("encode_seconds", 0.0)
    whole.processes = sum(part.get("processes", 1) for part in parts)
    whole.sort(index)
    return whole.to_json(f"all {len(parts)}", parts[0])


def _identity(config: Config, index: Index) -> StageIdentity:
    """The settings that a run's features depend on.

    The weights of a fine-tuned encoder need no entry, since the run itself contains them.
    """
    chosen = config.extract
    file = chosen.checkpoint
    computed = {"encoder", "precision", "storage", "compile"}
    computed |= {"engine"} if chosen.engine != "torch" else set()
    computed |= {"calibration_frames"} if chosen.precision == "int8" else set()
    initial = {
        "weights": weights_identity(config.cnn, config.runs),
        "zero_init_residual": config.cnn.zero_init_residual,
        "seed": config.seed,
    }
    return StageIdentity(
        {
            "dataset": index.dataset.name,
            "fps": config.data.fps,
            "preprocess": settings_without(config.preprocess),
            "backbone": config.cnn.backbone,
            "extract": chosen.model_dump(mode="json", include=computed),
            "initial": initial if chosen.encoder == "initial" else None,
            "checkpoint_sha256": sha256_file(file) if file and file.is_file() else None,
        }
    )


def _require_compatible(folder: Path, index: Index, spec: EncoderSpec) -> None:
    """Raise UserError if a feature folder holds another data set or was made by another encoder."""
    if (folder / INDEX_FILE).exists():
        there = Index.load(folder / INDEX_FILE)
        if there.dataset.name != index.dataset.name:
            raise UserError(
                f"{folder}: holds features of data set {there.dataset.name}, not {index.dataset.name}; "
                "choose another extract.store"
            )
        if there.digest() != index.digest():
            say(f"{folder / INDEX_FILE}: replaced, the index has changed since", every_rank=True)
    if (folder / ENCODER_FILE).exists():
        digest = str(read_json_object(folder / ENCODER_FILE).get("digest"))
        if digest != spec.digest:
            raise UserError(
                f"{folder}: made by encoder {digest[:12]}, this one is {spec.digest[:12]}; "
                "features of two encoders cannot share a folder: choose another one"
            )


# ---------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class _Division:
    """How jobs are divided: the videos and parts of them, the processes that take them, and those that compute."""

    pieces: list[VideoJob]
    processes: int
    computing: int
    ahead: bool


def _divide(encoders: Sequence[EncoderTask], jobs: Sequence[VideoJob]) -> _Division:
    first = encoders[0]
    config, chosen, device = first.config, first.config.extract, first.loaded_encoder().device
    ahead = decodes_ahead(config, device)
    processes = decoders_for(config, sum(job.frames for job in jobs))
    pieces = list(jobs)
    if chosen.segments and processes > 1:
        pieces = split_among(jobs, processes, encoded_at_once(config), chosen.segment_frames, first.may_split)
    count = min(processes, max(1, len(pieces)))
    computing = 1 if ahead or (device.type != "cpu" and chosen.workers <= 0) else count
    return _Division(pieces, count, computing, ahead)


def _work(task: ExtractTask, division: _Division, stop: StopRequest) -> Iterator[tuple[int, VideoJob, str | None]]:
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
    task: ExtractTask, jobs: Sequence[SharedJob], division: _Division, stop: StopRequest
) -> Generator[tuple[SharedJob, str | None], None, None]:
    others = f"{division.processes} decoding process(es)" if division.ahead else f"{division.computing} process(es)"
    precisions = ", ".join(dict.fromkeys(encoder.spec.precision for encoder in task.encoders))
    others += f", {len(task.encoders)} encoders" if len(task.encoders) > 1 else ""
    start_stage(STAGE, task.config, task.encoders[0].loaded_encoder().device, precisions, others)
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


def _plan(each: Sequence[_Extraction], dataset: Dataset, shard: tuple[int, int]) -> list[VideoJob]:
    """The jobs of the shard. Videos that are complete or cannot be read get no job and are noted in the reports."""
    first, of = shard
    if not 0 <= first < of:
        raise UserError(f"shard {first}/{of}: expected I/N with I from 0 to N-1")
    jobs = []
    config = each[0].task.config
    for entry in dataset.index.videos[first::of]:
        try:
            frames = sampled_frames(entry, config.data.fps)
            require_indexed_source(dataset, entry)
            require_indexed_annotations(dataset, entry)
            labels = label_attributes(config, dataset.spec, entry)
            states = [
                _state(feature_path(one.folder, entry.id), entry, frames, one.encoder.spec, labels) for one in each
            ]
        except UserError as error:
            for one in each:
                one.report.failed.append((entry.id, VideoFault(error)))
            continue
        for one, state in zip(each, states, strict=True):
            if state == "current":
                one.report.skipped.append(entry.id)
        new, old = ([number for number, state in enumerate(states) if state == kind] for kind in ("new", "relabel"))
        for together in _read_together([each[number].task for number in new], new, entry, frames):
            jobs.append(VideoJob(entry.id, len(frames), encoders=together))
        if old:
            jobs.append(VideoJob(entry.id, 0, labels_only=True, encoders=tuple(old)))
    return jobs


def _read_together(
    tasks: Sequence[EncoderTask], numbers: Sequence[int], entry: VideoEntry, frame_index: NDArray[np.int64]
) -> list[tuple[int, ...]]:
    """The encoders `numbers` in groups that read a video's frames once each.

    Those whose frames are in the cache do not wait for the others' decode. In a recording of several files, cutting the
    margin requires that all are of one size, so encoders that do not cut it must not fail with those that do.
    """
    if len(different_geometries([task.config.preprocess for task in tasks])[0]) < 2:
        return [tuple(numbers)] if numbers else []
    groups: dict[tuple[str, bool], list[int]] = {}
    for task, number in zip(tasks, numbers, strict=True):
        cached = find_lossless(task.config, task.dataset, entry, frame_index, deep=False)
        cut = bool(entry.parts) and task.config.preprocess.cut_margin
        groups.setdefault(("" if cached is None else str(cached.path), cut), []).append(number)
    return [tuple(group) for group in groups.values()]


def _state(
    path: Path, entry: VideoEntry, frame_index: NDArray[np.int64], spec: EncoderSpec, labels: Mapping[str, str]
) -> str:
    """What a video's feature file needs: `new`, `relabel` or `current`.

    The answer is `new` unless the file is complete and was made by this encoder from these frames of this source. It is
    `relabel` if only the labels differ.
    """
    if not path.exists():
        return "new"
    problem = verify_file(path, spec, source_identity(entry))
    if problem is None:
        video = read_features(path, with_features=False)
        times = frame_times_s(entry, frame_index)
        same = np.array_equal(video.frame_index, frame_index) and np.array_equal(video.time_s, times)
        problem = None if same else "holds other frames, or other times of them"
    if problem is not None:
        say(f"{path.name}: {problem}; extracted again", every_rank=True)
        return "new"
    return "current" if all(video.attributes.get(key) == value for key, value in labels.items()) else "relabel"
