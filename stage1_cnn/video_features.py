"""Writing one video's feature file with one encoder: the embeddings of its frames and its labels.

A file is written all at once or from parts.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.schema import Config
from engine.device import cpu_threads
from engine.files import require_free_bytes, sha256_json
from features.dataset.index import Dataset, VideoEntry
from features.dataset.labels import sampled_labels
from features.frames.source import can_start_inside, source_identity
from features.store import EncoderSpec, FeatureWriter, feature_path, rewrite_labels, write_features
from features.store_folder import estimate_bytes
from features.video_labels import VideoLabels
from stage1_cnn.encoders.calibration import FromTrainingFrames
from stage1_cnn.encoders.encoder import Encoder, encoded_at_once, load_encoder
from stage1_cnn.segments import Rows, VideoJob, places_of, read_part, read_provenance, write_part


@dataclass
class EncoderTask:
    """What one encoder does with a video: write its feature file, or only the labels in it.

    When the task is sent to another process, its encoder goes with it, so that it is folded and hashed only once. If
    the encoder cannot be sent, the other process loads its own.
    """

    config: Config
    run: Path | None
    dataset: Dataset
    folder: Path
    spec: EncoderSpec
    trusted: bool
    encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoder": self._sent_encoder()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        encoder = None
        if state["encoder"] is not None:
            # a plug-in's module exists only after the registry has imported it; `loaded_encoder` then loads the encoder
            with suppress(ImportError, AttributeError):
                encoder = pickle.loads(state["encoder"])  # noqa: S301 - pickled by `_sent_encoder`
        self.__dict__.update({**state, "encoder": encoder})

    def _sent_encoder(self) -> bytes | None:
        """The encoder as bytes, or None if it cannot be sent.

        Tensors would be sent through shared memory, and a container may have too little of it for a net.
        """
        if self.encoder is None or self.config.extract.compile:
            return None
        try:
            return pickle.dumps(self.encoder)
        except (pickle.PicklingError, AttributeError, TypeError):  # a network from outside this project
            return None

    def relabel(self, job: VideoJob) -> None:
        """Rewrite the labels in a video's feature file. Raises UserError if they cannot be read or written."""
        entry = self.dataset.index.entry(job.video_id)
        labels, attributes = self._labels(job), label_attributes(self.config, self.dataset.spec, entry)
        rewrite_labels(feature_path(self.folder, entry.id), labels.phase, labels.tools, attributes, labels.tracks)

    def write(self, job: VideoJob, labels: VideoLabels, provenance: Mapping[str, str]) -> Generator[None, Any, None]:
        """Write the rows of one job while its frames arrive, mixed with those of other jobs and for other encoders.

        `send` takes None to start, then batches of resized frames (N, R, R, 3) uint8, and then None, which completes
        the file. If the generator is closed before that, or raises UserError naming what is at fault, no file is left.
        """
        self.loaded_encoder()  # errors of the encoder come before any work
        self.require_room(job)
        with self._sink(job, labels, provenance) as rows:
            while (frames := (yield)) is not None:
                self._encode(frames, rows)
                del frames  # otherwise every open file would keep a batch in shared memory
        yield

    def _encode(self, frames: NDArray[np.uint8] | torch.Tensor, rows: Rows) -> None:
        """Append the embeddings and tool logits of resized frames (N, R, R, 3) uint8 to `rows`."""
        encoder = self.loaded_encoder()
        # On a CPU always one thread, whatever the number of processes, so that sums are added in the same order.
        one_thread = cpu_threads(1) if encoder.device.type == "cpu" else nullcontext()
        with one_thread, np.errstate(over="ignore"):  # `rows` reports values that float16 cannot hold
            rows.append(*encoder(frames))

    def _sink(self, job: VideoJob, labels: VideoLabels, provenance: Mapping[str, str]) -> AbstractContextManager[Rows]:
        """The destination of a job's rows: the video's feature file or, if the job is a part, the file of the part."""
        if job.part is not None:
            return write_part(job.part, feature_path(self.folder, job.video_id), provenance)
        return self._file(job, labels, provenance)

    def assemble(self, video: VideoJob, parts: Sequence[VideoJob]) -> None:
        """Write a video's feature file from the rows of its parts, as if one process had computed them.

        Raises UserError if labels cannot be read or the file cannot be written.
        """
        places = places_of(parts)
        dim, tools, at_once = self.spec.embedding_dim, len(self.dataset.spec.tools), encoded_at_once(self.config)
        with self._file(video, self._labels(video), read_provenance(places[0])) as rows:
            for place in places:
                for features, logits in read_part(place, dim, tools, at_once):
                    rows.append(features, logits)

    def _file(
        self, video: VideoJob, labels: VideoLabels, provenance: Mapping[str, str]
    ) -> AbstractContextManager[FeatureWriter]:
        entry = self.dataset.index.entry(video.video_id)
        attributes = {**label_attributes(self.config, self.dataset.spec, entry), **provenance}
        attributes["device"] = self.loaded_encoder().device_name
        path, source = feature_path(self.folder, entry.id), source_identity(entry)
        return write_features(
            path,
            self.spec,
            source,
            labels.frame_index,
            labels.phase,
            labels.tools,
            attributes,
            labels.time_s,
            labels.tracks,
        )

    def _labels(self, job: VideoJob) -> VideoLabels:
        return sampled_labels(self.dataset, self.dataset.index.entry(job.video_id), self.config.data)

    def require_room(self, job: VideoJob) -> None:
        """Raise NoRoomError if the disk has no room for the job's features."""
        # a part is stored in float32 first, which takes twice the size of its features
        needed = estimate_bytes([job.frames], self.spec) * (3 if job.part else 1)
        require_free_bytes(self.folder, needed, "the features")

    def may_split(self, job: VideoJob) -> bool:
        """Whether a part of this job's video can be read without decoding all frames before it."""
        return can_start_inside(self.dataset.index.entry(job.video_id), self.dataset.root)

    def loaded_encoder(self) -> Encoder:
        """The encoder, which is loaded on first use if none was sent.

        Raises UserError if its weights have changed since the start of the extraction.
        """
        if self.encoder is None:
            int8 = FromTrainingFrames(self.config, self.dataset)
            self.encoder = load_encoder(self.config, self.run, self.dataset.spec.tools, self.trusted, int8)
            if self.encoder.spec.digest != self.spec.digest:
                raise UserError("the encoder's weights have changed since the start; start again")
        return self.encoder


def label_attributes(config: Config, spec: DataSetSpec, entry: VideoEntry) -> dict[str, str]:
    """The attributes that identify the labels of a feature file.

    `labels_sha256` is a hash of everything on which the labels depend.
    """
    own = entry.records.labels_sha256() if entry.records else ""  # a TFRecord file contains its labels
    hashes = {
        "phase_sha256": entry.phase_file.sha256 if entry.phase_file else own,
        "tool_sha256": entry.tool_file.sha256 if entry.tool_file else own,
    }
    described = {"annotation_fps", "phases", "tools", "phase_aliases", "tool_aliases", "labels", "tracks"}
    meaning = spec.model_dump(mode="json", include=described)
    others = {name: entry.track_files.get(name) for name in spec.tracks}
    numbered = [
        file and [file.row_fps, file.row_base] for file in (entry.phase_file, entry.tool_file, *others.values())
    ]
    numbered = numbered if any(file and any(file) for file in numbered) else []
    if others:
        hashes["tracks_sha256"] = json.dumps({name: file.sha256 if file else "" for name, file in others.items()})
    return {
        **hashes,
        "dataset": spec.name,
        "phases": json.dumps(spec.phases),
        "tools": json.dumps(spec.tools),
        "tools_between_rows": config.data.tools_between_rows,
        "labels_sha256": sha256_json([hashes, meaning, config.data.tools_between_rows, *numbered]),
        **({"tracks": json.dumps({name: track.classes for name, track in spec.tracks.items()})} if others else {}),
    }
