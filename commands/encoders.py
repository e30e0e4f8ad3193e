"""Commands about encoders: `encoders list` and `encoders info`."""

from __future__ import annotations

import json

import click

from configs.errors import printable


@click.group()
def encoders() -> None:
    """List the known encoders, and say what one of them needs.

    An encoder turns a frame into an embedding. Use its name with `extract --encoder NAME`, or as cnn.backbone.
    """


@encoders.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print all that the descriptions say, as JSON.")
def list_encoders(as_json: bool) -> None:
    """List the encoders that have a description.

    Shown are the dimension of their embeddings, the size of their images, whether their weights are on this machine,
    and which data sets their pretraining has seen. Besides these, nearly every classification network of torchvision
    and every network of timm can be used.
    """
    from commands.encoder_lines import encoder_records, encoder_rows, other_encoders

    if as_json:
        click.echo(json.dumps(encoder_records(), indent=2))
        return
    rows = encoder_rows()
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo("")
    for line in other_encoders():
        click.echo(line)


@encoders.command("info")
@click.argument("name")
def info(name: str) -> None:
    """Show what is known about an encoder.

    NAME is one of `encoders list`, a classification network of torchvision, timm:NAME, or a network of a plug-in. Shown
    are the dimension of its embeddings, how frames are prepared for it and who says so, its weights (where they come
    from, their licence, and whether they are on this machine), and which known data sets it was pretrained on.
    """
    from commands.encoder_lines import encoder_lines

    for line in encoder_lines(name):
        click.echo(printable(line))
