"""A long video on several cores: it is split into parts, which are computed separately and joined in order.

Every part begins at the boundary of a batch, so the parts compute the same batches as one process would.
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
from engine.files import as_user_error, temporary_path
from engine.pool import attempt
from features.store import feature_path

# No more splitting once the slowest process takes at most this multiple of the ideal time, since every part costs one
# more scan of the video's packets.
_GOOD_BALANCE = 1.1


@dataclass(frozen=True)
class VideoJob:
    """One video to extract, or one part of it: the `frames` samples from sample `first` on, stored in the file `part`.

    `frames` is 0 if only the labels are new and nothing is to be computed. `encoders` are the numbers of the encoders
    that need the video's frames (or its labels), which are read once for all of them.
    """

    video_id: str
    frames: int
    labels_only: bool = False
    first: int = 0
    part: Path | None = None
    encoders: tuple[int, ...] = (0,)

    @property
    def samples(self) -> slice:
        """The job's samples, as a slice of the video's samples."""
        return slice(self.first, self.first + self.frames)


class Rows(Protocol):
    """A destination for the rows of a video or of a part, which are appended in order."""

    def append(self, features: NDArray[Any], tool_logits: NDArray[np.float32]) -> None: ...


# ---------------------------------------------------------------------------------------------- planning


def split_among(
    jobs: Sequence[VideoJob],
    processes: int,
    batch_frames: int,
    least_frames: int,
    may_split: Callable[[VideoJob], bool],
) -> list[VideoJob]:
    """The jobs, longest first; some are split into parts so that all `processes` end at about the same time.

    Jobs are split no more than necessary, at the boundaries of batches, and no part is shorter than `least_frames` or
    one batch. `may_split` is called only for jobs that would be split. The parts' field `part` is still None.
    """
    counts = dict.fromkeys(jobs, 1)
    if processes > 1:
        _balance(counts, processes, batch_frames, max(batch_frames, least_frames), may_split)
    pieces = [piece for job in jobs for piece in _cut(job, counts[job], batch_frames)]
    return sorted(pieces, key=lambda piece: (-piece.frames, piece.first)) if processes > 1 else pieces


def _balance(
    counts: dict[VideoJob, int],
    processes: int,
    batch_frames: int,
    least_frames: int,
    may_split: Callable[[VideoJob], bool],
) -> None:
    """Split the job with the longest parts once more, until the processes are balanced or no job can be split."""
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
    """The time at which the last process ends if each process always takes the longest remaining piece."""
    ends = [0.0] * processes
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def _cut(job: VideoJob, count: int, batch_frames: int) -> Iterator[VideoJob]:
    """`count` parts of the job with nearly equal numbers of whole batches; the last also gets an incomplete batch."""
    if count == 1:
        yield job
        return
    batches = job.frames // batch_frames
    bounds = [*(round(number * batches / count) * batch_frames for number in range(count)), job.frames]
    for first, end in itertools.pairwise(bounds):
        yield replace(job, frames=end - first, first=first)


# ---------------------------------------------------------------------------------------------- parts


class _PartWriter:
    """Writes the rows of a part: features and tool logits side by side, in float32, after a line of JSON."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path

    def append(self, features: NDArray[Any], tool_logits: NDArray[np.float32]) -> None:
        """Write the next rows. Raises UserError if an earlier part has failed, so that this part's file is gone."""
        if not self._path.exists():
            raise UserError("abandoned: an earlier part of the video has failed")
        self._stream.write(np.concatenate([features, tool_logits], axis=1).astype(np.float32).tobytes())
        self._stream.flush()  # so that a full disk raises its error here


@contextmanager
def write_part(path: Path, video_path: Path, provenance: Mapping[str, str]) -> Iterator[Rows]:
    """Open the empty file at `path` for the rows of a part.

    Raises UserError if an earlier part has failed, or, naming the feature file `video_path`, if it cannot be written.
    """
    try:
        with path.open("r+b") as stream:  # creates no file: if it is missing, the process that created it removed it
            stream.truncate()
            stream.write(json.dumps(dict(provenance)).encode() + b"\n")
            yield _PartWriter(stream, path)
            stream.flush()
            os.fsync(stream.fileno())
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise
        raise UserError("abandoned: an earlier part of the video has failed") from error
    except OSError as error:
        raise as_user_error(error, video_path) from error


def read_provenance(path: Path) -> dict[str, str]:
    """Which reader and source a part's frames come from, read from the first line of the part's file."""
    with path.open("rb") as stream:
        found: dict[str, str] = json.loads(stream.readline())
    return found


def read_part(path: Path, dim: int, tools: int, batch_frames: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Features (N, `dim`) and tool logits (N, `tools`) of a part, in the same batches in which they were computed."""
    row_bytes = 4 * (dim + tools)
    with path.open("rb") as stream:
        stream.readline()
        while block := stream.read(batch_frames * row_bytes):
            rows = np.frombuffer(block, np.float32).reshape(-1, dim + tools)
            yield rows[:, :dim], rows[:, dim:]


class Assembly:
    """Creates a file for each part and, once all parts of a video are done, calls `finish` to join them.

    This is a context manager that removes the files of all parts at the end. The files are temporary files of this
    process and empty until another process fills them. If this process is killed, `remove_stale_temporaries` removes
    them later.
    """

    def __init__(
        self, folder: Path, pieces: Iterable[VideoJob], finish: Callable[[VideoJob, Sequence[VideoJob]], None]
    ) -> None:
        self.finish = finish
        self.pieces: list[VideoJob] = []
        self._parts: dict[str, list[VideoJob]] = {}
        videos: dict[str, list[VideoJob]] = {}
        for piece in sorted(pieces, key=lambda piece: piece.first):
            videos.setdefault(piece.video_id, []).append(piece)
        for video_id, found in videos.items():
            if len(found) > 1:
                path = feature_path(folder, video_id)
                found = self._parts[video_id] = [replace(piece, part=temporary_path(path)) for piece in found]
            self.pieces.extend(found)
        self._places = places_of(self.pieces)
        # per video: why each ended part has failed (None if it has not), by the part's first sample
        self._ended: dict[str, dict[int, str | None]] = {video_id: {} for video_id in self._parts}

    def __enter__(self) -> Assembly:
        for place in self._places:
            place.touch()
        return self

    def __exit__(self, *error: object) -> None:
        _remove(self._places)

    def ended(self, piece: VideoJob, reason: str | None) -> tuple[VideoJob, str | None] | None:
        """Record that a piece has ended, and why if it has failed.

        If this was the last piece of its video, joins the parts and returns the video with None or, if it has failed,
        the reason of the first part that failed. Otherwise returns None. Raises NoRoomError if the disk is full.
        """
        if piece.part is None:
            return piece, reason
        for place in self._places:  # keeps them from looking stale to other machines, which go by the last change
            if place.exists():
                os.utime(place)
        parts, ended = self._parts[piece.video_id], self._ended[piece.video_id]
        ended[piece.first] = reason
        if reason is not None:
            _remove(places_of(part for part in parts if part.first > piece.first))
        if len(ended) < len(parts):
            return None
        video = replace(piece, frames=sum(part.frames for part in parts), first=0, part=None)
        reason = next((why for _, why in sorted(ended.items()) if why is not None), None)
        if reason is None:
            reason = attempt(self.finish, video, parts)
        _remove(places_of(parts))
        return video, reason


def places_of(parts: Iterable[VideoJob]) -> list[Path]:
    """The files with the rows of `parts`. Jobs that are whole videos have none."""
    return [part.part for part in parts if part.part is not None]


def _remove(places: Iterable[Path]) -> None:
    for place in places:
        place.unlink(missing_ok=True)
