"""Measure what an index entry records about its source: a video file, a frame folder or a TFRecord file.

The command `index` measures these facts, and `index --check` measures them again to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from engine.files import inside, sha256_ends, sha256_file
from features.dataset.frame_folders import FolderScan
from features.dataset.layouts import FolderLayout, RecordLayout
from features.dataset.tfrecord import FPS, scan_records
from features.video.scan import first_frame_s, probe_video
from features.video.times import FrameTimes


@dataclass(frozen=True)
class SourceFacts:
    """The fields of `features.dataset.index.VideoEntry` that depend on the source alone; they are described there."""

    size_bytes: int
    modified_ns: int
    sha256_ends: str
    sha256: str | None
    fps: float
    frame_count: int
    times: FrameTimes | None = None
    start_s: float = 0.0
    frames: FolderLayout | None = None
    records: RecordLayout | None = None


def video_facts(
    root: Path, relative: str, full_hash: bool, from_container: bool = False
) -> tuple[SourceFacts, tuple[str, ...]]:
    """Measure a video file; returns its facts and notes on its container.

    With `from_container`, labels count from the container's start, so the time of the first frame is measured. Raises
    UserError if the file cannot be read or has no frames.
    """
    path = inside(root, relative)
    info = probe_video(path)
    if info.frame_count < 1:
        raise UserError(f"{path}: contains no frames")
    start_s = first_frame_s(path) if from_container else 0.0
    state = _file_state(path, full_hash)
    return SourceFacts(*state, info.fps, info.frame_count, times=info.times, start_s=start_s), info.notes


def record_facts(
    root: Path, relative: str, video_id: str, spec: DataSetSpec, order: tuple[str, ...], full_hash: bool
) -> SourceFacts:
    """Measure a TFRecord file, including its labels. Every byte is read and checked; raises UserError for damage."""
    path = inside(root, relative)
    layout = scan_records(path, video_id, spec, order)
    return SourceFacts(*_file_state(path, full_hash), FPS, layout.frame_count, records=layout)


def folder_facts(scan: FolderScan, layout: FolderLayout, spec: DataSetSpec, full_hash: bool) -> SourceFacts:
    """Return the facts about a folder of frames that was scanned."""
    state = sum(scan.sizes_bytes), scan.modified_ns, scan.identity(), scan.content() if full_hash else None
    return SourceFacts(*state, spec.annotation_fps, layout.frame_count, frames=layout)


def _file_state(path: Path, full_hash: bool) -> tuple[int, int, str, str | None]:
    """Return a file's size in bytes, time of the last change in ns, hash of the ends, and (with `full_hash`) hash."""
    try:
        state = path.stat()
        return state.st_size, state.st_mtime_ns, sha256_ends(path), sha256_file(path) if full_hash else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
