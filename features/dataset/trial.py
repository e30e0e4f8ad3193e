"""Try a data set's description on a folder: what it finds, what the labels mean, and what it leaves out.

Nothing is written, and only the first frames of each video are decoded, as by `index`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import listed
from configs.schema import Config, SplitConfig
from features.dataset.annotations import LabelTrack
from features.dataset.build import build_index
from features.dataset.catalogue import note_lines, passed_over_lines
from features.dataset.describe import example_of_labels, such_as, track_title
from features.dataset.discover import KINDS, Discovery, find_videos
from features.dataset.index import SPLITS, Dataset, Index, VideoEntry, exclusions
from features.dataset.labels import FittedTracks, labelled_fractions, load_tracks
from features.dataset.published import published_lists
from features.dataset.sampling import frame_times_s
from features.dataset.splits import assign_splits, usual_split_problem, with_lists
from features.run_lengths import runs

SHOWN_VIDEOS, SHOWN_LABELS = 3, 6
_WORDS = {"video": "videos", "frames": "folders of frames", "tfrecord": "TFRecord files, with their labels"}
_ALL_TRAIN = SplitConfig(rule="100%/0%")  # splits are reported for all videos, not only for those that are tried


@dataclass
class Trial:
    """A description tried on a folder. `lines` yields what to print; afterwards `partial` says if anything is missing.

    With `most`, labels are read of the first `most` videos only.
    """

    config: Config
    spec: DataSetSpec
    root: Path
    most: int | None = None
    partial: bool = False
    _tracks: dict[str, FittedTracks] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Yield the lines. Raises UserError if no video is found, or if none can be used."""
        found = find_videos(self.root, self.spec, self.config.data, leave_out=True)
        yield from self._matched(found)
        index = self._index(found)
        yield from self._splits(found, index)
        dataset = Dataset(index, self.root)
        self._tracks = {entry.id: load_tracks(dataset, entry) for entry in index.videos}
        yield "first labels"
        for entry in index.videos[:SHOWN_VIDEOS]:
            yield from self._first_labels(entry)
        yield f"labelled frames of {len(index.videos)} video{'s' * (len(index.videos) != 1)}"
        for role in self.spec.roles:
            yield from self._coverage(role, index)
        self.partial |= index.is_partial or any(path for path, reason in found.passed_over if reason)
        yield from self._skipped(found, index)

    def _index(self, found: Discovery) -> Index:
        excluded = exclusions(found.ids, self.config.data.exclude, [path for path, _ in found.passed_over])
        ids = [video_id for video_id in found.ids if video_id not in excluded]
        data = self.config.data.model_copy(update={"split": _ALL_TRAIN, "unverified": True})
        only = None if self.most is None else ids[: self.most]
        return build_index(self.root, self.spec, data, only=only, leave_out=True)

    def _matched(self, found: Discovery) -> Iterator[str]:
        yield f"{self.spec.name} in {self.root}: {len(found.ids)} video{'s' * (len(found.ids) != 1)}"
        for kind in KINDS:
            if sources := [video.source for video in found.videos if video.kind == kind]:
                in_parts = sum(bool(video.parts) for video in found.videos if video.kind == kind)
                yield f"  {_WORDS[kind]}: {such_as(sources)}{f', {in_parts} of them in several files' * bool(in_parts)}"
        if all(video.kind == "tfrecord" for video in found.videos):
            return
        for role in self.spec.roles:
            files = [one for video in found.videos for one in (video, *video.parts)]
            own = [one.labels[role] for one in files if role in one.labels]
            paths = [*own, *found.shared.get(role, ())]
            wanted = f"no file, expected names such as {example_of_labels(role, self.spec)}"
            if not self.spec.label_pattern(role):
                keys = f"labels.{'phases' if role == 'phase' else 'tools'} nor patterns.{role}"
                wanted = f"none, since the description has neither {keys}"
            yield f"  labels of {track_title(role)}: {such_as(paths, 'file') if paths else wanted}"

    def _splits(self, found: Discovery, index: Index) -> Iterator[str]:
        ids, split = found.ids, self.config.data.split
        paths = {video.id: sorted(video.paths) for video in found.videos}
        paths |= {entry.id: sorted(entry.paths) for entry in index.videos}  # also files with labels of several videos
        notes: list[str] = []
        spec = with_lists(self.spec, published_lists(self.root, self.spec, split, paths, ids, notes))
        yield from (f"  {note}" for note in notes)
        if problem := usual_split_problem(ids, spec, split):
            yield f"  splits: none, since the usual one does not fit: {problem}"
            return
        counts = Counter(assign_splits(ids, spec, split).values())
        rule = split.rule or spec.default_split
        yield f"  split {rule}: {', '.join(f'{part} {counts[part]}' for part in SPLITS if counts[part])}"

    def _first_labels(self, entry: VideoEntry) -> Iterator[str]:
        tracks = _by_role(self._tracks[entry.id])
        for role in self.spec.roles:
            name = entry.id if role == "phase" else f"{entry.id}, {track_title(role)}"
            track = tracks.get(role)
            text = "no labels" if track is None else _in_words(track, self.spec.classes_of(role)[0], entry)
            yield f"  {name}: {text}"

    def _coverage(self, role: str, index: Index) -> Iterator[str]:
        shares = {
            entry.id: labelled_fractions(entry.image_frames, self._tracks[entry.id]).get(role) for entry in index.videos
        }
        known = {video_id: share for video_id, share in shares.items() if share is not None}
        bare = [video_id for video_id, share in shares.items() if share is None]
        self.partial |= bool(bare)
        if known:
            least = min(known, key=lambda video_id: known[video_id])
            mean = float(np.mean(list(known.values())))
            yield f"  {track_title(role)}: {mean:.1%}, least in {least} ({known[least]:.1%}){self._unseen(role)}"
        if bare:
            yield f"  {track_title(role)}: no labels of {listed(bare, 10)}"

    def _unseen(self, role: str) -> str:
        """Return which classes occur in no video, as the end of a line."""
        classes, seen = self.spec.classes_of(role)[0], set()
        for tracks in self._tracks.values():
            if (track := _by_role(tracks).get(role)) is not None:
                labels = track.labels
                seen |= set(np.flatnonzero((labels > 0).any(axis=0)) if labels.ndim == 2 else np.unique(labels))
        unseen = [name for number, name in enumerate(classes) if number not in seen]
        return f"; never: {listed(unseen, 10)}" if unseen else "; all classes occur"

    def _skipped(self, found: Discovery, index: Index) -> Iterator[str]:
        lines = [f"left out: {video.id}: {video.reason}" for video in index.left_out]
        lines += passed_over_lines(found.passed_over)
        lines += note_lines(index.notes)
        if lines:
            yield "skipped, and notes"
            yield from (f"  {line}" for line in lines)
        if self.most is not None and self.most < len(found.ids):
            yield f"only the first {self.most} of {len(found.ids)} videos were read"


def _by_role(tracks: FittedTracks) -> Mapping[str, LabelTrack]:
    found = {"phase": tracks.phase, "tool": tracks.tools, **tracks.others}
    return {role: track for role, track in found.items() if track is not None}


def _in_words(track: LabelTrack, classes: Sequence[str], entry: VideoEntry) -> str:
    """Return the first labels of a track, and where the last one ends: `Clip from 0:00:00, Cut from 0:03:12.4, ...`."""
    rows, parts = _combined(track.labels), []
    found = runs(rows)
    for run in found[:SHOWN_LABELS]:
        time_s = float(frame_times_s(entry, track.frame_index[run.start : run.start + 1])[0])
        parts.append(f"{_label(track.labels[run.start], classes)} from {_clock(time_s)}")
    more = len(found) - SHOWN_LABELS
    text = ", ".join(parts) + (f" and {more} more" if more > 0 else "")
    labelled = np.flatnonzero((track.labels.reshape(len(track.labels), -1) >= 0).any(axis=1))
    if not len(labelled):
        return text
    last = min(int(track.frame_index[labelled[-1]]) + track.stride, entry.frame_count) - 1
    end_s = float(frame_times_s(entry, np.array([last]))[0]) + 1 / entry.fps
    return f"{text}; labelled until {_clock(end_s)}"


def _combined(labels: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return one number per row (T,): the class, or for tools (T, K) a number of their combination."""
    if labels.ndim == 1:
        return labels.astype(np.int64)
    return np.unique(labels, axis=0, return_inverse=True)[1].reshape(len(labels))


def _label(row: NDArray[np.int8], classes: Sequence[str]) -> str:
    if row.ndim == 0:
        return classes[int(row)] if row >= 0 else "no label"
    if (row < 0).all():
        return "no label"
    return " + ".join(name for name, present in zip(classes, row, strict=True) if present > 0) or "none"


def _clock(time_s: float) -> str:
    whole, tenths = divmod(int(time_s * 10 + 0.01), 10)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}" + f".{tenths}" * bool(tenths)
