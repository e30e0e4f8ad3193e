"""Write a feature folder for other programs: in MS-TCN's folder layout, or as one NumPy archive per video."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, listed
from configs.schema import MAX_FPS
from engine.files import atomic_path, make_folder, read_json_object, require_free_bytes, write_json, write_text
from engine.progress import BAR_AFTER_S, progress_bar, say
from engine.stopping import StopRequest
from features.dataset.index import Index
from features.ids import file_stem
from features.store import VideoFeatures, feature_path, read_features
from features.store_folder import feature_files, usable_index
from interop.feature_files import mstcn

EXPORT_FILE = "surgstage.json"
DIVISION = "split1"
Layout = Literal["mstcn", "npz"]


@dataclass(frozen=True)
class Export:
    """What a folder says that `export_features` wrote: its rate, and the video of each file whose name differs."""

    fps: float | None = None
    videos: Mapping[str, str] = field(default_factory=dict)


def read_export(path: Path) -> Export:
    """Read the description of an exported folder; an empty one if there is none. Raises UserError if it is damaged."""
    if not path.is_file():
        return Export()
    found = read_json_object(path)
    fps, videos = found.get("fps"), found.get("videos", {})
    named = isinstance(videos, dict) and all(isinstance(video, str) for video in videos.values())
    if not named or isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= MAX_FPS:
        raise UserError(f"{path}: damaged: it needs a rate fps and names of videos; delete it or export again")
    return Export(float(fps), videos)


def export_features(
    folder: Path, out: Path, layout: Layout, *, unlabelled: str | None, replace: bool, stop: StopRequest
) -> str:
    """Write the features of all videos in a feature folder to `out`, as float32; returns a sentence for the user.

    In MS-TCN's layout every frame needs a class; frames without a label get the class `unlabelled`, or are refused.
    `surgstage.json`, which is written last, says what the files do not: their rate, their encoder, and the original
    names. Raises UserError if `out` is not empty and `replace` is false, or if a name cannot be written.
    """
    index = usable_index(folder)
    ids = [entry.id for entry in index.videos if feature_path(folder, entry.id).is_file()]
    if not ids:
        feature_files(folder)
        raise UserError(f"{folder}: contains no features of the videos in its index")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not replace:
        raise UserError(f"{out}: exists and is not empty; choose another folder, or replace its files with --force")
    stems = mstcn.written_names(ids, "video") if layout == "mstcn" else {name: file_stem(name) for name in ids}
    write = _Mstcn(out, index, unlabelled, stems) if layout == "mstcn" else _Archives(out, index, stems)
    attributes: dict[str, Any] = {}
    with progress_bar(len(ids), "export", "video", delay=BAR_AFTER_S) as bar:
        for name in ids:
            stop.raise_if_set()
            video = read_features(feature_path(folder, name))
            attributes = video.attributes
            require_free_bytes(make_folder(out), 5 * video.features.shape[0] * video.features.shape[1], "the export")
            write(name, video)
            bar.update(1)
    write.finish()
    if index.dataset.tracks and layout == "mstcn":
        others = " and ".join(index.dataset.tracks)
        say(f"note: {layout} holds labels of the phases only, so those of {others} are left out; --to npz has them")
    about = {
        "layout": layout,
        "fps": float(attributes["fps"]),
        "encoder_digest": str(attributes["encoder_digest"]),
        "backbone": str(attributes["backbone"]),
        "dataset": index.dataset.name,
        "videos": {stem: name for name, stem in stems.items() if stem != name},
    }
    write_json(out / EXPORT_FILE, about)
    return f"{len(ids)} video(s) written as {layout}, float32, {about['fps']:g} rows per second; {out}"


class _Archives:
    """One `.npz` file per video: `features` (T, D), labels, frames and times, and the names of the classes."""

    def __init__(self, out: Path, index: Index, stems: Mapping[str, str]) -> None:
        self.out, self.index, self.stems = out, index, stems

    def __call__(self, name: str, video: VideoFeatures) -> None:
        spec = self.index.dataset
        arrays = {
            "features": np.asarray(video.features).astype(np.float32),
            "phase": video.phase,
            "tools": video.tools,
            "frame_index": video.frame_index,
            "time_s": video.time_s,
            "fps": np.float64(video.attributes["fps"]),
            "phase_names": np.array(spec.phases),
            "tool_names": np.array(spec.tools, dtype=np.str_),
        }
        for track, labels in video.tracks.items():
            arrays |= {f"track_{track}": labels, f"track_{track}_names": np.array(spec.tracks[track].classes)}
        _save(self.out / f"{self.stems[name]}.npz", lambda stream: np.savez(stream, **arrays))

    def finish(self) -> None:
        """Everything is in the archives."""


class _Mstcn:
    """MS-TCN's folders; `finish` writes what concerns all videos."""

    def __init__(self, out: Path, index: Index, unlabelled: str | None, stems: Mapping[str, str]) -> None:
        self.out, self.index, self.stems = out, index, stems
        known = list(index.dataset.phases)
        if unlabelled is not None and unlabelled in known:
            raise UserError(f"--unlabelled {unlabelled}: is a phase of {index.dataset.name}; choose another name")
        written = mstcn.written_names([*known, *([unlabelled] if unlabelled else [])], "class")
        self.names, self.extra = list(written.values()), unlabelled is not None
        if renamed := [f"{name} as {short}" for name, short in written.items() if name != short]:
            say(f"note: {len(renamed)} class(es) are written without blanks and dots: {listed(renamed)}")
        self.labelled: list[str] = []

    def __call__(self, name: str, video: VideoFeatures) -> None:
        phase = video.phase
        bare = int((phase < 0).sum())
        if bare and bare < len(phase) and not self.extra:
            raise UserError(
                f"{name}: {bare} of {len(phase)} frames have no phase label, which MS-TCN's layout cannot express; "
                "give them a class of their own with --unlabelled NAME, or use --to npz"
            )
        values = np.ascontiguousarray(np.asarray(video.features).astype(np.float32).T)  # (D, T)
        stem = self.stems[name]
        _save(self.out / mstcn.FEATURES / f"{stem}.npy", lambda stream: np.save(stream, values))
        if bare == len(phase) and not self.extra:
            return
        filled: NDArray[np.int8] = np.where(phase < 0, len(self.names) - 1, phase).astype(np.int8)
        write_text(self.out / mstcn.TRUTH / f"{stem}.txt", mstcn.truth_text(filled, self.names))
        self.labelled.append(name)

    def finish(self) -> None:
        """Write the class names and the bundles, which name the videos with labels."""
        write_text(self.out / mstcn.MAPPING, mstcn.mapping_text(self.names))
        splits = {self.stems[name]: self.index.entry(name).split for name in self.labelled}
        for part, videos in mstcn.divided(splits).items():
            path = self.out / mstcn.SPLITS / f"{part}.{DIVISION}{mstcn.BUNDLE}"
            write_text(path, mstcn.bundle_text(videos))
        if bare := [name for name in self.stems if name not in self.labelled]:
            say(f"note: in no bundle, since they have no phase labels: {listed(bare, 10)}")


def _save(path: Path, write: Callable[[Any], None]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        write(stream)
