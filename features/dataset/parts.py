"""Recordings in several files: the index entry of the whole, and its labels if each part has its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.files import sha256_json
from features.dataset.annotations import LabelTrack
from features.dataset.index import AnnotationFile, VideoEntry, VideoPart


def joined_entry(parts: Sequence[VideoEntry]) -> VideoEntry:
    """Return the entry of a recording whose files, in order, have these entries."""
    rates = {part.fps for part in parts}
    frame_count, duration_s = sum(part.frame_count for part in parts), sum(part.duration_s for part in parts)
    whole: dict[str, Any] = {
        "size_bytes": sum(part.size_bytes for part in parts),
        "modified_ns": max(part.modified_ns for part in parts),
        "sha256_ends": sha256_json([part.sha256_ends for part in parts]),
        "sha256": sha256_json([part.sha256 for part in parts]) if parts[0].sha256 else None,
        "fps": rates.pop() if len(rates) == 1 else frame_count / duration_s,
        "frame_count": frame_count,
        "start_s": parts[0].start_s,
    }
    files = {role: _files_of_parts(role, parts) for part in parts for role in part.files_by_role}
    tracks = {role: file for role, file in files.items() if role not in ("phase", "tool")}
    return VideoEntry(
        id=parts[0].id,
        kind="video",
        source=parts[0].source,
        split="none",
        phase_file=files.get("phase"),
        tool_file=files.get("tool"),
        track_files=tracks,
        parts=tuple(VideoPart(**{name: getattr(part, name) for name in VideoPart.model_fields}) for part in parts),
        **whole,
    )


def _files_of_parts(role: str, parts: Sequence[VideoEntry]) -> AnnotationFile:
    """Return what represents the parts' files of labels of one role: the first one's path, and a hash of all."""
    files = [part.files_by_role.get(role) for part in parts]
    meanings = [file and [file.sha256, file.row_fps, file.row_base] for file in files]
    given = [file for file in files if file]
    return AnnotationFile(path=given[0].path, sha256=sha256_json(meanings), rows=sum(file.rows for file in given))


def joined_track(tracks: Sequence[LabelTrack | None], frame_counts: Sequence[int]) -> LabelTrack | None:
    """Put the tracks of a recording's parts together, each numbered by the frames of its part.

    `frame_counts` are the parts' lengths. The strides of parts may differ, and a label must not last beyond its part.
    Therefore, where a part has frames without a row, a row without a label (-1) is added.
    """
    known = [track for track in tracks if track is not None]
    if not known:
        return None
    pieces, first = [], 0
    for track, frame_count in zip(tracks, frame_counts, strict=True):
        rows, labels = _without_gaps(track, frame_count, known[0].labels.shape[1:])
        pieces.append((rows + first, labels))
        first += frame_count
    frame_index, labels = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return LabelTrack(frame_index, labels, max(track.stride for track in known))


def _without_gaps(
    track: LabelTrack | None, frame_count: int, shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return a part's rows (R,) and labels (R, ...), with rows without a label where no row is valid."""
    rows = track.frame_index if track else np.zeros(0, dtype=np.int64)
    labels = track.labels if track else np.zeros((0, *shape), dtype=np.int8)
    valid_to = np.append(0, rows + (track.stride if track else 0))
    gaps = valid_to[valid_to < np.append(rows, frame_count)]
    order = np.argsort(np.append(rows, gaps), kind="stable")
    filled = np.concatenate([labels, np.full((len(gaps), *shape), -1, dtype=np.int8)])
    return np.append(rows, gaps)[order], filled[order]
