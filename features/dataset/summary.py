"""Make tables that show how many sampled frames each split, phase and tool has."""

from __future__ import annotations

import numpy as np

from features.dataset.index import SPLITS, Dataset, Index, VideoEntry
from features.dataset.labels import load_labels
from features.dataset.sampling import sampled_frames

Counts = dict[str, list[int]]  # by video id; the numbers are in the order of the summary's rows (see `count_frames`)


def count_frames(dataset: Dataset, fps: float) -> Counts:
    """Count the frames of each video sampled at `fps`.

    The counts are, in this order: all frames, frames of each phase, frames without a phase, frames with each tool, and
    frames without tool labels. Raises UserError if a video cannot be sampled at `fps` (see `most_fps`) or its
    annotations have changed.
    """
    spec, counts = dataset.spec, {}
    for entry in dataset.index.videos:
        phase, tools = load_labels(dataset, entry, sampled_frames(entry, fps))
        rows = [len(phase), *np.bincount(phase[phase >= 0], minlength=len(spec.phases)), (phase < 0).sum()]
        if spec.tools:
            rows += [*(tools > 0).sum(axis=0), (tools < 0).all(axis=1).sum()]
        counts[entry.id] = list(map(int, rows))
    return counts


def coverage_table(index: Index, counts: Counts) -> list[list[str]]:
    """Return a table with a header and one row per video: its images, how many are used, and how many are labelled."""
    rows = [["video", "images", "used", "with a phase", *(["with tools"] if index.dataset.tools else [])]]
    for entry in index.videos:
        count = counts[entry.id]
        without = (count[1 + len(index.dataset.phases)], *(count[-1:] if index.dataset.tools else ()))
        labelled = (f"{(count[0] - bare) / count[0]:.1%}" if count[0] else "-" for bare in without)
        rows.append([entry.id, f"{len(entry.image_frames):,}", f"{count[0]:,}", *labelled])
    return rows


def index_summary(index: Index, counts: Counts) -> list[list[str | int | float]]:
    """Return a table of the splits, with a header and rows for videos, hours, frames, and frames of each class.

    The columns are the splits that have videos, and all videos together. There are rows for frames without labels.
    Since a frame may show several tools, the rows of the tools do not add up to all frames.
    """
    spec = index.dataset
    groups: list[tuple[str, tuple[VideoEntry, ...]]] = [(split, index.by_split(split)) for split in SPLITS]
    groups = [(name, videos) for name, videos in groups if videos]
    if len(groups) > 1 or groups[0][0] != "none":
        groups.append(("all", index.videos))
    names = ["frames", *spec.phases, "no phase label", *spec.tools, *(["no tool labels"] if spec.tools else [])]
    columns = [np.sum([counts[entry.id] for entry in videos], axis=0).tolist() for _, videos in groups]
    hours = [sum(entry.frame_count / entry.fps for entry in videos) / 3600 for _, videos in groups]
    return [
        ["", *(name for name, _ in groups)],
        ["videos", *(len(videos) for _, videos in groups)],
        ["hours", *(round(value, 2) for value in hours)],
        *([name, *cells] for name, cells in zip(names, zip(*columns, strict=True), strict=True)),
    ]
