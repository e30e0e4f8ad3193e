"""A long video on several cores: parts that begin at batches, computed apart and put together as if by one process.

Batches are cut by sample number, so a part that begins at one sees the same batches as whoever does the whole video.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from engine.files import NoRoomError, as_user_error, temporary_path
from engine.pool import VIDEO_ERRORS, failure_reason
from features.store import feature_path

# Splitting ends where the processes are this close to ending together: every part costs a scan of the packets.
_GOOD_BALANCE = 1.1


@dataclass(frozen=True)
class VideoJob:
    """One video to do, or with `part` (where its rows go meanwhile) the `frames` samples of it from `first` on.

    `frames` are those to compute, none where only labels are new.
    """

    video_id: str
    frames: int
    labels_only: bool = False
    first: int = 0
    part: Path | None = None

    @property
    def samples(self) -> slice:
        """Which of the video's samples."""
        return slice(self.first, self.first + self.frames)


class Rows(Protocol):
    """What takes a video's rows, or a part's, from the first on."""

    def append(self, features: NDArray[Any], tool_logits: NDArray[np.float32]) -> None: ...


# ---------------------------------------------------------------------------------------------- planning


def split_among(
    jobs: Sequence[VideoJob],
    processes: int,
    batch_frames: int,
    least_frames: int,
    may_split: Callable[[VideoJob], bool],
) -> list[VideoJob]:
    """The jobs, longest first, some of them cut at batches so that `processes` end at about the same time.

    Only as many cuts as that takes, and no part under `least_frames` or one batch; `may_split` is asked about
    candidates alone. Parts have no place yet.
    """
    counts = dict.fromkeys(jobs, 1)
    if processes > 1:
        _balance(counts, processes, batch_frames, max(batch_frames, least_frames), may_split)
    pieces = [piece for job in jobs for piece in _cut(job, counts[job], batch_frames)]
    return sorted(pieces, key=lambda piece: -piece.frames) if processes > 1 else pieces


def _balance(
    counts: dict[VideoJob, int],
    processes: int,
    batch_frames: int,
    least_frames: int,
    may_split: Callable[[VideoJob], bool],
) -> None:
    """Raise the number of parts of the job with the longest ones until the processes are balanced, or nothing helps."""
    ideal = sum(job.frames for job in counts) / processes
    best, best_counts = math.inf, dict(counts)

    def can_have(job: VideoJob, parts: int) -> bool:
        return job.frames // batch_frames // parts * batch_frames >= least_frames

    fixed: set[VideoJob] = set()
    while True:
        longest = _makespan([job.frames / count for job, count in counts.items() for _ in range(count)], processes)
        if longest < best:
            best, best_counts = longest, dict(counts)
        left = [job for job in counts if job not in fixed and can_have(job, counts[job] + 1)]
        if longest <= _GOOD_BALANCE * ideal or not left:
            break
        job = max(left, key=lambda job: job.frames / counts[job])
        if counts[job] == 1 and not may_split(job):
            fixed.add(job)
        else:
            counts[job] += 1
    counts.update(best_counts)


def _makespan(lengths: Sequence[float], processes: int) -> float:
    """When the last process ends, where each takes the longest piece that is left."""
    ends = [0.0] * processes
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def _cut(job: VideoJob, count: int, batch_frames: int) -> Iterator[VideoJob]:
    """Parts of nearly as many whole batches each; what is left goes to the last one."""
    if count == 1:
        yield job
        return
    batches = job.frames // batch_frames
    bounds = [*(round(number * batches / count) * batch_frames for number in range(count)), job.frames]
    for first, end in itertools.pairwise(bounds):
        yield replace(job, frames=end - first, first=first)


# ---------------------------------------------------------------------------------------------- parts


class _PartWriter:
    """Rows of a part: features and tool logits side by side, float32, after a line of JSON."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path

    def append(self, features: NDArray[Any], tool_logits: NDArray[np.float32]) -> None:
        """The next rows. Raises UserError when the part is not wanted any more."""
        if not self._path.exists():
            raise UserError("given up, an earlier part of the video has failed")
        self._stream.write(np.concatenate([features, tool_logits], axis=1).astype(np.float32).tobytes())
        self._stream.flush()  # a full disk is noticed here


@contextmanager
def write_part(path: Path, video_path: Path, provenance: Mapping[str, str]) -> Iterator[Rows]:
    """Fill the part that waits, empty, at `path`. Raises UserError, naming the video's own file, for a full disk."""
    try:
        with path.open("r+b") as stream:  # never makes a file: whoever placed it may have removed it
            stream.truncate()
            stream.write(json.dumps(dict(provenance)).encode() + b"\n")
            yield _PartWriter(stream, path)
            stream.flush()
            os.fsync(stream.fileno())
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise
        raise UserError("given up, an earlier part of the video has failed") from error
    except OSError as error:
        raise as_user_error(error, video_path) from error


def read_provenance(path: Path) -> dict[str, str]:
    """Where a part's frames came from."""
    with path.open("rb") as stream:
        found: dict[str, str] = json.loads(stream.readline())
    return found


def read_part(path: Path, dim: int, tools: int, batch_frames: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Features (N, `dim`) and tool logits (N, `tools`) of a part, in the batches that they were computed in."""
    row_bytes = 4 * (dim + tools)
    with path.open("rb") as stream:
        stream.readline()
        while block := stream.read(batch_frames * row_bytes):
            rows = np.frombuffer(block, np.float32).reshape(-1, dim + tools)
            yield rows[:, :dim], rows[:, dim:]


class Assembly:
    """Gives parts their places, waits for the last one of each video, and lets `finish` put them together.

    A context manager: whatever happens, no part is left. The places are files of this process, empty until somebody
    fills them, which `remove_stale_temporaries` sweeps when this process was killed.
    """

    def __init__(
        self, folder: Path, pieces: Iterable[VideoJob], finish: Callable[[VideoJob, Sequence[VideoJob]], None]
    ) -> None:
        self._finish = finish
        whole: dict[str, list[VideoJob]] = {}
        for piece in pieces:
            whole.setdefault(piece.video_id, []).append(piece)
        self.pieces: list[VideoJob] = []
        self._parts: dict[str, list[VideoJob]] = {}
        for video_id, found in whole.items():
            if len(found) > 1:
                place = feature_path(folder, video_id)
                found = [replace(piece, part=temporary_path(place)) for piece in sorted(found, key=lambda p: p.first)]
                self._parts[video_id] = found
            self.pieces.extend(found)
        self.pieces.sort(key=lambda piece: -piece.frames if self._parts else 0)
        self._left = {video_id: {part.first for part in parts} for video_id, parts in self._parts.items()}
        self._reasons: dict[str, dict[int, str]] = {video_id: {} for video_id in self._parts}

    def __enter__(self) -> Assembly:
        for parts in self._parts.values():
            for part in parts:
                _place(part).touch()
        return self

    def __exit__(self, *error: object) -> None:
        for parts in self._parts.values():
            _remove(parts)

    def ended(self, piece: VideoJob, reason: str | None) -> tuple[VideoJob, str | None] | None:
        """A piece has ended: where it was the last one, the video and the reason of its first part that failed.

        Raises NoRoomError when the disk is full.
        """
        if piece.part is None:
            return piece, reason
        self._keep_alive()
        parts, reasons = self._parts[piece.video_id], self._reasons[piece.video_id]
        if reason is not None:
            reasons[piece.first] = reason
            _remove(part for part in parts if part.first > piece.first)
        left = self._left[piece.video_id]
        left.discard(piece.first)
        if left:
            return None
        video = replace(piece, frames=sum(part.frames for part in parts), first=0, part=None)
        reason = reasons[min(reasons)] if reasons else self._put_together(video, parts)
        _remove(parts)
        return video, reason

    def _put_together(self, video: VideoJob, parts: Sequence[VideoJob]) -> str | None:
        try:
            self._finish(video, parts)
        except NoRoomError:
            raise
        except VIDEO_ERRORS as error:
            return failure_reason(error)
        return None

    def _keep_alive(self) -> None:
        """Another machine that sweeps this folder goes by the time of the last change."""
        for parts in self._parts.values():
            for part in parts:
                if _place(part).exists():
                    os.utime(_place(part))


def _place(part: VideoJob) -> Path:
    assert part.part is not None  # only parts are here
    return part.part


def _remove(parts: Iterable[VideoJob]) -> None:
    for part in parts:
        _place(part).unlink(missing_ok=True)
