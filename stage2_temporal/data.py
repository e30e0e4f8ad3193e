"""The features that a training uses, and how an epoch divides them into sequences.

The features of all videos form one table (`FeatureBank`), in memory or in their files. A batch (`Batch`) is a set of
ranges of the table's rows. Each range lies within one video, so that frames stay in order and no sequence spans two
videos. The batches of an epoch depend on (seed, epoch) alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import schema
from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.schema import MAIN_TRACK, SequenceConfig
from engine.device import sent_to
from engine.files import sha256_json
from engine.launch import ranks_here
from engine.memory import available_bytes
from engine.progress import say
from engine.runs import require_same_classes
from engine.session import epoch_generator
from features.dataset.index import Index
from features.dataset.labels import unlabelled_note
from features.dataset.sampling import in_whole_steps
from features.store import FeatureFileError, StoredFeatures, VideoFeatures, feature_path, recorded_encoder
from features.store_folder import INDEX_FILE, load_feature_set, usable_index
from features.video_labels import NO_LABEL
from stage2_temporal.streaming import StreamedFeatures, ahead

# The part of the available memory that features may take. While they are read, they briefly take twice as much.
MEMORY_SHARE = 0.4
# The lengths of the videos in a batch differ by about this factor at most. So there is little padding, but videos are
# combined differently in every epoch.
LENGTH_JITTER = 1.5
_STATISTICS_ROWS = 256


@dataclass(frozen=True)
class Span:
    """The range of rows in a `FeatureBank` that belong to one video."""

    first: int
    frames: int

    @property
    def rows(self) -> slice:
        """The rows as a slice of the table."""
        return slice(self.first, self.first + self.frames)


@dataclass(frozen=True)
class FeatureBank:
    """The features and labels of several videos, concatenated.

    Features keep the type in which they are stored (fp16 by default). This halves the memory, and converting a batch
    costs less than 2 % of its step.
    """

    features: Tensor | StreamedFeatures  # (N, D) as stored
    labels: Tensor  # (L, N) int64 of each label track, phases first; -1 = no label
    spans: tuple[Span, ...]
    ids: tuple[str, ...]

    @classmethod
    def of(
        cls, videos: Mapping[str, VideoFeatures], tool_logits: bool = False, tracks: Sequence[str] = (MAIN_TRACK,)
    ) -> FeatureBank:
        """Copy the videos' arrays into one table on the CPU, with the labels of `tracks`.

        With `tool_logits` each row ends with the frame's tool logits (see `with_tool_logits`); raises UserError naming
        a video that has none.
        """
        arrays = [torch.from_numpy(np.asarray(video.features)) for video in videos.values()]
        if tool_logits:
            logits = [torch.from_numpy(video.tool_logits) for video in videos.values()]
            arrays = [with_tool_logits(x, z, name) for x, z, name in zip(arrays, logits, videos, strict=True)]
        return cls._with(torch.cat(arrays) if len(arrays) > 1 else arrays[0], videos, tracks)

    @classmethod
    def streamed(cls, videos: Mapping[str, VideoFeatures], tracks: Sequence[str] = (MAIN_TRACK,)) -> FeatureBank:
        """A table whose features stay in the videos' files."""
        stored = [video.features for video in videos.values() if isinstance(video.features, StoredFeatures)]
        return cls._with(StreamedFeatures(stored), videos, tracks)

    @classmethod
    def _with(
        cls, features: Tensor | StreamedFeatures, videos: Mapping[str, VideoFeatures], tracks: Sequence[str]
    ) -> FeatureBank:
        spans, first = [], 0
        for video in videos.values():
            spans.append(Span(first, len(video)))
            first += len(video)
        return cls(
            features=features,
            labels=torch.stack(
                [torch.cat([torch.from_numpy(v.of_track(name)).long() for v in videos.values()]) for name in tracks]
            ),
            spans=tuple(spans),
            ids=tuple(videos),
        )

    def to(self, device: torch.device) -> FeatureBank:
        """The same bank on another device."""
        return replace(self, features=self.features.to(device), labels=self.labels.to(device))

    @property
    def embedding_dim(self) -> int:
        """The width of a row: D, or D + K with tool logits."""
        return self.features.shape[1]

    def span_of(self, video_id: str) -> Span:
        """The rows of one video."""
        return self.spans[self.ids.index(video_id)]

    def labels_of(self, span: Span) -> Tensor:
        """Labels (L, T) of one video."""
        return self.labels[:, span.rows]

    def phase_of(self, span: Span) -> Tensor:
        """Phases (T,) of one video."""
        return self.labels[0, span.rows]

    def gather(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch's features (B, T, D), in the stored type, and labels (L, B, T).

        Padding has label -1 and arbitrary features.
        """
        rows = batch.rows_on(self.features.device)  # (B, T)
        labels = torch.stack([take(track, rows) for track in self.labels])
        return take(self.features, rows), labels.masked_fill(rows < 0, NO_LABEL)

    def gathered(
        self, shares: Iterable[tuple[Batch, bool]]
    ) -> Iterator[tuple[tuple[Batch, bool], tuple[Tensor, Tensor]]]:
        """Yield each of `shares` (return values of `Batch.share`) with the result of `gather` for its batch."""
        return ahead(self.features, shares, lambda share: self.gather(share[0]))

    def numbers(self, batch: Batch) -> list[int]:
        """The number of the video of each sequence in a batch."""
        first = [span.first for span in self.spans]
        return [sum(row >= start for start in first) - 1 for row in batch.first.tolist()]

    def names(self, batch: Batch) -> str:
        """The ids of the videos in a batch, comma-separated."""
        return ", ".join(sorted({self.ids[number] for number in self.numbers(batch)}))

    def statistics(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (D,) over all frames of `spans`, in float64.

        Computed by NumPy on one thread, which takes 0.2 s for a whole data set. On a machine whose other cores are
        busy, small blocks on several threads would wait for each other for seconds.
        """
        total, squares = np.zeros(self.embedding_dim), np.zeros(self.embedding_dim)
        for span in spans:
            values = self.features[span.rows].cpu().numpy()
            for start in range(0, span.frames, _STATISTICS_ROWS):
                wide = values[start : start + _STATISTICS_ROWS].astype(np.float64)
                total += wide.sum(axis=0)
                squares += np.einsum("td,td->d", wide, wide)
        frames = sum(span.frames for span in spans)
        mean = total / frames
        std = np.sqrt(np.maximum(squares / frames - mean**2, 0))
        return torch.from_numpy(mean), torch.from_numpy(std)


def take(table: Tensor | StreamedFeatures, rows: Tensor) -> Tensor:
    """The values (B, T, ...) of the rows (B, T) of a table (N, ...); rows -1 (padding) get arbitrary values."""
    if isinstance(table, StreamedFeatures):
        return table.take(rows)
    return table.index_select(0, rows.clamp(min=0).flatten()).view(*rows.shape, *table.shape[1:])


def with_tool_logits(features: Tensor, tool_logits: Tensor, where: str) -> Tensor:
    """The input of stage two with `temporal.tool_logits`: features (T, D) and tool logits (T, K) -> (T, D + K).

    The result has the type of `features`. `where` names the features in messages. Raises UserError if there are no
    logits, or if some are not finite.
    """
    return torch.cat([features, fitting_tool_logits(tool_logits, features.dtype, where)], dim=1)


def fitting_tool_logits(tool_logits: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Tool logits (T, K) converted to `dtype`, the type of the features.

    Raises UserError if there are no logits, or if some are not finite.
    """
    stored = tool_logits.to(dtype)
    if not stored.shape[1] or not bool(torch.isfinite(stored).all()):
        raise UserError(
            f"{where}: no tool logits, since its encoder has no trained tool head; use features of a trained stage "
            "one, or set temporal.tool_logits=false"
        )
    return stored


# ---------------------------------------------------------------------------------------------- sequences


@dataclass(frozen=True)
class Batch:
    """Sequences that are computed together.

    If `fresh`, they start with zero state. Otherwise sequence i continues sequence i of the previous batch. The
    previous batch may have more sequences, whose videos have ended.
    """

    first: Tensor  # (B,) int64, row of each sequence's first frame
    lengths: Tensor  # (B,) int64
    fresh: bool = True

    @property
    def rows(self) -> Tensor:
        """The rows (B, T) of the bank that the sequences consist of; -1 is padding, at the end of a sequence only."""
        return self.rows_on(torch.device("cpu"))

    def rows_on(self, device: torch.device) -> Tensor:
        """The same as `rows`, computed on `device`."""
        first, lengths = (sent_to(device, values)[:, None] for values in (self.first, self.lengths))
        offsets = torch.arange(int(self.lengths.max()), device=device)
        return torch.where(offsets < lengths, first + offsets, -1)

    def __len__(self) -> int:
        return len(self.first)

    def share(self, rank: int, count: int) -> tuple[Batch, bool]:
        """The part of the batch that rank `rank` of `count` computes, and whether its frames count.

        The part is every `count`-th sequence, so lengths are similar on all ranks. Since the shortest videos come last,
        each rank keeps its videos from chunk to chunk until they end. All ranks must take part in every step: a rank
        without a part computes the batch's first sequence, and the frames of this one must not count.
        """
        if rank >= len(self):
            return Batch(self.first[:1], self.lengths[:1]), False
        return Batch(self.first[rank::count], self.lengths[rank::count], self.fresh), True


def epoch_batches(spans: Sequence[Span], config: SequenceConfig, seed: int, epoch: int) -> list[Batch]:
    """The batches of one epoch, in order; they depend on the arguments alone.

    The sequences are defined by `config.mode`. `full`: whole videos. `chunked`: `batch` videos advance together,
    `frames` at a time, and each leaves the batch when it ends. `clips`: clips of `frames` consecutive frames that start
    at 0, stride, 2 stride, ... <= T - frames, in random order (MTRCNet has stride 1); a video shorter than `frames` is
    one shorter clip. In `full` and `chunked` every frame is used exactly once.
    """
    generator = epoch_generator(seed, epoch)
    if config.mode == "clips":
        return clip_batches(spans, config.frames, config.stride, config.batch, generator)
    groups = group_by_length(spans, config.batch, generator)
    if config.mode == "full":
        return [_batch(group) for group in groups]
    return [batch for group in groups for batch in chunk_batches(group, config.frames)]


def group_by_length(spans: Sequence[Span], size: int, generator: torch.Generator | None) -> list[list[Span]]:
    """Groups of at most `size` videos of similar length; in each group the longest video comes first.

    With a generator, videos are sorted by their length times a random factor between 1 and `LENGTH_JITTER`, and the
    groups are shuffled.
    """
    length = torch.tensor([float(span.frames) for span in spans])
    if generator is not None:
        length = length * LENGTH_JITTER ** torch.rand(len(spans), generator=generator)
    order = [spans[i] for i in torch.argsort(length, descending=True, stable=True).tolist()]
    groups = [
        sorted(order[i : i + size], key=lambda span: span.frames, reverse=True) for i in range(0, len(order), size)
    ]
    if generator is None:
        return groups
    return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]


def chunk_batches(group: Sequence[Span], frames: int) -> Iterator[Batch]:
    """The batches of a group (longest video first): the next `frames` frames of all its videos that have not ended."""
    for start in range(0, group[0].frames, frames):
        active = [Span(span.first + start, min(frames, span.frames - start)) for span in group if span.frames > start]
        yield _batch(active, fresh=start == 0)


def clip_batches(
    spans: Sequence[Span], frames: int, stride: int, size: int, generator: torch.Generator | None
) -> list[Batch]:
    """All clips of the videos, in batches of `size` clips; in random order if there is a generator."""
    starts = [torch.arange(span.first, span.first + max(1, span.frames - frames + 1), stride) for span in spans]
    first = torch.cat(starts)
    lengths = torch.cat([torch.full_like(s, min(frames, span.frames)) for s, span in zip(starts, spans, strict=True)])
    if generator is not None:
        order = torch.randperm(len(first), generator=generator)
        first, lengths = first[order], lengths[order]
    return [Batch(f, n) for f, n in zip(first.split(size), lengths.split(size), strict=True)]


def _batch(spans: Sequence[Span], fresh: bool = True) -> Batch:
    return Batch(torch.tensor([span.first for span in spans]), torch.tensor([span.frames for span in spans]), fresh)


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class TrainingData:
    """The training and validation videos of a feature folder that have labels of a chosen track."""

    bank: FeatureBank
    split: dict[str, list[str]]  # the ids of the videos in "train" and "val"
    encoder_digest: str
    encoder: dict[str, Any]  # the encoder's description, for `predict`; `encoder_digest` is its digest
    labels_sha256: str
    folder: Path
    tool_logits: Tensor  # (N, K) fp32, NaN if the encoder has no tool head
    frame_index: Tensor  # (N,) int64, frame of the source video
    index: Index  # the folder's index, without videos that extract could not read
    sources_sha256: str
    by_time: bool = False  # whether earlier versions would have sampled other frames
    has_tool_logits: bool = False  # whether the last K columns of the bank are the tool logits
    scored: Tensor | None = None  # (N,) bool, the rows that count in validation; None: all labelled rows
    tracks: tuple[str, ...] = (MAIN_TRACK,)  # the label tracks that are learned, phases first

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the phases."""
        return self.index.dataset.phases

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """The classes of each label track that is learned, phases first."""
        return self.index.dataset.track_classes(self.tracks)

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of classes of each label track that is learned."""
        return tuple(map(len, self.classes.values()))

    @property
    def train(self) -> list[Span]:
        """Rows of the training videos."""
        return [self.bank.span_of(video_id) for video_id in self.split["train"]]

    @property
    def val(self) -> list[Span]:
        """Rows of the validation videos."""
        return [self.bank.span_of(video_id) for video_id in self.split["val"]]

    def to(self, device: torch.device) -> TrainingData:
        """The same data with features and labels on another device."""
        return replace(self, bank=self.bank.to(device))

    def with_tool_logits(self) -> TrainingData:
        """The same data with stage one's tool logits as the last K columns.

        Raises UserError if the features have no tool logits.
        """
        if self.has_tool_logits:
            return self
        features, logits, where = self.bank.features, self.tool_logits, str(self.folder)
        if isinstance(features, StreamedFeatures):
            features = features.with_columns(fitting_tool_logits(logits, features.dtype, where))
        else:
            features = with_tool_logits(features, logits, where)
        return replace(self, bank=replace(self.bank, features=features), has_tool_logits=True)

    def under(self, index: Index) -> TrainingData:
        """The same features with the splits of another index of the same videos, such as those of a fold."""
        known = set(self.bank.ids)
        split = {part: [one.id for one in index.by_split(part) if one.id in known] for part in ("train", "val")}
        return replace(self, index=index, split=split)

    def truth_of(self, span: Span) -> Tensor:
        """The true labels (L, T) of a video in validation, on the CPU; -1 = the frame does not count."""
        truth = self.bank.labels_of(span).cpu()
        return truth if self.scored is None else truth.masked_fill(~self.scored[span.rows], NO_LABEL)


def read_training_data(
    folder: Path,
    where_features: schema.FeaturesIn = "memory",
    device: str = "cpu",
    tracks: Sequence[str] = (MAIN_TRACK,),
    index: Index | None = None,
) -> TrainingData:
    """Read the training and validation videos of a feature folder; the index in the folder says which these are.

    `where_features`, `device` and `tracks` are the settings `temporal.features`, `device` and `data.tracks`. With
    `index`, it is used instead of the one in the folder; it must not have videos without features.

    Raises UserError if there is nothing to train on, if a file is missing, damaged or of another encoder, or if labels
    or shapes do not match the index.
    """
    where = folder / INDEX_FILE
    index = usable_index(folder) if index is None else index
    index.require_videos("train", "val")
    tracks = tuple(index.dataset.track_classes(tracks))
    split = {name: [entry.id for entry in index.by_split(name)] for name in ("train", "val")}
    if not split["train"]:
        raise UserError(f"{where}: no video is in the split train; run index with another data.split, then extract")
    ids = [*split["train"], *split["val"]]
    in_memory = where_features == "memory" or (where_features == "auto" and fit_in_memory(folder, ids, device))
    videos = load_feature_set(folder, ids, in_memory)
    _check(folder, videos, index.dataset.phases)
    require_tracks(folder, videos, index.dataset, tracks)
    split = {name: _labelled(ids, videos, name, where, tracks) for name, ids in split.items()}
    if not split["train"]:
        raise UserError(f"{where}: no training video has phase labels; add phase annotations, then index and extract")
    for name in tracks:
        if not any((videos[video_id].of_track(name) >= 0).any() for video_id in split["train"]):
            raise UserError(f"{where}: no training video has labels of {name}; leave {name} out of data.tracks")
    videos = {video_id: videos[video_id] for ids in split.values() for video_id in ids}
    attributes = next(iter(videos.values())).attributes
    fps = float(attributes.get("fps", 0.0))
    return TrainingData(
        bank=FeatureBank.of(videos, tracks=tracks) if in_memory else FeatureBank.streamed(videos, tracks),
        split=split,
        encoder_digest=str(attributes.get("encoder_digest")),
        encoder=recorded_encoder(attributes),
        labels_sha256=_digest(videos, tracks),
        folder=folder,
        tool_logits=torch.cat([torch.from_numpy(video.tool_logits) for video in videos.values()]),
        frame_index=torch.cat([torch.from_numpy(video.frame_index) for video in videos.values()]),
        index=index,
        sources_sha256=sha256_json(
            {name: video.attributes.get("source_sha256_ends") for name, video in videos.items()}
        ),
        by_time=fps > 0
        and not all(in_whole_steps(index.entry(name), fps, video.frame_index) for name, video in videos.items()),
        tracks=tracks,
    )


def fit_in_memory(folder: Path, video_ids: Sequence[str], device: str) -> bool:
    """Whether the features of these videos fit into the memory of the machine and, if one is used, of the GPU.

    While they are read, features briefly take twice their size, and every process on a machine has its own copy. Prints
    a line if they do not fit.
    """
    sizes = [path.stat().st_size for path in (feature_path(folder, name) for name in video_ids) if path.is_file()]
    needed, room = sum(sizes) * ranks_here(), available_bytes()
    if device in ("auto", "cuda") and torch.cuda.is_available():
        room = min(room, torch.cuda.mem_get_info()[0] * ranks_here())
    if needed <= MEMORY_SHARE * room:
        return True
    say(
        f"{folder}: {needed / 1e9:.1f} GB of features are more than {MEMORY_SHARE:.0%} of the {room / 1e9:.1f} GB of "
        "memory available, so every epoch reads them from their files (temporal.features=memory loads them anyway)"
    )
    return False


def _digest(videos: Mapping[str, VideoFeatures], tracks: Sequence[str]) -> str:
    """SHA-256 over every video's name and its labels of the tracks that are learned."""
    digest = sha256()
    for video_id, video in videos.items():
        digest.update(
            f"{video_id} {len(video)} ".encode() + b"".join(video.of_track(name).tobytes() for name in tracks)
        )
    return digest.hexdigest()


def _labelled(
    ids: Sequence[str], videos: Mapping[str, VideoFeatures], split: str, where: Path, tracks: Sequence[str]
) -> list[str]:
    """The ids of the videos with at least one labelled frame in any track; the other videos are reported."""
    without = [name for name in ids if not any((videos[name].of_track(track) >= 0).any() for track in tracks)]
    if without:
        say(f"{where}: no {what_labels(tracks)} in {', '.join(without)}: left out of {split}")
    kept = [video_id for video_id in ids if video_id not in without]
    for track in tracks:
        labels = {video_id: videos[video_id].of_track(track) for video_id in kept}
        for note in unlabelled_note(labels, f"do not count in {split}", what_labels([track]).removesuffix("s")):
            say(note)
    return kept


def what_labels(tracks: Sequence[str]) -> str:
    """What labels of these tracks are called in messages."""
    return "phase labels" if list(tracks) == [MAIN_TRACK] else f"{' or '.join(tracks)} labels"


def require_tracks(folder: Path, videos: Mapping[str, VideoFeatures], spec: DataSetSpec, tracks: Sequence[str]) -> None:
    """Raise UserError unless all feature files have labels of these tracks, with the classes that `spec` has."""
    for video_id, video in videos.items():
        path = feature_path(folder, video_id)
        recorded = json.loads(video.attributes.get("tracks", "{}"))
        for name in tracks:
            if name == MAIN_TRACK:
                continue
            classes, labels = spec.tracks[name].classes, video.tracks.get(name)
            if labels is None:
                raise FeatureFileError(f"{path}: has no labels of the track {name}; run extract again")
            require_same_classes(path, name, recorded.get(name, classes), classes, folder / INDEX_FILE)
            if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < len(classes):
                raise FeatureFileError(f"{path}: {name} has labels outside -1 to {len(classes) - 1}; run extract again")


def _check(folder: Path, videos: Mapping[str, VideoFeatures], phases: Sequence[str]) -> None:
    """Raise UserError unless the index names every phase, and all videos' features have the same width and type."""
    width: tuple[int, Any] | None = None
    for video_id, video in videos.items():
        path = feature_path(folder, video_id)
        if recorded := video.attributes.get("phases"):
            require_same_classes(path, "phases", json.loads(recorded), phases, folder / INDEX_FILE)
        if len(video) and int(video.phase.max()) >= len(phases):
            raise FeatureFileError(
                f"{path}: phase {int(video.phase.max())} at sample {int(video.phase.argmax())}, but "
                f"{folder / INDEX_FILE} names {len(phases)} phases; run extract again"
            )
        found = (video.features.shape[1], video.features.dtype)
        width = width or found
        if found != width:
            raise FeatureFileError(
                f"{path}: features of width {found[0]}, {found[1]}; the others have {width[0]}, {width[1]}"
            )
