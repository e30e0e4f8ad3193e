"""Commands that train or extract.

`train-cnn`, `extract`, `train-tools`, `train-temporal`, `train-joint`, `ablate`, `compare-encoders` and `run`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from commands import options
from commands.options import PATH, Settings
from configs.errors import UserError

if TYPE_CHECKING:
    from engine.training_result import TrainingResult


def end_of_training(what: str, result: TrainingResult) -> None:
    """Print the result of a training, and exit with code 1 if it left videos out."""
    from engine.launch import is_main_process

    if is_main_process():
        click.echo(f"{what}: {result.sentence}")
    options.end_with_left_out(result.left_out or ())


@click.command("train-cnn")
@options.settings()
@options.several_devices
@options.TRUSTED
def train_cnn(settings: Settings, trusted: bool) -> None:
    """Stage one: fine-tune a CNN on the tools visible in single frames.

    Frames are decoded once into a cache (cache.dir). A training that was stopped resumes where it stopped. If a video
    cannot be read, it is left out and named, and the exit code is 1.
    """
    from features.dataset.catalogue import open_dataset
    from stage1_cnn.train import train_cnn as train

    config = settings.config
    options.note_unused(settings, "temporal", "joint")
    options.refuse_trusted(trusted, options.known_weights(config))
    with options.watch_signals() as stop:
        dataset = open_dataset(config)
        result = train(config, settings.run(), dataset, stop, trusted=trusted)
    end_of_training("stage one", result)


@click.command()
@options.settings()
@options.several_devices
@click.option("--shard", default="0/1", metavar="I/N", help="Extract every N-th video, starting at I (0 to N-1).")
@options.INDEX
@click.option("--from-joint", "joint_run", metavar="RUN", help="Encode with the backbone of RUN's joint net.")
@click.option(
    "--encoder",
    metavar="NAME",
    help="Encode with this network as it is, without train-cnn (`encoders list` shows the names).",
)
@click.option("--weights", metavar="FILE", help="With --encoder: its weights, a value of cnn.weights.")
@options.TRUSTED
def extract(
    settings: Settings,
    shard: str,
    index_file: Path | None,
    joint_run: str | None,
    encoder: str | None,
    weights: str | None,
    trusted: bool,
) -> None:
    """Compute one embedding per frame, in one HDF5 file per video.

    By default the encoder is the CNN that train-cnn has trained under this name. --encoder names another one, which is
    used as it is; frames are then resized and normalised as that encoder documents, unless --set preprocess.* or a
    settings file for that very encoder says otherwise.

    The file also contains tool logits and labels. Files that exist and pass verification are skipped, so a second start
    only computes what is missing. If a video is damaged, it is reported, the others are extracted, and the exit code is
    1. Later stages leave that video out; the next extract tries it again.
    """
    part = shard_of_process(shard)
    from engine.processes import join
    from features.dataset.catalogue import open_dataset
    from stage1_cnn.extract import extract as extract_features

    if encoder is None and weights is not None:
        raise UserError("--weights: belongs to --encoder NAME; name the encoder whose weights these are")
    if encoder is not None:
        options.refuse("--encoder", options.given("joint_run"))
        if (other := settings.config.extract.checkpoint) is not None:
            raise UserError(
                f"--encoder: the settings name another one, extract.checkpoint={other}; leave one of them out"
            )
    checkpoint = settings.joint_checkpoint(joint_run)
    frozen = {"cnn.backbone": encoder, "cnn.weights": weights, "extract.encoder": encoder and "initial"}
    config = settings.changed({"data.index": index_file, "extract.checkpoint": checkpoint, **frozen})
    options.note_unused(settings, "temporal", "joint")
    options.refuse_trusted(trusted, options.known_encoder(config))
    run = settings.run()
    with options.watch_signals() as stop:
        dataset = open_dataset(config)
        processes = join(config.device, stop)  # ranks must end together, since a launcher kills all when one fails
        report = processes.each(lambda: extract_features(config, run, dataset, shard=part, stop=stop, trusted=trusted))
        partly = any(processes.gather(bool(report.failed)))
    click.echo(report.sentence())
    options.end_with_failures(report.failed)
    options.exit_partly_if(partly)
    options.end_with_left_out(report.left_out)


def shard_of_process(text: str) -> tuple[int, int]:
    """Divide `--shard I/N` among the processes that a launcher started; return this process's own I and N.

    Raises UserError unless I and N are integers with 0 <= I < N.
    """
    from engine.launch import launch

    first, slash, second = text.partition("/")
    if not (text.isascii() and slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N-1, for example 0/4")
    here = launch()
    return int(first) + int(second) * here.rank, int(second) * here.count


@click.command("train-tools")
@options.settings()
@click.option("--features", type=PATH, help=options.FEATURES_HELP)
def train_tools(settings: Settings, features: Path | None) -> None:
    """Recognise tools by a linear probe of the features, for encoders that are not trained.

    One logistic regression per tool on standardised features of single frames; its regularisation is chosen on the
    validation videos, or is C=1 without any. No image is read. `evaluate` and `predict` then recognise the run's tools
    with it where the features have no tool logits, as those of `extract.encoder=initial`. Features of a fine-tuned
    encoder have tool logits, which stay in use; validation mAP of both can be compared.
    """
    from features.store_folder import find_feature_folder
    from stage2_temporal.tool_probe import train_tools as train

    options.note_unused(settings, "joint")
    run = settings.run()
    folder = find_feature_folder(features, run, settings.config.extract.store)
    with options.watch_signals() as stop:
        result = train(settings.config, run, folder, stop, settings.given())
    click.echo(f"tools: {result.sentence}")
    options.end_with_left_out(result.left_out)


@click.command("train-temporal")
@options.settings()
@options.several_devices
@click.option("--features", type=PATH, help=options.FEATURES_HELP)
@click.option("--from-joint", "joint_run", metavar="RUN", help="Start from the LSTM of RUN's joint net.")
def train_temporal(settings: Settings, features: Path | None, joint_run: str | None) -> None:
    """Stage two: train a phase model on whole videos of embeddings.

    No image is read. As a baseline, a linear per-frame head is trained on the same features for the same number of
    epochs. Give each experiment its own --name; a name that exists with other settings is refused.
    """
    from features.store_folder import find_feature_folder
    from stage2_temporal.joint.start import start_weights
    from stage2_temporal.train import train_temporal as train

    config = settings.changed({"temporal.start_from": settings.joint_checkpoint(joint_run)})
    options.note_unused(settings, "joint")
    run = settings.run()
    folder = find_feature_folder(features, run, config.extract.store)
    with options.watch_signals() as stop:
        result = train(config, run, folder, stop, start=start_weights(config), given=settings.given())
    end_of_training("stage two", result)


@click.command("train-joint")
@options.settings()
@options.several_devices
@click.option("--from-cnn", "cnn_run", metavar="RUN", help="Start from the backbone and tool head of RUN's train-cnn.")
@click.option("--from-temporal", "temporal_run", metavar="RUN", help="Start from the LSTM of RUN's train-temporal.")
@click.option("--from-joint", "joint_run", metavar="RUN", help="Start from all branches of RUN's joint net.")
@options.TRUSTED
def train_joint(
    settings: Settings, cnn_run: str | None, temporal_run: str | None, joint_run: str | None, trusted: bool
) -> None:
    """Train both stages as one network, end to end (MTRCNet, MTRCNet-CL).

    Training reads clips of frames. Without a --from option, the backbone starts from cnn.weights and everything else
    from random weights. The training steps run one after the other: multitask, and for MTRCNet-CL (joint.net.mapping)
    mapping and correlation. A training that was stopped resumes where it stopped.
    """
    from features.dataset.catalogue import open_dataset
    from stage2_temporal.joint.train import Start
    from stage2_temporal.joint.train import train_joint as train

    config = settings.config
    starts = options.given("cnn_run", "joint_run")
    options.refuse_trusted(trusted, starts[0] if starts else options.known_weights(config))
    start = Start(*map(settings.other_run, (cnn_run, temporal_run, joint_run)))
    with options.watch_signals() as stop:
        dataset = open_dataset(config)
        result = train(config, settings.run(), dataset, stop, start, trusted=trusted)
    end_of_training("joint net", result)


@click.command()
@click.argument("file", metavar="FILE")
@click.option(
    "--features", type=PATH, help="Feature folder. Default: the one of --run, or else the only one in extract.store."
)
@click.option("--name", help="Name of the ablation, a folder below `runs/`. Default: the name of FILE.")
@click.option("--run", "run_name", metavar="RUN", help="Run whose features are used. Default: the base preset's name.")
@click.option("--workers", default=-1, help="Number of trainings at once; -1 is one per core.")
@options.SET
@click.option("--base", metavar="FILE", help="Preset or file of settings to use instead of the base that FILE names.")
def ablate(
    file: str,
    features: Path | None,
    name: str | None,
    run_name: str | None,
    workers: int,
    overrides: tuple[str, ...],
    base: str | None,
) -> None:
    """Compare settings of stage two over seeds: ranked table, plots, best settings.

    FILE (a YAML file, or a name in configs/ablations) lists the settings and the seeds. One training runs on each core,
    and all share one copy of the features. An ablation that was stopped resumes where it stopped; trainings that failed
    are tried again. The results are a ranked table, ablation.csv, ablation.html with Optuna's plots, and best.yaml, a
    file of the best settings for --config. Settings are compared on the validation videos. --set changes the base that
    all trainings start from.
    """
    from features.store_folder import features_of_run
    from stage2_temporal.ablation.run import ablate as run_ablation
    from stage2_temporal.ablation.run import read_ablation

    if features is not None:
        options.refuse("--features", options.given("run_name"))
    spec = read_ablation(file, base)
    settings = Settings(spec.base, overrides, run_name)
    folder = settings.run(Path(file).stem if name is None else name)
    require_workers(workers)
    if run_name is not None:
        features = features_of_run(settings.run(), settings.config.extract.store)
    with options.watch_signals() as stop:
        failed = run_ablation(spec, folder, overrides, features, settings.run(), workers=workers, stop=stop)
    options.end_with_failures(failed)


def require_workers(workers: int) -> None:
    """Raise UserError unless `--workers` is -1 or at least 1."""
    if workers == 0 or workers < -1:
        raise UserError(f"--workers {workers}: give a number of trainings at once, or -1 for one per core")


@click.command("compare-encoders")
@click.argument("file", metavar="FILE")
@click.option("--name", help="Name of the comparison, a folder below `runs/`. Default: the name of FILE.")
@click.option("--workers", default=-1, help="Number of trainings at once; -1 is one per core.")
@options.SET
@click.option("--base", metavar="FILE", help="Preset or file of settings to use instead of the base that FILE names.")
@options.TRUSTED
def compare_encoders(
    file: str, name: str | None, workers: int, overrides: tuple[str, ...], base: str | None, trusted: bool
) -> None:
    """Compare encoders, frozen or fine-tuned, under the same temporal heads, seeds and folds.

    FILE (a YAML file, or a name in configs/ablations) lists encoders with their weights, heads, seeds and folds.
    Missing features are extracted, encoders with `finetune: true` are first trained on the tools in each fold, and then
    every head is trained on each encoder's features, one training per core. A frame probe (logistic regression on
    single frames) is fitted too. All are scored on the test videos; the validation videos choose the epochs. A
    comparison that was stopped resumes where it stopped; trainings that failed are tried again. The results are tables,
    encoders.csv (one row per training), encoders.json, and encoders.html with paired differences and plots of accuracy
    against cost. --set changes the base settings, for example --set temporal.epochs=3 to try a file quickly.
    """
    from configs.load import load_encoder_comparison
    from stage2_temporal.ablation.encoder_features import Plan
    from stage2_temporal.ablation.encoders import compare

    require_workers(workers)
    spec = load_encoder_comparison(file)
    own = all(options.are_own_weights(encoder.weights, encoder.backbone) for encoder in spec.encoders.values())
    options.refuse_trusted(trusted, "these encoders" if own else None)
    spec = spec.model_copy(update={"base": base}) if base else spec
    folder = Settings(spec.base, overrides).run(Path(file).stem if name is None else name)
    with options.watch_signals() as stop:
        failed = compare(Plan(spec, overrides, folder), workers=workers, stop=stop, trusted=trusted)
    options.end_with_failures(failed)


@click.command()
@options.settings()
def run(settings: Settings) -> None:
    """Run index, both stages and evaluation from one file of settings.

    The stages are index, train-cnn, extract, train-temporal and evaluate. With extract.encoder=initial, train-tools
    takes the place of train-cnn, if there are tool labels. A stage whose inputs have not changed is skipped. The
    results are summarised in RUN/summary.json.
    """
    from commands.run import run_all

    with options.watch_signals() as stop:
        summary = run_all(settings.config, settings.run(), stop)
    options.end_with_left_out(summary["left_out"])
