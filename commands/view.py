"""The command `view`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands import options
from commands.options import FILE, PATH
from configs.errors import UserError


@click.command()
@click.argument("sources", nargs=-1, type=PATH, metavar="[VIDEO]...")
@click.option("--run", "runs", multiple=True, type=PATH, metavar="RUN", help="Show an evaluated run. Repeatable.")
@click.option("--split", default="test", help="Evaluation to show: the name of a folder in RUN/evaluate.")
@click.option(
    "--show",
    "shown",
    multiple=True,
    type=PATH,
    metavar="PATH",
    help="Show predictions (CSV of `predict`) or labels (.eaf, .csv, .json, -phase.txt), a file or a folder. "
    "Repeatable.",
)
@click.option("--labels", type=PATH, metavar="DIR", help="Folder in which labels are made. Without it: only to look.")
@click.option("--annotator", metavar="NAME", help="Whose labels are made; those of others are shown beside them.")
@click.option(
    "--dataset", metavar="NAME", help="Data set whose classes are offered (configs/datasets, or FILE). Default: RUN's."
)
@click.option("--live", type=FILE, metavar="FILE", help="Follow the file that `stream --jsonl FILE` writes.")
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port on 127.0.0.1. 0: any that is free.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def view(sources: tuple[Path, ...], runs: tuple[Path, ...], port: int, no_browser: bool, **ask: Any) -> None:
    """Look at videos with labels and predictions in a browser, and correct labels.

    VIDEO is a video file, a folder of frames, or a folder of videos; without it, the videos of RUN are opened. The page
    is served to this machine alone (127.0.0.1), and only at the address that is printed, which contains a key. With
    --labels, labels are made or corrected and saved at once as DIR/ID.csv, in the form that `annotations convert` and
    `index` read; docs/annotating.md shows how.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"view needs {error.name}; install it with `pip install 'surgstage[view]'`") from error
    if not runs:
        options.refuse("no --run", options.given("split"))
    if ask["labels"] is None:
        options.refuse("no --labels", options.given("annotator"))
    from live.view.serve import open_material, serve

    material = open_material(sources, runs, **ask)
    with options.watch_signals() as stop:
        serve(material, stop, port=port, browser=not no_browser)
