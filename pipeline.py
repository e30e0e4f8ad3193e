"""The command line: parse, call one function, print. `python pipeline.py --help` lists the commands.

Nothing heavy is imported before a command runs, so that help answers at once.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

PACKAGES = ("configs", "engine", "evaluation", "features", "stage1_cnn", "stage2_temporal")
for _package in PACKAGES:  # plain names: a package of the same name earlier on Python's path would be taken for ours
    _spec = importlib.util.find_spec(_package)
    _found = [os.path.realpath(place) for place in _spec.submodule_search_locations or ()] if _spec else []
    if os.path.join(os.path.dirname(os.path.realpath(__file__)), _package) not in _found:
        _where = _found[0] if _found else (_spec and _spec.origin)
        print(
            f"error: {_where} is found where this program's own package {_package} should be; take its folder off "
            "PYTHONPATH, or start from another folder",
            file=sys.stderr,
        )
        sys.exit(2)

from configs.errors import UserError, printable  # noqa: E402 - not before it is known to be ours

if TYPE_CHECKING:
    from configs.schema import Config

EXIT_PARTLY = 1
EXIT_BAD_INPUT = 2
EXIT_LOST_ANOTHER = 70  # EX_SOFTWARE: this process was sound, another one of the same training was not
LEAVES_AFTERWARDS = "nothing comes after the command but the end of the process"
JOB_STAGES = ("train-cnn", "extract", "train-temporal", "train-joint", "evaluate", "run", "ablate")


class Group(click.Group):
    """Turns the errors a user can mend into one line and exit code 2, and stop signals into their codes."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except UserError as error:
            if _may_tell(error):
                click.echo(f"error: {error}", err=True)
            context.exit(EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            context.exit(130)
        except OSError as error:
            from engine.files import as_user_error

            shown = as_user_error(error, Path(str(error.filename or "output")))
            if not isinstance(shown, UserError):
                raise
            if _may_tell(shown):
                click.echo(f"error: {shown}", err=True)
            context.exit(EXIT_BAD_INPUT)
        except Exception as error:
            code = getattr(error, "exit_code", None)
            if type(error).__name__ != "Stopped" or code is None:
                if _lost_another(error):
                    if _may_tell(error):
                        line = str(error).splitlines()[0][:160]
                        click.echo(f"error: another process of this work has ended ({line})", err=True)
                    context.exit(EXIT_LOST_ANOTHER)
                raise
            if _may_tell(error):
                click.echo(f"{error}; what was done is saved: the same command goes on from there", err=True)
            context.exit(code)


def _speaks() -> bool:
    """Whether this process is the one that speaks for all that a launcher started."""
    from engine.processes import speaks

    return speaks()


def _may_tell(problem: Exception) -> bool:
    """Whether this process is the one to say why all that a launcher started end."""
    from engine.processes import may_tell

    return may_tell(problem)


def _lost_another(error: Exception) -> bool:
    from engine.processes import lost_another

    return lost_another(error)


def several_devices(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--devices N`: this process only starts N others, which do the command, and ends as they do."""

    @functools.wraps(command)
    def started(*arguments: Any, devices: int | None, **options: Any) -> Any:
        from engine.processes import COPY_OF, launch, run_copies

        if devices is None or COPY_OF in os.environ:
            return command(*arguments, **options)
        if launch().count > 1:
            raise UserError("--devices: torchrun or srun has started several processes already; leave it out")
        if devices == 1:
            return command(*arguments, **options)
        sys.exit(run_copies([sys.executable, *sys.argv], devices))

    return click.option(
        "--devices",
        type=click.IntRange(1),
        metavar="N",
        help="Work as N processes on this machine, one GPU per process. Several machines: torchrun or srun.",
    )(started)


ON_SEVERAL = ("train-cnn", "train-joint", "train-temporal", "extract")


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--config` and `--set`, the same for every command that has settings."""
    for option in (
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change one setting, for example --set temporal.head.hidden=256. Repeatable.",
        ),
        click.option(
            "--config",
            "source",
            default="cholec80",
            show_default=True,
            metavar="FILE",
            help="Settings: a YAML file or the name of a preset in configs/.",
        ),
    ):
        command = option(command)
    return command


MODEL = click.option(
    "--model",
    type=click.Choice(["auto", "temporal", "joint"]),
    default="auto",
    show_default=True,
    help="Which of the run's nets; auto takes the joint one where there is no other.",
)
INFERENCE = click.option(
    "--inference",
    type=click.Choice(["clip", "carried"]),
    help="State from zero at each clip, or carried through the video. Default: as it was trained to be used.",
)
PHASE_ORDER = click.option(
    "--phase-order",
    metavar="ORDER",
    help="Which phase is 0, 1, ... in a file of numbers: a name (mtrcnet, tf-cholec80), a file with one phase per "
    "line, or comma-separated names. Always asked for, never assumed.",
)


def settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--config`, `--set` and `--name`, the same for every command that works on a run."""
    name = click.option("--name", help="Name of the run, a folder below `runs/`. Default: the name of the preset.")
    return config_options(name(command))


def _config(source: str, overrides: tuple[str, ...], changes: Mapping[str, object] | None = None) -> Config:
    """Settings with the values of `--set` and, by key, of other options (None: not given)."""
    from configs.load import load_config

    given = {key: value for key, value in (changes or {}).items() if value is not None}
    return load_config(source, overrides, given)


def _run(config: Config, source: str, name: str | None) -> Path:
    from engine.runs import run_folder

    return run_folder(config, name or Path(source).stem)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="surgstage", message="%(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Surgical workflow recognition in two stages.

    \b
    index           find videos and annotations below a folder, split them
    train-cnn       stage one: fine-tune a CNN on the tools seen in frames
    extract         one embedding a frame into one HDF5 file a video
    train-temporal  stage two: an LSTM over whole videos, seconds an epoch
    ablate          settings of stage two compared: seeds, ranked table, plots, the winner's settings
    train-joint     both stages in one net, end to end (MTRCNet, MTRCNet-CL)
    evaluate        phases and tools on the test videos, or anyone's predictions: tables, JSON, ribbons
    report          one HTML file of a run, or of several side by side
    compare         two runs or more on the same videos: differences, intervals, tests
    predict         phases and tools of new videos: CSV, ribbon, a video with both drawn in
    export          predictions as the original MTRCNet programs' text files
    run             index, both stages and evaluation from one file of settings
    submit          a stage as a Slurm job, or extract as an array of jobs; goes on by itself after a time limit
    simulate        simulated operations to try it on
    doctor          is this machine able to do what the settings ask for?

    \b
    import-checkpoint, export-checkpoint
                    files of the original MTRCNet programs as runs, and back

    Commands with settings take --config FILE and --set key=value; `config show` prints what they come to. The folder of
    the videos is data.root: `--set data.root=DIR`, a line in the file, or the variable SURGSTAGE_DATA.
    """
    from engine.processes import launch, speak_torchrun

    if launch().count == 1:
        return
    if context.invoked_subcommand not in ON_SEVERAL:
        raise UserError(
            f"{context.invoked_subcommand} is one process's work, and a launcher has started {launch().count}; "
            f"on several run {', '.join(ON_SEVERAL)}"
        )
    speak_torchrun()


@cli.group()
def config() -> None:
    """Look at settings."""


@config.command("show")
@config_options
def config_show(source: str, overrides: tuple[str, ...]) -> None:
    """Print every setting as the commands will see it: preset, file and --set together."""
    from configs.load import to_yaml

    click.echo(to_yaml(_config(source, overrides)), nl=False)


@cli.command()
@config_options
def doctor(source: str, overrides: tuple[str, ...]) -> None:
    """Check installation, devices, decoders, disk, weights and data: one line each, with what to do.

    Looks and changes nothing. Exit code 0 when nothing fails, 1 otherwise.
    """
    from commands.doctor.settings import diagnose

    failed = 0
    for finding in diagnose(lambda: _config(source, overrides)):
        click.echo(finding.line())
        failed += finding.level == "FAIL"
    if failed:
        sys.exit(EXIT_PARTLY)


@cli.command()
@config_options
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the videos; the same as --set data.root=DIR.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the index goes; the same as --set data.index=FILE.")
@click.option("--force", is_flag=True, help="Replace an index that differs from what is found now.")
@click.option("--check", is_flag=True, help="Check the existing index against the files: everything short of decoding.")
@click.option(
    "--from-pickle",
    "pickles",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Videos, labels and split from an index pickle of the original programs; nothing in it is run. Repeatable.",
)
@click.option("--labels-to", type=click.Path(path_type=Path), help="Where labels of pickles go, below the data root.")
@click.option(
    "--to-pickle", type=click.Path(path_type=Path), help="Write the index as a pickle of the original programs."
)
@click.option(
    "--layout",
    type=click.Choice(["cholec80", "train_val_test", "train_val", "test"]),
    default="cholec80",
    show_default=True,
    help="Of --to-pickle: one list of videos, or lists for each part of the split.",
)
@click.option("--phases-only", is_flag=True, help="Of --to-pickle: rows without tools (pytorch1.2.0).")
@PHASE_ORDER
def index(
    source: str,
    overrides: tuple[str, ...],
    root: Path | None,
    out: Path | None,
    force: bool,
    check: bool,
    pickles: tuple[Path, ...],
    labels_to: Path | None,
    to_pickle: Path | None,
    layout: str,
    phases_only: bool,
    phase_order: str | None,
) -> None:
    """Find videos (or folders of frames, or TFRecords) and their annotations, split them, and write what was found.

    Folder names do not matter, file names do (configs/datasets). Of each video only the first frames are decoded. A
    video that cannot be used is left out, one whose name matches no pattern passed over; both are named, the others are
    indexed, and the exit code is then 1. data.sources=video, frames, tfrecord or frames:FOLDER chooses where a root
    holds several of one video. data.exclude leaves videos out for good, by id, path or shell pattern, each with a
    reason: --set 'data.exclude={video07: wrong patient, "case_*": no consent}'.

    Pickles of the original MTRCNet programs (cholec80.pkl, train_val_test_paths_labels.pkl and their like) are read and
    written; --phase-order says how they number phases, as it does for TFRecords, which hold numbers too
    (data.tfrecord_phase_order).
    """
    from features.dataset.catalogue import check_dataset, index_dataset
    from interop.pickled_index import index_from_pickles, pickle_from_index

    if check:
        _refuse("--check", _given("force", "pickles", "to_pickle", "phase_order"))
    if not pickles:
        _refuse("videos that are found (no --from-pickle)", _given("labels_to"))
    if not to_pickle:
        _refuse("an index (no --to-pickle)", _given("layout", "phases_only"))
    numbering = None if pickles or to_pickle else phase_order
    changes = {"data.root": root, "data.index": out, "data.tfrecord_phase_order": numbering}
    resolved = _config(source, overrides, changes)
    if pickles:
        index_from_pickles(resolved, pickles, phase_order=phase_order, labels_to=labels_to, replace=force)
    if to_pickle:
        pickle_from_index(
            resolved, to_pickle, layout=layout, phase_order=phase_order, phases_only=phases_only, replace=force
        )
    if pickles or to_pickle:
        return
    if not check:
        found = index_dataset(resolved, replace=force)
        if phase_order is not None and not any(entry.records for entry in found.videos):
            raise UserError("--phase-order: TFRecord files alone number phases, and none was found; leave it out")
        if found.is_partial:
            sys.exit(EXIT_PARTLY)
        return
    problems = check_dataset(resolved)
    for problem in problems:
        click.echo(printable(problem), err=True)
    click.echo(f"{len(problems)} problem(s) found" if problems else "index and files agree")
    if problems:
        sys.exit(EXIT_PARTLY)


TRUSTED = click.option(
    "--trusted", is_flag=True, help="Vouch for third-party weights, which torch before 2.10 cannot load safely."
)


@cli.command("train-cnn")
@settings
@several_devices
@TRUSTED
def train_cnn_command(source: str, overrides: tuple[str, ...], name: str | None, trusted: bool) -> None:
    """Stage one: fine-tune the backbone on tool presence, frame by frame.

    Frames are decoded once into a cache (cache.dir). Stopped and started again, training resumes where it stopped. A
    video that cannot be read is left out and named; the exit code is then 1.
    """
    from stage1_cnn.train import train_cnn

    resolved = _config(source, overrides)
    _refuse_trusted(trusted, _unless_a_file(resolved))
    with _stop_when_asked() as stop:
        index, root = _dataset(resolved)
        result = train_cnn(resolved, _run(resolved, source, name), index, root, stop, trusted=trusted)
    _say_once(f"stage one: {_sentence(result)}")
    _leave_as_done(result["left_out"])


@cli.command()
@settings
@several_devices
@click.option("--shard", default="0/1", show_default=True, metavar="I/N", help="Do every N-th video, from number I.")
@click.option("--index", "index_file", type=click.Path(path_type=Path), help="Another index than data.index.")
@click.option("--from-joint", "joint_run", metavar="RUN", help="Encode with the backbone of a run's joint net.")
@TRUSTED
def extract(
    source: str,
    overrides: tuple[str, ...],
    name: str | None,
    shard: str,
    index_file: Path | None,
    joint_run: str | None,
    trusted: bool,
) -> None:
    """Turn every sampled frame into an embedding (and tool logits): one HDF5 file per video.

    Files that verify are skipped, so a second start only does what is missing. A damaged video is reported and the
    others go on; the exit code is then 1, and later stages leave it out too. Starting again tries it again.
    """
    part = _shard(shard)
    from engine.processes import join
    from stage1_cnn.extract import extract as extract_features

    encoder = _joint_checkpoint(source, overrides, joint_run)
    resolved = _config(source, overrides, {"data.index": index_file, "extract.checkpoint": encoder})
    _refuse_trusted(trusted, _unless_encoder_is_a_file(resolved))
    run = _run(resolved, source, name)
    with _stop_when_asked() as stop:
        index, root = _dataset(resolved)
        # launchers end all processes when one fails: none leaves before all have done their videos
        processes = join(resolved.device, stop)
        report = processes.each(
            lambda: extract_features(resolved, run, index, root, shard=part, stop=stop, trusted=trusted)
        )
        partly = any(processes.gather(bool(report.failed)))
    _print_report(report)
    if partly:
        sys.exit(EXIT_PARTLY)
    _leave_as_done(report.left_out)


@cli.command("train-temporal")
@settings
@several_devices
@click.option("--features", type=click.Path(path_type=Path), help="Feature folder. Default: the one `extract` made.")
@click.option("--from-joint", "joint_run", metavar="RUN", help="Start from the LSTM of a run's joint net.")
def train_temporal_command(
    source: str, overrides: tuple[str, ...], name: str | None, features: Path | None, joint_run: str | None
) -> None:
    """Stage two: train a phase model over whole videos of features; no image is touched.

    A per-frame linear head is trained beside it on the same features, for as long, as the baseline. Another experiment
    is another --name; the same name with other settings is refused.
    """
    from configs.load import keys_given
    from features.store import find_feature_folder
    from stage2_temporal.train import train_temporal

    start = _joint_checkpoint(source, overrides, joint_run)
    resolved = _config(source, overrides, {"temporal.start_from": start})
    run = _run(resolved, source, name)
    folder = find_feature_folder(features, run, resolved.extract.store)
    with _stop_when_asked() as stop:
        result = train_temporal(resolved, run, folder, stop, given=keys_given(source, overrides))
    _say_once(f"stage two: {_sentence(result)}")
    _leave_as_done(result["left_out"])


@cli.command()
@click.argument("ablation", metavar="FILE")
@click.option("--features", type=click.Path(path_type=Path), help="Feature folder. Default: as for train-temporal.")
@click.option("--name", help="Name of the ablation, a folder below `runs/`. Default: that of FILE.")
@click.option("--run", "run_name", metavar="RUN", help="Run whose features are taken. Default: the base preset's name.")
@click.option("--workers", default=-1, show_default=True, help="Trainings at once; -1 is one per core.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of the base for every training."
)
@click.option("--base", metavar="FILE", help="Another base than the file names: a preset or a file of settings.")
def ablate(
    ablation: str,
    features: Path | None,
    name: str | None,
    run_name: str | None,
    workers: int,
    overrides: tuple[str, ...],
    base: str | None,
) -> None:
    """Compare settings of stage two: FILE says which, with which seeds (a YAML file, or a name in configs/ablations).

    All trainings share one copy of the features, one training a core. Stopped and started again, it goes on where it
    was, and what failed is tried again. At the end: a ranked table, ablation.csv, ablation.html with
    Optuna's plots, and best.yaml, the winner ready to train. Settings are compared on the validation videos.
    """
    from stage2_temporal.ablation.run import ablate as run_ablation
    from stage2_temporal.ablation.run import read_ablation

    if features is not None:
        _refuse("--features", _given("run_name"))
    spec = read_ablation(ablation, base)
    resolved = _config(spec.base, overrides)
    folder = _run(resolved, ablation, name)
    if workers == 0 or workers < -1:
        raise UserError(f"--workers {workers}: give a number of trainings at once, or -1 for one per core")
    with _stop_when_asked() as stop:
        run = _run(resolved, spec.base, run_name)
        failed = run_ablation(spec, folder, overrides, features, run, workers=workers, stop=stop)
    for label, reason in failed:
        click.echo(f"failed: {label}: {reason}", err=True)
    if failed:
        sys.exit(EXIT_PARTLY)


@cli.command("train-joint")
@settings
@several_devices
@click.option("--from-cnn", "cnn_run", metavar="RUN", help="Backbone and tool head of a run's train-cnn.")
@click.option("--from-temporal", "temporal_run", metavar="RUN", help="LSTM of a run's train-temporal.")
@click.option("--from-joint", "joint_run", metavar="RUN", help="Every branch of another run's joint net (or import).")
@TRUSTED
def train_joint_command(
    source: str,
    overrides: tuple[str, ...],
    name: str | None,
    cnn_run: str | None,
    temporal_run: str | None,
    joint_run: str | None,
    trusted: bool,
) -> None:
    """Both stages in one net, trained end to end on clips of frames: MTRCNet, and with joint.mapping MTRCNet-CL.

    Without --from options the backbone starts from cnn.weights and all else fresh. Steps (multitask, mapping,
    correlation) follow one another; stopped and started again, training goes on where it was.
    """
    from stage2_temporal.joint.train import Start, train_joint

    resolved = _config(source, overrides)
    starts = _given("cnn_run", "joint_run")
    _refuse_trusted(trusted, starts[0] if starts else _unless_a_file(resolved))
    runs = [_run(resolved, source, other) if other else None for other in (cnn_run, temporal_run, joint_run)]
    with _stop_when_asked() as stop:
        index, root = _dataset(resolved)
        result = train_joint(resolved, _run(resolved, source, name), index, root, stop, Start(*runs), trusted=trusted)
    _say_once(f"joint net: {_sentence(result)}")
    _leave_as_done(result["left_out"])


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How folders of phase files are read, for commands that take anyone's predictions."""
    for option in (
        click.option(
            "--background",
            multiple=True,
            metavar="NAME",
            help="Phase left out of segments (edit score, F1 at an overlap). Repeatable. Default: the data set's.",
        ),
        click.option("--allow-missing", is_flag=True, help="Leave out videos that only one of the folders has."),
        click.option(
            "--phase-order",
            metavar="FILE",
            help="What ids and columns in the files mean: a name (mtrcnet, tf-cholec80), FILE or list.",
        ),
        click.option(
            "--skip-first-row", is_flag=True, help="Leave out each video's first row, as the official script."
        ),
        click.option(
            "--prediction-fps",
            type=click.FloatRange(min=0, min_open=True),
            help="Rows per second of the predictions, where truth and predictions have different rates.",
        ),
        click.option(
            "--fps",
            type=click.FloatRange(min=0, min_open=True),
            help="Compared rows per second, which relaxed conventions need. Default: what the files say.",
        ),
        click.option("--ground-truth", type=click.Path(path_type=Path), metavar="DIR", help="Their annotations."),
    ):
        command = option(command)
    return command


READING_OPTIONS = (
    "ground_truth",
    "fps",
    "prediction_fps",
    "skip_first_row",
    "phase_order",
    "allow_missing",
    "background",
)
JSON_FILE = click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the results here.",
)


def _given(*names: str) -> list[str]:
    """Those of the options that stand on the command line, as they are written there."""
    context = click.get_current_context()
    source = click.core.ParameterSource.COMMANDLINE
    return [
        option.opts[-1] if option.opts[-1].startswith("--") else option.opts[0]
        for option in context.command.params
        if option.name in names and context.get_parameter_source(option.name) is source
    ]


@cli.command()
@settings
@click.option(
    "--predictions", type=click.Path(path_type=Path), metavar="DIR", help="Anyone's phase files, not a run's."
)
@reading_options
@click.option(
    "--convention",
    "conventions",
    multiple=True,
    metavar="NAME",
    help="One of phase_mean, video_macro, pooled, relaxed_matlab, relaxed_fixed, segmental (docs/evaluation.md). "
    "Repeatable. Default: all.",
)
@JSON_FILE
@click.option("--features", type=click.Path(path_type=Path), help="Feature folder. Default: the one of the run.")
@MODEL
@INFERENCE
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "val", "test", "all"]))
@click.option(
    "--index",
    "index_file",
    type=click.Path(path_type=Path),
    help="Evaluate on another data set with the same classes; features are extracted where missing.",
)
def evaluate(
    source: str,
    overrides: tuple[str, ...],
    name: str | None,
    features: Path | None,
    model: str,
    inference: Any,
    split: str,
    index_file: Path | None,
    predictions: Path | None,
    conventions: tuple[str, ...],
    json_file: Path | None,
    **reading: Any,
) -> None:
    """Phases and tools of a trained run: tables, metrics.json, a prediction file a video, and ribbons as PNG.

    A joint net reads pictures, so it needs data.root; joint.crops=five or ten averages over crops.

    With --predictions DIR --ground-truth DIR: phases in text files of any program, paired by video number; with a
    header or without, names, ids from 0 or one column per phase, tabs, commas or blanks. Needs no run.
    """
    resolved = _config(source, overrides)
    if predictions is not None:
        _refuse("--predictions", _given("name", "features", "model", "inference", "index_file"))
        _evaluate_predictions(resolved, predictions, conventions, json_file, split, reading)
        return
    _refuse("a run (no --predictions)", _given(*READING_OPTIONS, "conventions", "json_file"))
    from configs.load import keys_given
    from stage2_temporal.evaluate import evaluate_run

    run, given = _run(resolved, source, name), keys_given(source, overrides)
    with _stop_when_asked() as stop:
        if _takes_joint(model, run):
            _refuse("a joint net, which reads frames", _given("features"))
            from stage2_temporal.joint.evaluate import evaluate_joint

            resolved = _config(source, overrides, {"data.index": index_file})
            index, root = _dataset(resolved)
            metrics = evaluate_joint(
                resolved,
                run,
                index,
                root,
                split=split,
                inference=inference,
                other=index_file is not None,
                stop=stop,
                given=given,
            )
        else:
            metrics = evaluate_run(
                resolved,
                run,
                split=split,
                features=features,
                index_file=index_file,
                stop=stop,
                inference=inference,
                given=given,
            )
    _leave_as_done(metrics["left_out"])


@cli.command()
@settings
@click.argument("videos", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where the files go. Default: RUN/predict.")
@MODEL
@click.option("--from-cnn", "cnn_run", metavar="RUN", help="Run whose stage one made the features. Default: this run.")
@click.option("--from-joint", "joint_run", metavar="RUN", help="Run whose joint net made the features.")
@INFERENCE
@click.option("--video", "draw", is_flag=True, help="Also write an MP4 with phase, tools and confidence drawn in.")
@TRUSTED
def predict(
    videos: tuple[Path, ...],
    source: str,
    overrides: tuple[str, ...],
    name: str | None,
    out: Path | None,
    model: str,
    cnn_run: str | None,
    joint_run: str | None,
    inference: Any,
    draw: bool,
    trusted: bool,
) -> None:
    """Phases and tools of VIDEOS (files, or folders of frames) that nobody has labelled.

    Frame by frame from the past alone, as in an operation. Writes a CSV and a ribbon a video; the settings of pictures
    are those the net was trained with. A video that cannot be read is reported, the others go on; the exit code is
    then 1. Research only, not a medical device.
    """
    from configs.load import keys_given
    from stage2_temporal.new_videos import joint_net, pair_of_stages, predict_new_videos

    run = _run(_config(source, overrides), source, name)
    if joint := _takes_joint(model, run):
        _refuse("a joint net, which makes its own features", _given("cnn_run", "joint_run", "trusted"))
    encoder = _joint_checkpoint(source, overrides, joint_run)
    resolved = _config(source, overrides, {"extract.checkpoint": encoder})
    if not joint:
        _refuse_trusted(trusted, _unless_encoder_is_a_file(resolved))
        if not _uses_stage_one(resolved):
            _refuse("--from-joint, extract.checkpoint or extract.encoder=initial", _given("cnn_run"))
    given = keys_given(source, overrides)
    with _stop_when_asked() as stop:
        if joint:
            recogniser = joint_net(resolved, run, inference, given)
        else:
            encoder_run = _run(resolved, source, cnn_run) if cnn_run else None
            recogniser = pair_of_stages(resolved, run, encoder_run, inference, trusted=trusted, given=given)
        report = predict_new_videos(recogniser, videos, out or run / "predict", draw=draw, stop=stop)
    _print_report(report)


@cli.command("import-checkpoint")
@click.argument("file", type=click.Path(path_type=Path))
@config_options
@click.option("--name", help="Name of the new run, a folder below `runs/`. There is no default.")
@PHASE_ORDER
@click.option(
    "--normalisation",
    type=click.Choice(["main", "pytorch1.2.0"]),
    help="Which release's mean and standard deviation its images had. Default: preprocess.mean and preprocess.std "
    "where --set or a file of your own gives them, otherwise what its layers and keys suggest.",
)
@click.option(
    "--variant",
    type=click.Choice(["tool", "phase", "multitask", "two-layer", "cl", "pytorch1.2.0"]),
    help="Which net it is, where its layers leave that open.",
)
@click.option("--into", "into_run", metavar="RUN", help="For the mapping alone: the run whose net it belongs to.")
@TRUSTED
def import_checkpoint_command(
    file: Path,
    source: str,
    overrides: tuple[str, ...],
    name: str | None,
    phase_order: str | None,
    normalisation: str | None,
    variant: str | None,
    into_run: str | None,
    trusted: bool,
) -> None:
    """Read FILE.pth of the original MTRCNet programs into a run (--name) that evaluate, extract and train-joint take.

    Says what was in the file and what its name tells; nothing in it is run.
    """
    from configs.load import keys_given
    from interop.mtrcnet_runs import ImportRequest, import_original

    if name is None:
        raise UserError("import-checkpoint: give the new run a name with --name RUN")
    resolved = _config(source, overrides)
    into = _run(resolved, source, into_run) if into_run else None
    given = keys_given(source, overrides)
    request = ImportRequest(file, phase_order, normalisation, variant, into, trusted, given)
    click.echo(f"imported: {_sentence(import_original(resolved, _run(resolved, source, name), request))}")


@cli.command("export-checkpoint")
@click.argument("run_name", metavar="RUN")
@click.argument("out", metavar="OUT_DIR", type=click.Path(path_type=Path))
@config_options
@PHASE_ORDER
@click.option(
    "--prefix-module/--no-prefix-module",
    default=None,
    help="Keys begin with `module.`. Default: they do, unless the file that was imported or its release has none.",
)
def export_checkpoint_command(
    run_name: str,
    out: Path,
    source: str,
    overrides: tuple[str, ...],
    phase_order: str | None,
    prefix_module: bool | None,
) -> None:
    """Write RUN's joint net into OUT_DIR as the original MTRCNet programs would: their keys, their file name."""
    from interop.mtrcnet_runs import export_original

    resolved = _config(source, overrides)
    written = export_original(resolved, _run(resolved, source, run_name), out, phase_order, prefix_module)
    click.echo(f"written: {written}")


@cli.command("export")
@settings
@click.argument("run_name", metavar="[RUN]", required=False)
@click.option("--split", default="test", show_default=True, help="Folder below RUN/evaluate, or part of the index.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the text files. Default: RUN/export/SPLIT.")
@click.option("--probabilities", is_flag=True, help="Tools as probabilities (pytorch1.2.0) instead of logits.")
@click.option("--force", is_flag=True, help="Replace files that say something else.")
@click.option(
    "--from-predictions",
    type=click.Path(path_type=Path),
    help="Not of a run but of a prediction pickle that the original test programs left: phase ids or tool logits.",
)
@click.option("--tools-from", type=click.Path(path_type=Path), help="A second prediction pickle: the tool logits.")
@click.option("--index", "index_file", type=click.Path(path_type=Path), help="Another index than data.index.")
@click.option("--sequence", type=click.IntRange(1), help="Frames per clip (S) that the pickle was predicted with.")
@click.option(
    "--fill-first", is_flag=True, help="Give a video's first S-1 frames the next prediction, as the originals."
)
@PHASE_ORDER
def export_command(
    source: str,
    overrides: tuple[str, ...],
    name: str | None,
    run_name: str | None,
    split: str,
    out: Path | None,
    probabilities: bool,
    force: bool,
    from_predictions: Path | None,
    tools_from: Path | None,
    index_file: Path | None,
    sequence: int | None,
    fill_first: bool,
    phase_order: str | None,
) -> None:
    """Write videoNN-phase.txt and videoNN-tool.txt as the original MTRCNet programs do.

    Of RUN, its evaluated predictions: every frame is predicted from itself and its past (but for bidirectional heads),
    the first S-1 frames of a video from the shorter past they have. Of a prediction pickle there is nothing for those
    frames; they are left out unless --fill-first asks for a prediction that has seen the future.
    """
    from interop.text_files import export_predictions, export_run

    resolved = _config(source, overrides, {"data.index": index_file})
    if from_predictions:
        _refuse("--from-predictions", [*(["RUN"] if run_name else []), *_given("name")])
        export_predictions(
            resolved,
            [file for file in (from_predictions, tools_from) if file],
            out,
            split=split,
            sequence=sequence,
            phase_order=phase_order,
            fill_first=fill_first,
            probabilities=probabilities,
            replace=force,
        )
        return
    _refuse(
        "a run (no --from-predictions)", _given("tools_from", "index_file", "sequence", "fill_first", "phase_order")
    )
    if run_name:
        _refuse("RUN, which is the same", _given("name"))
    run = _run(resolved, source, run_name or name)
    export_run(resolved, run, out, split=split, probabilities=probabilities, replace=force)


def _evaluate_predictions(
    config: Config,
    predictions: Path,
    conventions: tuple[str, ...],
    json_file: Path | None,
    split: str,
    reading: dict[str, Any],
) -> None:
    from configs.load import load_dataset
    from evaluation.external import Reading, evaluate_folder

    if reading["ground_truth"] is None:
        raise UserError("--predictions: needs --ground-truth DIR, the folder with the annotations of the same videos")
    evaluate_folder(
        predictions,
        Reading(**reading),
        load_dataset(config.data.dataset),
        conventions or None,
        split=split if _given("split") else None,
        out=json_file,
    )


def _refuse(what: str, options: list[str]) -> None:
    """Options that have no meaning here are an error, never ignored."""
    if options:
        raise UserError(f"{', '.join(options)}: cannot be combined with {what}; leave it out")


def _refuse_trusted(trusted: bool, instead: str | None) -> None:
    """Refuse `--trusted` where no third-party file is loaded, but what `instead` names."""
    if trusted and instead:
        _refuse(f"{instead}: no third-party file is loaded", ["--trusted"])


def _unless_a_file(config: Config) -> str | None:
    """What the backbone starts from, None where that is a file of weights."""
    weights = config.cnn.weights
    known = weights in {"imagenet", "random", "cached"} or weights.startswith("run:")
    return f"cnn.weights={weights}" if known else None


def _unless_encoder_is_a_file(config: Config) -> str | None:
    """What the encoder is loaded from, None where that is a file of weights."""
    if config.extract.checkpoint is not None:
        return "extract.checkpoint, or --from-joint"
    return "extract.encoder=finetuned" if _uses_stage_one(config) else _unless_a_file(config)


def _uses_stage_one(config: Config) -> bool:
    """Whether the encoder is what a run's train-cnn has trained."""
    return config.extract.checkpoint is None and config.extract.encoder == "finetuned"


@cli.command("compare")
@config_options
@click.argument("models", nargs=-1, metavar="RUN_A RUN_B [RUN_C]...")
@click.option(
    "--split", default="test", show_default=True, help="The evaluation of the runs, a folder in RUN/evaluate."
)
@click.option("--convention", help="One convention. Default: video_macro, where models' differences are their videos'.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="accuracy, precision, recall, jaccard, f1; of segmental edit, f1@10, f1@25, f1@50. Repeatable. Default: all.",
)
@reading_options
@JSON_FILE
def compare_command(
    source: str,
    overrides: tuple[str, ...],
    models: tuple[str, ...],
    split: str,
    convention: str | None,
    metrics: tuple[str, ...],
    json_file: Path | None,
    **reading: Any,
) -> None:
    """Is one model better than another on the same videos? Paired differences, intervals over videos, p values.

    Each model is compared with the first. A model is an evaluated run, a JSON file of results, or with --ground-truth a
    folder of predictions; training seeds of one model are joined by commas: compare lstm-0,lstm-1 tcn-0,tcn-1.
    """
    from configs.load import load_dataset
    from evaluation.comparison import DEFAULT_CONVENTION, Place, compare_models, require_use
    from evaluation.external import Reading

    resolved = _config(source, overrides)
    if reading["ground_truth"] is None:
        _refuse("runs (no --ground-truth)", _given(*READING_OPTIONS))
    require_use(models, resolved.runs, reading=reading["ground_truth"] is not None, split=bool(_given("split")))
    compare_models(
        models,
        Place(
            resolved.runs,
            split,
            load_dataset(resolved.data.dataset),
            Reading(**reading) if reading["ground_truth"] else None,
        ),
        convention=convention or DEFAULT_CONVENTION,
        metrics=metrics or None,
        out=json_file,
    )


@cli.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True, help="Which evaluation: a folder below RUN/evaluate.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Default: report.html in the first RUN.")
@click.option("--figures", type=click.Path(path_type=Path), metavar="DIR", help="The same figures as PDF and PNG.")
@click.option("--no-thumbnails", is_flag=True, help="Do not look for the videos to show frames of.")
def report_command(
    runs: tuple[Path, ...], split: str, out: Path | None, figures: Path | None, no_thumbnails: bool
) -> None:
    """One HTML file that needs no network: tables under every convention, ribbons, curves, the worst videos first.

    RUN is the folder of an evaluated run, for example runs/cholec80; several stand side by side.
    """
    from commands.report_runs import report_runs

    report_runs(runs, split=split, out=out, figures=figures, thumbnails=not no_thumbnails)


@cli.command("run")
@settings
def run_command(source: str, overrides: tuple[str, ...], name: str | None) -> None:
    """Everything from one file of settings: index, train-cnn, extract, train-temporal, evaluate.

    A stage whose inputs have not changed is not done again. The outcome stands in RUN/summary.json.
    """
    from commands.run import run_all

    resolved = _config(source, overrides)
    with _stop_when_asked() as stop:
        summary = run_all(resolved, _run(resolved, source, name), stop)
    _leave_as_done(summary["left_out"])


@cli.command("submit")
@click.argument("stage", metavar="STAGE", type=click.Choice(JOB_STAGES))
@click.argument("arguments", metavar="-- [OPTIONS OF THE STAGE]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--partition", metavar="P", help="Default: the cluster's.")
@click.option("--gpus-per-node", type=click.IntRange(1), metavar="N", help="One process per GPU where N is above 1.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, metavar="N")
@click.option("--cpus-per-task", type=click.IntRange(1), metavar="N", help="Cores per process.")
@click.option("--mem-gb", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Memory per node, in GiB.")
@click.option(
    "--time", "limit", default="4:00:00", show_default=True, metavar="LIMIT", help="H:MM:SS, D-HH:MM:SS or minutes."
)
@click.option("--array", type=click.IntRange(2, 10000), metavar="N", help="Of extract: N jobs, every N-th video each.")
@click.option("--slurm", "more", multiple=True, metavar="KEY=VALUE", help="Any other option of sbatch. Repeatable.")
@click.option(
    "--max-requeues",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    metavar="N",
    help="How often the job goes back into the queue at its time limit or when preempted.",
)
@click.option("--dry-run", is_flag=True, help="Print the script; touch nothing.")
def submit_command(
    stage: str,
    arguments: tuple[str, ...],
    partition: str | None,
    gpus_per_node: int | None,
    nodes: int,
    cpus_per_task: int | None,
    mem_gb: float | None,
    limit: str,
    array: int | None,
    more: tuple[str, ...],
    max_requeues: int,
    dry_run: bool,
) -> None:
    """Run STAGE as a Slurm job, for example: submit train-cnn --partition gpu --gpus-per-node 2 -- --name first

    What follows -- is the stage's own command line, read before anything is submitted. Shortly before the time limit,
    or when the cluster asks for the machine back, the stage saves, the job goes back into the queue and goes on from
    there. Script, command, parameters and logs are kept in RUN/slurm. See docs/clusters.md.
    """
    from commands import slurm

    run = _run_of(stage, arguments, array, several=nodes * (gpus_per_node or 1) > 1)
    request = slurm.Request(
        stage=stage,
        arguments=arguments,
        time_min=slurm.parse_time_limit(limit),
        partition=partition,
        gpus_per_node=gpus_per_node,
        nodes=nodes,
        cpus_per_task=cpus_per_task,
        mem_gb=mem_gb,
        array=array,
        more=more,
        max_requeues=max_requeues,
    )
    submission = slurm.submit(request, run, Path(__file__).resolve(), dry_run=dry_run)
    for line in submission.sentences():
        click.echo(line, err=dry_run)
    if dry_run:
        click.echo(f"requeued:  up to {max_requeues} times", err=True)
        click.echo(submission.script, nl=False)


def _run_of(stage: str, arguments: tuple[str, ...], array: int | None, several: bool) -> Path:
    """The run that a stage's command line works in; everything in it that can be read without the data is."""
    try:
        context = cli.commands[stage].make_context(stage, list(arguments))
    except click.exceptions.Exit:
        raise UserError(f"submit {stage}: --help asks a question and does no work; ask `{stage} --help`") from None
    given = context.params
    if given.get("devices") and several:
        raise UserError("--devices: --nodes and --gpus-per-node start one process per GPU already; leave it out")
    if stage == "extract":
        _shard(given["shard"])
        if array and context.get_parameter_source("shard") is click.core.ParameterSource.COMMANDLINE:
            raise UserError("--array: gives each job its --shard; leave out the one given")
    if stage == "evaluate" and given["predictions"] is not None:
        raise UserError("evaluate --predictions: takes a second and no run; do it here")
    if stage == "ablate":
        from configs.load import load_ablation

        source, overrides = given["base"] or load_ablation(given["ablation"]).base, given["overrides"]
        return _run(_config(source, overrides), given["ablation"], given["name"])
    return _run(_config(given["source"], given["overrides"]), given["source"], given["name"])


@cli.command("simulate")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--videos", default=10, show_default=True, help="Number of operations.")
@click.option("--seed", default=0, show_default=True, help="The same seed and options give the same labels and pixels.")
@click.option("--fps", default=25, show_default=True, help="Frames per second of the videos.")
@click.option("--width", "width_px", default=224, show_default=True, help="Width of a frame in pixels.")
@click.option("--height", "height_px", default=224, show_default=True, help="Height of a frame in pixels.")
@click.option("--speed-up", default=1.0, show_default=True, help="Divide the length of everything by this.")
@click.option("--first", "first_number", default=1, show_default=True, help="Number of the first video.")
@click.option("--workers", default=1, show_default=True, help="Processes; the files do not depend on it.")
def simulate_command(
    out: Path,
    videos: int,
    seed: int,
    fps: int,
    width_px: int,
    height_px: int,
    speed_up: float,
    first_number: int,
    workers: int,
) -> None:
    """Write SIMULATED operations below OUT, in Cholec80's layout.

    Label sequences follow aggregate statistics of Cholec80's training videos; pictures are drawn by a program. Good for
    trying the pipeline and for tests; what is measured on them says nothing about real operations.
    """
    from configs.load import load_dataset
    from features.simulation import simulate

    with _stop_when_asked() as stop:
        made = simulate(
            out,
            videos=videos,
            seed=seed,
            spec=load_dataset("cholec80"),
            fps=fps,
            width_px=width_px,
            height_px=height_px,
            speed_up=speed_up,
            first_number=first_number,
            workers=workers,
            stop=stop,
        )
    click.echo(f"{out}: {len(made.made)} simulated videos made ({made.video_s:.0f} s), {len(made.skipped)} were there")


@cli.group()
def features() -> None:
    """Look after feature folders."""


@features.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def features_verify(folder: Path) -> None:
    """Read every feature file in FOLDER whole and check it; exit code 1 when one is not sound."""
    from features.store import verify_folder

    bad = 0
    for path, problem in verify_folder(folder):
        bad += problem is not None
        click.echo(f"{path.name}: {problem or 'ok'}", err=problem is not None)
    click.echo(f"{bad} file(s) are not sound: run extract again" if bad else "all files are sound")
    if bad:
        sys.exit(EXIT_PARTLY)


@features.command("info")
@click.argument("folder", type=click.Path(path_type=Path))
def features_info(folder: Path) -> None:
    """What made the features in FOLDER, and what they hold."""
    from features.store import describe_folder

    for line in describe_folder(folder):
        click.echo(line)


def _joint_checkpoint(source: str, overrides: tuple[str, ...], joint_run: str | None) -> Path | None:
    """The checkpoint of a run's joint net."""
    if joint_run is None:
        return None
    from stage2_temporal.joint.net import joint_checkpoint

    return joint_checkpoint(_run(_config(source, overrides), source, joint_run))


def _takes_joint(model: str, run: Path) -> bool:
    """Whether a run's joint net is meant: asked for, or the only one there."""
    return model == "joint" or (model == "auto" and (run / "joint").exists() and not (run / "temporal").exists())


def _print_report(report: Any) -> None:
    """What was done, what failed; exit code 1 where something did."""
    click.echo(report.sentence())
    for video_id, reason in report.failed:
        click.echo(printable(f"failed: {video_id}: {reason}"), err=True)
    if report.failed:
        sys.exit(EXIT_PARTLY)


def _leave_as_done(left_out: Sequence[dict[str, Any]]) -> None:
    """Exit code 1 where videos of a split are left out; those that data.exclude names, or without labels, may be."""
    wanted = [video for video in left_out if not (video.get("excluded") or video.get("unlabelled"))]
    if any(video.get("split") != "none" for video in wanted) and _speaks():  # a launcher ends all when one leaves so
        sys.exit(EXIT_PARTLY)


def _dataset(config: Config) -> tuple[Any, Path]:
    from features.dataset.catalogue import open_dataset

    return open_dataset(config)


def _stop_when_asked() -> Any:
    from engine.stopping import watch_signals

    return watch_signals(leaving=click.get_current_context().obj is LEAVES_AFTERWARDS)


def _shard(text: str) -> tuple[int, int]:
    """Which videos are this process's: of the shard's, divided over the processes that a launcher started."""
    from engine.processes import launch

    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N-1, for example 0/4")
    here = launch()
    return int(first) + int(second) * here.rank, int(second) * here.count


def _say_once(text: str) -> None:
    if _speaks():
        click.echo(text)


def _sentence(result: dict[str, Any]) -> str:
    return str(result.get("sentence", "done"))


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """The command line as a program: of this process, whose end it is. `cli` is for processes that go on."""
    # else the interpreter's last collections walk through all that torch has made, for a second
    atexit.register(gc.freeze)
    cli(arguments, program, obj=LEAVES_AFTERWARDS)


if __name__ == "__main__":
    main()
