"""The commands `datasets list`, `datasets show` and `datasets check`, about descriptions of data sets."""

from __future__ import annotations

from pathlib import Path

import click

from commands import options
from commands.options import PATH, Settings
from configs.errors import printable


@click.group()
def datasets() -> None:
    """List and show the known data sets, and try a description on a folder."""


@datasets.command("list")
def list_() -> None:
    """List the data sets whose descriptions are part of this program.

    "Unverified" are descriptions of which some part was not checked against the data set's documentation or a public
    loader; `datasets show NAME` says which.
    """
    from features.dataset.describe import dataset_rows

    rows = dataset_rows()
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@datasets.command()
@click.argument("name", metavar="NAME|FILE")
def show(name: str) -> None:
    """Print what a description says.

    NAME is one of `datasets list`, FILE a description of your own. Shown are the classes of every track with their ids,
    published splits with their sizes, the expected files and the form of their labels, licence and source, and
    operations that also occur in other data sets.
    """
    from configs.load import load_dataset
    from features.dataset.describe import dataset_lines

    for line in dataset_lines(load_dataset(name)):
        click.echo(printable(line))


@datasets.command()
@options.settings(name=None)
@click.argument("description", metavar="NAME|FILE")
@click.option("--root", type=PATH, help="Folder of the videos; the same as --set data.root=DIR.")
@click.option("--videos", "most", type=click.IntRange(1), metavar="N", help="Read only the first N videos.")
def check(settings: Settings, description: str, root: Path | None, most: int | None) -> None:
    """Try a description on a folder.

    Prints which videos and files of labels are found, the first labels of three videos in words, how much of the videos
    each track labels, and what is skipped and why. Compare the words with what you see in the videos: this shows a
    wrong rate, origin or order of classes at once. Nothing is written, and videos are not decoded beyond their first
    frames. The exit code is 1 if a video, a file or the labels of a video are missing, and 2 if the description is
    wrong or nothing can be used.
    """
    from configs.load import load_dataset
    from features.dataset.catalogue import data_root
    from features.dataset.trial import Trial

    config = settings.changed({"data.dataset": description, "data.root": root})
    trial = Trial(config, load_dataset(config.data.dataset), data_root(config), most)
    for line in trial.lines():
        click.echo(printable(line))
    options.exit_partly_if(trial.partial)
