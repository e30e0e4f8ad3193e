"""Commands about results: `evaluate`, `compare`, `report`, `predict`, `export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands import options
from commands.nets import NetChoice, net_options
from commands.options import FILE, PATH, Settings
from configs.errors import UserError

if TYPE_CHECKING:
    from configs.schema import Config


@click.command()
@options.settings()
@click.option("--predictions", type=PATH, metavar="DIR", help="Score phase files of any program instead of a run.")
@options.reading_options
@click.option(
    "--convention",
    "conventions",
    multiple=True,
    metavar="NAME",
    help="One of the conventions in docs/evaluation.md, or one from a plug-in. Repeatable. Default: all.",
)
@options.JSON_FILE
@click.option("--features", type=PATH, help=options.FEATURES_HELP)
@options.MODEL
@options.INFERENCE
@options.DECODING
@click.option(
    "--split", default="test", type=click.Choice(["train", "val", "test", "all"]), help="Part of the index to evaluate."
)
@click.option(
    "--index",
    "index_file",
    type=PATH,
    help="Evaluate on another data set with the same classes, or with --mapping; missing features are extracted.",
)
@click.option(
    "--mapping",
    type=PATH,
    metavar="NAME",
    help="Score phases in the vocabulary of a mapping in configs/mappings, or of a YAML file, and no tools.",
)
def evaluate(
    settings: Settings,
    features: Path | None,
    model: str,
    inference: Any,
    decoding: Any,
    split: str,
    index_file: Path | None,
    mapping: Path | None,
    predictions: Path | None,
    conventions: tuple[str, ...],
    json_file: Path | None,
    **reading: Any,
) -> None:
    """Score phases and tools of a run, or predictions of any program.

    Writes tables, metrics.json, one prediction file per video, and ribbons as PNG. A joint net reads frames, so it
    needs data.root. With joint.crops=five or ten, it averages over several crops of each frame.

    --index evaluates on another data set. If it has other phases, --mapping names a common vocabulary, such as
    cholecystectomy. A run is not tested on operations on which it was trained, whatever data set they are in, unless
    data.allow_overlap=true.

    With --predictions DIR --ground-truth DIR, no run is needed: phases are read from text files of any program, and
    files are matched by video number. They may have a header. Phases may be names, ids from 0, or one column per phase;
    columns are separated by tabs, commas or spaces.
    """
    if predictions is not None:
        of_runs = ("name", "features", "model", "inference", "decoding", "index_file", "mapping")
        options.refuse("--predictions", options.given(*of_runs))
        evaluate_predictions(settings, predictions, reading, conventions, json_file, split)
        return
    options.refuse("a run (no --predictions)", options.given(*reading, "conventions", "json_file"))
    run = settings.run()
    with options.watch_signals() as stop:
        common: dict[str, Any] = {"split": split, "inference": inference, "stop": stop, "given": settings.given()}
        common["mapping"] = mapping
        if options.uses_joint(model, run):
            options.refuse("a joint net, which reads frames", options.given("features", "decoding"))
            from features.dataset.catalogue import open_dataset
            from stage2_temporal.joint.evaluate import evaluate_joint

            config = settings.changed({"data.index": index_file})
            evaluation = evaluate_joint(config, run, open_dataset(config), other=index_file is not None, **common)
        else:
            from stage2_temporal.evaluate import evaluate_run

            config, common["decoding"] = settings.changed({"temporal.decoding.mode": decoding}), decoding
            evaluation = evaluate_run(config, run, features=features, index_file=index_file, **common)
    options.end_with_left_out(evaluation.left_out)


def evaluate_predictions(
    settings: Settings, predictions: Path, reading: Any, conventions: tuple[str, ...], out: Path | None, split: str
) -> None:
    """Score a folder of phase files against the annotations of `--ground-truth` (`evaluate --predictions`)."""
    from configs.load import load_dataset
    from evaluation.external import Reading, evaluate_folder

    spec = load_dataset(settings.config.data.dataset)
    if reading["ground_truth"] is None:
        raise UserError("--predictions: needs --ground-truth DIR, the folder with the annotations of the same videos")
    part = split if options.given("split") else None
    evaluate_folder(predictions, Reading(**reading), spec, conventions or None, split=part, out=out)


@click.command()
@options.settings(name=None)
@click.argument("models", nargs=-1, metavar="RUN_A RUN_B [RUN_C]...")
@click.option("--split", default="test", help="Evaluation to use: the name of a folder in RUN/evaluate.")
@click.option("--track", metavar="NAME", help="Label track to compare, such as steps. Default: the phases.")
@click.option("--convention", help="One convention. Default: video_macro, which has one value per video.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="accuracy, precision, recall, jaccard, f1 or a registered metric; with --convention segmental, transitions, "
    "calibration or phakir, one of theirs. Repeatable. Default: all; with --matrix accuracy and f1.",
)
@click.option("--matrix", is_flag=True, help="Show training sets against test sets instead of differences.")
@click.option("--mapping", metavar="NAME", help="With --matrix: use evaluations made with this mapping of classes.")
@click.option("--csv", type=FILE, metavar="FILE", help="With --matrix: also write the cells as CSV.")
@click.option("--html", type=FILE, metavar="FILE", help="With --matrix: also write a page.")
@options.reading_options
@options.JSON_FILE
def compare(
    settings: Settings,
    models: tuple[str, ...],
    split: str,
    track: str | None,
    convention: str | None,
    metrics: tuple[str, ...],
    matrix: bool,
    mapping: str | None,
    csv: Path | None,
    html: Path | None,
    json_file: Path | None,
    **reading: Any,
) -> None:
    """Compare models on the same videos: differences, intervals, p values.

    Each model is compared with the first. A model is an evaluated run, a JSON file of results, or (with --ground-truth)
    a folder of predictions. Runs of one model with several training seeds are joined by commas: compare lstm-0,lstm-1
    tcn-0,tcn-1. Differences are paired by video, and confidence intervals are over videos.

    With --matrix, each run is one row, and each data set on which the runs were evaluated is one column. `evaluate`
    makes the cells: of a run's own data set, and with --index of another one. If the data sets have different phases,
    all must be evaluated with the same --mapping.
    """
    from configs.load import load_dataset
    from configs.schema import MAIN_TRACK
    from evaluation.comparison import DEFAULT_CONVENTION, Place, compare_models, require_use
    from evaluation.external import Reading

    config, reads = settings.config, reading["ground_truth"] is not None
    if matrix:
        options.refuse("--matrix", options.given(*reading))
        chosen = {"convention": convention or DEFAULT_CONVENTION, "metrics": metrics or None}
        compare_across(config, models, split, track or MAIN_TRACK, mapping, (json_file, csv, html), chosen)
        return
    options.refuse("a comparison without --matrix", options.given("mapping", "csv", "html"))
    if not reads:
        options.refuse("runs (no --ground-truth)", options.given(*reading))
    else:
        options.refuse("folders of predictions, which are of phases", options.given("track"))
    require_use(models, config.runs, reading=reads, split=bool(options.given("split")))
    spec, read = load_dataset(config.data.dataset), Reading(**reading) if reads else None
    place = Place(config.runs, split, spec, read, track or MAIN_TRACK)
    convention = convention or DEFAULT_CONVENTION
    compare_models(models, place, convention=convention, metrics=metrics or None, out=json_file)


def compare_across(
    config: Config,
    models: Sequence[str],
    split: str,
    track: str,
    mapping: str | None,
    files: tuple[Path | None, Path | None, Path | None],
    chosen: Mapping[str, Any],
) -> None:
    """Show training sets against test sets (`compare --matrix`), and write JSON, CSV and page if they are named."""
    from evaluation.matrix import MatrixFiles, MatrixPlace, show_matrix

    if not models:
        raise UserError("compare --matrix: name the runs, for example compare --matrix RUN_A RUN_B")
    stem = Path(mapping).stem if mapping else None
    place = MatrixPlace(config.runs, split, stem, config.data.allow_overlap, track)
    show_matrix(models, place, MatrixFiles(*files), **chosen)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("--split", default="test", help="Evaluation to use: the name of a folder in RUN/evaluate.")
@click.option("--out", type=FILE, help="File to write. Default: report.html in the first RUN.")
@click.option("--figures", type=PATH, metavar="DIR", help="Also write the figures as PDF and PNG.")
@click.option("--no-thumbnails", is_flag=True, help="Do not open the videos; the report then shows no frames.")
def report(runs: tuple[Path, ...], split: str, out: Path | None, figures: Path | None, no_thumbnails: bool) -> None:
    """Write one HTML file about a run, or about several side by side.

    The file has tables under every convention, ribbons, curves, and the worst videos first; it can be read without a
    network. RUN is an evaluated run: its name, or its folder if that is not below `runs`.
    """
    from commands.report_runs import report_runs

    report_runs(runs, split=split, out=out, figures=figures, thumbnails=not no_thumbnails)


@click.command()
@net_options
@click.argument("videos", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, help="Folder to write. Default: RUN/predict.")
@click.option("--video", "draw", is_flag=True, help="Also write an MP4 with phase, tools and confidence drawn on it.")
@click.option(
    "--as",
    "formats",
    multiple=True,
    type=click.Choice(["csv", "eaf", "labelstudio"]),
    help="Also write phases as intervals with their confidence, to be corrected in ELAN (eaf) or Label Studio. "
    "Repeatable.",
)
def predict(net: NetChoice, videos: tuple[Path, ...], out: Path | None, draw: bool, formats: tuple[str, ...]) -> None:
    """Recognise phases and tools in new videos: CSV, ribbon, annotated video.

    VIDEOS are files or folders of frames; they need no labels. Each frame is predicted from itself and earlier frames
    only, as during an operation, and preprocessed as in training; only --decoding offline and temporal.decoding.lag_s
    look ahead, which the JSON file says. The command writes one CSV and one ribbon per video.
    If a video cannot be read, it is reported, the others are predicted, and the exit code is 1. For research only, not
    a medical device.
    """
    from live.new_videos import predict_new_videos

    with options.watch_signals() as stop:
        done = predict_new_videos(
            net.load(), videos, out or net.run / "predict", draw=draw, formats=tuple(dict.fromkeys(formats)), stop=stop
        )
    click.echo(done.sentence())
    options.end_with_failures(done.failed)


@click.command()
@options.settings()
@click.argument("run_name", metavar="[RUN]", required=False)
@click.option("--split", default="test", help="Folder in RUN/evaluate; with --from-predictions, the part of the index.")
@click.option("--out", type=PATH, help="Folder of the text files. Default: RUN/export/SPLIT.")
@click.option(
    "--probabilities", is_flag=True, help="Write tools as probabilities, as release pytorch1.2.0 does, not as logits."
)
@click.option("--force", "replace", is_flag=True, help="Replace files whose contents differ.")
@click.option(
    "--from-predictions",
    type=PATH,
    help="Read a prediction pickle of the original test programs instead of a run: phase ids or tool logits.",
)
@click.option("--tools-from", type=PATH, help="A second prediction pickle: the tool logits.")
@options.INDEX
@click.option("--sequence", type=click.IntRange(1), help="Frames per clip (S) with which the pickle was predicted.")
@click.option(
    "--fill-first",
    is_flag=True,
    help="Copy a video's first prediction to the S-1 frames before it, as the originals do.",
)
@options.PHASE_ORDER
def export(
    settings: Settings,
    run_name: str | None,
    from_predictions: Path | None,
    tools_from: Path | None,
    index_file: Path | None,
    **chosen: Any,
) -> None:
    """Write predictions as the original MTRCNet programs' text files.

    These files are videoNN-phase.txt and videoNN-tool.txt. For RUN, they contain its evaluated predictions. Each frame
    is predicted from itself and earlier frames (except by bidirectional heads); a video's first S-1 frames have fewer
    than S frames to be predicted from. A prediction pickle has no predictions for those frames. They are left out,
    unless --fill-first gives them a prediction that has seen later frames.
    """
    from interop.text_files import export_predictions, export_run

    config = settings.changed({"data.index": index_file})
    if from_predictions:
        options.refuse("--from-predictions", [*(["RUN"] if run_name else []), *options.given("name")])
        export_predictions(config, [file for file in (from_predictions, tools_from) if file], **chosen)
        return
    of_pickles = ("sequence", "fill_first", "phase_order")
    options.refuse("a run (no --from-predictions)", options.given("tools_from", "index_file", *of_pickles))
    if run_name:
        options.refuse("RUN, which is the same", options.given("name"))
    export_run(config, settings.run(run_name), **{key: chosen[key] for key in chosen if key not in of_pickles})
