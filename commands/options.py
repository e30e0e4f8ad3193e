"""What several commands share: options, reading the settings, refusing combinations of options, and exit codes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import UserError, printable

if TYPE_CHECKING:
    from configs.load import GivenKeys
    from configs.schema import Config
    from engine.stopping import StopRequest

Callback = Callable[..., Any]

EXIT_PARTLY = 1  # the command has finished, but some videos failed or were left out
SHARED_STAGES = ("train-cnn", "extract", "train-temporal", "train-joint")  # several processes may share the work
STAGES = (*SHARED_STAGES, "train-tools", "evaluate", "run", "ablate", "compare-encoders")  # can be a Slurm job


class _Path(click.Path):
    """A path that is not empty: `Path("")` would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "" and param is not None:
            raise UserError(f"{param.opts[0]}: expected a path, got an empty value")
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)
FILE = _Path(path_type=Path, dir_okay=False)
POSITIVE = click.FloatRange(min=0, min_open=True)
RUN_NAME = "Name of the run, a folder below `runs/`. Default: the name of the file of settings or preset."
FEATURES_HELP = "Feature folder. Default: the one that the run's extract wrote, or else the only one in extract.store."

SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting (`config show` lists them), for example --set data.fps=5. Repeatable.",
)
CONFIG = click.option(
    "--config",
    "source",
    default="cholec80",
    metavar="FILE",
    help="Settings: a YAML file or the name of a preset in configs/.",
)
MODEL = click.option(
    "--model",
    type=click.Choice(["auto", "temporal", "joint"]),
    default="auto",
    help="Which network of the run to use; auto: the joint net only if the run has no other.",
)
INFERENCE = click.option(
    "--inference",
    type=click.Choice(["clip", "carried"]),
    help="Start each clip from a zero state, or carry the state through the video. Default: as in training.",
)
DECODING = click.option(
    "--decoding",
    type=click.Choice(["none", "calibrated", "filter", "causal", "offline"]),
    help="How to decode the phases. Later frames are seen by offline and, within temporal.decoding.lag_s, by causal. "
    "Default: temporal.decoding.mode.",
)
PHASE_ORDER = click.option(
    "--phase-order",
    metavar="ORDER",
    help="Which phase is 0, 1, ... in files that contain phase numbers: a name (mtrcnet, tf-cholec80), dataset "
    "(the order of the data set's description), a file with one phase per line, or comma-separated phases.",
)
TRUSTED = click.option(
    "--trusted",
    is_flag=True,
    help="Load third-party weights even with torch before 2.10, which cannot load them safely.",
)
INDEX = click.option("--index", "index_file", type=PATH, help="Use this index instead of data.index.")
JSON_FILE = click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write the results to this file.")
READING = (
    click.option("--ground-truth", type=PATH, metavar="DIR", help="Folder of the annotations."),
    click.option(
        "--fps",
        type=POSITIVE,
        help="Rate in Hz of the rows that are compared; relaxed conventions need it. Default: inferred from the files.",
    ),
    click.option(
        "--prediction-fps", type=POSITIVE, help="Rate in Hz of the predictions' rows, if it differs from --fps."
    ),
    click.option(
        "--skip-first-row", is_flag=True, help="Leave out each video's first row, as the official script does."
    ),
    PHASE_ORDER,
    click.option("--allow-missing", is_flag=True, help="Leave out videos that are in only one of the folders."),
    click.option(
        "--background",
        multiple=True,
        metavar="NAME",
        help="Phase that segmental metrics (edit score, F1 at an overlap) ignore. Repeatable. Default: the data set's.",
    ),
)


def reading_options(command: Callback) -> Callback:
    """Add the options on how to read folders of phase files, for commands that score any program's predictions."""
    for option in reversed(READING):
        command = option(command)
    return command


# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """The values of `--config`, `--set` and `--name`."""

    source: str
    overrides: tuple[str, ...]
    name: str | None = None

    @cached_property
    def config(self) -> Config:
        """The settings that result from file and `--set`. Raises UserError naming the file or key that is wrong."""
        return self.changed({})

    def changed(self, changes: Mapping[str, object]) -> Config:
        """Return the settings with `changes`, the values of other options by settings key.

        A value of None means that the option was not given.
        """
        from configs.load import load_config

        given = {key: value for key, value in changes.items() if value is not None}
        return load_config(self.source, self.overrides, given)

    def given(self) -> GivenKeys:
        """Return the settings keys that the user gave, with `--set` or in a file, as opposed to those of a preset."""
        from configs.load import keys_given

        return keys_given(self.source, self.overrides)

    def run(self, name: str | None = None) -> Path:
        """Return the folder of the run `name`. The default is `--name`, or else the name of the settings file."""
        from engine.runs import run_folder

        given = (one for one in (name, self.name) if one is not None)
        return run_folder(self.config, next(given, Path(self.source).stem))

    def other_run(self, name: str | None) -> Path | None:
        """Return the folder of a run that another option names, or None if that option was not given."""
        return None if name is None else self.run(name)

    def joint_checkpoint(self, name: str | None) -> Path | None:
        """Return the checkpoint of another run's joint net, or None if the option naming the run was not given."""
        if name is None:
            return None
        from stage2_temporal.joint.net import joint_checkpoint

        return joint_checkpoint(self.run(name))


def settings(name: str | None = RUN_NAME) -> Callable[[Callback], Callback]:
    """Add `--config`, `--set` and `--name` to a command, which gets their values as one argument `settings: Settings`.

    `name` is the help text of `--name`; with None the command has no such option.
    """

    def decorate(command: Callback) -> Callback:
        @functools.wraps(command)
        def with_settings(*arguments: Any, source: str, overrides: tuple[str, ...], **options: Any) -> Any:
            found = Settings(source, overrides, options.pop("name", None))
            return command(*arguments, settings=found, **options)

        named = with_settings if name is None else click.option("--name", help=name)(with_settings)
        return CONFIG(SET(named))

    return decorate


def several_devices(command: Callback) -> Callback:
    """Add `--devices N` to a command: this process then starts N processes that run it, and exits with their code."""

    @functools.wraps(command)
    def started(*arguments: Any, devices: int | None, **options: Any) -> Any:
        from engine.launch import LAUNCHER_PID, launch, run_copies

        if devices is None or LAUNCHER_PID in os.environ:
            return command(*arguments, **options)
        if launch().count > 1:
            raise UserError("--devices: torchrun or srun has already started several processes; leave it out")
        if devices == 1:
            return command(*arguments, **options)
        sys.exit(run_copies([sys.executable, *sys.argv], devices))

    return click.option(
        "--devices",
        type=click.IntRange(1),
        metavar="N",
        help="Run as N processes on this machine, one per GPU. On several machines use torchrun or srun.",
    )(started)


# ---------------------------------------------------------------------------------------------- refusals


def given(*names: str) -> list[str]:
    """Return those options, out of the parameters `names`, that the user gave on the command line, as `--option`."""
    context = click.get_current_context()
    source = click.core.ParameterSource.COMMANDLINE
    return [
        option.opts[-1] if option.opts[-1].startswith("--") else option.opts[0]
        for option in context.command.params
        if option.name in names and context.get_parameter_source(option.name) is source
    ]


def refuse(what: str, options: Sequence[str]) -> None:
    """Raise UserError if any options are given that would have no effect with `what`; none is silently ignored."""
    if options:
        raise UserError(f"{', '.join(options)}: cannot be combined with {what}; leave it out")


def note_unused(settings: Settings, *blocks: str) -> None:
    """Print a note for each key of `--set` that is or belongs to one of `blocks`, which this command does not use."""
    from engine.progress import say

    for key in sorted(settings.given().by_set):
        if not {block := key.partition(".")[0], key}.isdisjoint(blocks):
            say(f"note: --set {key} has no effect here; train-{'temporal' if block == 'data' else block} uses it")


def refuse_trusted(trusted: bool, instead: str | None) -> None:
    """Raise UserError if `--trusted` is given but the weights come from `instead`, which is not a third-party file."""
    if trusted and instead:
        refuse(f"{instead}: no third-party file is loaded", ["--trusted"])


def known_weights(config: Config) -> str | None:
    """Return the setting that names the backbone's initial weights, or None if they are a third-party file."""
    weights = config.cnn.weights
    return f"cnn.weights={weights}" if are_own_weights(weights, config.cnn.backbone) else None


def are_own_weights(weights: str, backbone: str) -> bool:
    """Whether a value of `cnn.weights` means something else than a third-party file.

    Published weights of a described encoder are such a file, unless they are a part of a package.
    """
    from configs.encoder_spec import find_description

    if weights not in {"published", "imagenet", "cached"}:
        return weights == "random" or weights.startswith("run:")
    described = find_description(backbone)
    return described is None or described.weights is None or described.weights.package is not None


def known_encoder(config: Config) -> str | None:
    """Return the setting that says where the encoder comes from, or None if that is a third-party file."""
    if config.extract.checkpoint is not None:
        return "extract.checkpoint, or --from-joint"
    return "extract.encoder=finetuned" if uses_stage_one(config) else known_weights(config)


def uses_stage_one(config: Config) -> bool:
    """Whether the encoder is one that train-cnn has trained."""
    return config.extract.checkpoint is None and config.extract.encoder == "finetuned"


def uses_joint(model: str, run: Path) -> bool:
    """Whether `--model` selects the run's joint net: it was asked for, or it is the run's only network."""
    from configs.schema import JOINT_FOLDER, TEMPORAL_FOLDER

    alone = (run / JOINT_FOLDER).exists() and not (run / TEMPORAL_FOLDER).exists()
    return model == "joint" or (model == "auto" and alone)


# ---------------------------------------------------------------------------------------------- how a command ends


def require_one_process(command: str) -> None:
    """Raise UserError if a launcher has started several processes for a command that runs in a single one."""
    from engine.launch import launch, set_torchrun_variables

    count = launch().count
    if count == 1:
        return
    if command not in SHARED_STAGES:
        raise UserError(
            f"{command} runs as one process, but a launcher has started {count}; only these can use several: "
            + ", ".join(SHARED_STAGES)
        )
    set_torchrun_variables()


def watch_signals() -> AbstractContextManager[StopRequest]:
    """Return a context that catches stop signals while its body runs, and yields the `StopRequest`."""
    from engine import stopping

    return stopping.watch_signals(leaving=click.get_current_context().obj is True)


def exit_partly_if(problems: object) -> None:
    """Exit with code 1 if `problems` is true or not empty."""
    if problems:
        sys.exit(EXIT_PARTLY)


def end_with_failures(failed: Sequence[tuple[str, object]]) -> None:
    """Print each failed video or training with its reason, and exit with code 1 if there is any."""
    for name, reason in failed:
        click.echo(printable(f"failed: {name}: {reason}"), err=True)
    exit_partly_if(failed)


def end_with_left_out(left_out: Sequence[Mapping[str, Any]]) -> None:
    """Exit with code 1 if videos of a split were left out.

    Videos in data.exclude and videos without labels do not count.
    """
    from engine.launch import is_main_process

    missed = [video for video in left_out if not (video.get("excluded") or video.get("unlabelled"))]
    # only rank 0 exits with 1: a launcher kills the other ranks as soon as one fails
    exit_partly_if(any(video.get("split") != "none" for video in missed) and is_main_process())
