"""Commands about labels and annotation tools: `annotations convert`, `annotations review`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands import options
from commands.options import PATH


@click.group("annotations")
def group() -> None:
    """Convert files of annotation tools, and find labels to check."""


@group.command()
@click.argument("path", metavar="IN", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(["cholec80", "csv", "eaf", "labelstudio"]),
    help="Format to write.",
)
@click.option(
    "--from",
    "source",
    type=click.Choice(["cholec80", "csv", "eaf", "labelstudio"]),
    help="Format of IN, or of the files in IN to read. Default: by their endings.",
)
@click.option(
    "--dataset", metavar="NAME", help="Data set whose names of classes are written (configs/datasets, or FILE)."
)
@click.option("--track", metavar="NAME", help="Convert only this track (ELAN: tier).")
@click.option("--annotator", metavar="NAME", help="Convert only the labels of this annotator.")
@click.option("--fps", type=options.POSITIVE, help="Frames per second of the videos, for formats that count frames.")
@click.option("--index", "index_file", type=PATH, help="Index that knows the videos' rates, lengths and files.")
@click.option(
    "--media",
    default="/data/local-files/?d=",
    metavar="PREFIX",
    help="labelstudio: what to put before the videos' paths: a URL, or a path below which Label Studio serves files.",
)
@click.option("--force", "replace_files", is_flag=True, help="Replace files whose contents differ.")
def convert(path: Path, out: Path, target: str, index_file: Path | None, **ask: Any) -> None:
    """Convert files of ELAN, Label Studio, CSV, and Cholec80's text.

    IN is a file or a folder of files: .eaf (ELAN), .json (Label Studio), .csv (video, track, label, start, end) or
    -phase.txt (Cholec80). OUT is a folder, or a file if one is enough: csv and labelstudio have all videos in one. What
    the format cannot hold is listed in notes. Label Studio and Cholec80 count frames, whose rate comes from the file,
    --fps or --index. With --to labelstudio, the labelling configuration is written beside it.
    """
    from interop.annotations import convert_files

    if index_file is not None:
        options.refuse("--index, which has the rates", options.given("fps"))
    if target != "labelstudio":
        options.refuse(f"--to {target}", options.given("media"))
    options.end_with_failures(convert_files(path, out, target, index_file=index_file, **ask).failed)


@group.command()
@click.argument("run", type=PATH)
@click.option("--split", default="test", help="Evaluation to use: the name of a folder in RUN/evaluate.")
@click.option(
    "--min-confidence",
    "least",
    default=0.5,
    type=click.FloatRange(0, 1),
    help="Leave out intervals in which the mean probability of the prediction is below this.",
)
@click.option("--top", default=20, type=click.IntRange(1), help="Number of intervals to print; the table has all.")
@click.option(
    "--as",
    "formats",
    multiple=True,
    type=click.Choice(["eaf", "labelstudio"]),
    help="Also write labels and doubts for ELAN (eaf) or Label Studio. Repeatable.",
)
@click.option("--out", type=PATH, help="Folder to write. Default: RUN/evaluate/SPLIT/review.")
def review(run: Path, formats: tuple[str, ...], **ask: Any) -> None:
    """Rank the intervals in which model and labels disagree.

    RUN is an evaluated run: its name, or its folder if that is not below `runs`. Intervals are ranked by the time by
    which their label is in doubt: the sum over their seconds of p(prediction) - p(label). Prints the first ones, and
    writes all as review.csv. With --as, each video with such an interval gets a file with its labels (track `phase`)
    and the model's phases where it disagrees (track `model`).
    """
    from evaluation.review import review_run

    review_run(run, formats=tuple(dict.fromkeys(formats)), **ask)
