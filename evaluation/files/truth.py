"""Read and write `truth.json`, which contains the labels that an evaluation used, next to its metrics.

With this file, truth and prediction can be drawn using only the run folder, even if features or annotations have
changed or are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, one_line
from engine.files import read_json, write_json
from features.run_lengths import runs
from features.video.mp4 import MAX_FRAMES

TRUTH_FILE = "truth.json"
FORMAT_VERSION = 1
MAX_LABELS = 1 << 28  # Cholec80 at 25 fps has 37 million labels of phases and tools


@dataclass(frozen=True)
class VideoTruth:
    """One video's labels at the evaluation's rate: `phase` (T,) and `tools` (T, K) int8, with -1 for no label.

    `source` is the hash of the source's ends, as recorded in the index. `tracks` has the labels (T,) of the additional
    label tracks that were scored.
    """

    phase: NDArray[np.int8]
    tools: NDArray[np.int8]
    source: str
    tracks: Mapping[str, NDArray[np.int8]] = field(default_factory=dict)


@dataclass(frozen=True)
class Truth:
    """What an evaluation scored against: data set, split, frames per second, and the labels of each video."""

    spec: DataSetSpec
    split: str
    fps: float
    videos: dict[str, VideoTruth]

    @property
    def tracks(self) -> list[str]:
        """The names of the additional label tracks that were scored."""
        return list(dict.fromkeys(name for video in self.videos.values() for name in video.tracks))

    def of_track(self, name: str) -> Truth:
        """The labels of an additional track in place of the phases."""
        videos = {
            video_id: VideoTruth(video.tracks[name], np.zeros((len(video.phase), 0), np.int8), video.source)
            for video_id, video in self.videos.items()
        }
        return replace(self, spec=self.spec.as_track(name), videos=videos)


def is_simulated(spec: DataSetSpec, root: Path | None) -> bool:
    """Whether the videos are simulated.

    They are if the data set's name says so, or if the data root, where it is known, contains the simulator's settings.
    `evaluate` records the answer as `simulated` in `metrics.json`.
    """
    from features.simulation.write import SETTINGS_FILE

    named = "simulated" in f"{spec.name} {spec.title}".lower()
    return named or (root is not None and (root / SETTINGS_FILE).is_file())


def write_truth(path: Path, truth: Truth) -> None:
    """Write labels atomically, as runs `[frames, value]`. Raises UserError if the disk is full."""
    videos = {
        name: {
            "source_sha256_ends": video.source,
            "phase": _packed(video.phase),
            "tools": [_packed(video.tools[:, k]) for k in range(video.tools.shape[1])],
            **({"tracks": {track: _packed(labels) for track, labels in video.tracks.items()}} if video.tracks else {}),
        }
        for name, video in truth.videos.items()
    }
    about = {"format_version": FORMAT_VERSION, "split": truth.split, "fps": truth.fps}
    write_json(path, {**about, "dataset": truth.spec.model_dump(mode="json"), "videos": videos})


def read_truth(path: Path) -> Truth:
    """Read a file that `write_truth` wrote. Raises UserError if it is missing, unreadable or another kind of file."""
    tree = read_json(path)
    try:
        if tree["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {tree['format_version']}, but this program reads {FORMAT_VERSION}")
        spec = DataSetSpec(**tree["dataset"])
        videos, labels = {}, 0
        for name, entry in tree["videos"].items():
            videos[str(name)] = video = _video(entry, spec)
            labels += video.phase.size * (1 + len(video.tracks)) + video.tools.size
            if labels > MAX_LABELS:
                raise ValueError(f"more than {MAX_LABELS:,} labels")
        return Truth(spec, str(tree["split"]), float(tree["fps"]), videos)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: not the labels of an evaluation ({one_line(error)}); run evaluate again") from error


def _video(entry: Any, spec: DataSetSpec) -> VideoTruth:
    phase = _unpacked(entry["phase"], len(spec.phases))
    tools = [_unpacked(track, 2) for track in entry["tools"]]
    if len(tools) not in (0, len(spec.tools)) or any(len(track) != len(phase) for track in tools):
        raise ValueError("tool labels that do not match the data set or the phases")
    columns = np.stack(tools, axis=1) if tools else np.zeros((len(phase), 0), np.int8)
    tracks = {name: _unpacked(pairs, len(spec.tracks[name].classes)) for name, pairs in entry.get("tracks", {}).items()}
    if any(len(labels) != len(phase) for labels in tracks.values()):
        raise ValueError("labels of a track that do not match the phases")
    return VideoTruth(phase, columns, str(entry["source_sha256_ends"]), tracks)


def _packed(track: NDArray[Any]) -> list[list[int]]:
    return [[run.end - run.start, run.value] for run in runs(track)]


def _unpacked(pairs: Sequence[Sequence[int]], classes: int) -> NDArray[np.int8]:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    lengths = table[:, 0]
    # check each length first, since the sum of all could overflow
    if table.size and (lengths.min() < 1 or lengths.max() > MAX_FRAMES or lengths.sum() > MAX_FRAMES):
        raise ValueError("a run of labels without a plausible length")
    if table.size and (table[:, 1].min() < -1 or table[:, 1].max() >= classes):
        raise ValueError(f"labels outside -1 to {classes - 1}")
    return np.repeat(table[:, 1].astype(np.int8), lengths)
