"""Check whether sources and annotations are still the same as when they were indexed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from configs.errors import UserError
from engine.files import inside
from engine.progress import BAR_AFTER_S, progress_bar
from features.dataset.frame_folders import scan_folder, source_frames
from features.dataset.index import Dataset, VideoEntry
from features.dataset.labels import load_tracks
from features.dataset.sources import SourceFacts, folder_facts, record_facts, video_facts
from features.video.scan import count_packets


def check_index(dataset: Dataset) -> list[str]:
    """Compare an index with the files, and return one line per problem.

    Sources must exist with the recorded size, time of change, hash of the ends (and of the whole, where recorded) and
    rate, and have as many packets as frames; in TFRecord files, all checksums are verified. Annotations must exist with
    the recorded hash, be readable and fit their video. Raises UserError if the root is missing.
    """
    index, root = dataset.index, dataset.root
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; set data.root (or SURGSTAGE_DATA) to the folder of the indexed videos"
        )
    problems = [f"{video.id}: left out of the index: {video.reason}" for video in index.left_out if not video.excluded]
    problems += [f"{one.id}: passed over: {one.reason}" for one in index.passed_over if not one.excluded]
    with progress_bar(None, "check", "video", iterable=index.videos, delay=BAR_AFTER_S) as videos:
        for entry in videos:
            for check in (_check_source, load_tracks):
                try:
                    check(dataset, entry)
                except UserError as error:
                    problems.append(f"{entry.id}: {error}")
    return problems


def _check_source(dataset: Dataset, entry: VideoEntry) -> None:
    """Raise UserError naming the difference if a source differs from its entry."""
    for part in entry.sources if entry.parts else ():
        _check_source(dataset, part)
    if entry.parts:
        return
    root, spec = dataset.root, dataset.spec
    path, full_hash = inside(root, entry.source), entry.sha256 is not None
    if entry.frames is not None:
        scan = scan_folder(root, entry.source, spec)
        source_frames(scan, entry.frames)
        _require_same(entry, folder_facts(scan, entry.frames, spec, full_hash), path)
    elif entry.records is not None:
        facts = record_facts(root, entry.source, entry.id, spec, entry.records.phase_order, full_hash)
        if facts.records != entry.records:
            raise UserError(f"{path}: its labels are not those that were indexed; run index again")
        _require_same(entry, facts, path)
    else:
        facts, _ = video_facts(root, entry.source, full_hash, spec.counts_from_container)
        _require_same(entry, facts, path)
        if (packets := count_packets(path)) != entry.frame_count:
            raise UserError(f"{path}: contains {packets} frames, but its header says {entry.frame_count}; re-encode it")


def _require_same(entry: VideoEntry, now: SourceFacts, path: Path) -> None:
    """Raise UserError for the first fact that differs; the time of change is ignored if there is a whole-file hash."""
    for name in (field.name for field in fields(now)):
        found, indexed = getattr(now, name), getattr(entry, name)
        if found != indexed and name not in ("modified_ns", "times"):
            raise UserError(f"{path}: {name} is {found}, but was indexed as {indexed}; run index again")
    if now.modified_ns != entry.modified_ns and entry.sha256 is None:
        raise UserError(
            f"{path}: was rewritten since it was indexed, with the same size and ends; run index again "
            "(with data.full_hash=true, a mere copy is recognised as unchanged)"
        )
    if now.times != entry.times:
        raise UserError(f"{path}: its frames are shown at other times than were indexed; run index again")
