"""The commands `config`, which prints settings, and `doctor`, which checks whether they will work on this machine."""

from __future__ import annotations

import click

from commands import options
from commands.options import Settings


@click.group()
def config() -> None:
    """Show settings."""


@config.command("show")
@options.settings(name=None)
def show(settings: Settings) -> None:
    """Print every setting with the value that commands use.

    The values come from preset or file, and --set. The output can be saved and used as --config.
    """
    from configs.load import to_yaml

    click.echo(to_yaml(settings.config), nl=False)


@click.command()
@options.settings(name=None)
def doctor(settings: Settings) -> None:
    """Check whether this machine can do what the settings ask for.

    Prints one line each about installation, devices, decoders, disks, weights and data; where something is wrong, it
    says what to do. Changes nothing. The exit code is 0 if nothing fails, otherwise 1.
    """
    from commands.doctor.settings import diagnose

    failed = 0
    for finding in diagnose(lambda: settings.config):
        click.echo(finding.line())
        failed += finding.level == "FAIL"
    options.exit_partly_if(failed)
