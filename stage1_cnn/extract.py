"""Extraction: apply the encoder to the sampled frames of every video, and write one feature file per video.

On a CPU one process per core decodes and computes, with one thread each. On a GPU several processes decode for the one
process that computes. The features depend neither on the number of processes nor on whether a video is split among
them, because batches always begin at the same sample numbers and a CPU always adds sums in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import CNN_FOLDER, EXTRACT_FOLDER, Config
from engine.device import say_few_cores, start_stage
from engine.files import below_root, read_json_object, remove_stale_temporaries, sha256_file, write_json
from engine.memory import needs_gpu_memory
from engine.pool import VideoFault, require_one_usable, work_through
from engine.progress import say
from engine.runs import StageFolder, StageIdentity, settings_without
from engine.stopping import StopRequest
from features.dataset.catalogue import say_left_out
from features.dataset.index import Dataset, Index, VideoEntry
from features.dataset.sampling import frame_times_s, sampled_frames
from features.dataset.trained_on import inherited_from, record_training
from features.frames.source import require_indexed_annotations, require_indexed_source, source_identity
from features.store import EncoderSpec, feature_path, read_features, verify_file
from features.store_folder import ENCODER_FILE, INDEX_FILE, clear_fault, prepare_folder, record_fault
from stage1_cnn.decode_ahead import decoders_for, decodes_ahead, work_ahead
from stage1_cnn.encoders.calibration import FromTrainingFrames
from stage1_cnn.encoders.encoder import Encoder, encoded_at_once, load_encoder
from stage1_cnn.encoders.pretrained import weights_folders, weights_identity
from stage1_cnn.segments import Assembly, VideoJob, split_among
from stage1_cnn.video_features import ExtractTask, label_attributes

STAGE = "extract"
SHARDS = "shards"  # folder with the report of each shard


@dataclass
class ExtractReport:
    """What one call of `extract` did: video ids by outcome, frames computed, and seconds.

    `left_out` lists the videos that the index leaves out.
    """

    folder: Path
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0

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
            "sentence": self.sentence(),
        }


@needs_gpu_memory("extract.batch_frames")
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
    """Write the features of every video of the index, or of every `shard[1]`-th one from `shard[0]`.

    The files go to `folder`, by default `<extract.store>/<backbone>-<digest12>`, together with the index and the
    encoder's description. An existing file is kept if it passes its checks and was made from the same source; if only
    annotations have changed, only the labels in it are rewritten. A video that cannot be read is reported, and the
    others are extracted. The reason is stored beside the features, so that stage two leaves the video out as well,
    until a later call can read it. With a run and no `folder`, `RUN/extract/result.json` names the folder of the
    features. Raises UserError if there are no weights, the disk has too little space, no video can be used, or the
    folder belongs to another data set or encoder.
    """
    started, index = time.monotonic(), dataset.index
    stage = StageFolder(run, EXTRACT_FOLDER, config, _identity(config, index)) if run and folder is None else None
    encoder = load_encoder(config, run, dataset.spec.tools, trusted, FromTrainingFrames(config, dataset))
    inherited = inherited_from(_folders_of_weights(config, run), index, config.data.allow_overlap)
    target = folder or config.extract.store / encoder.spec.folder_name
    _require_compatible(target, index, encoder.spec)
    report = ExtractReport(target, left_out=index.left_out_records())
    say_left_out(index)
    jobs = _plan(config, dataset, encoder.spec, shard, report)
    report.require_one_usable(len(jobs), shard)
    if jobs:
        say_few_cores(encoder.device)
    if stage:
        stage.open()
    prepare_folder(target, [job.frames for job in jobs if not job.labels_only], encoder.spec)
    index.save(target / INDEX_FILE)
    if inherited:
        record_training(target, inherited, None)
    write_json(target / ENCODER_FILE, {**encoder.spec.to_json(), "digest": encoder.spec.digest})

    task = ExtractTask(config, run, dataset, target, encoder.spec, trusted, encoder)
    for job, reason in _work(task, jobs, encoder, stop):
        report.add(job, reason)
    remove_stale_temporaries(target)  # those of processes that died
    report.sort(index)
    report.require_one_usable(0, shard)
    _record_faults(report, dataset)
    report.seconds = round(time.monotonic() - started, 3)
    if stage:
        made_by = {"encoder_digest": encoder.spec.digest, "device": encoder.device_name}
        result = report.to_json(f"{shard[0]}/{shard[1]}", made_by | {"precision": encoder.spec.precision})
        _finish(stage, result, shard, index)
    return report


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


def _work(
    task: ExtractTask, jobs: Sequence[VideoJob], encoder: Encoder, stop: StopRequest
) -> Iterator[tuple[VideoJob, str | None]]:
    """Do the jobs in parallel processes. Yields each video when it is finished, with the reason if it failed."""
    chosen = task.config.extract
    ahead = decodes_ahead(task.config, encoder.device)
    processes = decoders_for(task.config, sum(job.frames for job in jobs))
    if chosen.segments and processes > 1:
        pieces = split_among(jobs, processes, encoded_at_once(task.config), chosen.segment_frames, task.may_split)
    else:
        pieces = list(jobs)
    with Assembly(task.folder, pieces, task.assemble) as assembly:
        count = min(processes, max(1, len(assembly.pieces)))
        computing = 1 if ahead or (encoder.device.type != "cpu" and chosen.workers <= 0) else count
        others = f"{count} decoding process(es)" if ahead else f"{computing} process(es)"
        start_stage(STAGE, task.config, encoder.device, encoder.spec.precision, others)
        outcomes: Generator[tuple[VideoJob, str | None], None, None]
        if ahead:
            outcomes = work_ahead(task, assembly.pieces, count, STAGE, stop)
        else:
            outcomes = work_through(task, assembly.pieces, computing, STAGE, stop)
        with closing(outcomes):
            for piece, reason in outcomes:
                video = assembly.ended(piece, reason)
                if video is not None:
                    yield video


def _plan(
    config: Config, dataset: Dataset, spec: EncoderSpec, shard: tuple[int, int], report: ExtractReport
) -> list[VideoJob]:
    """The jobs of the shard. Videos that are complete or cannot be read get no job and are noted in the report."""
    first, of = shard
    if not 0 <= first < of:
        raise UserError(f"shard {first}/{of}: expected I/N with I from 0 to N-1")
    jobs = []
    for entry in dataset.index.videos[first::of]:
        try:
            frames = sampled_frames(entry, config.data.fps)
            require_indexed_source(dataset, entry)
            require_indexed_annotations(dataset, entry)
            labels = label_attributes(config, dataset.spec, entry)
            state = _state(feature_path(report.folder, entry.id), entry, frames, spec, labels)
        except UserError as error:
            report.failed.append((entry.id, VideoFault(error)))
            continue
        if state == "current":
            report.skipped.append(entry.id)
        else:
            jobs.append(VideoJob(entry.id, len(frames) if state == "new" else 0, labels_only=state == "relabel"))
    return jobs


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
