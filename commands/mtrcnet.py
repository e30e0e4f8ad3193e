"""Commands about files of the original MTRCNet programs: `import-checkpoint`, `export-checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands import options
from commands.options import PATH, Settings
from configs.errors import UserError


@click.command("import-checkpoint")
@click.argument("file", type=PATH)
@options.settings(name="Name of the new run, a folder below `runs/`. Required.")
@options.PHASE_ORDER
@click.option(
    "--normalisation",
    type=click.Choice(["main", "pytorch1.2.0"]),
    help="Release whose mean and standard deviation normalised the training frames. Default: preprocess.mean and "
    "preprocess.std if --set or a file of your own gives them, otherwise inferred from the layers and keys of FILE.",
)
@click.option(
    "--variant",
    type=click.Choice(["tool", "phase", "multitask", "two-layer", "cl", "pytorch1.2.0"]),
    help="Which network FILE contains, if its layers do not show that.",
)
@click.option(
    "--into", "into_run", metavar="RUN", help="If FILE contains only a mapping: the run of the net it belongs to."
)
@options.TRUSTED
def import_checkpoint(file: Path, settings: Settings, into_run: str | None, **chosen: Any) -> None:
    """Turn a file of the MTRCNet programs into a run.

    FILE.pth becomes the run --name, which evaluate, extract and train-joint accept. The command prints what the file
    contains and what its name says. No code in the file is run.
    """
    from interop.mtrcnet_runs import ImportRequest, import_original

    if settings.name is None:
        raise UserError("import-checkpoint: give the new run a name with --name RUN")
    request = ImportRequest(file, into=settings.other_run(into_run), given=settings.given(), **chosen)
    click.echo(f"imported: {import_original(settings.config, settings.run(), request)['sentence']}")


@click.command("export-checkpoint")
@click.argument("run_name", metavar="RUN")
@click.argument("out", metavar="OUT_DIR", type=PATH)
@options.settings(name=None)
@options.PHASE_ORDER
@click.option(
    "--prefix-module/--no-prefix-module",
    default=None,
    help="Whether keys begin with `module.`. Default: yes, unless those of the imported file or its release do not.",
)
def export_checkpoint(
    run_name: str, out: Path, settings: Settings, phase_order: str | None, prefix_module: bool | None
) -> None:
    """Write a run's joint net as the MTRCNet programs do.

    The command writes one file to OUT_DIR, with the keys and the file name that those programs use.
    """
    from interop.mtrcnet_runs import export_original

    written = export_original(settings.config, settings.run(run_name), out, phase_order, prefix_module)
    click.echo(f"written: {written}")
