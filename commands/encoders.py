"""Commands about encoders: `encoders list` and `encoders info`."""

from __future__ import annotations

import click


@click.group()
def encoders() -> None:
    """List the known encoders, and say what one of them needs.

    An encoder turns a frame into an embedding. Use its name with `extract --encoder NAME`, or as cnn.backbone.
    """


@encoders.command("list")
def list_encoders() -> None:
    """List the encoders by name, with the dimension of their embeddings and the size of their images.

    Besides those listed, cnn.backbone takes every classification network of torchvision, under its name there, and
    timm:NAME for every network of timm.
    """
    from configs.encoder_spec import described_encoders, find_description

    for name in described_encoders():
        description = find_description(name)
        if description is not None:
            click.echo(f"{name:28} {description.embedding_dim or '':>5} {description.title}")


@encoders.command("info")
@click.argument("name")
def info(name: str) -> None:
    """Show what the encoder NAME is, how it takes its frames, and where its weights are."""
    from configs.encoder_spec import find_description
    from configs.errors import UserError

    description = find_description(name)
    if description is None:
        raise UserError(f"{name}: no such encoder; `encoders list` shows the names")
    for key, value in description.model_dump(exclude_defaults=True).items():
        click.echo(f"{key}: {value}")
