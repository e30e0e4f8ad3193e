"""Commands about data: `index`, `simulate`, `features`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands import options
from commands.options import PATH, Settings
from configs.errors import UserError, printable


@click.command()
@options.settings(name=None)
@click.option("--root", type=PATH, help="Folder of the videos; the same as --set data.root=DIR.")
@click.option("--out", type=PATH, help="Where to write the index; the same as --set data.index=FILE.")
@click.option("--force", "replace", is_flag=True, help="Replace an index that differs from what is found now.")
@click.option("--unverified", is_flag=True, help="Use a data set whose description is marked as unverified.")
@click.option("--check", is_flag=True, help="Check the existing index against the files, without decoding videos.")
@click.option(
    "--from-pickle",
    "pickles",
    multiple=True,
    type=PATH,
    help="Read videos, labels and split from an index pickle of the original programs. No code in the pickle is run. "
    "Repeatable.",
)
@click.option("--labels-to", type=PATH, help="Folder below the data root for the labels of --from-pickle.")
@click.option("--to-pickle", type=PATH, help="Write the index as a pickle of the original programs.")
@click.option(
    "--layout",
    type=click.Choice(["cholec80", "train_val_test", "train_val", "test"]),
    default="cholec80",
    help="With --to-pickle: cholec80 is one list of videos; the others have one list per part of the split.",
)
@click.option("--phases-only", is_flag=True, help="With --to-pickle: write no tools, as release pytorch1.2.0 expects.")
@options.PHASE_ORDER
def index(
    settings: Settings,
    root: Path | None,
    out: Path | None,
    replace: bool,
    unverified: bool,
    check: bool,
    pickles: tuple[Path, ...],
    labels_to: Path | None,
    to_pickle: Path | None,
    phase_order: str | None,
    **layout: Any,
) -> None:
    """Find the videos and annotations below a folder, and split them.

    Videos may be files, folders of frames or TFRecords. They are recognised by their file names (configs/datasets), in
    any folder. Only the first frames of each video are decoded. A video that cannot be used is left out and named, and
    so is a file that looks like a video but matches no pattern; the exit code is then 1, and all other videos are
    indexed. If there are several sources of one video, data.sources chooses one: video, frames, tfrecord or
    frames:FOLDER. data.exclude leaves videos out permanently, by id, path or shell pattern, each with a reason: --set
    'data.exclude={video07: wrong patient, "case_*": no consent}'.

    Index pickles of the original MTRCNet programs (such as cholec80.pkl or train_val_test_paths_labels.pkl) can be read
    and written. --phase-order says which phase each number in them means, and each number in TFRecord files
    (data.tfrecord_phase_order).
    """
    from features.dataset.catalogue import check_dataset, index_dataset
    from interop.pickled_index import index_from_pickles, pickle_from_index

    if check:
        options.refuse("--check", options.given("replace", "unverified", "pickles", "to_pickle", "phase_order"))
    if not pickles:
        options.refuse("an index without --from-pickle", options.given("labels_to"))
    if not to_pickle:
        options.refuse("an index without --to-pickle", options.given(*layout))
    numbering = None if pickles or to_pickle else phase_order
    given = {"data.root": root, "data.index": out, "data.tfrecord_phase_order": numbering}
    config = settings.changed({**given, "data.unverified": unverified or None})
    if pickles:
        index_from_pickles(config, pickles, phase_order=phase_order, labels_to=labels_to, replace=replace)
    if to_pickle:
        pickle_from_index(config, to_pickle, phase_order=phase_order, replace=replace, **layout)
    if pickles or to_pickle:
        return
    if not check:
        found = index_dataset(config, replace=replace)
        if phase_order is not None and not any(entry.records for entry in found.videos):
            raise UserError("--phase-order: only TFRecord files number phases, and none was found; leave it out")
        options.exit_partly_if(found.is_partial)
        return
    problems = check_dataset(config)
    for problem in problems:
        click.echo(printable(problem), err=True)
    click.echo(f"{len(problems)} problem(s) found" if problems else "index and files agree")
    options.exit_partly_if(problems)


@click.command()
@click.argument("out", type=PATH)
@click.option("--videos", default=10, help="Number of operations.")
@click.option("--seed", default=0, help="Random seed: the same seed and options give the same labels and pixels.")
@click.option("--fps", default=25, help="Frames per second of the videos.")
@click.option("--width", "width_px", default=224, help="Width of a frame in pixels.")
@click.option("--height", "height_px", default=224, help="Height of a frame in pixels.")
@click.option("--speed-up", default=1.0, help="Divide all durations by this number.")
@click.option("--first", "first_number", default=1, help="Number of the first video.")
@click.option("--workers", default=1, help="Number of processes; the files do not depend on it.")
def simulate(out: Path, **chosen: Any) -> None:
    """Write SIMULATED operations to try the pipeline on.

    OUT is laid out like Cholec80. The label sequences follow aggregate statistics of Cholec80's training videos, and
    the frames are drawn by a program. They are meant for trying the pipeline and for tests: results on them say nothing
    about real operations.
    """
    from configs.load import load_dataset
    from features.simulation.write import simulate as write_videos

    with options.watch_signals() as stop:
        made = write_videos(out, spec=load_dataset("cholec80"), stop=stop, **chosen)
    counts = f"{len(made.made)} simulated videos made ({made.video_s:.0f} s), {len(made.skipped)} existed already"
    click.echo(f"{out}: {counts}")


@click.group()
def features() -> None:
    """Check and describe feature folders."""


@features.command()
@click.argument("folder", type=PATH)
def verify(folder: Path) -> None:
    """Check every feature file in FOLDER.

    Every file is read completely and its checksums are verified. The exit code is 1 if a file is damaged.
    """
    from features.store_folder import recorded_faults, verify_folder

    bad = 0
    for path, problem in verify_folder(folder):
        bad += problem is not None
        click.echo(f"{path.name}: {problem or 'ok'}", err=problem is not None)
    click.echo(f"{bad} file(s) are damaged: run extract again" if bad else "all files are intact")
    if left_out := recorded_faults(folder):
        click.echo(f"{len(left_out)} video(s) were left out, since extract could not read them:")
        for video_id, reason in left_out:
            click.echo(printable(f"  {video_id}: {reason}"))
    options.exit_partly_if(bad)


@features.command()
@click.argument("folder", type=PATH)
def info(folder: Path) -> None:
    """Print which encoder made the features in FOLDER, and what they contain."""
    from features.store_folder import describe_folder

    for line in describe_folder(folder):
        click.echo(line)
