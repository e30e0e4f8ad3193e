"""The `report` command: write an HTML file about runs, with frames on which prediction and annotation disagree."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UserError
from configs.schema import Config
from engine.progress import say
from evaluation.comparison import DEFAULT_CONVENTION
from evaluation.matrix import MatrixPlace, make_matrix
from evaluation.reports.gather import Disagreement, Report, Thumbnail, disagreements, find_run, gather, recordings
from evaluation.reports.matrix import matrix_tables
from features.dataset.index import Dataset

THUMBNAIL_PX = 240
REPORT_FILE = "report.html"


def report_runs(
    runs: Sequence[Path],
    *,
    split: str = "test",
    out: Path | None = None,
    figures: Path | None = None,
    thumbnails: bool = True,
) -> Path:
    """Write the report of evaluated runs to `out` (default: into the first run's folder), and return its path.

    `runs` are folders, or names of folders below `runs/`. If `figures` is given, the figures are also written into that
    folder as PDF and PNG. If the videos are not available, the report has no thumbnails. Raises UserError if a run has
    not been evaluated or the runs cannot be compared.
    """
    from evaluation.reports.page import write_report

    runs = [find_run(run) for run in runs]
    report = gather(runs, split)
    report = with_other_data_sets(report, runs, split)
    report = with_thumbnails(report, runs[0]) if thumbnails else report
    out = out or runs[0] / REPORT_FILE
    write_report(out, report)
    if figures is not None:
        from evaluation.reports.static_files import write_figures

        say(f"figures: {len(write_figures(figures, report))} files in {figures}")
    if report.thumbnails_note:
        say(f"note: {report.thumbnails_note}")
    say(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB, opens in any browser, needs no network)")
    return out


def with_other_data_sets(report: Report, runs: Sequence[Path], split: str) -> Report:
    """Add tables of training sets against test sets to the report, if a run was evaluated on several data sets."""
    evaluation = report.runs[0].evaluation
    mapping = (evaluation.mapping or {}).get("name")
    place = MatrixPlace(Path(), evaluation.split, mapping, allow_overlap=True)
    if place.folder != split or not report.runs[0].phases:
        return report
    try:
        matrix = make_matrix([str(run) for run in runs], place, DEFAULT_CONVENTION)
    except UserError as error:
        say(f"note: no table across data sets: {error}")
        return report
    return dataclasses.replace(report, across=matrix_tables(matrix)) if len(matrix.tested_on) > 1 else report


def with_thumbnails(report: Report, run: Path) -> Report:
    """Add frames of the worst videos to the report, or a note that says why there are none."""
    wanted = disagreements(report)
    if not wanted:
        return report
    try:
        config, dataset = recordings(run)
    except UserError as error:
        return dataclasses.replace(report, thumbnails_note=_note(error))
    found: list[Thumbnail] = []
    missing: list[UserError] = []
    for video in dict.fromkeys(part.video for part in wanted):
        parts = [part for part in wanted if part.video == video]
        try:
            found += _read(report, config, dataset, video, parts)
        except UserError as error:
            missing.append(error)
    return dataclasses.replace(report, thumbnails=found, thumbnails_note=_note(missing[0]) if missing else "")


def _note(error: UserError) -> str:
    return f"Videos that are not available are shown without frames: {error}"


def _read(
    report: Report, config: Config, dataset: Dataset, video: str, parts: Sequence[Disagreement]
) -> list[Thumbnail]:
    from features.frames.source import open_source

    entry = dataset.index.entry(video)
    if entry.sha256_ends != report.truth.videos[video].source:
        raise UserError(f"{video}: the index has another recording under this id than the evaluation had")
    by_frame = {part.frame: part for part in parts}
    with open_source(config, dataset, entry) as reader:
        images = list(reader.read(sorted(by_frame)))
    return [Thumbnail(by_frame[f], jpeg(rgb)) for f, rgb in zip(sorted(by_frame), images, strict=True)]


def jpeg(rgb: NDArray[np.uint8]) -> bytes:
    """Encode a frame (H, W, 3) as a small JPEG."""
    image = Image.fromarray(rgb)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()
