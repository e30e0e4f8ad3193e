"""Make a feature folder of features that another program computed.

The files are first looked at (`interop.feature_files.survey`). Only then is the folder written, one video after the
other, as `extract` writes it; the index comes last, so that a folder with an index is complete. What a row shows
follows from its number and the rate that the user names, and the provenance says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, listed
from configs.load import load_dataset
from configs.schema import Config
from engine.files import read_json_object, sha256_json, write_json
from engine.progress import BAR_AFTER_S, progress_bar, say
from engine.stopping import StopRequest
from features.dataset.catalogue import data_root, say_left_out
from features.dataset.index import Dataset, Index, LeftOut, VideoEntry, exclusions, first_fault
from features.dataset.labels import sampled_labels
from features.dataset.sampling import frame_times_s, sampled_frames
from features.dataset.splits import Split, assign_splits, rule_asked_for, usual_split_problem
from features.ids import natural_key
from features.store import (
    IMPORTED,
    EncoderSpec,
    SourceIdentity,
    feature_path,
    read_features,
    rewrite_labels,
    verify_file,
    write_features,
)
from features.store_folder import ENCODER_FILE, INDEX_FILE, prepare_folder
from features.video_labels import NO_LABEL, VideoLabels
from interop.feature_files import mstcn
from interop.feature_files.arrays import open_features
from interop.feature_files.export import EXPORT_FILE, read_export
from interop.feature_files.found import PROGRAMS, Found, divided, find_features, ids_of_files
from interop.feature_files.labels import LabelReader
from interop.feature_files.survey import (
    Request,
    SurveyedVideo,
    common_length,
    file_identity,
    rate_of,
    require_values,
    say_cuts,
    time_axis,
)

BLOCK_BYTES = 32 << 20


@dataclass
class ImportReport:
    """What one import did: ids by outcome and what is to be said about the whole."""

    folder: Path
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    frames: int = 0
    stored: str = ""

    def sentence(self) -> str:
        """The outcome in one line."""
        counts = {"unchanged": len(self.skipped), "with new labels only": len(self.relabelled)}
        others = "".join(f", {count} {word}" for word, count in counts.items() if count)
        return f"{len(self.done)} video(s) imported ({self.frames:,} frames, {self.stored}){others}; {self.folder}"


def import_features(place: Path, out: Path, config: Config, request: Request, stop: StopRequest) -> ImportReport:
    """Write the features at `place`, a folder or a file of another program, as a feature folder.

    Splits are those of the index, of the bundles, or those that `data.split` asks for. Videos that were imported before
    from the same files are kept. Raises UserError, before anything is written, if `out` is where the files are, if they
    do not agree on D, if it cannot be told which axis is time, if the lengths of features and labels differ by more
    than a second, or if the folder holds other features; and naming file and frame if a value is not finite.
    """
    _require_outside(place, out)
    found = find_features(place, request.layout)
    say(f"{found.root}: {len(found.files)} file(s) of features ({PROGRAMS.get(found.layout, found.format)})")
    job = _Job(found, config, request)
    videos = job.survey(stop)
    axes = time_axis(videos, found, request, job.slack)
    lengths = {video.id: common_length(video, axes, request.every, job.slack) for video in videos}
    say_cuts(videos, axes, lengths, request.every)
    index, encoder = job.index(videos, axes, lengths), job.encoder(videos, axes)
    _require_same_encoder(out, encoder)
    say_left_out(index)
    stored = f"{encoder.embedding_dim} values each, {encoder.storage}, {encoder.fps:g} per second"
    report = ImportReport(out, left_out=index.left_out_records(), stored=stored)
    prepare_folder(out, list(lengths.values()), encoder)
    write_json(out / ENCODER_FILE, {**encoder.to_json(), "digest": encoder.digest, IMPORTED: job.provenance(videos)})
    with progress_bar(sum(lengths.values()), "import", "frame", delay=BAR_AFTER_S) as bar:
        for video in videos:
            stop.raise_if_set()
            entry, labels = index.entry(video.id), job.labels(index.entry(video.id), video, lengths[video.id])
            outcome = _write(out, video, entry, labels, encoder, job, axes, bar, stop)
            getattr(report, outcome).append(video.id)
            report.frames += len(labels.frame_index) if outcome == "done" else 0
    index.save(out / INDEX_FILE)
    return report


def _require_outside(place: Path, out: Path) -> None:
    """Raise UserError if features would be written among the files that are read, and read by the next import."""
    source, target = place.resolve(), out.resolve()
    if target == (source.parent if place.is_file() else source) or (place.is_dir() and source in target.parents):
        raise UserError(f"--out {out}: is where the files at {place} are; name a folder outside of it")


class _Job:
    """One import: its files, and what the user says about them."""

    def __init__(self, found: Found, config: Config, request: Request) -> None:
        self.found, self.request = found, request
        export = read_export(found.root / EXPORT_FILE)
        self.rate = rate_of(found, request, export.fps)
        self.fps = self.rate / request.every
        self.data = config.data.model_copy(update={"fps": self.fps})
        self.config, self.storage = config, config.extract.storage
        self.base = None if request.index is None else Index.load(request.index)
        if self.base is not None and request.index is not None:
            self.base.require_excluded(config.data.exclude, request.index)
        elif request.labels == "index":
            raise UserError("--labels index: give the index with --index FILE")
        self.spec = self._described(config)
        self.found = found = divided(found, self.spec)
        self.files, self.strangers = ids_of_files(found, self.spec, self.base, export.videos)
        if self.strangers:
            say(f"note: not imported, since the index has no such video: {listed(self.strangers, 10)}")
        self.excluded = exclusions(list(self.files), config.data.exclude) if self.base is None else {}
        labels = request.labels or ("files" if self.base is None else "index")
        self.reader = LabelReader(found, self.spec, labels, request.phase_order)
        self.slack = max(1, round(self.fps))  # features and labels may differ in length by a second

    def _described(self, config: Config) -> DataSetSpec:
        """The classes: those of the index, of the description that the user names, or of `mapping.txt`."""
        if self.base is not None:
            return self.base.dataset
        if self.request.dataset is not None:
            return load_dataset(self.request.dataset)
        if self.found.mapping is not None:
            return mstcn.spec_of_mapping(self.found.mapping, self.found.root.resolve().name, self.rate)
        raise UserError(
            f"{self.found.root}: says nothing about classes; name the data set with --dataset NAME (or its "
            "description, --dataset FILE.yaml), or give an index with --index FILE"
        )

    def survey(self, stop: StopRequest) -> list[SurveyedVideo]:
        """Look at every file: its shape, its labels, and which frames an indexed video has for it."""
        kept = [(name, file) for name, file in self.files.items() if name not in self.excluded]
        videos = []
        with progress_bar(len(kept), "read", "file", delay=BAR_AFTER_S) as bar:
            for name, file in kept:
                stop.raise_if_set()
                frames = sampled_frames(self.base.entry(name), self.fps) if self.base is not None else None
                with open_features(file.path, self.found.format, self.request.key, file.rows) as content:
                    require_values(content)
                    labels, dtype = self.reader.read(name, file, content), str(content.features.dtype)
                    videos.append(SurveyedVideo(name, file, file_identity(file), content.shape, dtype, labels, frames))
                bar.update(1)
        if not videos:
            raise UserError(f"{self.found.root}: data.exclude leaves out all {len(self.files)} videos; keep some")
        self.reader.say_found([video.id for video in videos if video.labels.phase is not None], len(videos))
        return videos

    # ------------------------------------------------------------------------------------------ the index

    def index(self, videos: Sequence[SurveyedVideo], axes: str, lengths: Mapping[str, int]) -> Index:
        """The index of the folder: the given one without the videos that have no features, or a new one."""
        if self.base is not None:
            missing = [entry.id for entry in self.base.videos if entry.id not in self.files]
            return self.base.without((name, f"no features of it in {self.found.root.name}") for name in missing)
        notes: list[str] = [
            f"features imported from {PROGRAMS.get(self.found.layout, self.found.format)} files: frame numbers and "
            f"times follow from row numbers at {self.rate:g} rows per second"
        ]
        splits, absent = self._splits([*(video.id for video in videos), *self.excluded], notes)
        for note in notes[1:]:
            say(f"note: {note}")
        left_out = [LeftOut(id=one, reason=why, split=splits[one], excluded=True) for one, why in self.excluded.items()]
        left_out += [LeftOut(id=name, reason="no file of features", split=split) for name, split in absent.items()]
        try:
            entries = tuple(self._entry(video, axes, lengths[video.id], splits[video.id]) for video in videos)
            return Index(dataset=self.spec, videos=entries, notes=tuple(notes), left_out=tuple(left_out))
        except ValidationError as error:
            raise UserError(f"{self.found.root}: cannot be indexed: {first_fault(error)}") from error

    def _splits(self, ids: Sequence[str], notes: list[str]) -> tuple[dict[str, Split], dict[str, Split]]:
        """The split of each video, and of the videos in bundles for which there is no file."""
        asked, folder = rule_asked_for(self.data.split), self.found.bundles
        if self.request.split is not None and (folder is None or asked is not None):
            why = "there are no bundles" if folder is None else f"data.split asks for {asked}"
            raise UserError(f"--split {self.request.split}: {why}; leave one of them out")
        parts = {name: file.pickled.split for name, file in self.files.items() if file.pickled is not None}
        if parts and asked is None:
            return {name: parts[name] for name in ids}, {}
        if folder is None or asked is not None:
            ids = sorted(ids, key=natural_key)
            if problem := usual_split_problem(ids, self.spec, self.data.split):
                notes.append(f"no splits assigned, since the usual one of {self.spec.name} does not fit: {problem}")
            return assign_splits(ids, self.spec, self.data.split), {}
        by_name = {file.path.stem: name for name, file in self.files.items()}
        bundles = mstcn.read_bundles(folder, self.request.split)
        named = {by_name.get(stem, stem): split for stem, split in bundles.items()}
        return {name: named.get(name, "none") for name in ids}, {n: s for n, s in named.items() if n not in self.files}

    def _entry(self, video: SurveyedVideo, axes: str, length: int, split: Split) -> VideoEntry:
        state = video.file.path.stat()
        return VideoEntry(
            id=video.id,
            kind="features",
            source=video.file.path.relative_to(self.found.root).as_posix(),
            size_bytes=state.st_size,
            modified_ns=state.st_mtime_ns,
            sha256_ends=video.sha256_ends,
            fps=self.rate,
            frame_count=min(video.rows(axes), length * self.request.every),
            split=split,
            phase_file=video.labels.file,
        )

    # ------------------------------------------------------------------------------------------ what is written

    def labels(self, entry: VideoEntry, video: SurveyedVideo, length: int) -> VideoLabels:
        """The labels of the first `length` samples of a video, with their frames and times."""
        if self.reader.source == "index" and self.base is not None:
            root = data_root(self.config) if entry.annotation_files else self.found.root
            given = sampled_labels(Dataset(self.base, root), entry, self.data)
            tracks = {name: values[:length] for name, values in given.tracks.items()}
            cut = (given.frame_index[:length], given.time_s[:length], given.phase[:length], given.tools[:length])
            return VideoLabels(*cut, tracks=tracks)
        every, tools = self.request.every, len(self.spec.tools)
        rows = np.arange(length, dtype=np.int64) * every
        frames = rows if video.frame_index is None else video.frame_index[:length]
        return VideoLabels(
            frames,
            frame_times_s(entry, frames),
            np.full(length, NO_LABEL, np.int8) if video.labels.phase is None else video.labels.phase[rows],
            np.full((length, tools), NO_LABEL, np.int8) if video.labels.tools is None else video.labels.tools[rows],
            tracks={name: np.full(length, NO_LABEL, np.int8) for name in self.spec.tracks},
        )

    def encoder(self, videos: Sequence[SurveyedVideo], axes: str) -> EncoderSpec:
        """What stands for the unknown encoder: the name that the user gives it, or else the files themselves."""
        program, named = PROGRAMS.get(self.found.layout, "unknown"), self.request.encoder
        files = {video.id: video.sha256_ends for video in videos}
        made_by = {"encoder": named} if named else {"program": program, "format": self.found.format}
        return EncoderSpec(
            backbone=IMPORTED if named else f"{IMPORTED}-{self.found.layout}",
            weights_sha256=sha256_json(named or files),
            preprocess={IMPORTED: made_by},
            fps=self.fps,
            precision="unknown",
            storage=self.storage,
            embedding_dim=videos[0].shape[axes.index("D")],
            arithmetic=IMPORTED,
        )

    def provenance(self, videos: Sequence[SurveyedVideo]) -> dict[str, Any]:
        """What `encoder.json` says about the import."""
        return {
            "program": PROGRAMS.get(self.found.layout, "unknown"),
            "format": self.found.format,
            "rows_per_second": self.rate,
            "every": self.request.every,
            "times": "row number / rows_per_second" if self.base is None else "sampled frames of the indexed videos",
            "labels": self.reader.source,
            "files": {
                one.id: {"path": one.file.path.relative_to(self.found.root).as_posix(), "sha256_ends": one.sha256_ends}
                for one in videos
            },
        }

    def attributes(self, video: SurveyedVideo, labels: VideoLabels) -> dict[str, Any]:
        """The attributes of a feature file besides its encoder and source."""
        about = {"file": video.file.path.name, "dtype": video.dtype, "labels": self.reader.source}
        tracks = {name: track.classes for name, track in self.spec.tracks.items()}
        others = [tracks, *(labels.tracks[name].tolist() for name in tracks)] if tracks else []
        digest = sha256_json([labels.phase.tolist(), labels.tools.tolist(), self.spec.phases, self.spec.tools, *others])
        return {
            "dataset": self.spec.name,
            "phases": json.dumps(self.spec.phases),
            "tools": json.dumps(self.spec.tools),
            **({"tracks": json.dumps(tracks)} if tracks else {}),
            "tools_between_rows": self.data.tools_between_rows,
            "labels_sha256": digest,
            "reader": IMPORTED,
            "frames_from": f"features of another program ({self.found.format})",
            "imported_from": json.dumps(about),
            "imported_sha256_ends": video.sha256_ends,
        }


def _require_same_encoder(out: Path, encoder: EncoderSpec) -> None:
    path = out / ENCODER_FILE
    if path.exists() and read_json_object(path).get("digest") != encoder.digest:
        raise UserError(
            f"{out}: holds features of another encoder, of other files or at another rate; choose another --out, or "
            "name the encoder of both with --encoder NAME from the first import on"
        )


# ---------------------------------------------------------------------------------------------- one video


def _write(
    out: Path,
    video: SurveyedVideo,
    entry: VideoEntry,
    labels: VideoLabels,
    encoder: EncoderSpec,
    job: _Job,
    axes: str,
    bar: Any,
    stop: StopRequest,
) -> str:
    """Write one video's feature file, unless there is one; returns the report's list for the video."""
    path, source = feature_path(out, video.id), SourceIdentity(entry.id, entry.sha256_ends, entry.size_bytes, entry.fps)
    attributes = job.attributes(video, labels)
    state = _state(path, encoder, source, labels, attributes)
    if state != "done":
        bar.update(len(labels.frame_index))
        if state == "relabelled":
            rewrite_labels(path, labels.phase, labels.tools, attributes, labels.tracks)
        return state
    no_logits = np.full(labels.tools.shape, np.nan, np.float32)
    with (
        open_features(video.file.path, job.found.format, job.request.key, video.file.rows) as content,
        write_features(
            path,
            encoder,
            source,
            labels.frame_index,
            labels.phase,
            labels.tools,
            attributes,
            labels.time_s,
            labels.tracks,
        ) as writer,
    ):
        size = max(1, BLOCK_BYTES // (4 * encoder.embedding_dim))
        for start in range(0, len(labels.frame_index), size):
            stop.raise_if_set()
            stop_at = min(start + size, len(labels.frame_index))
            rows = slice(start * job.request.every, (stop_at - 1) * job.request.every + 1, job.request.every)
            values = content.frames(axes, rows)
            _require_finite(values, video.file.path, start, job.request.every)
            writer.append(values, no_logits[start:stop_at])
            bar.update(stop_at - start)
    return "done"


def _state(
    path: Path, encoder: EncoderSpec, source: SourceIdentity, labels: VideoLabels, attributes: Mapping[str, Any]
) -> str:
    """`skipped` if the file is there with the same features and labels, `relabelled` with other labels, or `done`."""
    if not path.exists():
        return "done"
    problem = verify_file(path, encoder, source)
    if problem is None:
        there = read_features(path, with_features=False)
        same = np.array_equal(there.frame_index, labels.frame_index) and np.array_equal(there.time_s, labels.time_s)
        same = same and there.attributes.get("imported_sha256_ends") == attributes["imported_sha256_ends"]
        problem = None if same else "holds other frames, or was made of another file"
        if same:
            return "skipped" if there.attributes.get("labels_sha256") == attributes["labels_sha256"] else "relabelled"
    say(f"{path.name}: {problem}; imported again")
    return "done"


def _require_finite(values: NDArray[Any], path: Path, start: int, every: int) -> None:
    odd = np.argwhere(~np.isfinite(values))
    if len(odd):
        row, column = map(int, odd[0])
        raise UserError(
            f"{path}: frame {(start + row) * every} (counted from 0) holds {values[row, column]} in feature {column}; "
            "compute it again, or leave the video out with data.exclude"
        )
