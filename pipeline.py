"""The command line: the name and the module of each command.

A command's module is imported only when the command runs, so that `python pipeline.py --help` answers at once.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

PACKAGES = (
    "commands",
    "configs",
    "engine",
    "evaluation",
    "features",
    "interop",
    "live",
    "stage1_cnn",
    "stage2_temporal",
)
for _package in PACKAGES:  # the names are common, and Python would import another package that is earlier on the path
    _spec = importlib.util.find_spec(_package)
    _found = [os.path.realpath(place) for place in _spec.submodule_search_locations or ()] if _spec else []
    if os.path.join(os.path.dirname(os.path.realpath(__file__)), _package) not in _found:
        _where = _found[0] if _found else (_spec and _spec.origin)
        print(
            f"error: Python finds {_where} instead of this program's own package {_package}; remove its folder from "
            "PYTHONPATH, or start from another folder",
            file=sys.stderr,
        )
        sys.exit(2)

import configs  # noqa: E402, F401 - sets GOMP_SPINCOUNT, once `configs` is known to be this program's

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
# name: (module:function, first sentence of the command's help). --help lists the commands without importing them.
COMMANDS = {
    "index": ("commands.data:index", "Find the videos and annotations below a folder, and split them"),
    "train-cnn": ("commands.train:train_cnn", "Stage one: fine-tune a CNN on the tools visible in single frames"),
    "extract": ("commands.train:extract", "Compute one embedding per frame, in one HDF5 file per video"),
    "train-tools": (
        "commands.train:train_tools",
        "Recognise tools by a linear probe of the features, for encoders that are not trained",
    ),
    "train-temporal": ("commands.train:train_temporal", "Stage two: train a phase model on whole videos of embeddings"),
    "ablate": ("commands.train:ablate", "Compare settings of stage two over seeds: ranked table, plots, best settings"),
    "compare-encoders": (
        "commands.train:compare_encoders",
        "Compare encoders, frozen or fine-tuned, under the same temporal heads, seeds and folds",
    ),
    "train-joint": ("commands.train:train_joint", "Train both stages as one network, end to end (MTRCNet, MTRCNet-CL)"),
    "evaluate": ("commands.results:evaluate", "Score phases and tools of a run, or predictions of any program"),
    "compare": ("commands.results:compare", "Compare models on the same videos: differences, intervals, p values"),
    "report": ("commands.results:report", "Write one HTML file about a run, or about several side by side"),
    "predict": ("commands.results:predict", "Recognise phases and tools in new videos: CSV, ribbon, annotated video"),
    "stream": ("commands.live:stream", "Recognise phases and tools while a video runs: one line of JSON per frame"),
    "export-model": (
        "commands.export_model:export_model",
        "Write a run's nets as one ONNX file, for programs without this project",
    ),
    "export": ("commands.results:export", "Write predictions as the original MTRCNet programs' text files"),
    "run": ("commands.train:run", "Run index, both stages and evaluation from one file of settings"),
    "submit": ("commands.cluster:submit", "Run a command as a Slurm job that resumes after its time limit"),
    "simulate": ("commands.data:simulate", "Write SIMULATED operations to try the pipeline on"),
    "import-checkpoint": (
        "commands.mtrcnet:import_checkpoint",
        "Turn a file of the MTRCNet programs into a run",
    ),
    "export-checkpoint": (
        "commands.mtrcnet:export_checkpoint",
        "Write a run's joint net as the MTRCNet programs do",
    ),
    "datasets": ("commands.datasets:datasets", "List and show the known data sets, and try a description on a folder"),
    "encoders": ("commands.encoders:encoders", "List the known encoders, and say what one of them needs"),
    "annotations": ("commands.annotations:group", "Convert files of annotation tools, and find labels to check"),
    "view": ("commands.view:view", "Look at videos with labels and predictions in a browser, and correct labels"),
    "features": ("commands.data:features", "Check, describe, import and export feature folders"),
    "config": ("commands.settings:config", "Show settings"),
    "doctor": ("commands.settings:doctor", "Check whether this machine can do what the settings ask for"),
}


class Group(click.Group):
    """A command group that imports the commands of `lazy` only when needed.

    An expected error in a command ends the program with one line and an exit code instead of a traceback.
    """

    def __init__(self, *arguments: Any, lazy: Mapping[str, tuple[str, str]] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.lazy = lazy or {}

    def list_commands(self, context: click.Context) -> list[str]:
        return [*self.lazy, *super().list_commands(context)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.lazy:
            return super().get_command(context, name)
        module, _, function = self.lazy[name][0].partition(":")
        found: click.Command = getattr(importlib.import_module(module), function)
        return found

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self.lazy.items()])

    def invoke(self, context: click.Context) -> Any:
        from engine.stopping import EXIT_INTERRUPTED, StoppedAtOnce, watch_signals

        try:
            with watch_signals(leaving=context.obj is True, at_once=True):
                return super().invoke(context)
        except (Exception, StoppedAtOnce) as error:
            from engine.ending import report

            code = report(error)
            if code is None:
                raise
            context.exit(code)
        except KeyboardInterrupt:  # a second Ctrl-C ends the command without waiting for it to save
            click.echo("interrupted", err=True)
            context.exit(EXIT_INTERRUPTED)
        finally:
            from engine.processes import leave

            leave()


@click.group(cls=Group, lazy=COMMANDS, context_settings=CONTEXT)
@click.version_option(package_name="surgstage", message="%(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Surgical workflow recognition in two stages.

    Most commands take settings with --config FILE and --set KEY=VALUE; `config show` prints the resulting settings. The
    folder of the videos is data.root. Set it with `--set data.root=DIR`, in the file, or in the environment variable
    SURGSTAGE_DATA.
    """
    from commands.options import require_one_process

    require_one_process(str(context.invoked_subcommand))


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line and end the process. To run a command in a process that continues, call `cli`."""
    atexit.register(gc.freeze)  # otherwise the interpreter's last garbage collection takes a second for torch's objects
    cli(arguments, program, obj=True)  # obj tells the commands that the process ends with them


if __name__ == "__main__":
    main()
