"""The embedding dump: sampled frames of every video through the encoder, one feature file a video.

Results do not depend on how many videos are in work at once: a video is one process's, batches start at sample 0, and
on a CPU each process computes with one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from configs.load import differences
from configs.schema import Config, PreprocessConfig
from engine.device import choose_device, choose_precision, lower_precision, seed_everything
from engine.files import read_json, remove_stale_temporaries, require_free_bytes, sha256_file, sha256_json, write_json
from engine.progress import say
from engine.runs import RESULT_FILE, StageFolder
from engine.stopping import StopRequest
from features.index import Index, VideoEntry, load_labels, sampled_frames
from features.preprocess import crop_frames, normalise, preprocess_json
from features.store import (
    ENCODER_FILE,
    INDEX_FILE,
    EncoderSpec,
    estimate_bytes,
    feature_path,
    prepare_folder,
    read_attributes,
    rewrite_labels,
    verify_file,
    write_features,
)
from stage1_cnn.frames import (
    open_pictures,
    picture_batches,
    require_indexed_annotations,
    require_indexed_source,
    source_identity,
)
from stage1_cnn.model import (
    Backbone,
    ToolNet,
    best_checkpoint,
    initial_backbone,
    rebuild_encoder,
    rebuild_from_checkpoint,
    require_image_size,
    weights_identity,
    weights_sha256,
)
from stage1_cnn.pool import Advance, choose_processes, work_through

STAGE = "extract"


@dataclass
class ExtractReport:
    """What one call did: video ids by outcome; `frames` and `seconds` of the work done now."""

    folder: Path
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0

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


def extract(
    config: Config,
    run: Path | None,
    index: Index,
    root: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    folder: Path | None = None,
    stop: StopRequest,
    trusted: bool = False,
) -> ExtractReport:
    """Write the features of every video of the index, or of every `shard[1]`-th one from `shard[0]`.

    They go to `folder`, by default `<extract.store>/<backbone>-<digest12>`, with the index and the encoder's
    description. Files that verify and were made from the same source are left alone; where only annotations changed,
    labels alone are rewritten. A video that cannot be read is reported and the others go on. With a run and no
    `folder`, `RUN/extract/result.json` points to the features. Raises UserError when nothing (more) can be done: no
    weights, no room, a folder of another data set or encoder, not one usable video.
    """
    started = time.monotonic()
    stage = StageFolder(run, STAGE, config, _identity(config, index)) if run and folder is None else None
    encoder = load_encoder(config, run, index.dataset.tools, trusted)
    target = folder or config.extract.store / encoder.spec.folder_name
    _require_same_world(target, index, encoder.spec)
    report = ExtractReport(target)
    jobs = _sort_out(config, index, root, target, encoder.spec, shard, report)
    if report.failed and not jobs and not report.skipped:
        others = f" (and {len(report.failed) - 1} more videos)" if len(report.failed) > 1 else ""
        raise UserError(f"{report.failed[0][1]}{others}")
    if stage:
        stage.open()
    prepare_folder(target, [job.frames for job in jobs if not job.labels_only], encoder.spec)
    index.save(target / INDEX_FILE)
    write_json(target / ENCODER_FILE, {**encoder.spec.to_json(), "digest": encoder.spec.digest})

    task = ExtractTask(config, run, index, root, target, encoder.spec, trusted)
    task.encoder = encoder
    wanted = config.extract.workers if encoder.device.type == "cpu" else max(1, config.extract.workers)
    for job, reason in work_through(task, jobs, choose_processes(wanted, jobs), "extract", stop):
        if reason is not None:
            report.failed.append((job.video_id, reason))
        elif job.labels_only:
            report.relabelled.append(job.video_id)
        else:
            report.done.append(job.video_id)
            report.frames += job.frames
    remove_stale_temporaries(target)  # of processes that died
    _in_index_order(report, index)
    report.seconds = round(time.monotonic() - started, 3)
    if stage:
        stage.finish(_result(report, encoder, shard))
    return report


def _identity(config: Config, index: Index) -> dict[str, Any]:
    """Settings that a run's features depend on; the weights of a finetuned encoder are the run's own."""
    chosen = config.extract
    initial = {
        "weights": weights_identity(config.cnn, config.runs),
        "zero_init_residual": config.cnn.zero_init_residual,
        "seed": config.seed,
    }
    return {
        "dataset": index.dataset.name,
        "fps": config.data.fps,
        "preprocess": config.preprocess.model_dump(mode="json"),
        "backbone": config.cnn.backbone,
        "extract": chosen.model_dump(mode="json", include={"encoder", "precision", "storage"}),
        "initial": initial if chosen.encoder == "initial" else None,
        "checkpoint_sha256": sha256_file(chosen.checkpoint) if chosen.checkpoint else None,
    }


def _result(report: ExtractReport, encoder: Encoder, shard: tuple[int, int]) -> dict[str, Any]:
    return {
        "folder": str(report.folder),
        "encoder_digest": encoder.spec.digest,
        "precision": encoder.spec.precision,
        "device": encoder.device_name,
        "shard": f"{shard[0]}/{shard[1]}",
        "done": report.done,
        "skipped": report.skipped,
        "relabelled": report.relabelled,
        "failed": [list(pair) for pair in report.failed],
        "frames": report.frames,
        "seconds": report.seconds,
        "sentence": report.sentence(),
    }


def _require_same_world(folder: Path, index: Index, spec: EncoderSpec) -> None:
    """A feature folder holds one data set and one encoder. Raises UserError where another one is there."""
    if (folder / INDEX_FILE).exists():
        there = Index.load(folder / INDEX_FILE)
        if there.dataset.name != index.dataset.name:
            raise UserError(
                f"{folder}: holds features of data set {there.dataset.name}, not {index.dataset.name}; "
                "choose another extract.store"
            )
        if there.digest() != index.digest():
            say(f"{folder / INDEX_FILE}: replaced, the index has changed since")
    if (folder / ENCODER_FILE).exists():
        digest = str(read_json(folder / ENCODER_FILE).get("digest"))
        if digest != spec.digest:
            raise UserError(
                f"{folder}: made by encoder {digest[:12]}, this one is {spec.digest[:12]}; "
                "features of two encoders do not mix: choose another folder"
            )


def _in_index_order(report: ExtractReport, index: Index) -> None:
    """Processes finish in any order; reports do not."""
    order = {entry.id: number for number, entry in enumerate(index.videos)}
    report.done.sort(key=order.__getitem__)
    report.relabelled.sort(key=order.__getitem__)
    report.failed.sort(key=lambda pair: order[pair[0]])


# ---------------------------------------------------------------------------------------------- encoder


class Encoder:
    """A net in evaluation mode on its device, and the specification that names what it computes.

    `tool_head` is None for an encoder that was not trained; its tool logits are NaN. Only the backbone runs in the
    lower precision; the head, whose logits are ranked, takes float32.
    """

    def __init__(
        self, config: Config, backbone: Backbone, tool_head: torch.nn.Module | None, sha256: str, tools: int
    ) -> None:
        self.device = choose_device(config.device)
        precision = choose_precision(config.extract.precision, self.device, training=False)
        if self.device.type == "cuda" and precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 bits of 23 and would call itself fp32
        self.backbone = backbone.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.tool_head = tool_head.eval().to(self.device) if tool_head is not None else None
        self.tools = tools
        self.preprocess: PreprocessConfig = config.preprocess
        self.spec = EncoderSpec(
            backbone=backbone.name,
            weights_sha256=sha256,
            preprocess=preprocess_json(config.preprocess),
            fps=config.data.fps,
            precision=precision,
            storage=config.extract.storage,
            embedding_dim=backbone.embedding_dim,
        )

    @property
    def device_name(self) -> str:
        """For the record: the kind of device, and which GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def __call__(self, crops: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Frames (N, S, S, 3) uint8 to embeddings (N, D) and tool logits (N, K), both float32."""
        with torch.inference_mode():
            images = normalise(crops, self.preprocess, self.device)  # (N, 3, S, S)
            with lower_precision(self.device, self.spec.precision):
                embedding = self.backbone(images).float()  # (N, D)
            if self.tool_head is None:
                logits = torch.full((len(crops), self.tools), torch.nan)  # (N, K)
            else:
                logits = self.tool_head(embedding)
        return embedding.cpu().numpy(), logits.cpu().numpy()


def load_encoder(config: Config, run: Path | None, tools: Sequence[str], trusted: bool = False) -> Encoder:
    """The encoder that `extract.encoder` asks for: the run's best epoch, or the initial weights untrained.

    Raises UserError when there is no such checkpoint or it was trained on other tools or another backbone.
    """
    seed_everything(config.seed)
    if config.extract.checkpoint is not None:
        encoder = _load_checkpoint(config, config.extract.checkpoint, tools)
    elif config.extract.encoder == "initial":
        backbone = initial_backbone(config, trusted=trusted)
        encoder = Encoder(config, backbone, None, weights_sha256(backbone), len(tools))
    else:
        net = _load_finetuned(config, run, tools)
        encoder = Encoder(config, net.backbone, net.tool_head, weights_sha256(net), len(tools))
    require_image_size(encoder.backbone, config.preprocess.crop_px)
    return encoder


def _load_checkpoint(config: Config, path: Path, tools: Sequence[str]) -> Encoder:
    """Backbone and tool branch of a joint net, fed as it was trained."""
    backbone, tool_head, meta = rebuild_encoder(path)
    _require_fitting(path, meta, config, tools if tool_head is not None else meta["tools"])
    trained_on = PreprocessConfig(**meta["preprocess"])
    if trained_on != config.preprocess:
        changed = "; ".join(differences(trained_on.model_dump(), config.preprocess.model_dump()))
        raise UserError(f"{path}: trained with another preprocess ({changed}); set these to the former")
    parts = torch.nn.ModuleDict({"backbone": backbone} | ({"tool_head": tool_head} if tool_head is not None else {}))
    return Encoder(config, backbone, tool_head, weights_sha256(parts), len(tools))


def _require_fitting(path: Path, meta: Mapping[str, Any], config: Config, tools: Sequence[str]) -> None:
    if meta["backbone"] != config.cnn.backbone:
        raise UserError(f"{path}: holds {meta['backbone']}, but cnn.backbone={config.cnn.backbone}")
    if tuple(meta["tools"]) != tuple(tools):
        raise UserError(
            f"{path}: trained on the tools {', '.join(meta['tools']) or 'none'}; the index has "
            f"{', '.join(tools) or 'none'}"
        )


def _load_finetuned(config: Config, run: Path | None, tools: Sequence[str]) -> ToolNet:
    """The net of the run's best epoch so far, checked against settings and data set."""
    if run is None:
        raise UserError("extract.encoder=finetuned takes the CNN of a run: give --name, or set extract.encoder=initial")
    try:
        path = best_checkpoint(run)
    except UserError as error:
        raise UserError(f"{error} (or set extract.encoder=initial for the backbone as it comes)") from error
    net, meta = rebuild_from_checkpoint(path)
    _require_fitting(path, meta, config, tools)
    if not (path.parent / RESULT_FILE).exists():
        say(f"{path.parent}: training is not finished; taking its best epoch so far")
    return net


# ---------------------------------------------------------------------------------------------- what is to do


@dataclass(frozen=True)
class VideoJob:
    """One video to do; `frames` are those to compute, none where only labels are new."""

    video_id: str
    frames: int
    labels_only: bool


def _sort_out(
    config: Config,
    index: Index,
    root: Path,
    folder: Path,
    spec: EncoderSpec,
    shard: tuple[int, int],
    report: ExtractReport,
) -> list[VideoJob]:
    """Look at every video of the shard: skipped and hopeless ones go into the report, the rest are returned."""
    first, of = shard
    if not 0 <= first < of:
        raise UserError(f"shard {first}/{of}: expected I/N with I from 0 to N-1")
    jobs = []
    for entry in index.videos[first::of]:
        try:
            frames = len(sampled_frames(entry, config.data.fps))
            require_indexed_source(entry, root, index)
            require_indexed_annotations(entry, root)
            state = _state(feature_path(folder, entry.id), entry, spec, label_attributes(config, index, entry))
        except UserError as error:
            report.failed.append((entry.id, str(error)))
            continue
        if state == "current":
            report.skipped.append(entry.id)
        else:
            jobs.append(VideoJob(entry.id, frames if state == "new" else 0, labels_only=state == "relabel"))
    return jobs


def _state(path: Path, entry: VideoEntry, spec: EncoderSpec, labels: Mapping[str, str]) -> str:
    """`new`, `relabel` or `current`: whether a video's file is whole, of this source and encoder, and labelled so."""
    if not path.exists():
        return "new"
    problem = verify_file(path, spec, source_identity(entry))
    if problem is not None:
        say(f"{path.name}: {problem}; done again")
        return "new"
    attributes = read_attributes(path)
    return "current" if all(attributes.get(key) == value for key, value in labels.items()) else "relabel"


def label_attributes(config: Config, index: Index, entry: VideoEntry) -> dict[str, str]:
    """The attributes that say which labels a file holds; `labels_sha256` is over all that they depend on."""
    spec = index.dataset
    own = entry.records.labels_sha256() if entry.records else ""  # a TFRecord file's
    hashes = {
        "phase_sha256": entry.phase_file.sha256 if entry.phase_file else own,
        "tool_sha256": entry.tool_file.sha256 if entry.tool_file else own,
    }
    described = {"annotation_fps", "phases", "tools", "phase_aliases", "tool_aliases"}
    meaning = spec.model_dump(mode="json", include=described)
    return {
        **hashes,
        "dataset": spec.name,
        "phases": json.dumps(spec.phases),
        "tools": json.dumps(spec.tools),
        "tools_between_rows": config.data.tools_between_rows,
        "labels_sha256": sha256_json([hashes, meaning, config.data.tools_between_rows]),
    }


# ---------------------------------------------------------------------------------------------- one video


@dataclass
class ExtractTask:
    """Writes one video's feature file, or its labels alone. Each process loads the encoder for itself."""

    config: Config
    run: Path | None
    index: Index
    root: Path
    folder: Path
    spec: EncoderSpec
    trusted: bool
    encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoder": None}

    def __call__(self, job: VideoJob, advance: Advance) -> None:
        """Raises UserError naming the frame or file at fault; nothing is left behind then."""
        config, index = self.config, self.index
        entry = index.entry(job.video_id)
        path = feature_path(self.folder, entry.id)
        frame_index = sampled_frames(entry, config.data.fps)  # (T,)
        phase, tools = load_labels(entry, self.root, index, frame_index, config.data.tools_between_rows)
        labels = label_attributes(config, index, entry)
        if job.labels_only:
            rewrite_labels(path, phase, tools, labels)
            return
        encoder = self._encoder()
        require_free_bytes(self.folder, estimate_bytes([job.frames], encoder.spec), "the features")
        with _one_thread(encoder.device), open_pictures(config, entry, self.root, index) as pictures:
            attributes = {**labels, **pictures.provenance, "device": encoder.device_name}
            source = source_identity(entry)
            with write_features(path, encoder.spec, source, frame_index, phase, tools, attributes) as writer:
                crops = crop_batches(pictures.frames, config.extract.batch_frames, config.preprocess.crop_px)
                for batch in crops:
                    with np.errstate(over="ignore"):  # the writer says in words what does not fit
                        writer.append(*encoder(batch))
                    advance(len(batch))

    def _encoder(self) -> Encoder:
        if self.encoder is None:
            self.encoder = load_encoder(self.config, self.run, self.index.dataset.tools, self.trusted)
            if self.encoder.spec.digest != self.spec.digest:
                raise UserError("the encoder's weights have changed since the start; start again")
        return self.encoder


def crop_batches(pictures: Iterable[NDArray[np.uint8]], batch_frames: int, crop_px: int) -> Iterator[NDArray[np.uint8]]:
    """Centre crops (N, S, S, 3) of resized frames (R, R, 3), cut every `batch_frames` from the first one on."""
    for batch in picture_batches(pictures, batch_frames):
        yield crop_frames(batch, crop_px)[:, 0]


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """One thread on a CPU, however many processes there are: sums are then always made in the same order."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
