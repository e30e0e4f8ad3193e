"""What a call of extraction did with each video, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from engine.pool import VideoFault, require_one_usable
from features.dataset.index import Index
from stage1_cnn.segments import VideoJob


@dataclass
class ExtractReport:
    """What one call of `extract` did: video ids by outcome, frames computed, and seconds.

    `left_out` lists the videos that the index leaves out. `decode_seconds` and `encode_seconds` are those of getting
    the frames that this encoder used, and of encoding them and writing the features, added up over the `processes` that
    compute. With decoding ahead, only the time of waiting for frames counts as `decode_seconds`. `encoders` is the
    number of encoders in the call.
    """

    folder: Path
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    processes: int = 1
    encoders: int = 1

    @property
    def frames_per_s(self) -> float | None:
        """Frames per second as if this encoder had been the only one of the call; None if nothing was computed.

        Loading the encoder and starting processes are not included; they count in `seconds`.
        """
        work = self.decode_seconds + self.encode_seconds
        return self.processes * self.frames / work if self.frames and work > 0 else None

    def require_one_usable(self, waiting: int, shard: tuple[int, int]) -> None:
        """Raise UserError if every video of this shard has failed and none is `waiting` to be extracted.

        With several shards nothing is raised, since other shards may have videos that can be used.
        """
        if shard[1] == 1:
            require_one_usable(self.failed, waiting + len(self.done) + len(self.skipped) + len(self.relabelled))

    def require_others_done(self) -> None:
        """Raise UserError if a video failed for a reason other than its own files, so that a retry may succeed."""
        lost = [(video_id, reason) for video_id, reason in self.failed if not isinstance(reason, VideoFault)]
        if lost:
            raise UserError(
                f"extract: {len(lost)} video(s) were not done, first {lost[0][0]}: {lost[0][1]}; start again: finished "
                "videos are kept"
            )

    def sentence(self) -> str:
        """The outcome in one line."""
        rate = ""
        if self.frames and self.encoders == 1:
            rate = f" ({self.frames:,} frames, {self.frames / self.seconds:.1f} frames/s)"
        elif self.frames:
            rate = f" ({self.frames:,} frames, {self.frames_per_s or 0:.1f} frames/s without the other encoders)"
        counts = {
            "unchanged": len(self.skipped),
            "with new labels only": len(self.relabelled),
            "failed": len(self.failed),
        }
        others = "".join(f", {count} {word}" for word, count in counts.items() if count)
        return f"{len(self.done)} video(s) extracted{rate}{others}; {self.folder}"

    def add(self, job: VideoJob, reason: str | None) -> None:
        """Count a job that has ended, with the reason if it failed."""
        if reason is not None:
            self.failed.append((job.video_id, reason))
        elif job.labels_only:
            self.relabelled.append(job.video_id)
        else:
            self.done.append(job.video_id)
            self.frames += job.frames

    def sort(self, index: Index) -> None:
        """Put the videos into the order of the index, in whatever order they were finished."""
        order = {entry.id: number for number, entry in enumerate(index.videos)}
        for videos in (self.done, self.skipped, self.relabelled):
            videos.sort(key=order.__getitem__)
        self.failed.sort(key=lambda pair: order[pair[0]])

    def to_json(self, shard: str, made_by: Mapping[str, Any]) -> dict[str, Any]:
        """The content of `result.json`; `made_by` holds the encoder's digest, precision and device."""
        return {
            "folder": str(self.folder),
            **{key: made_by[key] for key in ("encoder_digest", "precision", "device")},
            "shard": shard,
            **{key: getattr(self, key) for key in ("done", "skipped", "relabelled")},
            "failed": [list(pair) for pair in self.failed],
            "frames": self.frames,
            "seconds": self.seconds,
            "decode_seconds": self.decode_seconds,
            "encode_seconds": self.encode_seconds,
            "processes": self.processes,
            "sentence": self.sentence(),
        }


def merged(parts: Sequence[Mapping[str, Any]], index: Index) -> dict[str, Any]:
    """The results of all shards merged into one; its `seconds` are those of the slowest shard."""
    whole = ExtractReport(Path(parts[0]["folder"]))
    for part in parts:
        whole.done += part["done"]
        whole.skipped += part["skipped"]
        whole.relabelled += part["relabelled"]
        whole.failed += [(video_id, reason) for video_id, reason in part["failed"]]
        whole.frames += part["frames"]
        whole.seconds = max(whole.seconds, part["seconds"])
        whole.decode_seconds += part.get("decode_seconds", 0.0)  # parts of an earlier version have none
        whole.encode_seconds += part.get("encode_seconds", 0.0)
    whole.processes = sum(part.get("processes", 1) for part in parts)
    whole.sort(index)
    return whole.to_json(f"all {len(parts)}", parts[0])
