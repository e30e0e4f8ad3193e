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
    """Check, describe, import and export feature folders."""


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


@features.command(name="import")
@click.argument("place", metavar="IN", type=PATH)
@options.settings(name=None)
@click.option("--out", required=True, type=PATH, metavar="DIR", help="Feature folder to write.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["auto", "tecno", "transsvnet", "mstcn", "npy", "npz", "pt", "h5"]),
    default="auto",
    help="What the files are: pickles of TeCNO or Trans-SVNet, a folder of MS-TCN or ASFormer, or files of arrays. "
    "auto: from the names of the files.",
)
@click.option("--fps", type=options.POSITIVE, metavar="RATE", help="Rows per second in the files.")
@click.option("--every", type=click.IntRange(1), default=1, metavar="N", help="Take only every N-th row.")
@click.option("--dataset", metavar="NAME", help="Data set whose classes the labels are; a name or a YAML file.")
@click.option("--index", type=PATH, metavar="FILE", help="Index of the videos: their splits, frames, times and labels.")
@click.option(
    "--labels",
    metavar="WHERE",
    help="files: in or beside the files of features; index: from the index; none; or a folder of text files with one "
    "row per row of features. Default: index with --index, otherwise files.",
)
@options.PHASE_ORDER
@click.option("--split", metavar="NAME", help="Division in the bundles of MS-TCN, such as split1.")
@click.option(
    "--layout",
    "axes",
    type=click.Choice(["TD", "DT"]),
    help="Which axis is time (T). Default: the one whose length agrees with the labels, or differs between files.",
)
@click.option("--key", metavar="NAME", help="Array with the features, if a file holds several.")
@click.option(
    "--encoder",
    metavar="NAME",
    help="Name of the encoder that made the features. Folders imported under the same name can be used together.",
)
def import_(
    settings: Settings, place: Path, out: Path, layout: str, dataset: str | None, index: Path | None, **chosen: Any
) -> None:
    """Make a feature folder of features that another program computed.

    IN is a folder (or one file) with one file per video. Stage two uses the result like any other feature folder:
    `train-temporal`, `ablate` and `evaluate` take it with --features DIR. `predict` cannot, since it would need the
    encoder. Splits are those of the index or of MS-TCN's bundles, or what data.split says. The rate of the rows is
    never assumed: give it with --fps, unless the files' names contain it as TeCNO's do (`video_1_25.0fps.pkl`, which
    --every 25 turns into one row per second). Nothing in a file is executed. A second call continues where the first
    one stopped.

    \b
      features import cholec80_pickle_export/25.0fps --out F --dataset cholec80 --every 25
      features import data/50salads --out F --fps 30 --split split1
      features import h5_files --out F --fps 1 --index artifacts/index.json --set data.root=DIR
    """
    from interop.feature_files.importing import Request, import_features

    if index is not None:
        options.refuse("--index, which names the data set and the splits", options.given("dataset", "split"))
    options.note_unused(settings, "temporal", "joint", "data.tracks")
    if chosen["encoder"] is not None and not chosen["encoder"].strip():
        raise UserError("--encoder: the name is empty; give one, or leave the option out")
    asked = dataset or (settings.config.data.dataset if settings.given().any_of("data.dataset") else None)
    request = Request(layout=None if layout == "auto" else layout, dataset=asked, index=index, **chosen)
    with options.watch_signals() as stop:
        report = import_features(place, out, settings.config, request, stop)
    click.echo(report.sentence())
    options.end_with_left_out(report.left_out)


@features.command()
@click.argument("folder", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--to",
    "layout",
    type=click.Choice(["mstcn", "npz"]),
    required=True,
    help="mstcn: features/*.npy (D, T), groundTruth/*.txt, mapping.txt and splits/*.bundle, as MS-TCN and ASFormer "
    "read them. npz: one NumPy archive per video.",
)
@click.option("--unlabelled", metavar="NAME", help="With mstcn: the class of frames without a label.")
@click.option("--force", "replace", is_flag=True, help="Write into a folder that is not empty.")
def export(folder: Path, out: Path, layout: Any, unlabelled: str | None, replace: bool) -> None:
    """Write the features in FOLDER to OUT for other programs, as float32.

    NumPy alone reads them. `surgstage.json` in OUT says what the files cannot: the rows per second, the encoder, and
    original names. `features import` reads both forms back.
    """
    from interop.feature_files.export import export_features

    if layout == "npz":
        options.refuse("--to npz, which can hold frames without a label", options.given("unlabelled"))
    with options.watch_signals() as stop:
        sentence = export_features(folder, out, layout, unlabelled=unlabelled, replace=replace, stop=stop)
    click.echo(sentence)
