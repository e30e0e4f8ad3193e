"""The command line: parse, call one function, print. `python pipeline.py --help` lists the commands.

Nothing heavy is imported before a command runs, so that help answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError

if TYPE_CHECKING:
    from configs.schema import Config

EXIT_PARTLY = 1
EXIT_BAD_INPUT = 2


class Group(click.Group):
    """Turns the errors a user can mend into one line and exit code 2, and stop signals into their codes."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            context.exit(EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            context.exit(130)
        except Exception as error:
            code = getattr(error, "exit_code", None)
            if type(error).__name__ != "Stopped" or code is None:
                raise
            click.echo(f"{error}; what was done is saved: the same command goes on from there", err=True)
            context.exit(code)


def settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--config`, `--set` and `--name`, the same for every command that works on a run."""
    for option in (
        click.option("--name", help="Name of the run, a folder below `runs/`. Default: the name of the preset."),
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


def _config(source: str, overrides: tuple[str, ...]) -> Config:
    from configs.load import load_config

    return load_config(source, overrides)


def _run(config: Config, source: str, name: str | None) -> Path:
    from engine.runs import run_folder

    return run_folder(config, name or Path(source).stem)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="surgstage", message="%(version)s")
def cli() -> None:
    """Surgical workflow recognition in two stages.

    \b
    index           find videos and annotations below a folder, split them
    train-cnn       stage one: fine-tune a CNN on the tools seen in frames
    extract         one embedding a frame into one HDF5 file a video
    train-temporal  stage two: an LSTM over whole videos, seconds an epoch
    train-joint     both stages in one net, end to end (MTRCNet, MTRCNet-CL)
    evaluate        phases and tools on the test videos: tables, JSON, ribbons
    report          one HTML file of a run, or of several side by side
    run             all of these from one file of settings
    simulate        simulated operations to try it on

    Every command takes --config FILE and --set key=value; `config show` prints what they come to. The folder of the
    videos is data.root: `--set data.root=DIR`, a line in the file, or the variable SURGSTAGE_DATA.
    """


@cli.group()
def config() -> None:
    """Look at settings."""


@config.command("show")
@settings
def config_show(source: str, overrides: tuple[str, ...], name: str | None) -> None:
    """Print every setting as the commands will see it: preset, file and --set together."""
    from configs.load import to_yaml

    click.echo(to_yaml(_config(source, overrides)), nl=False)


@cli.command()
@settings
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the videos; the same as --set data.root=DIR.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the index goes; the same as --set data.index=FILE.")
@click.option("--force", is_flag=True, help="Replace an index that differs from what is found now.")
@click.option("--check", is_flag=True, help="Check the existing index against the files: everything short of decoding.")
def index(
    source: str,
    overrides: tuple[str, ...],
    name: str | None,
    root: Path | None,
    out: Path | None,
    force: bool,
    check: bool,
) -> None:
    """Find videos (or folders of frames) and their annotations, split them, and write what was found.

    Folder names do not matter, file names do (configs/datasets). Nothing is decoded.
    """
    from features.catalogue import check_dataset, index_dataset

    extra = [f"data.root={root}"] * (root is not None) + [f"data.index={out}"] * (out is not None)
    resolved = _config(source, (*overrides, *extra))
    if not check:
        index_dataset(resolved, replace=force)
        return
    problems = check_dataset(resolved)
    for problem in problems:
        click.echo(problem, err=True)
    click.echo(f"{len(problems)} problem(s) found" if problems else "index and files agree")
    if problems:
        sys.exit(EXIT_PARTLY)


TRUSTED = click.option(
    "--trusted", is_flag=True, help="Load weights that somebody else made with a torch older than 2.10."
)


@cli.command("train-cnn")
@settings
@TRUSTED
def train_cnn_command(source: str, overrides: tuple[str, ...], name: str | None, trusted: bool) -> None:
    """Stage one: fine-tune the backbone on tool presence, frame by frame.

    Frames are decoded once into a cache (cache.dir). Stopped and started again, training goes on where it was.
    """
    from stage1_cnn.train import train_cnn

    resolved = _config(source, overrides)
    with _stop_when_asked() as stop:
        index, root = _dataset(resolved)
        result = train_cnn(resolved, _run(resolved, source, name), index, root, stop, trusted=trusted)
    click.echo(f"stage one: {_sentence(result)}")


@cli.command()
@settings
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
    """Turn every sampled frame into an embedding (and tool logits): one HDF5 file a video.

    Files that verify are skipped, so a second start only does what is missing. A damaged video is reported and the
    others go on; the exit code is then 1.
    """
    part = _shard(shard)
    from stage1_cnn.extract import extract as extract_features

    more = (f"data.index={index_file}",) if index_file else ()
    resolved = _config(source, (*overrides, *more, *_joint_setting(source, overrides, "extract.checkpoint", joint_run)))
    with _stop_when_asked() as stop:
        index, root = _dataset(resolved)
        report = extract_features(
            resolved, _run(resolved, source, name), index, root, shard=part, stop=stop, trusted=trusted
        )
    click.echo(report.sentence())
    for video_id, reason in report.failed:
        click.echo(f"failed: {video_id}: {reason}", err=True)
    if report.failed:
        sys.exit(EXIT_PARTLY)


@cli.command("train-temporal")
@settings
@click.option("--features", type=click.Path(path_type=Path), help="Feature folder. Default: the one `extract` made.")
@click.option("--from-joint", "joint_run", metavar="RUN", help="Start from the LSTM of a run's joint net.")
def train_temporal_command(
    source: str, overrides: tuple[str, ...], name: str | None, features: Path | None, joint_run: str | None
) -> None:
    """Stage two: train a phase model over whole videos of features; no image is touched.

    A per-frame linear head is trained beside it on the same features, for as long, as the baseline. Another experiment
    is another --name; the same name with other settings is refused.
    """
    from features.store import find_feature_folder
    from stage2_temporal.train import train_temporal

    resolved = _config(source, (*overrides, *_joint_setting(source, overrides, "temporal.start_from", joint_run)))
    run = _run(resolved, source, name)
    folder = find_feature_folder(features, run, resolved.extract.store)
    with _stop_when_asked() as stop:
        result = train_temporal(resolved, run, folder, stop)
    click.echo(f"stage two: {_sentence(result)}")


@cli.command("train-joint")
@settings
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
    from stage2_temporal.joint_train import Start, train_joint

    resolved = _config(source, overrides)
    runs = [_run(resolved, source, other) if other else None for other in (cnn_run, temporal_run, joint_run)]
    with _stop_when_asked() as stop:
        index, root = _dataset(resolved)
        result = train_joint(resolved, _run(resolved, source, name), index, root, stop, Start(*runs), trusted=trusted)
    click.echo(f"joint net: {_sentence(result)}")


@cli.command()
@settings
@click.option("--features", type=click.Path(path_type=Path), help="Feature folder. Default: the one of the run.")
@click.option(
    "--model",
    type=click.Choice(["auto", "temporal", "joint"]),
    default="auto",
    show_default=True,
    help="Which of the run's nets; auto takes the joint one where there is no other.",
)
@click.option(
    "--inference",
    type=click.Choice(["clip", "carried"]),
    help="State from zero at each clip, or carried through the video. Default: as it was trained to be used.",
)
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
) -> None:
    """Phases and tools of a trained run: tables, metrics.json, a prediction file a video, and ribbons as PNG.

    A joint net reads pictures, so it needs data.root; joint.crops=five or ten averages over crops.
    """
    from stage2_temporal.evaluate import evaluate_run

    resolved = _config(source, overrides)
    run = _run(resolved, source, name)
    joint = model == "joint" or (model == "auto" and (run / "joint").exists() and not (run / "temporal").exists())
    with _stop_when_asked() as stop:
        if joint:
            from stage2_temporal.joint_evaluate import evaluate_joint

            other = (f"data.index={index_file}",) if index_file else ()
            resolved = _config(source, (*overrides, *other))
            index, root = _dataset(resolved)
            evaluate_joint(resolved, run, index, root, split=split, inference=inference, stop=stop)
            return
        evaluate_run(
            resolved, run, split=split, features=features, index_file=index_file, stop=stop, inference=inference
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
    from stage2_temporal.report import report_runs

    report_runs(runs, split=split, out=out, figures=figures, thumbnails=not no_thumbnails)


@cli.command("run")
@settings
def run_command(source: str, overrides: tuple[str, ...], name: str | None) -> None:
    """Everything from one file of settings: index, train-cnn, extract, train-temporal, evaluate.

    A stage whose inputs have not changed is not done again. The outcome stands in RUN/summary.json.
    """
    from stage2_temporal.run import run_all

    resolved = _config(source, overrides)
    with _stop_when_asked() as stop:
        run_all(resolved, _run(resolved, source, name), stop)


@cli.command("simulate")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--videos", default=10, show_default=True, help="Number of operations.")
@click.option("--seed", default=0, show_default=True, help="The same seed and options give the same labels and pixels.")
@click.option("--fps", default=25, show_default=True, help="Frames a second of the videos.")
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
    from engine.progress import progress_bar
    from features.simulation import simulate

    with _stop_when_asked() as stop, progress_bar(videos, "simulating", "video") as bar:
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
            on_progress=lambda done, total: bar.update(done - bar.n),
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


def _joint_setting(source: str, overrides: tuple[str, ...], key: str, joint_run: str | None) -> tuple[str, ...]:
    """The setting that names the checkpoint of a run's joint net."""
    if joint_run is None:
        return ()
    from stage2_temporal.joint import joint_checkpoint

    return (f"{key}={joint_checkpoint(_run(_config(source, overrides), source, joint_run))}",)


def _dataset(config: Config) -> tuple[Any, Path]:
    from features.catalogue import open_dataset

    return open_dataset(config)


def _stop_when_asked() -> Any:
    from engine.stopping import watch_signals

    return watch_signals()


def _shard(text: str) -> tuple[int, int]:
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N-1, for example 0/4")
    return int(first), int(second)


def _sentence(result: dict[str, Any]) -> str:
    return str(result.get("sentence", "done"))


if __name__ == "__main__":
    cli()
