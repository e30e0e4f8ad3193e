"""Extraction: apply the encoder to the sampled frames of every video, and write one feature file per video.

On a CPU one process per core decodes and computes, with one thread each. On a GPU several processes decode for the one
process that computes. The features depend neither on the number of processes nor on whether a video is split among
them, because batches always begin at the same sample numbers and a CPU always adds sums in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.load import differences
from configs.schema import CNN_FOLDER, EXTRACT_FOLDER, Config
from engine.device import say_few_cores
from engine.files import (
    below_root,
    read_json_object,
    remove_stale_temporaries,
    require_free_bytes,
    sha256_file,
    write_json,
)
from engine.memory import needs_gpu_memory
from engine.pool import VideoFault
from engine.progress import say
from engine.runs import StageFolder, StageIdentity, settings_without
from engine.stopping import StopRequest
from features.dataset.catalogue import say_left_out
from features.dataset.index import Dataset, Index
from features.dataset.overlaps import pretraining_phrases
from features.dataset.trained_on import inherited_from, record_training
from features.store import EncoderSpec
from features.store_folder import ENCODER_FILE, INDEX_FILE, clear_fault, estimate_bytes, prepare_folder, record_fault
from stage1_cnn.encoders.calibration import FromTrainingFrames
from stage1_cnn.encoders.encoder import load_encoder
from stage1_cnn.encoders.pretrained import weights_folders, weights_identity
from stage1_cnn.extract_jobs import divide, plan, work
from stage1_cnn.extract_report import ExtractReport, merged
from stage1_cnn.segments import VideoJob
from stage1_cnn.shared_decode import ExtractTask, Seconds
from stage1_cnn.video_features import EncoderTask

SHARDS = "shards"  # folder with the report of each shard


@dataclass(frozen=True)
class ExtractRequest:
    """One encoder to extract features with: its settings, and the run whose encoder it is or that uses the features.

    `folder` is where the features go, by default `<extract.store>/<backbone>-<digest12>`. `require` is called with the
    encoder's specification before anything is read or written, and raises UserError for an encoder that is not wanted.
    """

    config: Config
    run: Path | None = None
    folder: Path | None = None
    require: Callable[[EncoderSpec], None] | None = None


def extract(
    config: Config,
    run: Path | None,
    dataset: Dataset,
    *,
    shard: tuple[int, int] = (0, 1),
    folder: Path | None = None,
    require: Callable[[EncoderSpec], None] | None = None,
    stop: StopRequest,
    trusted: bool = False,
) -> ExtractReport:
    """Write the features of every video of the index with one encoder; see `extract_each`."""
    request = ExtractRequest(config, run, folder, require)
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
    encoders = [one.task for one in each]
    jobs = plan(encoders, [one.report for one in each], shard)
    for number, one in enumerate(each):
        one.report.require_one_usable(sum(number in job.encoders for job in jobs), shard)
    if jobs:
        say_few_cores(each[0].encoder.device)
    _prepare(each, jobs)
    division = divide(encoders, jobs)
    task = ExtractTask(encoders, Seconds(len(division.pieces), len(each)))
    for number, job, reason in work(task, division, stop):
        each[number].report.add(job, reason)
    problems = []
    for number, one in enumerate(each):
        one.report.processes, one.report.encoders = division.computing, len(each)
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
        if request.require is not None:
            request.require(self.encoder.spec)
        self.inherited = inherited_from(_folders_of_weights(config, run), self.index, config.data.allow_overlap)
        if config.cnn.weights != "random":
            for seen in pretraining_phrases(config.cnn.backbone, self.index.dataset.name):
                say(f"note: {config.cnn.backbone}: its release was {seen}; results on these videos are too good")
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
        stage.finish(merged(parts, index))


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
